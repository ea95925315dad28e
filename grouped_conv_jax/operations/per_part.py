"""What `grouped_conv_mixed` is given once for all of its parts, or for each part its own."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from grouped_conv_jax.operations import arguments
from grouped_conv_jax.operations.padding import MODES
from grouped_conv_jax.text import shown


def listed(value: Any, depth: int = 4) -> Any:
    """What is iterated over, arrays and iterators too, as lists, and tuples as tuples.

    As deep as anything has a meaning: parts, dimensions, a mode and its pair.
    """
    if isinstance(value, str | bytes) or not isinstance(value, Iterable) or _is_scalar(value):
        return value
    if depth == 0:
        return value
    entries = [listed(entry, depth - 1) for entry in value]
    return tuple(entries) if isinstance(value, tuple) else entries


def _is_scalar(value: Any) -> bool:
    return isinstance(value, np.ndarray | jax.Array) and value.ndim == 0


def dilations(value: Any, parts: int, rank: int) -> list[tuple[int, ...]]:
    """That of each part: `rhs_dilation` has integers, or for each part a list of them."""
    if not isinstance(value, list | tuple) or not any(isinstance(d, list | tuple) for d in value):
        return [arguments.integers("rhs_dilation", value, rank, default=1)] * parts
    _check_count("rhs_dilation", value, parts)
    return [arguments.integers("rhs_dilation", entry, rank) for entry in value]


def paddings(padding: Any, parts: int, rank: int) -> list[Any]:
    """That of each part: a list is by dimension, unless each entry is a list of one entry for each
    dimension. Two modes with their pairs, of two parts in two dimensions, could be either.
    """
    if not isinstance(padding, list | tuple):
        return [padding] * parts
    is_by_dimension = len(padding) == rank and all(map(_is_of_dimension, padding))
    is_by_part = bool(padding) and all(_is_of_part(entry, rank) for entry in padding)
    if is_by_dimension and is_by_part and len(padding) == parts:
        spread = [[(mode, None), pair] for mode, pair in padding]
        raise ValueError(
            f"padding={padding} may be meant by dimension, then write {[list(padding)] * parts}, "
            f"or by part, then write {spread}"
        )
    if is_by_part and not is_by_dimension:
        _check_count("padding", padding, parts)
        return list(padding)
    some_by_part = any(
        _is_of_part(entry, rank) and not _is_of_dimension(entry) for entry in padding
    )
    if len(padding) != rank or some_by_part:
        raise ValueError(
            f"padding must have an entry for each of {rank} spatial dimensions, or for each of the "
            f"{parts} kernels of rhs a list of them, as {[['SAME'] * rank] * parts}; got "
            f"{len(padding)}: {shown(padding)}"
        )
    return [padding] * parts


def _is_of_part(entry: Any, rank: int) -> bool:
    """Whether it may be the padding of all dimensions: a list with an entry for each of them."""
    return (
        isinstance(entry, list | tuple) and len(entry) == rank and all(map(_is_of_dimension, entry))
    )


def _is_of_dimension(entry: Any) -> bool:
    """Whether it may be that of one dimension: a string, a pair, or a mode with a pair or None."""
    if isinstance(entry, str):
        return True
    if not isinstance(entry, list | tuple) or len(entry) != 2:
        return False
    first, second = entry
    if isinstance(first, str) and isinstance(second, list | tuple):
        return first.upper() in MODES and not any(isinstance(x, str | list | tuple) for x in second)
    return not isinstance(first, list | tuple) and not isinstance(second, str | list | tuple)


def _check_count(name: str, value: Any, parts: int) -> None:
    if len(value) != parts:
        raise ValueError(
            f"{name} must be given once, or for each of the {parts} kernels of rhs; got it for "
            f"{len(value)}: {shown(value)}"
        )
