"""What the Flax layers have in common: the op as they take it, and its check of the features."""

import dataclasses
from typing import Any

import jax

from grouped_conv_jax import arguments
from grouped_conv_jax.algorithms import check_name
from grouped_conv_jax.conv import grouped_conv


@dataclasses.dataclass(frozen=True)
class Convolution:
    """`grouped_conv` with its `implementation` settled, equal and hashable by value.

    A layer keeps it as static data; a closure in its place would differ from layer to layer, and
    jit would compile equal layers again.
    """

    implementation: str | None = None

    def __post_init__(self):
        check_name(self.implementation)

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        return grouped_conv(*args, **kwargs, implementation=self.implementation)


def check_no_other_convolution(**functions: Any) -> None:
    """Raises TypeError if the layer was given a convolution to use in place of this library's."""
    for name, function in functions.items():
        if function is not None and not isinstance(function, Convolution):
            raise TypeError(
                f"GroupedConv convolves with grouped_conv and takes no {name}; Flax's own Conv "
                "takes one"
            )


def check_features(in_features: int, out_features: int, feature_group_count: Any) -> None:
    """Raises ValueError or TypeError where the groups do not divide inputs and outputs."""
    groups = arguments.group_count("feature_group_count", feature_group_count)
    arguments.check_divides("feature_group_count", groups, "the input features", in_features)
    arguments.check_divides("feature_group_count", groups, "the output features", out_features)
