"""One `jnp.einsum` per kernel tap, with the groups as a batch dimension.

For each tap the operand is sliced where the tap reads it, and the slices are multiplied with the
weights of that tap. The output and the input gradient are sums of those products over the taps; in
the kernel gradient each product is the gradient of one tap.

XLA's partitioner divides these correctly where it miscomputes convolutions (see `xla_partitioner`).
On one device they are seldom the fastest.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from grouped_conv_jax.algorithms import costs, memory
from grouped_conv_jax.algorithms.base import Algorithm
from grouped_conv_jax.algorithms.devices import Device
from grouped_conv_jax.algorithms.phases import (
    Dimension,
    dimensions,
    each_phase,
    each_read,
    interleave,
    padded,
    phase_count,
)
from grouped_conv_jax.spec import Contraction, ConvSpec

MOST_TAPS = 512
"""Each tap is a matrix product of its own in the program, so more taps compile too long."""


class Einsum(Algorithm):
    """One product with a batch dimension for each tap."""

    takes_dot_algorithm = True

    def supports(self, contraction: Contraction, spec: ConvSpec, device: Device) -> str | None:
        if spec.is_symbolic:
            return "it needs to know all sizes"
        taps = math.prod(spec.spatial_shape("rhs"))
        if taps > MOST_TAPS:
            return f"it has a matrix product for each tap: at most {MOST_TAPS} taps, got {taps}"
        phases = phase_count(contraction, spec)
        if contraction != "wgrad" and phases > MOST_TAPS:
            return (
                f"it computes each phase of the strides: at most {MOST_TAPS} phases, got {phases}"
            )
        return None

    def seconds(self, contraction: Contraction, spec: ConvSpec, device: Device) -> float:
        """Returns what products with a batch dimension take on a CPU: the narrower, the slower."""
        if device.platform != "cpu":
            return math.inf
        rate = min(60e9, 0.3e9 * min(spec.group_width))
        taps = math.prod(spec.spatial_shape("rhs"))
        return costs.CALL * taps + costs.flops(spec) / rate

    def temporary_bytes(self, contraction: Contraction, spec: ConvSpec) -> int:
        """Returns the bytes of a padded operand, of a sum and a product for each tap, and
        copies.
        """
        itemsize = spec.accumulator.itemsize
        lhs, rhs, out = (memory.array_bytes(spec, role, itemsize) for role in ("lhs", "rhs", "out"))
        padded = memory.padded_bytes("dgrad" if contraction == "dgrad" else "fprop", spec)
        return padded + 2 * (lhs + rhs + out)

    def fprop(self, lhs: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
        x = spec.to_channels_last("lhs", lhs)
        w = jnp.moveaxis(_grouped_kernel(rhs, spec), -2, -3)  # (*K, G, C, O)
        out = _correlate(x, w, dimensions("fprop", spec), spec)
        return spec.from_channels_last("out", out.astype(spec.role_dtype("out")))

    def dgrad(self, out: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
        y = spec.to_channels_last("out", out)
        w = jnp.moveaxis(_grouped_kernel(rhs, spec), -3, -1)  # (*K, G, O, C)
        lhs = _correlate(y, w, dimensions("dgrad", spec), spec)
        return spec.from_channels_last("lhs", lhs.astype(spec.role_dtype("lhs")))

    def wgrad(self, lhs: jax.Array, out: jax.Array, spec: ConvSpec) -> jax.Array:
        x, y = spec.to_channels_last("lhs", lhs), spec.to_channels_last("out", out)
        taps, groups = spec.spatial_shape("rhs"), spec.feature_group_count
        gaps = [step - 1 for step in spec.lhs_dilation]
        config = [(*pad, gap) for pad, gap in zip(spec.wgrad_padding, gaps, strict=True)]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])
        x, y = _with_groups(x, groups), _with_groups(y, groups)
        products = []
        for tap in itertools.product(*map(range, taps)):
            starts = [i * d for i, d in zip(tap, spec.rhs_dilation, strict=True)]
            seen = tuple(
                slice(start, start + (size - 1) * stride + 1, stride)
                for start, size, stride in zip(
                    starts, y.shape[1:-2], spec.window_strides, strict=True
                )
            )
            products.append(_product("...gc,...go->cgo", x[(slice(None), *seen)], y, spec))
        rhs = jnp.stack(products).reshape(*taps, -1, math.prod(products[0].shape[1:]))
        return spec.from_channels_last("rhs", rhs.astype(spec.role_dtype("rhs")))


def _correlate(x: jax.Array, w: jax.Array, where: Sequence[Dimension], spec: ConvSpec) -> jax.Array:
    """Correlates (N, *S, G I) with (*K, G, I, J); the result is (N, *S, G J)."""
    groups = spec.feature_group_count
    x, before = padded(x, where)
    parts = []
    for phases in each_phase(where):
        sizes = (x.shape[0], *(phase.count for phase in phases))
        total = jnp.zeros((*sizes, groups, w.shape[-1]), spec.accumulator)
        for reads in each_read(phases):
            seen = tuple(read.within(low) for read, low in zip(reads, before, strict=True))
            window = _with_groups(x[(slice(None), *seen)], groups)
            weights = w[tuple(read.tap for read in reads)]
            total += _product("...gi,gij->...gj", window, weights, spec)
        parts.append(total.reshape(*sizes, -1))
    return interleave(parts, where)


def _product(equation: str, first: jax.Array, second: jax.Array, spec: ConvSpec) -> jax.Array:
    if first.dtype != second.dtype:
        first, second = first.astype(spec.wide_dtype), second.astype(spec.wide_dtype)
    return jnp.einsum(
        equation,
        first,
        second,
        precision=spec.precision,
        preferred_element_type=spec.accumulator,
    )


def _grouped_kernel(rhs: jax.Array, spec: ConvSpec) -> jax.Array:
    """Returns the kernel as (*K, C, G, O)."""
    return _with_groups(spec.to_channels_last("rhs", rhs), spec.feature_group_count)


def _with_groups(x: jax.Array, groups: int) -> jax.Array:
    """Splits the last dimension into the groups and the features of a group."""
    return x.reshape(*x.shape[:-1], groups, -1)
