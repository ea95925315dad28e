"""Groups packed into wider ones, with a block-diagonal kernel: for the tiles of a tensor core.

A tile is at least 16 wide, and what a narrower group leaves of it is wasted anyway; here it is
filled with the next groups, and zeros in the kernel keep them apart. Zeros do not keep infinities
and NaN apart, though: 0 times those is NaN, in the outputs of all groups that were packed together.
That is why this is used only where it is asked for.
"""

import dataclasses

import jax
import jax.numpy as jnp

from grouped_conv_jax.algorithms.base import Algorithm
from grouped_conv_jax.algorithms.devices import Device
from grouped_conv_jax.algorithms.xla import Xla
from grouped_conv_jax.spec import Contraction, ConvSpec

XLA = Xla()

TILE = 16
"""Inputs and outputs of a packed group, at the least, as far as there are groups to pack."""


class Packed(Algorithm):
    """Grouped convolutions of wider groups, with block-diagonal kernels."""

    takes_dot_algorithm = True
    runs_unasked = False

    def supports(self, contraction: Contraction, spec: ConvSpec, device: Device) -> str | None:
        if not all(isinstance(n, int) for n in spec.group_width):
            return "it needs to know how wide the groups are"
        return None

    def fprop(self, lhs: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
        return XLA.fprop(lhs, _block_diagonal(rhs, spec), _packed(spec))

    def dgrad(self, out: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
        return XLA.dgrad(out, _block_diagonal(rhs, spec), _packed(spec))

    def wgrad(self, lhs: jax.Array, out: jax.Array, spec: ConvSpec) -> jax.Array:
        packed = _packed(spec)
        blocks, together = packed.feature_group_count, _together(spec)
        inputs, outputs = spec.group_width
        rhs = packed.to_channels_last("rhs", XLA.wgrad(lhs, out, packed))
        rhs = rhs.reshape(*rhs.shape[:-2], together, inputs, blocks, together, outputs)
        rhs = jnp.moveaxis(jnp.diagonal(rhs, axis1=-5, axis2=-2), -1, -2)
        return spec.from_channels_last("rhs", rhs.reshape(*rhs.shape[:-3], -1))


def _together(spec: ConvSpec) -> int:
    """How many groups are packed: as few as fill a tile, of those that divide the groups."""
    groups, width = spec.feature_group_count, min(spec.group_width)
    if width >= TILE:
        return 1
    return next(
        n for n in range(1, groups + 1) if (groups % n == 0 and n * width >= TILE) or n == groups
    )


def _packed(spec: ConvSpec) -> ConvSpec:
    together = _together(spec)
    rhs = list(spec.rhs_shape)
    rhs[spec.layout("rhs")[1]] *= together
    return dataclasses.replace(
        spec, rhs_shape=tuple(rhs), feature_group_count=spec.feature_group_count // together
    )


def _block_diagonal(rhs: jax.Array, spec: ConvSpec) -> jax.Array:
    together = _together(spec)
    inputs, outputs = spec.group_width
    blocks = spec.feature_group_count // together
    w = spec.to_channels_last("rhs", rhs)
    w = w.reshape(*w.shape[:-2], 1, inputs, blocks, together, outputs)
    own = jnp.eye(together, dtype=bool).reshape(together, 1, 1, together, 1)
    w = jnp.where(own[(None,) * (w.ndim - 5)], w, jnp.zeros((), w.dtype))
    w = w.reshape(*w.shape[:-5], together * inputs, -1)
    return _packed(spec).from_channels_last("rhs", w)
