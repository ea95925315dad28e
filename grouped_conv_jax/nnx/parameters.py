"""The parameters of a layer that Flax nnx has none of, and its call."""

from collections.abc import Callable
from typing import Any

import jax

from grouped_conv_jax.layers.call import Call, batch_shape, prepared


def with_shape(initializer: Callable[..., Any], shape: tuple[int, ...]) -> Callable[..., Any]:
    """An initializer that makes an array of this shape, whatever it is asked for."""

    def initialize(key: jax.Array, _: Any, dtype: Any) -> Any:
        return initializer(key, shape, dtype)

    return initialize


def check_inputs(inputs: Any, layer: Any) -> None:
    """Raises ValueError if they are not of the layer's rank, or of other features."""
    batch_shape(inputs, len(layer.kernel_size))
    if inputs.shape[-1] != layer.in_features:
        raise ValueError(
            f"inputs must have in_features={layer.in_features} features, which the layer was made "
            f"for, in their last dimension, got shape {inputs.shape}"
        )


def call(layer: Any, inputs: jax.Array) -> Call:
    """What the layer convolves, with its parameters."""
    check_inputs(inputs, layer)
    return prepared(
        inputs,
        layer.kernel[...],
        None if layer.bias is None else layer.bias[...],
        rank=len(layer.kernel_size),
        mask=layer.mask,
        promote=lambda *arrays: layer.promote_dtype(arrays, dtype=layer.dtype),
    )
