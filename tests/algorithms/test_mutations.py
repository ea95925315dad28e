"""Checks of the checks: a convolution with a mistake in it must not pass the tests of values.

A mutant is put into the table of implementations in the place of the right one; or it is the
oracle, told to do something else, so that many can be compared over many cases without compiling.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, Case, every_implementation, named
from comparison import assert_matches_the_oracle, check_values
from fake_algorithms import algorithm

from grouped_conv_jax import implementations, native
from grouped_conv_jax.algorithms.table import TABLE
from grouped_conv_jax.spec import OPERANDS, Contraction

CONTRACTIONS: tuple[Contraction, ...] = ("fprop", "dgrad", "wgrad")
RESULTS: dict[Contraction, str] = {
    "fprop": "value",
    "dgrad": "gradient of lhs",
    "wgrad": "gradient of rhs",
}
"""What the comparison calls the result of each contraction."""

every_contraction = pytest.mark.parametrize("contraction", CONTRACTIONS)


def refused_for(contraction: Contraction) -> Any:
    """For the result that is wrong, and for its numbers."""
    return pytest.raises(AssertionError, match=rf"{RESULTS[contraction]}[\s\S]*Mismatched elements")


# Mutants in the table. What is traced is a function of its own in each of these tests, so that no
# program compiled before hides a mutant, and none of theirs is met again later.


def rotated(size: int, groups: int) -> np.ndarray:
    return np.roll(np.arange(size), size // groups)


def interleaved(size: int, groups: int) -> np.ndarray:
    return np.arange(size).reshape(-1, groups).T.reshape(-1)


ORDERS = {"rotated": rotated, "interleaved": interleaved}
every_order = pytest.mark.parametrize("order", ORDERS)


def mutate(monkeypatch: pytest.MonkeyPatch, name: str, contraction: Contraction, order: str):
    """The groups of the first operand in another order, in one contraction of one entry."""
    original = TABLE[name]
    right = getattr(original, contraction)

    def wrong(first, second, spec):
        axis = spec.group_dimension(OPERANDS[contraction][0])
        features = ORDERS[order](first.shape[axis], spec.feature_group_count)
        return right(jnp.take(first, features, axis), second, spec)

    monkeypatch.setitem(TABLE, name, algorithm(type(original), **{contraction: wrong}))


# Two groups of two inputs and three outputs.
(GROUPED,) = named("rank 1")


@every_order
@every_contraction
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in ("xla", "native") else pytest.mark.slow)
        for n in implementations()
    ],
)
def test_another_order_of_the_groups_is_refused(name, contraction, order, monkeypatch):
    # A refusal to run would count as a mutant that was found. CI requires the kernels.
    if name == "native" and native.missing():
        pytest.skip(f"there are no native kernels: {native.missing()}")
    mutate(monkeypatch, name, contraction, order)
    with refused_for(contraction):
        check_values(GROUPED, name)


@every_order
@every_contraction
def test_another_order_of_the_groups_in_the_choice_is_refused(contraction, order, monkeypatch):
    for name in implementations():
        mutate(monkeypatch, name, contraction, order)
    with refused_for(contraction):
        check_values(GROUPED, None)


def test_a_mutant_is_met_in_the_table_only(monkeypatch):
    with monkeypatch.context() as patched:
        mutate(patched, "xla", "fprop", "rotated")
        with refused_for("fprop"):
            check_values(GROUPED, "xla")
        check_values(GROUPED, "taps")
    check_values(GROUPED, "xla")


# Mutants of what an implementation does from some size on only, which lived while no case was as
# large: the sizes, and the implementations that do something else there.


def large(name: str, lhs: tuple[int, ...], rhs: tuple[int, ...], groups: int, **more: Any) -> Case:
    return Case(name, lhs, rhs, {"feature_group_count": groups, **more})


SKEWED = {"window_strides": (2, 1), "padding": [(1, 2), (0, 1)]}
LARGE = [
    (large("more groups than are written out", (2, 18, 5, 4), (9, 2, 3, 2), 9, **SKEWED), "dense"),
    (
        large("wide groups", (1, 64, 8, 5), (64, 32, 2, 3), 2, rhs_dilation=(3, 2), **SKEWED),
        "dense",
    ),
    (large("taps that are not looked up", (2, 3, 7, 6), (3, 1, 5, 4), 3, **SKEWED), "taps"),
    (large("examples left over", (11, 4, 3, 2), (6, 2, 2, 1), 2, **SKEWED), "taps"),
    (large("several packed groups", (1, 32, 4, 3), (48, 2, 2, 2), 16, **SKEWED), "packed"),
    (large("groups that fill a tile", (1, 32, 3, 3), (34, 16, 2, 2), 2, **SKEWED), "packed"),
    (
        large(
            "a crop of the gaps",
            (2, 4, 5, 4),
            (4, 2, 2, 2),
            2,
            window_strides=(1, 2),
            padding=[(-1, 3), (-2, 4)],
            lhs_dilation=(2, 3),
        ),
        "xla",
    ),
]


@pytest.mark.parametrize(("case", "implementation"), LARGE, ids=[case.name for case, _ in LARGE])
def test_values_from_some_size_on(case, implementation):
    check_values(case, implementation)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case, _ in LARGE], ids=[case.name for case, _ in LARGE])
@every_implementation
def test_values_from_some_size_on_of_each_implementation(case, implementation):
    check_values(case, implementation)


# Mutants of the oracle.

Operands = list[np.ndarray]
Mutant = Callable[[Case, Operands], Operands]
"""The three results of a case, wrong, from its input, kernel and cotangent."""


def with_arguments(change: Callable[..., dict[str, Any]]) -> Mutant:
    """Those of another convolution. If its output has another size, it is cut or filled."""

    def mutant(case: Case, operands: Operands) -> Operands:
        ones = (1,) * len(spatial(case, "lhs"))
        arguments = {"lhs_dilation": ones, "rhs_dilation": ones, **case.arguments}
        wrong = dataclasses.replace(case, arguments={**arguments, **change(**arguments)})
        x, w, y = operands
        out, *gradients = oracle.contractions(x, w, fitted(y, wrong.out), **wrong.arguments)
        return [fitted(out, case.out), *gradients]

    return mutant


def exchange(first: str, second: str) -> Mutant:
    """One argument for another."""
    return with_arguments(lambda **given: {first: given[second], second: given[first]})


def reverse(name: str) -> Mutant:
    """The spatial dimensions of an argument in another order."""
    return with_arguments(
        lambda **given: {name: given[name] if isinstance(given[name], str) else given[name][::-1]}
    )


def swap_the_sides(padding: Any, **_: Any) -> dict[str, Any]:
    if isinstance(padding, str):
        other = {"SAME": "SAME_LOWER", "SAME_LOWER": "SAME"}
        return {"padding": other.get(padding.upper(), padding)}
    return {"padding": [(high, low) for low, high in padding]}


def with_kernel(change: Callable[[Case, np.ndarray], np.ndarray]) -> Mutant:
    """The kernel is read, and its gradient written, in another order."""

    def mutant(case: Case, operands: Operands) -> Operands:
        x, w, y = operands
        out, dx, dw = oracle.contractions(x, change(case, w), y, **case.arguments)
        return [out, dx, change(case, dw)]

    return mutant


def flip(case: Case, w: np.ndarray) -> np.ndarray:
    return np.flip(w, spatial(case, "rhs"))


def transpose(case: Case, w: np.ndarray) -> np.ndarray:
    """Where a kernel is not square, what does not fit is zero."""
    axes = spatial(case, "rhs")
    return fitted(np.swapaxes(w, axes[0], axes[-1]), w.shape) if axes else w


def round_the_factors(case: Case, operands: Operands) -> Operands:
    """To ten bits, as matrix units round those of 32 bits unless they are told not to."""
    bits = [a.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000) for a in operands]
    return list(oracle.contractions(*(b.view(np.float32) for b in bits), **case.arguments))


def lose_the_last_element(case: Case, operands: Operands) -> Operands:
    results = [a.copy() for a in oracle.contractions(*operands, **case.arguments)]
    for result in results:
        result[(slice(-1, None),) * result.ndim] = 0
    return results


MUTANTS: dict[str, Mutant] = {
    "sides of the padding swapped": with_arguments(swap_the_sides),
    "axes of the padding swapped": reverse("padding"),
    "axes of the strides swapped": reverse("window_strides"),
    "axes of the input's dilation swapped": reverse("lhs_dilation"),
    "axes of the kernel's dilation swapped": reverse("rhs_dilation"),
    "dilations of input and kernel swapped": exchange("lhs_dilation", "rhs_dilation"),
    "strides and the input's dilation swapped": exchange("window_strides", "lhs_dilation"),
    "strides and the kernel's dilation swapped": exchange("window_strides", "rhs_dilation"),
    "taps flipped": with_kernel(flip),
    "taps transposed": with_kernel(transpose),
    "factors of ten bits": round_the_factors,
    "the last element lost": lose_the_last_element,
}

REPRESENTATIVE = [case for case in CASES if case.representative]


@every_contraction
@pytest.mark.parametrize("mutant", MUTANTS)
def test_some_representative_case_refuses_a_mutant(mutant, contraction):
    """Of those that run with every implementation, so that none can make this mistake."""
    assert refusing(MUTANTS[mutant], contraction, REPRESENTATIVE)


def refusing(mutant: Mutant, contraction: Contraction, cases: list[Case]) -> list[str]:
    """The names of the cases that tell the mutant of this contraction from the right one."""
    names = []
    for case in cases:
        operands = case.random()
        results = list(oracle.contractions(*operands, **case.arguments))
        i = CONTRACTIONS.index(contraction)
        results[i] = mutant(case, operands)[i]
        try:
            assert_matches_the_oracle([a.astype(np.float32) for a in results], case, operands)
        except AssertionError:
            names.append(case.name)
    return names


def test_the_oracle_itself_is_refused_by_no_case():
    def right(case, operands):
        return list(oracle.contractions(*operands, **case.arguments))

    for contraction in CONTRACTIONS:
        assert not refusing(right, contraction, CASES)


def spatial(case: Case, role: str) -> tuple[int, ...]:
    return oracle.layouts(len(case.lhs) - 2, **case.arguments)[role][2:]


def fitted(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    filled = np.zeros(shape, x.dtype)
    common = tuple(map(slice, map(min, shape, x.shape)))
    filled[common] = x[common]
    return filled
