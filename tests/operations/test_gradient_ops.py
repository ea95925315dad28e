"""The gradients as operations: those of `jax.vjp`, to any order, on any mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, Case, any_implementation, each_case, every_case, named, random
from comparison import assert_matches_the_oracle
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxprs import convolutions
from meshes import MESH, SPLITS, contraction_of, divided, make_mesh, on_dimensions

from grouped_conv_jax import grouped_conv_input_grad, grouped_conv_kernel_grad
from grouped_conv_jax.collectives import collectives


def gradients(case: Case, implementation: str | None = None, **more: Any) -> Callable[..., Any]:
    """Both, of (x, w, y)."""
    arguments = {**case.arguments, **more, "implementation": implementation}

    def compute(x, w, y):
        return (
            grouped_conv_input_grad(x.shape, w, y, **arguments),
            grouped_conv_kernel_grad(x, w.shape, y, **arguments),
        )

    return compute


@every_case
def test_they_are_those_of_the_oracle(case):
    x, w, y = operands = case.random()
    actual = jax.jit(gradients(case))(x, w, y)
    assert_matches_the_oracle(
        [case.contractions(*operands)[0].astype("f"), *actual], case, operands
    )


@any_implementation
@each_case(named("NHWC", "two batch groups, circular and causal"))
def test_they_are_one_contraction_each(case, implementation):
    found = convolutions(gradients(case, implementation), *case.random())
    assert [e.params["contraction"] for e in found] == ["dgrad", "wgrad"]
    assert {e.params["implementation"] for e in found} == {implementation}


SOME = named("NHWC", "two batch groups", "circular")


@pytest.mark.usefixtures("x64")
@each_case(SOME)
def test_their_derivatives_are_those_of_the_gradients_of_a_convolution(case):
    x, w, y = case.random(np.float64)
    dx, dw, dy = (a[0] for a in case.random(np.float64, stack=(1,)))

    def of_vjp(x, w, y):
        return jax.vjp(case.lax_conv(), x, w)[1](y)

    def second(compute):
        def wave(x, w, y):
            return sum(jnp.sum(jnp.sin(g)) for g in compute(x, w, y))

        def along(x, w, y):
            return jax.jvp(jax.grad(wave, (0, 1, 2)), (x, w, y), (dx, dw, dy))

        stacks = [jnp.stack([a, b]) for a, b in ((x, dx), (w, dw), (y, dy))]
        return compute(x, w, y), along(x, w, y), jax.vmap(compute)(*stacks)

    ours, theirs = (jax.jit(lambda f=f: second(f))() for f in (gradients(case), of_vjp))
    length = max(case.lengths) ** 3
    for a, e in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        oracle.assert_close(a, np.asarray(e), length)


@pytest.mark.parametrize("dtype", ["bfloat16", "complex64", "float64"])
def test_their_dtypes_are_those_of_the_operands(dtype):
    (case,) = named("NHWC")
    with jax.enable_x64(dtype == "float64"):
        operands = case.random(jnp.dtype(dtype))
        actual = jax.jit(gradients(case))(*operands)
        assert [a.dtype for a in actual] == [dtype] * 2
        out = case.contractions(*operands)[0].astype(jnp.dtype(dtype))
        assert_matches_the_oracle([out, *actual], case, operands)


def test_the_cotangent_of_a_wider_result_is_wide():
    (case,) = named("NHWC")
    x, w, _ = case.random(jnp.bfloat16)
    y = case.random(np.float32)[2]
    actual = jax.jit(gradients(case, preferred_element_type="float32"))(x, w, y)
    assert [a.dtype for a in actual] == ["bfloat16"] * 2
    out = case.contractions(x, w, y)[0].astype("f")
    assert_matches_the_oracle([out, *actual], case, (x, w, y), accumulator=np.float32)


# Several devices.


@pytest.mark.parametrize("split", ["both", "batch"])
@each_case([divided(case) for case in named("NHWC", "circular")])
def test_they_are_local_under_jit(case, split):
    axes, batch, features = SPLITS[split]
    mesh, specs = make_mesh(**axes), on_dimensions(case, batch=batch, features=features)
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    operands = case.random()
    placed = jax.device_put(operands, shardings)
    compute = jax.jit(gradients(case), out_shardings=tuple(shardings[:2]))
    sent = collectives(compute.lower(*placed).compile(), mesh)
    assert [(c.kind, c.axes) for c in sent] == [("all-reduce", (batch,))]
    out = case.contractions(*operands)[0].astype("f")
    assert_matches_the_oracle([out, *compute(*placed)], case, operands)


@pytest.mark.parametrize("check_vma", [True, False])
@each_case([divided(case) for case in named("circular")])
def test_inside_shard_map(case, check_vma):
    x, w, y = case.random()
    groups = case.groups // MESH.shape["group"]
    local = Case("local", case.lhs, case.rhs, {**case.arguments, "feature_group_count": groups})
    specs = on_dimensions(case, batch="data", features="group")

    def compute(x, w, y):
        dx, dw = gradients(local)(x, w, y)
        return dx, jax.lax.psum(dw, "data")

    spread = jax.shard_map(
        compute, mesh=MESH, in_specs=tuple(specs), out_specs=tuple(specs[:2]), check_vma=check_vma
    )
    out = case.contractions(x, w, y)[0].astype("f")
    assert_matches_the_oracle([out, *jax.jit(spread)(x, w, y)], case, (x, w, y))


FEATURES, KERNEL = P("data", None, None, "group"), P(None, None, None, "group")


@pytest.fixture
def explicit():
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "group"), (AxisType.Explicit,) * 2)):
        yield


@pytest.mark.usefixtures("explicit")
@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR"])
@pytest.mark.parametrize(
    ("x", "w", "y"),
    [
        (P("data"), P(), P("data")),
        (FEATURES, KERNEL, FEATURES),
        (FEATURES, P(), P("data")),
    ],
    ids=str,
)
def test_on_explicit_axes(x, w, y, padding):
    (case,) = named("NHWC")
    case = divided(case)
    case = Case("explicit", case.lhs, case.rhs, {**case.arguments, "padding": padding})
    operands = case.random()
    placed = map(jax.device_put, operands, (x, w, y))
    dx, dw = jax.jit(gradients(case))(*placed)
    by_groups = "group" in str(x)
    assert jax.typeof(dw).sharding.spec == (KERNEL if by_groups else P(None, None, None, None))
    assert jax.typeof(dx).sharding.spec[0] == "data"
    out = case.contractions(*operands)[0].astype("f")
    assert_matches_the_oracle([out, dx, dw], case, operands)


@pytest.mark.usefixtures("explicit")
@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR"])
def test_an_out_sharding_is_that_of_the_gradient(padding):
    (case,) = named("NHWC")
    case = divided(case)
    case = Case("explicit", case.lhs, case.rhs, {**case.arguments, "padding": padding})
    x, w, y = (jax.device_put(a, P()) for a in case.random())
    dx = grouped_conv_input_grad(x.shape, w, y, **case.arguments, out_sharding=FEATURES)
    dw = grouped_conv_kernel_grad(x, w.shape, y, **case.arguments, out_sharding=KERNEL)
    assert jax.typeof(dx).sharding.spec == FEATURES
    assert jax.typeof(dw).sharding.spec == KERNEL
    out = case.contractions(*map(np.asarray, (x, w, y)))[0].astype("f")
    assert_matches_the_oracle([out, dx, dw], case, [np.asarray(a) for a in (x, w, y)])


@pytest.mark.usefixtures("explicit")
def test_what_does_not_follow_is_refused_with_the_mend():
    w, y = np.ones((4, 4, 8, 8), np.float32), np.ones((4, 4, 4, 8), np.float32)
    arguments = {"window_strides": (1, 1), "padding": "SAME",
                 "dimension_numbers": ("NHWC", "HWIO", "NHWC")}  # fmt: skip
    for rhs, out, message in [
        (P("group"), P(), "rhs is sharded over 'group' within its groups or in its taps"),
        (P(), KERNEL, "features of cotangent are sharded over 'group', 2 devices, which cuts"),
    ]:
        placed = jax.device_put(w, rhs), jax.device_put(y, out)
        with pytest.raises(ValueError, match=message) as error:
            grouped_conv_input_grad((4, 4, 4, 8), *placed, **arguments)
        assert "out_sharding=jax.P(...)" in str(error.value)
        for padding in ("SAME", "CIRCULAR"):
            said = grouped_conv_input_grad(
                (4, 4, 4, 8), *placed, **{**arguments, "padding": padding}, out_sharding=P("data")
            )
            assert jax.typeof(said).sharding.spec[0] == "data"


# Arguments.

X, W = random("x", (2, 4, 5, 5), np.float32), random("w", (6, 2, 3, 3), np.float32)
Y = random("y", (2, 6, 5, 5), np.float32)
GOOD = {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2}
WRONG = {
    "another shape": (
        {"cotangent": Y[:, :, 1:]},
        ValueError,
        ["cotangent", "shape of the output, (2, 6, 5, 5)", "(2, 6, 4, 5)"],
    ),
    "another dtype": (
        {"cotangent": Y.astype(np.float16)},
        TypeError,
        ["cotangent", "float32", "float16", "astype"],
    ),
    "no array": ({"cotangent": 1}, (TypeError, ValueError), ["cotangent"]),
    "groups": ({"feature_group_count": 3}, ValueError, ["feature_group_count=3", "(4)"]),
    "strides": ({"window_strides": (1,)}, ValueError, ["window_strides", "2 spatial"]),
    "an implementation": ({"implementation": "cudnn"}, ValueError, ["'cudnn'"]),
}
SHAPES = {
    "an integer": (4, TypeError, ["_shape must be a sequence", "4"]),
    "a float": ((2, 4, 5, 5.0), TypeError, ["_shape", "5.0"]),
    "an array": (X, TypeError, ["_shape must be a shape, got an array of shape (2, 4, 5, 5)"]),
    "a negative size": ((2, 4, 5, -5), ValueError, ["_shape", "-5"]),
    "too short": ((2, 4, 5), ValueError, ["same number of dimensions", "(2, 4, 5)"]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_argument_is_refused(wrong):
    changes, exception, parts = WRONG[wrong]
    arguments: Any = {"cotangent": Y, **GOOD, **changes}
    for call in (
        lambda: grouped_conv_input_grad(X.shape, W, **arguments),
        lambda: grouped_conv_kernel_grad(X, W.shape, **arguments),
    ):
        with pytest.raises(exception) as refusal:
            call()
        for part in parts:
            assert part in str(refusal.value)


@pytest.mark.parametrize("wrong", SHAPES)
def test_a_wrong_shape_is_refused(wrong):
    shape, exception, parts = SHAPES[wrong]
    for call in (
        lambda: grouped_conv_input_grad(shape, W, Y, **GOOD),  # pyright: ignore
        lambda: grouped_conv_kernel_grad(X, shape, Y, **GOOD),  # pyright: ignore
    ):
        with pytest.raises(exception) as refusal:
            call()
        for part in parts:
            assert part in str(refusal.value)


def test_the_vjp_of_the_convolution_is_the_same():
    for case in CASES[:4]:
        operands = case.random()
        dx, dw = gradients(case)(*operands)
        np.testing.assert_array_equal(dx, contraction_of(case, "dgrad")(*operands))
        np.testing.assert_array_equal(dw, contraction_of(case, "wgrad")(*operands))
