"""Where XLA's partitioner is not told, and what it makes of lax's own convolution."""

import itertools
from collections.abc import Callable

import jax
import numpy as np
import oracle
import pytest
from comparison import assert_matches_the_oracle, value_and_gradients
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import dense, make_mesh

# XLA cannot ask in these programs. Of exported ones it divides what it divides rightly. Under
# partly manual axes each device computes everything.

SHARDINGS = [P(), P("b"), P(None, "b"), P(None, None, None, "b")]


def assert_right_by(way: Callable, groups: int, lhs: P, rhs: P, out: P) -> None:
    mesh = make_mesh(a=4, b=2)
    case = dense("by itself", (2, 8, 4, 8), (3, 3, 8 // groups, 8), groups)
    shardings = [NamedSharding(mesh, spec) for spec in (lhs, rhs, out)]
    operands = case.random()
    placed = tuple(map(jax.device_put, operands, shardings))
    compute = way(mesh, value_and_gradients(case.conv()), placed)
    results = jax.jit(compute, out_shardings=(shardings[2], *shardings[:2]))(*placed)
    assert_matches_the_oracle(results, case, operands)


def exported(mesh, compute, operands):
    return jax.export.export(jax.jit(compute))(*operands).call


def partly_manual(mesh, compute, operands):
    return jax.shard_map(compute, mesh=mesh, in_specs=P(), out_specs=P(), axis_names={"a"})


@pytest.mark.parametrize("way", [exported, partly_manual])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(
    "specs",
    [
        (P("b"), P(None, None, "b"), P(None, "b")),
        (P(None, None, None, "b"), P(), P("b")),
        (P("b"), P(), P("b")),
    ],
    ids=str,
)
def test_xla_by_itself_is_right(way, groups, specs):
    assert_right_by(way, groups, *specs)


@pytest.mark.slow
@pytest.mark.parametrize("way", [exported, partly_manual])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_xla_by_itself_is_right_for_any_sharding(way, groups):
    for lhs, out in itertools.product(SHARDINGS, SHARDINGS):
        for rhs in (P(), P(None, None, "b"), P(None, None, None, "b")):
            assert_right_by(way, groups, lhs, rhs, out)


# What lax does.


@pytest.mark.parametrize("sizes", [(4, 2), (2, 4)], ids=str)
def test_laxs_own_kernel_gradient_is_multiplied(sizes):
    """A bug of XLA's partitioner that this library is free of: if this fails, it is mended, and
    the README and the comments that mention it can be.
    """
    mesh = make_mesh(data=sizes[0], other=sizes[1])
    case = dense("lax", (8, 5, 6, 8), (3, 2, 2, 12), groups=4)
    x, w, y = case.random()
    batched = NamedSharding(mesh, P("data"))
    placed = jax.device_put((x, w, y), (batched, NamedSharding(mesh, P()), batched))
    expected = oracle.kernel_gradient(x, y, w.shape, **case.arguments)
    length = case.lengths[2]
    _, _, theirs = value_and_gradients(case.lax_conv())(*placed)
    _, _, ours = value_and_gradients(case.conv())(*placed)
    oracle.assert_close(ours, expected, length)
    oracle.assert_close(theirs, sizes[1] * expected, sizes[1] * length)


def test_laxs_own_forward_convolution_is_wrong_for_some_shardings():
    """As above: if this fails, it is mended."""
    mesh = make_mesh(a=4, b=2)
    case = dense("lax", (2, 8, 4, 8), (3, 3, 8, 8))
    x, w, _ = case.random()
    batch, inputs, rows = (
        NamedSharding(mesh, spec) for spec in (P("b"), P(None, None, "b"), P(None, "b"))
    )
    placed = jax.device_put((x, w), (batch, inputs))
    ours, theirs = (
        jax.jit(conv, out_shardings=rows)(*placed) for conv in (case.conv(), case.lax_conv())
    )
    expected = oracle.forward(x, w, **case.arguments)
    oracle.assert_close(ours, expected, case.lengths[0])
    assert np.abs(theirs - expected).max() > 1
