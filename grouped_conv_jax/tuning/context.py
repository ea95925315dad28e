"""Measured times as a context in which the fastest implementations are chosen: `Tuning`."""

import dataclasses
import functools
import itertools
import os
import threading
import warnings
from collections.abc import Mapping, Sequence

import jax

from grouped_conv_jax.algorithms import ranking
from grouped_conv_jax.algorithms.devices import Device
from grouped_conv_jax.algorithms.ranking import Choices, Subject, digest, spec_key
from grouped_conv_jax.algorithms.table import TABLE
from grouped_conv_jax.spec import Contraction, ConvSpec
from grouped_conv_jax.text import aligned
from grouped_conv_jax.tuning import tuning_file
from grouped_conv_jax.tuning.measurement import Measurement


@dataclasses.dataclass(frozen=True, repr=False)
class Tuning:
    """Measured times of implementations; as a string, a table for each kind of device.

    In `with tuning:` each contraction that was measured, on the kind of device and with the shapes
    that one device gets, is computed by the fastest implementation (of those that run unasked:
    "packed" does not). What was not measured, or asks for an `implementation`, is not affected.
    Functions that were compiled outside are compiled again, and of several contexts the innermost
    counts alone; `with outer | inner:` is both.

    Get one from `grouped_conv_jax.tune`, or from a file with `load`. `a | b` has the measurements
    of both, and where they are of the same, b's.

    Where a program runs in several processes, all must use the same tuning: tune in one, `save`,
    and `load` it in all.

    The kind of a CPU is its processor, the instruction set of the native kernels and the number of
    XLA's threads. A program that is exported on a CPU uses the measurements of that CPU.

    Attributes:
      measurements: in a fixed order, one for each contraction, spec and kind of device.

    Example:
      >>> import jax.numpy as jnp
      >>> from grouped_conv_jax import Tuning, grouped_conv, tune
      >>> def conv(x, w):
      ...     return grouped_conv(x, w, (1, 1), "SAME", feature_group_count=2)
      >>> x, w = jnp.ones((2, 4, 8, 8)), jnp.ones((6, 2, 3, 3))
      >>> tuning = tune(conv, x, w, repeats=1)
      >>> with tuning:
      ...     y = conv(x, w)
      >>> tuning.save("tuning.json")  # doctest: +SKIP
      >>> tuning = Tuning.load("tuning.json")  # doctest: +SKIP
    """

    measurements: tuple[Measurement, ...] = ()

    def __post_init__(self) -> None:
        by_subject: dict[Subject, Measurement] = {}
        for new in self.measurements:
            old = by_subject.get(new.subject)
            by_subject[new.subject] = new if old is None else old.updated(new)
        ordered = tuple(by_subject[subject] for subject in sorted(by_subject))
        object.__setattr__(self, "measurements", ordered)

    def __hash__(self) -> int:
        return hash(self._digest)

    @functools.cached_property
    def _digest(self) -> str:
        # Kept, as every call of a compiled function in the context looks at it.
        return digest(self.measurements)

    def __or__(self, other: "Tuning") -> "Tuning":
        if not isinstance(other, Tuning):
            return NotImplemented
        return Tuning((*self.measurements, *other.measurements))

    def seconds(
        self, contraction: Contraction, spec: ConvSpec, device: Device
    ) -> dict[str, float | None]:
        """What was measured of each implementation: None if it failed, nothing if it was not."""
        return dict(self._seconds.get(Subject(device, contraction, spec_key(spec)), ()))

    @functools.cached_property
    def _seconds(self) -> dict[Subject, tuple[tuple[str, float | None], ...]]:
        return {m.subject: m.seconds for m in self.measurements}

    @functools.cached_property
    def choices(self) -> Choices | None:
        """The ranking; None if nothing was measured."""
        fastest_first = tuple(
            (m.subject, tuple(name for name, time in m.seconds if time is not None))
            for m in self.measurements
        )
        return Choices(fastest_first) if fastest_first else None

    # As a context.

    def __enter__(self) -> "Tuning":
        context = ranking.context(self)
        context.__enter__()
        _entered.contexts.append(context)
        return self

    def __exit__(self, *exception: object) -> None:
        _entered.contexts.pop().__exit__(*exception)

    # In files.

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the measurements into a JSON file, to those that it has already.

        Several processes may do so at once. Beside the file there will be another one, PATH.lock.

        Raises:
          ValueError: there is a file that is something else; it is left alone.
        """
        tuning_file.save(path, self.measurements)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tuning":
        """Those measurements of a file that are valid here.

        They were made with the same versions of jax, jaxlib and this library, and are used on the
        kind of device that they were made on. If some are not valid, or none is for the device at
        hand, one warning says why; a file that cannot be read at all is as good as empty. Looks at
        `jax.devices()`, so initialise `jax.distributed` before.

        Raises:
          FileNotFoundError: there is no file.
        """
        measurements, reasons = tuning_file.load(path)
        here = Device.of(jax.local_devices()[0])
        if measurements and all(m.subject.device != here for m in measurements):
            others = " and ".join(sorted({_full_name(m.subject.device) for m in measurements}))
            reasons = [*reasons, f"measured on {others}, and this is {here}"]
        if reasons:
            warnings.warn(f"{path}: measurements not used: {'; '.join(reasons)}", stacklevel=2)
        return cls(tuple(measurements))

    # As text.

    def __repr__(self) -> str:
        return f"<Tuning of {len(self.measurements)} contractions>"

    def __str__(self) -> str:
        if not self.measurements:
            return "No measurements."
        # They are in the order of their devices.
        groups = itertools.groupby(self.measurements, lambda m: m.subject.device)
        return "\n\n".join(_table(device, tuple(group)) for device, group in groups)


def _table(device: Device, measurements: Sequence[Measurement]) -> str:
    """Returns the measurements on one kind of device, under a line that names it."""
    measured = dict.fromkeys(name for m in measurements for name, _ in m.seconds)
    order = list(TABLE)
    names = sorted(measured, key=lambda name: (order.index(name.partition(":")[0]), name))
    table = [["contraction", *(f"{name} ms" for name in names), "spec"]]
    for m in measurements:
        times = [_milliseconds(dict(m.seconds), name) for name in names]
        table.append([m.subject.contraction, *times, m.subject.spec])
    return "\n".join([f"{device}:", *aligned(table, numbers=table[0][1:-1])])


def _full_name(device: Device) -> str:
    """Returns the name of a kind of device for a message."""
    # Older files have JAX's kind of a CPU, which is "cpu" for all processors.
    return "a CPU that is not named" if device == ("cpu", "cpu") else str(device)


def _milliseconds(seconds: Mapping[str, float | None], name: str) -> str:
    """A time, or "failed", or nothing if it was not measured."""
    if name not in seconds:
        return ""
    time = seconds[name]
    return "failed" if time is None else f"{1e3 * time:.3f}"


def active() -> Tuning | None:
    """Returns the tuning of the context."""
    return ranking.context.value


class _Entered(threading.local):
    """The contexts that a thread is in, as a `Tuning` may be entered twice and never changes."""

    def __init__(self) -> None:
        self.contexts: list = []


_entered = _Entered()
