"""How a layer's window moves: its size, strides, dilations and padding, in one form of each.

Flax's layers take an integer for all spatial dimensions or one for each, and so do these. The
padding is kept in a form that Flax's `Conv` passes on as it is, a pair for each dimension, which
for a string is (string, None): whatever is put beyond the ends is the operation's affair.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax import lax

from grouped_conv_jax.operations import arguments
from grouped_conv_jax.operations.padding import FORWARD, Geometry, is_of_one_dimension, pads

LayerPadding = int | str | Sequence[Any]
"""What layers take: an integer (both sides of all dimensions), or what `grouped_conv` takes, with
an integer for the two of a pair."""


@dataclasses.dataclass(frozen=True)
class Window:
    """Everything has an entry for each spatial dimension."""

    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[Any, Any], ...]
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
    kernel_size = _entries(kernel_size)
    taps = (kernel_size,) if is_integer(kernel_size) else kernel_size
    made = Window(
        kernel_size=arguments.integers("kernel_size", taps, rank_of(kernel_size)),
        strides=for_each("strides", strides, kernel_size),
        padding=(),
        input_dilation=for_each("input_dilation", input_dilation, kernel_size),
        kernel_dilation=for_each("kernel_dilation", kernel_dilation, kernel_size),
    )
    return dataclasses.replace(made, padding=padding_of(padding, kernel_size, known))


def padding_of(
    padding: Any, kernel_size: Any, known: Mapping[str, Any] = FORWARD
) -> tuple[tuple[Any, Any], ...]:
    """The padding of a layer: for each spatial dimension a pair, or a string or mode and its pair.

    Raises:
      ValueError, TypeError: it is none; the message says what would do.
    """
    padding, kernel_size = _entries(padding), _entries(kernel_size)
    any_size = [Geometry(1, 1, 1)] * rank_of(kernel_size)
    if isinstance(padding, tuple) and is_of_one_dimension(padding):
        pads(padding, any_size)  # Says what to write instead.
    if isinstance(padding, str) or is_integer(padding):
        padding = (padding,) * rank_of(kernel_size)
    _check_one_for_each("padding", padding, kernel_size)
    entries = tuple(map(_entry, padding)) if isinstance(padding, Sequence) else padding
    pads(entries, any_size, dict(known))
    return entries


def is_integer(value: Any) -> bool:
    """Whether it is one, of Python or NumPy. Booleans are none."""
    try:
        arguments.integer("value", value)
    except TypeError:
        return False
    return True


def rank_of(kernel_size: Any) -> int:
    """The number of spatial dimensions of a layer."""
    return len(kernel_size) if isinstance(kernel_size, Sequence) else 1


def for_each(
    name: str, value: Any, kernel_size: Any, default: int = 1, least: int = 1
) -> tuple[int, ...]:
    """An integer for each spatial dimension, of one for all (None: the default) or one for each."""
    rank, value = rank_of(kernel_size), _entries(value)
    if value is None or is_integer(value):
        value = (default if value is None else value,) * rank
    _check_one_for_each(name, value, kernel_size)
    return arguments.integers(name, value, rank, least=least)


def _entries(value: Any) -> Any:
    """What may be iterated over once only, or has a truth value for each entry, as a tuple."""
    if isinstance(value, str | bytes | Sequence) or not isinstance(value, Iterable):
        return value
    return value if is_integer(value) else tuple(value)


def _check_one_for_each(name: str, value: Any, kernel_size: Any) -> None:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        return
    if len(value) != rank_of(kernel_size):
        rank = rank_of(kernel_size)
        raise ValueError(
            f"kernel_size={kernel_size} has {_in_words(rank)} spatial dimension"
            f"{'' if rank == 1 else 's'}, but {name}={value} has {_in_words(len(value))}"
        )


def _in_words(count: int) -> str:
    words = ("none", "one", "two", "three")
    return words[count] if count < len(words) else str(count)


def _entry(entry: Any) -> Any:
    """In one form; what is no padding stays as it is."""
    if isinstance(entry, str):
        return entry.upper(), None
    parts = _pair(entry)
    if not isinstance(parts, tuple) or len(parts) != 2 or not isinstance(parts[0], str):
        return parts
    return parts[0].upper(), _pair(parts[1])


def _pair(amounts: Any) -> Any:
    """An integer stands for two."""
    if is_integer(amounts):
        return (arguments.integer("padding", amounts),) * 2
    if isinstance(amounts, str) or not isinstance(amounts, Iterable):
        return amounts
    return tuple(arguments.integer("padding", x) if is_integer(x) else x for x in amounts)
