"""Which elements of an operand a result sees, dimension by dimension, without the gaps.

Along one spatial dimension a result q of a correlation reads, for each tap i of the kernel, the
element (q stride + i dilation - low) / gaps of an operand that has been spread out with gaps, if
that is a whole number. Results that are the same number modulo `period` see the same taps, and
between them a correlation without gaps: they are a phase. The output of a convolution has one
phase (but for an input dilation), the input's gradient as many as the stride.

Only sizes are known here, no arrays but those that are put in order at the end.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grouped_conv_jax.spec import Contraction, ConvSpec


class Read(NamedTuple):
    """What one tap reads: `first`, `first + step`, and so on; `count` elements, which may lie
    outside the `size` elements that there are, where zeros are read.
    """

    tap: int
    first: int
    step: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    size: int

    def positions(self) -> range:
        return range(self.first, self.first + self.step * self.count, self.step)

    @property
    def is_beyond(self) -> bool:
        """Whether some of it lies outside."""
        return self.positions()[0] < 0 or self.positions()[-1] >= self.size

    def within(self, before: int) -> slice:
        """The same, of an operand that has been padded with zeros."""
        positions = self.positions()
        return slice(positions[0] + before, positions[-1] + before + 1, self.step)


class Phase(NamedTuple):
    """The results `residue`, `residue + period` and so on: `count` of them, and their reads."""

    residue: int
    period: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    reads: tuple[Read, ...]


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One spatial dimension of a correlation."""

    operand: int
    results: int
    taps: int
    stride: int
    dilation: int
    gaps: int
    low: int

    def phases(self) -> list[Phase]:
        period = self.gaps // math.gcd(self.stride, self.gaps)
        step = period * self.stride // self.gaps
        found = []
        for residue in range(min(period, self.results)):
            count = -(-(self.results - residue) // period)
            starts = (
                residue * self.stride + i * self.dilation - self.low for i in range(self.taps)
            )
            reads = tuple(
                Read(i, start // self.gaps, step, count, self.operand)
                for i, start in enumerate(starts)
                if start % self.gaps == 0
            )
            found.append(Phase(residue, period, count, reads))
        return found


def phase_count(contraction: Contraction, spec: ConvSpec) -> int:
    """How many phases the result has, or the operand that the kernel's gradient reads."""
    gaps = spec.window_strides if contraction == "dgrad" else spec.lhs_dilation
    strides = spec.lhs_dilation if contraction == "dgrad" else spec.window_strides
    return math.prod(g // math.gcd(g, s) for g, s in zip(gaps, strides, strict=True))


def dimensions(contraction: Contraction, spec: ConvSpec) -> list[Dimension]:
    """The spatial dimensions of a contraction that computes the output or the input's gradient.

    The gradient is the same correlation read backwards: the kernel goes the other way, and
    strides and gaps change places.
    """
    return [
        Dimension(lhs, out, taps, stride, dilation, gaps, low)
        if contraction == "fprop"
        else Dimension(out, lhs, taps, gaps, -dilation, stride, -low)
        for lhs, out, taps, stride, dilation, gaps, (low, _) in zip(
            spec.spatial_shape("lhs"),
            spec.spatial_shape("out"),
            spec.spatial_shape("rhs"),
            spec.window_strides,
            spec.rhs_dilation,
            spec.lhs_dilation,
            spec.padding,
            strict=True,
        )
    ]


def each_phase(dimensions: Sequence[Dimension]) -> Iterator[tuple[Phase, ...]]:
    """The phases of all dimensions together, in the order in which `interleave` takes them."""
    return itertools.product(*(d.phases() for d in dimensions))


def each_read(phases: Sequence[Phase]) -> Iterator[tuple[Read, ...]]:
    """The taps that one phase sees."""
    return itertools.product(*(phase.reads for phase in phases))


def padding(dimensions: Sequence[Dimension]) -> list[tuple[int, int]]:
    """How many zeros are read before the first element and after the last one, by dimension."""
    pads = []
    for dimension in dimensions:
        reads = [r.positions() for p in dimension.phases() for r in p.reads]
        low = max((-r[0] for r in reads), default=0)
        high = max((r[-1] + 1 - dimension.operand for r in reads), default=0)
        pads.append((max(low, 0), max(high, 0)))
    return pads


def padded(x: jax.Array, dimensions: Sequence[Dimension]) -> tuple[jax.Array, list[int]]:
    """Zeros wherever something is read, and how many are before the first element; `x` is
    (batch, *spatial, features).
    """
    pads = padding(dimensions)
    config = [(low, high, 0) for low, high in pads]
    zero = jnp.zeros((), x.dtype)
    return jax.lax.pad(x, zero, [(0, 0, 0), *config, (0, 0, 0)]), [low for low, _ in pads]


def interleave(parts: Sequence[jax.Array], dimensions: Sequence[Dimension]) -> jax.Array:
    """The results in their order; `parts` are (batch, *counts, ...) arrays, one for each phase."""
    if len(parts) == 1:
        return parts[0]
    for axis in reversed(range(len(dimensions))):
        periods = len(dimensions[axis].phases())
        parts = [
            _interleave(parts[i : i + periods], 1 + axis, dimensions[axis].results)
            for i in range(0, len(parts), periods)
        ]
    return parts[0]


def _interleave(parts: Sequence[jax.Array], axis: int, size: int) -> jax.Array:
    if len(parts) == 1:
        return parts[0]
    longest = parts[0].shape[axis]
    padded = [_lengthened(x, axis, longest) for x in parts]
    merged = jnp.stack(padded, axis + 1)
    shape = (*merged.shape[:axis], longest * len(parts), *merged.shape[axis + 2 :])
    return jax.lax.slice_in_dim(merged.reshape(shape), 0, size, axis=axis)


def _lengthened(x: jax.Array, axis: int, size: int) -> jax.Array:
    more = [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, more) if size > x.shape[axis] else x
