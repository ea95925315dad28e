"""The channel shuffle of ShuffleNet, by which grouped convolutions in a row see all features."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from grouped_conv_jax.operations import arguments
from grouped_conv_jax.partitioning.explicit_mesh import with_auto_axes
from grouped_conv_jax.text import shown


def channel_shuffle(x: ArrayLike, feature_group_count: int, axis: int = -1) -> jax.Array:
    r"""Shuffles features so that each group of the next convolution gets some of each group.

    Features that are G groups of n become n groups of G:

    .. math::
        out[i \cdot G + g] = x[g \cdot n + i], \quad 0 \le g < G, \; 0 \le i < n

    The shuffle with n groups undoes it.

    Args:
      x: array of any dtype, with G * n features along `axis`.
      feature_group_count: G, the groups that the features are now in. Divides them.
      axis: that of the features; by default the last one.

    Returns:
      An array of the same shape and dtype and, where mesh axes are Explicit, the same sharding.

    Raises:
      ValueError, TypeError: G does not divide the features, or `axis` is none of `x`.

    Example:
      >>> import jax.numpy as jnp
      >>> from grouped_conv_jax import channel_shuffle
      >>> channel_shuffle(jnp.arange(6), feature_group_count=2)
      Array([0, 3, 1, 4, 2, 5], dtype=int32)

    References:
      Zhang, Zhou, Lin and Sun, "ShuffleNet: An Extremely Efficient Convolutional Neural Network
      for Mobile Devices", 2018.
    """
    aval = arguments.array_type("x", x)
    groups = arguments.group_count("feature_group_count", feature_group_count)
    shape, at = aval.shape, _axis(axis, aval.ndim)
    arguments.check_divides("feature_group_count", groups, f"axis {axis} of x", shape[at])

    def shuffle(x) -> Any:
        split = jnp.reshape(x, (*shape[:at], groups, shape[at] // groups, *shape[at + 1 :]))
        return jnp.swapaxes(split, at, at + 1).reshape(shape)

    return with_auto_axes(shuffle, aval.sharding)(x)


def _axis(axis: Any, ndim: int) -> int:
    """A dimension's number, not negative."""
    try:
        index = operator.index(axis)
    except TypeError:
        raise TypeError(f"axis must be an integer, got {shown(axis)}") from None
    if not -ndim <= index < ndim:
        raise ValueError(f"axis={index} is none of x, which has {ndim} dimensions")
    return index % ndim
