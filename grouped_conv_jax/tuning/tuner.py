"""Measuring implementations: `tune`.

Each is compiled alone, on random data, and all take turns, so that what slows the machine down for
a while slows them all.
"""

import contextlib
import functools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grouped_conv_jax.algorithms import choice
from grouped_conv_jax.algorithms.devices import Device
from grouped_conv_jax.algorithms.ranking import Subject, spec_key
from grouped_conv_jax.algorithms.table import TABLE, compute, unsupported, variants
from grouped_conv_jax.operations import arguments
from grouped_conv_jax.spec import OPERANDS, Contraction, ConvSpec, Role
from grouped_conv_jax.tuning import calls
from grouped_conv_jax.tuning.context import Tuning
from grouped_conv_jax.tuning.measurement import Measurement
from grouped_conv_jax.tuning.occurrences import occurrences

HOPELESS = 20
"""How many times slower than the fastest an implementation is measured no more than once."""

START_SECONDS = 0.5
"""What a first run may take for reasons of its own."""

SAMPLE_SECONDS = 2e-3
"""For one sample, what is faster is run several times."""


def tune(*args: Any, repeats: int = 10, **kwargs: Any) -> Tuning:
    """Measures which implementations are the fastest.

    The arguments are those of `explain`. `tune(function, *args, **kwargs)` measures all grouped
    convolutions in `function(*args, **kwargs)`, and gradients if the function takes them.
    `tune(lhs, rhs, window_strides, padding, ...)`, with the arguments of `grouped_conv`, measures
    that convolution and its two gradients.

    Each distinct contraction, in the shapes that one device gets, is computed alone by each
    implementation that supports it (by the first of those that are the same function), on a device
    of the kind that it would run on. Those with an `implementation` of their own are left out, and
    so are those that XLA divides among devices by itself (a TPU's mesh with Auto axes), where what
    one device gets is not known.

    Args:
      *args: a function and its arguments, as for `explain`, or the arguments of `grouped_conv`. The
        function is traced, and if several devices share it compiled, but not run.
      repeats: samples for each implementation, of which the median counts.
      **kwargs: more arguments, by name.

    Returns:
      The times: print them, use them in `with tuning:`, keep them with `tuning.save(path)`.

    Raises:
      ValueError: `repeats` is less than 1, or the function changes a module of Flax that is not
        among its arguments.
      RuntimeError: the function is for devices that this process does not have, such as those of a
        topology.
      TypeError: `repeats` is not an integer.

    Warns:
      UserWarning: an implementation fails on what it is said to support, and is not used there. Or
        contractions are left out since XLA divides them.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from grouped_conv_jax import grouped_conv, tune
      >>> def loss(x, w):
      ...     return grouped_conv(x, w, (1, 1), "SAME", feature_group_count=2).sum()
      >>> step = jax.jit(jax.grad(loss, argnums=(0, 1)))
      >>> x, w = jnp.ones((2, 4, 8, 8)), jnp.ones((6, 2, 3, 3))
      >>> tuning = tune(step, x, w, repeats=1)
      >>> {'dgrad', 'wgrad'} <= {m.subject.contraction for m in tuning.measurements}
      True
      >>> with tuning:
      ...     dx, dw = step(x, w)
    """
    repeats = arguments.group_count("repeats", repeats)
    measured: dict[tuple[Device, Contraction, ConvSpec], Measurement] = {}
    divided_by_xla = 0
    for o in occurrences(*calls.parsed(args, kwargs)):
        key = o.device, o.contraction, o.spec
        if o.divided_over is not None:
            divided_by_xla += 1
            _device_here(o.device)
        elif o.implementation is None and key not in measured:
            measured[key] = _measure(*key, repeats)
    if divided_by_xla:
        warnings.warn(
            f"{divided_by_xla} contractions are not measured: XLA divides them over Auto mesh axes "
            "by itself, and what one device computes is not known; make the axes Explicit, or use "
            "jax.shard_map",
            stacklevel=2,
        )
    return Tuning(tuple(measured.values()))


def _measure(kind: Device, contraction: Contraction, spec: ConvSpec, repeats: int) -> Measurement:
    device = _device_here(kind)
    subject = Subject(kind, contraction, spec_key(spec))
    first = choice.choose(contraction, spec, kind)
    names = _different(contraction, spec, kind)
    seconds: dict[str, float | None] = {}
    runs: dict[str, Callable[[], Any]] = {}
    with _alone(spec):
        operands = [_random(spec, role, device) for role in OPERANDS[contraction]]
        # What is probably fast first, so that there is a measure of what is slow.
        for name in sorted(names, key=lambda n: n != first):
            try:
                run = _compiled(name, contraction, spec, kind, operands)
                seconds[name] = _first_time(run, min(filter(None, seconds.values()), default=None))
            except Exception as error:
                seconds[name] = None
                _warn(name, subject, error)
            else:
                runs[name] = run
        seconds.update(_medians(runs, seconds, repeats))
    return Measurement.of(subject, seconds)


def _device_here(kind: Device) -> Any:
    """Returns a device of a kind that this process has.

    Raises:
      RuntimeError: this process has none.
    """
    try:
        return kind.find()
    except RuntimeError as missing:
        raise RuntimeError(f"tune runs what it measures, and {missing}") from None


def _different(contraction: Contraction, spec: ConvSpec, device: Device) -> list[str]:
    """Returns the implementations that support this, with each of their configs.

    An algorithm that inherits the contraction of another one in the table is left out.
    """
    able = [n for n in TABLE if unsupported(n, contraction, spec, device) is None]

    def inherits(name: str, other: str) -> bool:
        own, base = type(TABLE[name]), type(TABLE[other])
        same = getattr(own, contraction) is getattr(base, contraction)
        return own is not base and issubclass(own, base) and same

    return [
        variant
        for name in able
        if not any(inherits(name, other) for other in able)
        for variant in variants(name, contraction, spec, device)
    ]


def _warn(name: str, subject: Subject, error: Exception) -> None:
    lines = str(error).splitlines() or [""]
    warnings.warn(
        f"implementation {name!r} fails in {subject.contraction} of {subject.spec} on "
        f"{subject.device}, and will not be chosen there: {type(error).__name__}: {lines[0]}",
        stacklevel=4,
    )


def _compiled(
    name: str,
    contraction: Contraction,
    spec: ConvSpec,
    device: Device,
    operands: Sequence[jax.Array],
) -> Callable[[], Any]:
    def run(first: jax.Array, second: jax.Array) -> jax.Array:
        return compute(name, contraction, first, second, spec, device)

    return functools.partial(jax.jit(run).lower(*operands).compile(), *operands)


def _first_time(run: Callable[[], Any], best: float | None) -> float:
    """Of a second run, unless the first one is so slow that its start is not what makes it so."""
    seconds = _time(run)
    hopeless = best is not None and seconds > max(HOPELESS * best, START_SECONDS)
    return seconds if hopeless else _time(run)


def _medians(
    runs: Mapping[str, Callable[[], Any]], seconds: Mapping[str, float | None], repeats: int
) -> dict[str, float]:
    """Of those that are not hopeless by what they took at first, all in turn."""
    first = {name: time for name, time in seconds.items() if time is not None}
    contenders = {n: t for n, t in first.items() if t <= HOPELESS * min(first.values())}
    calls = {n: min(max(int(SAMPLE_SECONDS / t), 1), 100) for n, t in contenders.items()}
    samples = [{n: _time(runs[n], calls[n]) for n in contenders} for _ in range(repeats)]
    return {n: statistics.median(sample[n] for sample in samples) for n in contenders}


def _time(run: Callable[[], Any], calls: int = 1) -> float:
    """Seconds of one call, of several without a pause."""
    start = time.perf_counter()
    for _ in range(calls - 1):
        run()
    jax.block_until_ready(run())
    return (time.perf_counter() - start) / calls


@contextlib.contextmanager
def _alone(spec: ConvSpec) -> Iterator[None]:
    """Outside the caller's mesh, and with the types of the spec."""
    has_64_bits = any(
        dtype in (np.float64, np.complex128, np.int64, np.uint64)
        for dtype in (spec.dtype, spec.wide_dtype)
    )
    types = jax.enable_x64(True) if has_64_bits else contextlib.nullcontext()
    with types, jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ())):
        yield


def _random(spec: ConvSpec, role: Role, device: Any) -> jax.Array:
    """Numbers around zero, small enough for sums of any dtype; of integers -4 to 3."""
    # Drawn once and repeated at a length that no dimension is likely to have as a factor: drawing
    # an array of millions takes longer than convolving it.
    values = np.random.default_rng(0).uniform(-1, 1, 65_537)
    dtype = spec.role_dtype(role)
    if jnp.issubdtype(dtype, jnp.integer):
        values = np.floor(4 * values)
    return jax.device_put(np.resize(values.astype(dtype), spec.shape(role)), device)
