"""Whole training steps of AlexNet, ResNeXt, MobileNet and ConvNeXt: here, on lax and in PyTorch.

python examples/benchmark_models.py --output results.json
python examples/benchmark_models.py --models mobilenet --batch 8 32 --dtype bfloat16
python examples/benchmark_models.py --help

A step is the forward pass, the backward pass and the update by SGD with momentum, on images of
noise that stay the same. The contenders train the same model: `ours` on this library, `lax` on
`lax.conv_general_dilated`, `torch` in PyTorch, in both of its memory formats, if it is installed.
"""

import dataclasses
import importlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax import lax
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import pytorch
from benchmarks.machine import cores, environment
from benchmarks.measure import interleaved
from grouped_conv_jax import count_multiply_adds, grouped_conv
from grouped_conv_jax.models import AlexNet, AlexNetConfig, ConvNeXt, MobileNet, ResNeXt
from grouped_conv_jax.nnx import GroupedConv

ModelName = Literal["alexnet", "resnext50", "mobilenet", "convnext_tiny"]
ContenderName = Literal["ours", "lax", "torch"]

CONVOLUTIONS = {"ours": grouped_conv, "lax": lax.conv_general_dilated}

NUM_CLASSES = 1000
LEARNING_RATE, MOMENTUM = 1e-4, 0.9
"""So little that few images are not learnt by heart, which makes of gradients denormal numbers."""

WIDE = 120
"""Columns of the table, also where the terminal has fewer or is a file."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as it is measured if the options do not say otherwise."""

    title: str
    batches: tuple[int, ...]
    pixels: int


MODELS: dict[ModelName, Model] = {
    "alexnet": Model("AlexNet-2012", (16, 64), 227),
    "resnext50": Model("ResNeXt-50 32x4d", (8,), 224),
    "mobilenet": Model("MobileNet v1", (8,), 224),
    "convnext_tiny": Model("ConvNeXt-T", (8,), 224),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures whole training steps of well-known models with grouped convolutions."""

    models: tuple[ModelName, ...] = get_args(ModelName)
    """The models to train."""

    contenders: tuple[ContenderName, ...] = get_args(ContenderName)
    """What to train them with."""

    batch: tuple[int, ...] = ()
    """Images in a step, one number or several. Without it AlexNet has 16 and 64, the others 8."""

    pixels: int | None = None
    """Pixels along an edge of an image. Without it AlexNet has 227, the others 224."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """What is computed in; parameters and their updates are float32."""

    turns: int = 3
    """How often each contender's turn comes; the first step of a turn is not timed."""

    calls: int = 3
    """Timed steps in a turn."""

    budget: float = 60.0
    """A contender whose timed steps have taken more seconds makes no more."""

    output: Path | None = None
    """The JSON file to write."""

    def __post_init__(self):
        for name in ("batch", "pixels", "turns", "calls"):
            for number in np.ravel(getattr(self, name) or ()):
                if number < 1:
                    raise ValueError(f"--{name} must be at least 1, got {number}")


@dataclasses.dataclass(frozen=True)
class Task:
    """One model, trained on batches of one shape."""

    name: ModelName
    batch: int
    pixels: int
    dtype: str

    @property
    def title(self) -> str:
        return MODELS[self.name].title

    def net(self, contender: Literal["ours", "lax"]) -> nnx.Module:
        """The model, all of whose convolutions are one contender's."""
        return build(self.name, self.pixels, CONVOLUTIONS[contender], jnp.dtype(self.dtype))

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """Images (N, H, W, 3) and labels, the same every time."""
        draw = np.random.default_rng(0)
        images = draw.standard_normal((self.batch, self.pixels, self.pixels, 3), np.float32)
        return images, draw.integers(NUM_CLASSES, size=self.batch, dtype=np.int32)

    def figures(self) -> dict[str, Any]:
        """The task itself, the model's parameters and its multiply-adds for one image.

        Raises:
          ValueError: the images are too small for the model.
        """
        graphdef, params, rest = nnx.split(nnx.eval_shape(lambda: self.net("ours")), nnx.Param, ...)
        image = jax.ShapeDtypeStruct((1, self.pixels, self.pixels, 3), self.dtype)

        def forward(params, rest, image):
            return logits(nnx.merge(graphdef, params, rest), image, jax.random.key(0))

        return dataclasses.asdict(self) | {
            "model": self.title,
            "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
            "multiply_adds": count_multiply_adds(forward, params, rest, image),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    try:
        options = tyro.cli(Options, args=arguments)
        tasks = [
            Task(name, batch, options.pixels or MODELS[name].pixels, options.dtype)
            for name in options.models
            for batch in options.batch or MODELS[name].batches
        ]
        figures = [task.figures() for task in tasks]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    # Seconds of compilation are not those of reading a file.
    jax.config.update("jax_enable_compilation_cache", False)
    console = Console(soft_wrap=True)
    reason = pytorch.missing() if "torch" in options.contenders else None
    if reason:
        console.print(f"torch is left out: {reason}")
    elif "torch" in options.contenders:
        pytorch.use_cores(cores())
    names: list[ContenderName] = [n for n in options.contenders if n != "torch" or not reason]
    if not names:
        print("error: no contender is left", file=sys.stderr)
        sys.exit(2)
    settings = dataclasses.asdict(dataclasses.replace(options, output=None))
    about = {"environment": environment(), "options": settings}
    results = []
    for task, of_task in zip(tasks, figures, strict=True):
        with console.status(f"{task.title}, batch {task.batch}"):
            results.append(of_task | {"contenders": measure(task, names, options)})
        if options.output:
            # After each, so that a run that is stopped leaves what it has measured.
            options.output.parent.mkdir(parents=True, exist_ok=True)
            report = {**about, "results": results}
            options.output.write_text(json.dumps(report, indent=1) + "\n")
    Console(width=WIDE).print(table(results, about["environment"]))


def measure(task: Task, names: Sequence[ContenderName], options: Options) -> dict[str, Any]:
    """The figures of each contender; of PyTorch's memory formats each is one."""
    contenders: dict[str, Any] = {}
    for name in names:
        if name == "torch":
            contenders |= torch_trainings(task)
        else:
            contenders[name] = JaxTraining(task, name)
    seconds = interleaved(
        contenders, turns=options.turns, calls=options.calls, budget=options.budget
    )
    measured = {}
    for name, contender in contenders.items():
        times = seconds[name]
        quartiles = statistics.quantiles(times, method="inclusive") if len(times) > 1 else times * 3
        measured[name] = {
            "images_per_second": task.batch / quartiles[1],
            "seconds": {
                "median": quartiles[1],
                "quartiles": quartiles[::2],
                "min": min(times),
                "max": max(times),
                "all": times,
            },
            "compile_seconds": contender.compile_seconds,
            "memory": contender.memory,
            "losses": contender.losses,
        }
    return measured


class State(NamedTuple):
    """What a training step takes and gives: all of it is donated."""

    step: jax.Array
    params: Any
    rest: Any
    opt_state: Any


class JaxTraining:
    """Training steps of one model; a call is one step, and returns when all is computed."""

    def __init__(self, task: Task, contender: Literal["ours", "lax"]):
        graphdef, params, rest = nnx.split(task.net(contender), nnx.Param, ...)
        optimizer = optax.sgd(LEARNING_RATE, MOMENTUM)
        self.state = State(jnp.zeros((), jnp.int32), params, rest, optimizer.init(params))
        self.batch = jax.device_put(task.data())
        self.losses: list[float] = []

        def loss(params, rest, images, labels, key):
            params, images = jax.tree.map(lambda x: x.astype(task.dtype), (params, images))
            return mean_loss(nnx.merge(graphdef, params, rest, copy=True), images, labels, key)

        def step(state: State, images: jax.Array, labels: jax.Array):
            key = jax.random.fold_in(jax.random.key(0), state.step)
            gradient = jax.value_and_grad(loss, has_aux=True)
            (value, rest), grads = gradient(state.params, state.rest, images, labels, key)
            updates, opt_state = optimizer.update(grads, state.opt_state)
            params = optax.apply_updates(state.params, updates)
            return State(state.step + 1, params, rest, opt_state), value

        began = time.perf_counter()
        self.compiled = jax.jit(step, donate_argnums=0).lower(self.state, *self.batch).compile()
        self.compile_seconds = time.perf_counter() - began

    def __call__(self) -> None:
        self.state, loss = jax.block_until_ready(self.compiled(self.state, *self.batch))
        self.losses.append(float(loss))

    @property
    def memory(self) -> dict[str, int] | None:
        """Bytes of the compiled step; `peak` is of all, what is updated in place counted once."""
        analysis = self.compiled.memory_analysis()
        if analysis is None:
            return None
        kinds = ("argument", "output", "alias", "temp")
        sizes = {kind: getattr(analysis, f"{kind}_size_in_bytes") for kind in kinds}
        return sizes | {
            "peak": sizes["argument"] + sizes["output"] + sizes["temp"] - sizes["alias"]
        }


def torch_trainings(task: Task) -> dict[str, Any]:
    """PyTorch in each of its memory formats, on the kind of device that JAX uses."""
    torch_models = importlib.import_module("benchmarks.torch_models")
    models = {
        "alexnet": lambda: torch_models.AlexNet(alexnet_config(task.pixels)),
        "resnext50": torch_models.ResNeXt,
        "mobilenet": torch_models.MobileNet,
        "convnext_tiny": torch_models.ConvNeXt,
    }
    return {
        f"torch {memory_format}": torch_models.Training(
            models[task.name](),
            *task.data(),
            memory_format=memory_format,
            device="cpu" if jax.default_backend() == "cpu" else "cuda",
            dtype=task.dtype,
            learning_rate=LEARNING_RATE,
            momentum=MOMENTUM,
        )
        for memory_format in torch_models.MEMORY_FORMATS
    }


def build(
    name: ModelName, pixels: int, convolution: Callable[..., jax.Array], dtype: Any
) -> nnx.Module:
    """A model in training, all of whose convolutions are `convolution`."""
    if name == "alexnet":
        net = AlexNet(alexnet_config(pixels), rngs=nnx.Rngs(0))
        for i, layer in enumerate(net.convolutions):
            net.convolutions[i] = with_convolution(layer, convolution)
        return net
    model = {"resnext50": ResNeXt, "mobilenet": MobileNet, "convnext_tiny": ConvNeXt}[name]
    return model(NUM_CLASSES, conv_general_dilated=convolution, dtype=dtype, rngs=nnx.Rngs(0))


def with_convolution(layer: GroupedConv, convolution: Callable[..., jax.Array]) -> nnx.Conv:
    """Flax's own layer with the same parameters and settings, on another convolution."""
    padding: Any = layer.padding
    name = padding[0][0]
    made = nnx.Conv(
        layer.in_features,
        layer.out_features,
        layer.kernel_size,
        layer.strides,
        # lax has strings for all dimensions only.
        padding=name if isinstance(name, str) else padding,
        feature_group_count=layer.feature_group_count,
        conv_general_dilated=convolution,
        rngs=nnx.Rngs(0),
    )
    made.kernel, made.bias = layer.kernel, layer.bias
    return made


def alexnet_config(pixels: int) -> AlexNetConfig:
    """The paper's net for images of 227 pixels, of which conv1 sees all without padding."""
    paper = AlexNetConfig.paper()
    first, *others = paper.convolutions
    first = dataclasses.replace(first, padding=(0, 0))
    return dataclasses.replace(paper, image_size=pixels, convolutions=(first, *others))


def logits(net: Any, images: jax.Array, key: jax.Array) -> jax.Array:
    """Of a model in training; AlexNet is given its randomness, the others have their own."""
    if isinstance(net, AlexNet):
        return net(images, dropout_keys=jax.random.split(key, len(images)))
    return net(images)


def mean_loss(
    net: nnx.Module, images: jax.Array, labels: jax.Array, key: jax.Array
) -> tuple[jax.Array, Any]:
    """Returns the loss of a model in training, and its state other than the parameters."""
    scores = logits(net, images, key).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
    return jnp.mean(losses), nnx.split(net, nnx.Param, ...)[2]


def table(results: Sequence[dict[str, Any]], environment: dict[str, Any]) -> Table:
    """A line for each task; PyTorch's figures are those of its faster memory format."""
    versions = [f"{name} {environment[name]}" for name in ("jax", "torch") if environment[name]]
    shown = Table(
        title="Images per second in training",
        caption=f"{environment['device_kind']}, {environment['cores']} cores, "
        f"{', '.join(versions)}. Spread: of the quartiles of the first contender's steps, in "
        "shares of their median. Compilation and memory: of each that has them.",
        box=box.SIMPLE,
    )
    names = [name for name in get_args(ContenderName) if any(faster(r, name) for r in results)]
    first, *peers = names
    ratios = [f"{first}/{peer}" for peer in peers]
    for heading in ("model", "batch", *names, *ratios, "spread", "compile s", "MB"):
        shown.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    for result in results:
        found = [one for name in names if (one := faster(result, name))]
        speeds = [one["images_per_second"] for one in found]
        low, high = found[0]["seconds"]["quartiles"]
        compile_seconds = [one["compile_seconds"] for one in found]
        memory = [one["memory"] for one in found]
        shown.add_row(
            result["model"],
            str(result["batch"]),
            *(f"{speed:.3g}" for speed in speeds),
            *(f"{speeds[0] / speed:.2f}" for speed in speeds[1:]),
            f"{(high - low) / found[0]['seconds']['median']:.0%}",
            " / ".join(f"{seconds:.0f}" for seconds in compile_seconds if seconds),
            " / ".join(f"{sizes['peak'] / 1e6:.0f}" for sizes in memory if sizes),
        )
    return shown


def faster(result: dict[str, Any], name: ContenderName) -> dict[str, Any] | None:
    """The figures of a contender, or of the faster one of its variants; None without it."""
    found = [one for key, one in result["contenders"].items() if key.partition(" ")[0] == name]
    return max(found, key=lambda one: one["images_per_second"], default=None)


if __name__ == "__main__":
    main()
