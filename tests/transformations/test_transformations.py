"""Derivatives of every kind and order, jit, checkpoint and scan, against lax's and by identities.

In 64 bits, where a wrong derivative and a rounding error cannot be confused.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import (
    CASES,
    Case,
    any_implementation,
    every_case,
    named,
    representative_cases,
)
from derivatives import assert_equal_derivatives, derivatives, operands
from jax.test_util import check_grads
from jaxprs import primitives

pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def lax_derivatives(case: Case):
    return derivatives(case.lax_conv())(*operands(case))


@representative_cases
@any_implementation
def test_derivatives_are_those_of_lax(case, implementation):
    actual = derivatives(case.conv(implementation))(*operands(case))
    assert_equal_derivatives(actual, lax_derivatives(case), case)


@pytest.mark.slow
@every_case
def test_derivatives_are_those_of_lax_in_every_case(case):
    test_derivatives_are_those_of_lax(case, None)


@pytest.mark.parametrize("transform", ["jvp", "vjp", "grad of grad"])
def test_outside_jit_it_is_the_same(transform):
    (case,) = named("NCHW")
    x, w, dx, dw, y = operands(case)
    conv = case.conv()

    def loss(x, w):
        return jnp.sum(jnp.sin(conv(x, w)))

    compute = {
        "jvp": lambda: jax.jvp(conv, (x, w), (dx, dw))[1],
        "vjp": lambda: jax.vjp(conv, x, w)[1](y),
        "grad of grad": lambda: jax.grad(lambda w: jnp.sum(jax.grad(loss)(x, w) ** 2))(w),
    }[transform]
    length = max(case.lengths) ** 3
    pairs = zip(jax.tree.leaves(compute()), jax.tree.leaves(jax.jit(compute)()), strict=True)
    for outside, inside in pairs:
        oracle.assert_close(outside, np.asarray(inside), length)


@any_implementation
def test_third_derivative_is_that_of_lax(implementation):
    (case,) = named("depthwise, multiplier 2")
    x, w, dx, dw, _ = operands(case)

    def third(conv):
        def wave(t):
            return jnp.sum(jnp.sin(conv(x + t * dx, w + t * dw)))

        return jax.jit(jax.grad(jax.grad(jax.grad(wave))))(0.0)

    ours, theirs = third(case.conv(implementation)), third(case.lax_conv())
    np.testing.assert_allclose(ours, theirs, 1e-11)


@representative_cases
@any_implementation
def test_a_perturbation_expands_exactly(case, implementation):
    # Bilinear: the jvp is what is missing but for the product of both perturbations.
    x, w, dx, dw, _ = operands(case)
    conv = case.conv(implementation)

    @jax.jit
    def both_sides():
        value, tangent = jax.jvp(conv, (x, w), (dx, dw))
        return conv(x + dx, w + dw), value + tangent + conv(dx, dw)

    moved, expanded = both_sides()
    length = 16 * case.lengths[0]
    oracle.assert_close(moved, np.asarray(expanded), length)


CHECKED = [
    named("both dilated, strided, cropped, three groups")[0],
    *(pytest.param(c, marks=pytest.mark.slow) for c in named("NHWC", "two batch groups")),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.name)
@any_implementation
def test_derivatives_are_the_limits_of_differences(case, implementation):
    x, w, *_ = operands(case)
    conv = case.conv(implementation)
    f = jax.jit(lambda x, w: jnp.mean(jnp.sin(conv(x, w))))
    check_grads(f, (x, w), order=2, modes=["fwd", "rev"])


@every_case
def test_no_derivative_has_another_convolution_in_it(case):
    conv = case.conv()

    def loss(x, w):
        return jnp.sum(jnp.sin(conv(x, w)))

    def second(x, w):
        return jax.grad(lambda x, w: sum(map(jnp.sum, jax.grad(loss, (0, 1))(x, w))), (0, 1))(x, w)

    x, w, *_ = operands(case)
    found = primitives(second, x, w)
    assert found.count("grouped_conv") >= 6
    assert "conv_general_dilated" not in found
    assert "dot_general" not in found


@pytest.mark.parametrize("operand", [0, 1])
def test_the_gradient_of_one_operand_costs_one_contraction(operand):
    (case,) = named("NCHW")
    x, w, *_ = operands(case)
    gradient = jax.jit(jax.grad(lambda x, w: jnp.sum(case.conv("xla")(x, w)), operand))
    text = gradient.lower(x, w).as_text()
    assert text.count("stablehlo.convolution") == 1


def test_custom_rules_around_it_are_obeyed():
    (case,) = named("NCHW")
    x, w, dx, dw, _ = operands(case)
    conv = case.conv()

    @jax.custom_vjp
    def doubled(x, w):
        return conv(x, w)

    def forward(x, w):
        return jax.vjp(conv, x, w)

    def backward(vjp, y):
        return tuple(2 * g for g in vjp(y))

    doubled.defvjp(forward, backward)
    plain, twice = (
        jax.grad(lambda x, w, f=f: jnp.sum(f(x, w)), (0, 1))(x, w) for f in (conv, doubled)
    )
    for a, b in zip(plain, twice, strict=True):
        np.testing.assert_array_equal(2 * a, b)

    @jax.custom_jvp
    def halved(x, w):
        return conv(x, w)

    @halved.defjvp
    def half_the_tangent(primals, tangents):
        value, tangent = jax.jvp(conv, primals, tangents)
        return value, tangent / 2

    tangents = [jax.jvp(f, (x, w), (dx, dw))[1] for f in (conv, halved)]
    np.testing.assert_array_equal(tangents[0] / 2, tangents[1])


def test_a_hessian_is_that_of_lax():
    (case,) = named("rank 1")
    x, w, *_ = operands(case)
    ours, theirs = (
        jax.jit(jax.hessian(lambda w, f=f: jnp.sum(jnp.sin(f(x, w)))))(w)
        for f in (case.conv(), case.lax_conv())
    )
    length = max(case.lengths) ** 2
    oracle.assert_close(ours, np.asarray(theirs), length)


def test_control_flow_takes_it():
    (case,) = named("one group")
    x, w, *_ = operands(case)

    def compute(conv):
        def choose(flag, x):
            return jax.lax.cond(flag, lambda x: conv(x, w), lambda x: 2 * conv(x, w), x)

        def repeated(x):
            square = w[:3]
            return jax.lax.fori_loop(0, 3, lambda _, x: conv(x, square), x)

        return jax.jit(lambda x: (choose(True, x), choose(False, x), repeated(x)))(x)

    length = max(case.lengths) ** 3
    for a, e in zip(compute(case.conv()), compute(case.lax_conv()), strict=True):
        oracle.assert_close(a, np.asarray(e), length)


def test_the_representative_cases_have_each_kind_of_group():
    chosen = [case for case in CASES if case.representative]
    assert {1, 2, 3, 4} <= {case.groups for case in chosen}
    assert any(case.arguments.get("batch_group_count", 1) > 1 for case in chosen)
