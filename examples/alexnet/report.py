"""What a run shows: where everything lives, what is exchanged, the filters of conv1 by tower."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from alexnet.training import Trainer, TrainState
from grouped_conv_jax.models import AlexNetConfig, alexnet_exchanges
from grouped_conv_jax.placement import Exchange, PlacementReport, placement_report
from grouped_conv_jax.towers import DATA, GROUP


def show_placement(console: Console, mesh: jax.sharding.Mesh, towers: int, params: Any) -> None:
    """Prints the mesh: which towers and which share of the parameters each device has."""
    whole = sum(array.nbytes for array in jax.tree.leaves(params))
    held = sum(
        math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for array in jax.tree.leaves(params)
    )
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
    alone: Callable[[], Trainer] | None = None,
) -> PlacementReport:
    """What a training step exchanges and holds; compiles it, as the first step would.

    Args:
      trainer: whose step it is.
      config: the net that it trains.
      state: as the step gets it: arrays, or their `jax.ShapeDtypeStruct` with shardings.
      batch_size: of all devices together.
      image_shape: of the images that the step gets, before they are cropped.
      alone: makes a trainer of the same net on one device, to compare the memory with.
    """
    mesh = trainer.net.mesh
    exchanges = list(alexnet_exchanges(config, batch_size // mesh.shape[DATA], mesh.shape))
    if mesh.shape[DATA] > 1:
        # The means of the losses and of the right answers.
        exchanges.append(Exchange("loss", "fprop", "all-reduce", (DATA,), 2 * 4))
    return placement_report(
        trainer.lower(batch_size, image_shape).compile(),
        mesh,
        exchanges=exchanges,
        held={"parameters": state.params, "optimizer state": state.opt_state},
        alone=alone and alone().lower(batch_size, image_shape).compile(),
    )


def save_filters(path: Path, kernel: Any, towers: int) -> None:
    """Draws the kernels of conv1, (height, width, channels, features), a block for each tower."""
    kernel = np.asarray(kernel)
    channels, features = kernel.shape[2:]
    each = features // towers
    columns = min(each, 16)
    rows = -(-each // columns)
    figure = Figure(figsize=(columns * 0.6, towers * (rows * 0.6 + 0.5)), layout="constrained")
    blocks = figure.subfigures(towers, squeeze=False)[:, 0]
    for tower, block in enumerate(blocks):
        block.suptitle(f"tower {tower + 1}", fontsize="medium")
        axes = block.subplots(rows, columns, squeeze=False).ravel()
        for index, axis in enumerate(axes):
            axis.set_axis_off()
            if index < each:
                filters = kernel[..., tower * each + index]
                low, high = filters.min(), filters.max()
                image = (filters - low) / (high - low or 1.0)
                # One channel is drawn in grey; more than three have no colours to be shown in.
                shown = image if channels == 3 else image.mean(axis=-1)
                axis.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    with matplotlib.rc_context({"figure.dpi": 100}):
        figure.savefig(path)
