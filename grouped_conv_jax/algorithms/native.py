"""Kernels written for the job, in C++ (see `grouped_conv_jax.native`): CPUs only.

They take (batch, rows, columns, features) and convolutions of up to two spatial dimensions;
padding, strides and dilations are their own affair. 16 bits are added up in 32, and multiplied as
they are where the processor can do so fast.
"""

import jax
import jax.numpy as jnp
import numpy as np

from grouped_conv_jax import native
from grouped_conv_jax.algorithms import costs
from grouped_conv_jax.algorithms.base import Algorithm
from grouped_conv_jax.algorithms.devices import Device
from grouped_conv_jax.algorithms.phases import Dimension, dimensions
from grouped_conv_jax.spec import OPERANDS, RESULT, Contraction, ConvSpec, Role

DTYPES = tuple(np.dtype(t) for t in (jnp.float32, jnp.float64, jnp.bfloat16))

# When this is imported, so that XLA knows the kernels when it loads a compiled program as well.
native.missing()

LARGEST = 2**30
"""Of sizes, strides, dilations and padding."""

LARGEST_WINDOW = 2**26
"""Bytes of what some results read, gaps of a dilated kernel and all: it is packed as a whole."""


class Native(Algorithm):
    """Kernels in C++, for CPUs."""

    is_exportable = False

    def supports(self, contraction: Contraction, spec: ConvSpec, device: Device) -> str | None:
        if device.platform != "cpu":
            return "it is for CPUs"
        if reason := native.missing():
            return reason
        if spec.is_symbolic:
            return "it needs to know all sizes"
        if len(spec.window_strides) > 2:
            return "it has at most two spatial dimensions"
        if {spec.dtype, spec.wide_dtype} - set(DTYPES):
            return f"it computes {', '.join(map(str, DTYPES))}"
        sizes = (*spec.shape("lhs"), *spec.shape("rhs"), *spec.shape("out"))
        steps = (*spec.window_strides, *spec.lhs_dilation, *spec.rhs_dilation)
        pads = (abs(pad) for pads in spec.padding for pad in pads)
        if max(*sizes, *steps, *pads) >= LARGEST:
            return f"a size is {LARGEST} or more"
        if _window_bytes(contraction, spec) > LARGEST_WINDOW:
            return "what a result reads, dilated, is too large"
        return None

    def seconds(self, contraction: Contraction, spec: ConvSpec, device: Device) -> float:
        """Limited by memory, or by arithmetic: 430 GFLOP/s where the outputs of a group fill
        vectors.

        Lanes that no output fills are lost; where a vector holds several groups, a permutation goes
        with the multiplications. The kernels are compiled already: nothing else is as quick to
        start.
        """
        moved = costs.all_bytes(contraction, spec) / costs.BYTES_PER_SECOND
        outputs = spec.group_width[0 if contraction == "dgrad" else 1]
        lanes = 64 // spec.accumulator.itemsize
        rate = 430e9 * 4 / spec.accumulator.itemsize
        filled = lanes // outputs * outputs
        if filled > outputs and spec.feature_group_count > 1:
            rate *= 0.6 * min(filled, spec.feature_group_count * outputs) / lanes
        else:
            rate *= outputs / (-(-outputs // lanes) * lanes)
        return costs.CALL + max(moved, costs.flops(spec) / rate)

    def fprop(self, lhs: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
        return _call("fprop", lhs, rhs, spec)

    def dgrad(self, out: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
        return _call("dgrad", out, rhs, spec)

    def wgrad(self, lhs: jax.Array, out: jax.Array, spec: ConvSpec) -> jax.Array:
        return _call("wgrad", lhs, out, spec)


def _window_bytes(contraction: Contraction, spec: ConvSpec) -> int:
    """Of what a few results of a group read; several copies of narrow groups of other widths."""
    inputs, outputs = spec.group_width
    if contraction == "dgrad":
        inputs, outputs = outputs, inputs
    copies = 1 if inputs == outputs else max(1, 16 // outputs)
    steps = spec.lhs_dilation if contraction == "dgrad" else spec.window_strides
    pixels = inputs * copies * spec.accumulator.itemsize
    for i, (extent, step) in enumerate(zip(spec.extent("rhs"), steps, strict=True)):
        # Some columns are read together, and where strides meet dilations, up to a step more.
        results = 32 if i == len(steps) - 1 else 1
        pixels *= extent + results * step
    return pixels


def _call(
    contraction: Contraction, first: jax.Array, second: jax.Array, spec: ConvSpec
) -> jax.Array:
    dtype = spec.dtype if spec.dtype == spec.wide_dtype else spec.accumulator
    result = RESULT[contraction]
    operands = [
        _flat(role, spec.to_channels_last(role, x)).astype(dtype)
        for role, x in zip(OPERANDS[contraction], (first, second), strict=True)
    ]
    last = jax.eval_shape(
        lambda: spec.to_channels_last(result, jnp.zeros(spec.shape(result), dtype))
    )
    flat = jax.eval_shape(lambda x: _flat(result, x), last)
    out = jax.ffi.ffi_call(native.target(contraction), jax.ShapeDtypeStruct(flat.shape, dtype))(
        *operands,
        groups=np.int64(spec.feature_group_count),
        dimensions=_numbers(contraction, spec),
    )
    out = spec.from_channels_last(result, out.reshape(last.shape))
    return out.astype(spec.role_dtype(result))


def _flat(role: Role, x: jax.Array) -> jax.Array:
    """With two spatial dimensions, the first of them of size one if there are fewer."""
    missing = 4 - x.ndim
    first = 0 if role == "rhs" else 1
    return jnp.expand_dims(x, tuple(range(first, first + missing)))


def _numbers(contraction: Contraction, spec: ConvSpec) -> np.ndarray:
    """As the kernels take them: seven for each of two dimensions."""
    found = dimensions("dgrad" if contraction == "dgrad" else "fprop", spec)
    single = Dimension(operand=1, results=1, taps=1, stride=1, dilation=1, gaps=1, low=0)
    found = [single] * (2 - len(found)) + found
    return np.array(
        [[d.operand, d.results, d.taps, d.stride, d.dilation, d.gaps, d.low] for d in found],
        np.int64,
    ).reshape(-1)
