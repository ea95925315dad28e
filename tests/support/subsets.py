"""Operands of which some are mapped."""

import itertools

import jax
import numpy as np
import oracle
from cases import (
    Case,
)

SUBSETS = [mapped for mapped in itertools.product((False, True), repeat=3) if any(mapped)]


def contractions(conv):
    """Of (x, w, y): the output, and both gradients for the output's cotangent y."""

    def compute(x, w, y):
        out, vjp = jax.vjp(conv, x, w)
        return out, *vjp(y)

    return compute


def stacked(case: Case, size: int) -> list[np.ndarray]:
    return case.random(np.float64, stack=(size,))


def looped(case: Case, stacks, mapped, size: int) -> list[np.ndarray]:
    """What vmap over axis 0 of the `mapped` stacks should be; of the others the first is meant."""
    results = [
        case.contractions(*(a[i if m else 0] for a, m in zip(stacks, mapped, strict=True)))
        for i in range(size)
    ]
    return [np.stack(arrays) for arrays in zip(*results, strict=True)]


def check_subsets(conv, case: Case, plans, size: int = 3) -> None:
    """Compares vmaps of the contractions with loops, all in one program.

    A plan is (in_axes, out_axes), with None for an operand that is not mapped.
    """
    stacks = stacked(case, size)
    operands = []
    for in_axes, _ in plans:
        operands.append(
            [
                a[0] if axis is None else np.moveaxis(a, 0, axis)
                for a, axis in zip(stacks, in_axes, strict=True)
            ]
        )

    @jax.jit
    def compute(operands):
        compute = contractions(conv)
        return [
            jax.vmap(compute, *plan)(*arrays) for plan, arrays in zip(plans, operands, strict=True)
        ]

    lengths = case.lengths
    for (in_axes, out_axes), actual in zip(plans, compute(operands), strict=True):
        expected = looped(case, stacks, [axis is not None for axis in in_axes], size)
        for a, e, axis, length in zip(actual, expected, out_axes, lengths, strict=True):
            name = f"vmap over {in_axes}, out_axes {out_axes}"
            oracle.assert_close(a, np.moveaxis(e, 0, axis), length, name=name)


def masked(axes, mapped) -> tuple[int | None, ...]:
    return tuple(axis if m else None for axis, m in zip(axes, mapped, strict=True))
