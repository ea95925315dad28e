"""The transposed convolution of a layer."""

import dataclasses
from typing import Any

import jax

from grouped_conv_jax.algorithms import table
from grouped_conv_jax.algorithms.table import Asked, Implementation
from grouped_conv_jax.layers.convolution import check_features
from grouped_conv_jax.layers.window import Window, for_each, window
from grouped_conv_jax.operations import arguments
from grouped_conv_jax.operations.padding import TRANSPOSED
from grouped_conv_jax.operations.transpose import grouped_conv_transpose

CIRCULAR = ("CIRCULAR", None)


@dataclasses.dataclass(frozen=True)
class Transposed:
    """What a layer computes of its inputs, (N, *spatial, features), and its kernel."""

    window: Window
    feature_group_count: int
    transpose_kernel: bool
    output_padding: tuple[int, ...]
    implementation: Asked

    def kernel_shape(self, in_features: int, out_features: int) -> tuple[int, ...]:
        """(*taps, C, G * O), or with `transpose_kernel` (*taps, O, G * C)."""
        groups = check_features(in_features, out_features, self.feature_group_count)
        if self.transpose_kernel:
            return (*self.window.kernel_size, out_features // groups, in_features)
        return (*self.window.kernel_size, in_features // groups, out_features)

    def __call__(
        self,
        inputs: jax.Array,
        kernel: jax.Array,
        precision: Any,
        preferred_element_type: Any,
        out_sharding: Any = None,
    ) -> jax.Array:
        return grouped_conv_transpose(
            inputs,
            kernel,
            self.window.strides,
            self.window.padding,
            self.window.kernel_dilation,
            self.window.dimension_numbers,
            self.feature_group_count,
            self.transpose_kernel,
            precision,
            preferred_element_type,
            output_padding=self.output_padding,
            out_sharding=out_sharding,
            implementation=self.implementation,
        )


def transposed(
    kernel_size: Any,
    strides: Any,
    padding: Any,
    kernel_dilation: Any,
    feature_group_count: Any,
    transpose_kernel: Any,
    output_padding: Any,
    implementation: Implementation,
) -> Transposed:
    """That of a layer with these arguments.

    Raises:
      ValueError, TypeError: one is wrong; the message says which and how to mend it.
    """
    asked = table.parsed(implementation)
    made = window(kernel_size, strides, padding, 1, kernel_dilation, TRANSPOSED)
    transpose_kernel = arguments.flag("transpose_kernel", transpose_kernel)
    return Transposed(
        _with_circular_pairs(made) if transpose_kernel else made,
        arguments.group_count("feature_group_count", feature_group_count),
        transpose_kernel,
        for_each("output_padding", output_padding, made.kernel_size, default=0, least=0),
        asked,
    )


def transposed_of(layer: Any) -> Transposed:
    """That of a layer of nnx or linen, by its settings."""
    return transposed(
        layer.kernel_size,
        layer.strides,
        layer.padding,
        layer.kernel_dilation,
        layer.feature_group_count,
        layer.transpose_kernel,
        layer.output_padding,
        layer.implementation,
    )


def _with_circular_pairs(made: Window) -> Window:
    """A circular layer keeps the input's size times the strides. Where that leaves an odd number of
    positions to put beyond the ends, one more goes before than after; with `transpose_kernel` one
    more after, as in Flax: so it is the transpose of the circular convolution with that kernel.
    """
    pairs = tuple(
        (entry[0], _circular(size, stride)) if entry == CIRCULAR else entry
        for entry, size, stride in zip(made.padding, made.sizes, made.strides, strict=True)
    )
    return dataclasses.replace(made, padding=pairs)


def _circular(size: int, stride: int) -> tuple[int, int]:
    low = size - 1 - max(size - stride + 1, 0) // 2
    return low, size + stride - 2 - low
