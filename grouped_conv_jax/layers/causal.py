"""The causal layer's convolution, of a sequence or of its next chunk."""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from grouped_conv_jax.layers.calling import Call, flattened
from grouped_conv_jax.layers.window import Window, window
from grouped_conv_jax.streaming import streaming_conv


def causal_window(kernel_size: Any, kernel_dilation: Any) -> Window:
    """Of one spatial dimension, the time.

    Raises:
      ValueError, TypeError: an argument is wrong; the message says which and how to mend it.
    """
    made = window(kernel_size, 1, "CAUSAL", 1, kernel_dilation)
    if made.rank != 1:
        raise ValueError(
            "kernel_size must be an integer, since a CausalConv has one spatial dimension, the "
            f"time, got {kernel_size}; GroupedConv with padding='CAUSAL' takes more"
        )
    return made


def stream(
    layer: Any, call: Call, state: Any, feature_group_count: int
) -> tuple[jax.Array, jax.Array]:
    """The output of a chunk, and the state after it, of a layer of nnx or linen."""
    made = causal_window(layer.kernel_size, layer.kernel_dilation)
    outputs, state = streaming_conv(
        call.inputs,
        call.kernel,
        None if state is None else flattened(state, made.rank),
        made.kernel_dilation,
        feature_group_count=feature_group_count,
        precision=layer.precision,
        preferred_element_type=layer.preferred_element_type,
        implementation=layer.implementation,
    )
    return call.finished(outputs), call.restored(state)


def initial_state(
    layer: Any, batch_shape: int | Sequence[int], in_features: int, dtype: Any
) -> jax.Array:
    """(*batch_shape, (k - 1) * dilation, in_features) zeros, of a layer of nnx or linen."""
    made = causal_window(layer.kernel_size, layer.kernel_dilation)
    batch = tuple(batch_shape) if isinstance(batch_shape, Sequence) else (batch_shape,)
    if dtype is None:
        dtype = layer.param_dtype if layer.dtype is None else layer.dtype
    return jnp.zeros((*map(operator.index, batch), made.sizes[0] - 1, in_features), dtype)
