"""XLA's own grouped convolution: the reference. It supports everything.

All three contractions are forward convolutions with `feature_group_count`. They are written out
(not through `jax.linear_transpose`): inside `shard_map` the operands carry their varying axes,
which a transpose of an abstract value would not know of, and sums would come out wrong.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import conv_general_dilated  # By name, so that a program may replace it in jax.lax.

from grouped_conv_jax.algorithms import costs, memory
from grouped_conv_jax.algorithms.base import Algorithm
from grouped_conv_jax.algorithms.devices import Device
from grouped_conv_jax.spec import RESULT, Contraction, ConvSpec


class Xla(Algorithm):
    """XLA's grouped convolution, with `feature_group_count`. It supports everything."""

    takes_dot_algorithm = True

    def seconds(self, contraction: Contraction, spec: ConvSpec, device: Device) -> float:
        """One group is what XLA is good at, and every other way to compute it is a detour, but for
        a matrix product. With groups, jax 0.12 computes 2 GFLOP/s for each feature of a group up to
        about 60 (jax 0.10 a third of that), half as much for the kernel's gradient, and a third in
        64 bits.
        """
        if spec.is_symbolic or device.platform != "cpu":
            # XLA:GPU computes the feature groups of kernel gradients up to 800 times as slowly as
            # cuDNN computes batch groups, and XLA:TPU up to 290 times by its own estimates.
            is_slow = contraction == "wgrad" and spec.feature_group_count != 1
            return 8.0 if is_slow else 1.0
        if spec.feature_group_count == 1:
            return costs.CALL + costs.flops(spec) / costs.convolution_rate(contraction, spec)
        rate = min(60e9, 2e9 * min(spec.group_width))
        if contraction == "wgrad":
            rate /= 2
        if spec.accumulator.itemsize > 4:
            rate /= 3
        return 2 * costs.CALL + costs.flops(spec) / rate

    def temporary_bytes(self, contraction: Contraction, spec: ConvSpec) -> int:
        """Returns the bytes of all arrays in the dtype of sums, where XLA:CPU converts or copies
        them: for the kernel's gradient, floats of less than 32 bits and complex numbers.
        """
        if contraction != "wgrad" and memory.lax_bytes(contraction, spec) == 0:
            return 0
        itemsize = spec.accumulator.itemsize
        return sum(memory.array_bytes(spec, role, itemsize) for role in ("lhs", "rhs", "out"))

    def fprop(self, lhs: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
        """[N, (G C)] · [(G O), C] -> [N, (G O)]."""
        return _convolve(
            lhs,
            rhs,
            window_strides=spec.window_strides,
            padding=spec.padding,
            lhs_dilation=spec.lhs_dilation,
            rhs_dilation=spec.rhs_dilation,
            layouts=(spec.layout("lhs"), spec.layout("rhs"), spec.layout("out")),
            contraction="fprop",
            spec=spec,
        )

    def dgrad(self, out: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
        """[N, (G O)] · [(G C), O] -> [N, (G C)].

        `out`, dilated by the strides, with the kernel turned round, its groups moved from the
        outputs to the inputs, and the two exchanged.
        """
        one = spec.one_group()
        rhs = one.unfold("rhs", "G", rhs, spec.feature_group_count)
        rhs = one.fold("rhs", "C", rhs, spec.group_dimension("rhs"))
        return _convolve(
            out,
            lax.rev(rhs, spec.layout("rhs")[2:]),
            window_strides=spec.lhs_dilation,
            padding=spec.dgrad_padding,
            lhs_dilation=spec.window_strides,
            rhs_dilation=spec.rhs_dilation,
            layouts=(spec.layout("out"), exchanged(spec.layout("rhs")), spec.layout("lhs")),
            contraction="dgrad",
            spec=spec,
        )

    def wgrad(self, lhs: jax.Array, out: jax.Array, spec: ConvSpec) -> jax.Array:
        """[C, (G N)] · [(G O), N] -> [C, (G O)].

        The batch is summed over, as the features were, and `out` is the kernel. lax's own kernel
        gradient has batch groups here instead, [(G C), N]: XLA computes those as G times the work
        on a CPU, and multiplies the result by the size of unused mesh axes when it partitions them.
        """
        one = spec.one_group()
        lhs = one.unfold("lhs", "G", lhs, spec.feature_group_count)
        lhs = one.fold("lhs", "N", lhs, spec.group_dimension("lhs"))
        return _convolve(
            lhs,
            out,
            window_strides=spec.rhs_dilation,
            padding=spec.wgrad_padding,
            lhs_dilation=spec.lhs_dilation,
            rhs_dilation=spec.window_strides,
            layouts=tuple(exchanged(spec.layout(role)) for role in ("lhs", "out", "rhs")),
            contraction="wgrad",
            spec=spec,
        )


def _convolve(
    lhs: jax.Array,
    rhs: jax.Array,
    *,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    layouts: tuple[Sequence[int], ...],
    contraction: Contraction,
    spec: ConvSpec,
) -> jax.Array:
    dtype = spec.operand_dtype(contraction)
    return convolve(
        lhs.astype(dtype),
        rhs.astype(dtype),
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        lax.ConvDimensionNumbers(*layouts),
        spec.feature_group_count,
        precision=spec.precision,
        preferred_element_type=spec.wide_dtype,
    ).astype(spec.role_dtype(RESULT[contraction]))


def convolve(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int = 1,
    **more: Any,
) -> jax.Array:
    """`lax.conv_general_dilated`, of any padding, and of crops that leave nothing."""

    def conv(lhs: jax.Array, padding: Sequence[Any], lhs_dilation: Sequence[int]) -> jax.Array:
        return conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            feature_group_count,
            **more,
        )

    spatial = dimension_numbers.lhs_spec[2:]
    left, pads, dilation = plainly_padded(lhs, padding, lhs_dilation, spatial)
    if lhs.dtype.itemsize > 4 and max(dilation, default=1) > 1 and max(rhs_dilation, default=1) > 1:
        # XLA:CPU ends the process over some of these, when its simplifier exchanges the operands.
        left, pads, dilation = _spread(left, pads, dilation, spatial)
    if any(n == 0 for n in left.shape):
        result = jax.eval_shape(lambda lhs: conv(lhs, padding, lhs_dilation), lhs)
        return jnp.zeros(result.shape, result.dtype)
    return conv(left, pads, dilation)


def plainly_padded(
    x: jax.Array,
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    spatial_dimensions: Sequence[int],
) -> tuple[jax.Array, list[tuple[int, int]], list[int]]:
    """What is left of padding and dilation when those are done that a convolution does not take.

    - Negative padding, as a slice before the dilation. XLA:CPU of jax 0.10 reads out of bounds
      where padding is negative before and positive after (0.12 does not).
    - What has a symbolic size, as a pad: lax's convolution takes symbolic pads as a string only.
    """
    left, steps = [], []
    for d, step, (low, high) in zip(spatial_dimensions, dilation, padding, strict=True):
        pads_known = isinstance(low, int) and isinstance(high, int)
        if not pads_known or (min(low, high) < 0 and not isinstance(x.shape[d], int)):
            config = [(0, 0, 0)] * x.ndim
            config[d] = (low, high, step - 1)
            x = lax.pad(x, jnp.zeros((), x.dtype), config)
            low, high, step = 0, 0, 1
        # How many elements the crop reaches; a gap beside the last of them stays, as padding.
        first, last = (-(min(pad, 0) // step) for pad in (low, high))
        if first or last:
            start = min(first, x.shape[d])
            x = lax.slice_in_dim(x, start, max(start, x.shape[d] - last), axis=d)
        left.append((low + first * step, high + last * step))
        steps.append(step)
    return x, left, steps


def _spread(
    x: jax.Array,
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    spatial_dimensions: Sequence[int],
) -> tuple[jax.Array, list[tuple[int, int]], list[int]]:
    """Padded and dilated beforehand, so that nothing is left to do."""
    config = [(0, 0, 0)] * x.ndim
    for d, step, (low, high) in zip(spatial_dimensions, dilation, padding, strict=True):
        config[d] = (low, high, step - 1)
    # Behind a barrier, or the simplifier makes a dilation of it again.
    x = lax.optimization_barrier(lax.pad(x, jnp.zeros((), x.dtype), config))
    rank = len(spatial_dimensions)
    return x, [(0, 0)] * rank, [1] * rank


def exchanged(layout: Sequence[int]) -> tuple[int, ...]:
    first, second, *spatial = layout
    return (second, first, *spatial)
