"""Movements of the parts of an array from one sharding to another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import listed, make_mesh, random_spec

from grouped_conv_jax.partitioning.resharding import MeshAxes, divides_evenly, steps

SIZES = {"a": 2, "b": 2, "c": 2}


def kinds(has: MeshAxes, needs: MeshAxes) -> list[str]:
    return [step.kind for step in steps(has, needs)]


def drawn(draw: np.random.Generator) -> tuple[MeshAxes, MeshAxes]:
    mesh = make_mesh(**SIZES)
    has, needs = (tuple(map(listed, random_spec((8, 8, 8), mesh, draw))) for _ in range(2))
    return has, needs


def test_what_can_be_sliced_is_sliced_before_anything_is_gathered():
    has, needs = (("a",), ()), ((), ("b",))
    assert kinds(has, needs) == ["slice", "gather"]
    assert kinds(needs, needs) == []


def test_axes_that_change_dimensions_are_exchanged_together():
    assert kinds((("a", "b"), ()), ((), ("a", "b"))) == ["exchange"]
    assert kinds((("a", "b"), ()), (("a",), ("b",))) == ["exchange"]


def test_an_axis_under_another_one_is_made_minor_first():
    assert kinds((("a", "b"), ()), (("b",), ("a",))) == ["permute", "exchange"]
    assert kinds((("a", "b"), ()), (("b",), ())) == ["permute", "gather"]
    assert kinds((("b",), ()), (("a", "b"), ())) == ["slice", "permute"]


@pytest.mark.parametrize("seed", range(3))
def test_any_way_ends_where_it_must_and_gathers_last(seed):
    draw = np.random.default_rng(seed)
    for _ in range(200):
        has, needs = drawn(draw)
        path = steps(has, needs)
        order = ["slice", "exchange", "gather"]
        names = [step.kind for step in path if step.kind != "permute"]
        assert names == sorted(names, key=order.index)
        for step in path:
            has = step.after(has)
        assert has == needs


def test_uneven_parts():
    assert divides_evenly((("a",), ()), ((), ("b",)), (2, 4), SIZES)
    assert not divides_evenly((("a",), ()), ((), ("b",)), (2, 3), SIZES)
    # Between the two steps this dimension has four parts.
    assert not divides_evenly((("a",),), (("b",),), (2,), SIZES)


@pytest.mark.parametrize("seed", range(4))
def test_the_parts_are_those_of_the_array(seed):
    draw = np.random.default_rng(seed)
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), (AxisType.Auto,) * 3)
    x = jnp.arange(512).reshape(8, 8, 8)
    for _ in range(4):
        pairs = [drawn(draw) for _ in range(8)]

        @jax.jit
        def all_moved(x, pairs=tuple(pairs)):
            return [
                jax.shard_map(
                    functools.partial(moved, path=steps(has, needs)),
                    mesh=mesh,
                    in_specs=P(*has),
                    out_specs=P(*needs),
                    check_vma=False,
                )(x)
                for has, needs in pairs
            ]

        for actual in all_moved(x):
            np.testing.assert_array_equal(actual, x)


def moved(x, path):
    for step in path:
        x = step.apply(x, SIZES)
    return x
