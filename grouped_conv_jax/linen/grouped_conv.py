"""`GroupedConv`: Flax's own layer, with the operation injected."""

import dataclasses
from typing import Any

import jax
from flax import linen

from grouped_conv_jax.algorithms.table import Implementation
from grouped_conv_jax.layers.call import check_mask, features_of
from grouped_conv_jax.layers.convolution import (
    Convolution,
    check_elements,
    check_features,
    check_no_other_convolution,
    sizes,
)
from grouped_conv_jax.layers.names import IN_LINEN, with_names
from grouped_conv_jax.layers.window import LayerPadding, window


@with_names(IN_LINEN)
class GroupedConv(linen.Conv):
    """`flax.linen.Conv` in groups, on `grouped_conv`.

    Inputs are channels-last, (*batch, *spatial, in_features); the kernel is
    (*kernel_size, in_features // feature_group_count, features). Flax's initialisers take the last
    two dimensions for inputs and outputs, so fan-in is the taps times the inputs per group, the
    number of products in an output; fan-out is the taps times all outputs, of which an input
    reaches those of its group only.

    In a compact method Flax names the layer `GroupedConv_0` and derives its initial values from
    that name. A subclass that is called `Conv` has the name and the initial values of Flax's layer.

    Attributes are those of `flax.linen.Conv` (mask, dtypes, initialisers and the rest), of which
    `feature_group_count` is required; `padding` takes all that `grouped_conv` takes, modes for each
    dimension too, and Flax's integers; and

      preferred_element_type: dtype of the output.
      implementation: a name from `grouped_conv_jax.implementations()`, or None to choose.

    Raises:
      ValueError, TypeError: when made, if an attribute is wrong; when called, if the groups do not
        divide the features.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from grouped_conv_jax.linen import GroupedConv
      >>> layer = GroupedConv(features=12, kernel_size=(3, 3), feature_group_count=4)
      >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 5, 5, 8)))
      >>> variables["params"]["kernel"].shape, y.shape
      ((3, 3, 2, 12), (1, 5, 5, 12))
    """

    padding: LayerPadding = "SAME"
    feature_group_count: int = dataclasses.field(kw_only=True)
    preferred_element_type: Any = dataclasses.field(default=None, kw_only=True)
    implementation: Implementation = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        check_no_other_convolution(
            type(self).__name__,
            conv_general_dilated=self.conv_general_dilated,
            conv_general_dilated_cls=self.conv_general_dilated_cls,
        )
        self.conv_general_dilated = Convolution(self.implementation, self.preferred_element_type)
        self.padding = window(
            self.kernel_size,
            self.strides,
            self.padding,
            self.input_dilation,
            self.kernel_dilation,
        ).padding
        super().__post_init__()

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Convolves `inputs`, (*batch, *spatial, in_features)."""
        taps = window(self.kernel_size).kernel_size
        in_features, (features,) = features_of(inputs, len(taps)), sizes(features=self.features)
        groups = check_features(in_features, features, self.feature_group_count)
        kernel_shape = (*taps, in_features // groups, features)
        check_elements("the kernel", kernel_shape)
        check_mask(self.mask, kernel_shape)
        return super().__call__(inputs)
