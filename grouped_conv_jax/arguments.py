"""From the arguments of `grouped_conv` to a `ConvSpec`, refusing what is wrong before any work.

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
from jax.sharding import AbstractMesh, NamedSharding

from grouped_conv_jax.explicit import has_explicit_axes, result_sharding
from grouped_conv_jax.spec import ConvSpec

PADDINGS = ("SAME", "SAME_LOWER", "VALID")


def conv_spec(
    lhs: Any,
    rhs: Any,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any,
    rhs_dilation: Any,
    dimension_numbers: Any,
    feature_group_count: Any,
    precision: Any,
    preferred_element_type: Any,
    out_sharding: Any,
) -> tuple[ConvSpec, NamedSharding | None]:
    """The spec of one convolution, and on an Explicit mesh the sharding of its result.

    Arguments as in `grouped_conv`.

    Raises:
      ValueError, TypeError: an argument is wrong; the message says which and how to mend it.
    """
    groups = group_count("feature_group_count", feature_group_count)
    lhs, rhs = array_type("lhs", lhs), array_type("rhs", rhs)
    if lhs.dtype != rhs.dtype:
        raise TypeError(
            f"lhs and rhs must have the same dtype, got {lhs.dtype} and {rhs.dtype}; "
            "convert one of them with astype"
        )
    numbers = layout(lhs.shape, rhs.shape, dimension_numbers)
    rank = lhs.ndim - 2
    strides = _positive_integers("window_strides", window_strides, rank)
    lhs_dilation = _positive_integers("lhs_dilation", lhs_dilation, rank, default=1)
    rhs_dilation = _positive_integers("rhs_dilation", rhs_dilation, rank, default=1)
    _check_groups(lhs.shape, rhs.shape, numbers, groups)
    pairs = _padding_pairs(padding, lhs, rhs, strides, lhs_dilation, rhs_dilation, numbers)
    if precision is None:
        # Read now, as lax does: by the time of lowering the context may be another.
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(precision, list):
        precision = tuple(precision)
    try:
        hash(precision)
    except TypeError:
        raise TypeError(
            f"precision must be a name, a jax.lax.Precision or two of them, got {precision!r}"
        ) from None

    arguments = {
        "window_strides": strides,
        # lax takes a string where it would refuse the pairs of symbolic sizes that it stands for.
        "padding": padding if isinstance(padding, str) else pairs,
        "lhs_dilation": lhs_dilation,
        "rhs_dilation": rhs_dilation,
        "dimension_numbers": numbers,
        "feature_group_count": groups,
        "precision": precision,
        "preferred_element_type": preferred_element_type,
    }
    x64 = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    out_dtype = _dtype_in_lax(lhs.shape, rhs.shape, lhs.dtype, x64, **arguments)
    spec = ConvSpec(
        lhs_shape=lhs.shape,
        rhs_shape=rhs.shape,
        dtype=lhs.dtype,
        out_dtype=out_dtype,
        window_strides=strides,
        padding=pairs,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=numbers,
        feature_group_count=groups,
        precision=precision,
    )
    if out_sharding is not None:
        return spec, _sharding_in_lax(lhs, rhs, out_sharding, **arguments)
    if has_explicit_axes(_mesh(lhs, rhs)):
        return spec, result_sharding(spec, lhs.sharding, rhs.sharding)
    return spec, None


def group_count(name: str, value: Any) -> int:
    """A positive integer. Booleans and floats are refused: True == 1 and 2.0 == 2 would share
    compiled programs with the integers that they equal.
    """
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be an integer, got the boolean {value}")
    count = _index(name, value)
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count


def array_type(name: str, value: Any) -> Any:
    """The shape and dtype of an array, traced or not."""
    try:
        aval = jax.typeof(value)
    except TypeError:
        aval = None
    if not isinstance(aval, ShapedArray):
        raise TypeError(
            f"{name} must be an array, got {type(value).__name__}; convert it with jnp.asarray"
        )
    return aval


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


def _sharding_in_lax(lhs: Any, rhs: Any, out_sharding: Any, **arguments: Any) -> NamedSharding:
    """What lax makes of an out_sharding."""
    operands = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in (lhs, rhs)]
    with jax.sharding.use_abstract_mesh(_mesh(lhs, rhs)):
        return jax.eval_shape(
            functools.partial(lax.conv_general_dilated, **arguments, out_sharding=out_sharding),
            *operands,
        ).sharding


def _mesh(lhs: Any, rhs: Any) -> AbstractMesh:
    meshes = (lhs.sharding.mesh, rhs.sharding.mesh)
    return next((m for m in meshes if not m.empty), jax.sharding.get_abstract_mesh())


@functools.lru_cache(maxsize=1024)
def _dtype_in_lax(lhs_shape, rhs_shape, dtype, x64, **arguments) -> np.dtype:
    """The dtype that lax gives the result, if it takes the arguments.

    Cached, since outside jit it would be most of the cost of a call. `x64` decides what a
    preferred_element_type means, so it is part of the key.
    """
    del x64
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape in (lhs_shape, rhs_shape)]
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        return jax.eval_shape(
            functools.partial(lax.conv_general_dilated, **arguments), *operands
        ).dtype


def _check_groups(lhs_shape: Any, rhs_shape: Any, numbers: Any, groups: int) -> None:
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
    if 0 in (taps := tuple(rhs_shape[d] for d in numbers.rhs_spec[2:])):
        raise ValueError(f"rhs must have at least one tap in each spatial dimension, got {taps}")


def _padding_pairs(padding, lhs, rhs, strides, lhs_dilation, rhs_dilation, numbers):
    rank = len(strides)
    if isinstance(padding, str):
        if padding.upper() not in PADDINGS:
            raise ValueError(
                f"unknown padding {padding!r}; known: {', '.join(PADDINGS)}, or one (low, high) "
                "pair for each spatial dimension"
            )
        if any(d != 1 for d in lhs_dilation):
            raise ValueError(
                f"padding={padding!r} has no meaning with lhs_dilation={lhs_dilation}; "
                "give one (low, high) pair for each spatial dimension"
            )
        window = [
            1 + dilation * (rhs.shape[d] - 1)
            for d, dilation in zip(numbers.rhs_spec[2:], rhs_dilation, strict=True)
        ]
        spatial = [lhs.shape[d] for d in numbers.lhs_spec[2:]]
        padding = lax.padtype_to_pads(spatial, window, strides, padding)
        return tuple((low, high) for low, high in padding)
    if not isinstance(padding, Iterable):
        raise TypeError(f"padding must be a string or (low, high) pairs, got {padding!r}")
    pairs = list(padding)
    if len(pairs) != rank:
        raise ValueError(
            f"padding must have one (low, high) pair for each of {rank} spatial dimensions, "
            f"got {len(pairs)}: {padding}"
        )
    for pair in pairs:
        if not isinstance(pair, Iterable) or len(list(pair)) != 2:
            raise ValueError(f"padding must consist of (low, high) pairs, got {pair!r}")
    return tuple((_index("padding", low), _index("padding", high)) for low, high in pairs)


def _positive_integers(
    name: str, values: Any, rank: int, default: int | None = None
) -> tuple[int, ...]:
    if values is None and default is not None:
        return (default,) * rank
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise TypeError(
            f"{name} must be a sequence of integers, one for each spatial dimension, got {values!r}"
        )
    integers = tuple(_index(name, value) for value in values)
    if len(integers) != rank:
        raise ValueError(
            f"{name} must have one integer for each of {rank} spatial dimensions, "
            f"got {len(integers)}: {integers}"
        )
    if any(value < 1 for value in integers):
        raise ValueError(f"{name} must be at least 1, got {integers}")
    return integers


def _index(name: str, value: Any) -> Any:
    try:
        return operator.index(value)
    except TypeError:
        if jax.export.is_symbolic_dim(value):
            return value
        raise TypeError(f"{name} must be made of integers, got {value!r}") from None
