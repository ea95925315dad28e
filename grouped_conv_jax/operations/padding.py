"""Padding: what stands beyond the ends of an input, and how much of it.

Zeros are the convolution's own affair. What is not zero (the modes of `MODES`) is put there before:
the input is extended, and the convolution pads what is left with zeros, or crops it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from grouped_conv_jax.operations.arguments import LARGEST, integer
from grouped_conv_jax.partitioning.explicit_mesh import with_auto_axes
from grouped_conv_jax.text import shown

PaddingLike = str | Sequence[Any]
"""A string for all spatial dimensions, or for each of them a pair (low, high), a string, or a mode
with its pair, such as ("REFLECT", (1, 2))."""

MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect", "REPLICATE": "edge"}
"""What there is beyond the ends but zeros, and what `jax.numpy.pad` calls it."""


MOST_ROUNDS = 8
"""The largest extension, in sizes of the input, that is put together from copies of the input."""


class Geometry(NamedTuple):
    """What an amount of padding may depend on, of one spatial dimension.

    `window` is the size of the kernel with its gaps filled, `dilation` that of the input.
    """

    size: Any
    window: Any
    stride: int
    dilation: int = 1


class Pad(NamedTuple):
    """Positions before and after the input (dilated, if it is), negative ones cropped; and a mode
    of `MODES`, or None for zeros.
    """

    low: Any
    high: Any
    mode: str | None = None


Amounts = Callable[[Geometry], tuple[Any, Any]]


def _same(dimension: Geometry, padding: str) -> tuple[Any, Any]:
    size, window, stride, _ = dimension
    if not (isinstance(size, int) and isinstance(window, int)):
        (pair,) = lax.padtype_to_pads((size,), (window,), (stride,), padding)
        return pair
    outputs = -(-size // stride)
    total = max(0, (outputs - 1) * stride + window - size)
    low = total // 2 if padding == "SAME" else total - total // 2
    return low, total - low


def _same_upper(dimension: Geometry) -> tuple[Any, Any]:
    return _same(dimension, "SAME")


def _same_lower(dimension: Geometry) -> tuple[Any, Any]:
    return _same(dimension, "SAME_LOWER")


def _valid(_: Geometry) -> tuple[Any, Any]:
    return 0, 0


def _causal(dimension: Geometry) -> tuple[Any, Any]:
    return dimension.window - 1, 0


def _centered(dimension: Geometry) -> tuple[Any, Any]:
    return (dimension.window - 1) // 2, dimension.window // 2


FORWARD: dict[str, Amounts] = {
    "SAME": _same_upper,
    "SAME_LOWER": _same_lower,
    "VALID": _valid,
    "CAUSAL": _causal,
    **dict.fromkeys(MODES, _centered),
}
"""What the strings come to in a convolution: those of lax, a past of zeros, and with a mode as
many positions as a stride of 1 keeps the size with, the odd one after (as in Flax)."""


def _transposed_same(dimension: Geometry) -> tuple[Any, Any]:
    window, stride = dimension.window, dimension.stride
    total = window + stride - 2
    low = window - 1 if stride > window - 1 else -(-total // 2)
    return low, total - low


def _transposed_valid(dimension: Geometry) -> tuple[Any, Any]:
    window, stride = dimension.window, dimension.stride
    return window - 1, stride - 1 + max(window - stride, 0)


def _transposed_causal(dimension: Geometry) -> tuple[Any, Any]:
    return dimension.window - 1, dimension.stride - 1


TRANSPOSED: dict[str, Amounts] = {
    "SAME": _transposed_same,
    "VALID": _transposed_valid,
    "CAUSAL": _transposed_causal,
    **dict.fromkeys(MODES, _transposed_same),
}
"""What they come to in a transposed convolution, of the dilated input. All but "VALID" make the
result the size of the input times the stride."""


def pads(
    padding: Any, dimensions: Sequence[Geometry], known: dict[str, Amounts] = FORWARD
) -> tuple[Pad, ...]:
    """The padding of each spatial dimension.

    Raises:
      ValueError, TypeError: it is not a padding; the message says which there are.
    """
    if isinstance(padding, str):
        return tuple(_named(padding, dimension, known) for dimension in dimensions)
    if not isinstance(padding, Iterable) or getattr(padding, "shape", None) == ():
        raise TypeError(
            f"padding must be a string or (low, high) pairs, got {shown(padding)}; an amount for "
            "all sides is [(1, 1), (1, 1)] for two dimensions"
        )
    entries = list(padding)
    if isinstance(padding, tuple) and is_of_one_dimension(entries):
        raise ValueError(
            f"padding {padding!r} is that of one dimension; "
            + (
                f"for all of them write [{padding!r}] * {len(dimensions)}, and for the first alone "
                f"a list, {list(padding)!r}"
                if len(dimensions) > 1
                else f"write [{padding!r}]"
            )
        )
    if len(entries) != len(dimensions):
        raise ValueError(
            f"padding must have one (low, high) pair for each of {len(dimensions)} spatial "
            f"dimensions, got {len(entries)}: {shown(padding)}"
        )
    return tuple(
        _entry(entry, dimension, known)
        for entry, dimension in zip(entries, dimensions, strict=True)
    )


def is_of_one_dimension(entries: Sequence[Any]) -> bool:
    """Whether it is a mode with its pair, and not two dimensions of which the first has a mode."""
    if len(entries) != 2 or not isinstance(entries[0], str) or entries[0].upper() not in MODES:
        return False
    amounts = entries[1]
    is_an_entry = isinstance(amounts, str) or (
        isinstance(amounts, tuple | list) and any(isinstance(x, str) for x in amounts)
    )
    return not is_an_entry


def _entry(entry: Any, dimension: Geometry, known: dict[str, Amounts]) -> Pad:
    """One of them: a string, (low, high), (mode, (low, high)) or (string, None)."""
    if isinstance(entry, str):
        return _named(entry, dimension, known)
    name, amounts = _two(entry)
    if not isinstance(name, str):
        return Pad(integer("padding", name), integer("padding", amounts))
    if amounts is None:
        return _named(name, dimension, known)
    if name.upper() not in MODES:
        raise ValueError(
            f"padding {shown(entry)}: only {', '.join(MODES)} take a pair of their own; give the "
            "pair alone for zeros"
        )
    low, high = (integer("padding", amount) for amount in _two(amounts))
    return Pad(low, high, name.upper())


def _two(value: Any) -> list[Any]:
    parts = list(value) if isinstance(value, Iterable) else []
    if len(parts) != 2:
        raise ValueError(f"padding must consist of (low, high) pairs, got {shown(value)}")
    return parts


def _named(name: str, dimension: Geometry, known: dict[str, Amounts]) -> Pad:
    if (amounts := known.get(name.upper())) is None:
        raise ValueError(
            f"unknown padding {shown(name)}; known: {', '.join(known)}, or one (low, high) pair "
            'for each spatial dimension, or a mode with its pair, ("REFLECT", (low, high))'
        )
    if dimension.dilation != 1:
        raise ValueError(
            f"padding {name!r} has no meaning with an lhs_dilation of {dimension.dilation}; give a "
            "(low, high) pair"
        )
    return Pad(*amounts(dimension), mode=name.upper() if name.upper() in MODES else None)


@dataclasses.dataclass(frozen=True)
class Extension:
    """What is put beyond the ends of an array that is not zeros. It is linear.

    Attributes:
      sides: the dimension, the mode, and how many elements before and after.
    """

    sides: tuple[tuple[int, str, Any, Any], ...] = ()

    def shape(self, shape: Sequence[Any]) -> tuple[Any, ...]:
        """Of the extended array."""
        larger = list(shape)
        for dimension, _, before, after in self.sides:
            larger[dimension] += before + after
        return tuple(larger)

    def sharding(self, sharding: NamedSharding, rank: int) -> NamedSharding:
        """Of the extended array: a dimension that has grown is whole on each device."""
        axes = [*sharding.spec, *[None] * (rank - len(sharding.spec))]
        for dimension, *_ in self.sides:
            axes[dimension] = None
        return NamedSharding(sharding.mesh, PartitionSpec(*axes))

    def __call__(self, x: ArrayLike) -> ArrayLike:
        """The extended array."""
        if not self.sides:
            return x
        sharding = self.sharding(jax.typeof(x).sharding, jnp.ndim(x))
        return with_auto_axes(self._extended, sharding)(x)

    def _extended(self, x: jax.Array) -> jax.Array:
        for dimension, mode, before, after in self.sides:
            size = x.shape[dimension]
            if mode == "REPLICATE" and isinstance(before, int) and isinstance(after, int):
                # In pieces: XLA talks over devices about what is sharded otherwise in jax.numpy's.
                first = lax.slice_in_dim(x, 0, 1, axis=dimension)
                last = lax.slice_in_dim(x, size - 1, size, axis=dimension)
                edges = _repeated(first, before, dimension), _repeated(last, after, dimension)
                x = jnp.concatenate([edges[0], x, edges[1]], dimension)
                continue
            if mode == "CIRCULAR" and not isinstance(size, int):
                # jax.numpy asks how often it goes round, which a symbolic size does not tell.
                last = lax.slice_in_dim(x, size - before, size, axis=dimension)
                first = lax.slice_in_dim(x, 0, after, axis=dimension)
                x = jnp.concatenate([last, x, first], dimension)
                continue
            if isinstance(size, int) and before + after > MOST_ROUNDS * size:
                # jax.numpy puts copies of the whole beside each other, one by one.
                x = jnp.take(x, _sources(mode, size, before, after), axis=dimension)
                continue
            widths: list[tuple[Any, Any]] = [(0, 0)] * x.ndim
            widths[dimension] = before, after
            x = jnp.pad(x, widths, mode=MODES[mode])
        return x


def _repeated(edge: jax.Array, times: int, dimension: int) -> jax.Array:
    shape = (*edge.shape[:dimension], times, *edge.shape[dimension + 1 :])
    return jnp.broadcast_to(edge, shape)


def _sources(mode: str, size: int, before: int, after: int) -> jax.Array:
    """Returns the element that stands at each position of the extended array."""
    positions = lax.iota(np.int32, before + size + after) - before
    if mode == "CIRCULAR":
        return positions % size
    # There and back again, without the edges twice.
    period = max(1, 2 * (size - 1))
    there = positions % period
    return jnp.minimum(there, period - there)


def resolved(
    padding: Any,
    lhs_shape: Sequence[Any],
    spatial_dimensions: Sequence[int],
    windows: Sequence[Any],
    strides: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Extension, tuple[tuple[Any, Any], ...]]:
    """The padding of a convolution: see `extension`."""
    sizes = [lhs_shape[d] for d in spatial_dimensions]
    found = pads(padding, list(map(Geometry, sizes, windows, strides, dilation)))
    return extension(found, sizes, dilation, spatial_dimensions)


def extension(
    given: Sequence[Pad],
    sizes: Sequence[Any],
    dilation: Sequence[int],
    spatial_dimensions: Sequence[int],
) -> tuple[Extension, tuple[tuple[Any, Any], ...]]:
    """What to put beyond the ends, and the pairs of zeros, or of crops, that are left to do.

    A dilated input is extended before it is dilated, by enough elements.

    Raises:
      ValueError: there is nothing to repeat.
    """
    sides, left = [], []
    for (low, high, mode), size, step, dimension in zip(
        given, sizes, dilation, spatial_dimensions, strict=True
    ):
        if mode is not None:
            before, after = (-(-max(pad, 0) // step) for pad in (low, high))
            if isinstance(size, int) and size == 0 and before + after > 0:
                raise ValueError(
                    f"padding {mode!r} repeats what is there, and dimension {dimension} of lhs has "
                    "size 0; give (low, high) for zeros"
                )
            if before or after:
                sides.append((dimension, mode, before, after))
            if isinstance(size, int) and size + before + after > LARGEST:
                raise ValueError(
                    f"padding {mode!r} by {(low, high)} would extend dimension {dimension} of lhs "
                    f"to {size + before + after} elements; at most {LARGEST} can be repeated"
                )
            low, high = low - before * step, high - after * step
        left.append((low, high))
    return Extension(tuple(sides)), tuple(left)
