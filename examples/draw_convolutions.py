"""Draws what a grouped convolution is, and the net that it was invented for.

python examples/draw_convolutions.py
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import tyro
from matplotlib.figure import Figure

from drawings.convolution import draw_convolution
from drawings.files import save
from drawings.shapes import convolution, layers
from drawings.two_towers import draw_towers
from grouped_conv_jax.models import AlexNetConfig


@dataclasses.dataclass(frozen=True)
class Options:
    """Draws a standard, a grouped and a depthwise convolution, and the AlexNet of two towers."""

    output: Path = Path("docs")
    """The folder for the pictures."""

    suffix: str = ".svg"
    """Their format: .svg or .png."""


def standard() -> Figure:
    conv = convolution(size=7, features=3, taps=3, outputs=128, groups=1)
    return draw_convolution(conv, "Standard convolution: each filter sees all features")


def grouped() -> Figure:
    conv = convolution(size=7, features=4, taps=3, outputs=128, groups=2)
    return draw_convolution(conv, "Grouped convolution: each filter sees the features of its group")


def depthwise() -> Figure:
    conv = convolution(size=7, features=3, taps=3, outputs=3, groups=3)
    return draw_convolution(conv, "Depthwise convolution: a group for each feature")


def two_towers() -> Figure:
    config = AlexNetConfig.paper()
    return draw_towers(layers(config), config.towers)


DRAWINGS: dict[str, tuple[Callable[[], Figure], str]] = {
    "standard": (
        standard,
        "A convolution with one group. Each filter is as deep as the input has features, and makes "
        "one feature of the output.",
    ),
    "grouped": (
        grouped,
        "A convolution with two groups. The input's features are cut into two halves, and each "
        "half has filters of its own, half as deep. The outputs are joined.",
    ),
    "depthwise": (
        depthwise,
        "A convolution with as many groups as features. Each feature has a filter of its own, one "
        "feature deep.",
    ),
    "two-towers": (
        two_towers,
        "AlexNet cut into two towers. conv2, conv4 and conv5 are grouped convolutions, in which a "
        "tower sees itself alone; at conv3 and the fully connected layers the towers talk.",
    ),
}
"""By name of the file: what draws it, and what is to be seen, for those who cannot see it."""


def save_drawings(options: Options) -> None:
    """Writes all of them."""
    options.output.mkdir(parents=True, exist_ok=True)
    for name, (draw, description) in DRAWINGS.items():
        path = options.output / f"{name}{options.suffix}"
        save(draw(), path, {"savefig.dpi": 150}, name, description)


def main() -> None:
    """The command line."""
    jax.config.update("jax_platforms", "cpu")
    save_drawings(tyro.cli(Options))


if __name__ == "__main__":
    main()
