"""Convolutions drawn by hypothesis, with what the oracle makes of them.

What padding means is written here once more, one spatial dimension at a time: the oracle knows
zeros only.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import oracle
import pytest
from cases import IMPLEMENTATIONS

from grouped_conv_jax import (
    grouped_conv,
    grouped_conv_input_grad,
    grouped_conv_kernel_grad,
    grouped_conv_transpose,
)

st: Any = pytest.importorskip("hypothesis.strategies", reason="hypothesis is not installed")

DTYPES = ("float32", "bfloat16", "float16", "float64", "complex64", "int32")
REPEATING = ("CIRCULAR", "REFLECT", "REPLICATE")
STRINGS = ("SAME", "SAME_LOWER", "VALID", "CAUSAL", *REPEATING)
TRANSPOSED_STRINGS = ("SAME", "VALID", "CAUSAL", *REPEATING)


@dataclasses.dataclass(frozen=True)
class Convolution:
    """One of them, and how the oracle computes it: of an input in which along some dimensions the
    elements at `taken` stand, padded with `pairs` of zeros.
    """

    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    arguments: dict[str, Any]
    dtype: str
    implementation: str | None
    taken: dict[int, tuple[int, ...]]
    pairs: tuple[tuple[int, int], ...]

    def __call__(self, lhs: Any, rhs: Any) -> jax.Array:
        return grouped_conv(lhs, rhs, **self.arguments, implementation=self.implementation)

    def input_grad(self, rhs: Any, cotangent: Any) -> jax.Array:
        more = {**self.arguments, "implementation": self.implementation}
        return grouped_conv_input_grad(self.lhs, rhs, cotangent, **more)

    def kernel_grad(self, lhs: Any, cotangent: Any) -> jax.Array:
        more = {**self.arguments, "implementation": self.implementation}
        return grouped_conv_kernel_grad(lhs, self.rhs, cotangent, **more)

    def contractions(self, x: np.ndarray, w: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
        """The output, and the gradients for its cotangent y."""
        longer = x
        for axis, source in self.taken.items():
            longer = np.take(longer, source, axis)
        out, dx, dw = oracle.contractions(longer, w, y, **self.plain)
        for axis, source in self.taken.items():
            back = np.zeros((*dx.shape[:axis], self.lhs[axis], *dx.shape[axis + 1 :]), dx.dtype)
            np.add.at(np.moveaxis(back, axis, 0), list(source), np.moveaxis(dx, axis, 0))
            dx = back
        return [out, dx, dw]

    @property
    def out(self) -> tuple[int, ...]:
        lhs = [len(self.taken.get(axis, range(size))) for axis, size in enumerate(self.lhs)]
        return oracle.out_shape(lhs, self.rhs, **self.plain)

    @property
    def plain(self) -> dict[str, Any]:
        """The arguments of the oracle."""
        return {**self.arguments, "padding": self.pairs}


@dataclasses.dataclass(frozen=True)
class Transposed(Convolution):
    """The convolution of an input spread out by the strides: so the oracle computes it. With
    `is_turned` of a kernel whose groups are transposed and whose taps are in the other direction.
    """

    is_turned: bool = False

    def __call__(self, lhs: Any, rhs: Any) -> jax.Array:
        arguments = {**self.arguments, "implementation": self.implementation}
        return grouped_conv_transpose(lhs, rhs, **arguments, transpose_kernel=self.is_turned)

    def contractions(self, x: np.ndarray, w: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
        out, dx, dw = super().contractions(x, self._turned(w), y)
        return [out, dx, self._turned(dw)]

    @property
    def out(self) -> tuple[int, ...]:
        straight = self._turned(np.empty(self.rhs)).shape
        return dataclasses.replace(self, rhs=straight, is_turned=False)._out_of_the_oracle

    @property
    def _out_of_the_oracle(self) -> tuple[int, ...]:
        return super().out

    @property
    def plain(self) -> dict[str, Any]:
        arguments = {**self.arguments, "padding": self.pairs}
        del arguments["output_padding"]
        arguments["lhs_dilation"] = arguments.pop("strides")
        return {**arguments, "window_strides": (1,) * len(self.pairs)}

    def _turned(self, w: np.ndarray) -> np.ndarray:
        if not self.is_turned:
            return w
        groups = self.arguments["feature_group_count"]
        order = oracle.layouts(w.ndim - 2, **self.plain)["rhs"]
        w = np.flip(w.transpose(order), tuple(range(2, w.ndim)))
        parts = [np.swapaxes(part, 0, 1) for part in np.split(w, groups)]
        return np.concatenate(parts).transpose(np.argsort(order))


# What paddings mean, of one spatial dimension: its size, the kernel's with its gaps filled, the
# stride, and the input's dilation.

Geometry = tuple[int, int, int, int]


def amounts(name: str, dimension: Geometry, is_transposed: bool) -> tuple[int, int]:
    size, window, stride, dilation = dimension
    if is_transposed:
        if name == "CAUSAL":
            return window - 1, dilation - 1
        if name == "VALID":
            return window - 1, max(window, dilation) - 1
        low = min(math.ceil((window + dilation - 2) / 2), window - 1)
        return low, window + dilation - 2 - low
    total = max(0, (math.ceil(size / stride) - 1) * stride + window - size)
    return {
        "SAME": (total // 2, total - total // 2),
        "SAME_LOWER": (total - total // 2, total // 2),
        "VALID": (0, 0),
        "CAUSAL": (window - 1, 0),
    }.get(name, ((window - 1) // 2, window // 2))


def element(mode: str, position: int, size: int) -> int:
    """Which element stands at a position that may lie beyond the ends."""
    if mode == "CIRCULAR":
        return position % size
    if mode == "REPLICATE":
        return min(max(position, 0), size - 1)
    period = max(2 * (size - 1), 1)
    return min(position % period, period - position % period)


def continued(
    entry: Any, dimension: Geometry, more: int, is_transposed: bool
) -> tuple[tuple[int, ...] | None, tuple[int, int]]:
    """The elements of an input that is long enough when it is dilated, and the zeros to add."""
    if isinstance(entry, str):
        entry = entry, None
    name, pair = entry if isinstance(entry[0], str) else ("", entry)
    low, high = pair or amounts(name, dimension, is_transposed)
    high += more
    if name not in REPEATING:
        return None, (low, high)
    size, _, _, dilation = dimension
    before, after = (math.ceil(max(amount, 0) / dilation) for amount in (low, high))
    source = tuple(element(name, position, size) for position in range(-before, size + after))
    return source, (low - before * dilation, high - after * dilation)


def paddings(geometry: Sequence[Geometry], names: Sequence[str], has_strings: bool) -> Any:
    """One string for all dimensions, or for each an entry of any form; crops leave something."""
    one_each = st.tuples(*[entries(dimension, names, has_strings) for dimension in geometry])
    return st.one_of(st.sampled_from(names), one_each) if has_strings else one_each


def entries(dimension: Geometry, names: Sequence[str], has_strings: bool) -> Any:
    size, _, _, dilation = dimension
    filled = (size - 1) * dilation + 1
    pair = st.tuples(st.integers(-3, 4), st.integers(-3, 4)).filter(
        lambda pair: filled + sum(pair) >= 0 and filled + min(pair) >= 0
    )
    forms = [pair, st.tuples(st.sampled_from(REPEATING), pair)]
    if has_strings or dilation == 1:
        forms += [st.sampled_from(names), st.tuples(st.sampled_from(names), st.none())]
    return st.one_of(forms)


# The strategies.


@st.composite
def convolutions(draw: Any, is_transposed: bool = False) -> Convolution:
    rank = draw(st.integers(0, 3))
    names = [draw(st.permutations(first + "DHW"[:rank])) for first in ("NC", "OI", "NC")]
    # Arguments are in the order of the kernel's spatial letters, and so is all that follows.
    letters = [letter for letter in names[1] if letter not in "OI"]
    sizes, taps, strides, lhs_dilation, rhs_dilation = draw(spatial(rank, is_transposed))
    windows = [d * (k - 1) + 1 for k, d in zip(taps, rhs_dilation, strict=True)]
    geometry = list(zip(sizes, windows, strides, lhs_dilation, strict=True))
    arguments: dict[str, Any] = {
        "rhs_dilation": rhs_dilation,
        "dimension_numbers": tuple(map("".join, names)),
    }
    if is_transposed:
        kinds = ("feature", "turned")
        arguments["strides"] = lhs_dilation
        arguments["output_padding"] = more = draw(st.tuples(*[st.integers(0, 2)] * rank))
        padding = draw(paddings(geometry, TRANSPOSED_STRINGS, True))
    else:
        kinds = ("feature", "batch")
        arguments |= {"window_strides": strides, "lhs_dilation": lhs_dilation}
        more = (0,) * rank
        padding = draw(paddings(geometry, STRINGS, set(lhs_dilation) <= {1}))
    arguments["padding"] = padding

    taken, pairs = {}, []
    for letter, dimension, entry, extra in zip(
        letters,
        geometry,
        [padding] * rank if isinstance(padding, str) else padding,
        more,
        strict=True,
    ):
        source, pair = continued(entry, dimension, extra, is_transposed)
        pairs.append(pair)
        if source is not None:
            taken[names[0].index(letter)] = source

    kind, groups = draw(st.sampled_from(kinds)), draw(st.integers(1, 4))
    arguments["batch_group_count" if kind == "batch" else "feature_group_count"] = groups
    lhs, rhs = draw(shapes(kind, groups))
    lhs |= dict(zip(letters, sizes, strict=True))
    rhs |= dict(zip(letters, taps, strict=True))
    return (Transposed if is_transposed else Convolution)(
        lhs=tuple(lhs[letter] for letter in names[0]),
        rhs=tuple(rhs[letter] for letter in names[1]),
        arguments=arguments,
        dtype=draw(dtypes(lhs_dilation + strides, rhs_dilation)),
        implementation=draw(st.sampled_from(IMPLEMENTATIONS)),
        taken=taken,
        pairs=tuple(pairs),
        **({"is_turned": kind == "turned"} if is_transposed else {}),
    )


@st.composite
def spatial(draw: Any, rank: int, is_transposed: bool) -> list[tuple[int, ...]]:
    """Sizes, taps, strides, and the dilations of the input and of the kernel."""
    most = (6 if rank < 3 else 4, 3, 1 if is_transposed else 3, 3, 3)
    drawn = [draw(st.tuples(*[st.integers(1, n)] * rank)) for n in most]
    if not is_transposed and draw(st.booleans()):
        # Then there may be strings of padding.
        drawn[3] = (1,) * rank
    return drawn


def dtypes(strides: Sequence[int], rhs_dilation: Sequence[int]) -> Any:
    """XLA:CPU ends the process when it compiles the input's gradient of some convolutions with both
    strides and a dilation, of 64 bits, lax's own as well.
    """
    is_fatal = max(strides, default=1) > 1 and max(rhs_dilation, default=1) > 1
    return st.sampled_from([d for d in DTYPES if not (is_fatal and d == "float64")])


@st.composite
def shapes(draw: Any, kind: str, groups: int) -> tuple[dict[str, int], dict[str, int]]:
    """The batch and the features, by their letters; one in ten has nothing of one of them."""
    size = {name: draw(st.integers(1, 3)) for name in ("batch", "inputs", "outputs")}
    if empty := draw(st.sampled_from([None] * 27 + list(size))):
        size[empty] = 0
    batch, inputs, outputs = size.values()
    if kind == "batch":
        return {"N": groups * batch, "C": inputs}, {"O": groups * outputs, "I": inputs}
    if kind == "turned":
        return {"N": batch, "C": groups * inputs}, {"O": groups * inputs, "I": outputs}
    return {"N": batch, "C": groups * inputs}, {"O": groups * outputs, "I": inputs}
