"""Comparisons of outputs and gradients with the oracle."""

import jax
import oracle
from cases import Case


def value_and_gradients(conv):
    """Of (x, w, y): the output, and the gradients for the output's cotangent y; in one program."""

    def compute(x, w, y):
        out, vjp = jax.vjp(conv, x, w)
        return out, *vjp(y)

    return jax.jit(compute)


def assert_matches_the_oracle(actual, case: Case, operands, accumulator=None) -> None:
    expected = case.contractions(*operands)
    lengths = case.lengths
    names = ("value", "gradient of lhs", "gradient of rhs")
    for name, a, e, length in zip(names, actual, expected, lengths, strict=True):
        oracle.assert_close(a, e, length, accumulator=accumulator, name=name)


def check_values(case: Case, implementation: str | None) -> None:
    """Compares the output and both gradients of a case with those of the oracle."""
    operands = case.random()
    actual = value_and_gradients(case.conv(implementation))(*operands)
    assert_matches_the_oracle(actual, case, operands)
