"""`GroupedConvTranspose`: Flax's layer, with groups and an output padding."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn.linear import default_kernel_init

from grouped_conv_jax.algorithms.table import Implementation
from grouped_conv_jax.layers.call import check_mask
from grouped_conv_jax.layers.convolution import check_elements, sizes
from grouped_conv_jax.layers.names import IN_NNX, with_names
from grouped_conv_jax.layers.transposed import transposed, transposed_of
from grouped_conv_jax.layers.window import LayerPadding
from grouped_conv_jax.nnx.parameters import call, with_shape


@with_names(IN_NNX)
class GroupedConvTranspose(nnx.ConvTranspose):
    """`flax.nnx.ConvTranspose` in groups, on `grouped_conv_transpose`.

    Inputs are channels-last, (*batch, *spatial, in_features). The kernel is
    (*kernel_size, in_features // feature_group_count, out_features), and with `transpose_kernel`
    that of the convolution that is transposed, (*kernel_size, out_features // feature_group_count,
    in_features). With one group it is Flax's, and has the same initial values.

    Flax's initialisers take the last two dimensions for inputs and outputs, so fan-in is the taps
    times the inputs per group. An output sees only so many of the taps as fall on inputs, a part
    of one in the product of the strides, which fan-in does not count. With `transpose_kernel` it is
    the taps times the *outputs* per group; `nnx.initializers.variance_scaling(feature_group_count,
    "fan_in", "truncated_normal", in_axis=-1, out_axis=-2)` is for it what Flax's default is for
    the other one.

    Args:
      in_features: features of the input.
      out_features: features of the output.
      kernel_size: an integer (one spatial dimension) or a sequence of integers.
      strides: an integer or a sequence of integers: how far apart the input is spread.
      padding: as in `grouped_conv_transpose`, and integers as in `GroupedConv`. (Pairs count
        positions beyond the ends of the spread input, which is not PyTorch's meaning.)
      kernel_dilation: an integer or a sequence of integers.
      feature_group_count: the number of groups; divides both features.
      transpose_kernel: whether the kernel is that of the convolution that is transposed.
      output_padding: an integer or a sequence of integers: positions more at the end.
      implementation: a name from `grouped_conv_jax.implementations()`, or None to choose.
      kernel_init: initializer for the kernel.
      rngs: keys for the initialisers.
      **kwargs: everything else that `flax.nnx.ConvTranspose` takes: use_bias, mask, dtype,
        param_dtype, precision, bias_init, promote_dtype, preferred_element_type, kernel_metadata
        and bias_metadata.

    Raises:
      ValueError, TypeError: an argument is wrong; the message says which and how to mend it.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from grouped_conv_jax.nnx import GroupedConvTranspose
      >>> layer = GroupedConvTranspose(8, 12, (3, 3), (2, 2), feature_group_count=4,
      ...                              rngs=nnx.Rngs(0))
      >>> layer.kernel.shape
      (3, 3, 2, 12)
      >>> layer(jnp.ones((1, 5, 5, 8))).shape
      (1, 10, 10, 12)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = None,
        *,
        padding: LayerPadding = "SAME",
        kernel_dilation: int | Sequence[int] | None = None,
        feature_group_count: int,
        transpose_kernel: bool = False,
        output_padding: int | Sequence[int] | None = None,
        implementation: Implementation = None,
        kernel_init: Callable[..., Any] = default_kernel_init,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        operation = transposed(
            kernel_size,
            strides,
            padding,
            kernel_dilation,
            feature_group_count,
            transpose_kernel,
            output_padding,
            implementation,
        )
        in_features, out_features = sizes(in_features=in_features, out_features=out_features)
        shape = operation.kernel_shape(in_features, out_features)
        check_elements("the kernel", shape)
        super().__init__(
            in_features,
            out_features,
            operation.window.kernel_size,
            operation.window.strides,
            padding=operation.window.padding,
            kernel_dilation=operation.window.kernel_dilation,
            transpose_kernel=operation.transpose_kernel,
            kernel_init=with_shape(kernel_init, shape),
            rngs=rngs,
            **kwargs,
        )
        self.kernel_shape = shape
        check_mask(self.mask, shape)
        self.feature_group_count = operation.feature_group_count
        self.output_padding = operation.output_padding
        self.implementation = implementation

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Convolves `inputs`, (*batch, *spatial, in_features); `out_sharding` as in `nnx.Conv`."""
        operation = transposed_of(self)
        made = call(self, inputs)
        outputs = operation(
            made.inputs, made.kernel, self.precision, self.preferred_element_type, out_sharding
        )
        return made.finished(outputs)
