"""Rows that a device needs of its neighbours, where a spatial dimension of the input is sharded.

An output row y, a tap k and an input row x meet where y s + k d = x e + low, with the strides s,
the dilations d of the kernel and e of the input, and the low padding. The device at place q has
the block q of the input and the block q of the output; its output needs input rows from
q step + first on, `rows` of them, of which its neighbours send it those that it lacks (the halo).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from grouped_conv_jax.spec import ConvSpec


@dataclasses.dataclass(frozen=True)
class Halo:
    """What one device of `devices` reads along one spatial dimension."""

    devices: int
    block: int
    """Input rows on a device, the last ones perhaps beyond the end."""
    step: int
    first: int
    rows: int
    out_block: int
    padding: tuple[int, int]
    """Of the convolution of `rows` input rows that gives `out_block` output rows."""

    @classmethod
    def of(cls, spec: ConvSpec, spatial: int, devices: int) -> Self | None:
        """None where there are more devices than rows; where each would need a program of its own,
        an input dilation being out of step with the blocks; and where a block of outputs reads
        padding only, or from beyond all devices.
        """
        x, y = (spec.spatial_shape(role)[spatial] for role in ("lhs", "out"))
        if min(x, y) < devices:
            return None
        s, e = spec.window_strides[spatial], spec.lhs_dilation[spatial]
        low, kernel = spec.padding[spatial][0], spec.extent("rhs")[spatial]
        out_block = math.ceil(y / devices)
        if out_block * s % e:
            return None
        reach = (out_block - 1) * s + kernel
        first = math.ceil(-low / e)
        rows = (reach - 1 - low) // e - first + 1
        if rows < 1:
            return None
        before = first * e + low
        after = reach - before - (1 + (rows - 1) * e)
        halo = cls(
            devices=devices,
            block=math.ceil(x / devices),
            step=out_block * s // e,
            first=first,
            rows=rows,
            out_block=out_block,
            padding=(before, after),
        )
        beyond = max(halo.before, halo.after) > (devices - 1) * halo.block
        return None if beyond else halo

    @property
    def before(self) -> int:
        """Rows from the devices before: the most that any device needs."""
        return max(0, -self.first, -self.first + (self.devices - 1) * (self.block - self.step))

    @property
    def after(self) -> int:
        """Rows from the devices after."""
        need = self.first + self.rows - self.block
        return max(0, need, need - (self.devices - 1) * (self.block - self.step))

    def exchange(
        self, x: jax.Array, dimension: int, axes: tuple[str, ...], mesh_shape: Mapping[str, int]
    ) -> jax.Array:
        """From a device's block of rows to those that it needs; zeros beyond both ends.

        The blocks follow each other along `axes`, the first of them the major one.
        """
        permute = _in_order(axes, mesh_shape)
        parts = [*self._received(x, dimension, permute, self.before, back=True), x]
        parts += self._received(x, dimension, permute, self.after, back=False)
        x = jnp.concatenate(parts, axis=dimension)
        place = lax.axis_index(axes) if self.block != self.step else 0
        start = self.before + self.first - place * (self.block - self.step)
        return lax.dynamic_slice_in_dim(x, start, self.rows, axis=dimension)

    def _received(
        self, x: jax.Array, dimension: int, permute: Callable, count: int, back: bool
    ) -> list[jax.Array]:
        """`count` rows before (or after) the block, from as many neighbours as have them."""
        received = []
        for hop in range(1, math.ceil(count / self.block) + 1):
            size = min(self.block, count - (hop - 1) * self.block)
            start = self.block - size if back else 0
            sent = lax.slice_in_dim(x, start, start + size, axis=dimension)
            shift = hop if back else -hop
            pairs = [(i, i + shift) for i in range(self.devices) if 0 <= i + shift < self.devices]
            received.append(permute(sent, pairs))
        return received[::-1] if back else received


def _in_order(axes: tuple[str, ...], mesh_shape: Mapping[str, int]) -> Callable:
    """`lax.ppermute` among places that are counted along `axes` in their own order: it counts
    them in the order of the mesh.
    """
    ordered = tuple(axis for axis in mesh_shape if axis in axes)
    counted = np.arange(math.prod(mesh_shape[axis] for axis in axes))
    counted = counted.reshape([mesh_shape[axis] for axis in ordered])
    places = counted.transpose([ordered.index(axis) for axis in axes]).ravel()

    def permute(x: jax.Array, pairs: list[tuple[int, int]]) -> jax.Array:
        return lax.ppermute(x, ordered, [(int(places[i]), int(places[j])) for i, j in pairs])

    return permute
