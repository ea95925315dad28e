"""Tracing the call of a function that is not run: `explain` and `tune` look into its program.

The function may change its arguments, as training steps of Flax nnx do. It gets copies that hold
tracers, and what it leaves in the copies counts as a result.
"""

import functools
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grouped_conv_jax.operations import arguments
from grouped_conv_jax.operations.conv import grouped_conv


class Call(NamedTuple):
    """A function with its arguments."""

    function: Callable
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


def parsed(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """Returns the call that the arguments of `explain` and `tune` stand for.

    They are a function and its arguments, or the arguments of `grouped_conv`. The latter stand for
    the convolution and its two gradients.
    """
    if args and callable(args[0]):
        return Call(args[0], args[1:], kwargs)
    return Call(_with_gradients, args, kwargs)


def _with_gradients(lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> Any:
    """Computes a convolution and its gradients; integers have none."""
    arguments.array_type("lhs", lhs)
    arguments.array_type("rhs", rhs)

    def conv(lhs: Any, rhs: Any) -> jax.Array:
        return grouped_conv(lhs, rhs, *args, **kwargs)

    if not jnp.issubdtype(jax.eval_shape(conv, lhs, rhs).dtype, jnp.inexact):
        return conv(lhs, rhs)
    out, gradients = jax.vjp(conv, lhs, rhs)
    return out, gradients(out)


def traced(call: Call) -> tuple[list[Any], Any]:
    """Returns the arrays among the arguments of a call, and its trace as a function of them.

    An array may be a `jax.ShapeDtypeStruct`. All other arguments are static. The function itself
    counts as an argument where it has arrays: as a module, a bound method or a partial function.
    As under `jax.jit`, it must not change anything else: tracers would be left there.

    Raises:
      ValueError: the function changes a module of Flax that is not among its arguments.
    """
    arrays: list[Any] = []

    def keep(leaf: Any) -> Any:
        if _is_array(leaf):
            arrays.append(leaf)
        return leaf

    _copied(call, keep, {})

    def compute(*tracers: Any) -> list[jax.Array]:
        given = iter(tracers)
        copy = _copied(call, lambda leaf: next(given) if _is_array(leaf) else leaf, {})
        out = copy.function(*copy.args, **copy.kwargs)
        # What the function has changed in its arguments is as much a result as what it returns.
        return [leaf for leaf in _leaves((out, copy)) if isinstance(leaf, jax.Array)]

    try:
        return arrays, jax.jit(compute).trace(*arrays)
    except Exception as error:
        if "different trace level" in str(error):  # It is a module of Flax nnx that says so.
            raise ValueError(
                "the function changes a module of Flax that is not among its arguments; pass the "
                "module, or the optimizer, as an argument"
            ) from error
        raise


def _is_array(x: Any) -> bool:
    # Scalar types of NumPy have these attributes, too. Scalars are static, as Python's are.
    has_type = hasattr(x, "shape") and hasattr(x, "dtype")
    return has_type and not isinstance(x, type | np.generic)


def _children(x: Any) -> tuple[list[Any], Callable[[list[Any]], Any]] | None:
    """Returns what an object is made of and how it is made of it; None for a leaf."""
    if isinstance(x, types.MethodType):
        return [x.__self__], lambda children: types.MethodType(x.__func__, *children)
    if type(x) is functools.partial:
        parts = [x.func, x.args, x.keywords]
        return parts, lambda parts: functools.partial(parts[0], *parts[1], **parts[2])
    children, tree = jax.tree.flatten(x, is_leaf=lambda y: y is not x)
    if not (len(children) == 1 and children[0] is x):
        return children, tree.unflatten
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(x, nnx.Module):  # With `pytree=False`.
        graph, state = nnx.split(x)
        return [state], lambda parts: nnx.merge(graph, *parts)
    return None


def _copied(x: Any, leaf: Callable[[Any], Any], copies: dict[int, tuple[Any, Any]]) -> Any:
    """Returns a tree with its leaves replaced, in which shared nodes stay shared.

    `jax.tree.map` would make two copies of a module that two arguments share, and what is changed
    in one would not be seen in the other. `copies` has nodes with their copies by identity. It
    holds the nodes, so that no identity is given away again.
    """
    if id(x) not in copies:
        node = _children(x)
        if node is None:
            return leaf(x)
        children, make = node
        copies[id(x)] = x, make([_copied(child, leaf, copies) for child in children])
    return copies[id(x)][1]


def _leaves(x: Any) -> Iterator[Any]:
    """Yields the leaves of a tree."""
    try:
        node = _children(x)
    except ValueError:  # A state of Equinox that has been replaced by a new one says so.
        return
    if node is None:
        yield x
    else:
        for child in node[0]:
            yield from _leaves(child)
