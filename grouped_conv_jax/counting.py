"""Counting the multiply-adds of a traced function."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

from grouped_conv_jax.contraction import grouped_conv_p


def count_multiply_adds(function: Callable, *args: Any) -> int:
    """Multiply-adds of the grouped convolutions and matrix products in `function(*args)`.

    Nothing is computed: `args` may be arrays or `jax.ShapeDtypeStruct`. Padding counts as data, as
    is usual; gradients count where `function` takes them; a `lax.scan` counts as often as it
    runs, of the branches of a `lax.cond` the dearest, and what is inside `jax.shard_map` as the
    work of one device.

    Raises:
      NotImplementedError: `function` has some of them in a `lax.while_loop`, which may run any
        number of times, or has a convolution that is not a `grouped_conv`.

    Example:
      >>> import jax
      >>> from grouped_conv_jax import count_multiply_adds, grouped_conv
      >>> x = jax.ShapeDtypeStruct((1, 4, 8, 8), "float32")
      >>> w = jax.ShapeDtypeStruct((6, 2, 3, 3), "float32")
      >>> conv = lambda x, w: grouped_conv(x, w, (1, 1), "SAME", feature_group_count=2)
      >>> count_multiply_adds(conv, x, w) == 8 * 8 * 6 * 2 * 3 * 3
      True
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> int:
    name = equation.primitive.name
    if equation.primitive is grouped_conv_p:
        return equation.params["spec"].multiply_adds
    if name == "dot_general":
        (contracting, _), _ = equation.params["dimension_numbers"]
        lhs = equation.invars[0].aval.shape
        return math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[d] for d in contracting)
    inner = [_count(jaxpr) for jaxpr in jaxprs_in_params(equation.params)]
    if name == "conv_general_dilated" or (name == "while" and any(inner)):
        mend = "; convolve with grouped_conv" if name == "conv_general_dilated" else ""
        raise NotImplementedError(f"cannot count the multiply-adds of {name}{mend}")
    if name == "scan":
        return equation.params["length"] * sum(inner)
    return max(inner, default=0) if name == "cond" else sum(inner)
