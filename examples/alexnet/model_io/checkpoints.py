"""Checkpoints of the training state, kept by orbax's CheckpointManager.

A checkpoint is written in the background to a folder with a temporary name. The folder is renamed
when the checkpoint is whole.
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
from alexnet.training import processes
from alexnet.training.state import TrainState

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
"""Errors of a disk that takes no more."""


def top1_error(metrics: dict[str, float]) -> float:
    """Returns the metric whose least value makes a checkpoint the best."""
    return metrics["top1_error"]


class Checkpoints:
    """The checkpoints of a run, one directory for each step.

    The newest `keep` are kept, and the best. `read_only` is for a folder that another process may
    be saving to.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        warn: Callable[[str], None] = print,
        *,
        read_only: bool = False,
    ):
        self._folder = folder
        self._warn = warn
        self._read_only = read_only
        if processes.is_first():
            _put_aside_damaged_metrics(folder)
        processes.synchronize("checkpoints")
        best = preservation_policy.BestN(
            get_metric_fn=top1_error, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(
                [preservation_policy.LatestN(keep), best]
            ),
            # Without best_fn the metrics are not written, and a resumed run forgets the best.
            best_fn=top1_error,
            best_mode="min",
            create=not read_only,
            cleanup_tmp_directories=not read_only,
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def newest(self) -> str:
        """The newest whole checkpoint, for messages."""
        steps = [int(path.name) for path in self._folder.iterdir() if path.name.isdecimal()]
        return str(self._folder / str(max(steps))) if steps else "no checkpoint"

    def save(self, state: TrainState, error: float | None = None) -> None:
        """Saves in the background, with the top-1 error if the net was tested after this step."""
        step = int(state.step)
        with self._writing():
            self._manager.wait_until_finished()
            if step not in self._manager.all_steps():
                self._manager.save(
                    step,
                    args=ocp.args.Composite(state=ocp.args.StandardSave(state._asdict())),
                    metrics=None if error is None else {"top1_error": error},
                )

    def wait(self) -> None:
        """Waits until checkpoints are on disk. Raises RunError if they cannot be written."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Ends the writing. Raises RunError if a checkpoint cannot be written."""
        with self._writing():
            self._manager.close()

    def restore_newest(self, like: TrainState) -> TrainState:
        """Returns the newest state that can be read, placed as `like` is.

        Checkpoints that cannot be read are passed over with a warning, and put aside.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        damaged: dict[Path, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            path, state, reason = self._folder / str(step), {}, ""
            try:
                state = jax.block_until_ready(_read_alone(path / "state", abstract))
            except Exception as error:
                # The type of orbax's error depends on which of its files is damaged.
                reason = _first_line(error)
            # All processes go on from the same step.
            if processes.any_of(bool(reason)):
                damaged[path] = reason or "another process cannot read it"
                continue
            for other, why in damaged.items():
                self._warn(
                    f"warning: passed over a checkpoint that cannot be read, {other}: {why}; "
                    f"going on from step {step}"
                )
                if processes.is_first() and not self._read_only:
                    other.rename(other.with_name(f"damaged-{other.name}"))
            processes.synchronize("damaged")
            self._manager.reload()
            return TrainState(**state)
        if not damaged:
            raise UsageError(f"nothing to resume: no checkpoint in {self._folder}")
        told = "; nor ".join(f"{path}: {why}" for path, why in damaged.items())
        raise UsageError(f"cannot read the checkpoint {told}")

    def choose(self, name: str) -> int:
        """Returns the step of a checkpoint: "newest", "best" (the least top-1 error), or a step."""
        steps = sorted(self._manager.all_steps())
        known = ", ".join(map(str, steps))
        if not steps:
            raise UsageError(f"no checkpoint in {self._folder}")
        if name == "newest":
            return steps[-1]
        if name == "best":
            if (best := self._manager.best_step()) is None:
                raise UsageError(f"--checkpoint best: none of {known} was tested")
            return best
        if not name.isdecimal() or int(name) not in steps:
            raise UsageError(f'--checkpoint must be newest, best or one of {known}, got "{name}"')
        return int(name)

    def read_part(self, step: int, name: str, like: Any) -> Any:
        """Returns one part of a state, such as "params", shaped and placed as `like`."""
        path, wanted = self._folder / str(step), {name: like}
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        arguments = ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
        try:
            with ocp.PyTreeCheckpointer() as reader:
                restored = reader.restore((path / "state").absolute(), args=arguments)
            return jax.block_until_ready(restored[name])
        except Exception as error:
            raise UsageError(f"cannot read the checkpoint {path}: {_first_line(error)}") from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            if processes.is_from_a_lost_process(error):
                raise
            # orbax and tensorstore have many types of errors for a disk that is full.
            texts = [os.strerror(number) for number in CANNOT_WRITE]
            reason = next((text for text in texts if text in str(error)), _first_line(error))
            raise RunError(
                f"cannot write a checkpoint to {self._folder}: {reason}; "
                f"the last whole one is {self.newest}"
            ) from error


def _put_aside_damaged_metrics(folder: Path) -> None:
    """Renames damaged metrics: orbax reads those of all checkpoints at its start."""
    for path in folder.glob("[0-9]*/metrics/metrics"):
        try:
            json.loads(path.read_bytes())
        except ValueError:
            path.parent.rename(path.parent.with_name("damaged-metrics"))


def _read_alone(folder: Path, like: Any) -> dict[str, Any]:
    """Reads this process's part of a state without waiting for the other processes.

    If one process could not read its part, orbax's barriers would wait for it in the others.
    """
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        return reader.restore(folder.absolute(), args=ocp.args.StandardRestore(like))


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
