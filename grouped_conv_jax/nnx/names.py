"""What PyTorch and Keras call a layer's arguments, and what they are called here."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Init = TypeVar("Init", bound=Callable[..., None])

NAMES = {
    "groups": "feature_group_count",
    "stride": "strides",
    "dilation": "kernel_dilation",
    "dilation_rate": "kernel_dilation",
    "bias": "use_bias",
    "in_channels": "in_features",
    "out_channels": "out_features",
    "filters": "out_features",
    "depth_multiplier": "channel_multiplier",
    "kernel_initializer": "kernel_init",
    "depthwise_initializer": "depthwise_init",
    "pointwise_initializer": "pointwise_init",
    "bias_initializer": "bias_init",
}


def with_names_of_flax(init: Init) -> Init:
    """A layer's `__init__` that says what an argument is called, and if the groups are missing.

    Raises:
      TypeError: before anything else is done.
    """
    parameters = inspect.signature(init).parameters
    groups = parameters.get("feature_group_count")
    are_required = groups is not None and groups.default is inspect.Parameter.empty

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name in NAMES:
                raise TypeError(f"{name} is named {NAMES[name]} here")
            if name == "padding_mode":
                raise TypeError(
                    "padding_mode is part of padding here: padding='CIRCULAR', or a mode with its "
                    "amounts for each dimension, [('REFLECT', (1, 1)), ('REFLECT', (1, 1))]"
                )
        if are_required and "feature_group_count" not in kwargs:
            raise TypeError("feature_group_count is required; 1 for a plain convolution")
        init(self, *args, **kwargs)

    return checked  # pyright: ignore[reportReturnType]
