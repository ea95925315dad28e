"""The algorithms for the three contractions of a convolution, and the choice among them.

`Algorithm` is the interface of one algorithm. The table of those of this package is in `table`, and
`register` adds another one. `choice` decides which one runs.
"""

from grouped_conv_jax.algorithms.base import Algorithm
from grouped_conv_jax.algorithms.devices import Device
from grouped_conv_jax.algorithms.table import implementations, register

__all__ = ["Algorithm", "Device", "implementations", "register"]
