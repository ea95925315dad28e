"""Whether the images or the devices are the limit: each is measured alone, then both together."""

import time
from collections.abc import Callable

import jax

from alexnet.data.pipeline import AHEAD, THREADS, training_batches
from alexnet.training import distributed
from alexnet.training.loop import on_devices
from alexnet.training.run import Run

SECONDS = 10.0
"""How long each of the three is measured, about."""

FEWEST = 3


def profile_input(run: Run) -> str:
    """Images per second that are read, that are trained on, and of a whole run; and what they say.

    The state is trained on and not saved.
    """
    with training_batches(
        run.dataset.train,
        batch_size=run.batch_size,
        rows=run.trainer.rows(run.batch_size),
        seed=run.config.seed,
        first_step=int(run.state.step),
        workers=run.config.work.workers,
    ) as batches:
        first = run.trainer.put(next(batches), run.batch_size)

        def train(images: jax.Array, labels: jax.Array) -> None:
            run.state, _ = run.trainer.step(run.state, images, labels)
            jax.block_until_ready(run.state)

        train(*first)
        device = _rate(run, lambda: train(*first))
        # What was made meanwhile is used up before the speed is measured.
        for _ in range(AHEAD * max(THREADS, run.config.work.workers)):
            next(batches)
        read = _rate(run, lambda: next(batches))
        ahead = on_devices(run, batches)
        both = _rate(run, lambda: train(*next(ahead)))
    limit = (
        "reading the images: more --workers, or pack_records.py" if read < device else "training"
    )
    return (
        f"Images per second, in batches of {run.batch_size}, with {run.config.work.workers} "
        f"workers:\n  read and decoded {read:10.1f}\n  trained on       {device:10.1f}\n"
        f"  both at once     {both:10.1f}\nThe limit is {limit}."
    )


def _rate(run: Run, step: Callable[[], object]) -> float:
    """Images per second of a step, over about `SECONDS`; the same number of steps everywhere."""
    began, count, passed = time.perf_counter(), 0, 0.0
    while count < FEWEST or passed < SECONDS:
        step()
        count += 1
        passed = time.perf_counter() - began
        if jax.process_count() > 1:
            passed = distributed.agreed(round(passed))
    return run.batch_size * count / (time.perf_counter() - began)
