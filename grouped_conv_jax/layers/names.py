"""What PyTorch and Keras call a layer's arguments, and what they are called here."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Init = TypeVar("Init", bound=Callable[..., None])
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

SAID_OTHERWISE = {
    "padding_mode": "is part of padding here: padding='CIRCULAR', or a mode with its amounts for "
    "each dimension, [('REFLECT', (1, 1)), ('REFLECT', (1, 1))]"
}
NOT_IN_LINEN = dict.fromkeys(
    ("in_channels", "in_features"), "is what the inputs have, and no argument of a linen layer"
)


def with_names_of_nnx(init: Init) -> Init:
    """An nnx layer's `__init__` that says what an argument is called, and if groups are missing.

    Raises:
      TypeError: before anything else is done.
    """
    return _checked(init, IN_NNX, SAID_OTHERWISE)


def with_names_of_linen(layer: Layer) -> Layer:
    """A linen layer of which the same holds; Flax has made its `__init__` of its attributes."""
    layer.__init__ = _checked(layer.__init__, IN_LINEN, SAID_OTHERWISE | NOT_IN_LINEN)
    return layer


def _checked(init: Any, names: dict[str, str], said_otherwise: dict[str, str]) -> Any:
    parameters = inspect.signature(init).parameters
    takes_more = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    names = {other: ours for other, ours in names.items() if takes_more or ours in parameters}
    groups = parameters.get("feature_group_count")
    are_required = groups is not None and groups.default is inspect.Parameter.empty

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name in said_otherwise and name not in parameters:
                raise TypeError(f"{name} {said_otherwise[name]}")
            if name in names and name not in parameters:
                raise TypeError(f"{name} is named {names[name]} here")
        if are_required and "feature_group_count" not in kwargs:
            raise TypeError("feature_group_count is required; 1 for a plain convolution")
        init(self, *args, **kwargs)

    return checked
