"""Towers on devices: a mesh, a net whose towers are spread over it, and its functions."""

from grouped_conv_jax.parallel.pmap import Pmap as Pmap
from grouped_conv_jax.parallel.towers import (
    DATA,
    GROUP,
    PLACEMENTS,
    Placement,
    TowerNet,
    make_mesh,
)

__all__ = ["DATA", "GROUP", "PLACEMENTS", "Placement", "TowerNet", "make_mesh"]
