"""What the paper's AlexNet moves per device and step, from 1 device to 256: compiled, not run.

python examples/placement_at_scale.py

The training step of the 224-pixel net is compiled ahead of time for meshes of more and more CPU
devices that are not there, the examples on each device staying the same, and its collectives are
read back. The table goes to docs/placement_at_scale.md; that takes about a minute.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from alexnet.augmentation import Preprocessing
from alexnet.presets import PAPER_RECIPE
from alexnet.report import training_report
from alexnet.training import Trainer, tower_net
from grouped_conv_jax.collectives import Collective, collectives
from grouped_conv_jax.models import AlexNetConfig
from grouped_conv_jax.placement import PlacementReport
from grouped_conv_jax.towers import DATA, GROUP, make_mesh

TWO_TOWERS = [(1, 1), (1, 2), *((2**i, 2) for i in range(1, 8))]
FOUR_TOWERS = [(1, 4), (8, 4)]
MESHES = [(2, *mesh) for mesh in TWO_TOWERS] + [(4, *mesh) for mesh in FOUR_TOWERS]
"""Towers, devices on the axis "data", devices on the axis "group"."""

IMAGE_SHAPE = (256, 256, 3)
"""Before they are cropped to 224 pixels, as in the paper."""

TABLE = Path(__file__).parent.parent / "docs" / "placement_at_scale.md"


@dataclasses.dataclass(frozen=True)
class Options:
    """Compiles the paper's AlexNet for ever more devices, and tabulates what they exchange."""

    examples: int = 128
    """Examples on each device."""

    output: Path = TABLE
    """The Markdown file to write."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One line of the table."""

    towers: int
    mesh: Mesh
    collectives: Sequence[Collective]
    report: PlacementReport

    def moved(self, axis: str) -> int:
        """Bytes per device and step along one mesh axis."""
        return sum(c.nbytes for c in self.collectives if c.axes == (axis,))

    def counts(self, axis: str) -> str:
        """How many collectives of each kind."""
        kinds = Counter(c.kind for c in self.collectives if c.axes == (axis,))
        return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"


def main() -> None:
    """The command line."""
    options = tyro.cli(Options)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(data * group for _, data, group in MESHES))
    lines = []
    for towers, data, group in MESHES:
        config = AlexNetConfig.paper(towers=towers)
        lines.append(compile_step(config, make_mesh(data, group), options.examples))
        print(f"{data * group:4} devices: {data} x {group}", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page(lines, options))
    print(options.output)


def compile_step(config: AlexNetConfig, mesh: Mesh, examples: int) -> Compiled:
    """Compiles one training step for a mesh; no array is made and nothing is run."""
    trainer = Trainer(
        tower_net(config, mesh, None),
        PAPER_RECIPE,
        Preprocessing(np.ones(3, np.float32), np.ones(3, np.float32), np.eye(3, dtype=np.float32)),
        image_size=config.image_size,
        steps=1,
        steps_per_epoch=1,
        flip=True,
        seed=0,
    )
    batch = examples * mesh.shape[DATA]
    lowered = trainer.lower(batch, IMAGE_SHAPE)
    compiled = lowered.compile()
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        lowered.args_info[0][0],
        compiled.input_shardings[0][0],
    )
    report = training_report(trainer, config, state, batch, IMAGE_SHAPE)
    return Compiled(config.towers, mesh, collectives(compiled, mesh), report)


def page(lines: Sequence[Compiled], options: Options) -> str:
    """The Markdown file."""
    heading = (
        "devices",
        "data x group",
        "towers",
        "over `group`",
        "bytes",
        "over `data`",
        "bytes",
        "parameters",
        "optimizer",
        "temporaries",
    )
    table = [heading, ("--:",) * 3 + ("---", "--:") * 2 + ("--:",) * 3]
    for line in lines:
        memory = {m.name: f"{m.nbytes:,}" for m in line.report.memory}
        table.append(
            (
                str(line.mesh.size),
                f"{line.mesh.shape[DATA]} x {line.mesh.shape[GROUP]}",
                str(line.towers),
                line.counts(GROUP),
                f"{line.moved(GROUP):,}",
                line.counts(DATA),
                f"{line.moved(DATA):,}",
                *memory.values(),
            )
        )
    rows = "\n".join("| " + " | ".join(row) + " |" for row in table)
    notes = [
        f"- {line.mesh.shape[DATA]} x {line.mesh.shape[GROUP]}: {note}"
        for line in lines
        for note in line.report.notes
    ]
    found = "\n".join(notes) or "each moves, layer by layer, what was computed, and nothing else."
    return TEXT.format(
        command="python examples/placement_at_scale.py"
        + ("" if options.examples == Options.examples else f" --examples {options.examples}"),
        examples=options.examples,
        version=jax.__version__,
        rows=rows,
        found=found,
        **growth(lines),
    )


def growth(lines: Sequence[Compiled]) -> dict[str, str]:
    """The smallest and the largest mesh of two towers with several devices on both axes."""
    small, *_, large = [
        line
        for line in lines
        if line.towers == line.mesh.shape[GROUP] == 2 and line.mesh.shape[DATA] > 1
    ]
    return {
        "small": f"{small.mesh.size} devices",
        "large": f"{large.mesh.size}",
        "group": f"from {small.moved(GROUP):,} to {large.moved(GROUP):,}",
        "data": f"from {small.moved(DATA):,} to {large.moved(DATA):,}",
    }


TEXT = """\
# The placement at scale, on paper

The training step of the paper's 224-pixel AlexNet, {examples} examples on each device, compiled
ahead of time for CPU devices that are not there (jax {version}); nothing was run. Made by

```sh
{command}
```

The mesh is `data` x `group`: examples are spread over the one, towers over the other. All figures
are for one device and one step. Bytes of a collective are those of what goes in or of what comes
out, whichever is more; held are the parameters, the optimizer's state (momentum), and what XLA
needs at one time beside arguments and results (activations, gradients).

{rows}

With {small}, then with more up to {large}, the bytes that a device exchanges

- over `group` go {group}: the towers' features and their gradients;
- over `data` go {data}: the gradients of what it holds, the loss and the accuracy.

Computed from the figures of the layers, against what was compiled, for each mesh above:
{found}
"""


if __name__ == "__main__":
    main()
