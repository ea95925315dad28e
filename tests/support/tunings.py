"""Tunings with made-up times."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from cases import named

from grouped_conv_jax import Tuning
from grouped_conv_jax.algorithms import choice
from grouped_conv_jax.algorithms.devices import Device
from grouped_conv_jax.algorithms.ranking import Subject, spec_key
from grouped_conv_jax.tuning.measurement import Measurement
from grouped_conv_jax.tuning.occurrences import occurrences

HERE = Device.of(jax.devices("cpu")[0])


(CASE,) = named("NHWC")


X, W, Y = CASE.random()


CONV = CASE.conv()


def made_up(
    function: Callable, *args: Any, times: Mapping[str, float | None], device: Device = HERE
) -> Tuning:
    """A tuning in which all contractions of a function take the same times."""
    found = occurrences(function, args, {})
    subjects = {Subject(device, o.contraction, spec_key(o.spec)) for o in found}
    return Tuning(tuple(Measurement.of(subject, times) for subject in subjects))


FOR_VMAP = {"xla": 2e-3, "vmap": 1e-3}


def lowered(function: Callable, *args: Any) -> set[tuple[str, str]]:
    """Each contraction in a function with the implementation that computes it."""
    text = jax.jit(function).lower(*args).as_text(debug_info=True)
    return set(re.findall(r"grouped_conv\.(\w+)\.(\w+)", text))


def automatic(function: Callable, *args: Any) -> set[tuple[str, str]]:
    found = occurrences(function, args, {})
    return {(o.contraction, choice.choose(o.contraction, o.spec, HERE)) for o in found}
