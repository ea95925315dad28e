"""The gradients of a grouped convolution as operations: the other two contractions."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.core import ShapedArray
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from grouped_conv_jax.algorithms import table
from grouped_conv_jax.algorithms.table import Implementation
from grouped_conv_jax.operations import arguments
from grouped_conv_jax.operations.forward import Forward, Settings, forward
from grouped_conv_jax.operations.padding import PaddingLike
from grouped_conv_jax.partitioning.explicit_mesh import (
    canonical,
    has_explicit_axes,
    mesh_of,
    sharding_of_result,
)
from grouped_conv_jax.primitive import contract


@arguments.keeps_64_bits
def grouped_conv_input_grad(
    lhs_shape: Sequence[int],
    rhs: ArrayLike,
    cotangent: ArrayLike,
    window_strides: Sequence[int],
    padding: PaddingLike,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvDimensionNumbers | Sequence[str] | None = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: NamedSharding | PartitionSpec | None = None,
    *,
    implementation: Implementation = None,
) -> jax.Array:
    r"""The gradient of a grouped convolution in its input, from that of its output.

    .. math::
        grad[n, q, g, c] = \sum_{k, o} cotangent[n, p, g, o] \; rhs[k, c, g, o]
            \quad \text{where} \quad q = p \cdot stride + k \cdot dilation

    It is what `jax.vjp` of `grouped_conv` computes, without a convolution before it, and can be
    differentiated to any order.

    Args:
      lhs_shape: the shape of the input, n + 2 integers.
      rhs: the kernel, as in `grouped_conv`.
      cotangent: the gradient of the output: of its shape, layout and dtype.
      window_strides: as all others up to `preferred_element_type` that of the convolution
        `grouped_conv(lhs, rhs, ...)`.
      padding: of the convolution.
      lhs_dilation: of the convolution.
      rhs_dilation: of the convolution.
      dimension_numbers: of the convolution.
      feature_group_count: of the convolution.
      batch_group_count: of the convolution.
      precision: of the convolution.
      preferred_element_type: of the convolution; the dtype of `cotangent`.
      out_sharding: the sharding of the gradient where mesh axes are Explicit.
      implementation: as in `grouped_conv`.

    Returns:
      The gradient: of shape `lhs_shape` and the dtype of `rhs`.

    Raises:
      ValueError, TypeError: an argument is wrong; the message names it and says what would do.
      NotImplementedError: when compiled, if the `implementation` asked for does not compute this.

    Example:
      >>> import jax.numpy as jnp
      >>> from grouped_conv_jax import grouped_conv_input_grad
      >>> w, dy = jnp.ones((6, 2, 3, 3)), jnp.ones((8, 6, 32, 32))
      >>> shape = (8, 4, 32, 32)
      >>> grouped_conv_input_grad(shape, w, dy, (1, 1), "SAME", feature_group_count=2).shape
      (8, 4, 32, 32)
    """
    asked = table.parsed(implementation)
    rhs_type = arguments.array_type("rhs", rhs)
    lhs = ShapedArray(arguments.shape("lhs_shape", lhs_shape), rhs_type.dtype)
    settings = Settings(
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        precision,
        preferred_element_type,
    )
    call = forward(lhs, rhs_type, settings, result="lhs")
    given = _checked_cotangent(cotangent, call)
    wanted = inner = None
    if out_sharding is not None:
        wanted = canonical(out_sharding, lhs.shape, mesh_of(given, rhs_type))
        inner = call.sharding_of_prepared(wanted)
    gradient = contract(
        cotangent,
        rhs,
        contraction="dgrad",
        spec=call.spec,
        implementation=asked,
        out_sharding=sharding_of_result("dgrad", call.spec, given, rhs_type, inner),
    )
    return _of_lhs(gradient, lhs.shape, call, wanted) if call.changes_lhs else gradient


def _of_lhs(
    gradient: jax.Array, shape: Sequence[Any], call: Forward, out_sharding: NamedSharding | None
) -> jax.Array:
    """From the gradient of what `call` makes of the input to that of the input."""
    kind = jax.typeof(gradient)
    sharding = call.extension.sharding(kind.sharding, gradient.ndim)
    if has_explicit_axes(sharding.mesh):
        gradient = jax.sharding.reshard(gradient, sharding)
    # The type has the mesh axes as well over which it varies inside shard_map.
    kind = kind.update(shape=shape, sharding=sharding)
    (of_lhs,) = jax.linear_transpose(call.prepared, kind)(gradient)
    return of_lhs if out_sharding is None else jax.sharding.reshard(of_lhs, out_sharding)


@arguments.keeps_64_bits
def grouped_conv_kernel_grad(
    lhs: ArrayLike,
    rhs_shape: Sequence[int],
    cotangent: ArrayLike,
    window_strides: Sequence[int],
    padding: PaddingLike,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvDimensionNumbers | Sequence[str] | None = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: NamedSharding | PartitionSpec | None = None,
    *,
    implementation: Implementation = None,
) -> jax.Array:
    r"""The gradient of a grouped convolution in its kernel, from that of its output.

    .. math::
        grad[k, c, g, o] = \sum_{n, p} lhs[n, p \cdot stride + k \cdot dilation, g, c]
            \; cotangent[n, p, g, o]

    It is what `jax.vjp` of `grouped_conv` computes, without a convolution before it, and can be
    differentiated to any order.

    Args:
      lhs: the input, as in `grouped_conv`.
      rhs_shape: the shape of the kernel, n + 2 integers.
      cotangent: the gradient of the output: of its shape, layout and dtype.
      window_strides: as all others up to `preferred_element_type` that of the convolution
        `grouped_conv(lhs, rhs, ...)`.
      padding: of the convolution.
      lhs_dilation: of the convolution.
      rhs_dilation: of the convolution.
      dimension_numbers: of the convolution.
      feature_group_count: of the convolution.
      batch_group_count: of the convolution.
      precision: of the convolution.
      preferred_element_type: of the convolution; the dtype of `cotangent`.
      out_sharding: the sharding of the gradient where mesh axes are Explicit.
      implementation: as in `grouped_conv`.

    Returns:
      The gradient: of shape `rhs_shape` and the dtype of `lhs`.

    Raises:
      ValueError, TypeError: an argument is wrong; the message names it and says what would do.
      NotImplementedError: when compiled, if the `implementation` asked for does not compute this.

    Example:
      >>> import jax.numpy as jnp
      >>> from grouped_conv_jax import grouped_conv_kernel_grad
      >>> x, dy = jnp.ones((8, 4, 32, 32)), jnp.ones((8, 6, 32, 32))
      >>> grouped_conv_kernel_grad(x, (6, 2, 3, 3), dy, (1, 1), "SAME", feature_group_count=2).shape
      (6, 2, 3, 3)
    """
    asked = table.parsed(implementation)
    lhs_type = arguments.array_type("lhs", lhs)
    settings = Settings(
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        precision,
        preferred_element_type,
    )
    rhs_type = ShapedArray(arguments.shape("rhs_shape", rhs_shape), lhs_type.dtype)
    call = forward(lhs_type, rhs_type, settings, result="rhs")
    given = _checked_cotangent(cotangent, call)
    prepared = call.prepared(lhs)
    return contract(
        prepared,
        cotangent,
        contraction="wgrad",
        spec=call.spec,
        implementation=asked,
        out_sharding=sharding_of_result(
            "wgrad", call.spec, jax.typeof(prepared), given, out_sharding
        ),
    )


def _checked_cotangent(cotangent: Any, call: Forward) -> Any:
    """Its type."""
    given, spec = arguments.array_type("cotangent", cotangent), call.spec
    if given.shape != spec.out_shape:
        raise ValueError(
            f"cotangent must have the shape of the output, {spec.out_shape}, got {given.shape}"
        )
    if given.dtype != spec.wide_dtype:
        raise TypeError(
            f"cotangent must have the dtype of the output, {spec.wide_dtype}, got {given.dtype}; "
            "convert it with astype, or give preferred_element_type"
        )
    return given
