"""Arguments in canonical form, and what is wrong with them refused before any work.

Everything that users get wrong is checked here with a message that names the argument, both
numbers and the mend. The dtypes and the precision are put to `jax.lax.conv_general_dilated` in the
abstract, so that none is accepted that lax refuses.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.lax import conv_general_dilated  # By name, so that a program may replace it in jax.lax.
from jax.sharding import AbstractMesh

from grouped_conv_jax.spec import ConvSpec, Role
from grouped_conv_jax.text import shown

LARGEST = 2**31 - 1
"""The largest step, and the largest dimension of a result that is larger than its operand's."""

MOST_TRIED = 10_000
"""Messages list divisors up to this one."""


WIDE = frozenset(map(np.dtype, (np.float64, np.complex128, np.int64, np.uint64)))
"""The dtypes that JAX takes in an x64 context only."""

P = ParamSpec("P")
T = TypeVar("T")


def keeps_64_bits(operation: Callable[P, T]) -> Callable[P, T]:
    """Makes an operation compute in 64 bits if one of its arrays has them.

    Such an array may come from a `jax.enable_x64` context that has ended. lax's convolution takes
    it, but other operations would truncate what they compute from it.
    """

    @functools.wraps(operation)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        arrays = (x for x in (*args, *kwargs.values()) if isinstance(x, jax.Array))
        if jax.config.jax_enable_x64 or WIDE.isdisjoint(x.dtype for x in arrays):  # pyright: ignore[reportAttributeAccessIssue]
            return operation(*args, **kwargs)
        with jax.enable_x64(True):
            return operation(*args, **kwargs)

    return call


def group_count(name: str, value: Any) -> int:
    """A positive integer. Floats are refused: 2.0 == 2 would share compiled programs with it."""
    count = integer(name, value, "an integer")
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {shown(count)}")
    return count


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def element_type(value: Any) -> np.dtype | None:
    """Of preferred_element_type."""
    if value is None:
        return None
    try:
        return jnp.dtype(value)
    except Exception:  # NumPy raises whatever comes of reading a string as a dtype.
        raise TypeError(
            f"preferred_element_type must be a dtype such as jnp.float32, got {shown(value)}"
        ) from None


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
            f"precision must be a name, a jax.lax.Precision or two of them, got {shown(value)}"
        ) from None
    return value


def array_type(name: str, value: Any) -> Any:
    """The type of an array, traced or not; a type is its own."""
    try:
        aval = value if isinstance(value, ShapedArray) else jax.typeof(value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        aval = None
    if not isinstance(aval, ShapedArray):
        kind = type(value)
        is_of_torch = kind.__module__.startswith("torch")
        mend = f"{name}.detach().numpy()" if is_of_torch else "jnp.asarray"
        raise TypeError(f"{name} must be an array, got {kind.__name__}; convert it with {mend}")
    check_bits(name, aval.dtype)
    return aval


def check_bits(name: str, dtype: Any) -> None:
    """Raises TypeError for integers of two bits. XLA ends the process when it joins such arrays."""
    if jax.dtypes.itemsize_bits(dtype) == 2:
        raise TypeError(f"{name} must not be of {dtype}; convert it with astype(jnp.int8)")


def shape(name: str, value: Any) -> tuple[Any, ...]:
    if hasattr(value, "shape") and jnp.ndim(value) != 1:
        raise TypeError(
            f"{name} must be a shape, got an array of shape {tuple(value.shape)}; pass its .shape"
        )
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise TypeError(f"{name} must be a sequence of integers, got {shown(value)}")
    sizes = tuple(integer(name, size) for size in value)
    if any(isinstance(size, int) and size < 0 for size in sizes):
        raise ValueError(f"{name} must be made of sizes of at least 0, got {shown(sizes)}")
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
    if size % count:
        raise ValueError(does_not_divide(name, count, what, size))


def does_not_divide(name: str, count: int, what: str, size: int) -> str:
    divisors = [d for d in range(1, min(size, MOST_TRIED) + 1) if size % d == 0]
    listed = ", ".join(map(str, divisors[:16])) + (
        ", ..." if len(divisors) > 16 or size > MOST_TRIED else ""
    )
    return f"{name}={count} does not divide {what} ({size}); divisors: {listed}"


def result_dtype(dtype: np.dtype, precision: Any, preferred_element_type: Any) -> np.dtype:
    """Returns the dtype that `jax.lax.conv_general_dilated` gives its result.

    Raises:
      ValueError, TypeError: lax does not take such a precision or such dtypes.
    """
    # What a preferred_element_type means depends on this, so it is part of the key.
    x64 = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    return _result_dtype_in_lax(dtype, precision, element_type(preferred_element_type), x64)


@functools.lru_cache(maxsize=1024)  # Outside jit it would be most of the cost of a call.
def _result_dtype_in_lax(
    dtype: np.dtype, precision: Any, element_type: np.dtype | None, x64: bool
) -> np.dtype:
    del x64
    convolve = functools.partial(
        conv_general_dilated,
        window_strides=(),
        padding=(),
        precision=precision,
        preferred_element_type=element_type,
    )
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        return jax.eval_shape(convolve, *[jax.ShapeDtypeStruct((1, 1), dtype)] * 2).dtype


def checked(spec: ConvSpec, result: Role) -> ConvSpec:
    """Returns a spec with its steps and padding written as short as they can be.

    Args:
      spec: the convolution with the numbers that the caller gave.
      result: the array that the operation computes.

    Raises:
      ValueError: the numbers are too large to be computed with.
    """
    for role in ("lhs", "rhs", "out"):
        check_bytes(role if role != result else "the result", spec.shape(role), spec.dtype)
    if spec.is_symbolic:
        return spec
    for i, size in enumerate(spec.spatial_shape(result)):
        given = [spec.spatial_shape(role)[i] for role in ("lhs", "out") if role != result]
        if size > max(LARGEST, *given):
            raise ValueError(
                f"the result would have shape {spec.shape(result)}; a dimension that grows may "
                f"have at most {LARGEST} positions"
            )
    short = spec.shortened()
    if max((*short.window_strides, *short.lhs_dilation, *short.rhs_dilation), default=1) > LARGEST:
        raise ValueError(
            f"the strides {spec.window_strides}, the dilation {spec.lhs_dilation} of lhs and the "
            f"dilation {spec.rhs_dilation} of rhs are too large to be computed together; give "
            f"numbers of at most {LARGEST}"
        )
    return short


def check_crops(padding: Sequence[tuple[Any, Any]], extents: Sequence[Any]) -> None:
    """Raises ValueError if negative padding crops more than the positions that there are."""
    for i, ((low, high), size) in enumerate(zip(padding, extents, strict=True)):
        if isinstance(size + low + high, int) and size + low + high < 0:
            raise ValueError(
                f"padding {(low, high)} crops more than the {size} positions of spatial dimension "
                f"{i}"
            )


def check_bytes(what: str, shape: Sequence[Any], dtype: np.dtype) -> None:
    """Raises ValueError if an array is larger than 64 bits can address."""
    if not all(isinstance(n, int) for n in shape):
        return
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size >= 2**63:
        raise ValueError(f"{what} would have shape {tuple(shape)}, which are {size} bytes")


def windows(rhs_shape: Sequence[Any], numbers: Any, dilation: Sequence[int]) -> list[Any]:
    """The spatial sizes of a kernel with its gaps filled."""
    taps = (rhs_shape[d] for d in numbers.rhs_spec[2:])
    return [1 + step * (size - 1) for size, step in zip(taps, dilation, strict=True)]


def check_groups(lhs_shape: Any, rhs_shape: Any, numbers: Any, groups: int) -> None:
    """Raises ValueError unless the groups divide lhs and rhs, and these fit each other."""
    if (wrong := _misfit(lhs_shape, rhs_shape, numbers, groups)) is not None:
        raise ValueError(wrong + _layout_that_fits(lhs_shape, rhs_shape, groups))
    check_taps(rhs_shape, numbers)


def _misfit(lhs_shape: Any, rhs_shape: Any, numbers: Any, groups: int) -> str | None:
    inputs = lhs_shape[numbers.lhs_spec[1]]
    outputs, depth = (rhs_shape[d] for d in numbers.rhs_spec[:2])
    name = "feature_group_count"
    if inputs % groups:
        return does_not_divide(name, groups, "the features of lhs", inputs)
    if outputs % groups:
        return does_not_divide(name, groups, "the output features of rhs", outputs)
    if depth == inputs // groups:
        return None
    fitting = inputs // depth if depth > 0 and inputs % depth == 0 else 0
    mend = (
        f"feature_group_count={fitting} would fit"
        if fitting > 0 and outputs % fitting == 0
        else f"a kernel for {inputs // groups} input features would fit"
    )
    return (
        f"rhs takes {depth} input features per group, but lhs has {inputs} features in "
        f"feature_group_count={groups}, {inputs // groups} each; {mend}"
    )


def _layout_that_fits(lhs_shape: Any, rhs_shape: Any, groups: int) -> str:
    """What to add to the message where another of the usual layouts is what was meant."""
    letters = {1: "W", 2: "HW", 3: "DHW"}.get(len(lhs_shape) - 2)
    if letters is None or not all(isinstance(n, int) for n in (*lhs_shape, *rhs_shape)):
        return ""
    for arrays in (f"N{letters}C", f"NC{letters}"):
        for kernel in (f"{letters}IO", f"OI{letters}"):
            names = (arrays, kernel, arrays)
            numbers = lax.conv_dimension_numbers(lhs_shape, rhs_shape, names)
            if _misfit(lhs_shape, rhs_shape, numbers, groups) is None:
                return f"; or is the layout another one? dimension_numbers={names} would fit"
    return ""


def check_taps(rhs_shape: Any, numbers: Any) -> None:
    if 0 in (taps := tuple(rhs_shape[d] for d in numbers.rhs_spec[2:])):
        raise ValueError(f"rhs must have at least one tap in each spatial dimension, got {taps}")


def integers(
    name: str, values: Any, rank: int, default: int | None = None, least: int = 1
) -> tuple[int, ...]:
    if values is None and default is not None:
        return (default,) * rank
    if not isinstance(values, Iterable) or isinstance(values, str | bytes):
        raise TypeError(
            f"{name} must be a sequence of integers, one for each spatial dimension, got "
            f"{shown(values)}"
        )
    found = tuple(integer(name, value) for value in values)
    if len(found) != rank:
        raise ValueError(
            f"{name} must have one integer for each of {rank} spatial dimensions, "
            f"got {len(found)}: {shown(found)}"
        )
    if any(value < least for value in found):
        raise ValueError(f"{name} must be at least {least}, got {shown(found)}")
    return found


def integer(name: str, value: Any, what: str = "made of integers") -> Any:
    """An integer, or the symbol of one. Booleans are none: True == 1, also as a key of caches."""
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be {what}, got the boolean {value}")
    try:
        return operator.index(value)
    except TypeError:
        if jax.export.is_symbolic_dim(value):
            return value
        raise TypeError(f"{name} must be {what}, got {shown(value)}") from None
