"""A picture of a placement: which tower is on which device, and what they exchange."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from grouped_conv_jax.models import AlexNetConfig, alexnet_exchanges
from grouped_conv_jax.towers import DATA, GROUP

BOX = 0.58
"""Width of a layer. Layers are 1 apart."""

TOWER, DEVICE, REPLICA = 0.55, 0.3, 0.75
"""Distance of towers; more between devices; more between replicas of the net."""

MOST_REPLICAS = 2
"""More replicas, which look the same, are not drawn."""

COLOURS = ("#4477aa", "#cc8833", "#448855", "#885599")
GREY = "#666666"
ACROSS, WITHIN = "#bb2233", "#999999"
"""Colours of arrows from one device to another, and of those that stay on a device."""


@dataclasses.dataclass(frozen=True)
class Tower:
    """One row: its height, and the number of its device along the group axis."""

    y: float
    device: int

    @property
    def colour(self) -> str:
        return COLOURS[self.device % len(COLOURS)]


def save_placement(path: Path, mesh: jax.sharding.Mesh, config: AlexNetConfig) -> None:
    """Draws the net on the mesh. The suffix of `path` names the format, such as .svg or .png."""
    # Without a date and random names, the same placement gives the same file.
    with matplotlib.rc_context({"svg.hashsalt": "placement", "figure.dpi": 100}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        draw_placement(mesh, config).savefig(path, metadata=metadata)


def draw_placement(mesh: jax.sharding.Mesh, config: AlexNetConfig) -> Figure:
    """Returns the net on the mesh: columns are layers, rows are towers, colours are devices."""
    layers = _layers(config)
    devices, replicas = mesh.shape[GROUP], min(mesh.shape[DATA], MOST_REPLICAS)
    numbers = [tower * devices // config.towers for tower in range(config.towers)]
    rows = [Tower(-(TOWER * i + DEVICE * device), device) for i, device in enumerate(numbers)]
    height = rows[0].y - rows[-1].y + TOWER + DEVICE + REPLICA
    towers = [[Tower(t.y - i * height, t.device) for t in rows] for i in range(replicas)]
    width = len(layers) + 2
    bottom, top = towers[-1][-1].y - (1.05 if devices > 1 else 0.5), 0.85
    figure = Figure(figsize=(width, top - bottom), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.5, width - 0.5), ylim=(bottom, top))
    axes.set_axis_off()
    for column, name in enumerate(("image", *(name for name, _, _ in layers), "logits")):
        axes.text(column, top - 0.25, name, ha="center", va="center", weight="bold")
    for i, replica in enumerate(towers):
        _draw_replica(axes, config, layers, replica, mesh.devices[i])
        part = f"\n{i + 1} of {len(mesh.devices)}" if len(mesh.devices) > 1 else ""
        _text_box(axes, 0, (replica[0].y + replica[-1].y) / 2, f"batch{part}", GREY)
    _draw_captions(axes, config, mesh, [name for name, _, _ in layers], towers)
    return figure


def _layers(config: AlexNetConfig) -> list[tuple[str, int, str]]:
    """Returns all layers but the logits: name, numbers of a tower, and the source of its inputs."""
    convolutions = zip(config.convolution_names, config.convolutions, strict=True)
    hidden = zip(config.dense_names[:-1], config.hidden_units, strict=True)
    return [
        *((name, conv.features // config.towers, conv.inputs) for name, conv in convolutions),
        *((name, units // config.towers, "all") for name, units in hidden),
    ]


def _draw_replica(
    axes: Axes,
    config: AlexNetConfig,
    layers: Sequence[tuple[str, int, str]],
    towers: Sequence[Tower],
    devices: Sequence[Any],
) -> None:
    """Draws one copy of the net, on the devices along the group axis."""
    middle, end = (towers[0].y + towers[-1].y) / 2, len(layers) + 1
    for number in dict.fromkeys(tower.device for tower in towers):
        rows = [tower.y for tower in towers if tower.device == number]
        colour = COLOURS[number % len(COLOURS)]
        size = (len(layers) - 1 + BOX + 0.3, max(rows) - min(rows) + TOWER)
        _box(axes, (end / 2, (max(rows) + min(rows)) / 2), size, colour, alpha=0.12, zorder=0)
        label = f"device {devices[number].id}"
        axes.text(0.95 - BOX / 2, max(rows) + TOWER / 2 + 0.02, label, color=colour, va="bottom")
    _text_box(axes, end, middle, f"sum\n{config.num_classes:,}", GREY)
    for column, (_, size, inputs) in enumerate(layers, 1):
        for tower in towers:
            _text_box(axes, column, tower.y, f"{size:,}", tower.colour)
            if inputs == "image":
                _arrow(axes, column - 1, middle, tower.y, across=False)
            for other in towers if inputs == "all" else [tower] if inputs == "own" else []:
                _arrow(axes, column - 1, other.y, tower.y, across=other.device != tower.device)
    for tower in towers:
        _arrow(axes, end - 1, tower.y, middle, across=towers[0].device != towers[-1].device)


def _draw_captions(
    axes: Axes,
    config: AlexNetConfig,
    mesh: jax.sharding.Mesh,
    names: Sequence[str],
    replicas: Sequence[Sequence[Tower]],
) -> None:
    """Writes what is sent, in figures: below the towers, and between the replicas."""
    one_image = alexnet_exchanges(config, 1, mesh.shape, itemsize=1)
    end, devices = len(names) + 1, mesh.shape[GROUP]
    lowest = replicas[-1][-1].y - TOWER / 2 - 0.3
    for e in one_image:
        if e.contraction == "fprop":
            sent = e.nbytes // devices if e.kind == "all-gather" else e.nbytes
            column = names.index(e.layer) + 1 if e.layer in names else end
            axes.text(column - 0.5, lowest, f"{sent:,}", ha="center", color=ACROSS)
    if devices > 1:
        text = "numbers of each image that a device sends to the others; their gradients come back"
        axes.text(end + BOX / 2, lowest - 0.3, text, ha="right", color=ACROSS, style="italic")
    if len(replicas) > 1:
        numbers = sum(e.nbytes for e in one_image if e.contraction == "wgrad")
        text = f"the gradients of what a device holds, {numbers:,} numbers, are summed"
        if more := mesh.shape[DATA] - len(replicas):
            text += f"\n(with {more} more copies of the net, not drawn)"
        y = (replicas[0][-1].y + replicas[1][0].y) / 2
        axes.text(end / 2, y, text, ha="center", va="center", style="italic")
        style = {"arrowstyle": "<->", "color": GREY}
        for x in (1, len(names)):
            axes.annotate("", (x, y + 0.2), (x, y - 0.2), arrowprops=style)


def _text_box(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    _box(axes, (x, y), (BOX, 0.36), colour, alpha=1.0, zorder=2)
    axes.text(x, y, text, ha="center", va="center", color="white", linespacing=1.0)


def _box(axes: Axes, centre: Any, size: Any, colour: str, *, alpha: float, zorder: float) -> None:
    corner = [c - s / 2 for c, s in zip(centre, size, strict=True)]
    style = "round,pad=0,rounding_size=0.06"
    looks = {"facecolor": colour, "edgecolor": "none", "alpha": alpha, "zorder": zorder}
    axes.add_patch(FancyBboxPatch(tuple(corner), *size, boxstyle=style, **looks))


def _arrow(axes: Axes, column: int, start: float, stop: float, *, across: bool) -> None:
    """Draws an arrow from the right of one column to the left of the next."""
    style = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0}
    style |= {"color": ACROSS, "linewidth": 1.4} if across else {"color": WITHIN, "linewidth": 1.0}
    ends = (column + 1 - BOX / 2, stop), (column + BOX / 2, start)
    axes.annotate("", *ends, arrowprops=style, zorder=3 if across else 1)
