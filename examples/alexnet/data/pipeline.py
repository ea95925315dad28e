"""The batches of training and of evaluation, made ahead of time by threads or worker processes.

What is in a batch follows from its number, the seed and the source alone: not from the number of
workers, nor from how many processes share the batch, nor from where a run was gone on with.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import grain
import numpy as np
from absl import flags

from alexnet.data.sources import DamagedImage, Source
from alexnet.errors import RunError, UsageError

TRIES = 10
"""Images that are tried for a row of a training batch, one after the other."""

THREADS = 8
"""At most, where there are no worker processes. Each of them makes a batch."""

AHEAD = 2
"""Batches that wait for the training, of each worker."""

SHARED_MEMORY = Path("/dev/shm")
SHARED_FROM = 2**16
"""Bytes of an array from which on shared memory is quicker than a pipe."""


class Batch(NamedTuple):
    """Some rows of a batch."""

    images: np.ndarray
    """(n, size, size, channels), uint8."""
    labels: np.ndarray
    """(n,), int32; -1 where there is no example."""
    damaged: np.ndarray
    """(n,), int64: the number of an example that was found damaged in making the row, or -1."""


class Batches(Iterator[Batch]):
    """Batches in their order. `close`, the end of a `with` block or the last one ends the workers.

    Args:
      iterator: what makes them.
    """

    def __init__(self, iterator: grain.DatasetIterator[Batch]):
        self._iterator: grain.DatasetIterator[Batch] | None = iterator
        self._starting = True

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise StopIteration
        try:
            with _deaf_children() if self._starting else contextlib.nullcontext():
                batch = next(self._iterator)
            self._starting = False
        except RuntimeError as error:
            self.close()
            reason = str(error).partition("\n")[0]
            raise RunError(f"a worker that reads images has ended: {reason}") from error
        except BaseException:
            self.close()
            raise
        # A worker's arrays are in shared memory, which is not left to whoever keeps a batch, JAX
        # for one: it would be in use, and could not be given back, when the interpreter ends.
        return Batch(*(np.array(array) for array in batch))

    def close(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class _TrainingBatch:
    """Makes the batch of a step."""

    source: Source
    batch_size: int
    rows: tuple[int, ...]
    seed: int

    def __call__(self, step: int) -> Batch:
        epoch, step_of_epoch = divmod(int(step), len(self.source) // self.batch_size)
        order_seed = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0])
        batch = _empty(self.source, len(self.rows))
        for i, row in enumerate(self.rows):
            # One place of the permutation, without the others: it may be one of millions.
            number = grain.experimental.index_shuffle(
                step_of_epoch * self.batch_size + row, len(self.source) - 1, order_seed, 4
            )
            batch.images[i], batch.labels[i], batch.damaged[i] = self._example(number)
        return batch

    def _example(self, number: int) -> tuple[np.ndarray, int, int]:
        """The example, or else the next one that is sound; and the number of the damaged one."""
        tries = min(TRIES, len(self.source))
        for i in range(tries):
            try:
                image, label = self.source[(number + i) % len(self.source)]
            except DamagedImage:
                continue
            return image, label, number if i else -1
        raise UsageError(
            f"all of {tries} images in a row are damaged, the first is {self.source.name(number)}"
        )


@dataclasses.dataclass(frozen=True)
class _EvaluationBatch:
    """Makes the batch of a number."""

    source: Source
    batch_size: int
    rows: tuple[int, ...]

    def __call__(self, step: int) -> Batch:
        batch = _empty(self.source, len(self.rows))
        for i, row in enumerate(self.rows):
            number = int(step) * self.batch_size + row
            if number < len(self.source):
                try:
                    batch.images[i], batch.labels[i] = self.source[number]
                except DamagedImage:
                    batch.damaged[i] = number
        return batch


def training_batches(
    source: Source,
    *,
    batch_size: int,
    rows: Sequence[int],
    seed: int,
    first_step: int,
    workers: int,
) -> Batches:
    """The batches of the steps from `first_step` on, without an end.

    An epoch is `len(source) // batch_size` steps. Each has an order of its own, given by the seed
    and its number, and leaves out the rest that fills no batch. For an example that is damaged the
    next one is taken, so that batches are whole.

    Args:
      source: the examples.
      batch_size: of the batch that all processes share.
      rows: which rows of it are made here, from 0 on.
      seed: of the order.
      first_step: the step of the first batch; to go on with a run, those that it has done.
      workers: processes that make batches. With 0 it is threads of this process.

    Raises:
      UsageError: there are not enough examples for a batch; or, from the iterator, so many are
        damaged that a batch cannot be filled.
    """
    _check_rows(rows, batch_size)
    if batch_size > len(source):
        raise UsageError(
            f"a batch of {batch_size} is more than the {len(source)} training images; take a "
            "smaller --batch-size"
        )
    make = _TrainingBatch(source, batch_size, tuple(rows), seed)
    return _batches(make, range(first_step, sys.maxsize), workers)


def evaluation_batches(
    source: Source, *, batch_size: int, rows: Sequence[int], workers: int
) -> Batches:
    """Every example once, in order; rows that have none have label -1.

    These are those after the last example, in the last batch, and those of damaged examples.

    Args:
      source: the examples.
      batch_size: of the batch that all processes share.
      rows: which rows of it are made here, from 0 on.
      workers: processes that make batches. With 0 it is threads of this process.
    """
    _check_rows(rows, batch_size)
    make = _EvaluationBatch(source, batch_size, tuple(rows))
    return _batches(make, range(-(-len(source) // batch_size)), workers)


class Damage:
    """Counts the damaged images of a run, each once, and says which they are.

    Args:
      limit: how many there may be.
      warn: gets a line of text for each.

    Attributes:
      names: of the damaged images, in the order in which they were found.
    """

    def __init__(self, limit: int, warn: Callable[[str], None]):
        self.names: list[str] = []
        self._limit = limit
        self._warn = warn

    def add(self, source: Source, damaged: np.ndarray) -> None:
        """Takes note of `Batch.damaged`.

        Raises:
          UsageError: there are more than the limit.
        """
        for number in np.unique(damaged[damaged >= 0]).tolist():
            name = source.name(number)
            if name in self.names:
                continue
            self.names.append(name)
            self._warn(f"skipped the damaged image {name}: {_reason(source, number)}")
            if len(self.names) > self._limit:
                raise UsageError(
                    f"{len(self.names)} images are damaged, of {self._limit} that may be; "
                    f"the last one is {name}"
                )


def _reason(source: Source, number: int) -> str:
    try:
        source[number]
    except DamagedImage as error:
        return str(error)
    return "it could not be read at first"


def _empty(source: Source, count: int) -> Batch:
    return Batch(
        np.zeros((count, *source.shape), np.uint8),
        np.full(count, -1, np.int32),
        np.full(count, -1, np.int64),
    )


def _check_rows(rows: Sequence[int], batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not all(0 <= row < batch_size for row in rows):
        raise ValueError(f"rows must be from 0 to {batch_size - 1}, got {list(rows)}")


def _batches(make: _TrainingBatch | _EvaluationBatch, numbers: range, workers: int) -> Batches:
    dataset = grain.MapDataset.range(numbers.start, numbers.stop).map(make)
    if make.source.in_memory or workers == 0:
        threads = 1 if make.source.in_memory else min(THREADS, os.cpu_count() or 1)
        options = grain.ReadOptions(threads, prefetch_buffer_size=max(threads, AHEAD))
        return Batches(iter(dataset.to_iter_dataset(options)))
    batch_bytes = len(make.rows) * int(np.prod(make.source.shape))
    shared = _has_shared_memory(workers * (AHEAD + 2) * batch_bytes)
    with_options = grain.experimental.WithOptionsIterDataset(
        dataset.to_iter_dataset(grain.ReadOptions(1, prefetch_buffer_size=1)),
        grain.experimental.DatasetOptions(min_shm_size=SHARED_FROM if shared else sys.maxsize),
    )
    # Grain asks for flags, which the command line of another kind has not parsed.
    flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=AHEAD)
    return Batches(iter(with_options.mp_prefetch(options, _begin_worker)))


def _has_shared_memory(wanted: int) -> bool:
    """Whether so many bytes are free: containers often have 64 MB, and die of more."""
    return not SHARED_MEMORY.exists() or shutil.disk_usage(SHARED_MEMORY).free > wanted


@contextlib.contextmanager
def _deaf_children() -> Iterator[None]:
    """Threads and processes that are started here get no Ctrl-C and no SIGTERM.

    Both may be sent to all processes, of which the main one is to decide. A worker that ends while
    it starts would have grain wait for it forever.
    """
    # Or it is started later, and lets the signal through to what comes after it.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(index: int, count: int) -> None:
    """Prepares a worker process: it ends when its parent has, and computes nothing by JAX."""
    del index, count
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        # A worker has no use for JAX. It must not take an accelerator if something asks for one.
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
