"""The loop over the steps: it trains, tests, logs, saves, and stops when it is asked to."""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alexnet.data.pipeline import Batch, evaluation_batches, training_batches
from alexnet.data.sources import Source
from alexnet.errors import RunError
from alexnet.reports.curves import save_curves
from alexnet.reports.filters import colour_saturation, save_filters
from alexnet.reports.metrics import MetricsLog, read_metrics
from alexnet.reports.speed import Throughput, peak_flops, training_multiply_adds
from alexnet.training import processes
from alexnet.training.run import Run
from alexnet.training.state import Evaluation, Metrics


class Loop:
    """Trains a run to its last step, or until `asked_to_stop` says so after a step.

    `tested` is the last evaluation, if there was one.
    """

    def __init__(self, run: Run, console: Console, asked_to_stop: Callable[[int], bool]):
        self._run = run
        self._asked_to_stop = asked_to_stop
        self._console = console
        self._log: MetricsLog | None = None
        mesh = run.trainer.net.mesh
        self._speed = Throughput(
            devices=mesh.size,
            multiply_adds=training_multiply_adds(run.net),
            peak=peak_flops(list(mesh.devices.flat), jnp.dtype(run.config.recipe.dtype)),
        )
        # A step begins before the numbers of the step before it are there.
        self._begun: deque[tuple[int, Metrics]] = deque()
        self._plateau_scale = float(run.state.plateau.scale)
        self.tested: Evaluation | None = None

    def train(self) -> bool:
        """Returns whether the run is done. If not, it was asked to stop, and its state is saved."""
        run, config = self._run, self._run.config
        first = int(run.state.step)
        if first >= run.steps:
            length = "epochs" if config.steps is None else "steps"
            self._console.print(
                f"All {first} steps were done before. A larger --{length} extends the run."
            )
            self._draw()
            return True
        if jax.process_count() > 1:
            # A collective does not wait for long for a process that is still compiling.
            for test in (False, True):
                run.trainer.lower(run.batch_size, run.image_shape, test=test).compile()
            processes.synchronize("compiled")
        with contextlib.ExitStack() as stack:
            if processes.is_first():
                resumed_at = first if config.resume else None
                tensorboard = config.work.tensorboard
                self._log = MetricsLog(run.folder, tensorboard=tensorboard, resumed_at=resumed_at)
                stack.callback(self._log.close)
            batches = stack.enter_context(batches_of(run))
            self._show = stack.enter_context(self._progress(first))
            profile = stack.enter_context(contextlib.ExitStack())
            begin, end = config.work.profile_steps or (0, 0)
            for step in range(first + 1, run.steps + 1):
                if step == max(begin, first + 1) and step <= end:
                    profile.enter_context(jax.profiler.trace(run.folder / "profile"))
                run.state, metrics = run.trainer.step(run.state, *next(batches))
                self._begun.append((step, metrics))
                self._wait(but=1)
                if step == end:
                    jax.block_until_ready(run.state)
                    profile.close()
                if step % run.steps_per_epoch == 0 or step == run.steps:
                    self._end_epoch(step)
                elif (every := config.work.checkpoint_every) and step % every == 0:
                    self._save(step)
                if self._asked_to_stop(step) and step < run.steps:
                    self._save(step)
                    run.checkpoints.wait()
                    return False
        self._draw()
        return True

    def _wait(self, but: int = 0) -> None:
        """Logs the steps that were begun, in their order, except for the last ones."""
        while len(self._begun) > but:
            step, metrics = self._begun.popleft()
            loss, accuracy = (float(x) for x in jax.device_get(metrics))
            if not math.isfinite(loss):
                self._diverged(step, f"the loss is {loss}")
            self._speed.step(self._run.batch_size)
            if self._log and step % self._run.config.work.log_every == 0:
                rate = self._run.trainer.rate(step - 1, self._plateau_scale)
                numbers = {"loss": loss, "top1_error": 1 - accuracy, "learning_rate": rate}
                speed = self._speed.numbers()
                self._log.write("train", step, epoch=self._epoch(step), **numbers, **speed)
            self._show(step, loss, accuracy)

    def _epoch(self, step: int) -> int:
        return (step - 1) // self._run.steps_per_epoch + 1

    def _end_epoch(self, step: int) -> None:
        run = self._run
        self._wait()
        with self._speed.paused():
            self._check(step)
            tested = self.tested = evaluate(run)
            if not math.isfinite(tested.loss):
                self._diverged(step, f"the loss on the test images is {tested.loss}")
            run.state = run.trainer.after_test(run.state, 1 - tested.top1)
            self._plateau_scale = float(run.state.plateau.scale)
            saturation = colour_saturation(self._conv1(), run.net.towers)
            epoch, speed = self._epoch(step), self._speed.numbers()
            trained = step - (epoch - 1) * run.steps_per_epoch
            loss, accuracy = (float(x) / trained for x in jax.device_get(run.state.epoch))
            numbers = {
                "loss": tested.loss,
                "top1_error": 1 - tested.top1,
                "top5_error": 1 - tested.top5,
                "train_loss": loss,
                "train_top1_error": 1 - accuracy,
                **{f"colour_saturation_tower{i}": s for i, s in enumerate(saturation, 1)},
            }
            if self._log:
                self._log.write("eval", step, epoch=epoch, **numbers, **speed)
            self._console.print(
                f"epoch {epoch:3}: train loss {loss:.4f}, train accuracy {accuracy:.1%}, "
                f"test accuracy {tested.top1:.2%}, top-5 {tested.top5:.2%}, "
                f"{speed.get('images_per_second', 0):.0f} images/s",
                highlight=False,
            )
            run.checkpoints.save(run.state, 1 - tested.top1)

    def _save(self, step: int) -> None:
        self._wait()
        with self._speed.paused():
            self._check(step)
            self._run.checkpoints.save(self._run.state)

    def _check(self, step: int) -> None:
        """Stops the run before a state is saved that training could not go on from."""
        if not self._run.trainer.finite(self._run.state):
            self._diverged(step, "a parameter is not finite")

    def _diverged(self, step: int, what: str) -> None:
        self._run.checkpoints.wait()
        raise RunError(
            f"{what} after step {step}; the last good checkpoint is "
            f"{self._run.checkpoints.newest}; try a smaller --learning-rate"
        )

    def _conv1(self) -> jax.Array:
        """Returns the whole kernel of conv1."""
        return self._run.trainer.everywhere(self._run.state.params["convolutions"][0]["kernel"])

    def _draw(self) -> None:
        run, kernel = self._run, self._conv1()
        if processes.is_first():
            save_filters(run.folder / "filters.png", kernel, run.net.towers)
            save_curves(run.folder / "curves.png", read_metrics(run.folder))

    @contextlib.contextmanager
    def _progress(self, done: int) -> Iterator[Callable[[int, float, float], None]]:
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            *(BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}  left")),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            bar = progress.add_task(
                "", total=self._run.steps, completed=done, epoch=self._epoch(done + 1), numbers=""
            )

            def show(step: int, loss: float, accuracy: float) -> None:
                numbers = f"loss {loss:.3f}  accuracy {accuracy:.1%}  {self._speed}"
                progress.update(bar, completed=step, epoch=self._epoch(step), numbers=numbers)

            yield show


def evaluate(run: Run) -> Evaluation:
    """Tests the net on all test images."""
    with evaluation_batches(
        run.dataset.test,
        batch_size=run.batch_size,
        rows=run.trainer.rows(run.batch_size),
        workers=run.config.work.workers,
    ) as batches:
        counted = counting_damage(run, run.dataset.test, batches)
        return run.trainer.evaluate(run.state, counted, run.batch_size)


def counting_damage(run: Run, source: Source, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yields the batches; damaged images among them are named and counted."""
    for batch in batches:
        run.damage.add(source, batch.damaged)
        yield batch


@contextlib.contextmanager
def batches_of(run: Run) -> Iterator[Iterator[tuple[jax.Array, jax.Array]]]:
    """Gives training batches on their devices, each a step before it is used."""
    with training_batches(
        run.dataset.train,
        batch_size=run.batch_size,
        rows=run.trainer.rows(run.batch_size),
        seed=run.config.seed,
        first_step=int(run.state.step),
        workers=run.config.work.workers,
    ) as batches:
        counted = counting_damage(run, run.dataset.train, batches)

        def ahead() -> Iterator[tuple[jax.Array, jax.Array]]:
            put = (run.trainer.put(batch, run.batch_size) for batch in counted)
            ready = next(put)
            for following in put:
                yield ready
                ready = following

        yield ahead()
