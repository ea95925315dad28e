"""Counting what a function computes, from its trace, and the parameters of a network.

All that is counted of a function goes by one walk over its equations: of its grouped convolutions
(output and gradients) and matrix products. Flax is asked only about what is Flax's, so that this
module does not import it.
"""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grouped_conv_jax.jax_compat import jaxprs_in_params
from grouped_conv_jax.primitive import grouped_conv_p


class _Quantity(NamedTuple):
    """What is counted, and how much of it an equation has that is a contraction."""

    name: str
    of: Callable[[Any], int]


def count_multiply_adds(function: Callable, *args: Any) -> int:
    """Multiply-adds of the grouped convolutions and matrix products in `function(*args)`.

    Nothing is computed: `args` may be arrays or `jax.ShapeDtypeStruct`. Padding counts as data, as
    is usual; gradients count where `function` takes them; a `lax.scan` counts as often as it
    runs, of the branches of a `lax.cond` the dearest, and what is inside `jax.shard_map` as the
    work of one device.

    Args:
      function: a function of arrays or of trees of them; also a module of Flax nnx, with
        parameters or without (`nnx.eval_shape`). Of a module of linen it is `apply`, and the
        variables are the first of `args`.
      *args: its arguments; where only a shape is known a `jax.ShapeDtypeStruct`.

    Returns:
      The number of multiply-adds.

    Raises:
      NotImplementedError: `function` has some of them in a `lax.while_loop` or a Pallas kernel,
        which may run any number of times, or has a convolution that is not a `grouped_conv`.

    Example:
      >>> import jax
      >>> from grouped_conv_jax import count_multiply_adds, grouped_conv
      >>> x = jax.ShapeDtypeStruct((1, 4, 8, 8), "float32")
      >>> w = jax.ShapeDtypeStruct((6, 2, 3, 3), "float32")
      >>> conv = lambda x, w: grouped_conv(x, w, (1, 1), "SAME", feature_group_count=2)
      >>> count_multiply_adds(conv, x, w) == 8 * 8 * 6 * 2 * 3 * 3
      True
    """
    return _count(_traced(function, args), _Quantity("multiply-adds", _multiply_adds))


def count_flops(function: Callable, *args: Any) -> int:
    """Operations of the grouped convolutions and matrix products in `function(*args)`.

    A multiply-add is two, of complex numbers eight: four products and four sums. Those of integers
    count alike. What is counted, and how often, is as in `count_multiply_adds`.

    Args:
      function: as in `count_multiply_adds`.
      *args: its arguments, arrays or `jax.ShapeDtypeStruct`.

    Returns:
      The number of operations.

    Raises:
      NotImplementedError: as in `count_multiply_adds`.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from grouped_conv_jax.counting import count_flops
      >>> from grouped_conv_jax.nnx import GroupedConv
      >>> layer = GroupedConv(4, 6, (3, 3), feature_group_count=2, rngs=nnx.Rngs(0))
      >>> count_flops(layer, jax.ShapeDtypeStruct((1, 8, 8, 4), "float32"))
      13824
    """
    return _count(_traced(function, args), _Quantity("FLOPs", _flops))


def count_bytes(function: Callable, *args: Any) -> int:
    """Bytes that the grouped convolutions and matrix products in `function(*args)` must move.

    Of each the two operands are read once and its result is written once, whatever is computed
    in between: the least that it takes of a memory that keeps nothing from one to the next. With
    `count_flops` it makes the arithmetic intensity. How often each counts is as in
    `count_multiply_adds`.

    Args:
      function: as in `count_multiply_adds`.
      *args: its arguments, arrays or `jax.ShapeDtypeStruct`.

    Returns:
      The number of bytes; elements of 4 bits are half of one.

    Raises:
      NotImplementedError: as in `count_multiply_adds`.

    Example:
      >>> import jax
      >>> from grouped_conv_jax import grouped_conv
      >>> from grouped_conv_jax.counting import count_bytes
      >>> x = jax.ShapeDtypeStruct((1, 4, 8, 8), "float32")
      >>> w = jax.ShapeDtypeStruct((6, 2, 3, 3), "float32")
      >>> conv = lambda x, w: grouped_conv(x, w, (1, 1), "SAME", feature_group_count=2)
      >>> count_bytes(conv, x, w) == 4 * (4 * 8 * 8 + 6 * 2 * 3 * 3 + 6 * 8 * 8)
      True
    """
    return _count(_traced(function, args), _Quantity("bytes", _bytes))


def count_parameters(layer_or_tree: Any) -> int:
    """How many numbers the parameters of a layer, or of a network, are.

    Args:
      layer_or_tree: a module of Flax nnx, of which the `nnx.Param` count, each once; the variables
        of one of linen, of which the collection "params" counts; or any tree of arrays or
        `jax.ShapeDtypeStruct`, all of which count.

    Returns:
      The number of elements.

    Raises:
      TypeError: something in the tree is no array.

    Example:
      >>> from flax import nnx
      >>> from grouped_conv_jax.counting import count_parameters
      >>> from grouped_conv_jax.nnx import GroupedConv
      >>> count_parameters(GroupedConv(4, 6, (3, 3), feature_group_count=2, rngs=nnx.Rngs(0)))
      114
    """
    if isinstance(layer_or_tree, Mapping) and "params" in layer_or_tree:
        layer_or_tree = layer_or_tree["params"]
    return sum(_size(path, leaf) for path, leaf in _parameters(layer_or_tree))


# The walk.


_MATRIX_PRODUCTS = "dot_general", "ragged_dot_general", "scaled_dot"
_OTHERS = "conv_general_dilated", "scaled_matmul_wrapper"


def _traced(function: Callable, args: tuple[Any, ...]) -> Any:
    nnx = _flax_nnx()
    try:
        if nnx is None or not isinstance(function, nnx.Module):
            return jax.make_jaxpr(function)(*args).jaxpr
        # The parameters as an argument: they may be abstract, and the module may change its state.
        graphdef, state = nnx.split(function)

        def call(state: Any, *args: Any) -> Any:
            return nnx.merge(graphdef, state)(*args)

        return jax.make_jaxpr(call)(state, *args).jaxpr
    except Exception as error:
        for arg in args:
            if isinstance(arg, list | tuple) and arg and all(isinstance(n, int) for n in arg):
                raise TypeError(
                    f"args has {arg}, which is no array; of a shape it is "
                    f"jax.ShapeDtypeStruct({tuple(arg)}, jnp.float32)"
                ) from error
        raise


def _count(jaxpr: Any, quantity: _Quantity) -> int:
    return sum(_count_equation(equation, quantity) for equation in jaxpr.eqns)


def _count_equation(equation: Any, quantity: _Quantity) -> int:
    name = equation.primitive.name
    if equation.primitive is grouped_conv_p or name in _MATRIX_PRODUCTS:
        return quantity.of(equation)
    inner = [_count(jaxpr, quantity) for jaxpr in jaxprs_in_params(equation.params)]
    if name in _OTHERS or (name in ("while", "pallas_call") and any(inner)):
        mend = "; convolve with grouped_conv" if name == "conv_general_dilated" else ""
        raise NotImplementedError(f"cannot count the {quantity.name} of {name}{mend}")
    if name == "scan":
        return equation.params["length"] * sum(inner)
    return max(inner, default=0) if name == "cond" else sum(inner)


# Of one contraction.


def _multiply_adds(equation: Any) -> int:
    if equation.primitive is grouped_conv_p:
        return equation.params["spec"].multiply_adds
    numbers, groups = equation.params.get("dimension_numbers"), ()
    if numbers is None:
        # Each row is multiplied with the matrix of its group only.
        ragged = equation.params["ragged_dot_dimension_numbers"]
        numbers, groups = ragged.dot_dimension_numbers, ragged.rhs_group_dimensions
    (_, contracting), (_, batch) = numbers
    lhs, rhs = (operand.aval.shape for operand in equation.invars[:2])
    shared = {*contracting, *batch, *groups}
    return math.prod(lhs) * math.prod(rhs[d] for d in range(len(rhs)) if d not in shared)


def _flops(equation: Any) -> int:
    parts = [
        2 if jnp.issubdtype(operand.aval.dtype, jnp.complexfloating) else 1
        for operand in equation.invars[:2]
    ]
    return 2 * math.prod(parts) * _multiply_adds(equation)


def _bytes(equation: Any) -> int:
    arrays = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    bits = (math.prod(aval.shape) * jax.dtypes.itemsize_bits(aval.dtype) for aval in arrays)
    return sum(-(-size // 8) for size in bits)


# Parameters.


def _parameters(tree: Any) -> list[tuple[str, Any]]:
    """The arrays that count, with their paths."""
    nnx = _flax_nnx()
    if nnx is None:
        return _leaves(tree)
    # Its graph, not its tree: there what is shared is found once.
    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree, nnx.Param)
    found: list[tuple[str, Any]] = []
    for path, leaf in _leaves(tree, lambda leaf: isinstance(leaf, nnx.Module | nnx.Variable)):
        if isinstance(leaf, nnx.Module | nnx.Param):
            inside = leaf if isinstance(leaf, nnx.Module) else leaf.get_value()
            found += [(path + rest, array) for rest, array in _parameters(inside)]
        elif not isinstance(leaf, nnx.Variable):
            found.append((path, leaf))
    return found


def _leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def _size(path: str, leaf: Any) -> int:
    # NumPy's scalar types have a shape, too.
    if isinstance(leaf, type) or not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise TypeError(
            f"layer_or_tree must be an nnx module or a tree of arrays, got a "
            f"{type(leaf).__name__}{path and f' at {path}'}; of a linen module it is what init "
            "returns"
        )
    return math.prod(leaf.shape)


def _flax_nnx() -> Any:
    """Flax's nnx, if it has been imported: else there is nothing of its kind."""
    return sys.modules.get("flax.nnx")
