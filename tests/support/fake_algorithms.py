"""Algorithms made of a few functions, and the devices that they are asked about."""

from typing import Any

import jax

from grouped_conv_jax.algorithms import Algorithm, Device

CPU = Device.of(jax.devices("cpu")[0])


def algorithm(base: type[Algorithm] = Algorithm, /, **members: Any) -> Algorithm:
    """Returns an algorithm with the given members; its methods are functions without `self`."""
    methods = {name: staticmethod(m) if callable(m) else m for name, m in members.items()}
    return type("Fake", (base,), methods)()
