"""`GroupedConvLocal`: a kernel of its own at each position."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
from flax.nnx.nn.linear import default_bias_init, default_kernel_init

from grouped_conv_jax.layers.call import check_mask
from grouped_conv_jax.layers.convolution import check_elements, sizes
from grouped_conv_jax.layers.local import local, local_of
from grouped_conv_jax.layers.names import IN_NNX, with_names
from grouped_conv_jax.layers.window import LayerPadding, for_each
from grouped_conv_jax.nnx.parameters import call


@with_names(IN_NNX)
class GroupedConvLocal(nnx.Module):
    """`flax.linen.ConvLocal` for nnx, in groups, on `grouped_conv_local`: nothing is shared.

    Inputs are channels-last, (*batch, *input_size, in_features). With K taps the kernel is
    (*output_size, in_features // feature_group_count * K, out_features), the taps of each input
    together, and the bias (*output_size, out_features).

    Flax's initialisers take all but the last two dimensions for taps, so fan-in is too large by the
    number of positions. The default is Flax's all the same; what gives outputs the variance of the
    inputs is `nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0,
    1))` in two dimensions.

    Args:
      in_features: features of the input.
      out_features: features of the output.
      kernel_size: an integer (one spatial dimension) or a sequence of integers.
      strides: an integer or a sequence of integers.
      input_size: an integer or a sequence of integers: the spatial shape of the inputs.
      padding: as in `GroupedConv`.
      input_dilation: as in `GroupedConv`.
      kernel_dilation: as in `GroupedConv`.
      feature_group_count: the number of groups; divides both features.
      use_bias: whether to add a bias to the output.
      mask: for the kernel, of its shape.
      dtype: of the computation; by default that of the inputs and parameters.
      param_dtype: of the parameters.
      precision: as in `grouped_conv_local`.
      kernel_init: initializer for the kernel.
      bias_init: initializer for the bias.
      promote_dtype: as in `flax.nnx.Conv`.
      preferred_element_type: dtype of the output.
      rngs: keys for the initialisers.
      kernel_metadata: metadata for the kernel.
      bias_metadata: metadata for the bias.

    Raises:
      ValueError, TypeError: an argument is wrong; the message says which and how to mend it.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from grouped_conv_jax.nnx import GroupedConvLocal
      >>> layer = GroupedConvLocal(8, 12, (3, 3), input_size=(5, 5), feature_group_count=4,
      ...                          rngs=nnx.Rngs(0))
      >>> layer.kernel.shape, layer.bias.shape
      ((5, 5, 18, 12), (5, 5, 12))
      >>> layer(jnp.ones((1, 5, 5, 8))).shape
      (1, 5, 5, 12)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        input_size: int | Sequence[int],
        padding: LayerPadding = "SAME",
        input_dilation: int | Sequence[int] | None = 1,
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int,
        use_bias: bool = True,
        mask: Any = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., Any] = default_kernel_init,
        bias_init: Callable[..., Any] = default_bias_init,
        promote_dtype: Any = flax_promote_dtype,
        preferred_element_type: Any = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] | None = None,
        bias_metadata: Mapping[str, Any] | None = None,
    ):
        operation = local(
            kernel_size, strides, padding, input_dilation, kernel_dilation, feature_group_count
        )
        self.in_features, self.out_features = sizes(
            in_features=in_features, out_features=out_features
        )
        self.kernel_size = operation.window.kernel_size
        self.strides = operation.window.strides
        self.input_size = for_each("input_size", input_size, operation.window.kernel_size)
        self.padding = operation.window.padding
        self.input_dilation = operation.window.input_dilation
        self.kernel_dilation = operation.window.kernel_dilation
        self.feature_group_count = operation.feature_group_count
        self.use_bias = use_bias
        self.mask = mask
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type

        self.output_size = operation.positions(self.input_size)
        self.kernel_shape = operation.kernel_shape(
            self.output_size, self.in_features, self.out_features
        )
        check_elements("the kernel", self.kernel_shape)
        check_mask(mask, self.kernel_shape)
        self.kernel = nnx.Param(
            kernel_init(rngs.params(), self.kernel_shape, param_dtype), **kernel_metadata or {}
        )
        self.bias: nnx.Param[Any] | None = nnx.data(None)
        if use_bias:
            shape = (*self.output_size, self.out_features)
            self.bias = nnx.Param(
                bias_init(rngs.params(), shape, param_dtype), **bias_metadata or {}
            )

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Convolves `inputs`, (*batch, *input_size, in_features).

        `out_sharding` as in `nnx.Conv`.
        """
        operation = local_of(self)
        made = call(self, inputs)
        if (size := made.inputs.shape[1:-1]) != self.input_size:
            raise ValueError(
                f"inputs must have the spatial shape {self.input_size}, input_size when the layer "
                f"was made, got {size}"
            )
        outputs = operation(
            made.inputs, made.kernel, self.precision, self.preferred_element_type, out_sharding
        )
        return made.finished(outputs)
