"""A row: who takes part, whether all compute the same, and how long they take."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import pytorch
from benchmarks.contenders import Contender, Conv, by_jax, by_lax, ours
from benchmarks.machine import Roofline
from benchmarks.measure import interleaved
from benchmarks.results import WRONG, Row, Timing
from benchmarks.workloads import USED, Mode, Workload
from grouped_conv_jax.spec import Role

TOLERANCES = {"float64": 1e-9, "float32": 1e-2, "float16": 5e-2, "bfloat16": 1e-1}
"""The largest error of any element, in shares of the root mean square of all.

They are to find what computes something else, not what rounds otherwise: on a GPU the factors of
float32 products have eleven bits, and 16-bit results are up to five times the root mean square.
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a row is measured: the arguments of `interleaved`, and who takes part beside the rest."""

    dtype: str
    turns: int
    calls: int
    budget: float
    implementations: Sequence[str] = ()
    in_flight: int = 1
    """Calls that are started, and then waited for together."""


def measured(workload: Workload, mode: Mode, settings: Settings, roofline: Roofline) -> Row:
    """Compiles, compares and times all contenders."""
    contenders, left_out = prepared(workload, mode, settings)
    errors = compared(contenders)
    for name, error in errors.items():
        # So that what is not a number is wrong, too.
        if not error <= TOLERANCES[settings.dtype]:
            left_out[name] = f"{WRONG}: {error:.1e} away from lax"
            del contenders[name]
    times = interleaved(
        {
            name: functools.partial(contender.call, settings.in_flight)
            for name, contender in contenders.items()
        },
        turns=settings.turns,
        calls=settings.calls,
        budget=settings.budget,
    )
    timings = {
        name: Timing.of(
            [seconds / settings.in_flight for seconds in times[name]], contender, errors[name]
        )
        for name, contender in contenders.items()
    }
    flops = workload.flops(mode)
    array_bytes = workload.elements(mode) * jnp.dtype(settings.dtype).itemsize
    least = roofline.seconds(flops, array_bytes)
    return Row(
        workload=workload,
        mode=mode,
        flops=flops,
        array_bytes=array_bytes,
        roofline_seconds=least,
        roofline_fraction=least / timings["ours"].median if "ours" in timings else None,
        timings=timings,
        left_out=left_out,
    )


def prepared(
    workload: Workload, mode: Mode, settings: Settings
) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders by name, compiled; and who does not do this, and why."""
    operands = workload.random()
    arrays: dict[Role, jax.Array] = {
        role: jnp.asarray(operands[role], settings.dtype) for role in USED[mode]
    }

    def jax_contender(conv: Conv) -> Callable[[], Contender]:
        return lambda: by_jax(conv, workload, mode, arrays)

    def torch_contender(memory_format: str) -> Callable[[], Contender]:
        return lambda: pytorch.by_torch(memory_format, workload, mode, operands, settings.dtype)

    makers = {"ours": jax_contender(ours(None)), "lax": jax_contender(by_lax)}
    makers |= {f"ours:{name}": jax_contender(ours(name)) for name in settings.implementations}
    left_out: dict[str, str] = {}
    if reason := pytorch.missing():
        left_out["torch"] = reason
    else:
        makers |= {f"torch {name}": torch_contender(name) for name in pytorch.FORMATS}
    contenders: dict[str, Contender] = {}
    for name, make in makers.items():
        try:
            contenders[name] = make()
        except NotImplementedError as error:
            left_out[name] = str(error)
    return contenders, left_out


def compared(contenders: Mapping[str, Contender]) -> dict[str, float]:
    """The largest error of each contender, compared with lax: see `TOLERANCES`."""
    results = {name: c.results(c.call()) for name, c in contenders.items()}
    return {name: _error(found, results["lax"]) for name, found in results.items()}


def _error(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """The largest one of all arrays; infinite where the shapes differ."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        return float("inf")
    errors = [
        np.max(np.abs(x - y)) / np.sqrt(np.mean(np.square(y)))
        for x, y in zip(found, expected, strict=True)
    ]
    return float(np.max(errors))
