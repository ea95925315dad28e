"""Values and both gradients against the oracle, for every case, implementation and dtype."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import (
    CASES,
    Case,
    any_implementation,
    each_case,
    every_case,
    every_implementation,
    named,
    random,
    representative_cases,
)
from comparison import assert_matches_the_oracle, check_values, value_and_gradients
from jax import lax

from grouped_conv_jax import grouped_conv, grouped_conv_input_grad, grouped_conv_kernel_grad


@representative_cases
@every_implementation
def test_value_and_gradients_are_those_of_the_oracle(case, implementation):
    check_values(case, implementation)


@every_case
def test_value_and_gradients_of_the_choice_are_those_of_the_oracle(case):
    check_values(case, None)


@pytest.mark.slow
@every_case
@every_implementation
def test_value_and_gradients_in_every_case_are_those_of_the_oracle(case, implementation):
    check_values(case, implementation)


@every_case
def test_the_oracle_is_one_trilinear_form(case):
    x, w, y = case.random(np.float64)
    out, dx, dw = oracle.contractions(x, w, y, **case.arguments)
    form = np.vdot(out, y)
    np.testing.assert_allclose([np.vdot(x, dx), np.vdot(w, dw)], [form, form], 1e-12, 1e-12)


def test_the_oracle_knows_a_convolution_done_by_hand():
    x = np.array([[[1, 2, 3, 4], [5, 6, 7, 8]]])
    w = np.array([[[1, 10]], [[100, 1000]]])
    arguments = {"window_strides": (2,), "padding": [(1, 0)], "feature_group_count": 2}
    # Padded to 0 1 2 3 4 and 0 5 6 7 8; windows at 0 and 2.
    out = oracle.forward(x, w, **arguments)
    np.testing.assert_array_equal(out, [[[10, 32], [5000, 7600]]])
    dw = oracle.kernel_gradient(x, np.array([[[1, 2], [3, 4]]]), w.shape, **arguments)
    np.testing.assert_array_equal(dw, [[[4, 7]], [[24, 43]]])
    dx = oracle.input_gradient(np.array([[[1, 2], [3, 4]]]), w, x.shape, **arguments)
    np.testing.assert_array_equal(dx, [[[10, 2, 20, 0], [3000, 400, 4000, 0]]])


GROUPED = [c for c in CASES if c.groups > 1 and 0 not in (*c.lhs, *c.rhs, *c.out)]
GROUPED = [c for c in GROUPED if c.name != "cropped to nothing"]  # All of it is zero.


def several_features(case: Case) -> bool:
    """Or else the interleaved order of the groups is the right one."""
    features = oracle.layouts(len(case.lhs) - 2, **case.arguments)["lhs"][1]
    return case.lhs[features] > case.groups


ORDERS = [(case, "rotated") for case in GROUPED]
ORDERS += [(case, "interleaved") for case in GROUPED if several_features(case)]


@pytest.mark.parametrize(
    ("case", "order"), ORDERS, ids=[f"{c.name}-{order}" for c, order in ORDERS]
)
def test_another_order_of_the_groups_would_not_pass(case, order):
    x, w, y = operands = case.random()
    features = oracle.layouts(x.ndim - 2, **case.arguments)["lhs"][1]
    size = x.shape[features]
    permuted = {
        "rotated": np.roll(np.arange(size), size // case.groups),
        "interleaved": np.arange(size).reshape(-1, case.groups).T.reshape(-1),
    }[order]
    wrong = oracle.contractions(np.take(x, permuted, features), w, y, **case.arguments)
    with pytest.raises(AssertionError, match=r"value[\s\S]*Mismatched elements"):
        assert_matches_the_oracle([a.astype(x.dtype) for a in wrong], case, operands)


DTYPE_CASES = named("NCHW", "depthwise, multiplier 2", "two batch groups")


@each_case(DTYPE_CASES)
@any_implementation
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64", "float64", "complex128"])
def test_dtypes(case, implementation, dtype):
    with jax.enable_x64(dtype in ("float64", "complex128")):
        operands = case.random(jnp.dtype(dtype))
        actual = value_and_gradients(case.conv(implementation))(*operands)
        assert [a.dtype for a in actual] == [dtype] * 3
        assert_matches_the_oracle(actual, case, operands)


@each_case(DTYPE_CASES)
@any_implementation
def test_small_integers_add_up_in_the_preferred_type(case, implementation):
    x, w, _ = case.random(np.int8)
    actual = jax.jit(case.conv(implementation, preferred_element_type=jnp.int32))(x, w)
    assert actual.dtype == jnp.int32
    expected = oracle.forward(x, w, **case.arguments)
    assert np.abs(expected).max() > 127, "int8 would do"
    np.testing.assert_array_equal(actual, expected)


@each_case(DTYPE_CASES[:2])
@any_implementation
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [("int8", "int32"), ("uint8", "int32"), ("int32", "int32"), ("int16", "int16")],
)
def test_integers_in_all_three_contractions(case, implementation, dtype, wide):
    x, w, _ = (abs(a).astype(dtype) for a in case.random(np.int32))
    y = case.random(np.int32)[2].astype(wide)
    arguments = {
        **case.arguments,
        "preferred_element_type": wide,
        "implementation": implementation,
    }
    actual = [
        case.conv(implementation, preferred_element_type=wide)(x, w),
        grouped_conv_input_grad(x.shape, w, y, **arguments),
        grouped_conv_kernel_grad(x, w.shape, y, **arguments),
    ]
    for a, e, t in zip(actual, case.contractions(x, w, y), (wide, dtype, dtype), strict=True):
        assert a.dtype == t
        # They wrap around, as NumPy's do.
        np.testing.assert_array_equal(a, e.astype(np.int64).astype(t))


@each_case(DTYPE_CASES[:2])
@any_implementation
@pytest.mark.parametrize("wide", ["float32", "bfloat16", None])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_floats_of_8_bits(case, implementation, dtype, wide):
    x, w, _ = case.random(jnp.dtype(dtype))
    y = case.random(jnp.dtype(wide or dtype))[2]
    actual = value_and_gradients(case.conv(implementation, preferred_element_type=wide))(x, w, y)
    assert [a.dtype for a in actual] == [wide or dtype, dtype, dtype]
    assert_matches_the_oracle(actual, case, (x, w, y), accumulator=np.float32)


@each_case(DTYPE_CASES)
@any_implementation
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_have_the_dtypes_of_their_operands(case, implementation, dtype):
    x, w, _ = case.random(jnp.dtype(dtype))
    y = case.random(np.float32)[2]
    conv = case.conv(implementation, preferred_element_type="float32")
    actual = value_and_gradients(conv)(x, w, y)
    assert [a.dtype for a in actual] == [jnp.float32, dtype, dtype]
    assert_matches_the_oracle(actual, case, (x, w, y), accumulator=np.float32)


@every_implementation
def test_gradients_of_a_preferred_type_of_64_bits(implementation):
    (case,) = named("NHWC")
    with jax.enable_x64(True):
        x, w, _ = case.random(np.float32)
        y = case.random(np.float64)[2]
        conv = case.conv(implementation, preferred_element_type="float64")
        actual = value_and_gradients(conv)(x, w, y)
        assert [a.dtype for a in actual] == ["float64", "float32", "float32"]
        assert_matches_the_oracle(actual, case, (x, w, y))


LONG = 8192


@every_implementation
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("result", "lhs", "rhs"),
    [
        (0, (1, 2 * LONG, 1), (2, LONG, 1)),
        (1, (1, 2, 1), (2 * LONG, 1, 1)),
        (2, (1, 2, LONG), (2, 1, 1)),
        (2, (LONG, 2, 1), (2, 1, 1)),
    ],
    ids=["value", "gradient of lhs", "gradient of rhs", "gradient of rhs over the batch"],
)
def test_16_bit_floats_accumulate_in_32_bits(dtype, implementation, result, lhs, rhs):
    # In 16 bits a sum of ones stops growing at 256 (bfloat16) or 2048 (float16).
    case = Case(
        "ones", lhs, rhs, {"window_strides": (1,), "padding": "SAME", "feature_group_count": 2}
    )
    ones = [jnp.ones(shape, dtype) for shape in case.shapes]
    actual = value_and_gradients(case.conv(implementation))(*ones)[result]
    np.testing.assert_array_equal(np.asarray(actual, np.float32), LONG)


@every_implementation
def test_floats_of_8_bits_accumulate_in_more(implementation):
    # In 8 bits a sum of ones stops growing at 16.
    case = Case(
        "ones", (1, 512, 1), (2, 256, 1),
        {"window_strides": (1,), "padding": "SAME", "feature_group_count": 2},
    )  # fmt: skip
    out = jax.jit(case.conv(implementation))(
        *(jnp.ones(s, "float8_e4m3fn") for s in case.shapes[:2])
    )
    np.testing.assert_array_equal(np.asarray(out, np.float32), 256)


@pytest.mark.parametrize("dtype", ["bool", "int32", "uint8"])
def test_integers_and_booleans_give_what_lax_gives(dtype):
    (case,) = named("one group")
    x, w = (random(name, case.shapes[i], np.int32) for i, name in enumerate("xw"))
    x, w = (jnp.asarray(a).astype(dtype) for a in (x, w))
    actual, expected = case.conv("xla")(x, w), case.lax_conv()(x, w)
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("weak", [(True, True), (True, False), (False, True)])
def test_weak_types_are_those_of_lax(weak):
    (case,) = named("one group")
    weakly = [jnp.broadcast_to(jnp.asarray(2.0), shape) for shape in (case.lhs, case.rhs)]
    assert all(jax.typeof(a).weak_type for a in weakly)
    operands = [a if w else a.astype(jnp.float32) for a, w in zip(weakly, weak, strict=True)]
    ours, theirs = (jax.eval_shape(conv, *operands) for conv in (case.conv(), case.lax_conv()))
    assert ours == theirs


PRECISIONS = {
    "name": ("highest", "[HIGHEST, HIGHEST]"),
    "enum": (lax.Precision.HIGH, "[HIGH, HIGH]"),
    "pair of names": (("highest", "default"), "[HIGHEST, DEFAULT]"),
    "pair of enums": ((lax.Precision.DEFAULT, lax.Precision.HIGH), "[DEFAULT, HIGH]"),
    "list": (["highest", "highest"], "[HIGHEST, HIGHEST]"),
    "alias": ("tensorfloat32", "[HIGH, HIGH]"),
    "none": (None, "[DEFAULT, DEFAULT]"),
}


def precisions(lowered: jax.stages.Lowered) -> list[str]:
    """The precisions of the convolutions and of the matrix products in a program."""
    text = re.sub(r"#stablehlo<precision (\w+)>", r"\1", lowered.as_text())
    return re.findall(r"(?:precision_config|precision) = (\[\w+, \w+\])", text)


# The others do multiply-adds, which have no precision to choose.
@pytest.mark.parametrize("implementation", ["xla", "vmap", "dense", "patches", "packed"])
@pytest.mark.parametrize("form", PRECISIONS)
def test_precision_reaches_all_three_contractions(form, implementation):
    (case,) = named("NCHW")
    precision, expected = PRECISIONS[form]
    conv = case.conv(implementation, precision=precision)
    found = precisions(value_and_gradients(conv).lower(*case.random()))
    assert len(found) >= 3
    assert set(found) == {expected}


@every_implementation
def test_a_precision_of_dot_algorithms_is_taken_as_lax_takes_it(implementation):
    (case,) = named("NCHW")
    x, w, _ = operands = case.random()
    algorithm = lax.DotAlgorithmPreset.F32_F32_F32
    actual = value_and_gradients(case.conv(implementation, precision=algorithm))(*operands)
    assert_matches_the_oracle(actual, case, operands)
    np.testing.assert_array_equal(actual[0].shape, case.lax_conv(precision=algorithm)(x, w).shape)


@pytest.mark.parametrize("precision", ["F16_F16_F32", lax.DotAlgorithmPreset.BF16_BF16_F32])
def test_a_dot_algorithm_is_refused_by_what_has_none(precision):
    (case,) = named("NCHW")
    x, w, _ = case.random()
    for name in ("taps", "patches"):
        with pytest.raises(NotImplementedError, match=f"'{name}'.*no such algorithm.*16"):
            case.conv(name, precision=precision)(x, w)
    np.testing.assert_allclose(
        case.conv(precision=precision)(x, w), case.lax_conv(precision=precision)(x, w), 1e-5, 1e-5
    )


def test_the_default_precision_is_that_of_the_trace():
    (case,) = named("NCHW")
    with jax.default_matmul_precision("highest"):
        traced = value_and_gradients(case.conv("xla")).trace(*case.random())
    assert precisions(traced.lower()) == ["[HIGHEST, HIGHEST]"] * 3
    elsewhere = value_and_gradients(case.conv("xla")).lower(*case.random())
    assert precisions(elsewhere) == ["[DEFAULT, DEFAULT]"] * 3


def test_an_explicit_precision_goes_before_the_default():
    (case,) = named("NCHW")
    with jax.default_matmul_precision("highest"):
        lowered = value_and_gradients(case.conv("xla", precision="high")).lower(*case.random())
    assert precisions(lowered) == ["[HIGH, HIGH]"] * 3


def test_outside_jit_the_default_precision_is_read_at_each_call():
    (case,) = named("NCHW")
    x, w, _ = case.random()
    plain = jax.make_jaxpr(case.conv())(x, w)
    with jax.default_matmul_precision("highest"):
        highest = jax.make_jaxpr(case.conv())(x, w)
    specs = [jaxpr.eqns[-1].params["spec"] for jaxpr in (plain, highest)]
    assert [spec.precision for spec in specs] == [None, "highest"]


def test_numpy_operands_give_a_jax_array():
    (case,) = named("NHWC")
    x, w, _ = case.random()
    assert isinstance(grouped_conv(x, w, **case.arguments), jax.Array)


# XLA:CPU ends the process while it compiles these as they are, in lax as well.
STRIDED_AND_DILATED = Case(
    "strided and dilated",
    (2, 4, 4, 5),
    (4, 2, 2, 3),
    {
        "window_strides": (2, 1),
        "padding": [(1, 1), (0, 0)],
        "rhs_dilation": (1, 2),
        "feature_group_count": 2,
    },
)


@every_implementation
@pytest.mark.usefixtures("x64")
def test_strides_and_dilations_in_64_bits(implementation):
    operands = STRIDED_AND_DILATED.random(np.float64)
    actual = value_and_gradients(STRIDED_AND_DILATED.conv(implementation))(*operands)
    assert_matches_the_oracle(actual, STRIDED_AND_DILATED, operands)
