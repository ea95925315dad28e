"""Tables of what each device holds, and of what a training step exchanges."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from alexnet.training.state import TrainState
from alexnet.training.trainer import Trainer
from grouped_conv_jax.models import AlexNetConfig, alexnet_exchanges
from grouped_conv_jax.placement import Exchange, PlacementReport, placement_report
from grouped_conv_jax.towers import DATA, GROUP


def show_placement(console: Console, mesh: jax.sharding.Mesh, towers: int, params: Any) -> None:
    """Prints the mesh: which towers and which share of the parameters each device has."""
    arrays = jax.tree.leaves(params)
    whole = sum(array.nbytes for array in arrays)
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)
    towers_each = towers // mesh.shape[GROUP]
    table = Table(
        title=f"Mesh: {DATA} {mesh.shape[DATA]} x {GROUP} {mesh.shape[GROUP]}",
        caption=f"One device alone would hold {whole:,} bytes of parameters.",
    )
    for heading in ("device", "towers", f"examples ({DATA})", "parameters", "share of the net"):
        table.add_column(heading, justify="left" if heading in ("device", "towers") else "right")
    for (data, group), device in np.ndenumerate(mesh.devices):
        own = range(group * towers_each + 1, (group + 1) * towers_each + 1)
        table.add_row(
            str(device),
            ", ".join(map(str, own)),
            f"part {data + 1} of {mesh.shape[DATA]}",
            f"{held:,} bytes",
            f"{held / whole:.0%}",
        )
    console.print(table)


def training_report(
    trainer: Trainer,
    config: AlexNetConfig,
    state: TrainState,
    batch_size: int,
    image_shape: tuple[int, ...],
    *,
    dtype: str = "float32",
    parts: int = 1,
    alone: Callable[[], Trainer] | None = None,
    compiled: jax.stages.Compiled | None = None,
) -> PlacementReport:
    """Returns what a training step exchanges and holds. It compiles the step, if need be.

    The report is of one of the `parts` of a batch. `alone` makes a trainer of the same net on one
    device, to compare the memory with.
    """
    mesh = trainer.net.mesh
    examples = batch_size // mesh.shape[DATA] // parts
    exchanges = list(alexnet_exchanges(config, examples, mesh.shape, dtype=dtype))
    if mesh.shape[DATA] > 1:
        # The means of the losses and of the right answers.
        exchanges.append(Exchange("loss", "fprop", "all-reduce", (DATA,), 2 * 4))
    return placement_report(
        compiled or trainer.lower(batch_size, image_shape).compile(),
        mesh,
        exchanges=exchanges,
        held={"parameters": state.params, "optimizer state": state.opt_state},
        alone=alone and alone().lower(batch_size, image_shape).compile(),
    )


def dump_programs(
    folder: Path, trainer: Trainer, batch_size: int, image_shape: tuple[int, ...]
) -> None:
    """Writes the training step as JAX lowers it (StableHLO) and as XLA compiles it (HLO)."""
    lowered = trainer.lower(batch_size, image_shape)
    (folder / "train_step.stablehlo.txt").write_text(lowered.as_text())
    (folder / "train_step.hlo.txt").write_text(lowered.compile().as_text() or "")
