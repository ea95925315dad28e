"""A trained net that is put to use: that of a run's checkpoint, or of published weights.

Its answers are a function of arrays alone, `Trained.probabilities`, which `export` writes down.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet.config import TrainConfig
from alexnet.data.augmentation import Preprocessing
from alexnet.errors import UsageError
from alexnet.model_io.checkpoints import Checkpoints
from alexnet.model_io.weights import Weights, abstract_params, by_name, named_arrays, read_weights
from alexnet.training.run import CHECKPOINTS, CONFIG, PREPROCESSING, user_errors
from alexnet.training.trainer import answers, tower_net
from grouped_conv_jax.models import ALEXNETS, AlexNetConfig
from grouped_conv_jax.towers import make_mesh


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained net, on one device, whatever it was trained on.

    Attributes:
      name: the name of the net among `ALEXNETS`.
      net: the net.
      classes: the names of the classes, in the order of the answers.
      weights: float32, with the mean and the deviation of pixels.
      origin: the source of the weights, as JSON has it.
      dtype: the dtype of the computation.
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
        """The shape of an image as `sources.read_image` makes it: (size, size, channels)."""
        size = self.net.stored_size
        return size, size, self.net.image_channels

    @functools.cached_property
    def arrays(self) -> dict[str, Any]:
        """All that was learned, by name."""
        return named_arrays(self.weights)

    def probabilities(self, arrays: dict[str, Any], images: jax.Array) -> jax.Array:
        """Returns the probability of each class, float32 (N, classes), as in the run's tests.

        `arrays` are those of the attribute, and `images` are (N, size, size, channels), uint8.
        """
        params = jax.tree.unflatten(
            jax.tree.structure(self.weights.params),
            [arrays[name] for name in by_name(self.weights.params)],
        )
        net = tower_net(self.net, make_mesh(1, 1), implementation=None, dtype=self.dtype)
        prepared = Preprocessing(arrays["mean"], arrays["std"], colours=np.zeros(0, np.float32))
        size = self.net.image_size
        return jnp.exp(
            answers(net.whole(params), images, prepared, size=size, ten_crop=self.ten_crop)
        )

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Returns the probability of each class. Each size of a batch is compiled once."""
        return np.asarray(self._compiled(self.arrays, images))

    @functools.cached_property
    def _compiled(self) -> Any:
        return jax.jit(self.probabilities)


def of_run(folder: Path, checkpoint: str) -> Trained:
    """Returns the net of a run, with the running mean of its parameters if the run has one.

    Nothing is changed in the folder, so the run may still be going on. `Checkpoints.choose` says
    what `checkpoint` may be.
    """
    config, saved = TrainConfig.load(folder / CONFIG)
    if not isinstance(classes := saved.get("classes"), list):
        raise UsageError(f"{folder / CONFIG} does not say which classes there are")
    preprocessing = Preprocessing.load(folder / PREPROCESSING)
    with user_errors():
        net = config.net_config(len(classes), len(preprocessing.std))
    if not (folder / CHECKPOINTS).is_dir():
        raise UsageError(f"no checkpoint in {folder / CHECKPOINTS}")
    checkpoints = Checkpoints(folder / CHECKPOINTS, read_only=True)
    step, average = checkpoints.choose(checkpoint), bool(config.recipe.ema)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract_params(net)
    )
    params = checkpoints.read_part(step, "average" if average else "params", like)
    checkpoints.close()
    return Trained(
        config.net,
        net,
        tuple(map(str, classes)),
        Weights(params, preprocessing.mean, preprocessing.std),
        {"step": step, "running_mean": average},
        config.recipe.dtype,
        config.recipe.ten_crop,
    )


def of_weights(path: Path, name: str, classes: Path) -> Trained:
    """Returns the net of a name with published weights.

    `classes` is a text file with the name of a class in each line.
    """
    try:
        lines = classes.read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the classes in {classes}: {error}") from error
    names = tuple(line.strip() for line in lines)
    if "" in names or len(names) < 2:
        raise UsageError(f"{classes} must name two classes or more, one in each line")
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
