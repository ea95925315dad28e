"""The public operation: `grouped_conv`. Arguments in, spec out, one bind."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from grouped_conv_jax.algorithms import table
from grouped_conv_jax.algorithms.table import Implementation
from grouped_conv_jax.operations import arguments
from grouped_conv_jax.operations.forward import Settings, forward
from grouped_conv_jax.operations.padding import PaddingLike
from grouped_conv_jax.partitioning.explicit_mesh import sharding_of_result
from grouped_conv_jax.primitive import contract


@arguments.keeps_64_bits
def grouped_conv(
    lhs: ArrayLike,
    rhs: ArrayLike,
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
    r"""Grouped convolution of any rank and layout, in place of `jax.lax.conv_general_dilated`.

    The features of the input and of the output are cut into G groups, and each group of outputs
    sees its own group of inputs only. With C inputs and O outputs per group, and taps k,

    .. math::
        out[n, p, g, o] = \sum_{k, c} lhs[n, p \cdot stride + k \cdot dilation, g, c]
            \; rhs[k, c, g, o]

    Arguments, their order and their defaults are those of `jax.lax.conv_general_dilated`, with
    more paddings.

    Args:
      lhs: the input, rank n + 2: batch N, features G * C, and n >= 0 spatial dimensions.
      rhs: the kernel, rank n + 2 and of the dtype of `lhs`: outputs G * O, inputs per group C,
        and n spatial dimensions. Output feature g * O + o belongs to group g.
      window_strides: n integers, at least 1.
      padding: "SAME", "SAME_LOWER", "VALID", or n pairs (low, high) of integers, which may be
        negative (a crop). "CAUSAL" has a past of zeros in every dimension. With "CIRCULAR",
        "REFLECT" and "REPLICATE" it is not zeros that are beyond the ends, but the input from its
        other end, mirrored without its edge, or its edge; as many positions as keep the size at
        stride 1. Each dimension may have its own: a pair, a string, or one of those three with a
        pair, as ("REFLECT", (1, 2)). The strings do not go with `lhs_dilation`, pairs do.
      lhs_dilation: n integers, at least 1: `lhs` is spread out with zeros between (default 1).
      rhs_dilation: n integers, at least 1: the kernel likewise (default 1).
      dimension_numbers: three strings such as ("NHWC", "HWIO", "NHWC"), a
        `jax.lax.ConvDimensionNumbers`, or None for ("NCHW", "OIHW", "NCHW"). Strides, dilations
        and paddings are in the order of the kernel's spatial letters.
      feature_group_count: G. Divides the features of `lhs` and the outputs of `rhs`.
      batch_group_count: cuts the batch, not the features, into groups, each with its own
        outputs; not together with `feature_group_count`.
      precision: as in lax; by default that of `jax.default_matmul_precision`.
      preferred_element_type: dtype of the result and of the accumulation.
      out_sharding: the sharding of the result where mesh axes are Explicit.
      implementation: a name from `implementations()`, for this convolution and its gradients, or
        None to choose each contraction's by platform and shapes. A mapping such as
        `{"fprop": "taps"}` names those of some contractions ("fprop", "dgrad", "wgrad"), and the
        others are chosen. An explicit name never falls back to another one.

    Returns:
      The output: N, G * O and n spatial dimensions, in the layout of the third string.

    Raises:
      ValueError, TypeError: an argument is wrong; the message names it and says what would do.
      NotImplementedError: when compiled, if the `implementation` asked for does not compute this.

    Example:
      Two groups: outputs 0-2 see inputs 0 and 1, outputs 3-5 see inputs 2 and 3.

      >>> import jax.numpy as jnp
      >>> from grouped_conv_jax import grouped_conv
      >>> x, w = jnp.ones((8, 32, 32, 4)), jnp.ones((3, 3, 2, 6))
      >>> grouped_conv(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
      ...              feature_group_count=2).shape
      (8, 32, 32, 6)

    Note:
      The policies of `jax.checkpoint` that save lax's convolution, such as `dots_saveable`, do not
      know this one; `grouped_conv_jax.convs_saveable` does.

    References:
      Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural
      Networks", 2012 (two groups, on two devices); Xie et al., "Aggregated Residual
      Transformations for Deep Neural Networks", 2017 (many groups); Chollet, "Xception", 2017
      (a group for each feature).
    """
    asked = table.parsed(implementation)
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
    call = forward(lhs, rhs, settings)
    lhs = call.prepared(lhs)
    sharding = sharding_of_result(
        "fprop", call.spec, jax.typeof(lhs), jax.typeof(rhs), out_sharding
    )
    return contract(
        lhs,
        rhs,
        contraction="fprop",
        spec=call.spec,
        implementation=asked,
        out_sharding=sharding,
    )
