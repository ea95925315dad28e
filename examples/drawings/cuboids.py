"""Arrays as cuboids in oblique projection, their edges labelled. It knows nothing of convolutions.

The front of a cuboid is its rows and columns of pixels; features lie behind one another and recede
to the upper right.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Polygon

RECESSION = (0.72, 0.5)
"""Where a unit of depth goes on the page."""

COLOURS = ("#4477aa", "#dd8833", "#448855")
"""Of the groups, in order; told apart without red against green."""

PLAIN, GREY, ACCENT = "#8899aa", "#666666", "#bb2233"
"""Of what belongs to no group; of words beside; of what the eye should follow."""

LINE = 0.8

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Cuboid:
    """Its lower left corner in front, and its edges, in units of the page."""

    x: float
    y: float
    width: float
    height: float
    depth: float

    def at(self, right: float, up: float, back: float = 0) -> Point:
        """The point of the page at these shares of the three edges."""
        return (
            self.x + right * self.width + back * self.depth * RECESSION[0],
            self.y + up * self.height + back * self.depth * RECESSION[1],
        )

    @property
    def right(self) -> float:
        """Where it ends on the page."""
        return self.at(1, 0, 1)[0]

    @property
    def top(self) -> float:
        """Where it ends on the page."""
        return self.at(0, 1, 1)[1]

    @property
    def middle(self) -> float:
        """Half-way up on the page."""
        return (self.y + self.top) / 2


@dataclasses.dataclass(frozen=True)
class Look:
    """How a cuboid is drawn.

    Attributes:
      colours: of equal parts of its features, from the front to the back.
      pixels: rows and columns of the grid in front.
      maps: into how many features the depth is cut by lines; 1 for none.
    """

    colours: Sequence[str]
    pixels: tuple[int, int] = (1, 1)
    maps: int = 1


def draw(axes: Axes, cuboid: Cuboid, look: Look) -> None:
    """Three faces: the front, the top and the right side."""
    count = len(look.colours)
    for part in reversed(range(count)):
        near, far = part / count, (part + 1) / count
        colour = look.colours[part]
        top = [cuboid.at(*p) for p in ((0, 1, near), (1, 1, near), (1, 1, far), (0, 1, far))]
        side = [cuboid.at(*p) for p in ((1, 0, near), (1, 0, far), (1, 1, far), (1, 1, near))]
        face(axes, top, lighter(colour, 0.6))
        face(axes, side, lighter(colour, 0.3))
    front = [cuboid.at(*p) for p in ((0, 0), (1, 0), (1, 1), (0, 1))]
    face(axes, front, lighter(look.colours[0], 0.8))
    for cut in range(1, look.maps):
        back = cut / look.maps
        _line(axes, [cuboid.at(0, 1, back), cuboid.at(1, 1, back), cuboid.at(1, 0, back)])
    rows, columns = look.pixels
    for row in range(1, rows):
        _line(axes, [cuboid.at(0, row / rows), cuboid.at(1, row / rows)], 0.4)
    for column in range(1, columns):
        _line(axes, [cuboid.at(column / columns, 0), cuboid.at(column / columns, 1)], 0.4)


def face(axes: Axes, corners: Sequence[Point], colour: str) -> None:
    axes.add_patch(
        Polygon(corners, facecolor=colour, edgecolor="#333333", linewidth=LINE, joinstyle="round")
    )


def label_edges(
    axes: Axes, cuboid: Cuboid, sizes: tuple[int, int, int], fontsize: float = 10
) -> None:
    """Writes height, width and features along the edges that are seen."""
    height, width, features = (f"{size:,}" for size in sizes)
    gap = 0.012 * fontsize
    (left, middle), (centre, bottom) = cuboid.at(0, 0.5), cuboid.at(0.5, 0)
    x, y = cuboid.at(1, 0, 0.5)
    write(axes, (left - 0.5 * gap, middle), height, fontsize=fontsize, ha="right")
    write(axes, (centre, bottom - gap), width, fontsize=fontsize)
    write(axes, (x + 0.5 * gap, y - 1.1 * gap), features, fontsize=fontsize, ha="left")


def write(axes: Axes, place: Point, text: str, **style: Any) -> None:
    """Text about a place."""
    style = {"ha": "center", "va": "center", "fontsize": 10, "color": "#222222"} | style
    axes.text(*place, text, **style)


def sizes_text(sizes: Sequence[int]) -> str:
    """Such as 7 x 7 x 3, with the sign of multiplication."""
    return " \N{MULTIPLICATION SIGN} ".join(f"{size:,}" for size in sizes)


def lighter(colour: str, share: float) -> str:
    """`colour` with so much white in it."""
    red, green, blue = (1 - (1 - c) * (1 - share) for c in to_rgb(colour))
    return to_hex((red, green, blue))


def _line(axes: Axes, points: Sequence[Point], width: float = LINE) -> None:
    axes.plot(*zip(*points, strict=True), color="#333333", linewidth=width)


def page(width: float, height: float) -> tuple[Figure, Axes]:
    """A white page whose units are inches, from its lower left corner."""
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return figure, axes
