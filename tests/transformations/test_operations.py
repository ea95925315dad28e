"""The relatives of the convolution under `jax.vmap` and in derivatives of the second order.

Each operation does the same whatever arrays it gets, so one form of each stands for all.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random
from exported import OPERATIONS

each_operation = pytest.mark.parametrize("name", OPERATIONS)


@each_operation
def test_vmap_over_any_operands_is_a_loop(name):
    operation, arrays = OPERATIONS[name]
    stacks = [random(f"stack {i}", (3, *x.shape), x.dtype) for i, x in enumerate(arrays)]
    mapped_or_not = itertools.product([0, -1, None], [0, None], [0, None])
    for axes in {choice[: len(arrays)] for choice in mapped_or_not} - {(None,) * len(arrays)}:
        given = [
            s[0] if axis is None else np.moveaxis(s, 0, axis)
            for s, axis in zip(stacks, axes, strict=True)
        ]
        outs = jax.jit(jax.vmap(operation, axes))(*given)
        for i in range(3):
            each = [s[0 if axis is None else i] for s, axis in zip(stacks, axes, strict=True)]
            expected = operation(*each)
            for a, e in zip(jax.tree.leaves(outs), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a[i], e, 1e-4, 1e-4)


@pytest.mark.usefixtures("x64")
@each_operation
def test_derivatives_of_two_orders_are_the_limits_of_differences(name):
    operation, arrays = OPERATIONS[name]
    at = [np.asarray(x, np.float64) for x in arrays]
    along = [random(f"direction {i}", x.shape, np.float64) for i, x in enumerate(arrays)]
    step = 1e-5

    def loss(*arrays):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(operation(*arrays)))

    gradient = jax.grad(loss, range(len(at)))

    def slope(*arrays):
        return sum(jnp.vdot(g, d) for g, d in zip(gradient(*arrays), along, strict=True))

    @jax.jit
    def compute(*arrays):
        tangent = jax.jvp(gradient, arrays, tuple(along))[1]
        return (
            loss(*arrays),
            slope(*arrays),
            gradient(*arrays),
            tangent,
            jax.grad(slope, range(len(arrays)))(*arrays),
        )

    _, slope_here, _, forward, reverse = compute(*at)
    (above, _, g_above, *_), (below, _, g_below, *_) = (
        compute(*(x + sign * step * d for x, d in zip(at, along, strict=True))) for sign in (1, -1)
    )
    np.testing.assert_allclose((above - below) / (2 * step), slope_here, 1e-6, 1e-6)
    for up, down, f, r in zip(g_above, g_below, forward, reverse, strict=True):
        np.testing.assert_allclose((up - down) / (2 * step), f, 1e-6, 1e-6)
        np.testing.assert_allclose(r, f, 1e-9, 1e-9)


@each_operation
def test_the_same_shapes_are_traced_once(name):
    operation, arrays = OPERATIONS[name]
    traces = itertools.count()

    @jax.jit
    def compute(*arrays):
        next(traces)
        return operation(*arrays)

    for _ in range(3):
        compute(*arrays)
    assert next(traces) == 1
