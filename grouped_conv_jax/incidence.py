"""Writes a convolution's steps and padding with numbers as small as its arrays.

Along one spatial dimension an output row y, a kernel tap k and an input row x meet where

    y * stride + k * rhs_dilation - x * lhs_dilation = low

with the padding `low`. The steps and the padding can be far larger than the arrays. A kernel with 3
taps and a dilation of 2**40 touches an image of 8 rows with one tap only. A padding of 2**20 with a
stride of 2**19 adds outputs that are zero. Algorithms must not store such gaps, and XLA's
arithmetic overflows with some of them. Smaller numbers, with which the same rows and taps meet,
follow from two rules:

- If one step is longer than the other two terms reach together, at most one of its rows or taps
  meets anything. The step can then be just longer than that reach. In the example above 8 outputs
  and 8 inputs reach from -7 to 7, and the dilation becomes 15.
- If two steps are multiples of g, and the third term has each remainder modulo g at most once, at
  most one of the third's rows or taps meets anything. The two steps are then divided by g.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

from jax import lax


class Incidence(NamedTuple):
    """The sizes, steps and padding of one spatial dimension."""

    outputs: int
    taps: int
    inputs: int
    stride: int
    rhs_dilation: int
    lhs_dilation: int
    low: int

    @property
    def high(self) -> int:
        """The padding after the last input row that gives so many outputs."""
        window = extent(self.taps, self.rhs_dilation)
        read = (self.outputs - 1) * self.stride + window
        return read - extent(self.inputs, self.lhs_dilation) - self.low


def extent(size: Any, step: Any) -> Any:
    """Returns how far rows or taps reach that are `step` apart. Sizes may be symbolic."""
    return 0 if size == 0 else 1 + step * (size - 1)


def out_size(inputs: Any, window: Any, stride: int, padding: tuple[Any, Any]) -> Any:
    """Returns the number of outputs, for the extents of the inputs and of the window.

    Sizes may be symbolic. Others are exact, where NumPy's would overflow.
    """
    space = inputs + sum(padding) - window
    if isinstance(space, int):
        return max(0, space // stride + 1)
    (size,) = lax.conv_shape_tuple((1, 1, inputs), (1, 1, window), (stride,), (padding,))[2:]
    return size


@functools.lru_cache(maxsize=4096)  # Outside jit it would be a large part of a call.
def shortened(given: Incidence) -> Incidence:
    """Returns the same sizes with the smallest steps and padding that the two rules give."""
    counts = given[:3]
    if 0 in counts:
        return given._replace(stride=1, rhs_dilation=1, lhs_dilation=1, low=0)
    # A row or a tap that stands alone takes no step.
    signs = (1, 1, -1)
    steps = [
        sign * (step if count > 1 else 1)
        for sign, step, count in zip(signs, given[3:6], counts, strict=True)
    ]
    low: int | None = given.low
    changed = True
    while changed and low is not None:
        before = list(steps)
        for i in range(3):
            if low is not None:
                low = _limit_step(i, counts, steps, low)
        for pair in itertools.combinations(range(3), 2):
            if low is not None:
                low = _divide_steps(pair, counts, steps, low)
        changed = steps != before
    if low is None:
        # Nothing meets: all inputs are cropped.
        steps, low = [1, 1, -1], -given.inputs
    stride, rhs_dilation, lhs_dilation = map(abs, steps)
    return given._replace(
        stride=stride, rhs_dilation=rhs_dilation, lhs_dilation=lhs_dilation, low=low
    )


def _reach(i: int, counts: tuple[int, ...], steps: list[int]) -> int:
    return (counts[i] - 1) * abs(steps[i])


def _limit_step(i: int, counts: tuple[int, ...], steps: list[int], low: int) -> int | None:
    """Shortens step i in place by the first rule. Returns the new `low`, or None if nothing meets.

    With n the row or the tap that meets, n * steps[i] changes by what `low` changes by.
    """
    others = [j for j in range(3) if j != i]
    reach = sum(_reach(j, counts, steps) for j in others)
    # What n * steps[i] must be for some values of the other two terms: `lowest` to `highest`.
    lowest = low - sum(_reach(j, counts, steps) for j in others if steps[j] > 0)
    highest = lowest + reach
    size, sign = abs(steps[i]), 1 if steps[i] > 0 else -1
    first, last = (lowest, highest) if sign > 0 else (-highest, -lowest)
    if last < 0 or first > (counts[i] - 1) * size:
        return None
    if counts[i] == 1 or size <= reach + 1:
        return low
    n = last // size
    if n >= counts[i] or n * size < first:
        return None
    steps[i] = sign * (reach + 1)
    return low + n * (steps[i] - sign * size)


def _divide_steps(
    pair: tuple[int, int], counts: tuple[int, ...], steps: list[int], low: int
) -> int | None:
    """Divides two steps in place by the second rule. Returns the new `low`, or None if nothing
    meets.
    """
    (third,) = {0, 1, 2} - set(pair)
    common = math.gcd(steps[pair[0]], steps[pair[1]])
    step, count = steps[third], counts[third]
    if common == 1 or _reach(third, counts, steps) >= common:
        return low
    # The n of the third term that meets: n * step = low modulo `common`.
    shared = math.gcd(step, common)
    if low % shared:
        return None
    n = low // shared * pow(step // shared, -1, common // shared) % (common // shared)
    if n >= count:
        return None
    divided = [step // common if i in pair else step for i, step in enumerate(steps)]
    if count > 1:
        sign = 1 if step > 0 else -1
        divided[third] = sign * (sum(_reach(i, counts, divided) for i in pair) + 1)
    if sum(map(abs, divided)) >= sum(map(abs, steps)):
        return low
    steps[:] = divided
    return (low - n * step) // common + n * divided[third]
