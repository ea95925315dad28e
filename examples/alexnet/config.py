"""The settings of a run. The dataclasses are both the command line and `config.json`."""

import dataclasses
import difflib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import dacite
import tyro

from alexnet.errors import UsageError
from grouped_conv_jax.models import ALEXNETS, AlexNetConfig
from grouped_conv_jax.towers import Placement

if TYPE_CHECKING:
    NetName = str
else:
    NetName = Literal[tuple(ALEXNETS)]

# tyro prints each line of these docstrings by itself, so each line is a sentence.


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the net is trained. The losses depend on these settings."""

    batch_size: int = 64
    """Images in a step, on all devices together."""

    accumulate: int = 1
    """Parts of a batch that are computed one after the other; their gradients are averaged."""

    learning_rate: float = 0.02
    """The highest learning rate, for a whole batch."""

    warmup_epochs: float = 1.0
    """Epochs in which the learning rate rises linearly from 0."""

    schedule: Literal["cosine", "plateau", "steps", "constant"] = "cosine"
    """How the learning rate falls: as a cosine to 0, divided by ten, or not at all.
    "plateau" divides once the top-1 test error has not fallen for --patience epochs.
    "steps" divides after each of --drop-epochs."""

    patience: int = 5
    """With --schedule plateau: epochs without progress before the learning rate is divided."""

    most_drops: int = 3
    """With --schedule plateau: how often the learning rate is divided at most."""

    drop_epochs: tuple[float, ...] = ()
    """With --schedule steps: the epochs after which the learning rate is divided."""

    momentum: float = 0.9
    """Decay of the momentum, which has the learning rate inside, as in the paper."""

    weight_decay: float = 5e-4
    """Times the weight, this is added to the gradient."""

    decay_biases: bool = True
    """Whether biases decay as kernels do."""

    bias_rate: float = 1.0
    """Learning rate of the biases divided by that of the kernels; 2 in the code of 2012."""

    lars: float = 0.0
    """The trust coefficient of LARS for kernels, such as 0.001, for large batches; 0 is none."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The type of convolutions and matrix products; parameters are always float32.
    With float16 the loss is scaled, by as much as its gradients can bear."""

    ema: float = 0.0
    """Decay of a running mean of the parameters, such as 0.9999, which is tested; 0 is none.
    In the first steps the decay is smaller, so that the initial parameters do not linger."""

    normalization: Literal["standard", "mean"] = "standard"
    """How pixels are normalized: to mean 0 and deviation 1 for each channel.
    "mean" subtracts the mean training image from pixels of 0 to 255, as in the paper.
    Published weights (--weights) bring their own normalization."""

    colour: float = 0.0
    """Deviation of the paper's shifts along the principal colours, 0.1 in the paper."""

    ten_crop: bool = False
    """Whether tests average the answers for four corners, the middle, and their mirror images."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """Where the run computes. The losses do not depend on it; --resume may change it."""

    mesh: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="DATA GROUP")] = None
    """Devices along the axes of the mesh: examples are divided over DATA, towers over GROUP.
    By default the towers get as many devices as can share them, and the examples the rest.
    Without an accelerator there are as many devices as towers."""

    placement: Placement = "shard_map"
    """How the net is placed on its devices.
    "jit" leaves the partition of the whole net to XLA.
    "shard_map" runs the program of one device on each, "pmap" the same in JAX's older way."""

    implementation: str | None = None
    """How to convolve: a name from grouped_conv_jax.implementations(), or None to choose."""

    compile_only: Annotated[str | None, tyro.conf.arg(metavar="TOPOLOGY")] = None
    """Compile a training step for a TPU that is not there, such as v5e:4x4, report it, and stop.
    --mesh divides the topology's devices, by default all; --placement is shard_map or jit.
    The images are read for their shape only. Needs libtpu, which pip install "jax[tpu]" brings."""

    distributed: bool = False
    """Join the processes that the cluster names: SLURM, Open MPI, Kubernetes or Cloud TPU."""

    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Join processes that are started by hand: the address of process 0."""

    num_processes: int | None = None
    """With --coordinator: the number of processes."""

    process_id: int | None = None
    """With --coordinator: the number of this process, from 0."""

    @property
    def several_processes(self) -> bool:
        return self.distributed or self.coordinator is not None

    def cpu_devices(self, towers: int) -> int | None:
        """Returns the number of devices that this process makes of its CPU, None for JAX's own."""
        if self.distributed:
            return None
        wanted = math.prod(self.mesh) if self.mesh else towers
        return max(1, wanted // (self.num_processes or 1))

    def check(self) -> None:
        """Raises UsageError for settings that do not go together."""
        if self.mesh and min(self.mesh) < 1:
            raise UsageError(f"--mesh must be two numbers of at least 1, got {self.mesh}")
        named = (self.coordinator, self.num_processes, self.process_id)
        if None in named and named != (None, None, None):
            raise UsageError("--coordinator, --num-processes and --process-id go together")
        if self.compile_only is not None and self.several_processes:
            raise UsageError("--compile-only runs in one process")
        if self.placement == "pmap" and (self.several_processes or self.compile_only is not None):
            raise UsageError(
                "--placement pmap is for devices of one process; take shard_map or jit"
            )


@dataclasses.dataclass(frozen=True)
class Work:
    """What the run reads, writes and shows. The losses do not depend on it."""

    workers: int = 0
    """Processes that read and decode images; with 0, threads of this process do it."""

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
    """Number of the newest checkpoints that are kept, besides the one with the least error."""

    profile_steps: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="FIRST LAST")] = None
    """Steps that JAX's profiler records, into the run folder."""

    dump_hlo: bool = False
    """Whether to write the program of a training step into the run folder, lowered and compiled."""

    cache: Path | None = Path("~/.cache/grouped_conv_jax")
    """Folder for compiled programs, so that a second start compiles nothing."""


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
    pack_records.py makes records of a folder; tfds is a prepared set of TensorFlow Datasets."""

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
    """Seed of the initial weights, the order of the images, the crops and dropout."""

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

    def flat(self) -> dict[str, Any]:
        """Returns every setting by its name, which is unique whatever part it is in."""
        settings = {}
        for name, value in vars(self).items():
            settings |= vars(value) if dataclasses.is_dataclass(value) else {name: value}
        return settings

    def check(self) -> None:
        """Raises UsageError for numbers out of range, and for settings that do not go together."""
        settings, recipe = self.flat(), self.recipe
        least = dict.fromkeys(AT_LEAST_1, 1) | dict.fromkeys(AT_LEAST_0, 0)
        for name, bound in least.items():
            if (value := settings[name]) is not None and not bound <= value < math.inf:
                raise UsageError(f"--{option(name)} must be at least {bound}, got {value}")
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
        if (steps := self.work.profile_steps) and not 0 < steps[0] <= steps[1]:
            raise UsageError(f"--profile-steps must be FIRST <= LAST, from 1 on, got {steps}")
        if self.eval_only and not (self.resume or self.weights):
            raise UsageError("--eval-only needs --resume or --weights")
        self.devices.check()
        for name in ("accumulate", "lars", "ten_crop", "dtype"):
            supported = (getattr(Recipe, name), "bfloat16")
            if self.devices.placement == "pmap" and settings[name] not in supported:
                raise UsageError(
                    f"--placement pmap does not support --{option(name)} {settings[name]}; "
                    "take shard_map or jit"
                )

    def total_steps(self, steps_per_epoch: int) -> int:
        """Returns the number of steps that --steps or --epochs asks for."""
        return self.epochs * steps_per_epoch if self.steps is None else self.steps

    def net_config(self, num_classes: int, image_channels: int) -> AlexNetConfig:
        """Returns the net for these classes and channels. Raises ValueError if there is none."""
        net = ALEXNETS[self.net](
            towers=self.towers, num_classes=num_classes, image_channels=image_channels
        )
        net.check()
        return net

    def save(self, path: Path, **more: Any) -> None:
        """Writes the settings of the run, and `more`, to a JSON file."""
        settings = dataclasses.asdict(self)
        for part in (settings, settings["devices"], settings["work"]):
            for name in OF_THIS_START & part.keys():
                del part[name]
        text = json.dumps({"settings": settings, **more}, indent=2, default=str)
        path.write_text(text + "\n")

    @classmethod
    def load(cls, path: Path) -> tuple["TrainConfig", dict[str, Any]]:
        """Returns the settings of a file that `save` wrote, and what else is in the file.

        Raises:
          UsageError: there is no file, or a setting is unknown or of a wrong type.
        """
        hooks: Any = {Path: lambda x: Path(x) if isinstance(x, str) else x}
        try:
            saved = json.loads(path.read_text())
            settings = saved.pop("settings")
            types = dacite.Config(strict=True, cast=[tuple], type_hooks=hooks)
            return dacite.from_dict(cls, settings, types), saved
        except OSError as error:
            raise UsageError(f"no settings in {path}: {error.strerror}") from error
        except dacite.UnexpectedDataError as error:
            known = [*cls().flat(), *vars(cls())]
            raise _unknown(path, "setting", min(error.keys), known) from error
        except dacite.WrongTypeError as error:
            if get_origin(error.field_type) is Literal:
                known = get_args(error.field_type)
                raise _unknown(path, str(error.field_path), str(error.value), known) from error
            raise UsageError(f"{path}: {error}") from error
        except (dacite.DaciteError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise UsageError(f"{path} is not what a run has written: {error}") from error

    def check_same_as(self, saved: "TrainConfig") -> None:
        """Raises UsageError where a resumed run would train differently from how it began.

        The length of the run may change (`run.extension`).
        """
        if self.steps is not None and self.epochs != saved.epochs:
            raise UsageError(
                f"--epochs {self.epochs} has no effect on a run of --steps {self.steps}; change "
                "--steps instead"
            )
        may_change = {*vars(Devices()), *vars(Work()), "epochs", "steps", *OF_THIS_START}
        before, now = saved.flat(), self.flat()
        for name in before:
            if name not in may_change and before[name] != now[name]:
                raise UsageError(
                    f"the run to resume was started with --{option(name)} {before[name]}, "
                    f"not {now[name]}"
                )


AT_LEAST_1 = (
    *("epochs", "steps", "towers", "batch_size", "accumulate", "patience", "log_every", "keep"),
    "num_processes",
)
AT_LEAST_0 = (
    *("learning_rate", "warmup_epochs", "momentum", "weight_decay", "bias_rate", "lars", "ema"),
    *("colour", "most_drops", "seed", "workers", "max_damaged", "checkpoint_every", "process_id"),
)

OF_THIS_START = {
    *("run_dir", "resume", "eval_only", "profile_input", "compile_only"),
    *("distributed", "coordinator", "num_processes", "process_id"),
}
"""Settings of one start or one process, which a run does not keep."""


def _unknown(path: Path, what: str, word: str, known: Sequence[str]) -> UsageError:
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0)[0]
    return UsageError(f'{path}: unknown {what} "{word}"; the nearest is "{nearest}"')


def option(name: str) -> str:
    """Returns the name of a setting on the command line."""
    return name.replace("_", "-")
