"""vmap of each contraction against a loop over the oracle, and what it makes of the shapes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import (
    any_implementation,
    every_case,
    named,
    representative_cases,
)
from jaxprs import convolutions, primitives
from subsets import SUBSETS, check_subsets, contractions, looped, masked, stacked

pytestmark = pytest.mark.usefixtures("x64")


@representative_cases
@any_implementation
def test_vmap_over_any_operands_is_a_loop(case, implementation):
    # One axis of each array after another, so that each of them is mapped somewhere.
    axes = len(case.lhs) + 1
    plans = [
        (
            masked([(i + shift) % axes for shift in range(3)], mapped),
            tuple((i + shift) % axes for shift in (2, 4, 1)),
        )
        for i, mapped in enumerate(SUBSETS)
    ]
    check_subsets(case.conv(implementation), case, plans)


@pytest.mark.slow
@every_case
def test_vmap_over_every_axis_is_a_loop(case):
    for axis in range(len(case.lhs) + 1):
        plans = [(masked((axis,) * 3, mapped), (axis,) * 3) for mapped in SUBSETS]
        check_subsets(case.conv(), case, plans)


def test_a_negative_axis_counts_from_the_end():
    (case,) = named("NHWC")
    check_subsets(case.conv(), case, [((-1, -2, -3), (-1, -2, -3))])


@representative_cases
@any_implementation
def test_nested_vmap_is_a_nested_loop(case, implementation):
    x, w, y = stacked(case, 2)
    inner = jax.vmap(contractions(case.conv(implementation)), (0, None, 0))
    outer = jax.jit(jax.vmap(inner, (None, 0, None)))
    actual = outer(x, w, y)
    expected = [
        np.stack(arrays)
        for arrays in zip(
            *(looped(case, (x, wi[None], y), (True, False, True), 2) for wi in w), strict=True
        )
    ]
    lengths = case.lengths
    for a, e, length in zip(actual, expected, lengths, strict=True):
        oracle.assert_close(a, e, length)


@representative_cases
@any_implementation
def test_gradients_through_vmap_and_within(case, implementation):
    x, w, _ = stacked(case, 3)
    kernel = w[0]
    conv = case.conv(implementation)

    def loss(x, w):
        return jnp.sum(jnp.sin(conv(x, w)))

    @jax.jit
    def compute(x, w, dx, dw):
        per_example = jax.vmap(jax.grad(loss, (0, 1)), (0, None))(x, w)
        of_all = jax.grad(lambda x, w: jnp.sum(jax.vmap(loss, (0, None))(x, w)), (0, 1))(x, w)
        tangents = jax.vmap(
            lambda x, dx: jax.jvp(conv, (x, w), (dx, dw))[1],
        )(x, dx)
        return per_example, of_all, tangents

    per_example, of_all, tangents = compute(x, kernel, x[::-1], w[1])
    outs = [oracle.forward(xi, kernel, **case.arguments) for xi in x]
    dx, dw = (
        np.stack(arrays)
        for arrays in zip(
            *(
                oracle.contractions(xi, kernel, np.cos(out), **case.arguments)[1:]
                for xi, out in zip(x, outs, strict=True)
            ),
            strict=True,
        )
    )
    # The cosine passes on the error of the value.
    length = math.prod(sorted(case.lengths)[1:])
    oracle.assert_close(per_example[0], dx, length, name="per example, lhs")
    oracle.assert_close(per_example[1], dw, length, name="per example, rhs")
    oracle.assert_close(of_all[0], dx, length, name="of all, lhs")
    oracle.assert_close(of_all[1], dw.sum(0), 3 * length, name="of all, rhs")
    expected = [
        oracle.forward(dxi, kernel, **case.arguments) + oracle.forward(xi, w[1], **case.arguments)
        for xi, dxi in zip(x, x[::-1], strict=True)
    ]
    oracle.assert_close(tangents, np.stack(expected), length, name="jvp")


@any_implementation
def test_second_derivatives_of_a_vmap_are_those_of_lax(implementation):
    (case,) = named("NHWC")
    x, w, _ = stacked(case, 2)

    def second(conv):
        def loss(x, w):
            return jnp.sum(jnp.sin(jax.vmap(conv)(x, w)))

        def norm(x, w):
            return sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(x, w))

        return jax.jit(jax.grad(norm, (0, 1)))(x, w)

    length = max(case.lengths) ** 3
    for a, e in zip(second(case.conv(implementation)), second(case.lax_conv()), strict=True):
        oracle.assert_close(a, np.asarray(e), length)


@pytest.mark.parametrize("name", ["NCHW", "two batch groups", "no examples"])
@any_implementation
def test_vmap_of_one_example_is_a_loop(name, implementation):
    (case,) = named(name)
    plans = [(masked((0, 0, 0), mapped), (0, 0, 0)) for mapped in SUBSETS]
    check_subsets(case.conv(implementation), case, plans, size=1)


@pytest.mark.parametrize("name", ["NCHW", "two batch groups", "no examples"])
@any_implementation
def test_vmap_of_no_examples_is_empty(name, implementation):
    (case,) = named(name)
    for mapped in SUBSETS:
        operands = [
            np.ones((0, *shape) if m else shape)
            for shape, m in zip(case.shapes, mapped, strict=True)
        ]
        compute = jax.vmap(contractions(case.conv(implementation)), masked((0, 0, 0), mapped))
        assert [a.shape for a in jax.jit(compute)(*operands)] == [
            (0, *case.shapes[i]) for i in (2, 0, 1)
        ]


# The letters of the trilinear form: lhs [N, (G C)], rhs [(G O), C], out [N, (G O)]. What the
# mapped operands and the result share is the letter that grows.
LETTERS: dict[str, str] = {"lhs": "NGC", "rhs": "GOC", "out": "NGO"}
OPERANDS = {"fprop": ("lhs", "rhs"), "dgrad": ("out", "rhs"), "wgrad": ("lhs", "out")}
GROWS = {
    ("fprop", "lhs"): "N",
    ("fprop", "rhs"): "O",
    ("fprop", "both"): "G",
    ("dgrad", "out"): "N",
    ("dgrad", "rhs"): "C",
    ("dgrad", "both"): "G",
    ("wgrad", "lhs"): "C",
    ("wgrad", "out"): "O",
    ("wgrad", "both"): "G",
}


@pytest.mark.parametrize(("contraction", "mapped"), GROWS)
@pytest.mark.parametrize("name", ["NCHW", "NHWC", "two batch groups"])
def test_only_the_letter_that_the_mapped_arrays_share_grows(contraction, mapped, name):
    (case,) = named(name)
    conv = case.conv()

    def dgrad(y, w):
        return jax.linear_transpose(lambda x: conv(x, w), jax.ShapeDtypeStruct(case.lhs, y.dtype))(
            y
        )[0]

    def wgrad(x, y):
        return jax.linear_transpose(lambda w: conv(x, w), jax.ShapeDtypeStruct(case.rhs, y.dtype))(
            y
        )[0]

    compute = {"fprop": conv, "dgrad": dgrad, "wgrad": wgrad}[contraction]
    roles = OPERANDS[contraction]
    in_axes = tuple(0 if mapped in (role, "both") else None for role in roles)
    shapes: dict[str, tuple[int, ...]] = dict(zip(("lhs", "rhs", "out"), case.shapes, strict=True))
    size = 3
    operands = [
        jnp.ones(shapes[role] if axis is None else (size, *shapes[role]))
        for role, axis in zip(roles, in_axes, strict=True)
    ]
    (plain,) = convolutions(
        compute, *(a if axis is None else a[0] for a, axis in zip(operands, in_axes, strict=True))
    )
    (batched,) = convolutions(jax.vmap(compute, in_axes), *operands)
    grown = GROWS[contraction, mapped]
    for role, before, after in zip(roles, plain.invars, batched.invars, strict=True):
        factor = size if grown in LETTERS[role] else 1
        assert after.aval.size == factor * before.aval.size
    groups = [e.params["spec"].merged().feature_group_count for e in (plain, batched)]
    assert groups[1] == groups[0] * (size if grown == "G" else 1)
    assert batched.params["contraction"] == contraction
    assert "broadcast_in_dim" not in primitives(jax.vmap(compute, in_axes), *operands)


def test_mapped_kernels_make_more_outputs_of_the_same_groups():
    (case,) = named("NCHW")
    kernels = jnp.ones((3, *case.rhs))
    (equation,) = convolutions(jax.vmap(case.conv(), (None, 0)), jnp.ones(case.lhs), kernels)
    assert [v.aval.shape for v in equation.invars] == [(2, 4, 7, 6), (3, 6, 2, 3, 2)]
    merged = equation.params["spec"].merged()
    assert (merged.lhs_shape, merged.rhs_shape) == ((2, 4, 7, 6), (3 * 6, 2, 3, 2))
    assert merged.feature_group_count == 2


def test_a_named_axis_of_vmap_reduces_gradients():
    (case,) = named("NCHW")
    x, w, _ = stacked(case, 3)

    def mean_gradient(x, w):
        return jax.lax.pmean(jax.grad(lambda w: jnp.sum(case.conv()(x, w)))(w), "examples")

    actual = jax.vmap(mean_gradient, (0, None), axis_name="examples")(x, w[0])
    ones = np.ones(case.out)
    each = [oracle.kernel_gradient(xi, ones, case.rhs, **case.arguments) for xi in x]
    length = 3 * case.lengths[2]
    oracle.assert_close(actual, np.stack([np.mean(each, 0)] * 3), length)
