"""`GroupedConvTranspose`: Flax's layer, with groups and an output padding."""

import dataclasses
from collections.abc import Sequence

import jax
from flax import linen

from grouped_conv_jax.algorithms.table import Implementation
from grouped_conv_jax.layers.call import features_of
from grouped_conv_jax.layers.convolution import sizes
from grouped_conv_jax.layers.names import IN_LINEN, with_names
from grouped_conv_jax.layers.transposed import transposed_of
from grouped_conv_jax.layers.window import LayerPadding, padding_of
from grouped_conv_jax.linen.parameters import call
from grouped_conv_jax.operations.padding import TRANSPOSED


@with_names(IN_LINEN)
class GroupedConvTranspose(linen.ConvTranspose):
    """`flax.linen.ConvTranspose` in groups, on `grouped_conv_transpose`.

    Inputs are channels-last, (*batch, *spatial, in_features). The kernel is
    (*kernel_size, in_features // feature_group_count, features), and with `transpose_kernel` that
    of the convolution that is transposed, (*kernel_size, features // feature_group_count,
    in_features). With one group it is Flax's, and has the same initial values.

    Flax's initialisers take the last two dimensions for inputs and outputs, so fan-in is the taps
    times the inputs per group. An output sees only so many of the taps as fall on inputs, a part
    of one in the product of the strides, which fan-in does not count. With `transpose_kernel` it is
    the taps times the *outputs* per group; `linen.initializers.variance_scaling(
    feature_group_count, "fan_in", "truncated_normal", in_axis=-1, out_axis=-2)` is for it what
    Flax's default is for the other one.

    Attributes are those of `flax.linen.ConvTranspose`, of which `padding` takes all that
    `grouped_conv_transpose` takes and Flax's integers, and

      feature_group_count: the number of groups, required; divides both features.
      output_padding: an integer or a sequence of integers: positions more at the end.
      implementation: a name from `grouped_conv_jax.implementations()`, or None to choose.

    Raises:
      ValueError, TypeError: when made or called, if an attribute is wrong; the message says which
        and how to mend it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from grouped_conv_jax.linen import GroupedConvTranspose
      >>> layer = GroupedConvTranspose(12, (3, 3), (2, 2), feature_group_count=4)
      >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 5, 5, 8)))
      >>> variables["params"]["kernel"].shape, y.shape
      ((3, 3, 2, 12), (1, 10, 10, 12))
    """

    padding: LayerPadding = "SAME"
    feature_group_count: int = dataclasses.field(kw_only=True)
    output_padding: int | Sequence[int] | None = dataclasses.field(default=None, kw_only=True)
    implementation: Implementation = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        # Here, since linen makes tuples of lists.
        self.padding = padding_of(self.padding, self.kernel_size, TRANSPOSED)
        super().__post_init__()

    @linen.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Convolves `inputs`, (*batch, *spatial, in_features)."""
        operation = transposed_of(self)
        rank, (features,) = operation.window.rank, sizes(features=self.features)
        shape = operation.kernel_shape(features_of(inputs, rank), features)
        made = call(self, inputs, rank, shape, (features,))
        return made.finished(
            operation(made.inputs, made.kernel, self.precision, self.preferred_element_type)
        )
