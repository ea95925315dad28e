"""The locally connected layer's convolution: a kernel of its own at each position."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from grouped_conv_jax.layers.convolution import check_features
from grouped_conv_jax.layers.window import Window, window
from grouped_conv_jax.operations import arguments
from grouped_conv_jax.operations.conv import grouped_conv
from grouped_conv_jax.operations.local import grouped_conv_local


@dataclasses.dataclass(frozen=True)
class Local:
    """What a layer computes of its inputs, (N, *spatial, features), and its kernel."""

    window: Window
    feature_group_count: int

    def positions(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """The spatial shape of the output, of inputs of this one.

        Raises:
          ValueError: it has no position, so that there is no kernel to make.
        """
        dtype = np.float32
        convolve = functools.partial(
            grouped_conv,
            window_strides=self.window.strides,
            padding=self.window.padding,
            lhs_dilation=self.window.input_dilation,
            rhs_dilation=self.window.kernel_dilation,
            dimension_numbers=self.window.dimension_numbers,
        )
        found = jax.eval_shape(
            convolve,
            jax.ShapeDtypeStruct((1, *spatial, 1), dtype),
            jax.ShapeDtypeStruct((*self.window.kernel_size, 1, 1), dtype),
        ).shape[1:-1]
        if 0 in found:
            raise ValueError(
                f"inputs must be large enough for one output at least; those of the spatial shape "
                f"{tuple(spatial)} give outputs of {found}"
            )
        return found

    def kernel_shape(
        self, positions: Sequence[int], in_features: int, out_features: int
    ) -> tuple[int, ...]:
        """(*positions, C * K, G * O), the taps of each input together."""
        groups = check_features(in_features, out_features, self.feature_group_count)
        depth = in_features // groups * math.prod(self.window.kernel_size)
        return (*positions, depth, out_features)

    def __call__(
        self,
        inputs: jax.Array,
        kernel: jax.Array,
        precision: Any,
        preferred_element_type: Any,
        out_sharding: Any = None,
    ) -> jax.Array:
        return grouped_conv_local(
            inputs,
            kernel,
            self.window.strides,
            self.window.padding,
            self.window.kernel_size,
            self.window.input_dilation,
            self.window.kernel_dilation,
            self.window.dimension_numbers,
            precision,
            feature_group_count=self.feature_group_count,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )


def local(
    kernel_size: Any,
    strides: Any,
    padding: Any,
    input_dilation: Any,
    kernel_dilation: Any,
    feature_group_count: Any,
) -> Local:
    """That of a layer with these arguments.

    Raises:
      ValueError, TypeError: one is wrong; the message says which and how to mend it.
    """
    groups = arguments.group_count("feature_group_count", feature_group_count)
    return Local(window(kernel_size, strides, padding, input_dilation, kernel_dilation), groups)


def local_of(layer: Any) -> Local:
    """That of a layer of nnx or linen, by its settings."""
    return local(
        layer.kernel_size,
        layer.strides,
        layer.padding,
        layer.input_dilation,
        layer.kernel_dilation,
        layer.feature_group_count,
    )
