"""The settings of a run: one dataclass, which is the command line and `config.json` too."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from alexnet.errors import UsageError
from grouped_conv_jax.models import AlexNetConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Trains the two-tower AlexNet of 2012, its towers on different devices.

    Without arguments: the small net, on the handwritten digits that scikit-learn ships, its two
    towers on two devices.
    """

    data: str = "digits"
    """What to train on: "digits" (handwritten, 10 classes), "photos" (crops of colour photographs,
    a class for each photograph), or "folder:DIR", with one folder of images for each class below
    DIR, or below DIR/train and DIR/test."""

    preset: Literal["small", "paper"] = "small"
    """The net: "small" for 32-pixel images, "paper" the 224-pixel net of the article."""

    towers: int = 2
    """Towers that the net is cut into; 2 in the paper. Divides the features of every layer."""

    mesh: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="DATA GROUP")] = None
    """Devices along the two axes of the mesh: examples are spread over DATA, towers over GROUP.
    By default the towers get as many devices as can share them, and examples the rest; without
    an accelerator there are two devices."""

    epochs: int = 20
    """Passes over the training images."""

    batch_size: int = 64
    """Images in a step, on all devices together."""

    learning_rate: float = 0.02
    """The highest learning rate: reached after the first epoch, then falling as a cosine to 0."""

    momentum: float = 0.9
    """Decay of the momentum, which has the learning rate inside, as in the paper."""

    weight_decay: float = 5e-4
    """Added to the gradient, times the weight."""

    seed: int = 0
    """Of the initial weights, the order of the images, the crops and dropout."""

    implementation: str | None = None
    """How the convolutions are computed: a name from grouped_conv_jax.implementations(), or None
    to choose for each."""

    run_dir: Path | None = None
    """Folder for config.json, metrics.jsonl, checkpoints and filters.png; by default a new one
    below runs/. With --resume the run to go on with, by default the newest one below runs/."""

    resume: bool = False
    """Go on from the newest checkpoint of a run that was started with the same settings."""

    def check(self) -> None:
        """Raises UsageError for numbers that mean nothing."""
        for name in ("epochs", "batch_size", "towers"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{_option(name)} must be at least 1, got {getattr(self, name)}")
        if self.mesh and min(self.mesh) < 1:
            raise UsageError(f"--mesh must be two numbers of at least 1, got {self.mesh}")
        for name in ("learning_rate", "momentum", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"--{_option(name)} must be 0 or more, got {getattr(self, name)}")

    def net(self, num_classes: int, image_channels: int) -> AlexNetConfig:
        """The net that these settings ask for, for the images at hand."""
        preset = {"small": AlexNetConfig.small, "paper": AlexNetConfig.paper}[self.preset]
        return dataclasses.replace(
            preset(towers=self.towers, num_classes=num_classes), image_channels=image_channels
        )

    def save(self, path: Path) -> None:
        """Writes what a later `--resume` is compared with."""
        path.write_text(json.dumps(self._settings(), indent=2) + "\n")

    def check_same_as(self, path: Path) -> None:
        """Raises UsageError where a resumed run would train otherwise than it began."""
        try:
            saved = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read the settings of the run to resume: {error}") from error
        for name, value in self._settings().items():
            # Devices and implementations may change: the losses do not depend on them.
            if name not in ("mesh", "implementation") and saved.get(name) != value:
                raise UsageError(
                    f"the run to resume was started with --{_option(name)} {saved.get(name)}, "
                    f"not {value}"
                )

    def _settings(self) -> dict[str, Any]:
        settings = dataclasses.asdict(self)
        for name in ("run_dir", "resume"):
            del settings[name]
        settings["mesh"] = self.mesh and list(self.mesh)
        return settings


def _option(name: str) -> str:
    return name.replace("_", "-")
