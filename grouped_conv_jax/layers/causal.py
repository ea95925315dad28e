"""The causal layer's convolution, of a sequence or of its next chunk."""

from typing import Any

import jax
import jax.numpy as jnp

from grouped_conv_jax.layers.call import Call, flattened
from grouped_conv_jax.layers.convolution import check_elements, sizes
from grouped_conv_jax.layers.window import Window, is_integer, window
from grouped_conv_jax.operations import arguments
from grouped_conv_jax.operations.streaming import streaming_conv


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
    layer: Any, call: Call, state: Any, feature_group_count: int, out_sharding: Any = None
) -> tuple[jax.Array, jax.Array]:
    """The output of a chunk, and the state after it, of a layer of nnx or linen."""
    made = causal_window(layer.kernel_size, layer.kernel_dilation)
    if state is not None:
        _check_state(state, call, made)
        state = flattened(state, made.rank)
    outputs, state = streaming_conv(
        call.inputs,
        call.kernel,
        state,
        made.kernel_dilation,
        feature_group_count=feature_group_count,
        precision=layer.precision,
        preferred_element_type=layer.preferred_element_type,
        implementation=layer.implementation,
        out_sharding=out_sharding,
    )
    return call.finished(outputs), call.restored(state)


def initial_state(layer: Any, batch_shape: Any, in_features: Any, dtype: Any) -> jax.Array:
    """(*batch_shape, (k - 1) * dilation, in_features) zeros, of a layer of nnx or linen.

    Raises:
      ValueError, TypeError: an argument is wrong; the message says which and how to mend it.
    """
    made = causal_window(layer.kernel_size, layer.kernel_dilation)
    (features,) = sizes(in_features=in_features)
    batch = (batch_shape,) if is_integer(batch_shape) else batch_shape
    batch = arguments.shape("batch_shape", batch)
    if dtype is None:
        dtype = layer.param_dtype if layer.dtype is None else layer.dtype
    shape = (*batch, made.sizes[0] - 1, features)
    check_elements("the state", shape)
    return jnp.zeros(shape, dtype)


def _check_state(state: Any, call: Call, made: Window) -> None:
    past, features = made.sizes[0] - 1, call.inputs.shape[-1]
    found, expected = arguments.array_type("state", state), (*call.batch, past, features)
    if found.shape != expected:
        chunk = (*call.batch, *call.inputs.shape[1:])
        raise ValueError(
            f"state must have the last {past} inputs, shape {expected} with the inputs' shape "
            f"{chunk}, got shape {found.shape}. Have the inputs their time axis? One element of x "
            "is x[:, t : t + 1]. Begin with None or initial_state, and give each chunk the "
            "state of the one before"
        )
    arguments.check_same_dtype(inputs=call.inputs, state=found)
