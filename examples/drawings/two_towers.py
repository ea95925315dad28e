"""The AlexNet of 2012 as a drawing: its towers, and the layers at which they talk."""

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from drawings.cuboids import (
    ACCENT,
    COLOURS,
    GREY,
    PLAIN,
    Cuboid,
    Look,
    draw,
    label_edges,
    page,
    sizes_text,
    write,
)
from drawings.shapes import Layer

EDGE, DEPTH, BAR = 0.125, 0.058, 0.026
"""Inches of an edge of one pixel, of the depth of one feature and of the height of one unit; of n
it is sqrt(n) times as much, so that the last layers can be seen beside the image."""

THIN = 0.2
"""Width and depth of a fully connected layer."""

MARGIN, TITLE, CAPTION, GAP, TOWER = 0.52, 1.15, 1.0, 0.74, 1.8


@dataclasses.dataclass(frozen=True)
class Column:
    """What one layer puts out.

    Attributes:
      sizes: of one cuboid.
      cuboids: from the upper tower to the lower; one where nothing is cut into towers.
    """

    sizes: tuple[int, ...]
    cuboids: tuple[Cuboid, ...]

    @property
    def right(self) -> float:
        return self.cuboids[0].right

    @property
    def middle(self) -> float:
        return (self.cuboids[0].x + self.right) / 2


def draw_towers(layers: Sequence[Layer], towers: int) -> Figure:
    """Columns are layers, rows are towers, colours too."""
    height = TITLE + towers * TOWER + CAPTION
    rows = [height - TITLE - (tower + 0.5) * TOWER for tower in range(towers)]
    columns = _columns(layers, rows)
    width = columns[-1].right + MARGIN
    figure, axes = page(width, height)
    title = f"AlexNet in {towers} towers: where arrows cross, they talk"
    write(axes, (width / 2, height - 0.25), title, fontsize=13, weight="bold")
    write(axes, (columns[0].middle, height - 0.68), "image", fontsize=11, weight="bold")
    for (before, column), layer in zip(pairwise(columns), layers, strict=True):
        _draw_arrows(axes, before, column, layer)
    for column in columns:
        _draw_column(axes, column)
    for (before, column), layer in zip(pairwise(columns), layers, strict=True):
        _write_about(axes, column, layer, talks(layer, before), height)
    return figure


def talks(layer: Layer, before: Column) -> bool:
    """Whether each tower sees what the others have put out."""
    return layer.groups == 1 and len(before.cuboids) > 1


def _columns(layers: Sequence[Layer], rows: Sequence[float]) -> list[Column]:
    """The image, then each layer; the last one, the logits, belongs to no tower."""
    middle = sum(rows) / len(rows)
    columns = [_column(layers[0].lhs, MARGIN, [middle])]
    for number, layer in enumerate(layers):
        *pixels, features = layer.out
        own = number < len(layers) - 1
        sizes = (*pixels, features // len(rows)) if own else layer.out
        columns.append(_column(sizes, columns[-1].right + GAP, rows if own else [middle]))
    return columns


def _column(sizes: Sequence[int], x: float, rows: Sequence[float]) -> Column:
    *pixels, features = sizes
    if pixels:
        height, width = (EDGE * math.sqrt(size) for size in pixels)
        cuboid = Cuboid(x, 0, width, height, DEPTH * math.sqrt(features))
    else:
        cuboid = Cuboid(x, 0, THIN, BAR * math.sqrt(features), THIN)
    cuboids = (dataclasses.replace(cuboid, y=row - cuboid.top / 2) for row in rows)
    return Column(tuple(sizes), tuple(cuboids))


def _draw_column(axes: Axes, column: Column) -> None:
    colours = COLOURS if len(column.cuboids) > 1 else (PLAIN,)
    for tower, cuboid in enumerate(column.cuboids):
        draw(axes, cuboid, Look([colours[tower % len(colours)]]))
        if len(column.sizes) == 3:
            height, width, features = column.sizes
            label_edges(axes, cuboid, (height, width, features), fontsize=10.5)
        else:
            x, y = cuboid.at(0.5, 0)
            write(axes, (x, y - 0.12), f"{column.sizes[0]:,}", fontsize=10.5)


def _draw_arrows(axes: Axes, before: Column, column: Column, layer: Layer) -> None:
    """From each tower to itself, and where they talk to the others."""
    for source, start in enumerate(before.cuboids):
        for target, stop in enumerate(column.cuboids):
            is_own = len(before.cuboids) == 1 or source == target
            if not is_own and not talks(layer, before) and len(column.cuboids) > 1:
                continue
            across = talks(layer, before) and (source != target or len(column.cuboids) == 1)
            style = {
                "arrowstyle": "-|>",
                "color": ACCENT if across else GREY,
                "linewidth": 1.5 if across else 1.1,
                "shrinkA": 0,
                "shrinkB": 0,
            }
            begin = (start.right + 0.06, start.middle)
            end = (stop.x - 0.3, stop.middle)
            axes.annotate("", end, begin, arrowprops=style)


def _write_about(axes: Axes, column: Column, layer: Layer, has_talked: bool, height: float) -> None:
    """Its name and what it sees, above; its kernel, below."""
    write(axes, (column.middle, height - 0.68), layer.name, fontsize=11, weight="bold")
    about, colour = "", GREY
    if layer.groups > 1:
        about, colour = f"{layer.groups} groups", GREY
    elif has_talked:
        about, colour = "all towers", ACCENT
    write(axes, (column.middle, height - 0.9), about, color=colour)
    *taps, inputs, outputs = layer.rhs
    lines = [f"{outputs:,} units", f"of {inputs:,}"]
    if taps:
        lines = [f"{outputs:,} filters", sizes_text((*taps, inputs))]
        lines += [f"stride {layer.strides}"] * (layer.strides > 1) + ["max-pool"] * layer.is_pooled
    for number, line in enumerate(lines):
        write(axes, (column.middle, CAPTION - 0.2 - 0.2 * number), line, color=GREY)
