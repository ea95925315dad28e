"""The file of a tuning: what is in it, that it is not trusted, and that nobody's work is lost.

It is JSON: `{"format": ..., "version": 1, "measurements": [...]}`, each measurement with what it
was made of, on and with, and seconds by implementation. A file may be shared by kinds of devices
and by versions; each reader takes what is its own.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import jax
from jaxlib import version as jaxlib

from grouped_conv_jax.algorithms.devices import Device
from grouped_conv_jax.algorithms.ranking import Subject
from grouped_conv_jax.algorithms.table import find
from grouped_conv_jax.spec import Contraction
from grouped_conv_jax.tuning.measurement import Measurement
from grouped_conv_jax.version import __version__

FORMAT, VERSION = "grouped_conv_jax tuning", 1

VERSIONS = {"grouped_conv_jax": __version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__}
"""The times are those of the code: of this library, and of XLA."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A measurement in a file, and the versions that it was made with."""

    measurement: Measurement
    versions: tuple[tuple[str, str], ...]


def save(path: str | os.PathLike[str], measurements: Iterable[Measurement]) -> None:
    """See `Tuning.save`."""
    path = Path(path).resolve()  # A link stays one.
    versions = tuple(VERSIONS.items())
    with _locked(path):
        stored = [s for s in _existing(path) if s is not None]
        merged: dict[Any, Stored] = {}
        for new in [*stored, *(Stored(m, versions) for m in measurements)]:
            key = new.measurement.subject, new.versions
            old = merged.get(key)
            if old is not None and _invalid(old) is None:
                both = old.measurement.updated(new.measurement)
                new = dataclasses.replace(new, measurement=both)
            merged[key] = new
        content = {
            "format": FORMAT,
            "version": VERSION,
            "measurements": [_to_json(s) for s in merged.values()],
        }
        # Whoever reads meanwhile has the old file, and one that is cut short is never there.
        new_path = path.with_name(f"{path.name}.new")
        new_path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")
        if path.exists():
            shutil.copymode(path, new_path)
        new_path.replace(path)


def _existing(path: Path) -> list[Stored | None]:
    if not path.exists():
        return []
    try:
        return _read(path)
    except ValueError as error:
        raise ValueError(f"{path} is {error}; save to another file, or delete it") from None


def load(path: str | os.PathLike[str]) -> tuple[list[Measurement], list[str]]:
    """The measurements that are valid with these versions, and why others are not.

    Raises:
      FileNotFoundError: there is no file.
    """
    try:
        stored = _read(Path(path))
    except ValueError as error:
        return [], [str(error)]
    valid = [s.measurement for s in stored if s is not None and _invalid(s) is None]
    # What has been measured again with these versions is not missed.
    known = {measurement.subject for measurement in valid}
    others = [s for s in stored if s is None or s.measurement.subject not in known]
    reasons = Counter("malformed" if s is None else _invalid(s) for s in others)
    return valid, [f"{count} {reason}" for reason, count in reasons.items()]


def _invalid(entry: Stored) -> str | None:
    """Why a measurement is not to be used here; None if it is."""
    if dict(entry.versions) != VERSIONS:
        return "made with " + ", ".join(f"{name} {version}" for name, version in entry.versions)
    if unknown := [name for name, _ in entry.measurement.seconds if find(name) is None]:
        return f"with unknown implementations ({', '.join(unknown)})"
    return None


# From and to JSON.


def _read(path: Path) -> list[Stored | None]:
    """The measurements, None for what is none.

    Raises:
      ValueError: the file is not a tuning, or not in this version of the format.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    except IsADirectoryError:
        raise ValueError("a directory") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError("not a tuning")
    if content.get("version") != VERSION:
        raise ValueError(f"of version {content.get('version')} of the format, not {VERSION}")
    if set(content) != {"format", "version", "measurements"}:
        raise ValueError("not a tuning")
    measurements = content["measurements"]
    if not isinstance(measurements, list):
        raise ValueError("not a tuning")
    return [_from_json(entry) for entry in measurements]


def _to_json(stored: Stored) -> dict[str, Any]:
    subject = stored.measurement.subject
    return {
        "platform": subject.device.platform,
        "device_kind": subject.device.kind,
        "contraction": subject.contraction,
        "spec": subject.spec,
        **dict(stored.versions),
        "seconds": dict(stored.measurement.seconds),
    }


def _from_json(entry: Any) -> Stored | None:
    texts = ("platform", "device_kind", "contraction", "spec", *VERSIONS)
    if not isinstance(entry, dict) or set(entry) != {*texts, "seconds"}:
        return None
    seconds = entry["seconds"]
    if (
        not all(isinstance(entry[name], str) for name in texts)
        or entry["contraction"] not in get_args(Contraction)
        or not isinstance(seconds, dict)
        or not seconds
        or not all(time is None or _is_time(time) for time in seconds.values())
    ):
        return None
    device = Device(entry["platform"], entry["device_kind"])
    subject = Subject(device, entry["contraction"], entry["spec"])
    versions = tuple((name, entry[name]) for name in VERSIONS)
    return Stored(Measurement.of(subject, seconds), versions)


def _is_time(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process or thread at a time; the system ends the lock of one that dies."""
    with path.with_name(f"{path.name}.lock").open("a+b") as file:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
