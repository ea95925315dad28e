"""`DepthwiseConv`: a group for each feature."""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from grouped_conv_jax.algorithms.table import Implementation
from grouped_conv_jax.layers.convolution import multiplied, sizes
from grouped_conv_jax.layers.names import IN_NNX, with_names
from grouped_conv_jax.nnx.grouped_conv import GroupedConv


@with_names(
    IN_NNX,
    takes_no={
        "feature_group_count": "each feature is a group",
        "out_features": "it has in_features * channel_multiplier",
    },
)
class DepthwiseConv(GroupedConv):
    """A convolution of each feature by itself.

    Inputs are channels-last, (*batch, *spatial, in_features). There are
    in_features * channel_multiplier outputs, of which c * channel_multiplier and those after it
    see input c; the kernel is (*kernel_size, 1, in_features * channel_multiplier). Its fan-in, in
    Flax's initialisers, is the number of taps.

    Args:
      in_features: features of the input.
      kernel_size: an integer (one spatial dimension) or a sequence of integers.
      strides: an integer or a sequence of integers.
      channel_multiplier: outputs of each input.
      implementation: a name from `grouped_conv_jax.implementations()`, or None to choose.
      rngs: keys for the initialisers.
      **kwargs: everything else that `GroupedConv` takes.

    Raises:
      ValueError, TypeError: an argument is wrong; the message says which and how to mend it.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from grouped_conv_jax.nnx import DepthwiseConv
      >>> layer = DepthwiseConv(8, (3, 3), channel_multiplier=2, rngs=nnx.Rngs(0))
      >>> layer.kernel.shape
      (3, 3, 1, 16)
      >>> layer(jnp.ones((1, 5, 5, 8))).shape
      (1, 5, 5, 16)

    References:
      Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
      Applications", 2017.
    """

    def __init__(
        self,
        in_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        channel_multiplier: int = 1,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        (in_features,) = sizes(in_features=in_features)
        super().__init__(
            in_features,
            multiplied(in_features, channel_multiplier),
            kernel_size,
            strides,
            feature_group_count=in_features,
            implementation=implementation,
            rngs=rngs,
            **kwargs,
        )
