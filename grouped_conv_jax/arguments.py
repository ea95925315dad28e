"""Arguments in canonical form, and what is wrong with them refused before any work.

Everything that users get wrong is checked here with a message that names the argument, both
numbers and the mend. What remains is put to `jax.lax.conv_general_dilated` in the abstract, so
that nothing is accepted that lax refuses.
"""

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.sharding import AbstractMesh


def group_count(name: str, value: Any) -> int:
    """A positive integer. Booleans and floats are refused: True == 1 and 2.0 == 2 would share
    compiled programs with the integers that they equal.
    """
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be an integer, got the boolean {value}")
    count = integer(name, value)
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count


def precision(value: Any) -> Any:
    """As it is asked for, hashable; by default that of the context.

    Read now, as lax does: by the time of lowering the context may be another.
    """
    if value is None:
        return jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, list):
        value = tuple(value)
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"precision must be a name, a jax.lax.Precision or two of them, got {value!r}"
        ) from None
    return value


def array_type(name: str, value: Any) -> Any:
    """The type of an array, traced or not; a type is its own."""
    try:
        aval = value if isinstance(value, ShapedArray) else jax.typeof(value)
    except TypeError:
        aval = None
    if not isinstance(aval, ShapedArray):
        raise TypeError(
            f"{name} must be an array, got {type(value).__name__}; convert it with jnp.asarray"
        )
    return aval


def shape(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, Iterable) or isinstance(value, str):
        raise TypeError(f"{name} must be a sequence of integers, got {value!r}")
    sizes = tuple(integer(name, size) for size in value)
    if any(isinstance(size, int) and size < 0 for size in sizes):
        raise ValueError(f"{name} must be made of sizes of at least 0, got {sizes}")
    return sizes


def check_same_dtype(**operands: Any) -> None:
    (first, a), (second, b) = operands.items()
    if a.dtype != b.dtype:
        raise TypeError(
            f"{first} and {second} must have the same dtype, got {a.dtype} and {b.dtype}; "
            "convert one of them with astype"
        )


def layout(lhs_shape: Sequence[int], rhs_shape: Sequence[int], dimension_numbers: Any):
    """Canonical dimension numbers: permutations as tuples."""
    if len(lhs_shape) != len(rhs_shape) or len(lhs_shape) < 2:
        raise ValueError(
            "lhs and rhs must have the same number of dimensions, at least 2 (batch, features, "
            f"spatial dimensions ...), got shapes {tuple(lhs_shape)} and {tuple(rhs_shape)}"
        )
    numbers = lax.conv_dimension_numbers(tuple(lhs_shape), tuple(rhs_shape), dimension_numbers)
    specs = [tuple(spec) for spec in numbers]
    for name, spec in zip(("lhs_spec", "rhs_spec", "out_spec"), specs, strict=True):
        if sorted(spec) != list(range(len(lhs_shape))):
            raise ValueError(
                f"dimension_numbers.{name} must be a permutation of "
                f"{tuple(range(len(lhs_shape)))}, got {spec}"
            )
    return lax.ConvDimensionNumbers(*specs)


def check_divides(name: str, count: int, what: str, size: int) -> None:
    if size % count == 0:
        return
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    listed = ", ".join(map(str, divisors[:16])) + (", ..." if len(divisors) > 16 else "")
    raise ValueError(f"{name}={count} does not divide {what} ({size}); divisors: {listed}")


def result_in_lax(
    lhs_shape: Sequence[Any], rhs_shape: Sequence[Any], dtype: np.dtype, **arguments: Any
) -> jax.ShapeDtypeStruct:
    """The result that `jax.lax.conv_general_dilated` gives, if it takes the arguments.

    Cached, since outside jit it would be most of the cost of a call.
    """
    x64 = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    return _result_in_lax(tuple(lhs_shape), tuple(rhs_shape), dtype, x64, **arguments)


@functools.lru_cache(maxsize=1024)
def _result_in_lax(lhs_shape, rhs_shape, dtype, x64, **arguments) -> jax.ShapeDtypeStruct:
    # What a preferred_element_type means is decided by `x64`, so it is part of the key.
    del x64
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape in (lhs_shape, rhs_shape)]
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        return jax.eval_shape(functools.partial(lax.conv_general_dilated, **arguments), *operands)


def check_groups(lhs_shape: Any, rhs_shape: Any, numbers: Any, groups: int) -> None:
    inputs = lhs_shape[numbers.lhs_spec[1]]
    outputs, depth = (rhs_shape[d] for d in numbers.rhs_spec[:2])
    check_divides("feature_group_count", groups, "the features of lhs", inputs)
    check_divides("feature_group_count", groups, "the output features of rhs", outputs)
    if depth != inputs // groups:
        fits = depth > 0 and inputs % depth == 0 and outputs % (inputs // depth) == 0
        mend = (
            f"feature_group_count={inputs // depth} would fit"
            if fits
            else f"a kernel for {inputs // groups} input features would fit"
        )
        raise ValueError(
            f"rhs takes {depth} input features per group, but lhs has {inputs} features in "
            f"feature_group_count={groups}, {inputs // groups} each; {mend}"
        )
    check_taps(rhs_shape, numbers)


def check_taps(rhs_shape: Any, numbers: Any) -> None:
    if 0 in (taps := tuple(rhs_shape[d] for d in numbers.rhs_spec[2:])):
        raise ValueError(f"rhs must have at least one tap in each spatial dimension, got {taps}")


def integers(
    name: str, values: Any, rank: int, default: int | None = None, least: int = 1
) -> tuple[int, ...]:
    if values is None and default is not None:
        return (default,) * rank
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise TypeError(
            f"{name} must be a sequence of integers, one for each spatial dimension, got {values!r}"
        )
    found = tuple(integer(name, value) for value in values)
    if len(found) != rank:
        raise ValueError(
            f"{name} must have one integer for each of {rank} spatial dimensions, "
            f"got {len(found)}: {found}"
        )
    if any(value < least for value in found):
        raise ValueError(f"{name} must be at least {least}, got {found}")
    return found


def integer(name: str, value: Any) -> Any:
    try:
        return operator.index(value)
    except TypeError:
        if jax.export.is_symbolic_dim(value):
            return value
        raise TypeError(f"{name} must be made of integers, got {value!r}") from None
