"""A picture of a placement: which tower is on which device, and where they talk."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from drawings.files import save
from grouped_conv_jax.models import AlexNetConfig, alexnet_exchanges
from grouped_conv_jax.towers import DATA, GROUP

BOX, COLUMN = 0.58, 1.0
"""Width of a layer, and from one layer to the next."""

TOWER, DEVICE, REPLICA = 0.55, 0.3, 0.75
"""From one tower to the next; more between devices; more between replicas of the net."""

MOST_REPLICAS = 2
"""More are not drawn: they are the same."""

COLOURS = ("#4477aa", "#cc8833", "#448855", "#885599")
GREY = "#666666"
ACROSS, WITHIN = "#bb2233", "#999999"
"""Arrows from one device to another, and those that stay on a device."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One column: numbers of a tower, and what its arrows come from."""

    name: str
    size: int
    inputs: str


@dataclasses.dataclass(frozen=True)
class Tower:
    """One row: where it is, and on which device."""

    y: float
    device: int


def save_placement(path: Path, mesh: jax.sharding.Mesh, config: AlexNetConfig) -> None:
    """Draws the net on the mesh; the suffix of `path` names the format, such as .svg or .png."""
    settings: dict[Any, Any] = {"figure.dpi": 100}
    with matplotlib.rc_context(settings):
        save(draw_placement(mesh, config), path, settings)


def draw_placement(mesh: jax.sharding.Mesh, config: AlexNetConfig) -> Figure:
    """The net on the mesh: columns are layers, rows are towers, colours are devices."""
    layers = _layers(config)
    drawn = min(mesh.shape[DATA], MOST_REPLICAS)
    replicas = [_towers(config.towers, mesh.shape[GROUP])]
    height = replicas[0][0].y - replicas[0][-1].y + TOWER + DEVICE + REPLICA
    for _ in range(drawn - 1):
        replicas.append([Tower(t.y - height, t.device) for t in replicas[-1]])
    width = (len(layers) + 2) * COLUMN
    captions = 0.55 if mesh.shape[GROUP] > 1 else 0
    bottom, top = replicas[-1][-1].y - 0.5 - captions, replicas[0][0].y + 0.85
    figure = Figure(figsize=(width, top - bottom), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.5 * COLUMN, width - 0.5 * COLUMN), ylim=(bottom, top))
    axes.set_axis_off()
    for column, name in enumerate(("image", *(layer.name for layer in layers), "logits")):
        axes.text(column * COLUMN, top - 0.25, name, ha="center", va="center", weight="bold")
    for replica, towers in enumerate(replicas):
        _draw_replica(axes, config, layers, towers, mesh.devices[replica])
        examples = (
            "batch" if len(mesh.devices) == 1 else f"batch\n{replica + 1} of {len(mesh.devices)}"
        )
        _text_box(axes, 0, (towers[0].y + towers[-1].y) / 2, examples, GREY)
    _draw_captions(axes, config, mesh, layers, replicas)
    return figure


def _layers(config: AlexNetConfig) -> list[Layer]:
    """All but the logits."""
    layers = [
        Layer(name, conv.features // config.towers, conv.inputs)
        for name, conv in zip(config.convolution_names, config.convolutions, strict=True)
    ]
    return layers + [
        Layer(name, units // config.towers, "all")
        for name, units in zip(config.dense_names[:-1], config.hidden_units, strict=True)
    ]


def _towers(towers: int, devices: int) -> list[Tower]:
    """The rows of one replica, from the top."""
    return [
        Tower(-(number * TOWER + number * devices // towers * DEVICE), number * devices // towers)
        for number in range(towers)
    ]


def _draw_replica(
    axes: Axes,
    config: AlexNetConfig,
    layers: Sequence[Layer],
    towers: Sequence[Tower],
    devices: Sequence[Any],
) -> None:
    """One copy of the net, on the devices along the group axis."""
    middle = (towers[0].y + towers[-1].y) / 2
    end = (len(layers) + 1) * COLUMN
    for number in dict.fromkeys(tower.device for tower in towers):
        rows = [tower.y for tower in towers if tower.device == number]
        colour = COLOURS[number % len(COLOURS)]
        _box(axes, (COLUMN + end) / 2 - COLUMN / 2, max(rows), min(rows), colour, 0.12, len(layers))
        axes.text(
            COLUMN - BOX / 2 - 0.05,
            max(rows) + TOWER / 2 + 0.02,
            f"device {devices[number].id}",
            color=colour,
            va="bottom",
        )
    _text_box(axes, end, middle, f"sum\n{config.num_classes:,}", GREY)
    for column, layer in enumerate(layers, 1):
        for tower in towers:
            colour = COLOURS[tower.device % len(COLOURS)]
            _text_box(axes, column * COLUMN, tower.y, f"{layer.size:,}", colour)
            for source, across in _sources(layer, tower, towers, middle):
                _arrow(axes, column - 1, source, tower.y, across)
    for tower in towers:
        _arrow(axes, len(layers), tower.y, middle, len({t.device for t in towers}) > 1)


def _sources(
    layer: Layer, tower: Tower, towers: Sequence[Tower], middle: float
) -> Iterator[tuple[float, bool]]:
    """Where a tower's arrows begin, and whether they come from another device."""
    if layer.inputs == "image":
        yield middle, False
    elif layer.inputs == "own":
        yield tower.y, False
    else:
        for other in towers:
            yield other.y, other.device != tower.device


def _draw_captions(
    axes: Axes,
    config: AlexNetConfig,
    mesh: jax.sharding.Mesh,
    layers: Sequence[Layer],
    replicas: Sequence[Sequence[Tower]],
) -> None:
    """What is sent, in figures: below the towers, and between the replicas."""
    one_image = alexnet_exchanges(config, 1, mesh.shape, itemsize=1)
    end = len(layers) + 1
    columns = {layer.name: column for column, layer in enumerate(layers, 1)}
    lowest = replicas[-1][-1].y - TOWER / 2 - 0.3
    for e in one_image:
        if e.contraction == "fprop":
            sent = e.nbytes // mesh.shape[GROUP] if e.kind == "all-gather" else e.nbytes
            x = (columns.get(e.layer, end) - 0.5) * COLUMN
            axes.text(x, lowest, f"{sent:,}", ha="center", color=ACROSS)
    if mesh.shape[GROUP] > 1:
        text = "numbers of each image that a device sends to the others; their gradients come back"
        x = end * COLUMN + BOX / 2
        axes.text(x, lowest - 0.3, text, ha="right", color=ACROSS, style="italic")
    if len(replicas) > 1:
        numbers = sum(e.nbytes for e in one_image if e.contraction == "wgrad")
        text = f"the gradients of what a device holds, {numbers:,} numbers, are summed"
        if more := mesh.shape[DATA] - len(replicas):
            text += f"\n(with {more} more copies of the net, not drawn)"
        y = (replicas[0][-1].y + replicas[1][0].y) / 2
        axes.text(end / 2 * COLUMN, y, text, ha="center", va="center", style="italic")
        for x in (COLUMN, len(layers) * COLUMN):
            axes.annotate(
                "", (x, y + 0.2), (x, y - 0.2), arrowprops={"arrowstyle": "<->", "color": GREY}
            )


def _text_box(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    _box(axes, x, y, y, colour, 1.0, 1)
    axes.text(x, y, text, ha="center", va="center", color="white", linespacing=1.0)


def _box(
    axes: Axes, x: float, high: float, low: float, colour: str, alpha: float, columns: int
) -> None:
    """Around one layer of a tower, or around all towers of a device."""
    margin = 0.18 if columns == 1 else TOWER / 2
    width = BOX + (columns - 1) * COLUMN + (0 if columns == 1 else 0.3)
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, low - margin),
            width,
            high - low + 2 * margin,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=colour,
            edgecolor="none",
            alpha=alpha,
            zorder=0 if alpha < 1 else 2,
        )
    )


def _arrow(axes: Axes, column: int, start: float, stop: float, across: bool) -> None:
    """From the right of one column to the left of the next."""
    axes.annotate(
        "",
        ((column + 1) * COLUMN - BOX / 2, stop),
        (column * COLUMN + BOX / 2, start),
        arrowprops={
            "arrowstyle": "-|>",
            "color": ACROSS if across else WITHIN,
            "shrinkA": 0,
            "shrinkB": 0,
            "linewidth": 1.4 if across else 1.0,
        },
        zorder=3 if across else 1,
    )
