"""`SeparableConv`: in space, then over the features."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
from flax.nnx.nn.linear import default_bias_init, default_kernel_init

from grouped_conv_jax.algorithms.table import Implementation
from grouped_conv_jax.layers.names import IN_NNX, with_names
from grouped_conv_jax.layers.window import LayerPadding
from grouped_conv_jax.nnx.depthwise_conv import DepthwiseConv
from grouped_conv_jax.nnx.grouped_conv import GroupedConv


@with_names(IN_NNX)
class SeparableConv(nnx.Module):
    """A convolution of each feature by itself, and then of each position by itself.

    Inputs are channels-last, (*batch, *spatial, in_features). The layers inside are `depthwise`
    without a bias, with the kernel (*kernel_size, 1, in_features * channel_multiplier), fan-in the
    taps; and `pointwise`, with the kernel (1, ..., in_features * channel_multiplier, out_features)
    and the bias, fan-in its inputs. There is nothing between them.

    Args:
      in_features: features of the input.
      out_features: features of the output.
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
      promote_dtype: as in `flax.nnx.Conv`.
      preferred_element_type: dtype of the output.
      implementation: a name from `grouped_conv_jax.implementations()`, or None to choose.
      rngs: keys for the initialisers.
      depthwise_metadata: metadata for the kernel of `depthwise`.
      pointwise_metadata: metadata for the kernel of `pointwise`.
      bias_metadata: metadata for the bias.

    Raises:
      ValueError, TypeError: an argument is wrong; the message says which and how to mend it.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from grouped_conv_jax.nnx import SeparableConv
      >>> layer = SeparableConv(8, 12, (3, 3), rngs=nnx.Rngs(0))
      >>> layer.depthwise.kernel.shape, layer.pointwise.kernel.shape
      ((3, 3, 1, 8), (1, 1, 8, 12))
      >>> layer(jnp.ones((1, 5, 5, 8))).shape
      (1, 5, 5, 12)

    References:
      Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", 2017.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        channel_multiplier: int = 1,
        padding: LayerPadding = "SAME",
        input_dilation: int | Sequence[int] | None = 1,
        kernel_dilation: int | Sequence[int] | None = 1,
        use_bias: bool = True,
        depthwise_mask: Any = None,
        pointwise_mask: Any = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        depthwise_init: nnx.Initializer = default_kernel_init,
        pointwise_init: nnx.Initializer = default_kernel_init,
        bias_init: nnx.Initializer = default_bias_init,
        promote_dtype: Any = flax_promote_dtype,
        preferred_element_type: Any = None,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
        depthwise_metadata: Mapping[str, Any] | None = None,
        pointwise_metadata: Mapping[str, Any] | None = None,
        bias_metadata: Mapping[str, Any] | None = None,
    ):
        shared: dict[str, Any] = dict(
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            promote_dtype=promote_dtype,
            implementation=implementation,
            rngs=rngs,
        )
        self.depthwise = DepthwiseConv(
            in_features,
            kernel_size,
            strides,
            channel_multiplier=channel_multiplier,
            padding=padding,
            input_dilation=input_dilation,
            kernel_dilation=kernel_dilation,
            use_bias=False,
            mask=depthwise_mask,
            kernel_init=depthwise_init,
            kernel_metadata=depthwise_metadata or {},
            **shared,
        )
        self.pointwise = GroupedConv(
            self.depthwise.out_features,
            out_features,
            (1,) * len(self.depthwise.kernel_size),
            feature_group_count=1,
            use_bias=use_bias,
            mask=pointwise_mask,
            kernel_init=pointwise_init,
            bias_init=bias_init,
            preferred_element_type=preferred_element_type,
            kernel_metadata=pointwise_metadata or {},
            bias_metadata=bias_metadata or {},
            **shared,
        )

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Convolves `inputs`, (*batch, *spatial, in_features); `out_sharding` as in `nnx.Conv`."""
        return self.pointwise(self.depthwise(inputs), out_sharding)
