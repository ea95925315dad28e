"""Bounds the temporary memory of one contraction: the arrays beside its operands and its result.

Two bounds hold for what is chosen automatically on a CPU. A contraction stores no more than lax
does for the same call, and no more than three times its arrays. Where an algorithm would store
more, it computes a part of the batch at a time (`InParts`), and stores only that part's
temporary arrays.

    8 examples, float16, depthwise with 4 outputs, kernel gradient: 4.0 MB of arrays
    whole batch:          10.4 MB of temporary arrays, lax 8.0 MB
    2 examples at a time:  2.6 MB

Each algorithm estimates its temporary arrays by a function `temporary_bytes`. XLA allocates
them, and a test compares the estimates with `memory_analysis` of the compiled programs.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from grouped_conv_jax.algorithms import costs
from grouped_conv_jax.algorithms.base import Algorithm
from grouped_conv_jax.algorithms.phases import dimensions, padding
from grouped_conv_jax.jax_compat import varying
from grouped_conv_jax.spec import OPERANDS, RESULT, Contraction, ConvSpec, Role

MOST_ARRAYS = 3
"""Temporary arrays may be this many times as large as the operands and the result together."""

ALWAYS_ALLOWED = 64 << 10
"""Bytes that count as nothing: constants, alignment and transposed kernels of small calls."""

CACHED = 1 << 20
"""Bytes that stay in a core's cache; a part of the batch smaller than this is not worth a loop."""

Estimate = Callable[[Contraction, ConvSpec], int]
"""Returns the temporary bytes of a whole contraction, or an upper bound."""

Compute = Callable[[jax.Array, jax.Array, ConvSpec], jax.Array]
"""Computes one contraction; the kernel's gradient as sums that are not yet rounded."""


def array_bytes(spec: ConvSpec, role: Role, itemsize: int | None = None) -> int:
    """Returns the size of one array, in its own dtype or in elements of `itemsize` bytes."""
    return math.prod(spec.shape(role)) * (itemsize or spec.role_dtype(role).itemsize)


def is_channels_last(spec: ConvSpec) -> bool:
    """Returns whether no large array has to be transposed to have its features last."""
    layouts = (spec.layout(role) for role in ("lhs", "out"))
    return all(layout == (0, len(layout) - 1, *range(1, len(layout) - 1)) for layout in layouts)


def _is_channels_first(spec: ConvSpec) -> bool:
    """Returns whether both arrays have their features before the spatial dimensions."""
    layouts = (spec.layout(role) for role in ("lhs", "out"))
    return len(spec.window_strides) > 0 and all(
        layout == (*range(len(layout)),) for layout in layouts
    )


def padded_bytes(contraction: Contraction, spec: ConvSpec) -> int:
    """Returns the size of a correlation's operand with its padding, in the dtype of sums."""
    role = OPERANDS[contraction][0]
    taken = dimensions(contraction, spec)
    shape = spec.shape(role)
    size = math.prod(shape[d] for d in spec.layout(role)[:2]) * spec.accumulator.itemsize
    for d, (low, high) in zip(taken, padding(taken), strict=True):
        size *= d.operand + low + high
    return size


def allowance(spec: ConvSpec) -> int:
    """Returns the bytes that a contraction may store even where lax stores none: two copies of the
    kernel, and a quarter of the arrays, in the dtype of sums.

    Small calls may store half of their arrays up to 1 MiB, or 64 KiB.
    """
    itemsize = spec.accumulator.itemsize
    lhs, kernel, out = (array_bytes(spec, role, itemsize) for role in ("lhs", "rhs", "out"))
    arrays = lhs + kernel + out
    return 2 * kernel + max(ALWAYS_ALLOWED, min(CACHED, arrays // 2), arrays // 4)


def lax_bytes(contraction: Contraction, spec: ConvSpec) -> int:
    """Returns the bytes that lax's own contraction stores on a CPU, or a lower bound.

    XLA:CPU copies all arrays for the kernel's gradient, and some for complex numbers. It converts
    floats of less than 32 bits to 32 bits. The result is converted back into its own buffer, which
    holds the converted operand before, if it is large enough. Arrays with their features before
    the spatial dimensions are transposed, at least one of them.
    """
    itemsize = spec.accumulator.itemsize
    operand, result = OPERANDS[contraction][0], RESULT[contraction]
    if contraction == "wgrad":
        has_taps = math.prod(spec.spatial_shape("rhs")) > 1
        copied: tuple[Role, ...] = ("lhs", "rhs", "out") if has_taps else ("lhs", "out")
        return sum(array_bytes(spec, role, itemsize) for role in copied)
    if jnp.issubdtype(spec.accumulator, jnp.integer):
        return 0
    if spec.dtype == spec.wide_dtype == spec.accumulator and _is_channels_first(spec):
        return max(array_bytes(spec, operand), array_bytes(spec, result))
    converted = {
        role: array_bytes(spec, role, itemsize)
        for role in (operand, result)
        if spec.role_dtype(role) != spec.accumulator
    }
    if jnp.issubdtype(spec.accumulator, jnp.complexfloating):
        return max(array_bytes(spec, operand), array_bytes(spec, result))
    if result in converted and converted.get(operand, 0) <= array_bytes(spec, result):
        return converted[result]
    return sum(converted.values())


def most_bytes(contraction: Contraction, spec: ConvSpec) -> int:
    """Returns three times the bytes of the arrays, or the allowance."""
    most = MOST_ARRAYS * costs.all_bytes(contraction, spec)
    return max(allowance(spec), most)


def limit(contraction: Contraction, spec: ConvSpec) -> int:
    """Returns the bytes that a contraction should store at most: see the module's docstring."""
    allowed = max(allowance(spec), lax_bytes(contraction, spec))
    return min(allowed, most_bytes(contraction, spec))


def batch_size(spec: ConvSpec) -> int:
    return spec.shape("lhs")[spec.layout("lhs")[0]]


def with_batch(spec: ConvSpec, size: int) -> ConvSpec:
    """Returns the spec of the same convolution of `size` examples."""
    shape = list(spec.lhs_shape)
    shape[spec.layout("lhs")[0]] = size
    return dataclasses.replace(spec, lhs_shape=tuple(shape))


def examples_at_once(estimate: Estimate, contraction: Contraction, spec: ConvSpec) -> int:
    """Returns how many examples are computed together: as many as the limit allows, in equal parts
    of the batch. (XLA would keep memory for a smaller last part beside that of the others.)
    """
    batch, most = batch_size(spec), limit(contraction, spec)
    for size in (batch // parts for parts in range(1, batch + 1) if batch % parts == 0):
        if _in_parts(estimate, contraction, spec, size) <= most:
            return size
    return 1


def in_parts(estimate: Estimate, contraction: Contraction, spec: ConvSpec) -> int:
    """Returns the temporary bytes of a contraction that `InParts` computes."""
    size = examples_at_once(estimate, contraction, spec)
    return _in_parts(estimate, contraction, spec, size)


def _in_parts(estimate: Estimate, contraction: Contraction, spec: ConvSpec, size: int) -> int:
    if size == batch_size(spec):
        return estimate(contraction, spec)
    # The loop keeps converted kernels, or two sums of the kernel's gradient.
    kernels = array_bytes(spec, "rhs", spec.accumulator.itemsize)
    kernels *= 2 if contraction == "wgrad" else 1
    return estimate(contraction, with_batch(spec, size)) + bits_bytes(spec) + kernels


def bits_bytes(spec: ConvSpec) -> int:
    """Returns the size of the copies as integers that a loop slices: see `_as_bits`."""
    arrays: tuple[Role, Role] = ("lhs", "out")
    return sum(array_bytes(spec, r) for r in arrays if _is_sliced_as_bits(spec.role_dtype(r)))


class InParts(Algorithm):
    """An algorithm that computes a few examples at a time where the whole batch would store more
    than the limit.

    A subclass provides `stored` and `whole` in place of the methods below.
    """

    def stored(self, contraction: Contraction, spec: ConvSpec) -> int:
        """Returns the temporary bytes of the batch that the spec has, at most."""
        raise NotImplementedError

    def whole(self, contraction: Contraction) -> Compute:
        """Returns the function that computes the batch that the spec has."""
        raise NotImplementedError

    def temporary_bytes(self, contraction: Contraction, spec: ConvSpec) -> int:
        return in_parts(self.stored, contraction, spec)

    def fprop(self, lhs: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
        return self._compute("fprop", lhs, rhs, spec)

    def dgrad(self, out: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
        return self._compute("dgrad", out, rhs, spec)

    def wgrad(self, lhs: jax.Array, out: jax.Array, spec: ConvSpec) -> jax.Array:
        return self._compute("wgrad", lhs, out, spec)

    def _compute(
        self, contraction: Contraction, first: jax.Array, second: jax.Array, spec: ConvSpec
    ) -> jax.Array:
        compute, dtype = self.whole(contraction), spec.role_dtype(RESULT[contraction])
        size = examples_at_once(self.stored, contraction, spec)

        def whole(first: jax.Array, second: jax.Array) -> jax.Array:
            return compute(first, second, spec).astype(dtype)

        def parts(first: jax.Array, second: jax.Array) -> jax.Array:
            return _each_part(compute, contraction, first, second, spec, size)

        if size >= batch_size(spec):
            return whole(first, second)
        # The bounds are those of a CPU. Other platforms compute the whole batch at once.
        return lax.platform_dependent(first, second, cpu=parts, default=whole)


def _each_part(
    compute: Compute,
    contraction: Contraction,
    first: jax.Array,
    second: jax.Array,
    spec: ConvSpec,
    size: int,
) -> jax.Array:
    """A loop over parts of `size` examples, which divides the batch.

    Each part's results are written to their place; kernel gradients are added up.
    """
    role, is_sum = RESULT[contraction], contraction == "wgrad"
    operands = OPERANDS[contraction]
    part = with_batch(spec, size)
    dtype = spec.accumulator if is_sum else spec.role_dtype(role)

    def cut(of: Role, x: jax.Array, start: jax.Array) -> jax.Array:
        return x if of == "rhs" else dynamic_slice(x, start, size, spec.layout(of)[0])

    def put(i: jax.Array, result: jax.Array) -> jax.Array:
        start = i * size
        computed = compute(
            cut(operands[0], first, start), cut(operands[1], second, start), part
        ).astype(dtype)
        if is_sum:
            return result + computed
        batch = spec.layout(role)[0]
        return lax.dynamic_update_slice_in_dim(result, _as_bits(computed), start, batch)

    result = zeros(spec.shape(role), dtype, first)
    if is_sum:
        total = lax.fori_loop(0, batch_size(spec) // size, put, result)
        return total.astype(spec.role_dtype(role))
    return _as_floats(lax.fori_loop(0, batch_size(spec) // size, put, _as_bits(result)), dtype)


def zeros(shape: tuple[int, ...], dtype: np.dtype, like: jax.Array) -> jax.Array:
    """Returns zeros that vary over the mesh axes over which `like` does, inside `shard_map`: a loop
    keeps the type of what it carries.
    """
    axes = tuple(sorted(varying(like)))
    return lax.pcast(jnp.zeros(shape, dtype), axes, to="varying")


def dynamic_slice(x: jax.Array, start: jax.Array | int, size: int, dimension: int) -> jax.Array:
    """`lax.dynamic_slice_in_dim` that copies no more than the slice: see `_as_bits`."""
    return _as_floats(lax.dynamic_slice_in_dim(_as_bits(x), start, size, dimension), x.dtype)


def _as_bits(x: jax.Array) -> jax.Array:
    """Returns floats that XLA:CPU does not slice as integers. It would convert the whole array
    before the loop, and slice the larger copy.
    """
    if not _is_sliced_as_bits(x.dtype):
        return x
    return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")


def _is_sliced_as_bits(dtype: np.dtype) -> bool:
    """Returns whether this is a float of less than 32 bits, other than float16."""
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4 and dtype != np.float16


def _as_floats(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """Undoes `_as_bits`."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)
