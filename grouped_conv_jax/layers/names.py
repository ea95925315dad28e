"""What PyTorch and Keras call a layer's arguments, and what they are called here."""

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

Layer = TypeVar("Layer", bound=type)

NAMES = {
    "groups": "feature_group_count",
    "stride": "strides",
    "dilation": "kernel_dilation",
    "dilation_rate": "kernel_dilation",
    "bias": "use_bias",
    "depth_multiplier": "channel_multiplier",
    "kernel_initializer": "kernel_init",
    "depthwise_initializer": "depthwise_init",
    "pointwise_initializer": "pointwise_init",
    "bias_initializer": "bias_init",
}
IN_NNX = NAMES | {
    "in_channels": "in_features",
    "out_channels": "out_features",
    "filters": "out_features",
}
IN_LINEN = NAMES | dict.fromkeys(("out_channels", "out_features", "filters"), "features")

PADDING_MODE = (
    "padding_mode is part of padding here: padding='CIRCULAR', or a mode with its amounts for each "
    "dimension, [('REFLECT', (1, 1)), ('REFLECT', (1, 1))]"
)
OF_INPUTS = ("in_channels", "in_features")
"""What a linen layer is not told, but sees."""


def with_names(
    names: Mapping[str, str], takes_no: Mapping[str, str] = MappingProxyType({})
) -> Callable[[Layer], Layer]:
    """A layer that says what an argument of others is called, and if its groups are missing.

    It raises TypeError before anything else is done. What the layer does not have is not promised
    by another name.

    Args:
      names: `IN_NNX` or `IN_LINEN`.
      takes_no: why it does not take arguments of the layers that it is made of, by their names.
    """

    def decorated(layer: Layer) -> Layer:
        parameters = _parameters(layer)
        said = {name: f"{layer.__name__} takes no {name}: {why}" for name, why in takes_no.items()}
        for other, ours in names.items():
            if ours in takes_no:
                said[other] = f"{layer.__name__} takes no {other}: {takes_no[ours]}"
            elif ours in parameters and other not in parameters:
                said[other] = f"{other} is named {ours} here"
        if "padding" in parameters:
            said["padding_mode"] = said.get("padding", PADDING_MODE)
        if names is IN_LINEN:
            said |= {name: f"{name} is what the inputs have, and not given" for name in OF_INPUTS}
        layer.__init__ = _checked(layer.__init__, said)
        return layer

    return decorated


def _parameters(layer: type) -> set[str]:
    """Of `__init__`, and of those that it passes on what else it is given."""
    found: set[str] = set()
    for kind in layer.__mro__:
        if "__init__" in vars(kind):
            parameters = inspect.signature(vars(kind)["__init__"]).parameters
            found |= parameters.keys()
            if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
                break
    return found


def _checked(init: Any, said: Mapping[str, str]) -> Any:
    groups = inspect.signature(init).parameters.get("feature_group_count")
    are_required = groups is not None and groups.default is inspect.Parameter.empty

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name in said:
                raise TypeError(said[name])
        if are_required and "feature_group_count" not in kwargs:
            raise TypeError("feature_group_count is required; 1 for a plain convolution")
        init(self, *args, **kwargs)

    return checked
