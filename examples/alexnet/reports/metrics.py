"""The numbers of a run by step, in `metrics.jsonl` and for TensorBoard.

`curves` draws the numbers of a line of training, {"kind": "train", "step": 12, "loss": ...,
"top1_error": ..., "learning_rate": ...}, and of an evaluation, {"kind": "eval", "step": 12,
"loss": ..., "top1_error": ..., "top5_error": ...}. Errors are shares, from 0 to 1. Other numbers
stand beside them.
"""

import json
import math
import os
from collections.abc import Iterator
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, SupportsFloat

from tensorboardX import SummaryWriter

Kind = Literal["train", "eval"]

FILE, TENSORBOARD = "metrics.jsonl", "tensorboard"
"""Names in the folder of the run."""


class MetricsLog:
    """Writes the numbers of a run as they come. Only the first of several processes has one.

    Args:
      folder: the folder of the run, which exists.
      tensorboard: whether to write event files too, in the folder "tensorboard" there.
      resumed_at: the step from which a run goes on, or None for a new run. Lines after that step
        are dropped, and with them a line that the run was killed in; TensorBoard drops its own.

    Raises:
      OSError: the folder cannot be written to, or a new run finds the numbers of another one.
    """

    def __init__(self, folder: Path, *, tensorboard: bool, resumed_at: int | None):
        path = folder / FILE
        if resumed_at is not None and path.exists():
            _forget_after(path, resumed_at)
        self._file = path.open("x" if resumed_at is None else "a", encoding="utf-8")
        self._events: Any = None
        if tensorboard:
            self._events = SummaryWriter(
                str(folder / TENSORBOARD),
                purge_step=None if resumed_at is None else resumed_at + 1,
                flush_secs=10,
                # On a full disk the thread that empties the queue dies. With a limit, the run would
                # wait for it for ever.
                max_queue=0,
                # The name has the second in it, in which a run may be stopped and resumed.
                filename_suffix=f".{os.getpid()}.{resumed_at or 0}",
            )

    def write(self, kind: Kind, step: int, **numbers: SupportsFloat) -> None:
        """Appends one line, which is on its way to the disk when this returns."""
        line = {"kind": kind, "step": int(step)}
        line |= {name: _plain(number) for name, number in numbers.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._events:
            for name, number in numbers.items():
                self._events.add_scalar(f"{kind}/{name}", float(number), int(step))

    def close(self) -> None:
        """Waits until all of it is written."""
        self._file.close()
        if self._events:
            self._events.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run in their order, without one that is cut short.

    A number that was infinite or not a number is read as NaN.
    """
    path = folder / FILE
    return [
        {name: math.nan if value is None else value for name, value in line.items()}
        for line in (_lines(path) if path.exists() else ())
    ]


def _plain(number: Any) -> float | None:
    """Returns a number for JSON, which has none that is infinite or not a number."""
    if isinstance(number, Integral):
        return int(number)
    return float(number) if math.isfinite(number) else None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines that can be read. A kill may leave a line that is not even UTF-8."""
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line:
            yield line


def _forget_after(path: Path, step: int) -> None:
    """Drops later lines. A second kill meanwhile leaves the file as it was."""
    kept = [json.dumps(line) + "\n" for line in _lines(path) if line["step"] <= step]
    new = path.with_name(path.name + ".new")
    new.write_text("".join(kept), encoding="utf-8")
    new.replace(path)
