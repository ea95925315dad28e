"""The parameters of a linen layer, and its call."""

import functools
from typing import Any

import jax

from grouped_conv_jax.layers.call import Call, prepared
from grouped_conv_jax.layers.convolution import check_elements


def call(
    layer: Any,
    inputs: jax.Array,
    rank: int,
    kernel_shape: tuple[int, ...],
    bias_shape: tuple[int, ...],
) -> Call:
    """What the layer convolves, with its parameters, which are made here."""
    check_elements("the kernel", kernel_shape)
    kernel = layer.param("kernel", layer.kernel_init, kernel_shape, layer.param_dtype)
    bias = None
    if layer.use_bias:
        bias = layer.param("bias", layer.bias_init, bias_shape, layer.param_dtype)
    return prepared(
        inputs,
        kernel,
        bias,
        rank=rank,
        mask=layer.mask,
        promote=functools.partial(layer.promote_dtype, dtype=layer.dtype),
    )
