"""A result: one row for each workload and mode, and the file that keeps them."""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import Contender
from benchmarks.machine import Roofline
from benchmarks.workloads import Mode, Workload

WRONG = "wrong"
"""How the reason begins why a contender was left out that computes something else."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """One contender in one row; seconds of a call, or the mean of those in flight together.

    Attributes:
      median, minimum, quartiles: of the timed calls.
      calls: how many there were.
      compile_seconds, temporary_bytes, implementations: see `Contender`.
      error: the largest difference from lax's result, in shares of its root mean square.
    """

    median: float
    minimum: float
    quartiles: tuple[float, float]
    calls: int
    error: float
    compile_seconds: float | None
    temporary_bytes: int | None
    implementations: dict[str, str]

    @classmethod
    def of(cls, seconds: Sequence[float], contender: Contender, error: float) -> "Timing":
        low, median, high = (float(q) for q in np.percentile(seconds, (25, 50, 75)))
        return cls(
            median=median,
            minimum=min(seconds),
            quartiles=(low, high),
            calls=len(seconds),
            error=error,
            compile_seconds=contender.compile_seconds,
            temporary_bytes=contender.temporary_bytes,
            implementations=dict(contender.implementations),
        )

    @property
    def spread(self) -> float:
        """The distance of the quartiles, in shares of the median."""
        return (self.quartiles[1] - self.quartiles[0]) / self.median


@dataclasses.dataclass(frozen=True)
class Row:
    """One mode of one workload.

    Attributes:
      flops: see `Workload.flops`.
      array_bytes: of operands and results, each once; what a call needs of memory is these and
        the `temporary_bytes` of the contender.
      roofline_seconds: the least time that the machine could take.
      roofline_fraction: of that, and what the library takes; None if it was not timed.
      timings: of "ours", "lax", "torch channels_last", "torch contiguous" and of "ours:NAME" for
        implementations by name.
      left_out: who was not timed, and why.
    """

    workload: Workload
    mode: Mode
    flops: int
    array_bytes: int
    roofline_seconds: float
    roofline_fraction: float | None
    timings: dict[str, Timing]
    left_out: dict[str, str]

    def timing(self, peer: str) -> Timing | None:
        """Of a contender; "torch" is the faster one of its memory formats."""
        name = self.torch if peer == "torch" else peer
        return self.timings.get(name) if name else None

    @property
    def torch(self) -> str | None:
        """The faster memory format's name."""
        formats = [name for name in self.timings if name.startswith("torch ")]
        return min(formats, key=lambda name: self.timings[name].median, default=None)

    def ratio(self, peer: str) -> float | None:
        """How many times as long a peer takes."""
        ours, other = self.timing("ours"), self.timing(peer)
        return other.median / ours.median if ours and other else None


@dataclasses.dataclass(frozen=True)
class Ratios:
    """What several workloads say together about a peer."""

    geometric_mean: float
    smallest: float
    workload: str
    """Where it is the smallest."""


@dataclasses.dataclass(frozen=True)
class Run:
    """All of a run: where, how, and the rows."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    roofline: Roofline
    rows: list[Row]

    @property
    def modes(self) -> list[Mode]:
        return list(dict.fromkeys(row.mode for row in self.rows))

    def of_mode(self, mode: Mode) -> list[Row]:
        return [row for row in self.rows if row.mode == mode]

    def ratios(self, mode: Mode, peer: str) -> Ratios | None:
        """Of all workloads that both were timed on."""
        found = [(ratio, row) for row in self.of_mode(mode) if (ratio := row.ratio(peer))]
        if not found:
            return None
        smallest, row = min(found, key=lambda pair: pair[0])
        mean = statistics.geometric_mean(ratio for ratio, _ in found)
        return Ratios(mean, smallest, row.workload.name)

    def save(self, path: Path) -> None:
        """Writes the file, with a line for each row; a file of before is there until this is."""
        parts = {
            "environment": json.dumps(self.environment),
            "settings": json.dumps(self.settings),
            "roofline": json.dumps(self.roofline._asdict()),
            "rows": "[\n"
            + ",\n".join(json.dumps(dataclasses.asdict(row)) for row in self.rows)
            + "\n]",
        }
        lines = ",\n".join(f'"{name}": {part}' for name, part in parts.items())
        unfinished = path.with_name(f"{path.name}.unfinished")
        unfinished.write_text(f"{{\n{lines}\n}}\n")
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Run":
        """What `save` has written.

        Raises:
          ValueError: it is something else.
        """
        try:
            saved = json.loads(path.read_text(), object_hook=_tuples)
            return cls(
                environment=saved["environment"],
                settings=saved["settings"],
                roofline=Roofline(**saved["roofline"]),
                rows=[_row(row) for row in saved["rows"]],
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not a result of this benchmark") from error


def _row(saved: Mapping[str, Any]) -> Row:
    timings = {name: Timing(**timing) for name, timing in saved["timings"].items()}
    return Row(**{**saved, "workload": Workload(**saved["workload"]), "timings": timings})


def _tuples(saved: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where the dataclasses have tuples."""

    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    return {name: frozen(value) for name, value in saved.items()}
