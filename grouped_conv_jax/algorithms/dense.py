"""One dense convolution for each group: XLA:CPU is good at those, and not at grouped ones.

Arrays are put in the one layout that its fast convolutions take, (batch, *spatial, features) and
(*spatial, inputs, outputs): XLA does so by itself too, but not within a loop, where any other
layout is convolved a hundred times slower. A few groups are written out; more are a loop, so that
code and compilation do not grow with them.

The kernel's gradient is a convolution whose features are the batch. Wide groups have a kernel of
columns only instead, one row of taps after the other, and the batch and the rows as features: the
more features, the faster.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from grouped_conv_jax.algorithms import costs, memory, xla
from grouped_conv_jax.algorithms.devices import Device
from grouped_conv_jax.spec import RESULT, Contraction, ConvSpec

UNROLLED = 8
"""So many groups are written out, without a loop."""

IN_A_STEP = 4
"""Groups in one step of the loop: more of them are up to a tenth faster, and compile longer."""

TPU_LANES = 128
"""Elements of the last dimension that a TPU's register holds."""

WIDE = 32
"""Features of a group, from which on folding rows into features saves more than its copies take."""


class Dense(memory.InParts):
    """One dense convolution for each group."""

    takes_dot_algorithm = True

    def supports(self, contraction: Contraction, spec: ConvSpec, device: Device) -> str | None:
        return "it needs to know all sizes" if spec.is_symbolic else None

    def seconds(self, contraction: Contraction, spec: ConvSpec, device: Device) -> float:
        """The dense convolutions, and the copies of the groups out of and into the arrays."""
        if device.platform != "cpu":
            is_faster = _is_faster_on_accelerator(contraction, spec, device)
            return 0.7 if is_faster else math.inf
        copied = 2 * costs.all_bytes(contraction, spec)
        rate = costs.convolution_rate(contraction, spec)
        if spec.accumulator.itemsize > 4:
            # In a loop XLA:CPU is slow, most of all with kernels as large as the image.
            rate *= 0.03 if contraction == "wgrad" else 0.15
        work = copied / costs.BYTES_PER_SECOND + costs.flops(spec) / rate
        return costs.CALL * spec.feature_group_count + work

    def stored(self, contraction: Contraction, spec: ConvSpec) -> int:
        return _stored(contraction, spec)

    def whole(self, contraction: Contraction) -> memory.Compute:
        return {"fprop": _fprop, "dgrad": _dgrad, "wgrad": _wgrad}[contraction]


def _is_faster_on_accelerator(contraction: Contraction, spec: ConvSpec, device: Device) -> bool:
    """Returns whether the outputs and input gradients of few wide groups are faster than lax's.

    On an H100 they take 0.71 to 0.90 of the time in float32. On TPUs XLA estimates 1 / 2.4 to 1 /
    1.2 of the cycles, unless the features of a group in the result are a multiple of the lanes.
    """
    if contraction == "wgrad" or spec.feature_group_count == 1:
        return False
    groups, width = spec.feature_group_count, min(spec.group_width)
    if device.platform == "cuda":
        return groups <= 4 and width >= 64 and spec.dtype == np.float32
    if device.platform == "tpu":
        result_width = spec.group_width[1 if contraction == "fprop" else 0]
        has_strides = contraction == "fprop" and max(spec.window_strides, default=1) > 1
        is_wide = width >= 24 and result_width % TPU_LANES != 0
        return groups <= UNROLLED and is_wide and not has_strides
    return False


def _stored(contraction: Contraction, spec: ConvSpec) -> int:
    """Returns the temporary bytes of the whole batch, an upper bound from compiled programs.

    Groups that are written out are all copied before the first of them is convolved, and their
    results are put beside each other. A loop stores the groups of one step.
    """
    itemsize = spec.accumulator.itemsize
    groups, few = spec.feature_group_count, _in_a_step(spec, contraction)
    lhs, rhs, out = (memory.array_bytes(spec, role, itemsize) for role in ("lhs", "rhs", "out"))
    bits = memory.bits_bytes(spec)
    if contraction == "wgrad":
        stored = bits if memory.is_channels_last(spec) else bits + costs.all_bytes("wgrad", spec)
        padded = memory.padded_bytes("fprop", spec)
        if _is_moved_whole(spec):
            stored += sum(memory.array_bytes(spec, role) for role in ("lhs", "out"))
        if spec.dtype.itemsize < 4 and spec.dtype != jnp.bfloat16:
            # The rows that a row of taps sees are cut out before they are converted.
            return stored + (padded + lhs // 2 + out) * few // groups + 3 * rhs // 4
        return stored + (padded + lhs + out) * few // groups + rhs
    if few < groups:
        return (lhs + out) * few // groups + rhs + bits
    return max(lhs, out) + min(lhs, out) // (1 if bits else groups) + rhs


def _fprop(lhs: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
    x, w = spec.to_channels_last("lhs", lhs), spec.to_channels_last("rhs", rhs)
    convolve = functools.partial(
        _convolve,
        strides=spec.window_strides,
        padding=spec.padding,
        gaps=spec.lhs_dilation,
        dilation=spec.rhs_dilation,
        spec=spec,
    )
    out = _each_group(convolve, x, w, (-1, -1), "fprop", spec)
    return spec.from_channels_last("out", out)


def _dgrad(out: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
    y, w = spec.to_channels_last("out", out), spec.to_channels_last("rhs", rhs)
    (inputs, outputs), groups = spec.group_width, spec.feature_group_count
    w = jnp.swapaxes(w.reshape(*w.shape[:-1], groups, outputs), -1, -3)
    w = lax.rev(w, range(w.ndim - 3)).reshape(*w.shape[:-2], groups * inputs)
    convolve = functools.partial(
        _convolve,
        strides=spec.lhs_dilation,
        padding=spec.dgrad_padding,
        gaps=spec.window_strides,
        dilation=spec.rhs_dilation,
        spec=spec,
    )
    lhs = _each_group(convolve, y, w, (-1, -1), "dgrad", spec)
    return spec.from_channels_last("lhs", lhs)


def _wgrad(lhs: jax.Array, out: jax.Array, spec: ConvSpec) -> jax.Array:
    x, y = spec.to_channels_last("lhs", lhs), spec.to_channels_last("out", out)
    rank = len(spec.window_strides)
    by_row = rank > 1 and min(spec.group_width) >= WIDE and set(spec.lhs_dilation) == {1}
    if by_row:
        convolve = functools.partial(_row_by_row, spec=spec)
    else:
        convolve = functools.partial(
            _convolve,
            strides=spec.rhs_dilation,
            padding=spec.wgrad_padding,
            gaps=spec.lhs_dilation,
            dilation=spec.window_strides,
            spec=spec,
        )

    def in_order(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        if by_row:
            pads = [(0, 0, 0), *_row_padding(spec), *[(0, 0, 0)] * 2]
            x = lax.pad(x, jnp.zeros((), x.dtype), pads)
            # (G C, columns, N, *rows) and (columns, N, *rows, G O)
            return jnp.moveaxis(x, (-1, -2), (0, 1)), jnp.moveaxis(y, -2, 0)
        # (G C, *spatial, N) and (*spatial, N, G O)
        return jnp.moveaxis(x, (-1, 0), (0, -1)), jnp.moveaxis(y, 0, -2)

    if _is_moved_whole(spec):
        rhs = _each_group(convolve, *in_order(x, y), (0, -1), "wgrad", spec)
    else:
        rhs = _each_group(lambda x, y: convolve(*in_order(x, y)), x, y, (-1, -1), "wgrad", spec)
    return spec.from_channels_last("rhs", jnp.moveaxis(rhs, 0, -2))


def _is_moved_whole(spec: ConvSpec) -> bool:
    """Returns whether the kernel's gradient puts all groups into another order at once.

    That copies the arrays, but the features of one of many groups are too few to be read alone.
    """
    return spec.feature_group_count > UNROLLED and not memory.bits_bytes(spec)


def _each_group(
    convolve: Callable,
    first: jax.Array,
    second: jax.Array,
    dimensions: tuple[int, int],
    contraction: Contraction,
    spec: ConvSpec,
) -> jax.Array:
    """Convolves each group of two operands, which are in the dimensions; those of the result are in
    the last one.
    """
    groups = spec.feature_group_count
    few = _in_a_step(spec, contraction)
    steps = groups // few
    dtype = spec.accumulator if contraction == "wgrad" else spec.role_dtype(RESULT[contraction])

    def step(i: jax.Array | int) -> jax.Array:
        operands = list(zip((first, second), dimensions, strict=True))
        cut = [_part(x, d, i, steps) for x, d in operands]
        parts = [
            convolve(*(_part(x, d, j, few) for x, d in zip(cut, dimensions, strict=True)))
            for j in range(few)
        ]
        return jnp.concatenate(parts, -1).astype(dtype)

    if steps == 1:
        return step(0)
    one = jax.eval_shape(step, 0)

    def put(i: jax.Array, result: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(result, step(i), i * one.shape[-1], -1)

    result = memory.zeros((*one.shape[:-1], steps * one.shape[-1]), one.dtype, first)
    return lax.fori_loop(0, steps, put, result)


def _in_a_step(spec: ConvSpec, contraction: Contraction) -> int:
    """Returns how many groups are written out: all if they are few, else those of one step of the
    loop.

    The operands of the kernel's gradient are large in the order in which they are convolved: one
    of few groups has them at a time.
    """
    groups = spec.feature_group_count
    if groups <= UNROLLED:
        return 1 if contraction == "wgrad" else groups
    return next(n for n in range(IN_A_STEP, 0, -1) if groups % n == 0)


def _part(x: jax.Array, dimension: int, i: jax.Array | int, parts: int) -> jax.Array:
    if parts == 1:
        return x
    dimension %= x.ndim
    size = x.shape[dimension] // parts
    if isinstance(i, int):
        return lax.slice_in_dim(x, i * size, (i + 1) * size, axis=dimension)
    return memory.dynamic_slice(x, i * size, size, dimension)


def _row_by_row(x: jax.Array, y: jax.Array, spec: ConvSpec) -> jax.Array:
    """(C, columns, N, *rows) and (columns, N, *rows, O) to (C, *K, O), a row of taps at a time."""
    *rows, _ = spec.spatial_shape("rhs")
    *strides, _ = spec.window_strides
    *dilations, _ = spec.rhs_dilation
    reach = [(n - 1) * s + 1 for n, s in zip(y.shape[2:-1], strides, strict=True)]
    y = y.reshape(y.shape[0], -1, y.shape[-1])

    def one(number: jax.Array) -> jax.Array:
        taps = jnp.unravel_index(number, rows)
        starts = [tap * d for tap, d in zip(taps, dilations, strict=True)]
        zero = jnp.zeros((), number.dtype)  # A number of Python's may be of 64 bits.
        seen = lax.dynamic_slice(x, [zero] * 3 + starts, [*x.shape[:3], *reach])
        seen = seen[(..., *(slice(None, None, s) for s in strides))]
        return _convolve(
            seen.reshape(*x.shape[:2], -1),
            y,
            strides=spec.rhs_dilation[-1:],
            padding=spec.wgrad_padding[-1:],
            gaps=(1,),
            dilation=spec.window_strides[-1:],
            spec=spec,
        )

    # In a loop: the copy of what a row of taps sees is there for one of them at a time.
    found = jnp.moveaxis(lax.map(one, lax.iota(np.int32, math.prod(rows))), 0, 1)
    return found.reshape(found.shape[0], *rows, *found.shape[2:])


def _row_padding(spec: ConvSpec) -> list[tuple[int, int, int]]:
    return [(low, high, 0) for low, high in spec.wgrad_padding[:-1]]


def _convolve(
    x: jax.Array,
    w: jax.Array,
    *,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    gaps: Sequence[int],
    dilation: Sequence[int],
    spec: ConvSpec,
) -> jax.Array:
    dtype = x.dtype if x.dtype == w.dtype else spec.wide_dtype
    rank = len(strides)
    layout = (0, rank + 1, *range(1, rank + 1))
    kernel = (rank + 1, rank, *range(rank))
    return xla.convolve(
        x.astype(dtype),
        w.astype(dtype),
        strides,
        padding,
        gaps,
        dilation,
        lax.ConvDimensionNumbers(layout, kernel, layout),
        precision=spec.precision,
        preferred_element_type=spec.wide_dtype,
    )
