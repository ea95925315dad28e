"""Settings of the example's runs, each by its name alone, whatever part it belongs to."""

import dataclasses
from typing import Any

from alexnet.config import Devices, Recipe, TrainConfig, Work

PARTS = {"recipe": Recipe, "devices": Devices, "work": Work}


def config_of(**settings: Any) -> TrainConfig:
    """Those given, and defaults; nothing is kept outside of the run's folder."""
    settings = {"cache": None, "tensorboard": False} | settings
    parts = {}
    for name, part in PARTS.items():
        own = {field.name for field in dataclasses.fields(part)} & settings.keys()
        parts[name] = part(**{name: settings.pop(name) for name in own})
    return TrainConfig(**settings, **parts)
