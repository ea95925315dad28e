"""`DepthwiseConv`: a group for each feature."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from flax.linen.dtypes import promote_dtype as flax_promote_dtype

from grouped_conv_jax.algorithms.table import Implementation
from grouped_conv_jax.layers.call import features_of
from grouped_conv_jax.layers.convolution import convolved, multiplied
from grouped_conv_jax.layers.names import IN_LINEN, with_names
from grouped_conv_jax.layers.window import LayerPadding, padding_of, window
from grouped_conv_jax.linen.parameters import call


@with_names(IN_LINEN)
class DepthwiseConv(linen.Module):
    """A convolution of each feature by itself.

    Inputs are channels-last, (*batch, *spatial, in_features). There are
    in_features * channel_multiplier outputs, of which c * channel_multiplier and those after it
    see input c; the kernel is (*kernel_size, 1, in_features * channel_multiplier). Its fan-in, in
    Flax's initialisers, is the number of taps.

    Attributes:
      kernel_size: an integer (one spatial dimension) or a sequence of integers.
      strides: an integer or a sequence of integers.
      padding: as in `GroupedConv`.
      input_dilation: an integer or a sequence of integers.
      kernel_dilation: an integer or a sequence of integers.
      channel_multiplier: outputs of each input.
      use_bias: whether to add a bias to the output.
      mask: for the kernel, of its shape.
      dtype: of the computation; by default that of the inputs and parameters.
      param_dtype: of the parameters.
      precision: as in `grouped_conv`.
      kernel_init: initializer for the kernel.
      bias_init: initializer for the bias.
      promote_dtype: as in `flax.linen.Conv`.
      preferred_element_type: dtype of the output.
      implementation: a name from `grouped_conv_jax.implementations()`, or None to choose.

    Raises:
      ValueError, TypeError: when made or called, if an attribute is wrong; the message says which
        and how to mend it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from grouped_conv_jax.linen import DepthwiseConv
      >>> layer = DepthwiseConv((3, 3), channel_multiplier=2)
      >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 5, 5, 8)))
      >>> variables["params"]["kernel"].shape, y.shape
      ((3, 3, 1, 16), (1, 5, 5, 16))

    References:
      Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
      Applications", 2017.
    """

    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = 1
    padding: LayerPadding = "SAME"
    input_dilation: int | Sequence[int] | None = 1
    kernel_dilation: int | Sequence[int] | None = 1
    channel_multiplier: int = 1
    use_bias: bool = True
    mask: Any = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Callable[..., Any] = linen.initializers.lecun_normal()
    bias_init: Callable[..., Any] = linen.initializers.zeros_init()
    promote_dtype: Any = flax_promote_dtype
    preferred_element_type: Any = None
    implementation: Implementation = None

    def __post_init__(self):
        # Here, since linen makes tuples of lists.
        self.padding = padding_of(self.padding, self.kernel_size)
        super().__post_init__()

    @linen.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Convolves `inputs`, (*batch, *spatial, in_features)."""
        made = window(
            self.kernel_size, self.strides, self.padding, self.input_dilation, self.kernel_dilation
        )
        in_features = features_of(inputs, made.rank)
        features = multiplied(in_features, self.channel_multiplier)
        prepared = call(self, inputs, made.rank, (*made.kernel_size, 1, features), (features,))
        return convolved(self, prepared, made, in_features)
