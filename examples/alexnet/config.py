"""The settings of a run: dataclasses, which are the command line and `config.json` too."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from alexnet.checked import checked
from alexnet.errors import UsageError
from grouped_conv_jax.models import ALEXNETS, AlexNetConfig
from grouped_conv_jax.towers import Placement

MOST_DEVICES = 4096

CACHE = Path("~/.cache/grouped_conv_jax")

if TYPE_CHECKING:
    NetName = str
else:
    NetName = Literal[tuple(ALEXNETS)]

# In the help every line of a text stands by itself, so each is a sentence.


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the net is trained: what the losses depend on."""

    batch_size: int = 64
    """Images in a step, on all devices together."""

    accumulate: int = 1
    """Parts that the batch is computed in, one after the other, their gradients summed up."""

    learning_rate: float = 0.02
    """The highest learning rate, for a whole batch."""

    warmup_epochs: float = 1.0
    """Epochs in which the learning rate rises from 0, in a line."""

    schedule: Literal["cosine", "plateau", "steps", "constant"] = "cosine"
    """How the learning rate falls: as a cosine to 0, divided by ten or not at all.
    "plateau" divides once the top-1 error on the test images has not fallen for --patience epochs.
    "steps" divides after each of --drop-epochs."""

    patience: int = 5
    """With --schedule plateau: epochs without progress before the learning rate is divided."""

    most_drops: int = 3
    """With --schedule plateau: how often it is divided at most."""

    drop_epochs: tuple[float, ...] = ()
    """With --schedule steps: the epochs after which the learning rate is divided."""

    momentum: float = 0.9
    """Decay of the momentum, which has the learning rate inside, as in the paper."""

    weight_decay: float = 5e-4
    """Added to the gradient, times the weight."""

    decay_biases: bool = True
    """Whether biases decay as kernels do."""

    bias_rate: float = 1.0
    """Learning rate of the biases over that of the kernels, 2 in the code of 2012."""

    lars: float = 0.0
    """The trust coefficient of LARS for kernels, such as 0.001, for large batches; 0 is none."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What convolutions and products are computed in; parameters are float32 always.
    For float16 the loss is scaled, by as much as its gradients can bear."""

    ema: float = 0.0
    """Decay of a running mean of the parameters, such as 0.9999, which is then tested; 0 is none.
    In the first steps the decay is less, so that the initial parameters do not linger."""

    normalization: Literal["standard", "mean"] = "standard"
    """What is done to pixels: mean 0 and deviation 1 for each channel of the training images.
    "mean" as in the paper: their mean image is subtracted from pixels of 0 to 255.
    Published weights (--weights) bring their own with them."""

    colour: float = 0.0
    """Deviation of the paper's shifts along the principal colours of the images, 0.1 there."""

    ten_crop: bool = False
    """Whether tests average the answers for four corners, the middle, and all of them mirrored."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """Where it runs; the losses do not depend on it, and it may change with --resume."""

    mesh: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="DATA GROUP")] = None
    """Devices along the two axes of the mesh: examples are spread over DATA, towers over GROUP.
    By default the towers get as many devices as can share them, and the examples the rest.
    Without an accelerator there are as many devices as towers."""

    placement: Placement = "shard_map"
    """How the net comes to its devices.
    "jit" leaves the computation of the whole net to XLA, which cuts it up.
    "shard_map" runs the program of one device on each, "pmap" the same in the older way of JAX."""

    implementation: str | None = None
    """How to convolve: a name from grouped_conv_jax.implementations(), or None to choose."""

    compile_only: Annotated[str | None, tyro.conf.arg(metavar="TOPOLOGY")] = None
    """Compile a training step for a TPU that is not there, such as v5e:4x4, report it, and stop.
    --mesh divides the topology's devices, by default all; --placement is shard_map or jit.
    The images are read for their shape only. Needs libtpu, which pip install "jax[tpu]" brings."""

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

    def cpu_devices(self, towers: int) -> int | None:
        """As how many devices this process's CPU shall count; accelerators are what there is."""
        if self.distributed:
            return None
        wanted = math.prod(self.mesh) if self.mesh else towers
        return max(1, wanted // (self.num_processes or 1))

    def check(self) -> None:
        """Raises UsageError for what does not go together."""
        if self.mesh and min(self.mesh) < 1:
            raise UsageError(f"--mesh must be two numbers of at least 1, got {self.mesh}")
        if self.mesh and math.prod(self.mesh) > MOST_DEVICES:
            raise UsageError(f"--mesh must be at most {MOST_DEVICES} devices, got {self.mesh}")
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
        if self.compile_only is not None and self.several_processes:
            raise UsageError("--compile-only runs in one process")
        if self.compile_only is not None and self.placement == "pmap":
            raise UsageError("--compile-only knows --placement shard_map and jit, not pmap")
        if self.several_processes and self.placement == "pmap":
            raise UsageError("--placement pmap runs in one process; take shard_map or jit")


@dataclasses.dataclass(frozen=True)
class Work:
    """What is read, written and shown; the losses do not depend on it either."""

    workers: int = 0
    """Processes that read and decode images; 0 does it in threads of this one."""

    max_damaged: int = 100
    """Images that cannot be read before the run stops, in each process since its start.
    Each is named, and another is taken."""

    profile_input: bool = False
    """Measure how fast images are read and how fast they are trained on, and stop."""

    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""

    tensorboard: bool = True
    """Whether to write the metrics for TensorBoard, too."""

    checkpoint_every: int = 0
    """Steps between two checkpoints, besides those after every epoch; 0 makes no others."""

    keep: int = 2
    """Newest checkpoints that are kept, besides the one with the least error."""

    profile_steps: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="FIRST LAST")] = None
    """Steps that JAX's profiler records, into the run folder."""

    dump_hlo: bool = False
    """Whether to write the program of a training step into the run folder, as made and compiled."""

    cache: Path | None = CACHE
    """Folder for compiled programs and statistics of the images, so that they are made once."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Trains the two-tower AlexNet of 2012, its towers on different devices.

    Without arguments: the small net, on the handwritten digits that scikit-learn ships, its two
    towers on two devices.
    """

    data: str = "digits"
    """What to train on: digits, photos, synthetic[:N], folder:DIR, records:DIR or tfds:NAME.
    Digits are handwritten, of 10 classes; photos are crops of ten colour photographs, a class each.
    A folder has one folder of images for each class below DIR, or below DIR/train and DIR/test.
    Records are what pack_records.py makes of it; tfds is a set of TensorFlow Datasets, prepared."""

    net: NetName = "small"
    """The net: "paper" is that of the article, "small" one like it for 32-pixel images."""

    towers: int | None = None
    """Towers that the net is cut into, by default the net's own number, 2 in the paper."""

    epochs: int = 20
    """Passes over the training images. With --resume another number extends or shortens the run.
    --schedule cosine then falls to 0 at the new end, so the learning rate jumps.
    Under the other schedules the learning rate does not change, unless the run is so short
    that half of its steps are fewer than --warmup-epochs."""

    steps: int | None = None
    """Steps to train, instead of --epochs."""

    eval_only: bool = False
    """Test a net, with --resume that of the newest checkpoint, or --weights, and stop."""

    weights: Path | None = None
    """Published weights to begin with: .onnx (Caffe), .safetensors or .npz (torchvision, ours)."""

    seed: int = 0
    """Of the initial weights, the order of the images, the crops and dropout."""

    run_dir: Path | None = None
    """Folder for config.json, metrics.jsonl, checkpoints and pictures.
    By default a new one below runs/.
    With --resume the one below runs/ that was begun or extended last."""

    resume: bool = False
    """Go on from the newest checkpoint of a run, with its settings.
    Only --epochs, --steps and the devices and work options may be others."""

    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    devices: Devices = dataclasses.field(default_factory=Devices)
    work: Work = dataclasses.field(default_factory=Work)

    def check(self) -> None:
        """Raises UsageError for numbers that mean nothing, and for what does not go together."""
        recipe, work = self.recipe, self.work
        for part, names in (
            (self, ("epochs", "steps", "towers")),
            (recipe, ("batch_size", "accumulate", "patience")),
            (work, ("log_every", "keep")),
        ):
            for name in names:
                value = getattr(part, name)
                if value is not None and value < 1:
                    raise UsageError(f"--{option(name)} must be at least 1, got {value}")
        rates = (
            *("learning_rate", "warmup_epochs", "momentum", "weight_decay", "bias_rate", "lars"),
            *("ema", "colour", "most_drops"),
        )
        for part, names in (
            (self, ("seed",)),
            (recipe, rates),
            (work, ("workers", "max_damaged", "checkpoint_every")),
        ):
            for name in names:
                if not 0 <= getattr(part, name) < float("inf"):
                    raise UsageError(
                        f"--{option(name)} must be 0 or more, got {getattr(part, name)}"
                    )
        if self.seed >= 2**32:
            raise UsageError(f"--seed must be less than 2**32, got {self.seed}")
        if recipe.ema >= 1:
            raise UsageError(f"--ema must be less than 1, got {recipe.ema}")
        if recipe.batch_size % recipe.accumulate:
            raise UsageError(
                f"a batch of {recipe.batch_size} images cannot be computed in "
                f"{recipe.accumulate} equal parts"
            )
        if recipe.schedule == "steps" and not recipe.drop_epochs:
            raise UsageError("--schedule steps needs --drop-epochs, such as --drop-epochs 30 60")
        if (steps := work.profile_steps) and not 0 < steps[0] <= steps[1]:
            raise UsageError(f"--profile-steps must be FIRST <= LAST, from 1 on, got {steps}")
        if self.eval_only and not (self.resume or self.weights):
            raise UsageError("--eval-only needs --resume or --weights")
        self.devices.check()
        unlike = [
            option(name)
            for name, usual in (("accumulate", 1), ("lars", 0.0), ("ten_crop", False))
            if getattr(recipe, name) != usual
        ] + ["dtype float16"] * (recipe.dtype == "float16")
        if self.devices.placement == "pmap" and unlike:
            raise UsageError(f"--placement pmap does not know --{unlike[0]}; take shard_map or jit")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Returns the number of steps that --steps or --epochs asks for."""
        return self.epochs * steps_per_epoch if self.steps is None else self.steps

    def net_config(self, num_classes: int, image_channels: int) -> AlexNetConfig:
        """The net that these settings ask for, for the images at hand.

        Raises:
          ValueError: there is none.
        """
        net = ALEXNETS[self.net](
            towers=self.towers, num_classes=num_classes, image_channels=image_channels
        )
        net.check()
        return net

    def save(self, path: Path, **more: Any) -> None:
        """Writes the settings, and what else a later `--resume` is compared with."""
        settings = dataclasses.asdict(self)
        # Of this process and of this start, not of the run.
        for name in ("run_dir", "resume", "eval_only"):
            del settings[name]
        of_this_process = ("distributed", "coordinator", "num_processes", "process_id")
        for name in ("compile_only", *of_this_process):
            del settings["devices"][name]
        del settings["work"]["profile_input"]
        text = json.dumps({"settings": settings, **more}, indent=2, default=str)
        path.write_text(text + "\n")

    @classmethod
    def load(cls, path: Path) -> tuple["TrainConfig", dict[str, Any]]:
        """The settings that a run has written, and what else was saved.

        Raises:
          UsageError: there are none, or one of them is unknown or of a wrong type.
        """
        try:
            saved = json.loads(path.read_text())
            settings = dict(saved.pop("settings"))
        except OSError as error:
            raise UsageError(f"no settings in {path}: {error.strerror}") from error
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise UsageError(f"{path} is not what a run has written") from error
        return checked(cls, settings, path), saved

    def check_same_as(self, saved: "TrainConfig") -> None:
        """Raises UsageError where a resumed run would train otherwise than it began.

        The length of the run may change (`alexnet.training.extension`).
        """
        if self.steps is not None and self.epochs != saved.epochs:
            raise UsageError(
                f"--epochs {self.epochs} has no effect on a run of --steps {self.steps}; change "
                "--steps instead"
            )
        before, now = (_flat(_of_the_run(config)) for config in (saved, self))
        for name in before:
            if before[name] != now[name]:
                raise UsageError(
                    f"the run to resume was started with --{option(name)} {before[name]}, "
                    f"not {now[name]}"
                )


def option(name: str) -> str:
    """A setting as the command line has it."""
    return name.replace("_", "-")


def _of_the_run(config: TrainConfig) -> TrainConfig:
    """The same settings where they may not change, and defaults elsewhere."""
    usual = TrainConfig()
    may_change = ("devices", "work", "epochs", "steps", "run_dir", "resume", "eval_only")
    return dataclasses.replace(config, **{name: getattr(usual, name) for name in may_change})


def _flat(config: TrainConfig) -> Mapping[str, Any]:
    """Every setting by its name, which is its own whatever part it is in."""
    settings = {}
    for name, value in vars(config).items():
        settings |= vars(value) if dataclasses.is_dataclass(value) else {name: value}
    return settings
