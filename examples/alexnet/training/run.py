"""A run: its settings, images, net, state and folder, set up new or from where it was left."""

import contextlib
import dataclasses
import datetime
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from alexnet.config import TrainConfig
from alexnet.data import sources
from alexnet.data.augmentation import Preprocessing
from alexnet.data.pipeline import Damage
from alexnet.data.statistics import statistics
from alexnet.errors import UsageError
from alexnet.model_io.checkpoints import Checkpoints
from alexnet.model_io.weights import Weights, read_weights
from alexnet.training import distributed
from alexnet.training.extension import extension
from alexnet.training.state import TrainState
from alexnet.training.trainer import Trainer, tower_net
from grouped_conv_jax.algorithms import table
from grouped_conv_jax.models import AlexNetConfig
from grouped_conv_jax.towers import DATA, GROUP, make_mesh

RUNS = Path("runs")

CONFIG, PREPROCESSING, CHECKPOINTS = "config.json", "preprocessing.npz", "checkpoints"
"""What a run folder has from the beginning."""


@dataclasses.dataclass
class Run:
    """A run that is set up: nothing that the user can get wrong is left."""

    config: TrainConfig
    folder: Path
    dataset: sources.Dataset
    net: AlexNetConfig
    trainer: Trainer
    state: TrainState
    checkpoints: Checkpoints
    damage: Damage
    lock: contextlib.ExitStack
    """Held as long as the run may write to its folder."""
    extension: str = ""
    """How the length of a resumed run has changed, as sentences for the user."""

    def close(self) -> None:
        """Waits until what was saved is on disk, and leaves the folder to others.

        Raises:
          RunError: it cannot be written.
        """
        with self.lock:
            self.checkpoints.close()

    @property
    def batch_size(self) -> int:
        return self.config.recipe.batch_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of images before they are cropped."""
        return self.dataset.train.shape

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the training images."""
        return len(self.dataset.train) // self.batch_size

    @property
    def steps(self) -> int:
        """All steps of the run."""
        return self.config.total_steps(self.steps_per_epoch)

    def position(self) -> dict[str, int]:
        """The place in the data, from which the order of the images goes on."""
        step = int(self.state.step)
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        return {
            "step": step,
            "epoch": epoch,
            "example": step_of_epoch * self.batch_size,
            "training_images": len(self.dataset.train),
            "batch_size": self.batch_size,
            "seed": self.config.seed,
        }


def set_up(config: TrainConfig, warn: Callable[[str], None] = print) -> Run:
    """Finds the images, places the net, and begins or resumes the run folder.

    Raises:
      UsageError: an option or a folder is wrong.
    """
    mesh, dataset, net = distributed.by_all("loaded", lambda: load(config))
    one = dataclasses.replace(config.devices, process_id=0)
    distributed.check_same("settings", repr(dataclasses.replace(config, devices=one)))
    distributed.check_same("images", f"{dataset.classes} {dataset.fingerprint}")
    resumed = config.run_dir if config.resume else None
    weights = distributed.by_all("weights", lambda: published(config, net) if not resumed else None)
    preprocessing = distributed.by_all(
        "statistics", lambda: prepare(config, dataset, weights, resumed)
    )
    distributed.check_same("statistics", repr([part.tobytes() for part in preprocessing]))
    trainer = new_trainer(config, dataset, net, mesh, preprocessing)
    folder = resumed or new_folder(config)
    distributed.by_all("folder", lambda: check_shared(folder))
    looks_only = resumed is not None and (config.eval_only or config.work.profile_input)
    with contextlib.ExitStack() as lock:
        if not looks_only:
            distributed.by_the_first(lambda: take(lock, folder))
        try:
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
                lock=contextlib.ExitStack(),
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


def begin(run: Run) -> None:
    """Fills the folder of a new run."""
    # So that there is something to go on from however early the run is stopped.
    run.checkpoints.save(run.state, run.position())
    run.checkpoints.wait()
    if distributed.is_first():
        run.trainer.preprocessing.save(run.folder / PREPROCESSING)
        # The last one: by it a folder is known as that of a run.
        save_config(run, run.config)


def save_config(run: Run, config: TrainConfig) -> None:
    """Writes the settings of a run to its folder, whole or not at all."""
    new = run.folder / f"{CONFIG}.new"
    config.save(new, **describe_images(run.dataset))
    new.replace(run.folder / CONFIG)


def go_on(run: Run, *, looks_only: bool) -> None:
    """Takes the state from where the run was left, and records a new length of the run.

    Args:
      run: gets the state.
      looks_only: whether nothing is trained, so that the length does not matter.

    Raises:
      UsageError: the run cannot go on.
    """
    saved, images = TrainConfig.load(run.folder / CONFIG)
    if images != describe_images(run.dataset):
        raise UsageError(f"the images of {run.config.data} have changed since {run.folder} began")
    run.state, position = run.checkpoints.restore_newest(like=run.state)
    if position != run.position():
        raise UsageError(f"{run.folder} was left at {position}, which is not {run.position()}")
    if looks_only:
        return
    run.extension = extension(
        saved,
        run.config,
        done=int(run.state.step),
        steps_per_epoch=run.steps_per_epoch,
        scale=float(run.state.plateau.scale),
    )
    if run.extension and distributed.is_first():
        save_config(
            run, dataclasses.replace(saved, epochs=run.config.epochs, steps=run.config.steps)
        )


def load(
    config: TrainConfig, devices: Sequence[Any] | None = None
) -> tuple[Mesh, sources.Dataset, AlexNetConfig]:
    """Returns the mesh, the images and the net, if they go together.

    Args:
      config: the settings.
      devices: the devices of the mesh, by default JAX's.
    """
    devices = jax.devices() if devices is None else devices
    batch_size, accumulate = config.recipe.batch_size, config.recipe.accumulate
    with user_errors():
        table.parsed(config.devices.implementation)
        net = config.net_config(num_classes=2, image_channels=3)
        mesh = make_mesh(*(config.devices.mesh or default_mesh(net.towers, len(devices))), devices)
    processes = {device.process_index for device in mesh.devices.flat}
    if len(processes) < jax.process_count():
        raise UsageError(
            f"a mesh of {mesh.shape[DATA]} x {mesh.shape[GROUP]} has devices of {len(processes)} "
            f"of the {jax.process_count()} processes; it must have some of each"
        )
    if net.towers % mesh.shape[GROUP]:
        raise UsageError(f"{net.towers} towers cannot be shared by {mesh.shape[GROUP]} devices")
    if batch_size % (mesh.shape[DATA] * accumulate):
        parts = f" in {accumulate} parts" if accumulate > 1 else ""
        raise UsageError(
            f"a batch of {batch_size} images does not divide over {mesh.shape[DATA]} devices{parts}"
        )
    dataset = sources.load(config.data, net.stored_size, config.seed)
    with user_errors():
        net = config.net_config(len(dataset.classes), dataset.channels)
    if batch_size > len(dataset.train):
        raise UsageError(
            f"a batch of {batch_size} is more than the {len(dataset.train)} training "
            "images; take a smaller --batch-size"
        )
    return mesh, dataset, net


def published(config: TrainConfig, net: AlexNetConfig) -> Weights | None:
    """The weights that the settings name."""
    return read_weights(config.weights, net) if config.weights else None


def prepare(
    config: TrainConfig, dataset: sources.Dataset, weights: Weights | None, resumed: Path | None
) -> Preprocessing:
    """What to do with pixels: as the run began, as published weights want it, or by the images."""
    if resumed:
        return Preprocessing.load(resumed / PREPROCESSING)
    prepared = None
    if weights and weights.mean is not None:
        mean = weights.mean.astype(np.float32)
        std = np.ones(dataset.channels) if weights.std is None else weights.std
        prepared = Preprocessing(
            mean, std.astype(np.float32), np.zeros((dataset.channels,) * 2, np.float32)
        )
        if config.eval_only:
            return prepared
    cache = config.work.cache
    found = Preprocessing.of(
        statistics(dataset, workers=config.work.workers, cache=cache and cache.expanduser()),
        config.recipe.normalization,
    )
    return found._replace(mean=prepared.mean, std=prepared.std) if prepared else found


def new_trainer(
    config: TrainConfig,
    dataset: sources.Dataset,
    net: AlexNetConfig,
    mesh: Mesh,
    preprocessing: Preprocessing,
) -> Trainer:
    """Trains the net on the images, as the settings say, on a mesh."""
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


def describe_images(dataset: sources.Dataset) -> dict:
    """What a run that goes on must find again."""
    return {
        "classes": list(dataset.classes),
        "training_images": len(dataset.train),
        "test_images": len(dataset.test),
        "fingerprint": dataset.fingerprint,
    }


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """What the library refuses here, the user has asked for."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def default_mesh(towers: int, devices: int) -> tuple[int, int]:
    """Devices for examples and for towers: as many for towers as can share them."""
    group = max(n for n in range(1, devices + 1) if towers % n == 0)
    return devices // group, group


def newest_run() -> Path:
    """The folder below runs/ that was begun or extended last."""
    started = sorted(RUNS.glob(f"*/{CONFIG}"), key=lambda path: path.stat().st_mtime)
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


def take(lock: contextlib.ExitStack, folder: Path) -> None:
    """Locks the folder, so that two processes do not train in it, as long as `lock` is open.

    Nothing is locked where there are no locks, as on some network file systems.

    Raises:
      UsageError: somebody else has locked it.
    """
    try:
        import fcntl

        file = lock.enter_context((folder / "lock").open("w"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"another process is training in {folder}") from error
    except (ImportError, OSError):
        return


def check_shared(folder: Path) -> None:
    """Raises UsageError where a process does not see the folder that the first one has made."""
    if not folder.is_dir():
        raise UsageError(f"{folder} must be on a file system that all processes share")


def warn(text: str) -> None:
    """A warning, beside what the run prints."""
    print(text, file=sys.stderr)
