"""The loop over the steps: trains, tests, logs, saves, and stops when it is asked to."""

import math
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alexnet.data.pipeline import Batches, evaluation_batches, training_batches
from alexnet.data.sources import Source
from alexnet.errors import RunError
from alexnet.reports.curves import save_curves
from alexnet.reports.filters import colour_saturation, save_filters
from alexnet.reports.metrics import MetricsLog, read_metrics
from alexnet.training import distributed
from alexnet.training.run import Run
from alexnet.training.speed import Throughput, peak_flops, training_multiply_adds
from alexnet.training.state import Evaluation, Metrics
from alexnet.training.stopping import Stop


class Loop:
    """Trains a run to its last step.

    Args:
      run: is changed by it.
      console: where to talk.
      stop: when to end.

    Attributes:
      tested: the last evaluation, if there was one.
    """

    def __init__(self, run: Run, console: Console, stop: Stop):
        self._run = run
        self._stop = stop
        self._console = console
        self._log: MetricsLog | None = None
        mesh = run.trainer.net.mesh
        self._speed = Throughput(
            devices=mesh.size,
            multiply_adds=training_multiply_adds(run.net),
            peak=peak_flops(list(mesh.devices.flat), jnp.dtype(run.config.recipe.dtype)),
        )
        # Steps whose numbers have not been waited for: the next step is begun before.
        self._begun: deque[tuple[int, Metrics]] = deque()
        self._plateau_scale = float(run.state.plateau.scale)
        self.tested: Evaluation | None = None

    def train(self) -> bool:
        """Whether the run is done; if not, it was asked to stop, and its state is saved."""
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
            run.trainer.compile(run.batch_size, run.image_shape)
            distributed.synchronize("compiled")
        with ExitStack() as stack:
            if distributed.is_first():
                self._log = MetricsLog(
                    run.folder,
                    tensorboard=config.work.tensorboard,
                    resumed_at=first if config.resume else None,
                )
                stack.callback(self._log.close)
            batches = stack.enter_context(
                training_batches(
                    run.dataset.train,
                    batch_size=run.batch_size,
                    rows=run.trainer.rows(run.batch_size),
                    seed=config.seed,
                    first_step=first,
                    workers=config.work.workers,
                )
            )
            self._show = stack.enter_context(self._progress(first))
            profile = Profile(run)
            stack.callback(profile.close)
            ahead = on_devices(run, batches)
            for step in range(first + 1, run.steps + 1):
                with profile.of(step):
                    run.state, metrics = run.trainer.step(run.state, *next(ahead))
                    self._begun.append((step, metrics))
                    self._wait(but=1)
                if step % run.steps_per_epoch == 0 or step == run.steps:
                    self._end_epoch(step)
                elif (every := config.work.checkpoint_every) and step % every == 0:
                    self._save(step)
                if self._stop.after(step) and step < run.steps:
                    self._save(step)
                    run.checkpoints.wait()
                    return False
        self._draw()
        return True

    def _wait(self, but: int = 0) -> None:
        """Takes note of steps that were begun, in their order, but for the last ones."""
        while len(self._begun) > but:
            step, metrics = self._begun.popleft()
            loss, accuracy = (float(x) for x in jax.device_get(metrics))
            if not math.isfinite(loss):
                self._diverged(step, f"the loss is {loss}")
            self._speed.step(self._run.batch_size)
            if self._log and step % self._run.config.work.log_every == 0:
                rate = self._run.trainer.rate(step - 1, self._plateau_scale)
                speed = self._speed_numbers()
                self._log.write(
                    "train",
                    step,
                    epoch=(step - 1) // self._run.steps_per_epoch + 1,
                    loss=loss,
                    top1_error=1 - accuracy,
                    learning_rate=rate,
                    **speed,
                )
            self._show(step, loss, accuracy)

    def _end_epoch(self, step: int) -> None:
        run = self._run
        self._wait()
        with self._speed.paused():
            self._check(step)
            tested = self.tested = evaluate(run)
            if not math.isfinite(tested.loss):
                self._diverged(step, f"the loss on the test images is {tested.loss}")
            run.state = run.trainer.told(run.state, 1 - tested.top1)
            self._plateau_scale = float(run.state.plateau.scale)
            saturation = colour_saturation(self._conv1(), run.net.towers)
            epoch = (step - 1) // run.steps_per_epoch + 1
            trained = step - (epoch - 1) * run.steps_per_epoch
            loss, accuracy = (float(x) / trained for x in jax.device_get(run.state.epoch))
            speed = self._speed_numbers()
            if self._log:
                self._log.write(
                    "eval",
                    step,
                    epoch=epoch,
                    loss=tested.loss,
                    top1_error=1 - tested.top1,
                    top5_error=1 - tested.top5,
                    train_loss=loss,
                    train_top1_error=1 - accuracy,
                    **{f"colour_saturation_tower{i}": s for i, s in enumerate(saturation, 1)},
                    **speed,
                )
            self._console.print(
                f"epoch {epoch:3}: train loss {loss:.4f}, train accuracy {accuracy:.1%}, "
                f"test accuracy {tested.top1:.2%}, top-5 {tested.top5:.2%}, "
                f"{speed.get('images_per_second', 0):.0f} images/s",
                highlight=False,
            )
            run.checkpoints.save(run.state, run.position(), 1 - tested.top1)

    def _save(self, step: int) -> None:
        self._wait()
        with self._speed.paused():
            self._check(step)
            self._run.checkpoints.save(self._run.state, self._run.position())

    def _check(self, step: int) -> None:
        """Nothing is saved that could not be gone on from."""
        if not self._run.trainer.finite(self._run.state):
            self._diverged(step, "a parameter is not finite")

    def _diverged(self, step: int, what: str) -> None:
        self._run.checkpoints.wait()
        raise RunError(
            f"{what} after step {step}; the last good checkpoint is "
            f"{self._run.checkpoints.newest}; try a smaller --learning-rate"
        )

    def _speed_numbers(self) -> dict[str, float]:
        """Nothing until there are two steps to measure between."""
        speed = self._speed
        if not speed.images_per_second:
            return {}
        return {
            "images_per_second": round(speed.images_per_second, 2),
            "images_per_second_per_device": round(speed.per_device, 2),
            "model_flop_utilization": round(speed.utilization or 0.0, 4),
        }

    def _conv1(self) -> jax.Array:
        """The kernel of conv1, whole."""
        return self._run.trainer.everywhere(self._run.state.params["convolutions"][0]["kernel"])

    def _draw(self) -> None:
        run, kernel = self._run, self._conv1()
        if distributed.is_first():
            save_filters(run.folder / "filters.png", kernel, run.net.towers)
            save_curves(run.folder / "curves.png", read_metrics(run.folder))

    @contextmanager
    def _progress(self, done: int) -> Iterator:
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            *(BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}  left")),
            TimeRemainingColumn(),
        )
        per_epoch = self._run.steps_per_epoch
        with Progress(*columns, console=self._console) as progress:
            bar = progress.add_task(
                "", total=self._run.steps, completed=done, epoch=done // per_epoch + 1, numbers=""
            )

            def show(step: int, loss: float, accuracy: float) -> None:
                speed = self._speed
                rate = f"{speed.images_per_second:.0f} images/s" if speed.images_per_second else ""
                used = f"  {speed.utilization:.0%} of peak" if rate and speed.utilization else ""
                progress.update(
                    bar,
                    completed=step,
                    epoch=(step - 1) // per_epoch + 1,
                    numbers=f"loss {loss:.3f}  accuracy {accuracy:.1%}  {rate}{used}",
                )

            yield show


def evaluate(run: Run) -> Evaluation:
    """Tests the net on all test images."""
    with evaluation_batches(
        run.dataset.test,
        batch_size=run.batch_size,
        rows=run.trainer.rows(run.batch_size),
        workers=run.config.work.workers,
    ) as batches:
        noted = taking_note(run, run.dataset.test, batches)
        return run.trainer.evaluate(run.state, noted, run.batch_size)


def taking_note(run: Run, source: Source, batches: Batches) -> Iterator:
    """The batches; damaged images among them are named and counted."""
    for batch in batches:
        run.damage.add(source, batch.damaged)
        yield batch


def on_devices(run: Run, batches: Batches) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Training batches on their devices, each a step before it is used."""
    put = (run.trainer.put(b, run.batch_size) for b in taking_note(run, run.dataset.train, batches))
    ready = next(put)
    for following in put:
        yield ready
        ready = following


class Profile:
    """Steps that JAX's profiler records, if the settings say so; those that this start does."""

    def __init__(self, run: Run):
        self._run = run
        self._first, self._last = run.config.work.profile_steps or (0, 0)
        self._records = False

    @contextmanager
    def of(self, step: int) -> Iterator[None]:
        """While a step is done."""
        if not self._records and self._first <= step <= self._last:
            jax.profiler.start_trace(self._run.folder / "profile")
            self._records = True
        yield
        if step == self._last:
            self.close()

    def close(self) -> None:
        """Writes what was recorded. A run may end, or be stopped, before the last of the steps."""
        if self._records:
            jax.block_until_ready(self._run.state)
            jax.profiler.stop_trace()
            self._records = False
