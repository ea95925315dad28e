"""Says whether images or devices limit a run: each is measured alone, then both together."""

import time
from collections.abc import Callable

import jax

from alexnet.data.pipeline import AHEAD, THREADS
from alexnet.training import processes
from alexnet.training.loop import batches_of
from alexnet.training.run import Run

SECONDS = 10.0
"""Approximate length of each of the three measurements."""

FEWEST = 3
"""Least number of steps of a measurement."""


def profile_input(run: Run) -> str:
    """Returns a report of images per second read, trained on, and of a whole run.

    The state is trained on and not saved.
    """

    def train(batch: tuple[jax.Array, jax.Array]) -> None:
        run.state, _ = run.trainer.step(run.state, *batch)
        jax.block_until_ready(run.state)

    with batches_of(run) as batches:
        first = next(batches)
        train(first)
        device = _rate(run, lambda: train(first))
        # Batches that were made meanwhile are used up before the speed is measured.
        for _ in range(AHEAD * max(THREADS, run.config.work.workers)):
            next(batches)
        read = _rate(run, lambda: next(batches))
        both = _rate(run, lambda: train(next(batches)))
    limit = (
        "reading the images: more --workers, or pack_records.py" if read < device else "training"
    )
    return (
        f"Images per second, in batches of {run.batch_size}, with {run.config.work.workers} "
        f"workers:\n  read and decoded {read:10.1f}\n  trained on       {device:10.1f}\n"
        f"  both at once     {both:10.1f}\nThe limit is {limit}."
    )


def _rate(run: Run, step: Callable[[], object]) -> float:
    """Returns images per second over about `SECONDS`; all processes make the same steps."""
    began, count, passed = time.perf_counter(), 0, 0.0
    while count < FEWEST or passed < SECONDS:
        step()
        count += 1
        passed = processes.agreed(round(time.perf_counter() - began))
    return run.batch_size * count / (time.perf_counter() - began)
