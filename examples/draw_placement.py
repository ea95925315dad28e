"""Draws which tower of the paper's AlexNet is on which device, and where they talk.

python examples/draw_placement.py --mesh 1 2 --output docs/placement.svg
python examples/draw_placement.py --mesh 2 2 --output docs/placement-2x2.svg
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated

import jax
import tyro

from alexnet.reports.placement_picture import save_placement
from grouped_conv_jax.models import AlexNetConfig
from grouped_conv_jax.towers import make_mesh


@dataclasses.dataclass(frozen=True)
class Options:
    """Draws the paper's AlexNet on a mesh of CPU devices."""

    mesh: Annotated[tuple[int, int], tyro.conf.arg(metavar="DATA GROUP")] = (1, 2)
    """Devices for examples and for towers."""

    towers: int = 2
    """Towers that the net is cut into."""

    output: Path = Path("placement.svg")
    """The picture to write, .svg or .png."""


def main() -> None:
    """The command line."""
    options = tyro.cli(Options)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", math.prod(options.mesh))
    config = AlexNetConfig.paper(towers=options.towers)
    save_placement(options.output, make_mesh(*options.mesh), config)


if __name__ == "__main__":
    main()
