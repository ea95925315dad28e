"""The settings of a run: one dataclass, which is the command line and `config.json` too."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from alexnet.errors import UsageError
from grouped_conv_jax.models import AlexNetConfig
from grouped_conv_jax.towers import Placement

MOST_DEVICES = 4096

PROCESSES = ("distributed", "coordinator", "num_processes", "process_id")
"""Settings of one process, which are not those of the run."""

FREE = ("mesh", "placement", "implementation", *PROCESSES)
"""Settings that may change when a run is gone on with: the losses do not depend on them."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Trains the two-tower AlexNet of 2012, its towers on different devices.

    Without arguments: the small net, on the handwritten digits that scikit-learn ships, its two
    towers on two devices.
    """

    # In the help every line of a text stands by itself, so each is a sentence.

    data: str = "digits"
    """What to train on: "digits", "photos" or "folder:DIR".
    Digits are handwritten, of 10 classes; photos are crops of ten colour photographs, a class each.
    A folder has one folder of images for each class below DIR, or below DIR/train and DIR/test."""

    preset: Literal["small", "paper"] = "small"
    """The net: "small" for 32-pixel images, "paper" the 224-pixel net of the article."""

    towers: int = 2
    """Towers that the net is cut into, 2 in the paper; divides the features of every layer."""

    mesh: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="DATA GROUP")] = None
    """Devices along the two axes of the mesh: examples are spread over DATA, towers over GROUP.
    By default the towers get as many devices as can share them, and the examples the rest.
    Without an accelerator there are two devices."""

    epochs: int = 20
    """Passes over the training images."""

    batch_size: int = 64
    """Images in a step, on all devices together."""

    learning_rate: float = 0.02
    """The highest learning rate, reached after one epoch, from where it falls as a cosine to 0."""

    momentum: float = 0.9
    """Decay of the momentum, which has the learning rate inside, as in the paper."""

    weight_decay: float = 5e-4
    """Added to the gradient, times the weight."""

    seed: int = 0
    """Of the initial weights, the order of the images, the crops and dropout."""

    placement: Placement = "shard_map"
    """How the net comes to its devices; the losses do not depend on it.
    "jit" leaves the computation of the whole net to XLA, which cuts it up.
    "shard_map" runs the program of one device on each, "pmap" the same in the older way of JAX."""

    implementation: str | None = None
    """How to convolve: a name from grouped_conv_jax.implementations(), or None to choose."""

    run_dir: Path | None = None
    """Folder for config.json, metrics.jsonl, checkpoints and filters.png.
    By default a new one below runs/; with --resume the newest one below runs/."""

    resume: bool = False
    """Go on from the newest checkpoint of a run, with its settings.
    Only the devices (--mesh, --placement, the processes) and --implementation may be others."""

    distributed: bool = False
    """One of several processes, which the cluster names: SLURM, Open MPI, Kubernetes, Cloud TPU."""

    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """One of several processes, started by hand: where process 0 is to be found by the others."""

    num_processes: int | None = None
    """With --coordinator: how many processes there are."""

    process_id: int | None = None
    """With --coordinator: which of them this is, from 0."""

    @property
    def several_processes(self) -> bool:
        return self.distributed or self.coordinator is not None

    @property
    def cpu_devices(self) -> int | None:
        """As how many devices this process's CPU shall count; accelerators are what there is."""
        if self.distributed:
            return None
        wanted = math.prod(self.mesh) if self.mesh else 2
        return max(1, wanted // (self.num_processes or 1))

    def check(self) -> None:
        """Raises UsageError for numbers that mean nothing."""
        for name in ("epochs", "batch_size", "towers"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{_option(name)} must be at least 1, got {getattr(self, name)}")
        if self.mesh and min(self.mesh) < 1:
            raise UsageError(f"--mesh must be two numbers of at least 1, got {self.mesh}")
        if self.mesh and math.prod(self.mesh) > MOST_DEVICES:
            raise UsageError(f"--mesh must be at most {MOST_DEVICES} devices, got {self.mesh}")
        self._check_processes()
        if self.seed >= 2**32:
            raise UsageError(f"--seed must be less than 2**32, got {self.seed}")
        for name in ("learning_rate", "momentum", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"--{_option(name)} must be 0 or more, got {getattr(self, name)}")

    def _check_processes(self) -> None:
        named = (self.coordinator, self.num_processes, self.process_id)
        if None in named and named != (None, None, None):
            raise UsageError("--coordinator, --num-processes and --process-id go together")
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
                raise UsageError(f"--coordinator must be HOST:PORT, got {self.coordinator}")
        if self.num_processes is not None and self.process_id is not None:
            if self.num_processes < 1:
                raise UsageError(f"--num-processes must be at least 1, got {self.num_processes}")
            if not 0 <= self.process_id < self.num_processes:
                raise UsageError(
                    f"--process-id must be from 0 to {self.num_processes - 1}, "
                    f"got {self.process_id}"
                )
        if self.several_processes and self.placement == "pmap":
            raise UsageError("--placement pmap runs in one process; take shard_map or jit")

    def net(self, num_classes: int, image_channels: int) -> AlexNetConfig:
        """The net that these settings ask for, for the images at hand."""
        preset = {"small": AlexNetConfig.small, "paper": AlexNetConfig.paper}[self.preset]
        return dataclasses.replace(
            preset(towers=self.towers, num_classes=num_classes), image_channels=image_channels
        )

    def save(self, path: Path, **more: Any) -> None:
        """Writes the settings, and what else a later `--resume` is compared with."""
        settings = dataclasses.asdict(self)
        for name in ("run_dir", "resume", *PROCESSES):
            del settings[name]
        path.write_text(json.dumps(settings | more, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> tuple["TrainConfig", dict[str, Any]]:
        """The settings of the run in a folder, to be gone on with, and what else was saved.

        Raises:
          UsageError: there are none.
        """
        try:
            saved = json.loads((folder / "config.json").read_text())
            names = {field.name for field in dataclasses.fields(cls)} & saved.keys()
            settings = {name: saved.pop(name) for name in names}
            settings["mesh"] = settings["mesh"] and tuple(settings["mesh"])
            return cls(**settings, run_dir=folder, resume=True), saved
        except OSError as error:
            raise UsageError(f"nothing to resume: no run in {folder}") from error
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise UsageError(f"{folder / 'config.json'} is not what a run has written") from error

    def check_same_as(self, saved: "TrainConfig") -> None:
        """Raises UsageError where a resumed run would train otherwise than it began."""
        for field in dataclasses.fields(self):
            before, now = getattr(saved, field.name), getattr(self, field.name)
            if field.name not in FREE and before != now:
                raise UsageError(
                    f"the run to resume was started with --{_option(field.name)} {before}, "
                    f"not {now}"
                )


def _option(name: str) -> str:
    return name.replace("_", "-")
