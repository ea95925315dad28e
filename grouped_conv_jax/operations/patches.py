"""`grouped_conv_patches`: what each output of a convolution sees of the input, as features.

The data is moved (padded, sliced, stacked), and nothing is multiplied: every dtype is exact, and an
infinity or NaN is where it was, and nowhere else.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from grouped_conv_jax.operations import arguments
from grouped_conv_jax.operations.forward import Settings, forward
from grouped_conv_jax.operations.padding import PaddingLike
from grouped_conv_jax.partitioning.explicit_mesh import sharding_of_result, with_auto_axes
from grouped_conv_jax.spec import ConvSpec

MOST_SLICES = 256
"""More taps along a dimension are looked up by index, since each slice takes time to compile."""


@arguments.keeps_64_bits
def grouped_conv_patches(
    lhs: ArrayLike,
    filter_shape: Sequence[int],
    window_strides: Sequence[int],
    padding: PaddingLike,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvDimensionNumbers | Sequence[str] | None = None,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    r"""Patches of an input, in place of `jax.lax.conv_general_dilated_patches`.

    With K taps k and features c of the input,

    .. math:: out[n, p, c K + k] = lhs[n, p \cdot stride + k \cdot dilation, c]

    The features of a patch are in the order of those of the input, the taps of each together. So
    the patches of a group of features are a block of the result, and there is no
    `feature_group_count` to give: a grouped convolution is a matrix product for each block.

    Args:
      lhs: the input, rank n + 2: batch N, features, and n >= 0 spatial dimensions.
      filter_shape: n integers, the taps, in the order of the kernel's spatial letters.
      window_strides: n integers, at least 1.
      padding: as in `grouped_conv`.
      lhs_dilation: n integers, at least 1: `lhs` is spread out with zeros between (default 1).
      rhs_dilation: n integers, at least 1: the taps are apart as many (default 1).
      dimension_numbers: as in `grouped_conv`.
      precision: accepted as in lax; nothing is rounded.
      preferred_element_type: dtype of the result, by default that of `lhs`.

    Returns:
      The patches: N, features times taps, and n spatial dimensions, in the layout of the third
      string. It is linear in `lhs`; its gradient adds 16-bit floats up in 32 bits.

    Raises:
      ValueError, TypeError: an argument is wrong; the message names it and says what would do.

    Example:
      >>> import jax.numpy as jnp
      >>> from grouped_conv_jax import grouped_conv_patches
      >>> x = jnp.array([[[1, 2, 3], [4, 5, 6]]])  # Two features at three positions.
      >>> grouped_conv_patches(x, (2,), (1,), "VALID")[0, :, 0]  # At the first position.
      Array([1, 2, 4, 5], dtype=int32)
    """
    like = arguments.array_type("lhs", lhs)
    if like.ndim < 2:
        raise ValueError(
            "lhs must have at least 2 dimensions (batch, features, spatial dimensions ...), got "
            f"shape {tuple(like.shape)}"
        )
    numbers = arguments.layout(like.shape, like.shape, dimension_numbers)
    taps = arguments.integers("filter_shape", filter_shape, like.ndim - 2)
    features = like.shape[numbers.lhs_spec[1]]
    # The convolution whose kernel has a one for each feature and tap.
    groups = max(features, 1)
    kernel = kernel_type(like, features * math.prod(taps), features // groups, taps, numbers)
    settings = Settings(
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        numbers,
        groups,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    call = forward(like, kernel, settings)
    spec = call.spec

    def move(lhs: jax.Array) -> jax.Array:
        return extract(lhs, spec).reshape(spec.out_shape).astype(spec.role_dtype("out"))

    # Wide already, since the transpose adds up.
    x = call.prepared(jnp.asarray(lhs).astype(spec.accumulator))
    return with_auto_axes(move, sharding_of_result("fprop", spec, jax.typeof(x), kernel, None))(x)


def kernel_type(
    lhs: Any, outputs: int, depth: int, taps: Sequence[int], numbers: lax.ConvDimensionNumbers
) -> Any:
    """The type of a kernel for `lhs`, from that of `lhs`."""
    shape = [0] * lhs.ndim
    for d, size in zip(numbers.rhs_spec, (outputs, depth, *taps), strict=True):
        shape[d] = size
    return jax.typeof(jax.ShapeDtypeStruct(shape, lhs.dtype))


def extract(lhs: jax.Array, spec: ConvSpec) -> jax.Array:
    """Patches in the layout of the output, with the taps as dimensions after the features.

    Raises:
      ValueError: the padded input is too large to be looked up in.
    """
    for size, padding in zip(spec.extent("lhs"), spec.padding, strict=True):
        if isinstance(size + sum(padding), int) and size + sum(padding) > arguments.LARGEST:
            raise ValueError(
                f"filter_shape={spec.spatial_shape('rhs')} needs an input padded to "
                f"{size + sum(padding)} positions; at most {arguments.LARGEST} can be read"
            )
    return _extracted(lhs, spec)


# Outside jit each slice would be compiled by itself.
@functools.partial(jax.jit, static_argnames="spec")
def _extracted(lhs: jax.Array, spec: ConvSpec) -> jax.Array:
    config = [(0, 0, 0)] * lhs.ndim
    for i, d in enumerate(spec.spatial_dimensions("lhs")):
        low, high = spec.padding[i]
        config[d] = (low, high + _room(i, spec), spec.lhs_dilation[i] - 1)
    filled = lax.pad(lhs, jnp.zeros((), lhs.dtype), config)
    layout = spec.layout("out")
    source = dict(zip(layout, spec.layout("lhs"), strict=True))
    x = jnp.transpose(filled, [source[d] for d in range(lhs.ndim)])
    # One spatial dimension after the other: as many slices as the sum of the taps, not as their
    # product. The last one first, since each set of taps is put before those that are there.
    features = layout[1]
    for i, axis in reversed(list(enumerate(layout[2:]))):
        stacked = x.ndim - lhs.ndim
        if spec.spatial_shape("rhs")[i] > MOST_SLICES and not spec.is_symbolic:
            at = axis + (stacked if axis > features else 0)
            x = jnp.moveaxis(jnp.take(x, _seen(i, spec), axis=at), at, features + 1)
            continue
        x = jnp.stack(
            [
                _window(x, axis + (stacked if axis > features else 0), tap, i, spec)
                for tap in range(spec.spatial_shape("rhs")[i])
            ],
            features + 1,
        )
    return x


def _seen(dimension: int, spec: ConvSpec) -> jax.Array:
    """Returns the position that each tap (rows) and each output (columns) sees."""
    taps, count = spec.spatial_shape("rhs")[dimension], spec.spatial_shape("out")[dimension]
    taps = lax.iota(np.int32, taps) * np.int32(spec.rhs_dilation[dimension])
    outputs = lax.iota(np.int32, count) * np.int32(spec.window_strides[dimension])
    return taps[:, None] + outputs[None]


def _room(dimension: int, spec: ConvSpec) -> int:
    """Positions put after the last one. Where the size is a symbol it cannot be told that each tap
    stays within, unless there is room for it.
    """
    if isinstance(spec.spatial_shape("out")[dimension], int):
        return 0
    return spec.extent("rhs")[dimension] + spec.window_strides[dimension] - 2


def _window(x: jax.Array, axis: int, tap: int, dimension: int, spec: ConvSpec) -> jax.Array:
    """What one tap sees along one spatial dimension."""
    count, stride = spec.spatial_shape("out")[dimension], spec.window_strides[dimension]
    first = tap * spec.rhs_dilation[dimension]
    if isinstance(count, int):
        if count == 0:
            return lax.slice_in_dim(x, 0, 0, axis=axis)
        return lax.slice_in_dim(x, first, first + (count - 1) * stride + 1, stride, axis)
    # Whole strides, so that it never ends before it begins; and no stride of its own, whose
    # transpose compares sizes.
    x = lax.slice_in_dim(x, first, first + count * stride, axis=axis)
    x = x.reshape(*x.shape[:axis], count, stride, *x.shape[axis + 1 :])
    return lax.index_in_dim(x, 0, axis + 1, keepdims=False)
