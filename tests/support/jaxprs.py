"""Looking into programs: all equations of a jaxpr, with those of the jaxprs inside it."""

from collections.abc import Iterator
from typing import Any

import jax


def equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of `jaxpr` and of every jaxpr in their parameters."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def primitives(f, *operands: Any) -> list[str]:
    return [e.primitive.name for e in equations(jax.make_jaxpr(f)(*operands))]


def convolutions(f, *operands: Any) -> list[Any]:
    """The equations of `f` that are a `grouped_conv`."""
    jaxpr = jax.make_jaxpr(f)(*operands)
    return [e for e in equations(jaxpr) if e.primitive.name == "grouped_conv"]
