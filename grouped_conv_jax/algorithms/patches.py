"""Matrix products, one for each group and row of the kernel.

    out[p, o] = sum over the rows of the kernel of patches[p, (k c)] · rhs[(k c), o]

where a patch holds what the taps of that row see. A kernel of one tap needs no patches: they are
the input itself.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from grouped_conv_jax.algorithms import costs, memory
from grouped_conv_jax.algorithms.devices import Device
from grouped_conv_jax.algorithms.phases import (
    Dimension,
    Read,
    dimensions,
    each_phase,
    each_read,
    interleave,
    padded,
    phase_count,
)
from grouped_conv_jax.spec import Contraction, ConvSpec, Role

MAX_PRODUCTS = 128
"""Matrix products: more take too long to compile, as do more pieces of an operand."""

MAX_PIECES = 512
"""Pieces: what each tap sees of each group, and the phases of each."""


class Patches(memory.InParts):
    """Matrix products, one for each group and row of the kernel."""

    def supports(self, contraction: Contraction, spec: ConvSpec, device: Device) -> str | None:
        if spec.is_symbolic:
            return "it needs to know all sizes"
        if not spec.window_strides:
            return "it needs a spatial dimension"
        if jax.dtypes.itemsize_bits(spec.operand_dtype(contraction)) < 8:
            return f"XLA does not multiply matrices of {spec.operand_dtype(contraction)}"
        products = spec.feature_group_count * math.prod(spec.spatial_shape("rhs")[:-1])
        if products > MAX_PRODUCTS:
            return f"{products} matrix products are more than {MAX_PRODUCTS}"
        taps = math.prod(spec.spatial_shape("rhs"))
        pieces = spec.feature_group_count * max(taps, phase_count(contraction, spec))
        if pieces > MAX_PIECES:
            return f"{pieces} pieces of an operand are more than {MAX_PIECES}"
        return None

    def seconds(self, contraction: Contraction, spec: ConvSpec, device: Device) -> float:
        """Matrix products, and as many bytes for the patches as a row of the kernel has taps."""
        if device.platform != "cpu":
            return math.inf
        *rows, taps = spec.spatial_shape("rhs")
        calls = spec.feature_group_count * math.prod(rows)
        other = costs.nbytes(spec, "lhs" if contraction == "fprop" else "out")
        patches = 0 if taps == 1 else 2 * taps * math.prod(rows) * other
        moved = (patches + costs.all_bytes(contraction, spec)) / costs.BYTES_PER_SECOND
        rate = costs.dense_rate(contraction, spec)
        if taps > 1 and spec.accumulator.itemsize > 4:
            rate *= 0.25
        return costs.CALL * calls + moved + costs.flops(spec) / rate

    def stored(self, contraction: Contraction, spec: ConvSpec) -> int:
        return _stored(contraction, spec)

    def whole(self, contraction: Contraction) -> memory.Compute:
        return {"fprop": _fprop, "dgrad": _dgrad, "wgrad": _wgrad}[contraction]


def _stored(contraction: Contraction, spec: ConvSpec) -> int:
    """Returns the temporary bytes of the whole batch: the patches of all groups and rows of the
    kernel, which XLA may compute before any product, the converted operands and the result.
    """
    itemsize = spec.accumulator.itemsize
    lhs, rhs, out = (memory.array_bytes(spec, role, itemsize) for role in ("lhs", "rhs", "out"))
    transposed = 0 if memory.is_channels_last(spec) else costs.all_bytes(contraction, spec)
    taps = math.prod(spec.spatial_shape("rhs"))
    inputs, outputs = spec.group_width
    patches = 0
    if taps > 1:
        # Each phase of the input's gradient sees its own taps only.
        patches = taps * (out * inputs // outputs if contraction != "dgrad" else out)
        patches += memory.padded_bytes("dgrad" if contraction == "dgrad" else "fprop", spec)
    return transposed + patches + lhs + out + 2 * rhs


def _fprop(lhs: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
    x, w = spec.to_channels_last("lhs", lhs), spec.to_channels_last("rhs", rhs)
    groups = zip(_split(x, spec), _split(w, spec), strict=True)
    where = dimensions("fprop", spec)
    out = jnp.concatenate([_correlate(a, b, where, "out", spec) for a, b in groups], -1)
    return spec.from_channels_last("out", out)


def _dgrad(out: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
    y, w = spec.to_channels_last("out", out), spec.to_channels_last("rhs", rhs)
    groups = zip(_split(y, spec), _split(w, spec), strict=True)
    where = dimensions("dgrad", spec)
    lhs = jnp.concatenate(
        [_correlate(a, jnp.swapaxes(b, -1, -2), where, "lhs", spec) for a, b in groups], -1
    )
    return spec.from_channels_last("lhs", lhs)


def _wgrad(lhs: jax.Array, out: jax.Array, spec: ConvSpec) -> jax.Array:
    x, y = spec.to_channels_last("lhs", lhs), spec.to_channels_last("out", out)
    groups = zip(_split(x, spec), _split(y, spec), strict=True)
    where = dimensions("fprop", spec)
    rhs = jnp.concatenate([_kernel(a, b, where, spec) for a, b in groups], -1)
    return spec.from_channels_last("rhs", rhs)


def _split(x: jax.Array, spec: ConvSpec) -> list[jax.Array]:
    """The groups of an array whose last dimension has them."""
    size = x.shape[-1] // spec.feature_group_count
    return [x[..., i : i + size] for i in range(0, x.shape[-1], size)]


def _correlate(
    x: jax.Array, w: jax.Array, where: Sequence[Dimension], result: Role, spec: ConvSpec
) -> jax.Array:
    """(N, *S, C) and (*K, C, O) to (N, *S, O), of one group."""
    batch, outputs = x.shape[0], w.shape[-1]
    x, before = padded(x, where)
    parts = []
    for phases in each_phase(where):
        counts = tuple(p.count for p in phases)
        total = jnp.zeros((batch * math.prod(counts), outputs), spec.accumulator)
        for row in each_read(phases[:-1]):
            reads = phases[-1].reads
            if reads:
                weights = [w[(*(r.tap for r in row), read.tap)] for read in reads]
                seen = _patches(x, row, reads, before)
                total += _product(seen, jnp.concatenate(weights), (1, 0), spec)
        part = total.reshape(batch, *counts, outputs)
        parts.append(part.astype(spec.role_dtype(result)))
    return interleave(parts, where)


def _kernel(x: jax.Array, y: jax.Array, where: Sequence[Dimension], spec: ConvSpec) -> jax.Array:
    """(N, *S, C) and (N, *S, O) to (*K, C, O), of one group."""
    inputs, outputs = x.shape[-1], y.shape[-1]
    x, before = padded(x, where)
    kernel = spec.spatial_shape("rhs")
    zeros = jnp.zeros((inputs, outputs), spec.accumulator)
    taps: dict[tuple[int, ...], jax.Array] = {}
    for phases in each_phase(where):
        seen_by = y[(slice(None), *(slice(p.residue, None, p.period) for p in phases))]
        seen_by = seen_by.reshape(-1, outputs)
        for row in each_read(phases[:-1]):
            reads = phases[-1].reads
            if reads:
                product = _product(_patches(x, row, reads, before), seen_by, (0, 0), spec)
                for read, tap in zip(reads, product.reshape(-1, inputs, outputs), strict=True):
                    taps[(*(r.tap for r in row), read.tap)] = tap
    rhs = jnp.stack([taps.get(tap, zeros) for tap in np.ndindex(*kernel)])
    return rhs.reshape(*kernel, inputs, outputs)


def _patches(
    x: jax.Array, row: Sequence[Read], reads: Sequence[Read], before: Sequence[int]
) -> jax.Array:
    """What the taps `reads` of a row of the kernel see: (positions, taps x inputs)."""
    windows = []
    for read in reads:
        cut = (r.within(low) for r, low in zip((*row, read), before, strict=True))
        windows.append(x[(slice(None), *cut)])
    return jnp.concatenate(windows, -1).reshape(-1, len(reads) * x.shape[-1])


def _product(a: jax.Array, b: jax.Array, contracting: tuple[int, int], spec: ConvSpec) -> jax.Array:
    # Gradients have the dtype of the result beside that of the operands, which is no wider.
    dtype = a.dtype if a.dtype == b.dtype else spec.wide_dtype
    return lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((contracting[0],), (contracting[1],)), ((), ())),
        precision=spec.precision,
        preferred_element_type=spec.accumulator,
    )
