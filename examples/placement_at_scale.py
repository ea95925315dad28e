"""Compiles training steps for TPUs of 4 to 256 chips, and tabulates what each chip does in them.

python examples/placement_at_scale.py
python examples/placement_at_scale.py --nets alexnet --topologies v5e:4x4 --dtypes float32
python examples/placement_at_scale.py --page-only

The steps of AlexNet, with its towers on different chips, and of ResNeXt-50, MobileNet and
ConvNeXt-T, with their examples on different chips, are compiled ahead of time for TPUs that are not
there. This needs libtpu (pip install "jax[tpu]"), one to four minutes for each program, and no TPU.
A JSON file keeps the figures, so that no program is compiled twice. The page is made from the file.
"""

import dataclasses
import json
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import data_parallel
import jax
import numpy as np
import tyro
from benchmark_models import MODELS, ModelName
from data_parallel import DataPlacement
from jax.sharding import AxisType, Mesh

from alexnet.data.augmentation import Preprocessing
from alexnet.presets import PAPER_RECIPE
from alexnet.reports.placement_report import training_report
from alexnet.topology import topology_devices
from alexnet.training.trainer import Trainer, tower_net
from grouped_conv_jax.collectives import collectives
from grouped_conv_jax.models import AlexNetConfig
from grouped_conv_jax.placement import placement_report
from grouped_conv_jax.towers import DATA, GROUP, make_mesh

DtypeName = Literal["bfloat16", "float32"]

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Net:
    """One network of the page.

    Attributes:
      examples: images on each device of the axis "data".
      text: the paragraph above its table.
    """

    examples: int
    text: str


NETS: dict[ModelName, Net] = {
    "alexnet": Net(
        128,
        "The net of the paper, for images of 224 pixels. There are 128 images on each device of "
        "the axis `data`. The two towers are on the axis `group`, so that each of its two devices "
        "has half of the work. Under `shard_map` gradients are summed in float32, and under `jit` "
        "in the dtype of the computation. Under `jit` XLA gathers the inputs of conv3 and of fc7 "
        "a second time for the backward pass. In float32 XLA sends the features between the "
        "towers as bfloat16, in which it multiplies them.",
    ),
    "resnext50": Net(
        32,
        "There are 32 images of 224 pixels on each device. Under `jit` the statistics of batch "
        "normalisation are those of the whole batch, whose sums come on top of the gradients. "
        "Under `shard_map` each device has its own, and the running averages are averaged.",
    ),
    "mobilenet": Net(
        32,
        "There are 32 images of 224 pixels on each device. Batch normalisation is as in ResNeXt.",
    ),
    "convnext_tiny": Net(32, "There are 32 images of 224 pixels on each device."),
}

IMAGE_SHAPE = (256, 256, 3)
"""AlexNet's images before they are cropped to 224 pixels, as in the paper."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Compiles training steps for TPU topologies, and tabulates what each chip does."""

    nets: tuple[ModelName, ...] = get_args(ModelName)
    """The networks."""

    topologies: tuple[str, ...] = ("v5e:2x2", "v5e:4x4", "v6e:2x4", "v5p:2x2x2", "v5e:16x16")
    """The TPUs. A name is a generation, and how its chips are arranged."""

    placements: tuple[DataPlacement, ...] = get_args(DataPlacement)
    """Who divides a network: XLA's partitioner (jit), or the network's own program (shard_map)."""

    dtypes: tuple[DtypeName, ...] = get_args(DtypeName)
    """The dtypes to compute in. Parameters are float32."""

    page_only: bool = False
    """Write the page from the figures that there are, and compile nothing."""

    results: Path = ROOT / "benchmarks" / "tpu-placement.json"
    """The JSON file with the figures."""

    page: Path = ROOT / "docs" / "placement_at_scale.md"
    """The Markdown file to write."""


@dataclasses.dataclass(frozen=True)
class Step:
    """The training step of a network for the first devices of a topology.

    The steps of one device are there to compare the others with.
    """

    net: ModelName
    topology: str
    placement: DataPlacement
    dtype: DtypeName
    devices: int


def main() -> None:
    """The command line."""
    options = tyro.cli(Options)
    jax.config.update("jax_platforms", "cpu")
    rows = json.loads(options.results.read_text()) if options.results.exists() else []
    try:
        for step in () if options.page_only else steps(options):
            if any(dataclasses.asdict(step).items() <= row.items() for row in rows):
                continue
            print(step, flush=True)
            rows.append(dataclasses.asdict(step) | figures(step))
            options.results.parent.mkdir(parents=True, exist_ok=True)
            options.results.write_text(json.dumps(rows, indent=1) + "\n")
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    options.page.write_text(page(rows))
    print(options.page)


def steps(options: Options) -> Iterator[Step]:
    """Yields the programs; for each generation of TPUs and each dtype one for a single device."""
    for net in options.nets:
        for dtype in options.dtypes:
            alone = {}
            for topology in options.topologies:
                alone.setdefault(generation(topology), topology)
            for topology in alone.values():
                yield Step(net, topology, "jit", dtype, 1)
            for topology in options.topologies:
                for placement in options.placements:
                    count = len(topology_devices(topology))
                    yield Step(net, topology, placement, dtype, count)


def generation(topology: str) -> str:
    """Returns "v5e" of "v5e:4x4"."""
    return topology.partition(":")[0]


# Compiling.


def figures(step: Step) -> dict[str, Any]:
    """Compiles a step and reads off what one device does in it."""
    devices = topology_devices(step.topology)[: step.devices]
    compiled, report, mesh = (alexnet if step.net == "alexnet" else others)(step, devices)
    found = collectives(compiled, mesh)
    memory = compiled.memory_analysis()
    analysis = compiled.cost_analysis() or {}
    return {
        "jax": jax.__version__,
        "device_kind": devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "examples": NETS[step.net].examples,
        "collectives": {
            axis: dict(Counter(c.kind for c in found if c.axes == (axis,))) for axis in mesh.shape
        },
        "compiled_bytes": sum(c.nbytes for c in found),
        "computed_bytes": sum(row.computed_nbytes for row in report.rows),
        "other_axes": sorted({c.axes for c in found if len(c.axes) > 1}),
        "notes": list(report.notes),
        "argument_bytes": memory.argument_size_in_bytes if memory else None,
        "temporary_bytes": memory.temp_size_in_bytes if memory else None,
        "flops": analysis.get("flops"),
    }


def alexnet(step: Step, devices: Sequence[Any]) -> tuple[Any, Any, Mesh]:
    """Compiles the step of the paper's net, with its two towers on two devices."""
    config = AlexNetConfig.paper(towers=2)
    group = min(2, step.devices)
    mesh = make_mesh(step.devices // group, group, devices)
    trainer = Trainer(
        tower_net(config, mesh, None, step.dtype),
        dataclasses.replace(PAPER_RECIPE, dtype=step.dtype),
        Preprocessing.neutral(3),
        image_size=config.image_size,
        steps=1,
        steps_per_epoch=1,
        flip=True,
        seed=0,
        placement=step.placement,
    )
    batch = NETS["alexnet"].examples * mesh.shape[DATA]
    compiled = trainer.lower(batch, IMAGE_SHAPE).compile()
    report = training_report(
        trainer,
        config,
        trainer.abstract_state,
        batch,
        IMAGE_SHAPE,
        dtype=step.dtype,
        compiled=compiled,
    )
    return compiled, report, mesh


def others(step: Step, devices: Sequence[Any]) -> tuple[Any, Any, Mesh]:
    """Compiles the step of a net whose examples are divided among all devices."""
    mesh = Mesh(np.array(devices), (DATA,), axis_types=(AxisType.Auto,))
    examples = NETS[step.net].examples
    lowered = data_parallel.lower_step(step.net, step.dtype, mesh, step.placement, examples)
    compiled = lowered.compile()
    needed = data_parallel.exchanges(step.net, step.dtype, step.devices)
    return compiled, placement_report(compiled, mesh, exchanges=needed), mesh


# The page.


def page(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the Markdown file."""
    versions = ", ".join(sorted({row["jax"] for row in rows}))
    parts = [TEXT.format(versions=versions)]
    for name, net in NETS.items():
        if of_net := [row for row in rows if row["net"] == name]:
            text = textwrap.fill(net.text, 100)
            parts.append(f"## {MODELS[name].title}\n\n{text}\n\n{table(of_net)}\n")
    return "\n".join(parts)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the table of one net."""
    heading = (
        *("TPU", "dtype", "placement", "data", "group", "collectives"),
        *("bytes computed", "bytes compiled", "arguments", "temporaries", "GFLOP", "of one device"),
    )
    lines = [heading, ("---",) * 3 + ("--:",) * 2 + ("---",) + ("--:",) * 6]
    for row in rows:
        lines.append(
            (
                row["topology"] if row["devices"] > 1 else f"one {row['device_kind']}",
                row["dtype"],
                row["placement"],
                str(row["mesh"].get(DATA, 1)),
                str(row["mesh"].get(GROUP, 1)),
                counted(row["collectives"]),
                f"{row['computed_bytes']:,}",
                f"{row['compiled_bytes']:,}",
                f"{row['argument_bytes']:,}",
                f"{row['temporary_bytes']:,}",
                f"{row['flops'] / 1e9:,.1f}",
                share(row, rows),
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def counted(of_axes: dict[str, dict[str, int]]) -> str:
    """Returns how many collectives of each kind run over each axis."""
    return (
        "; ".join(
            f"{axis}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            for axis, kinds in of_axes.items()
            if kinds
        )
        or "none"
    )


def share(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Returns the FLOPs of a device in shares of a device that has as many examples to itself."""
    for other in rows:
        same = all(row[name] == other[name] for name in ("net", "dtype", "device_kind"))
        if same and other["devices"] == 1:
            return f"{row['flops'] / other['flops']:.2f}"
    return ""


TEXT = """\
# Placement at scale

This page shows what one device of a TPU exchanges, holds and computes in a training step, for 4 to
256 chips. A step is the forward pass, the backward pass, and the update by SGD with momentum. The
steps were compiled ahead of time with XLA:TPU on a CPU (jax {versions}), and nothing was run. This
command compiles them, and those for any other topology:

```sh
python examples/placement_at_scale.py
```

The columns of the tables:

- "bytes computed" must be exchanged, by the figures of the layers alone. "Bytes compiled" are
  exchanged by the program. Both count what goes into or comes out of a device, whichever is more.
- "arguments" are the parameters, the momentum and the batch. "Temporaries" are activations and
  gradients.
- "GFLOP" is XLA's own count for one device. "Of one device" divides it by the count for a device
  that has the same number of images to itself.
"""


if __name__ == "__main__":
    main()
