"""How a layer's window moves: its size, strides, dilations and padding, in one form of each.

Flax's layers take an integer for all spatial dimensions or one for each, and so do these. The
padding is kept in a form that Flax's `Conv` passes on as it is: a string, or a pair for each
dimension, which for a string of its own is (string, None).
"""

import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax import lax

from grouped_conv_jax import arguments
from grouped_conv_jax.padding import FORWARD, Geometry, pads

LayerPadding = int | str | Sequence[Any]
"""What layers take: an integer (both sides of all dimensions), or what `grouped_conv` takes, with
an integer for the two of a pair."""


@dataclasses.dataclass(frozen=True)
class Window:
    """Everything has an entry for each spatial dimension; the padding may be a string for all."""

    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str | tuple[tuple[Any, Any], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.kernel_size)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Those of the kernel with its gaps filled."""
        return tuple(
            (k - 1) * d + 1 for k, d in zip(self.kernel_size, self.kernel_dilation, strict=True)
        )

    @property
    def dimension_numbers(self) -> lax.ConvDimensionNumbers:
        """Channels last: (batch, *spatial, features), kernels (*taps, inputs, outputs)."""
        last, spatial = self.rank + 1, range(1, self.rank + 1)
        arrays = (0, last, *spatial)
        return lax.ConvDimensionNumbers(arrays, (last, last - 1, *range(self.rank)), arrays)


def window(
    kernel_size: Any,
    strides: Any = 1,
    padding: Any = "SAME",
    input_dilation: Any = 1,
    kernel_dilation: Any = 1,
    known: Mapping[str, Any] = FORWARD,
) -> Window:
    """The window of a layer with these arguments; `known` are the strings that padding may be.

    Raises:
      ValueError, TypeError: an argument is wrong; the message says which and how to mend it.
    """
    taps = (kernel_size,) if is_integer(kernel_size) else kernel_size
    rank = len(list(taps)) if isinstance(taps, Iterable) else 1
    made = Window(
        kernel_size=arguments.integers("kernel_size", taps, rank),
        strides=for_each("strides", strides, rank),
        padding="VALID",
        input_dilation=for_each("input_dilation", input_dilation, rank),
        kernel_dilation=for_each("kernel_dilation", kernel_dilation, rank),
    )
    padding = _padding(padding, made.rank)
    pads(padding, [Geometry(1, size, 1) for size in made.sizes], dict(known))
    return dataclasses.replace(made, padding=padding)


def is_integer(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def for_each(name: str, value: Any, rank: int) -> tuple[int, ...]:
    """An integer for each spatial dimension, of one for all (None: 1) or one for each."""
    if value is None or is_integer(value):
        value = (1 if value is None else value,) * rank
    return arguments.integers(name, value, rank)


def _padding(padding: Any, rank: int) -> Any:
    """In one form; what is no padding stays as it is."""
    # Flax's Conv knows CAUSAL of one dimension only.
    if isinstance(padding, str) and (rank == 1 or padding.upper() != "CAUSAL"):
        return padding.upper()
    if isinstance(padding, str) or is_integer(padding):
        padding = (padding,) * rank
    return tuple(map(_entry, padding)) if isinstance(padding, Iterable) else padding


def _entry(entry: Any) -> Any:
    if is_integer(entry):
        return operator.index(entry), operator.index(entry)
    if isinstance(entry, str):
        return entry.upper(), None
    parts = tuple(entry) if isinstance(entry, Iterable) else ()
    if len(parts) != 2 or not isinstance(parts[0], str):
        return parts or entry
    name, amounts = parts
    return name.upper(), tuple(amounts) if isinstance(amounts, Iterable) else amounts
