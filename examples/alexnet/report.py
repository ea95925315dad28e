"""What a run shows: where everything lives, and the filters of conv1 by tower."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from grouped_conv_jax.towers import DATA, GROUP


def bytes_by_device(tree: Any) -> dict[Any, int]:
    """Bytes that each device really holds of the arrays in `tree`."""
    held = defaultdict(int)
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return dict(held)


def show_placement(console: Console, mesh: jax.sharding.Mesh, towers: int, params: Any) -> None:
    """Prints the mesh: which towers and which share of the parameters each device has."""
    whole = sum(array.nbytes for array in jax.tree.leaves(params))
    held = bytes_by_device(params)
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
            f"{held[device]:,} bytes",
            f"{held[device] / whole:.0%}",
        )
    console.print(table)


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
