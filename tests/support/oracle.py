"""Grouped convolution and its two gradients in NumPy, from the definition, and the tolerances.

All three come from one trilinear form: the sum over taps k, groups g and positions p of

    x[n, c, p * stride + k * dilation] * w[o, c, k] * y[n, o, p]

with x dilated and padded, and c, n and o those of group g. Leaving one array out of the sum
leaves a contraction of the other two.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np


def contractions(
    x: np.ndarray, w: np.ndarray, y: np.ndarray, **arguments: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The output for (x, w), the gradient of x for (y, w) and that of w for (x, y)."""
    return (
        forward(x, w, **arguments),
        input_gradient(y, w, x.shape, **arguments),
        kernel_gradient(x, y, w.shape, **arguments),
    )


def forward(x: np.ndarray, w: np.ndarray, **arguments: Any) -> np.ndarray:
    form = _Form(x.shape, w.shape, **arguments)
    x, w = form.filled_input(x), form.canonical("rhs", w)
    y = np.zeros(form.canonical_out, np.result_type(x, w))
    for at_x, at_w, at_y in form.terms():
        y[at_y] += np.einsum("nc...,oc->no...", x[at_x], w[at_w])
    return form.from_canonical("out", y)


def input_gradient(
    y: np.ndarray, w: np.ndarray, x_shape: Sequence[int], **arguments: Any
) -> np.ndarray:
    form = _Form(x_shape, w.shape, **arguments)
    y, w = form.canonical("out", y), form.canonical("rhs", w)
    x = np.zeros(form.filled_shape, np.result_type(y, w))
    for at_x, at_w, at_y in form.terms():
        x[at_x] += np.einsum("no...,oc->nc...", y[at_y], w[at_w])
    return form.from_canonical("lhs", form.unfilled_input(x))


def kernel_gradient(
    x: np.ndarray, y: np.ndarray, w_shape: Sequence[int], **arguments: Any
) -> np.ndarray:
    form = _Form(x.shape, w_shape, **arguments)
    x, y = form.filled_input(x), form.canonical("out", y)
    w = np.zeros(form.canonical_rhs, np.result_type(x, y))
    all_but_features = (0, *range(2, x.ndim))
    for at_x, at_w, at_y in form.terms():
        w[at_w] += np.tensordot(y[at_y], x[at_x], (all_but_features, all_but_features))
    return form.from_canonical("rhs", w)


def out_shape(lhs: Sequence[int], rhs: Sequence[int], **arguments: Any) -> tuple[int, ...]:
    form = _Form(lhs, rhs, **arguments)
    return tuple(form.canonical_out[i] for i in np.argsort(form.layouts["out"]))


def sources(lhs: Sequence[int], rhs: Sequence[int], **arguments: Any) -> list[np.ndarray]:
    """For each spatial dimension of an input, as dilated and padded: where each position comes
    from, -1 for a zero.
    """
    return [source for _, source in _Form(lhs, rhs, **arguments)._sources()]


def layouts(rank: int, dimension_numbers: Any = None, **_: Any) -> dict[str, tuple[int, ...]]:
    """Where in lhs, rhs and out the dimensions (batch or outputs, features, *spatial) are."""
    if dimension_numbers is None:
        return dict.fromkeys(("lhs", "rhs", "out"), tuple(range(rank + 2)))
    roles = zip(("lhs", "rhs", "out"), dimension_numbers, strict=True)
    if not isinstance(dimension_numbers[0], str):
        return {role: tuple(layout) for role, layout in roles}
    spatial = [letter for letter in dimension_numbers[1] if letter not in "IO"]
    return {
        role: tuple(map(letters.index, [*("OI" if role == "rhs" else "NC"), *spatial]))
        for role, letters in roles
    }


def assert_close(
    actual: Any, expected: np.ndarray, length: float, *, accumulator: Any = None, name: str = ""
) -> None:
    """Compares an array with what the sum of `length` products should be."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, not {expected.shape}"
    atol, rtol = tolerance(actual.dtype, length, accumulator)
    np.testing.assert_allclose(_double(actual), expected, rtol, atol, err_msg=name)


def tolerance(dtype: Any, length: float, accumulator: Any = None) -> tuple[float, float]:
    """(absolute, relative) error of a sum of `length` products of numbers in [-1, 1].

    The partial sums of random terms grow as the root of their number, and each of the `length`
    additions rounds one by half a unit of the accumulator at most; those errors are random too,
    so that together they come to about length * eps / 2. Eight times that leaves room for the
    tail and for the four products of complex numbers. Last, the sum is rounded to `dtype`, once
    for narrow floats; twice that, since the accumulation may end on the other side of a tie.

    Integers are exact.
    """
    dtype = np.dtype(dtype)
    if np.issubdtype(dtype, np.integer):
        return 0, 0
    # Floats of 16 and of 8 bits are multiplied and added up in 32 bits.
    single = np.dtype(np.float32)
    eps = _eps(accumulator or (single if dtype.itemsize < 4 else dtype))
    # Near zero the steps of 8-bit floats are coarse.
    step = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    return 4 * eps * max(length, 1) + step, _eps(dtype)


def lengths(
    lhs: Sequence[int], rhs: Sequence[int], out: Sequence[int], **arguments: Any
) -> list[float]:
    """How many products the longest sum of each contraction has: the contractions of ones."""
    counts = contractions(np.ones(lhs), np.ones(rhs), np.ones(out), **arguments)
    return [float(np.max(count, initial=0)) for count in counts]


def _eps(dtype: Any) -> float:
    return float(ml_dtypes.finfo(dtype).eps)


def _double(x: np.ndarray) -> np.ndarray:
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


class _Form:
    """The geometry of one trilinear form: canonical shapes (n, c, *spatial) and its terms."""

    def __init__(
        self,
        lhs_shape: Sequence[int],
        rhs_shape: Sequence[int],
        window_strides: Sequence[int],
        padding: Any,
        lhs_dilation: Sequence[int] | None = None,
        rhs_dilation: Sequence[int] | None = None,
        dimension_numbers: Any = None,
        feature_group_count: int = 1,
        batch_group_count: int = 1,
    ):
        rank = len(lhs_shape) - 2
        self.layouts = layouts(rank, dimension_numbers)
        self.strides = window_strides
        self.lhs_dilation = lhs_dilation or (1,) * rank
        self.rhs_dilation = rhs_dilation or (1,) * rank
        self.feature_groups, self.batch_groups = feature_group_count, batch_group_count
        batch, inputs, *self.sizes = (lhs_shape[i] for i in self.layouts["lhs"])
        self.canonical_rhs = tuple(rhs_shape[i] for i in self.layouts["rhs"])
        outputs, _, *self.taps = self.canonical_rhs
        windows = [d * (k - 1) + 1 for k, d in zip(self.taps, self.rhs_dilation, strict=True)]
        self.padding = _padding(padding, self.sizes, windows, window_strides)

        filled = [
            max(0, (size - 1) * d + 1 if size else 0) + low + high
            for size, d, (low, high, _) in zip(
                self.sizes, self.lhs_dilation, self.padding, strict=True
            )
        ]
        reached = [
            max(0, (size - window) // stride + 1)
            for size, window, stride in zip(filled, windows, self.strides, strict=True)
        ]
        self.filled_shape = (batch, inputs, *filled)
        self.canonical_out = (batch // batch_group_count, outputs, *reached)

    def canonical(self, role: str, array: np.ndarray) -> np.ndarray:
        return _double(array).transpose(self.layouts[role])

    def from_canonical(self, role: str, array: np.ndarray) -> np.ndarray:
        return array.transpose(np.argsort(self.layouts[role]))

    def filled_input(self, x: np.ndarray) -> np.ndarray:
        """The input in canonical layout, dilated and padded (or cropped) with zeros."""
        x = self.canonical("lhs", x)
        for axis, source in self._sources():
            inside = source >= 0
            taken = np.zeros((*x.shape[:axis], len(source), *x.shape[axis + 1 :]), x.dtype)
            taken[_along(axis, inside)] = x[_along(axis, source[inside])]
            x = taken
        return x

    def unfilled_input(self, x: np.ndarray) -> np.ndarray:
        """The transpose of `filled_input`: what fell on zeros is dropped, on a crop is zero, and
        what fell on repetitions is added up.
        """
        for axis, source in self._sources():
            size = self.sizes[axis - 2]
            taken = np.zeros((*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype)
            for position in np.flatnonzero(source >= 0):
                taken[_along(axis, source[position])] += x[_along(axis, position)]
            x = taken
        return x

    def _sources(self) -> Iterator[tuple[int, np.ndarray]]:
        """For each spatial axis: where each filled position comes from, -1 for a zero."""
        for i, (size, dilation, (low, _, mode)) in enumerate(
            zip(self.sizes, self.lhs_dilation, self.padding, strict=True)
        ):
            at, between = np.divmod(np.arange(self.filled_shape[i + 2]) - low, dilation)
            at = _BEYOND[mode](at, size)
            yield i + 2, np.where((between == 0) & (at >= 0) & (at < size), at, -1)

    def terms(self) -> Iterator[tuple[tuple, tuple, tuple]]:
        """For each tap and each group: what to take of the filled input, the kernel, the output."""
        if 0 in self.canonical_out[2:]:
            return
        groups = self.feature_groups * self.batch_groups
        reached = self.canonical_out[2:]
        for tap in np.ndindex(*self.taps):
            window = tuple(
                slice(k * d, k * d + stride * (n - 1) + 1, stride)
                for k, d, stride, n in zip(
                    tap, self.rhs_dilation, self.strides, reached, strict=True
                )
            )
            for group in range(groups):
                batch = _part(self.filled_shape[0], group % self.batch_groups, self.batch_groups)
                inputs = _part(
                    self.filled_shape[1], group % self.feature_groups, self.feature_groups
                )
                outputs = _part(self.canonical_out[1], group, groups)
                yield (
                    (batch, inputs, *window),
                    (outputs, slice(None), *tap),
                    (slice(None), outputs),
                )


def _part(size: int, index: int, parts: int) -> slice:
    return slice(size // parts * index, size // parts * (index + 1))


def _along(axis: int, index: Any) -> tuple:
    return (*(slice(None),) * axis, index)


def _reflected(at: np.ndarray, size: int) -> np.ndarray:
    """0 1 2 1 0 1 2 ..., forwards and back without the ends twice."""
    period = max(1, 2 * (size - 1))
    at = at % period
    return np.minimum(at, period - at) if size > 1 else 0 * at


_BEYOND: dict[str | None, Callable[[np.ndarray, int], np.ndarray]] = {
    None: lambda at, size: at,
    "CIRCULAR": lambda at, size: at % size,
    "REFLECT": _reflected,
    "REPLICATE": lambda at, size: np.clip(at, 0, size - 1),
}
"""Which element stands at a position, beyond the ends too, by mode: out of range for a zero."""


def _padding(
    padding: Any, sizes: Sequence[int], windows: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int, str | None]]:
    """(low, high, mode) of each spatial dimension."""
    entries = [padding] * len(sizes) if isinstance(padding, str) else list(padding)
    found = []
    for entry, size, window, stride in zip(entries, sizes, windows, strides, strict=True):
        name, amounts = (entry, None) if isinstance(entry, str) else entry
        if not isinstance(name, str):
            found.append((name, amounts, None))
            continue
        name = name.upper()
        total = max(0, (math.ceil(size / stride) - 1) * stride + window - size)
        own = {
            "VALID": (0, 0),
            "SAME": (total // 2, total - total // 2),
            "SAME_LOWER": (total - total // 2, total // 2),
            "CAUSAL": (window - 1, 0),
        }
        around = ((window - 1) // 2, window - 1 - (window - 1) // 2)
        mode = name if name in _BEYOND else None
        found.append((*(amounts or own.get(name, around)), mode))
    return found
