"""The batches of training and of evaluation. grain makes them ahead, in threads or processes.

The content of a batch follows from its number, the seed and the source alone. It depends neither on
the number of workers, nor on how many processes share the batch, nor on where a run was resumed.
"""

import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from alexnet.data.sources import DamagedImage, Source
from alexnet.errors import RunError, UsageError

TRIES = 10
"""Images that are tried for a row of a training batch, one after the other."""

THREADS = 8
"""Most threads that make batches where there are no worker processes."""

AHEAD = 2
"""Batches that each worker makes ahead of the training."""


class Batch(NamedTuple):
    """Some rows of a batch."""

    images: np.ndarray
    """(n, size, size, channels), uint8."""
    labels: np.ndarray
    """(n,), int32; -1 where there is no example."""
    damaged: np.ndarray
    """(n,), int64: the number of an example that was found damaged in making the row, or -1."""


@dataclasses.dataclass(frozen=True)
class _MakeBatch:
    """Makes the rows of a batch: in the order of a seed, or without one in the source's order."""

    source: Source
    batch_size: int
    rows: Sequence[int]
    seed: int | None

    def __call__(self, step: int) -> Batch:
        batch = Batch(
            np.zeros((len(self.rows), *self.source.shape), np.uint8),
            np.full(len(self.rows), -1, np.int32),
            np.full(len(self.rows), -1, np.int64),
        )
        for i, row in enumerate(self.rows):
            number = self._number(int(step), row)
            # In training the next sound image is taken in place of a damaged one.
            tries = 1 if self.seed is None else min(TRIES, len(self.source))
            for other in range(number, number + tries) if number < len(self.source) else ():
                try:
                    batch.images[i], batch.labels[i] = self.source[other % len(self.source)]
                    break
                except DamagedImage:
                    batch.damaged[i] = number
            if batch.labels[i] < 0 and self.seed is not None:
                name = self.source.name(number)
                raise UsageError(f"all of {tries} images in a row are damaged, the first is {name}")
        return batch

    def _number(self, step: int, row: int) -> int:
        """Returns the number of the example in a row."""
        if self.seed is None:
            return step * self.batch_size + row
        epoch, step = divmod(step, len(self.source) // self.batch_size)
        order_seed = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0])
        # This computes one place of the permutation, whose length may be millions.
        return grain.experimental.index_shuffle(
            step * self.batch_size + row, len(self.source) - 1, order_seed, 4
        )


def training_batches(
    source: Source,
    *,
    batch_size: int,
    rows: Sequence[int],
    seed: int,
    first_step: int,
    workers: int,
) -> AbstractContextManager[Iterator[Batch]]:
    """Gives the batches of the steps from `first_step` on, without an end, in a `with` block.

    An epoch is `len(source) // batch_size` steps. Each has its own order, given by the seed and its
    number, and leaves out the rest that fills no batch. This process makes some rows of the batches
    that all processes share, by worker processes or, with 0 workers, by threads.
    """
    make = _MakeBatch(source, batch_size, rows, seed)
    return _batches(make, range(first_step, sys.maxsize), workers)


def evaluation_batches(
    source: Source, *, batch_size: int, rows: Sequence[int], workers: int
) -> AbstractContextManager[Iterator[Batch]]:
    """Gives every example once, in order, in a `with` block.

    Rows without an example have label -1: those after the last example, and those of damaged
    examples. The arguments are those of `training_batches`.
    """
    make = _MakeBatch(source, batch_size, rows, seed=None)
    return _batches(make, range(-(-len(source) // batch_size)), workers)


@contextmanager
def _batches(make: _MakeBatch, numbers: range, workers: int) -> Iterator[Iterator[Batch]]:
    """Makes the batches of these numbers ahead of their use. The workers end with the block."""
    dataset = grain.MapDataset.range(numbers.start, numbers.stop).map(make)
    if make.source.in_memory or workers == 0:
        threads = 1 if make.source.in_memory else min(THREADS, os.cpu_count() or 1)
        options = grain.ReadOptions(threads, prefetch_buffer_size=max(threads, AHEAD))
        iterator = iter(dataset.to_iter_dataset(options))
    else:
        one_by_one = dataset.to_iter_dataset(grain.ReadOptions(1, prefetch_buffer_size=1))
        # grain asks for absl's flags, which nobody has parsed here.
        flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=AHEAD)
        iterator = iter(one_by_one.mp_prefetch(options, _begin_worker))
    try:
        # The copies give the workers' shared memory back while JAX may keep a batch.
        yield (Batch(*map(np.array, batch)) for batch in iterator)
    except RuntimeError as error:
        if "Worker process was terminated" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        raise RunError(f"a worker that reads images has ended: {reason}") from error
    finally:
        iterator.close()


def _begin_worker(index: int, count: int) -> None:
    """Prepares a worker process: it ends with its parent, and takes no signals and no devices."""
    del index, count
    # A terminal or a cluster sends signals to all processes. The main process decides.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


class Damage:
    """Counts the damaged images of a run, each once, and names them in a line for `warn`."""

    def __init__(self, limit: int, warn: Callable[[str], None]):
        self.names: list[str] = []
        self._limit = limit
        self._warn = warn

    def add(self, source: Source, damaged: np.ndarray) -> None:
        """Counts `Batch.damaged`. Raises UsageError if there are more than the limit."""
        for number in np.unique(damaged[damaged >= 0]).tolist():
            if (name := source.name(number)) in self.names:
                continue
            self.names.append(name)
            try:
                source[number]
                reason = "it could not be read at first"
            except DamagedImage as error:
                reason = str(error)
            self._warn(f"skipped the damaged image {name}: {reason}")
            if len(self.names) > self._limit:
                raise UsageError(
                    f"{len(self.names)} images are damaged, of {self._limit} that may be; "
                    f"the last one is {name}"
                )
