"""`CausalConv`: of sequences, whole or in chunks."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from grouped_conv_jax.algorithms.table import Implementation
from grouped_conv_jax.layers import causal
from grouped_conv_jax.layers.names import IN_NNX, with_names
from grouped_conv_jax.nnx.grouped_conv import GroupedConv
from grouped_conv_jax.nnx.parameters import call


@with_names(
    IN_NNX,
    takes_no=dict.fromkeys(
        ("strides", "padding", "input_dilation"),
        "it moves by one and sees the past only; GroupedConv takes it",
    ),
)
class CausalConv(GroupedConv):
    """A convolution over time of which no output sees what comes after it.

    Inputs are (*batch, time, in_features), outputs as long. `stream` convolves a sequence that
    arrives in chunks. The kernel is (kernel_size, in_features // feature_group_count,
    out_features), its last tap that of the present; fan-in is the taps times the inputs per group.

    Args:
      in_features: features of the input.
      out_features: features of the output.
      kernel_size: an integer.
      kernel_dilation: an integer: how far apart the taps are in time.
      feature_group_count: the number of groups; by default as many as there are input features,
        a depthwise convolution.
      implementation: a name from `grouped_conv_jax.implementations()`, or None to choose.
      rngs: keys for the initialisers.
      **kwargs: what else `flax.nnx.Conv` takes, but strides, padding and input_dilation.

    Raises:
      ValueError, TypeError: an argument is wrong; the message says which and how to mend it.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from grouped_conv_jax.nnx import CausalConv
      >>> layer = CausalConv(8, 8, 4, rngs=nnx.Rngs(0))
      >>> layer.kernel.shape
      (4, 1, 8)
      >>> x = jnp.ones((2, 10, 8))
      >>> y = layer(x)
      >>> first, state = layer.stream(x[:, :7], layer.initial_state(2))
      >>> second, state = layer.stream(x[:, 7:], state)
      >>> jnp.allclose(jnp.concatenate([first, second], axis=1), y).item()
      True

    References:
      van den Oord et al., "WaveNet: A Generative Model for Raw Audio", 2016.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        *,
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int | None = None,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        made = causal.causal_window(kernel_size, kernel_dilation)
        super().__init__(
            in_features,
            out_features,
            made.kernel_size,
            padding=made.padding,
            kernel_dilation=made.kernel_dilation,
            feature_group_count=in_features if feature_group_count is None else feature_group_count,
            implementation=implementation,
            rngs=rngs,
            **kwargs,
        )

    def initial_state(self, batch_shape: int | Sequence[int] = (), dtype: Any = None) -> jax.Array:
        """The state before a sequence: zeros.

        Args:
          batch_shape: the dimensions of a chunk before its time; an integer if there is one.
          dtype: that of the computation, which the layer's dtype, the inputs and the parameters
            come to (default: the layer's dtype or else that of its parameters).

        Returns:
          (*batch_shape, (kernel_size - 1) * kernel_dilation, in_features), what `stream` carries.

        Raises:
          ValueError, TypeError: `batch_shape` is not made of sizes.
        """
        return causal.initial_state(self, batch_shape, self.in_features, dtype)

    def stream(
        self, inputs: jax.Array, state: jax.Array | None = None, out_sharding: Any = None
    ) -> tuple[jax.Array, jax.Array]:
        """Convolves the next chunk of a sequence, of any length.

        Args:
          inputs: (*batch, time, in_features).
          state: what the chunk before returned; `initial_state` or None before the first.
          out_sharding: of the chunk's part of the output, as in `nnx.Conv`.

        Returns:
          The chunk's part of the output, and the state after it, in the dtype of the computation.
          Its shape does not depend on the chunk, so that `jax.lax.scan` can carry it.

        Raises:
          ValueError, TypeError: the inputs or the state do not fit; the message says why.
        """
        return causal.stream(
            self, call(self, inputs), state, self.feature_group_count, out_sharding=out_sharding
        )
