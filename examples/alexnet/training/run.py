"""A run: its settings, images, net, state and folder, set up new or resumed."""

import contextlib
import dataclasses
import datetime
import fcntl
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from alexnet import data
from alexnet.config import TrainConfig
from alexnet.data.augmentation import Preprocessing
from alexnet.data.pipeline import Damage
from alexnet.data.sources import Dataset
from alexnet.data.statistics import statistics
from alexnet.errors import UsageError
from alexnet.model_io.checkpoints import Checkpoints
from alexnet.model_io.weights import Weights, read_weights
from alexnet.training import optimizer, processes
from alexnet.training.state import TrainState
from alexnet.training.trainer import Trainer, tower_net
from grouped_conv_jax.algorithms import check_name
from grouped_conv_jax.models import AlexNetConfig
from grouped_conv_jax.towers import DATA, GROUP, make_mesh

RUNS = Path("runs")

CONFIG, PREPROCESSING, CHECKPOINTS = "config.json", "preprocessing.npz", "checkpoints"
"""Files that a run folder has from the beginning."""


@dataclasses.dataclass
class Run:
    """A run that is set up. The user's settings have been checked."""

    config: TrainConfig
    folder: Path
    dataset: Dataset
    net: AlexNetConfig
    trainer: Trainer
    state: TrainState
    checkpoints: Checkpoints
    damage: Damage
    lock: contextlib.ExitStack
    """Holds the lock of the folder."""
    extension: str = ""
    """Sentences for the user: how the length of a resumed run has changed."""

    def close(self) -> None:
        """Waits for the checkpoints. Raises RunError if they cannot be written."""
        with self.lock:
            self.checkpoints.close()

    @property
    def batch_size(self) -> int:
        return self.config.recipe.batch_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape of images before they are cropped."""
        return self.dataset.train.shape

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the training images."""
        return len(self.dataset.train) // self.batch_size

    @property
    def steps(self) -> int:
        """All steps of the run."""
        return self.config.total_steps(self.steps_per_epoch)


def set_up(config: TrainConfig, warn: Callable[[str], None] = print) -> Run:
    """Finds the images, places the net, and begins or resumes the run folder."""
    mesh, dataset, net = load(config)
    one = dataclasses.replace(config.devices, process_id=0)
    processes.check_same("settings", repr(dataclasses.replace(config, devices=one)))
    processes.check_same("images", f"{dataset.classes} {dataset.fingerprint}")
    resumed = config.run_dir if config.resume else None
    weights = read_weights(config.weights, net) if config.weights and not resumed else None
    preprocessing = prepare(config, dataset, weights, resumed)
    trainer = new_trainer(config, dataset, net, mesh, preprocessing)
    processes.synchronize("prepared")
    folder = resumed or new_folder(config)
    # Another process may be training while this one only looks.
    looks_only = resumed is not None and (config.eval_only or config.work.profile_input)
    with contextlib.ExitStack() as lock:
        try:
            if processes.is_first() and not looks_only:
                take(folder, lock)
            run = Run(
                config=config,
                folder=folder,
                dataset=dataset,
                net=net,
                trainer=trainer,
                state=trainer.init(weights and weights.params),
                checkpoints=Checkpoints(
                    folder / CHECKPOINTS, config.work.keep, warn, read_only=looks_only
                ),
                damage=Damage(config.work.max_damaged, warn),
                lock=lock,
            )
            if resumed:
                go_on(run, looks_only=looks_only)
            else:
                begin(run)
        except OSError as error:
            raise UsageError(
                f"cannot write to the run folder {folder}: {error.strerror}"
            ) from error
        run.lock = lock.pop_all()
    return run


def load(
    config: TrainConfig, devices: Sequence[Any] | None = None
) -> tuple[Mesh, Dataset, AlexNetConfig]:
    """Returns a mesh of the devices, by default JAX's, the images and the net."""
    devices = jax.devices() if devices is None else devices
    batch_size, accumulate = config.recipe.batch_size, config.recipe.accumulate
    with user_errors():
        check_name(config.devices.implementation)
        net = config.net_config(num_classes=2, image_channels=3)
        mesh = make_mesh(*(config.devices.mesh or default_mesh(net.towers, len(devices))), devices)
    own = {device.process_index for device in mesh.devices.flat}
    if len(own) < jax.process_count():
        raise UsageError(
            f"a mesh of {mesh.shape[DATA]} x {mesh.shape[GROUP]} has devices of {len(own)} of the "
            f"{jax.process_count()} processes; it must have some of each"
        )
    if net.towers % mesh.shape[GROUP]:
        raise UsageError(f"{net.towers} towers cannot be shared by {mesh.shape[GROUP]} devices")
    if batch_size % (mesh.shape[DATA] * accumulate):
        parts = f" in {accumulate} parts" if accumulate > 1 else ""
        raise UsageError(
            f"a batch of {batch_size} images does not divide over {mesh.shape[DATA]} devices{parts}"
        )
    dataset = data.load(config.data, net.stored_size, config.seed)
    with user_errors():
        net = config.net_config(len(dataset.classes), dataset.channels)
    if batch_size > len(dataset.train):
        raise UsageError(
            f"a batch of {batch_size} is more than the {len(dataset.train)} training "
            "images; take a smaller --batch-size"
        )
    return mesh, dataset, net


def prepare(
    config: TrainConfig, dataset: Dataset, weights: Weights | None, resumed: Path | None
) -> Preprocessing:
    """Returns the normalization of the run, of the published weights, or by the images."""
    if resumed:
        return Preprocessing.load(resumed / PREPROCESSING)
    found = Preprocessing.neutral(dataset.channels)
    if not (config.eval_only and weights and weights.mean is not None):
        of_images = statistics(dataset.train, workers=config.work.workers)
        found = Preprocessing.of(of_images, config.recipe.normalization)
    if weights and weights.mean is not None:
        std = np.ones(dataset.channels, np.float32) if weights.std is None else weights.std
        found = found._replace(mean=weights.mean, std=std)
    return found


def new_trainer(
    config: TrainConfig,
    dataset: Dataset,
    net: AlexNetConfig,
    mesh: Mesh,
    preprocessing: Preprocessing,
) -> Trainer:
    """Returns the trainer of the net on a mesh, for the settings."""
    steps_per_epoch = len(dataset.train) // config.recipe.batch_size
    return Trainer(
        tower_net(net, mesh, config.devices.implementation, config.recipe.dtype),
        config.recipe,
        preprocessing,
        image_size=net.image_size,
        steps=config.total_steps(steps_per_epoch),
        steps_per_epoch=steps_per_epoch,
        flip=dataset.flip,
        seed=config.seed,
        placement=config.devices.placement,
    )


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns the library's ValueError, which comes from the user's settings, into UsageError."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def default_mesh(towers: int, devices: int) -> tuple[int, int]:
    """Returns devices for examples and for towers: as many for towers as can share them."""
    group = max(n for n in range(1, devices + 1) if towers % n == 0)
    return devices // group, group


def newest_run() -> Path:
    """Returns the folder below runs/ that was begun or extended last."""
    started = sorted(RUNS.glob(f"*/{CONFIG}"), key=lambda path: path.stat().st_mtime)
    if not started:
        raise UsageError(f"nothing to resume: no run in {RUNS.absolute()}")
    return started[-1].parent


def new_folder(config: TrainConfig) -> Path:
    """Makes an empty folder for a new run, which all processes must see."""
    kind = config.data.partition(":")[0]
    now = datetime.datetime.fromtimestamp(processes.agreed(int(time.time())))
    folder = config.run_dir or RUNS / f"{kind}-{now:%Y%m%d-%H%M%S}"
    if processes.is_first():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make the run folder {folder}: {error.strerror}") from error
        if any(folder.iterdir()):
            raise UsageError(f"{folder} is not empty; go on with --resume, or name another folder")
    processes.synchronize("folder")
    if not folder.is_dir():
        raise UsageError(f"{folder} must be on a file system that all processes share")
    return folder


def take(folder: Path, lock: contextlib.ExitStack) -> None:
    """Locks the folder until `lock` closes, so that two processes do not train in it."""
    file = lock.enter_context((folder / "lock").open("w"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"another process is training in {folder}") from error
    except OSError:
        pass  # Some network file systems have no locks.


def begin(run: Run) -> None:
    """Fills the folder of a new run."""
    # There is a checkpoint to go on from, however early the run is stopped.
    run.checkpoints.save(run.state)
    run.checkpoints.wait()
    if processes.is_first():
        run.trainer.preprocessing.save(run.folder / PREPROCESSING)
        # This file is written last: it marks the folder of a run.
        save_config(run, run.config)


def save_config(run: Run, config: TrainConfig) -> None:
    """Writes the settings of a run to its folder, whole or not at all."""
    new = run.folder / f"{CONFIG}.new"
    config.save(new, **describe_images(run.dataset))
    new.replace(run.folder / CONFIG)


def describe_images(dataset: Dataset) -> dict[str, Any]:
    """Returns what a resumed run must find again."""
    return {
        "classes": list(dataset.classes),
        "training_images": len(dataset.train),
        "test_images": len(dataset.test),
        "fingerprint": dataset.fingerprint,
    }


def go_on(run: Run, *, looks_only: bool) -> None:
    """Restores the state of a resumed run, and records its new length, unless it only looks."""
    saved, images = TrainConfig.load(run.folder / CONFIG)
    if images != describe_images(run.dataset):
        raise UsageError(f"the images of {run.config.data} have changed since {run.folder} began")
    run.state = run.checkpoints.restore_newest(like=run.state)
    if not looks_only:
        run.extension = extension(
            *(saved, run.config, int(run.state.step), run.steps_per_epoch),
            scale=float(run.state.plateau.scale),
        )
    if run.extension and processes.is_first():
        length = {"epochs": run.config.epochs, "steps": run.config.steps}
        save_config(run, dataclasses.replace(saved, **length))


def extension(
    saved: TrainConfig, config: TrainConfig, done: int, steps_per_epoch: int, *, scale: float
) -> str:
    """Says how a new length changes a run and its learning rate; "" if the length is the same.

    The schedule is computed from the new length alone. So a run that is killed after its extension
    goes on as any other run, from the settings in its folder. `done` is the number of steps done,
    and `scale` the plateau's factor of the learning rate.
    """
    before, now = (c.total_steps(steps_per_epoch) for c in (saved, config))
    if before == now:
        return ""
    if now < done:
        name, least = "steps", done
        if config.steps is None:
            name, least = "epochs", math.ceil(done / steps_per_epoch)
        raise UsageError(
            f"the run has already done {done} steps ({done / steps_per_epoch:.4g} epochs), so "
            f"--{name} must be at least {least}, got {getattr(config, name)}"
        )
    schedules = (optimizer.learning_rate(config.recipe, n, steps_per_epoch) for n in (before, now))
    old_rate, rate = (scale * float(jnp.asarray(schedule(done))) for schedule in schedules)
    return (
        f"The run now ends after {now} steps ({now / steps_per_epoch:.4g} epochs) instead of "
        f"{before} ({before / steps_per_epoch:.4g}). The next learning rate is {rate:.4g}; without "
        f"the change it would be {old_rate:.4g}."
    )
