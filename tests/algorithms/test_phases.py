"""The reads of phases, against the definition, one result at a time."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from grouped_conv_jax.algorithms.phases import Dimension, each_phase, each_read, interleave, padded

DIMENSIONS = [
    Dimension(operand, results, taps, stride, dilation, gaps, low)
    for operand, results, taps, stride, dilation, gaps, low in itertools.product(
        (1, 5), (1, 7), (1, 3), (1, 2, 3), (-2, 1, 2), (1, 2, 3), (-1, 0, 4)
    )
]


def defined(d: Dimension, result: int, tap: int) -> int | None:
    """Which element is read, if it is one and not in a gap."""
    at = result * d.stride + tap * d.dilation - d.low
    return at // d.gaps if at % d.gaps == 0 else None


@pytest.mark.parametrize("gaps", [1, 2, 3])
def test_each_result_is_in_one_phase_and_reads_what_the_definition_says(gaps):
    for d in (d for d in DIMENSIONS if d.gaps == gaps):
        found: dict[int, dict[int, int]] = {}
        for phase in d.phases():
            for m in range(phase.count):
                result = phase.residue + m * phase.period
                assert result not in found
                found[result] = {r.tap: r.positions()[m] for r in phase.reads}
        expected = {
            q: {t: at for t in range(d.taps) if (at := defined(d, q, t)) is not None}
            for q in range(d.results)
        }
        assert found == expected, d


def test_padding_reaches_as_far_as_is_read_and_the_phases_interleave():
    rows, columns = Dimension(5, 9, 3, 1, -1, 2, -1), Dimension(4, 6, 3, 1, 1, 1, 1)
    x = np.arange(1.0, 21.0, dtype=np.float32).reshape(1, 5, 4, 1)
    filled, before = padded(jnp.asarray(x), [rows, columns])
    parts = []
    for phases in each_phase([rows, columns]):
        part = np.zeros((1, *(p.count for p in phases), 1), np.float32)
        for reads in each_read(phases):
            cut = [r.within(low) for r, low in zip(reads, before, strict=True)]
            part += filled[(slice(None), *cut)]
        parts.append(part)
    actual = interleave(parts, [rows, columns])
    expected = np.zeros((1, 9, 6, 1))
    for q, p, i, j in itertools.product(range(9), range(6), range(3), range(3)):
        row, column = defined(rows, q, i), defined(columns, p, j)
        if row is not None and column is not None and 0 <= row < 5 and 0 <= column < 4:
            expected[0, q, p, 0] += x[0, row, column, 0]
    np.testing.assert_array_equal(actual, expected)
