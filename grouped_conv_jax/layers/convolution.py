"""The convolution as a layer takes it, and the features that it may have."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from grouped_conv_jax.algorithms import table
from grouped_conv_jax.algorithms.table import Implementation
from grouped_conv_jax.layers.call import Call
from grouped_conv_jax.layers.window import Window
from grouped_conv_jax.operations import arguments
from grouped_conv_jax.operations.conv import grouped_conv
from grouped_conv_jax.text import shown


@dataclasses.dataclass(frozen=True)
class Convolution:
    """`grouped_conv` with what Flax's layer does not pass to it, equal and hashable by value.

    A layer keeps it as static data; a closure in its place would differ from layer to layer, and
    jit would compile equal layers again.
    """

    implementation: Implementation = None
    preferred_element_type: Any = None

    def __post_init__(self):
        object.__setattr__(self, "implementation", table.parsed(self.implementation))

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        return grouped_conv(*args, **{**vars(self), **kwargs})


def check_no_other_convolution(layer: str, **functions: Any) -> None:
    """Raises TypeError if the layer was given a convolution to use in place of this library's."""
    for name, function in functions.items():
        if function is not None and not isinstance(function, Convolution):
            raise TypeError(
                f"{layer} convolves with grouped_conv and takes no {name}; Flax's own Conv "
                "takes one"
            )


def sizes(**features: Any) -> tuple[int, ...]:
    """Numbers of features, by the names of the arguments.

    Raises:
      ValueError, TypeError: one is not an integer of at least 1.
    """
    return tuple(arguments.group_count(name, size) for name, size in features.items())


def check_elements(what: str, shape: Sequence[int]) -> None:
    """Raises ValueError if no memory has room for an array: making it would end the process."""
    if math.prod(shape) >= 2**48:
        raise ValueError(f"{what} would have the shape {shown(tuple(shape))}; take less")


def check_features(in_features: int, out_features: int, feature_group_count: Any) -> int:
    """The number of groups, which divides both.

    Raises:
      ValueError, TypeError: it does not.
    """
    groups = arguments.group_count("feature_group_count", feature_group_count)
    arguments.check_divides("feature_group_count", groups, "the input features", in_features)
    arguments.check_divides("feature_group_count", groups, "the output features", out_features)
    return groups


def multiplied(features: int, channel_multiplier: Any) -> int:
    """The features of a depthwise layer's output."""
    return features * arguments.group_count("channel_multiplier", channel_multiplier)


def convolved(layer: Any, call: Call, window: Window, feature_group_count: int) -> jax.Array:
    """The output of a layer of nnx or linen, by its settings."""
    outputs = grouped_conv(
        call.inputs,
        call.kernel,
        window.strides,
        window.padding,
        window.input_dilation,
        window.kernel_dilation,
        window.dimension_numbers,
        feature_group_count,
        precision=layer.precision,
        preferred_element_type=layer.preferred_element_type,
        implementation=layer.implementation,
    )
    return call.finished(outputs)
