"""Checkpoints of the training state, by orbax."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from alexnet.errors import UsageError
from alexnet.training import TrainState


class Checkpoints:
    """The newest checkpoints of a run, one directory for each step."""

    def __init__(self, folder: Path, keep: int = 2):
        self._folder = folder
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep)
        )

    def save(self, state: TrainState) -> None:
        """Saves in the background."""
        self._manager.save(int(state.step), args=ocp.args.StandardSave(state._asdict()))

    def wait(self) -> None:
        """Until what was saved is on disk."""
        self._manager.wait_until_finished()

    def restore_newest(self, like: TrainState) -> TrainState:
        """The newest state, placed as `like` is.

        Raises:
          UsageError: there is none, or it cannot be read.
        """
        step = self._manager.latest_step()
        if step is None:
            raise UsageError(f"nothing to resume: no checkpoint in {self._folder}")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        try:
            return TrainState(
                **self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
            )
        except Exception as error:
            # What orbax raises depends on which of its files is damaged.
            reason = str(error).partition("\n")[0]
            raise UsageError(
                f"cannot read the checkpoint {self._folder / str(step)}: {reason}"
            ) from error

    def close(self) -> None:
        """Waits until what was saved is on disk."""
        self._manager.close()
