"""`GroupedConv`: Flax's own layer, with the operation injected."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from grouped_conv_jax.algorithms.table import Implementation
from grouped_conv_jax.layers.call import check_mask
from grouped_conv_jax.layers.convolution import (
    Convolution,
    check_elements,
    check_features,
    check_no_other_convolution,
    sizes,
)
from grouped_conv_jax.layers.names import IN_NNX, with_names
from grouped_conv_jax.layers.window import LayerPadding, window
from grouped_conv_jax.nnx.parameters import check_inputs


@with_names(IN_NNX)
class GroupedConv(nnx.Conv):
    """`flax.nnx.Conv` in groups, on `grouped_conv`.

    Inputs are channels-last, (*batch, *spatial, in_features); the kernel is
    (*kernel_size, in_features // feature_group_count, out_features). Flax's initialisers take the
    last two dimensions for inputs and outputs, so fan-in is the taps times the inputs per group,
    the number of products in an output; fan-out is the taps times all outputs, of which an input
    reaches those of its group only.

    Args:
      in_features: features of the input.
      out_features: features of the output.
      kernel_size: an integer (one spatial dimension) or a sequence of integers.
      strides: an integer or a sequence of integers.
      padding: as in `grouped_conv`, modes for each dimension too; an integer stands for both sides
        of all dimensions, or in a sequence of one.
      input_dilation: an integer or a sequence of integers.
      kernel_dilation: an integer or a sequence of integers.
      feature_group_count: the number of groups; divides both features.
      implementation: a name from `grouped_conv_jax.implementations()`, or None to choose.
      rngs: keys for the initialisers.
      **kwargs: everything else that `flax.nnx.Conv` takes: use_bias, mask, dtype, param_dtype,
        precision, kernel_init, bias_init, promote_dtype, preferred_element_type, kernel_metadata
        and bias_metadata.

    Raises:
      ValueError, TypeError: the groups do not divide the features, or another argument is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from grouped_conv_jax.nnx import GroupedConv
      >>> layer = GroupedConv(8, 12, (3, 3), feature_group_count=4, rngs=nnx.Rngs(0))
      >>> layer.kernel.shape
      (3, 3, 2, 12)
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
        padding: LayerPadding = "SAME",
        input_dilation: int | Sequence[int] | None = 1,
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        check_no_other_convolution(
            type(self).__name__, conv_general_dilated=kwargs.pop("conv_general_dilated", None)
        )
        in_features, out_features = sizes(in_features=in_features, out_features=out_features)
        groups = check_features(in_features, out_features, feature_group_count)
        made = window(kernel_size, strides, padding, input_dilation, kernel_dilation)
        check_elements("the kernel", (*made.kernel_size, in_features // groups, out_features))
        super().__init__(
            in_features,
            out_features,
            made.kernel_size,
            made.strides,
            padding=made.padding,
            input_dilation=made.input_dilation,
            kernel_dilation=made.kernel_dilation,
            feature_group_count=groups,
            conv_general_dilated=Convolution(implementation),
            rngs=rngs,
            **kwargs,
        )
        check_mask(self.mask, self.kernel_shape)

    @property
    def conv_general_dilated(self) -> Convolution:
        """What `nnx.Conv` calls: `grouped_conv` with the layer's `implementation`."""
        return Convolution(self.implementation)

    @conv_general_dilated.setter
    def conv_general_dilated(self, function: Any) -> None:
        check_no_other_convolution(type(self).__name__, conv_general_dilated=function)
        self.implementation: Implementation = function.implementation

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Convolves `inputs`, (*batch, *spatial, in_features); `out_sharding` as in `nnx.Conv`."""
        check_inputs(inputs, self)
        return super().__call__(inputs, out_sharding)
