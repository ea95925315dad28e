"""Checkpoints of the training state and of the place in the data, by orbax.

Each is written in the background to a folder of another name, which is renamed when it is whole.
"""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from alexnet.errors import RunError, UsageError
from alexnet.training import distributed
from alexnet.training.state import TrainState

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
"""What systems say of a disk that takes no more."""

ERROR = "top1_error"
"""The metric by which a checkpoint is the best."""


class Checkpoints:
    """The checkpoints of a run, one directory for each step.

    Args:
      folder: where they are.
      keep: how many of the newest to keep, besides the one with the least error.
      warn: what to do with a warning, a sentence.
      read_only: whether another process may be saving here meanwhile; nothing is changed then but
        for metrics that cannot be read, which are put aside.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        warn: Callable[[str], None] = print,
        *,
        read_only: bool = False,
    ):
        self._read_only = read_only
        self._folder = folder
        self._warn = warn
        self._whole: int | None = None
        self._saving: int | None = None
        distributed.by_the_first(lambda: _put_aside_damaged_metrics(folder))
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(
                    [
                        preservation_policy.LatestN(keep),
                        preservation_policy.BestN(
                            get_metric_fn=lambda metrics: metrics[ERROR],
                            reverse=True,
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                # Without it the metrics are not written, and a run that goes on forgets the best.
                best_fn=lambda metrics: metrics[ERROR],
                best_mode="min",
                # What a killed process has left.
                cleanup_tmp_directories=not read_only,
            ),
        )

    @property
    def newest(self) -> str:
        """The newest whole checkpoint, for messages."""
        step = self._manager.latest_step() if self._whole is None else self._whole
        return "no checkpoint" if step is None else str(self._folder / str(step))

    def save(self, state: TrainState, position: dict[str, Any], error: float | None = None) -> None:
        """Saves in the background, unless this step was saved before.

        Args:
          state: all of it.
          position: the place in the data, which JSON can hold.
          error: on the test images, if they have been tested after this step.

        Raises:
          RunError: this one, or the one before, cannot be written.
        """
        step = int(state.step)
        with self._writing(step):
            self._manager.wait_until_finished()
            self._finished()
            if step in self._manager.all_steps():
                return
            self._saving = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state._asdict()),
                    position=ocp.args.JsonSave(position),
                ),
                metrics=None if error is None else {ERROR: error},
            )

    def wait(self) -> None:
        """Until what was saved is on disk.

        Raises:
          RunError: it cannot be written.
        """
        with self._writing(self._saving):
            self._manager.wait_until_finished()
            self._finished()

    def restore_newest(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest state that can be read, placed as `like` is, and the place in the data.

        One that cannot be read is passed over with a warning, and put aside.

        Raises:
          UsageError: there is none.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            raise UsageError(f"nothing to resume: no checkpoint in {self._folder}")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        reasons = []
        for step in steps:
            restored, reason = {}, ""
            try:
                restored = _read_alone(self._folder / str(step), abstract)
                jax.block_until_ready(restored["state"])
            except Exception as error:
                # What orbax raises depends on which of its files is damaged.
                reason = _first_line(error) or type(error).__name__
            # All go on from the same step, also if only one of them cannot read another.
            if distributed.any_of(bool(reason)):
                why = reason or "another process cannot"
                reasons.append(f"{self._folder / str(step)}: {why}")
                continue
            for reason in reasons:
                self._warn(
                    f"warning: passed over a checkpoint that cannot be read, {reason}; "
                    f"going on from step {step}"
                )
            self._put_aside([other for other in steps if other > step])
            self._whole = step
            return TrainState(**restored["state"]), restored["position"]
        raise UsageError(f"cannot read the checkpoint {'; nor '.join(reasons)}")

    def close(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
          RunError: it cannot be written.
        """
        with self._writing(self._saving):
            self._manager.close()

    def _put_aside(self, steps: list[int]) -> None:
        """Makes room for new checkpoints of these steps; what was there may yet be of use."""
        if not steps or self._read_only:
            return

        def rename() -> None:
            for step in steps:
                path = self._folder / str(step)
                try:
                    path.rename(path.with_name(f"damaged-{step}"))
                except OSError as error:
                    raise UsageError(f"cannot put {path} aside: {error.strerror}") from error

        distributed.by_the_first(rename)
        self._manager.reload()

    def _finished(self) -> None:
        if self._saving is not None:
            self._whole, self._saving = self._saving, None

    @contextlib.contextmanager
    def _writing(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            if distributed.of_a_lost_process(error):
                raise
            # Orbax and tensorstore have many types of errors for a disk that is full.
            step = step if self._saving is None else self._saving
            self._saving = None
            raise RunError(
                f"cannot write the checkpoint of step {step} to {self._folder}: "
                f"{_reason(error)}; the last whole one is {self.newest}"
            ) from error


def _put_aside_damaged_metrics(folder: Path) -> None:
    """Orbax reads those of all checkpoints at its start, and raises for a single damaged file."""
    for path in folder.glob("[0-9]*/metrics/metrics"):
        try:
            json.loads(path.read_bytes())
        except ValueError:
            path.parent.rename(path.parent.with_name("damaged-metrics"))


def _read_alone(folder: Path, like: Any) -> dict[str, Any]:
    """What this process needs of a checkpoint, read without waiting for the other processes.

    Otherwise one that cannot read its part, and those that can, would wait for different things.
    """
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )
    parts = {
        "state": (
            ocp.StandardCheckpointHandler(multiprocessing_options=alone),
            ocp.args.StandardRestore(like),
        ),
        "position": (
            ocp.JsonCheckpointHandler(multiprocessing_options=alone),
            ocp.args.JsonRestore(),
        ),
    }
    found = {}
    for name, (handler, arguments) in parts.items():
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            found[name] = reader.restore(folder.absolute() / name, args=arguments)
    return found


def _reason(error: BaseException) -> str:
    """What the system has said, of which tensorstore makes a paragraph."""
    for number in CANNOT_WRITE:
        if os.strerror(number) in str(error):
            return os.strerror(number)
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
