"""`SeparableConv`: in space, then over the features."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from flax.linen.dtypes import promote_dtype as flax_promote_dtype

from grouped_conv_jax.algorithms.table import Implementation
from grouped_conv_jax.layers.names import IN_LINEN, with_names
from grouped_conv_jax.layers.window import LayerPadding, padding_of, window
from grouped_conv_jax.linen.depthwise_conv import DepthwiseConv
from grouped_conv_jax.linen.grouped_conv import GroupedConv


@with_names(IN_LINEN)
class SeparableConv(linen.Module):
    """A convolution of each feature by itself, and then of each position by itself.

    Inputs are channels-last, (*batch, *spatial, in_features). The layers inside are `depthwise`
    without a bias, with the kernel (*kernel_size, 1, in_features * channel_multiplier), fan-in the
    taps; and `pointwise`, with the kernel (1, ..., in_features * channel_multiplier, features) and
    the bias, fan-in its inputs. There is nothing between them.

    Attributes:
      features: features of the output.
      kernel_size: an integer (one spatial dimension) or a sequence of integers, of `depthwise`.
      strides: an integer or a sequence of integers, of `depthwise`.
      channel_multiplier: outputs that `depthwise` has of each input.
      padding: as in `GroupedConv`, of `depthwise`.
      input_dilation: as in `GroupedConv`, of `depthwise`.
      kernel_dilation: as in `GroupedConv`, of `depthwise`.
      use_bias: whether to add a bias to the output.
      depthwise_mask: for the kernel of `depthwise`, of its shape.
      pointwise_mask: for the kernel of `pointwise`, of its shape.
      dtype: of the computation; by default that of the inputs and parameters.
      param_dtype: of the parameters.
      precision: as in `grouped_conv`, of both.
      depthwise_init: initializer for the kernel of `depthwise`.
      pointwise_init: initializer for the kernel of `pointwise`.
      bias_init: initializer for the bias.
      promote_dtype: as in `flax.linen.Conv`.
      preferred_element_type: dtype of the output.
      implementation: a name from `grouped_conv_jax.implementations()`, or None to choose.

    Raises:
      ValueError, TypeError: when made or called, if an attribute is wrong; the message says which
        and how to mend it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from grouped_conv_jax.linen import SeparableConv
      >>> layer = SeparableConv(12, (3, 3))
      >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 5, 5, 8)))
      >>> jax.tree.map(jnp.shape, variables["params"]["depthwise"]), y.shape
      ({'kernel': (3, 3, 1, 8)}, (1, 5, 5, 12))

    References:
      Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", 2017.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = 1
    channel_multiplier: int = 1
    padding: LayerPadding = "SAME"
    input_dilation: int | Sequence[int] | None = 1
    kernel_dilation: int | Sequence[int] | None = 1
    use_bias: bool = True
    depthwise_mask: Any = None
    pointwise_mask: Any = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    depthwise_init: Callable[..., Any] = linen.initializers.lecun_normal()
    pointwise_init: Callable[..., Any] = linen.initializers.lecun_normal()
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
        shared: dict[str, Any] = dict(
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            promote_dtype=self.promote_dtype,
            implementation=self.implementation,
        )
        depthwise = DepthwiseConv(
            self.kernel_size,
            self.strides,
            self.padding,
            self.input_dilation,
            self.kernel_dilation,
            self.channel_multiplier,
            use_bias=False,
            mask=self.depthwise_mask,
            kernel_init=self.depthwise_init,
            name="depthwise",
            **shared,
        )
        pointwise = GroupedConv(
            self.features,
            (1,) * window(self.kernel_size).rank,
            feature_group_count=1,
            use_bias=self.use_bias,
            mask=self.pointwise_mask,
            kernel_init=self.pointwise_init,
            bias_init=self.bias_init,
            preferred_element_type=self.preferred_element_type,
            name="pointwise",
            **shared,
        )
        return pointwise(depthwise(inputs))
