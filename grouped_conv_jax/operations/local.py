"""`grouped_conv_local`: a locally connected layer, with a kernel of its own at each position.

A matrix product of the patches with the kernels, for each position and group.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from grouped_conv_jax.operations import arguments
from grouped_conv_jax.operations.forward import Forward, Settings, forward
from grouped_conv_jax.operations.padding import PaddingLike
from grouped_conv_jax.operations.patches import extract, kernel_type
from grouped_conv_jax.partitioning.explicit_mesh import sharding_of_result, with_auto_axes
from grouped_conv_jax.spec import ConvSpec


@arguments.keeps_64_bits
def grouped_conv_local(
    lhs: ArrayLike,
    rhs: ArrayLike,
    window_strides: Sequence[int],
    padding: PaddingLike,
    filter_shape: Sequence[int],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvDimensionNumbers | Sequence[str] | None = None,
    precision: Any = None,
    *,
    feature_group_count: int = 1,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: NamedSharding | PartitionSpec | None = None,
) -> jax.Array:
    r"""Grouped convolution whose kernel differs from position to position.

    Stands in for `jax.lax.conv_general_dilated_local`, and takes groups. With C inputs and O
    outputs per group, and K taps k,

    .. math::
        out[n, p, g, o] = \sum_{c, k} lhs[n, p \cdot stride + k \cdot dilation, g, c]
            \; rhs[p, c K + k, g, o]

    Args:
      lhs: the input, rank n + 2: batch N, features G * C, and n >= 0 spatial dimensions.
      rhs: the kernels, rank n + 2 and of the dtype of `lhs`: outputs G * O, inputs per group and
        taps C * K (the taps of each input together), and the n spatial dimensions of the output.
        Output feature g * O + o belongs to group g.
      window_strides: n integers, at least 1.
      padding: as in `grouped_conv`.
      filter_shape: n integers, the taps, in the order of the kernel's spatial letters.
      lhs_dilation: n integers, at least 1: `lhs` is spread out with zeros between (default 1).
      rhs_dilation: n integers, at least 1: the taps are apart as many (default 1).
      dimension_numbers: as in `grouped_conv`.
      precision: as in lax; by default that of `jax.default_matmul_precision`.
      feature_group_count: G. Divides the features of `lhs` and the outputs of `rhs`.
      preferred_element_type: dtype of the result and of the accumulation.
      out_sharding: the sharding of the result where mesh axes are Explicit.

    Returns:
      The output: N, G * O and n spatial dimensions, in the layout of the third string. 16-bit
      floats are multiplied and added up in 32 bits, which the patches take the memory of.

    Raises:
      ValueError, TypeError: an argument is wrong; the message names it and says what would do.

    Example:
      Two groups; 3 x 3 taps of two inputs each, at 8 x 8 positions.

      >>> import jax.numpy as jnp
      >>> from grouped_conv_jax import grouped_conv_local
      >>> x, w = jnp.ones((5, 8, 8, 4)), jnp.ones((8, 8, 2 * 3 * 3, 6))
      >>> grouped_conv_local(x, w, (1, 1), "SAME", (3, 3), feature_group_count=2,
      ...                    dimension_numbers=("NHWC", "HWIO", "NHWC")).shape
      (5, 8, 8, 6)

    References:
      Taigman et al., "DeepFace: Closing the Gap to Human-Level Performance in Face Verification",
      2014.
    """
    kernels = arguments.array_type("rhs", rhs)
    call = _call(
        arguments.array_type("lhs", lhs),
        kernels,
        window_strides,
        padding,
        filter_shape,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        precision,
        preferred_element_type,
    )
    spec = call.spec

    def compute(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return _product(extract(lhs, spec), rhs, spec).astype(spec.role_dtype("out"))

    # Wide already, since the transpose of the patches adds up.
    x = call.prepared(jnp.asarray(lhs).astype(spec.accumulator))
    w = jnp.asarray(rhs).astype(spec.accumulator)
    sharding = sharding_of_result("fprop", spec, jax.typeof(x), jax.typeof(w), out_sharding)
    return with_auto_axes(compute, sharding)(x, w)


def _call(
    lhs: Any,
    kernels: Any,
    window_strides: Any,
    padding: Any,
    filter_shape: Any,
    lhs_dilation: Any,
    rhs_dilation: Any,
    dimension_numbers: Any,
    feature_group_count: Any,
    *more: Any,
) -> Forward:
    """The convolution that this is where all positions have the same kernel."""
    numbers = arguments.layout(lhs.shape, kernels.shape, dimension_numbers)
    arguments.check_same_dtype(lhs=lhs, rhs=kernels)
    groups = arguments.group_count("feature_group_count", feature_group_count)
    taps = arguments.integers("filter_shape", filter_shape, lhs.ndim - 2)
    depth = lhs.shape[numbers.lhs_spec[1]] // groups
    outputs = kernels.shape[numbers.rhs_spec[0]]
    settings = Settings(
        window_strides, padding, lhs_dilation, rhs_dilation, numbers, groups, 1, *more
    )
    call = forward(lhs, kernel_type(lhs, outputs, depth, taps, numbers), settings)
    sizes = (outputs, depth * math.prod(taps), *call.spec.spatial_shape("out"))
    expected = [sizes[numbers.rhs_spec.index(d)] for d in range(lhs.ndim)]
    if tuple(kernels.shape) != tuple(expected):
        raise ValueError(
            f"rhs must have the shape {tuple(expected)}: {outputs} outputs, for each of them "
            f"{depth} input features per group times {math.prod(taps)} taps, and the output's "
            f"spatial shape {sizes[2:]}; got {tuple(kernels.shape)}"
        )
    return call


def _product(patches: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
    """For each position and group the sum over inputs and taps."""
    groups, (depth, outputs) = spec.feature_group_count, spec.group_width
    rank = len(spec.window_strides)
    batch, group, inside, out, *positions = range(4 + rank)
    layouts = spec.layout("out"), spec.layout("rhs")
    # The features of each array are two dimensions here, of the group and of what is inside it.
    features, kernels = layouts[0][1], layouts[1][0]
    taps = spec.spatial_shape("rhs")
    shape = patches.shape
    patches = patches.reshape(
        *shape[:features], groups, depth * math.prod(taps), *shape[features + 1 + rank :]
    )
    rhs = rhs.reshape(*rhs.shape[:kernels], groups, outputs, *rhs.shape[kernels + 1 :])
    result = jnp.einsum(
        patches,
        _letters(layouts[0], [[batch], [group, inside], *([p] for p in positions)]),
        rhs,
        _letters(layouts[1], [[group, out], [inside], *([p] for p in positions)]),
        _letters(layouts[0], [[batch], [group, out], *([p] for p in positions)]),
        precision=spec.precision,
        preferred_element_type=spec.accumulator,
    )
    return result.reshape(spec.out_shape)


def _letters(layout: Sequence[int], dimensions: Sequence[Sequence[int]]) -> list[int]:
    """What the dimensions of an array are, in their order."""
    by_position = sorted(zip(layout, dimensions, strict=True))
    return [letter for _, letters in by_position for letter in letters]
