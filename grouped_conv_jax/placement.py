"""Tables of what a compiled program exchanges between devices and holds on one."""

from grouped_conv_jax.parallel.placement import (
    Exchange,
    Memory,
    PlacementReport,
    Row,
    placement_report,
)

__all__ = ["Exchange", "Memory", "PlacementReport", "Row", "placement_report"]
