"""What each device gets to compute, as it turns out while a function is compiled: `Watch`."""

import uuid
from collections import Counter
from typing import NamedTuple

from jax.sharding import Mesh

from grouped_conv_jax import jax_compat
from grouped_conv_jax.algorithms.devices import Device
from grouped_conv_jax.algorithms.ranking import Choices
from grouped_conv_jax.algorithms.table import Asked
from grouped_conv_jax.spec import Contraction, ConvSpec


class Equation(NamedTuple):
    """The parameters of the primitive that say what is computed, and how."""

    contraction: Contraction
    spec: ConvSpec
    implementation: Asked
    choices: Choices | None


class Watch:
    """Takes notes of what is lowered and partitioned in its context, `watching(watch)`.

    Compared by identity, as contexts are in the keys of JAX's caches: what is watched is lowered
    and compiled anew.

    Attributes:
      seen: how often an equation has become a convolution of this spec on this kind of device. If
        there is a mesh, XLA divides the spec over it by itself; else the spec is one device's.
    """

    def __init__(self) -> None:
        self.seen: Counter[tuple[Equation, ConvSpec, Device, Mesh | None]] = Counter()
        self._id = uuid.uuid4()

    def __repr__(self) -> str:
        # In the key of the persistent cache, which would answer without asking for a partition.
        return f"Watch({self._id})"

    def note(
        self,
        equation: Equation,
        device: Device,
        spec: ConvSpec,
        divided_over: Mesh | None,
    ) -> None:
        self.seen[equation, spec, device, divided_over] += 1


watching = jax_compat.make_user_context(None)
"""The `Watch` that a lowering reports to, or None. (What it starts may run in another thread.)"""
