"""`GroupedConvLocal`: a kernel of its own at each position."""

import dataclasses
from typing import Any

import jax
from flax import linen

from grouped_conv_jax.layers.call import batch_shape, features_of
from grouped_conv_jax.layers.convolution import check_no_other_convolution, sizes
from grouped_conv_jax.layers.local import local_of
from grouped_conv_jax.layers.names import IN_LINEN, with_names
from grouped_conv_jax.layers.window import LayerPadding, padding_of
from grouped_conv_jax.linen.parameters import call


@with_names(IN_LINEN)
class GroupedConvLocal(linen.ConvLocal):
    """`flax.linen.ConvLocal` in groups, on `grouped_conv_local`: nothing is shared.

    Inputs are channels-last, (*batch, *spatial, in_features). With K taps the kernel is
    (*output_size, in_features // feature_group_count * K, features), the taps of each input
    together, and the bias (*output_size, features). With one group it is Flax's, and has the same
    initial values.

    Flax's initialisers take all but the last two dimensions for taps, so fan-in is too large by the
    number of positions. The default is Flax's all the same; what gives outputs the variance of the
    inputs is `linen.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0,
    1))` in two dimensions.

    Attributes are those of `flax.linen.ConvLocal`, of which `feature_group_count` is required and
    `padding` takes all that `grouped_conv` takes; and `preferred_element_type`, the dtype of the
    output.

    Raises:
      ValueError, TypeError: when made or called, if an attribute is wrong; the message says which
        and how to mend it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from grouped_conv_jax.linen import GroupedConvLocal
      >>> layer = GroupedConvLocal(12, (3, 3), feature_group_count=4)
      >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 5, 5, 8)))
      >>> variables["params"]["kernel"].shape, y.shape
      ((5, 5, 18, 12), (1, 5, 5, 12))
    """

    padding: LayerPadding = "SAME"
    feature_group_count: int = dataclasses.field(kw_only=True)
    preferred_element_type: Any = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        check_no_other_convolution(
            type(self).__name__,
            conv_general_dilated=self.conv_general_dilated,
            conv_general_dilated_cls=self.conv_general_dilated_cls,
        )
        # Here, since linen makes tuples of lists.
        self.padding = padding_of(self.padding, self.kernel_size)
        super().__post_init__()

    @linen.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Convolves `inputs`, (*batch, *spatial, in_features)."""
        operation = local_of(self)
        rank = operation.window.rank
        batch = batch_shape(inputs, rank)
        positions = operation.positions(inputs.shape[len(batch) : -1])
        (features,) = sizes(features=self.features)
        shape = operation.kernel_shape(positions, features_of(inputs, rank), features)
        made = call(self, inputs, rank, shape, (*positions, features))
        return made.finished(
            operation(made.inputs, made.kernel, self.precision, self.preferred_element_type)
        )
