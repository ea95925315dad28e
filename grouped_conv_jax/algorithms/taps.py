"""Multiply-adds over the taps of the kernel, fused: narrow groups and depthwise.

    out[n, p, g, o] = sum over taps k and inputs c of lhs[n, p + k, g, c] * rhs[k, c, g, o]

is written out as that sum, so that XLA makes one loop of it, with the features innermost. No
product is ever stored. A depthwise convolution reads through indices that stay inside the array,
and so needs no padded copy; the others do, since XLA stores what it has looked up by an index
when several outputs use it. The strides of a gradient are phases (see `phases`).

The depthwise kernel gradient adds up a few products, from several examples or rows, before it
stores their sum; a product with ones sums those.
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
from grouped_conv_jax.spec import Contraction, ConvSpec

MAX_TERMS = 256
"""Products in one fused loop: beyond, the code grows and XLA makes no vectors of it."""

FAST_TERMS = 80
"""As many the compiler unrolls; a longer sum is left as a loop that is not made of vectors."""

MAX_PHASES = 64
"""Loops, each of which writes a part of the result: the phases of a stride."""

MAX_PAIRS = 64
"""Pairs of an input and an output: as many sums the kernel's gradient stores for each group."""

LOOKED_UP = 27
"""Taps of a depthwise kernel that are read by index; beyond, padding is quicker to compile."""

FUSED = 16
"""Taps up to which XLA:CPU repeats and converts elements where it looks them up."""

SUMMANDS = 8
"""How many products the kernel's gradient adds up before it stores a sum."""


class Taps(memory.InParts):
    """Multiply-adds over the taps of the kernel, fused into one loop."""

    def supports(self, contraction: Contraction, spec: ConvSpec, device: Device) -> str | None:
        if spec.is_symbolic:
            return "it needs to know all sizes"
        phases = phase_count(contraction, spec)
        if phases > MAX_PHASES:
            return f"{phases} phases are more than {MAX_PHASES}"
        inputs, outputs = spec.group_width
        if contraction == "wgrad":
            pairs = inputs * outputs
            return (
                None if inputs == 1 or pairs <= MAX_PAIRS else f"{pairs} sums for a tap and a group"
            )
        terms = math.prod(spec.spatial_shape("rhs"))
        if inputs > 1 or contraction == "dgrad":
            terms *= inputs if contraction == "fprop" else outputs
        if terms > MAX_TERMS:
            return f"an element is the sum of {terms} products, more than {MAX_TERMS}"
        return None

    def seconds(self, contraction: Contraction, spec: ConvSpec, device: Device) -> float:
        """Depthwise, as fast as memory. Narrow groups run in vectors of four outputs, as long as
        the sum is not too long. A kernel gradient reads both operands, from a cache, for each tap.
        One group has no groups to make vectors of.
        """
        if spec.feature_group_count == 1:
            return math.inf
        if device.platform != "cpu":
            # Phase by phase, on an H100: 0.51 (float32) and 0.76 (bfloat16) of the time of lax's.
            has_strides = max(spec.window_strides, default=1) > 1
            is_faster = device.platform == "cuda" and contraction == "dgrad" and has_strides
            is_faster = is_faster and spec.group_width == (1, 1)
            return 0.6 if is_faster else math.inf
        (inputs, outputs), taps = spec.group_width, math.prod(spec.spatial_shape("rhs"))
        moved = costs.all_bytes(contraction, spec) / costs.BYTES_PER_SECOND
        if inputs == 1:
            if contraction == "wgrad":
                return costs.CALL * taps + moved * taps / 2
            return costs.CALL + outputs * (moved + costs.flops(spec) / 60e9)
        if contraction == "wgrad":
            return costs.CALL * taps + costs.flops(spec) / 5e9
        terms = taps * (inputs if contraction == "fprop" else outputs)
        results = outputs if contraction == "fprop" else inputs
        rate = 40e9 if results % 4 == 0 else 12e9
        if terms > FAST_TERMS or spec.dtype == np.float16:
            rate = 3e9  # Not made of vectors.
        return costs.CALL + 2 * moved + costs.flops(spec) / rate

    def stored(self, contraction: Contraction, spec: ConvSpec) -> int:
        return _stored(contraction, spec)

    def whole(self, contraction: Contraction) -> memory.Compute:
        return {"fprop": _fprop, "dgrad": _dgrad, "wgrad": _wgrad}[contraction]


def _stored(contraction: Contraction, spec: ConvSpec) -> int:
    """Returns the temporary bytes of the whole batch, an upper bound from compiled programs.

    Narrow groups store a padded operand. A depthwise convolution looks up single elements, and
    stores no operand, unless it has many taps.
    """
    if contraction == "wgrad":
        return _stored_by_wgrad(spec)
    itemsize = spec.accumulator.itemsize
    lhs, out = (memory.array_bytes(spec, role, itemsize) for role in ("lhs", "out"))
    inputs, outputs = spec.group_width
    if inputs > 1:
        return memory.padded_bytes(contraction, spec)
    few = math.prod(spec.spatial_shape("rhs")) <= FUSED
    stored = 0
    if not _is_looked_up(spec.spatial_shape("rhs"), dimensions(contraction, spec)):
        times = outputs if contraction == "fprop" else 1
        stored = times * memory.padded_bytes(contraction, spec)
    elif not few:
        stored = lhs * outputs if contraction == "fprop" and outputs > 1 else 0
    if contraction == "dgrad" and outputs > 1 and (not few or phase_count("dgrad", spec) > 1):
        stored += 2 * lhs
    is_gapped = max(spec.lhs_dilation, default=1) > 1
    if memory.bits_bytes(spec) and (not few or is_gapped):
        stored = max(stored, lhs if contraction == "fprop" else lhs + out)
    elif memory.bits_bytes(spec) and contraction == "dgrad" and outputs > 1:
        stored += out
    if contraction == "dgrad" and outputs > 1 and _is_float8(spec):
        stored += lhs * (1 + outputs * (1 if few else math.prod(spec.spatial_shape("rhs"))))
    return stored


def _is_float8(spec: ConvSpec) -> bool:
    return spec.dtype.itemsize == 1 and spec.accumulator.kind == "f"


def _stored_by_wgrad(spec: ConvSpec) -> int:
    """XLA converts the output's gradient before the loop over the taps, and the input where it does
    not slice its dtype. Sums of eight products are stored.
    """
    lhs, out = (
        memory.array_bytes(spec, role, spec.accumulator.itemsize) for role in ("lhs", "out")
    )
    inputs, outputs = spec.group_width
    transposed = 0 if memory.is_channels_last(spec) else costs.all_bytes("wgrad", spec)
    converted = out if spec.dtype != spec.accumulator else 0
    if memory.bits_bytes(spec) or (inputs == 1 and outputs > 1):
        converted += lhs * (outputs if inputs == 1 else 1)
    if memory.bits_bytes(spec) and phase_count("wgrad", spec) > 1:
        converted += out // 2
    return transposed + converted + (3 * inputs * out // 8 if inputs > 1 else out // 4)


def _fprop(lhs: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
    x, w = spec.to_channels_last("lhs", lhs), spec.to_channels_last("rhs", rhs)
    inputs, outputs = spec.group_width
    where = dimensions("fprop", spec)
    if inputs == 1:
        out = _depthwise(_repeated(x, outputs), w[..., 0, :], where, spec.accumulator)
    else:
        w = w.reshape(*w.shape[:-1], spec.feature_group_count, outputs)
        out = _correlate(x, w, where, spec.accumulator)
    return spec.from_channels_last("out", out.astype(spec.role_dtype("out")))


def _dgrad(out: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
    y, w = spec.to_channels_last("out", out), spec.to_channels_last("rhs", rhs)
    inputs, outputs = spec.group_width
    where = dimensions("dgrad", spec)
    if inputs == 1:
        at_once = 1 if _is_float8(spec) else outputs  # XLA:CPU converts 8 bits slowly.
        lhs = _depthwise(y, w[..., 0, :], where, spec.accumulator, at_once)
        if at_once < outputs:
            lhs = lhs.reshape(*lhs.shape[:-1], spec.feature_group_count, outputs).sum(-1)
    else:
        w = w.reshape(*w.shape[:-1], spec.feature_group_count, outputs)
        lhs = _correlate(y, _swapped(w), where, spec.accumulator)
    return spec.from_channels_last("lhs", lhs.astype(spec.role_dtype("lhs")))


def _wgrad(lhs: jax.Array, out: jax.Array, spec: ConvSpec) -> jax.Array:
    x, y = spec.to_channels_last("lhs", lhs), spec.to_channels_last("out", out)
    (inputs, outputs), groups = spec.group_width, spec.feature_group_count
    x = _repeated(x, outputs) if inputs == 1 else x
    width = None if inputs == 1 else (groups, inputs, outputs)
    kernel = spec.spatial_shape("rhs")
    rhs = jnp.zeros((*kernel, groups * inputs * outputs), spec.accumulator)
    for phases in each_phase(dimensions("fprop", spec)):
        seen = y[(slice(None), *(slice(p.residue, None, p.period) for p in phases))]
        counts = [len(p.reads) for p in phases]

        def one_tap(number: jax.Array, seen=seen, phases=phases, counts=counts) -> jax.Array:
            positions = []
            for phase, taps in zip(phases, jnp.unravel_index(number, counts), strict=True):
                first, *others = phase.reads
                ahead = others[0].first - first.first if others else 0
                positions.append(_indices(first) + taps * ahead)
            return _sum_of_products(x, seen, positions, width, spec.accumulator)

        # In a loop: the code for all taps is the same, but for where they begin to read.
        if math.prod(counts):
            sums = lax.map(one_tap, lax.iota(np.int32, math.prod(counts)))
            taps = (slice(p.reads[0].tap, p.reads[-1].tap + 1, _step(p.reads)) for p in phases)
            rhs = rhs.at[tuple(taps)].set(sums.reshape(*counts, -1))
    rhs = jnp.swapaxes(rhs.reshape(*kernel, groups, inputs, outputs), -2, -3)
    rhs = rhs.reshape(*kernel, inputs, groups * outputs)
    return spec.from_channels_last("rhs", rhs)


def _correlate(
    x: jax.Array, w: jax.Array, where: Sequence[Dimension], dtype: np.dtype
) -> jax.Array:
    """(N, *S, G C) and (*K, C, G, O) to (N, *S, G O)."""
    inputs, groups, outputs = w.shape[-3:]
    # Of one dtype in the loop: conversions in it keep XLA:CPU from making vectors.
    x, before = padded(x.astype(dtype), where)
    x = x.reshape(*x.shape[:-1], groups, inputs)
    parts = []
    for phases in each_phase(where):
        shape = (x.shape[0], *(p.count for p in phases), groups, outputs)
        total = jnp.zeros(shape, dtype)
        for reads in each_read(phases):
            cut = (r.within(low) for r, low in zip(reads, before, strict=True))
            window = x[(slice(None), *cut)]
            weights = w[tuple(r.tap for r in reads)].astype(dtype)
            for c in range(inputs):
                total += window[..., c, None] * _aligned(weights[c], total.ndim)
        parts.append(total.reshape(*shape[:-2], groups * outputs))
    return interleave(parts, where)


def _depthwise(
    x: jax.Array,
    w: jax.Array,
    where: Sequence[Dimension],
    dtype: np.dtype,
    summed: int = 1,
) -> jax.Array:
    """(N, *S, G) and (*K, G) to (N, *S, G); the sums of `summed` neighbouring features, if that is
    more than one: they are products of one loop, and nothing is stored before the sum.
    """
    before = None
    if not _is_looked_up(w.shape[:-1], where):
        x, before = padded(x, where)
    parts = []
    for phases in each_phase(where):
        total = jnp.zeros((x.shape[0], *(p.count for p in phases), x.shape[-1] // summed), dtype)
        for reads in each_read(phases):
            weights = w[tuple(r.tap for r in reads)].astype(dtype)
            if before is None:
                window = _look_up(x, [_indices(r) for r in reads], [r.is_beyond for r in reads])
            else:
                cut = (r.within(low) for r, low in zip(reads, before, strict=True))
                window = x[(slice(None), *cut)]
            for o in range(summed):
                seen = window[..., o::summed].astype(dtype)
                total += seen * _aligned(weights[o::summed], total.ndim)
        parts.append(total)
    return interleave(parts, where)


def _sum_of_products(
    x: jax.Array,
    y: jax.Array,
    positions: Sequence[jax.Array],
    width: tuple[int, int, int] | None,
    dtype: np.dtype,
) -> jax.Array:
    """The gradient of one tap: the sum of x * y over all of `y`, for each feature, or for each
    pair of an input and an output of each group, if `width` says how many those are.

    The examples, and the rows if there are few examples, are cut into equal blocks, and what is
    left over is summed by itself.
    """

    def apart(x: jax.Array, y: jax.Array, positions: Sequence[jax.Array]) -> jax.Array:
        return _sum_of_products(x, y, positions, width, dtype)

    examples = min(SUMMANDS, x.shape[0])
    n, left = divmod(x.shape[0], examples)
    if left:
        return apart(x[:-left], y[:-left], positions) + apart(x[-left:], y[-left:], positions)
    rows = y.shape[1] if positions else 1
    blocks = min(-(-SUMMANDS // examples), rows)
    size, left = divmod(rows, blocks)
    if left:
        first, *others = positions
        whole = apart(x, y[:, :-left], [first[:-left], *others])
        return whole + apart(x, y[:, -left:], [first[-left:], *others])
    total = jnp.zeros((), dtype)
    for batch in (slice(i * n, (i + 1) * n) for i in range(examples)):
        for block in (slice(i * size, (i + 1) * size) for i in range(blocks)):
            seen = (y[batch, block] if positions else y[batch]).astype(dtype)
            read = [r[block] if i == 0 else r for i, r in enumerate(positions)]
            window = _look_up(x[batch], read, [True] * len(read)).astype(dtype)
            if width:
                groups, inputs, outputs = width
                window = window.reshape(*window.shape[:-1], groups, inputs, 1)
                seen = seen.reshape(*seen.shape[:-1], groups, 1, outputs)
            total += window * seen
    total = total.reshape(-1, math.prod(width) if width else y.shape[-1])
    ones = jnp.ones((1, total.shape[0]), dtype)
    return jnp.matmul(ones, total, precision=lax.Precision.HIGHEST)[0]


def _step(reads: Sequence[Read]) -> int:
    """From one tap to the next: those that a phase sees are equally far apart."""
    return reads[1].tap - reads[0].tap if len(reads) > 1 else 1


def _indices(read: Read) -> jax.Array:
    """Computed: a constant array is what a partitioned function may not have."""
    return lax.iota(np.int32, read.count) * read.step + read.first


def _look_up(x: jax.Array, indices: Sequence[jax.Array], beyond: Sequence[bool]) -> jax.Array:
    """The elements at the indices, and zeros where those are outside, if they may be.

    An index that is always inside, and a choice, cost XLA:CPU nothing in a loop over features; the
    branches of a fused pad would keep it from making vectors.
    """
    sizes = x.shape[1:-1]
    inside = [jnp.clip(i, 0, n - 1) for i, n in zip(indices, sizes, strict=True)]
    if not indices:
        return x
    found = x.at[(slice(None), *jnp.ix_(*inside))].get(mode="promise_in_bounds")
    for axis in (i for i, may_be in enumerate(beyond) if may_be):
        is_inside = indices[axis] == inside[axis]
        is_inside = is_inside.reshape([-1 if i == 1 + axis else 1 for i in range(x.ndim)])
        found = jnp.where(is_inside, found, jnp.zeros((), x.dtype))
    return found


def _swapped(w: jax.Array) -> jax.Array:
    """(*K, C, G, O) as (*K, O, G, C), and stored so: by index, since XLA:CPU would fuse a
    transpose into the loop, which then reads each weight from another place.
    """
    order = jnp.swapaxes(jnp.arange(w.size).reshape(w.shape), -1, -3)
    return w.reshape(-1).at[order].get(mode="promise_in_bounds")


def _repeated(x: jax.Array, outputs: int) -> jax.Array:
    """Each input of a depthwise convolution beside itself, once for each of its outputs."""
    return jnp.repeat(x, outputs, -1) if outputs > 1 else x


def _is_looked_up(kernel: Sequence[int], where: Sequence[Dimension]) -> bool:
    """Returns whether a depthwise kernel reads by index: one of few taps, or without phases."""
    phases = math.prod(len(d.phases()) for d in where)
    return math.prod(kernel) <= (LOOKED_UP if phases == 1 else FUSED)


def _aligned(x: jax.Array, rank: int) -> jax.Array:
    return x.reshape((1,) * (rank - x.ndim) + x.shape)
