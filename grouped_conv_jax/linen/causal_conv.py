"""`CausalConv`: of sequences, whole or in chunks."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from flax.linen.dtypes import promote_dtype as flax_promote_dtype

from grouped_conv_jax.algorithms.table import Implementation
from grouped_conv_jax.layers import causal
from grouped_conv_jax.layers.call import Call, features_of
from grouped_conv_jax.layers.convolution import check_features, convolved, sizes
from grouped_conv_jax.layers.names import IN_LINEN, with_names
from grouped_conv_jax.linen.parameters import call


@with_names(IN_LINEN)
class CausalConv(linen.Module):
    """A convolution over time of which no output sees what comes after it.

    Inputs are (*batch, time, in_features), outputs as long. `stream` convolves a sequence that
    arrives in chunks. The kernel is (kernel_size, in_features // feature_group_count, features),
    its last tap that of the present; fan-in is the taps times the inputs per group.

    Attributes:
      features: features of the output.
      kernel_size: an integer.
      kernel_dilation: an integer: how far apart the taps are in time.
      feature_group_count: the number of groups; by default as many as there are input features,
        a depthwise convolution.
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
      ValueError, TypeError: when called, if an attribute is wrong; the message says which and how
        to mend it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from grouped_conv_jax.linen import CausalConv
      >>> layer = CausalConv(8, 4)
      >>> x = jnp.ones((2, 10, 8))
      >>> y, variables = layer.init_with_output(jax.random.key(0), x)
      >>> variables["params"]["kernel"].shape
      (4, 1, 8)
      >>> state = layer.initial_state(2, in_features=8)
      >>> first, state = layer.apply(variables, x[:, :7], state, method="stream")
      >>> second, state = layer.apply(variables, x[:, 7:], state, method="stream")
      >>> jnp.allclose(jnp.concatenate([first, second], axis=1), y).item()
      True

    References:
      van den Oord et al., "WaveNet: A Generative Model for Raw Audio", 2016.
    """

    features: int
    kernel_size: int | Sequence[int]
    kernel_dilation: int | Sequence[int] | None = 1
    feature_group_count: int | None = None
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

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Convolves whole sequences, (*batch, time, in_features)."""
        prepared, groups = self._prepared(inputs)
        made = causal.causal_window(self.kernel_size, self.kernel_dilation)
        return convolved(self, prepared, made, groups)

    def initial_state(
        self, batch_shape: int | Sequence[int] = (), *, in_features: int, dtype: Any = None
    ) -> jax.Array:
        """The state before a sequence: zeros. Needs no parameters.

        Args:
          batch_shape: the dimensions of a chunk before its time; an integer if there is one.
          in_features: features of the inputs.
          dtype: that of the computation, which the layer's dtype, the inputs and the parameters
            come to (default: the layer's dtype or else that of its parameters).

        Returns:
          (*batch_shape, (kernel_size - 1) * kernel_dilation, in_features), what `stream` carries.

        Raises:
          ValueError, TypeError: an argument is wrong; the message says which.
        """
        return causal.initial_state(self, batch_shape, in_features, dtype)

    def stream(
        self, inputs: jax.Array, state: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Convolves the next chunk of a sequence, of any length.

        Args:
          inputs: (*batch, time, in_features).
          state: what the chunk before returned; `initial_state` or None before the first.

        Returns:
          The chunk's part of the output, and the state after it, in the dtype of the computation.
          Its shape does not depend on the chunk, so that `jax.lax.scan` can carry it.

        Raises:
          ValueError, TypeError: the inputs or the state do not fit; the message says why.
        """
        prepared, groups = self._prepared(inputs)
        return causal.stream(self, prepared, state, groups)

    @linen.compact
    def _prepared(self, inputs: jax.Array) -> tuple[Call, int]:
        """What is convolved, and the number of groups."""
        taps = causal.causal_window(self.kernel_size, self.kernel_dilation).kernel_size
        in_features, (features,) = features_of(inputs, len(taps)), sizes(features=self.features)
        groups = in_features if self.feature_group_count is None else self.feature_group_count
        groups = check_features(in_features, features, groups)
        kernel_shape = (*taps, in_features // groups, features)
        return call(self, inputs, len(taps), kernel_shape, (features,)), groups
