"""One convolution as a drawing: for each group a row of its input, its filters and its output."""

import dataclasses
import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from drawings.cuboids import (
    ACCENT,
    COLOURS,
    GREY,
    PLAIN,
    Cuboid,
    Look,
    Point,
    draw,
    face,
    label_edges,
    lighter,
    page,
    sizes_text,
    write,
)
from drawings.shapes import Convolution, convolution

PIXEL = 0.19
"""Inches along an edge of a pixel, and along the depth of a feature where they are few."""

MOST_MAPS = 8
"""More features than these are drawn closer together, and no lines between them."""

WINDOW = (2, 3)
"""The row (from above) and the column of the output whose making is shown."""

MARGIN, TITLE, CAPTION = 0.42, 1.0, 0.3
ROW_GAP, COLUMN_GAP, FILTER_GAP = 0.55, 0.85, 0.42


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where the left edges are; `whole_lhs` and `whole_out` only where there are groups."""

    whole_lhs: float
    lhs: float
    rhs: float
    out: float
    whole_out: float
    end: float

    @classmethod
    def of(cls, conv: Convolution) -> "Columns":
        lhs, rhs, out = (_spread(sizes, _depth(conv, sizes, True)) for sizes in _parts(conv))
        first, last = 0.0, 0.0
        if conv.groups > 1:
            first = _spread(conv.lhs, _depth(conv, conv.lhs)) + COLUMN_GAP
            last = _spread(conv.out, _depth(conv, conv.out)) + COLUMN_GAP
        at_lhs = MARGIN + first
        at_rhs = at_lhs + lhs + COLUMN_GAP
        at_out = at_rhs + rhs + COLUMN_GAP
        end = at_out + out
        return cls(MARGIN, at_lhs, at_rhs, at_out, end + COLUMN_GAP, end + last + MARGIN)


def draw_convolution(conv: Convolution, title: str) -> Figure:
    """Input, filters and output; where there are groups, those of each, and all joined."""
    colours = [PLAIN] if conv.groups == 1 else list(COLOURS[: conv.groups])
    columns = Columns.of(conv)
    row = _row_height(conv)
    height = TITLE + conv.groups * row + CAPTION + MARGIN / 2
    figure, axes = page(columns.end, height)
    middles = [height - TITLE - (group + 0.5) * row for group in range(conv.groups)]
    middle = sum(middles) / len(middles)
    write(axes, (columns.end / 2, height - 0.25), title, fontsize=13, weight="bold")
    write(axes, (columns.end / 2, CAPTION), _caption(conv), color=GREY)
    _write_headings(axes, conv, columns, height - 0.72)
    parts = [
        _draw_group(axes, conv, group, (columns, middles[group]), colour)
        for group, colour in enumerate(colours)
    ]
    if conv.groups > 1:
        whole_lhs = _cuboid(columns.whole_lhs, middle, conv.lhs, _depth(conv, conv.lhs))
        whole_out = _cuboid(columns.whole_out, middle, conv.out, _depth(conv, conv.out))
        for whole, sizes in ((whole_lhs, conv.lhs), (whole_out, conv.out)):
            draw(axes, whole, Look(colours, sizes[:2], _maps(sizes[2])))
            label_edges(axes, whole, sizes)
        for (lhs, out), colour in zip(parts, colours, strict=True):
            _arrow(axes, (whole_lhs.right + 0.1, whole_lhs.middle), _left_of(lhs), colour)
            start = out.right + 0.15, out.middle
            _arrow(axes, start, _left_of(whole_out), colour)
    return figure


def _draw_group(
    axes: Axes, conv: Convolution, group: int, place: tuple[Columns, float], colour: str
) -> tuple[Cuboid, Cuboid]:
    """One row; gives its input and its output."""
    columns, middle = place
    lhs_sizes, rhs_sizes, out_sizes = _parts(conv)
    lhs = _cuboid(columns.lhs, middle, lhs_sizes, _depth(conv, lhs_sizes, True))
    out = _cuboid(columns.out, middle, out_sizes, _depth(conv, out_sizes, True))
    filters = _filters(conv, columns.rhs, middle)
    for cuboid, sizes in ((lhs, lhs_sizes), (out, out_sizes)):
        draw(axes, cuboid, Look([colour], sizes[:2], _maps(sizes[2])))
        label_edges(axes, cuboid, sizes)
    for number, cuboid in filters.items():
        draw(axes, cuboid, Look([colour], rhs_sizes[:2], _maps(rhs_sizes[2])))
        x, y = cuboid.at(0.5, 1, 1)
        name = f"filter {group * conv.outputs + number + 1:,}"
        write(axes, (x, y + 0.1), name, color=GREY, fontsize=9)
    label_edges(axes, filters[0], rhs_sizes)
    if len(filters) > 1:
        *_, above, below = filters.values()
        _dots(axes, (above.x + above.width / 2, (above.y + below.top) / 2 + 0.03))
        x, y = out.at(0.5, 1, 1)
        name = f"of filter {(group + 1) * conv.outputs:,}"
        write(axes, (x, y + 0.1), name, color=GREY, fontsize=9)
    _show_window(axes, lhs, filters[0], out, conv)
    return lhs, out


def _show_window(axes: Axes, lhs: Cuboid, rhs: Cuboid, out: Cuboid, conv: Convolution) -> None:
    """The pixels that the first filter sees, and the one that it makes of them."""
    row, column = WINDOW
    window = _pixels(lhs, conv.lhs, (row, column), conv.rhs)
    pixel = _pixels(out, conv.out, (row, column), (1, 1))
    for corners in (window, pixel):
        face(axes, corners, lighter(ACCENT, 0.35))
    for corner, up in ((1, 0), (2, 1)):
        _guide(axes, window[corner], rhs.at(0, up))
    for corner, up in ((0, 0), (3, 1)):
        _guide(axes, rhs.at(1, up, 1), pixel[corner])


def _pixels(
    cuboid: Cuboid, sizes: Sequence[int], first: tuple[int, int], count: Sequence[int]
) -> list[Point]:
    """The corners of some pixels of the front, from the lower left one on."""
    (rows, columns), (row, column) = sizes[:2], first
    left, right = column / columns, (column + count[1]) / columns
    top, bottom = 1 - row / rows, 1 - (row + count[0]) / rows
    return [cuboid.at(*p) for p in ((left, bottom), (right, bottom), (right, top), (left, top))]


def _write_headings(axes: Axes, conv: Convolution, columns: Columns, y: float) -> None:
    """What the columns are, and how large."""
    lhs, rhs, out = _parts(conv)
    count = "1 filter" if conv.outputs == 1 else f"{conv.outputs:,} filters"
    texts = [
        (columns.lhs, lhs, "input", sizes_text(lhs)),
        (columns.rhs, rhs, "filters", f"{count} of {sizes_text(rhs)}"),
        (columns.out, out, "output", sizes_text(out)),
    ]
    if conv.groups > 1:
        texts = [
            (columns.whole_lhs, None, "input", sizes_text(conv.lhs)),
            (columns.lhs, lhs, f"{conv.groups} groups", f"each {sizes_text(lhs)}"),
            (columns.rhs, rhs, "filters", f"each {count} of {sizes_text(rhs)}"),
            (columns.out, out, "their outputs", f"each {sizes_text(out)}"),
            (columns.whole_out, None, "output", sizes_text(conv.out)),
        ]
    for x, part, heading, text in texts:
        sizes = part or (conv.lhs if x == columns.whole_lhs else conv.out)
        middle = x + _spread(sizes, _depth(conv, sizes, part is not None)) / 2
        write(axes, (middle, y + 0.09), heading, fontsize=11, weight="bold")
        write(axes, (middle, y - 0.12), text)


def _caption(conv: Convolution) -> str:
    """What it costs, and what it would with one group."""
    weights = math.prod(conv.rhs)
    text = (
        f"kernel {sizes_text(conv.rhs)}: {weights:,} weights, {conv.multiply_adds:,} multiply-adds"
    )
    if conv.groups == 1:
        return text
    (size, _, features), (taps, _, _, outputs) = conv.lhs, conv.rhs
    dense = convolution(size, features, taps, outputs, 1)
    return f"{text}; with one group {math.prod(dense.rhs):,} and {dense.multiply_adds:,}"


# Sizes and places.


def _parts(conv: Convolution) -> tuple[tuple[int, int, int], ...]:
    """The input, a filter and the output of one group: rows, columns, features."""
    (*lhs, _), (*taps, _, _), (*out, _) = conv.lhs, conv.rhs, conv.out
    return (
        (lhs[0], lhs[1], conv.inputs),
        (taps[0], taps[1], conv.inputs),
        (out[0], out[1], conv.outputs),
    )


def _maps(features: int) -> int:
    """Into how many the depth is cut by lines."""
    return features if features <= MOST_MAPS else 1


def _depth(conv: Convolution, sizes: Sequence[int], is_part: bool = False) -> float:
    """Inches, of which the groups of one array have equal shares."""
    groups = conv.groups if is_part else 1
    features = sizes[2] * groups
    crowded = max(0.0, math.log2(features / MOST_MAPS))
    return PIXEL * (min(features, MOST_MAPS) + crowded) / groups


def _cuboid(x: float, middle: float, sizes: Sequence[int], depth: float) -> Cuboid:
    cuboid = Cuboid(x, 0, sizes[1] * PIXEL, sizes[0] * PIXEL, depth)
    return dataclasses.replace(cuboid, y=middle - cuboid.top / 2)


def _spread(sizes: Sequence[int], depth: float) -> float:
    return _cuboid(0, 0, sizes, depth).right


def _shown(conv: Convolution) -> list[int]:
    """The filters of a group that are drawn."""
    first = range(2 if conv.groups == 1 else 1)
    return sorted({*first, conv.outputs - 1})


def _filters(conv: Convolution, x: float, middle: float) -> dict[int, Cuboid]:
    """Those that are drawn, by number, from above."""
    sizes = _parts(conv)[1]
    one = _cuboid(x, 0, sizes, _depth(conv, sizes, True))
    height = one.top - one.y
    shown = _shown(conv)
    y = middle + _filters_height(conv) / 2
    placed = {}
    for place, number in enumerate(shown):
        y -= height + (0 if place == 0 else FILTER_GAP)
        y -= FILTER_GAP if place and place == len(shown) - 1 else 0
        placed[number] = dataclasses.replace(one, y=y)
    return placed


def _filters_height(conv: Convolution) -> float:
    sizes = _parts(conv)[1]
    one = _cuboid(0, 0, sizes, _depth(conv, sizes, True))
    count = len(_shown(conv))
    return count * (one.top - one.y) + count * FILTER_GAP * (count > 1)


def _row_height(conv: Convolution) -> float:
    heights = [_filters_height(conv)]
    for sizes in (_parts(conv)[0], _parts(conv)[2]):
        one = _cuboid(0, 0, sizes, _depth(conv, sizes, True))
        heights.append(one.top - one.y)
    return max(heights) + ROW_GAP


# Lines.


def _left_of(cuboid: Cuboid) -> Point:
    return cuboid.x - 0.3, cuboid.middle


def _arrow(axes: Axes, start: Point, stop: Point, colour: str) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", stop, start, arrowprops=style)


def _guide(axes: Axes, start: Point, stop: Point) -> None:
    axes.plot(*zip(start, stop, strict=True), color=ACCENT, linewidth=0.8)


def _dots(axes: Axes, middle: Point) -> None:
    x, y = middle
    axes.plot([x] * 3, [y - 0.09, y, y + 0.09], ".", color=GREY, markersize=4)
