"""What every layer does around its convolution: batch dimensions, mask, dtypes and bias."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grouped_conv_jax.operations import arguments


class Call(NamedTuple):
    """What is convolved: inputs with one batch dimension, (N, *spatial, features), the kernel and
    the bias (or None), of one dtype; and the batch dimensions that the inputs had.
    """

    inputs: jax.Array
    kernel: jax.Array
    bias: jax.Array | None
    batch: tuple[int, ...]

    def finished(self, outputs: jax.Array) -> jax.Array:
        """The layer's output: with the bias and the batch dimensions of its input."""
        if self.bias is not None:
            absent = range(outputs.ndim - self.bias.ndim)
            outputs = outputs + jnp.expand_dims(self.bias, tuple(absent)).astype(outputs.dtype)
        return self.restored(outputs)

    def restored(self, x: jax.Array) -> jax.Array:
        """With the batch dimensions of the layer's input."""
        return x if len(self.batch) == 1 else x.reshape(*self.batch, *x.shape[1:])


def prepared(
    inputs: Any,
    kernel: jax.Array,
    bias: jax.Array | None,
    *,
    rank: int,
    mask: Any,
    promote: Callable[..., Any],
) -> Call:
    """The call of a layer of `rank` spatial dimensions with its parameters.

    `promote` brings inputs, kernel and bias (or None) to one dtype.

    Raises:
      ValueError, TypeError: the mask has not the kernel's shape, the inputs have too few
        dimensions, or an initializer has not made an array.
    """
    arguments.array_type("kernel", kernel)
    if mask is not None:
        check_mask(mask, kernel.shape)
        kernel = kernel * mask.astype(kernel.dtype)
    batch = batch_shape(inputs, rank)
    inputs, kernel, bias = promote(inputs, kernel, bias)
    return Call(flattened(inputs, rank), kernel, bias, batch)


def check_mask(mask: Any, kernel_shape: tuple[int, ...]) -> None:
    """Raises TypeError or ValueError unless it is an array of the kernel's shape, or None."""
    if mask is None:
        return
    if (shape := arguments.array_type("mask", mask).shape) != kernel_shape:
        raise ValueError(f"mask must have the shape of the kernel, {kernel_shape}, got {shape}")


def features_of(inputs: Any, rank: int) -> int:
    """The last dimension, of inputs of enough dimensions."""
    batch_shape(inputs, rank)
    if inputs.shape[-1] == 0:
        raise ValueError(f"inputs must have at least one feature, got shape {inputs.shape}")
    return inputs.shape[-1]


def batch_shape(inputs: Any, rank: int) -> tuple[int, ...]:
    """The dimensions before the `rank` spatial ones and the features."""
    shape = arguments.array_type("inputs", inputs).shape
    if len(shape) <= rank:
        raise ValueError(
            f"inputs must have {rank} spatial dimensions and features, after any batch dimensions; "
            f"got shape {shape}"
        )
    return shape[: len(shape) - rank - 1]


def flattened(inputs: jax.Array, rank: int) -> jax.Array:
    """With one batch dimension."""
    batch = batch_shape(inputs, rank)
    if len(batch) == 1:
        return inputs
    return jnp.reshape(inputs, (math.prod(batch), *inputs.shape[len(batch) :]))
