"""Trains the two-tower AlexNet of 2012 on real images, its towers on different devices.

python examples/train_alexnet.py
python examples/train_alexnet.py --data photos --epochs 60
python examples/train_alexnet.py --data folder:DIR
python examples/train_alexnet.py --help
"""

import dataclasses
import datetime
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import chex
import jax
import optax
import tyro
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alexnet import data, distributed
from alexnet.checkpoints import Checkpoints
from alexnet.config import TrainConfig
from alexnet.errors import UsageError
from alexnet.picture import save_placement
from alexnet.report import save_filters, show_placement, training_report
from alexnet.training import (
    Normalization,
    Trainer,
    TrainState,
    paper_optimizer,
    tower_net,
)
from grouped_conv_jax.algorithms import check_name
from grouped_conv_jax.models import AlexNetConfig
from grouped_conv_jax.towers import DATA, GROUP, make_mesh

RUNS = Path("runs")


@dataclasses.dataclass
class Run:
    """A run that is set up: nothing that the user can get wrong is left."""

    config: TrainConfig
    folder: Path
    dataset: data.Dataset
    net: AlexNetConfig
    trainer: Trainer
    state: TrainState
    checkpoints: Checkpoints

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the training images."""
        return len(self.dataset.train) // self.config.batch_size


def main() -> None:
    """The command line."""
    config = tyro.cli(TrainConfig)
    try:
        if config.resume:
            # Once more, with the settings of that run as the defaults.
            saved, _ = TrainConfig.load(config.run_dir or newest_run())
            config = tyro.cli(TrainConfig, default=saved)
            config.check_same_as(saved)
        config.check()
        if cpus := config.cpu_devices:
            jax.config.update("jax_num_cpu_devices", cpus)
        with distributed.joined(config) as process:
            train_in(process, config)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def train_in(process: distributed.Process | None, config: TrainConfig) -> None:
    """Trains, from the beginning or on; in this process alone or as one of several."""
    run = set_up(config)
    way_back = f"--resume --run-dir {run.folder}"
    if process:
        process.way_back = way_back
    console = Console(soft_wrap=True, quiet=not distributed.is_first())
    try:
        describe(run, console)
        train(run, console)
    except BaseException as error:
        # Of several processes those that are left cannot complete what they are saving.
        if process is None or isinstance(error, FloatingPointError):
            run.checkpoints.close()
        if process is None and isinstance(error, KeyboardInterrupt):
            print(f"stopped; go on with {way_back}", file=sys.stderr)
            sys.exit(130)
        raise
    run.checkpoints.close()


def set_up(config: TrainConfig) -> Run:
    """Loads the images, places the net and begins or resumes the run folder.

    Raises:
      UsageError: an option or a folder is wrong.
    """
    mesh, dataset, net = distributed.by_all("loaded", lambda: load(config))
    distributed.check_same("settings", repr(dataclasses.replace(config, process_id=0)))
    distributed.check_same("images", f"{dataset.classes} {dataset.train.labels.tolist()}")
    trainer = new_trainer(config, dataset, net, mesh)
    images = {
        "classes": list(dataset.classes),
        "training_images": len(dataset.train),
        "test_images": len(dataset.test),
    }
    folder = config.run_dir if config.resume and config.run_dir else new_folder(config)
    distributed.by_all("folder", lambda: check_shared(folder))
    try:
        checkpoints = Checkpoints(folder / "checkpoints")
        state = trainer.init()
        if config.resume:
            if TrainConfig.load(folder)[1] != images:
                raise UsageError(f"the images of {config.data} have changed since {folder} began")
            state = checkpoints.restore_newest(like=state)
            if distributed.is_first():
                forget_after(folder / "metrics.jsonl", int(state.step))
        else:
            if distributed.is_first():
                config.save(folder / "config.json", **images)
            # So that there is something to go on from however early the run is stopped.
            checkpoints.save(state)
            checkpoints.wait()
    except OSError as error:
        raise UsageError(f"cannot write to the run folder {folder}: {error.strerror}") from error
    return Run(config, folder, dataset, net, trainer, state, checkpoints)


def new_trainer(
    config: TrainConfig, dataset: data.Dataset, net: AlexNetConfig, mesh: Mesh
) -> Trainer:
    """Trains the net on the images, as the settings say, on a mesh."""
    steps = len(dataset.train) // config.batch_size
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, min(steps, config.epochs * steps // 2), config.epochs * steps
    )
    return Trainer(
        tower_net(net, mesh, config.implementation),
        paper_optimizer(schedule, config.momentum, config.weight_decay),
        image_size=net.image_size,
        normalization=Normalization.of(dataset.train.images),
        flip=dataset.flip,
        seed=config.seed,
        placement=config.placement,
    )


def load(config: TrainConfig) -> tuple[Mesh, data.Dataset, AlexNetConfig]:
    """The devices, the images and the net, and whether they go together."""
    with user_errors():
        check_name(config.implementation)
        mesh = make_mesh(*(config.mesh or default_mesh(config.towers)))
    processes = {device.process_index for device in mesh.devices.flat}
    if len(processes) < jax.process_count():
        raise UsageError(
            f"a mesh of {mesh.shape[DATA]} x {mesh.shape[GROUP]} has devices of {len(processes)} "
            f"of the {jax.process_count()} processes; it must have some of each"
        )
    if config.towers % mesh.shape[GROUP]:
        raise UsageError(f"{config.towers} towers cannot be shared by {mesh.shape[GROUP]} devices")
    if config.batch_size % mesh.shape[DATA]:
        raise UsageError(
            f"a batch of {config.batch_size} images does not divide over {mesh.shape[DATA]} devices"
        )
    image_size = config.net(num_classes=2, image_channels=3).image_size
    dataset = data.load(config.data, image_size, config.seed)
    net = config.net(len(dataset.classes), dataset.channels)
    with user_errors():
        net.check()
    if config.batch_size > len(dataset.train):
        raise UsageError(
            f"a batch of {config.batch_size} is more than the {len(dataset.train)} training "
            "images; take a smaller --batch-size"
        )
    return mesh, dataset, net


@contextmanager
def user_errors() -> Iterator[None]:
    """What the library refuses here, the user has asked for."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def default_mesh(towers: int) -> tuple[int, int]:
    """Devices for examples and for towers: as many for towers as can share them."""
    devices = len(jax.devices())
    group = max(n for n in range(1, devices + 1) if towers % n == 0)
    return devices // group, group


def newest_run() -> Path:
    """The folder below runs/ that was begun last."""
    started = sorted(RUNS.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    if not started:
        raise UsageError(f"nothing to resume: no run in {RUNS.absolute()}")
    return started[-1].parent


def new_folder(config: TrainConfig) -> Path:
    """An empty folder for this run."""
    kind = config.data.partition(":")[0]
    now = datetime.datetime.fromtimestamp(distributed.agreed(int(time.time())))
    folder = config.run_dir or RUNS / f"{kind}-{now:%Y%m%d-%H%M%S}"

    def make() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise UsageError(
                    f"{folder} is not empty; go on with --resume, or name another folder"
                )
        except OSError as error:
            raise UsageError(f"cannot make the run folder {folder}: {error.strerror}") from error

    distributed.by_the_first(make)
    return folder


def check_shared(folder: Path) -> None:
    """Raises UsageError where a process does not see the folder that the first one has made."""
    if not folder.is_dir():
        raise UsageError(f"{folder} must be on a file system that all processes share")


def describe(run: Run, console: Console) -> None:
    """Shows what is about to be trained, and where it lives."""
    mesh = run.trainer.net.mesh
    parameters = sum(array.size for array in jax.tree.leaves(run.state.params))
    console.print(
        f"AlexNet ({run.config.preset}): {run.net.towers} towers, {parameters:,} parameters. "
        f"{run.config.data}: {len(run.dataset.train):,} training and {len(run.dataset.test):,} "
        f"test images of {len(run.dataset.classes)} classes."
    )
    show_placement(console, mesh, run.net.towers, run.state.params)

    def alone() -> Trainer:
        # Compiled to compare the memory with; a device of this process, which can.
        return new_trainer(run.config, run.dataset, run.net, make_mesh(1, 1, jax.local_devices()))

    report = training_report(
        run.trainer,
        run.net,
        run.state,
        run.config.batch_size,
        run.dataset.train.images.shape[1:],
        alone=alone if mesh.size > 1 and distributed.is_first() else None,
    )
    console.print(str(report), markup=False, highlight=False)
    if distributed.is_first():
        save_placement(run.folder / "placement.svg", mesh, run.net)
    console.print(f"Run folder: {run.folder}")


def train(run: Run, console: Console) -> None:
    """Trains to the last epoch; evaluates, logs and saves after each."""
    if jax.process_count() > 1:
        # A collective does not wait for long for a process that is still compiling.
        run.trainer.compile(run.config.batch_size, run.dataset.train.images.shape[1:])
        distributed.synchronize("compiled")
    first = int(run.state.step) // run.steps_per_epoch
    if first == run.config.epochs:
        console.print(f"All {first} epochs were done before.")
    with Progress(
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}  left"),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        bar = progress.add_task(
            "",
            total=run.config.epochs * run.steps_per_epoch,
            completed=int(run.state.step),
            epoch=min(first + 1, run.config.epochs),
            numbers="",
        )
        for epoch in range(first, run.config.epochs):
            progress.update(bar, epoch=epoch + 1)
            evaluation = train_epoch(
                run, epoch, lambda numbers: progress.update(bar, advance=1, numbers=numbers)
            )
            if distributed.is_first():
                with (run.folder / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(evaluation) + "\n")
            run.checkpoints.save(run.state)
            console.print(
                f"epoch {epoch + 1:3}: train loss {evaluation['train_loss']:.4f}, "
                f"train accuracy {evaluation['train_accuracy']:.1%}, "
                f"test accuracy {evaluation['test_accuracy']:.2%}, "
                f"{evaluation['images_per_second']:.0f} images/s"
            )
    filters = run.folder / "filters.png"
    kernel = run.trainer.everywhere(run.state.params["convolutions"][0]["kernel"])
    if distributed.is_first():
        save_filters(filters, kernel, run.net.towers)
    console.print(f"Test accuracy: {test_accuracy(run):.2%}. Filters of conv1: {filters}")


def train_epoch(run: Run, epoch: int, show: Callable[[str], None]) -> dict[str, float]:
    """One pass over the training images, and the evaluation after it."""
    losses, accuracies, began, speed = [], [], math.nan, 0.0
    for batch in data.batches(run.dataset.train, run.config.batch_size, run.config.seed, epoch):
        run.state, metrics = run.trainer.step(run.state, batch)
        loss, accuracy = (float(x) for x in jax.device_get(metrics))
        check_finite(run, loss)
        losses.append(loss)
        accuracies.append(accuracy)
        # The first step of a run is mostly compilation: speed is counted from its end.
        if len(losses) == 1:
            began = time.perf_counter()
        else:
            images = (len(losses) - 1) * run.config.batch_size
            speed = images / (time.perf_counter() - began)
        shown = f"{speed:.0f} images/s" if speed else ""
        show(f"loss {loss:.3f}  accuracy {accuracy:.1%}  {shown}")
    return {
        "epoch": epoch + 1,
        "step": int(run.state.step),
        "train_loss": statistics.fmean(losses),
        "train_accuracy": statistics.fmean(accuracies),
        "test_accuracy": test_accuracy(run),
        "images_per_second": speed,
    }


def test_accuracy(run: Run) -> float:
    """Share of right answers on the test images."""
    return run.trainer.accuracy(run.state.params, run.dataset.test, run.config.batch_size)


def check_finite(run: Run, loss: float) -> None:
    """Raises FloatingPointError with the way back once the loss is infinite or not a number."""
    try:
        chex.assert_tree_all_finite(loss)
    except AssertionError as error:
        raise FloatingPointError(
            f"the loss is {loss} after step {int(run.state.step)}; try a smaller --learning-rate, "
            f"or look at the checkpoints in {run.folder / 'checkpoints'}"
        ) from error


def forget_after(metrics: Path, step: int) -> None:
    """Drops the evaluations after `step` from a run that is gone on with from there."""
    kept = []
    for line in metrics.read_text().splitlines() if metrics.exists() else []:
        try:
            evaluation = json.loads(line)
        except ValueError:
            # The run was killed while it wrote this line.
            continue
        if evaluation["step"] <= step:
            kept.append(line + "\n")
    metrics.write_text("".join(kept))


if __name__ == "__main__":
    main()
