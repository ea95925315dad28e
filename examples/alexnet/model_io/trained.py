"""A net that is put to use: that of a run's checkpoint, or of published weights.

What it answers is a function of arrays alone, `Trained.probabilities`, which `export` writes down
as it is run here.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from alexnet.config import Recipe, TrainConfig
from alexnet.data.augmentation import Preprocessing
from alexnet.errors import UsageError
from alexnet.model_io.weights import Weights, by_name, read_weights
from alexnet.reports.metrics import read_metrics
from alexnet.training.run import CHECKPOINTS, CONFIG, PREPROCESSING, user_errors
from alexnet.training.trainer import Trainer, tower_net
from grouped_conv_jax.models import ALEXNETS, AlexNet, AlexNetConfig
from grouped_conv_jax.towers import make_mesh

NEWEST, BEST = "newest", "best"
"""Checkpoints that have a name besides their step."""


class Classifier(Protocol):
    """What answers for batches of images."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of the answers."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of an image as `sources.read_image` makes it: (size, size, channels)."""
        ...

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The probability of each class, float32 (N, classes).

        Args:
          images: (N, size, size, channels), uint8.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained net, on one device, whatever it was trained on. A `Classifier`.

    Attributes:
      name: of the net, among `ALEXNETS`.
      net: the net.
      classes: their names, in their order.
      weights: float32, with the mean and the deviation of pixels.
      origin: where the weights come from, as JSON has it.
      dtype: what the net computes in.
      ten_crop: whether the answers for ten crops of an image are averaged.
    """

    name: str
    net: AlexNetConfig
    classes: tuple[str, ...]
    weights: Weights
    origin: dict[str, Any]
    dtype: str = "float32"
    ten_crop: bool = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of images before they are cropped."""
        size = self.net.stored_size
        return size, size, self.net.image_channels

    @functools.cached_property
    def arrays(self) -> dict[str, Any]:
        """All that was learned, by the names that `weights.write_weights` gives them."""
        params, mean, std = self.weights
        return by_name(params) | {"mean": mean, "std": std}

    def probabilities(self, arrays: dict[str, Any], images: jax.Array) -> jax.Array:
        """The probability of each class, as the net is tested in training.

        Args:
          arrays: as `arrays`; a net of other weights answers otherwise.
          images: (N, size, size, channels), uint8.

        Returns:
          float32, (N, classes).
        """
        params = jax.tree.unflatten(
            jax.tree.structure(self.weights.params),
            [arrays[name] for name in by_name(self.weights.params)],
        )
        trainer = Trainer(
            tower_net(self.net, make_mesh(1, 1), implementation=None, dtype=self.dtype),
            # What remains of a recipe when there is nothing to train.
            Recipe(ten_crop=self.ten_crop, schedule="constant", warmup_epochs=0.0),
            Preprocessing(arrays["mean"], arrays["std"], colours=np.zeros(0, np.float32)),
            image_size=self.net.image_size,
            steps=1,
            steps_per_epoch=1,
            flip=False,
            seed=0,
        )
        return jnp.exp(trainer.answers(trainer.net.whole(params), images))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """See `Classifier`. Each size of a batch is compiled once."""
        return np.asarray(self._compiled(self.arrays, images))

    @functools.cached_property
    def _compiled(self) -> Any:
        return jax.jit(self.probabilities)


def of_run(folder: Path, checkpoint: str = NEWEST) -> Trained:
    """The net of a run: the running mean of its parameters, if the run has one.

    Nothing is changed in the folder, so that the run may still be going on.

    Args:
      folder: of the run.
      checkpoint: "newest", "best" (that with the least top-1 error, of those that were tested and
        are still there), or its step.

    Raises:
      UsageError: the folder is not that of a run, or there is no such checkpoint.
    """
    config, saved = TrainConfig.load(folder / CONFIG)
    classes = saved.get("classes")
    if not isinstance(classes, list):
        raise UsageError(f"{folder / CONFIG} does not say which classes there are")
    preprocessing = Preprocessing.load(folder / PREPROCESSING)
    with user_errors():
        net = config.net_config(len(classes), len(preprocessing.std))
    step = _step(folder, checkpoint)
    average = bool(config.recipe.ema)
    return Trained(
        config.net,
        net,
        tuple(map(str, classes)),
        Weights(
            _restored(folder / CHECKPOINTS / str(step), "average" if average else "params", net),
            preprocessing.mean.astype(np.float32),
            preprocessing.std.astype(np.float32),
        ),
        {"step": step, "running_mean": average},
        config.recipe.dtype,
        config.recipe.ten_crop,
    )


def of_weights(path: Path, name: str, classes: Path) -> Trained:
    """A net with published weights.

    Args:
      path: see `weights.read_weights`.
      name: of the net, among `ALEXNETS`.
      classes: a text file with the name of a class in each line.

    Raises:
      UsageError: a file cannot be read, or they do not go together.
    """
    names = read_classes(classes)
    net = ALEXNETS[name](num_classes=len(names))
    try:
        weights = read_weights(path, net)
    except UsageError as error:
        # The last layer is as wide as there are names.
        if net.dense_names[-1] in str(error):
            raise UsageError(f"{error}; {classes} names {len(names)} classes") from error
        raise
    if weights.mean is None or weights.std is None:
        raise UsageError(
            f"{path} does not say what its net does to pixels (mean, std); export the run that it "
            "comes from, with --run-dir"
        )
    return Trained(name, net, names, jax.device_put(weights), {"weights": path.name})


def read_classes(path: Path) -> tuple[str, ...]:
    """The lines of a file; two classes may have the same name, as two of ImageNet's have.

    Raises:
      UsageError: it cannot be read, has fewer than two lines or an empty one between others.
    """
    try:
        lines = path.read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the classes in {path}: {error}") from error
    names = tuple(line.strip() for line in lines)
    if "" in names:
        raise UsageError(
            f"{path} must name a class in each line; line {names.index('') + 1} is empty"
        )
    if len(names) < 2:
        raise UsageError(f"{path} must name two classes or more, in a line each, got {len(names)}")
    return names


# Checkpoints, which are only read.


def _step(folder: Path, checkpoint: str) -> int:
    """The step of the checkpoint that is asked for."""
    steps = _steps(folder / CHECKPOINTS)
    if not steps:
        raise UsageError(f"no checkpoint in {folder / CHECKPOINTS}")
    known = ", ".join(map(str, steps))
    if checkpoint == NEWEST:
        return steps[-1]
    if checkpoint == BEST:
        # One that was tested twice counts as it was tested last.
        errors = {
            line["step"]: line["top1_error"]
            for line in read_metrics(folder)
            if line.get("kind") == "eval" and not math.isnan(line.get("top1_error", math.nan))
        }
        tested = [step for step in steps if step in errors]
        if not tested:
            raise UsageError(
                f"--checkpoint best: none in {folder} was tested; there are newest and {known}"
            )
        return min(tested, key=lambda step: (errors[step], -step))
    if not checkpoint.isdecimal() or int(checkpoint) not in steps:
        raise UsageError(f'--checkpoint must be newest, best or one of {known}, got "{checkpoint}"')
    return int(checkpoint)


def _steps(folder: Path) -> list[int]:
    """Of the whole checkpoints, in their order; one that is being written has another name."""
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal())


def _restored(folder: Path, which: str, net: AlexNetConfig) -> Any:
    """The parameters of a checkpoint, or their running mean, without the rest of it."""
    params = nnx.to_pure_dict(
        nnx.state(nnx.eval_shape(lambda: AlexNet(net, rngs=nnx.Rngs(0))), nnx.Param)
    )
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        which: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), params
        )
    }
    arguments = ocp.args.PyTreeRestore(
        wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore((folder / "state").absolute(), args=arguments)
        return jax.block_until_ready(restored[which])
    except Exception as error:
        # What orbax raises depends on which of its files is damaged.
        reason = str(error).partition("\n")[0]
        raise UsageError(f"cannot read the checkpoint {folder}: {reason}") from error
