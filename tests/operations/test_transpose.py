"""The transposed convolution: values, derivatives, partition; against lax and a gradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import any_implementation, each_case, random
from comparison import assert_matches_the_oracle, value_and_gradients
from derivatives import assert_equal_derivatives, derivatives, operands
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxprs import convolutions
from meshes import MESH, assert_local, divided, sent
from subsets import SUBSETS, check_subsets, masked
from transposed_cases import (
    TRANSPOSED,
    every_transposed,
    representative_transposed,
)

from grouped_conv_jax import grouped_conv, grouped_conv_input_grad, grouped_conv_transpose


@every_transposed
def test_value_and_gradients_are_those_of_the_oracle(case):
    given = case.random()
    assert_matches_the_oracle(value_and_gradients(case.conv())(*given), case, given)


@representative_transposed
@any_implementation
def test_every_implementation_computes_it(case, implementation):
    given = case.random()
    assert_matches_the_oracle(value_and_gradients(case.conv(implementation))(*given), case, given)


@pytest.mark.usefixtures("x64")
@representative_transposed
@any_implementation
def test_derivatives_are_those_of_lax(case, implementation):
    actual = derivatives(case.conv(implementation))(*operands(case))
    assert_equal_derivatives(actual, derivatives(case.lax_conv())(*operands(case)), case)


@pytest.mark.usefixtures("x64")
@representative_transposed
def test_vmap_is_a_loop(case):
    plans = [(masked((0, 0, 0), mapped), (0, 0, 0)) for mapped in SUBSETS]
    check_subsets(case.conv(), case, plans)


PADDINGS = ["SAME", "VALID", [(3, 1), (0, 2)], [(-1, 2), (1, -1)]]


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("padding", PADDINGS, ids=str)
def test_with_one_group_it_is_that_of_lax(padding, transpose_kernel):
    x = jnp.asarray(random("x", (2, 5, 4, 3), np.float32))
    for strides, taps, dilation in itertools.product(
        [(1, 1), (2, 3)], [(3, 2), (1, 4)], [(1, 1), (2, 1)]
    ):
        w = jnp.asarray(random("w", (*taps, 3, 3), np.float32))
        arguments = (x, w, strides, padding, dilation)
        ours = grouped_conv_transpose(*arguments, transpose_kernel=transpose_kernel)
        theirs = lax.conv_transpose(*arguments, transpose_kernel=transpose_kernel)
        np.testing.assert_allclose(ours, theirs, 1e-5, 1e-5)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_the_layouts_are_those_of_lax(rank):
    x = jnp.asarray(random("x", (2, *range(3, 3 + rank), 2), np.float32))
    w = jnp.asarray(random("w", (*range(1, 1 + rank), 2, 3), np.float32))
    ours = grouped_conv_transpose(x, w, (2,) * rank, "SAME")
    np.testing.assert_allclose(ours, lax.conv_transpose(x, w, (2,) * rank, "SAME"), 1e-5, 1e-5)


def test_it_is_the_gradient_of_the_convolution_with_the_same_kernel():
    w, y = random("w", (6, 2, 3, 2), np.float32), random("y", (2, 6, 4, 3), np.float32)
    gradient = grouped_conv_input_grad(
        (2, 4, 9, 6), w, y, (2, 2), [(0, 1), (1, 0)], feature_group_count=2
    )
    transposed = grouped_conv_transpose(
        y,
        w,
        (2, 2),
        [(2 - 0, 2 - 1), (1 - 1, 1 - 0)],
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
        transpose_kernel=True,
        output_padding=(1, 1),
        feature_group_count=2,
    )
    np.testing.assert_array_equal(gradient, transposed)


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_it_is_one_contraction_and_its_gradients_are_the_other_two(transpose_kernel):
    x, w = jnp.ones((1, 4, 4, 4)), jnp.ones((3, 3, 2, 4))

    def conv(x, w):
        return grouped_conv_transpose(
            x, w, (2, 2), "SAME", feature_group_count=2, transpose_kernel=transpose_kernel
        )

    found = convolutions(lambda *xw: jax.vjp(conv, *xw)[1](conv(*xw)), x, w)
    assert sorted(e.params["contraction"] for e in found) == ["dgrad", "dgrad", "fprop", "wgrad"]


SPREAD = [divided(case) for case in TRANSPOSED if case.representative]


@pytest.mark.parametrize("split", ["batch", "groups", "both"])
@each_case(SPREAD)
def test_batch_and_groups_are_local(case, split):
    assert_local(case, split, None)


def test_rows_on_several_devices_exchange_halos_only():
    (case,) = (case for case in SPREAD if case.name.startswith("NHWC"))
    case = case.__class__("rows", (2, 16, 3, 32), case.rhs, {**case.arguments, "padding": "SAME"})
    rows = P(None, "data")
    found = sent(case, "fprop", MESH, (rows, P(), rows))
    assert {c.kind for c in found} == {"collective-permute"}
    operands_ = case.random()
    placed = [jax.device_put(a, jax.sharding.NamedSharding(MESH, s))
              for a, s in zip(operands_, (rows, P(), rows), strict=True)]  # fmt: skip
    assert_matches_the_oracle(value_and_gradients(case.conv())(*placed), case, operands_)


def test_small_integers_add_up_in_the_preferred_type():
    (case,) = (case for case in TRANSPOSED if case.name == "as PyTorch has it")
    x, w, _ = case.random(np.int8)
    actual = jax.jit(case.conv(preferred_element_type=jnp.int32))(100 // 8 * x, w)
    expected = case.contractions(100 // 8 * x, w, np.zeros(case.out))[0]
    assert actual.dtype == jnp.int32
    assert np.abs(expected).max() > 127, "int8 would do"
    np.testing.assert_array_equal(actual, expected)


@any_implementation
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_wider_result_and_its_gradients(dtype, implementation):
    (case,) = (case for case in TRANSPOSED if case.name == "as PyTorch has it")
    x, w, _ = case.random(jnp.dtype(dtype))
    y = case.random(np.float32)[2]
    conv = case.conv(implementation, preferred_element_type="float32")
    actual = value_and_gradients(conv)(x, w, y)
    assert [a.dtype for a in actual] == [jnp.float32, dtype, dtype]
    assert_matches_the_oracle(actual, case, (x, w, y), accumulator=np.float32)


# On Explicit axes.


@pytest.fixture
def explicit():
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "group"))):
        yield


FEATURES = P("data", None, None, "group")


@pytest.mark.usefixtures("explicit")
@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize(
    ("groups", "lhs", "rhs", "out"),
    [
        (4, P("data"), P(), P("data")),
        (4, FEATURES, P(), FEATURES),
        (4, FEATURES, P(None, None, None, "group"), FEATURES),
        (4, P("data"), P(None, None, None, "group"), FEATURES),
    ],
    ids=str,
)
def test_the_sharding_of_the_result_follows(groups, lhs, rhs, out, transpose_kernel):
    x, w = random("x", (8, 4, 4, 8), np.float32), random("w", (3, 3, 2, 8), np.float32)

    def conv(x, w):
        return grouped_conv_transpose(
            x, w, (2, 2), "SAME", feature_group_count=groups, transpose_kernel=transpose_kernel
        )

    def loss(x, w):
        return jnp.sum(conv(x, w) ** 2)

    placed = jax.device_put(x, lhs), jax.device_put(w, rhs)
    actual = jax.jit(conv)(*placed)
    assert jax.typeof(actual).sharding.spec == P(*out, *[None] * (4 - len(out)))
    np.testing.assert_allclose(actual, conv(x, w), 1e-5, 1e-5)
    for ours, e in zip(
        jax.jit(jax.grad(loss, (0, 1)))(*placed), jax.grad(loss, (0, 1))(x, w), strict=True
    ):
        np.testing.assert_allclose(ours, e, 1e-4, 1e-4)


@pytest.mark.usefixtures("explicit")
def test_what_does_not_follow_can_be_said():
    x = jax.device_put(np.ones((8, 4, 4, 8), np.float32), P(None, None, None, "data"))
    w = jax.device_put(np.ones((3, 3, 8, 6), np.float32), P(None, None, None, "group"))
    with pytest.raises(ValueError, match=r"features of lhs are .* 'data'.*out_sharding=jax\.P"):
        grouped_conv_transpose(x, w, (2, 2), "SAME")
    out = grouped_conv_transpose(x, w, (2, 2), "SAME", out_sharding=P("data"))
    assert jax.typeof(out).sharding.spec[0] == "data"
    ones = jnp.ones((8, 4, 4, 8)), jnp.ones((3, 3, 8, 6))
    np.testing.assert_allclose(out, lax.conv_transpose(*ones, (2, 2), "SAME"), 1e-5)


@pytest.mark.usefixtures("explicit")
def test_of_one_group_outputs_may_be_sharded():
    x = jax.device_put(np.ones((8, 4, 4, 8), np.float32), P("data"))
    w = jax.device_put(np.ones((3, 3, 8, 6), np.float32), P(None, None, None, "group"))
    out = jax.jit(lambda x, w: grouped_conv_transpose(x, w, (2, 2), "SAME"))(x, w)
    assert jax.typeof(out).sharding.spec == FEATURES


# Arguments.

LHS, RHS = np.ones((2, 4, 5, 6), np.float32), np.ones((3, 3, 3, 4), np.float32)
GOOD = {"strides": (2, 2), "padding": "SAME", "feature_group_count": 2}
WRONG = {
    "groups": ({"feature_group_count": 4}, ValueError, ["feature_group_count=4", "lhs (6)"]),
    "groups as a float": ({"feature_group_count": 2.0}, TypeError, ["feature_group_count", "2.0"]),
    "a dense kernel": ({"rhs": np.ones((3, 3, 6, 4), np.float32)}, ValueError, ["rhs takes 6"]),
    "a kernel that is not transposed": (
        {"transpose_kernel": True},
        ValueError,
        ["rhs has 4 output features", "6 features", "transpose_kernel=True"],
    ),
    "strides": ({"strides": (2,)}, ValueError, ["strides", "2 spatial"]),
    "a stride of 0": ({"strides": (0, 1)}, ValueError, ["strides", "(0, 1)"]),
    "an unknown padding": (
        {"padding": "SAME_LOWER"},
        ValueError,
        ["'SAME_LOWER'", "SAME, VALID, CAUSAL, CIRCULAR"],
    ),
    "too few pairs": ({"padding": [(1, 1)]}, ValueError, ["padding", "2 spatial"]),
    "a crop of more than all": (
        {"padding": [(-9, -9), (0, 0)]},
        ValueError,
        ["padding (", "crops more than"],
    ),
    "a negative output padding": (
        {"output_padding": (-1, 0)},
        ValueError,
        ["output_padding", "at least 0", "(-1, 0)"],
    ),
    "an output padding": ({"output_padding": 1}, TypeError, ["output_padding", "sequence"]),
    "dtypes": ({"rhs": RHS.astype(np.float16)}, TypeError, ["float32", "float16", "astype"]),
    "a string as a flag": (
        {"transpose_kernel": "no"},
        TypeError,
        ["transpose_kernel must be True or False", "'no'"],
    ),
    "a sharding of another rank": (
        {"out_sharding": P(None, None, None, None, None)},
        ValueError,
        ["out_sharding", "5 dimensions", "4"],
    ),
    "an unknown implementation": ({"implementation": "cudnn"}, ValueError, ["'cudnn'"]),
    "a rank without a layout": (
        {"lhs": np.ones((1,) * 6, np.float32), "rhs": np.ones((1,) * 6, np.float32)},
        ValueError,
        ["dimension_numbers must be given", "6"],
    ),
    "no array": ({"lhs": [1.0]}, TypeError, ["lhs must be an array", "asarray"]),
    "a narrower result": (
        {"preferred_element_type": jnp.bfloat16},
        TypeError,
        ["preferred_element_type", "narrower"],
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_argument_is_refused(wrong):
    changes, exception, parts = WRONG[wrong]
    arguments = {"lhs": LHS, "rhs": RHS, **GOOD, **changes}
    with pytest.raises(exception) as refusal:
        grouped_conv_transpose(**arguments)
    for part in parts:
        assert part in str(refusal.value)


def test_rows_can_be_symbolic():
    (rows,) = jax.export.symbolic_shape("h")
    conv = jax.jit(lambda x, w: grouped_conv_transpose(x, w, **GOOD))
    shape = jax.ShapeDtypeStruct((2, rows, 5, 6), np.float32)
    program = jax.export.export(conv)(shape, RHS)
    assert program.out_avals[0].shape == (2, 2 * rows, 10, 4)
    x = random("x", LHS.shape, np.float32)
    np.testing.assert_allclose(program.call(x, RHS), conv(x, RHS), 1e-5, 1e-5)


def test_a_convolution_after_it_restores_the_size():
    x = random("x", LHS.shape, np.float32)
    up = grouped_conv_transpose(x, RHS, **GOOD)
    layout = ("NHWC", "HWIO", "NHWC")
    down = grouped_conv(up, np.ones((3, 3, 4, 6), np.float32), (2, 2), "SAME",
                        dimension_numbers=layout)  # fmt: skip
    assert down.shape == x.shape
    assert oracle.out_shape(up.shape, (3, 3, 4, 6), window_strides=(2, 2), padding="SAME",
                            dimension_numbers=layout) == x.shape  # fmt: skip
