"""Locally connected layers: against the oracle's convolution at each position, and lax's own."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, NHWC, Case, each_case, named, random
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxprs import equations

from grouped_conv_jax import count_multiply_adds, grouped_conv
from grouped_conv_jax.collectives import collectives
from grouped_conv_jax.operations.local import grouped_conv_local


def layouts(case: Case) -> dict[str, tuple[int, ...]]:
    return oracle.layouts(len(case.lhs) - 2, **case.arguments)


def taps(case: Case) -> tuple[int, ...]:
    return tuple(case.rhs[d] for d in layouts(case)["rhs"][2:])


def kernels_shape(case: Case) -> tuple[int, ...]:
    inputs, *spatial = layouts(case)["rhs"][1:]
    shape = list(case.rhs)
    shape[inputs] *= math.prod(taps(case))
    for d, source in zip(spatial, layouts(case)["out"][2:], strict=True):
        shape[d] = case.out[source]
    return tuple(shape)


def random_operands(case: Case, dtype: Any = np.float32) -> list[np.ndarray]:
    """An input, the kernels and an output cotangent."""
    shapes = case.lhs, kernels_shape(case), case.out
    return [random(f"local {case.name} {i}", shape, dtype) for i, shape in enumerate(shapes)]


def local(case: Case, **more: Any):
    return lambda x, w: grouped_conv_local(
        x, w, filter_shape=taps(case), **{**case.arguments, **more}
    )


# The oracle: a whole convolution with each position's kernel, of which that position counts.


def each_position(case: Case, w: np.ndarray) -> Iterator[tuple[tuple, tuple, np.ndarray]]:
    """Each position's index in the output and in `w`, and its kernel."""
    outputs, inputs, *spatial = layouts(case)["rhs"]
    positions = layouts(case)["out"][2:]
    for position in np.ndindex(*(case.out[d] for d in positions)):
        in_out: list[Any] = [slice(None)] * len(case.out)
        in_w: list[Any] = [slice(None)] * w.ndim
        for at, d, e in zip(position, positions, spatial, strict=True):
            in_out[d], in_w[e] = at, at
        kernel = w[tuple(in_w)]
        kernel = kernel if outputs < inputs else kernel.T
        kernel = kernel.reshape(case.rhs[outputs], case.rhs[inputs], *taps(case))
        yield tuple(in_out), tuple(in_w), np.transpose(kernel, np.argsort(layouts(case)["rhs"]))


def contractions(case: Case, x: np.ndarray, w: np.ndarray, y: np.ndarray):
    out = np.zeros(case.out, np.result_type(x, np.float64))
    dx, dw = np.zeros(x.shape, out.dtype), np.zeros(w.shape, out.dtype)
    outputs, inputs, *_ = layouts(case)["rhs"]
    for in_out, in_w, kernel in each_position(case, w):
        out[in_out] = oracle.forward(x, kernel, **case.arguments)[in_out]
        here = np.zeros(y.shape, out.dtype)
        here[in_out] = y[in_out]
        dx += oracle.input_gradient(here, kernel, x.shape, **case.arguments)
        gradient = oracle.kernel_gradient(x, here, kernel.shape, **case.arguments)
        gradient = np.transpose(gradient, layouts(case)["rhs"])
        gradient = gradient.reshape(gradient.shape[0], math.prod(gradient.shape[1:]))
        dw[in_w] = gradient if outputs < inputs else gradient.T
    return out, dx, dw


def value_and_gradients(function):
    def compute(x, w, y):
        out, vjp = jax.vjp(function, x, w)
        return out, *vjp(y)

    return jax.jit(compute)


def assert_matches_the_oracle(actual, case: Case, operands) -> None:
    expected = contractions(case, *operands)
    length = max(oracle.lengths(*case.shapes, **case.arguments))
    for name, a, e in zip(("value", "dx", "dw"), actual, expected, strict=True):
        oracle.assert_close(a, e, length, name=name)


GROUPED = [case for case in CASES if "batch_group_count" not in case.arguments]
CHOSEN = named(
    "rank 0",
    "rank 1",
    "spatial letters in three orders",
    "both dilated, strided, cropped, three groups",
    "depthwise, multiplier 3",
    "kernel larger than the input",
    "no outputs",
)


@each_case(CHOSEN)
def test_value_and_gradients_are_those_of_the_oracle(case):
    operands = random_operands(case)
    assert_matches_the_oracle(value_and_gradients(local(case))(*operands), case, operands)


@pytest.mark.slow
@each_case(GROUPED)
def test_value_and_gradients_are_right_in_every_case(case):
    test_value_and_gradients_are_those_of_the_oracle(case)


@each_case(named("rank 1", "spatial letters in three orders", "depthwise, multiplier 3"))
def test_one_kernel_everywhere_is_a_grouped_convolution(case):
    x, w, _ = case.random()
    outputs, inputs, *spatial = layouts(case)["rhs"]
    flat = np.transpose(w, layouts(case)["rhs"]).reshape(w.shape[outputs], -1)
    flat = flat if outputs < inputs else flat.T
    everywhere = np.broadcast_to(np.expand_dims(flat, sorted(spatial)), kernels_shape(case))
    actual = jax.jit(local(case))(x, everywhere)
    oracle.assert_close(actual, oracle.forward(x, w, **case.arguments), 64)


def one_group(case: Case) -> Case:
    rhs = list(case.rhs)
    rhs[layouts(case)["rhs"][1]] *= case.groups
    return Case(case.name, case.lhs, tuple(rhs), {**case.arguments, "feature_group_count": 1})


ONE_GROUP = named("NHWC", "spatial letters in three orders")


def lax_local(case: Case):
    rest = {k: v for k, v in case.arguments.items() if k != "feature_group_count"}
    return lambda x, w: lax.conv_general_dilated_local(x, w, filter_shape=taps(case), **rest)


@each_case([one_group(case) for case in ONE_GROUP])
def test_with_one_group_it_is_that_of_lax(case):
    operands = random_operands(case)
    actual, expected = (value_and_gradients(f(case))(*operands) for f in (local, lax_local))
    for a, e in zip(actual, expected, strict=True):
        oracle.assert_close(a, np.asarray(e), 64)


@pytest.mark.slow
@each_case([one_group(case) for case in named("rank 3", "CNHW to NHCW")])
def test_it_is_that_of_lax_in_more_layouts(case):
    test_with_one_group_it_is_that_of_lax(case)


def test_arguments_by_position_are_those_of_lax():
    case = one_group(named("NHWC")[0])
    x, w, _ = random_operands(case)
    a = case.arguments
    given = (a["window_strides"], a["padding"], taps(case), (1, 1), (1, 2), NHWC, "highest")
    actual, expected = (
        jax.eval_shape(lambda x, w, f=f: f(x, w, *given), x, w[:, :-1])
        for f in (grouped_conv_local, lax.conv_general_dilated_local)
    )
    assert actual == expected


@pytest.mark.parametrize(
    "padding",
    [
        pytest.param("CIRCULAR", marks=pytest.mark.slow),
        pytest.param("CAUSAL", marks=pytest.mark.slow),
        ["REPLICATE", ("REFLECT", (1, 1))],
    ],
    ids=str,
)
def test_every_padding_of_grouped_conv(padding):
    x = random("padding", (2, 4, 5, 6), np.float32)
    w = random("kernel", (6, 2, 3, 3), np.float32)
    everywhere = np.broadcast_to(w.reshape(6, 18, 1, 1), (6, 18, 5, 6))
    more: dict[str, Any] = {"feature_group_count": 2}
    actual = grouped_conv_local(x, everywhere, (1, 1), padding, (3, 3), **more)
    expected = grouped_conv(x, w, (1, 1), padding, **more)
    oracle.assert_close(actual, np.asarray(expected, np.float64), 64)


# Dtypes.


@pytest.mark.parametrize(
    "dtype",
    [
        "bfloat16",
        pytest.param("float16", marks=pytest.mark.slow),
        pytest.param("complex64", marks=pytest.mark.slow),
        "float64",
    ],
)
def test_dtypes(dtype):
    (case,) = named("NHWC")
    with jax.enable_x64(dtype == "float64"):
        operands = random_operands(case, jnp.dtype(dtype))
        actual = value_and_gradients(local(case))(*operands)
        assert [a.dtype for a in actual] == [dtype] * 3
        assert_matches_the_oracle(actual, case, operands)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_16_bit_floats_accumulate_in_32_bits(dtype):
    # In 16 bits a sum of ones stops growing at 256 (bfloat16) or 2048 (float16): here they have
    # 4096 inputs; 4096 examples; and 64 outputs at each of 64 positions.
    @jax.jit
    def gradients(x, w):
        out, vjp = jax.vjp(lambda x, w: grouped_conv_local(x, w, (1, 1), "SAME", x.shape[2:]), x, w)
        return out, *vjp(jnp.ones_like(out))

    shapes = [
        ((1, 4096, 1, 1), (1, 4096, 1, 1)),
        ((1, 1, 8, 8), (64, 64, 8, 8)),
        ((4096, 1, 1, 1), (1, 1, 1, 1)),
    ]
    for longest, (lhs, rhs) in enumerate(shapes):
        actual = gradients(jnp.ones(lhs, dtype), jnp.ones(rhs, dtype))
        assert [a.dtype for a in actual] == [dtype] * 3
        assert float(jnp.max(actual[longest])) == 4096


def test_small_integers_add_up_in_the_preferred_type():
    (case,) = named("NCHW")
    x, w, y = random_operands(case, np.int8)
    actual = local(case, preferred_element_type=np.int32)(x, w)
    assert actual.dtype == np.int32
    expected, *_ = contractions(case, x, w, y)
    assert np.abs(expected).max() > 127, "int8 would do"
    np.testing.assert_array_equal(actual, expected)


def test_precision_reaches_all_products():
    (case,) = named("NCHW")
    function = value_and_gradients(local(case, precision="highest"))
    jaxpr = jax.make_jaxpr(function)(*random_operands(case))
    found = [e.params["precision"] for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    assert found == [(lax.Precision.HIGHEST, lax.Precision.HIGHEST)] * 3


def test_its_multiply_adds_are_those_of_the_convolution():
    (case,) = named("NCHW")
    x, w, _ = random_operands(case)
    assert count_multiply_adds(local(case), x, w) == count_multiply_adds(
        case.conv(), *case.random()[:2]
    )


# Transformations.


SHARDED = Case(
    "sharded",
    (8, 6, 5, 8),
    (3, 2, 2, 12),
    {
        "window_strides": (1, 1),
        "padding": "SAME",
        "dimension_numbers": NHWC,
        "feature_group_count": 4,
    },
)
LAST = P(None, None, None, "group")


@pytest.mark.parametrize(
    ("spec", "kernel", "summed"),
    [
        pytest.param(P("data"), P(), ["all-reduce"], marks=pytest.mark.slow),
        pytest.param(LAST, LAST, [], marks=pytest.mark.slow),
        (P("data", None, None, "group"), LAST, ["all-reduce"]),
    ],
    ids=["batch", "groups", "both"],
)
def test_only_the_gradient_of_the_kernels_is_summed_over_devices(spec, kernel, summed):
    mesh = jax.make_mesh((4, 2), ("data", "group"), (AxisType.Auto,) * 2)
    operands = random_operands(SHARDED)
    shardings = [NamedSharding(mesh, s) for s in (spec, kernel, spec)]
    placed = list(map(jax.device_put, operands, shardings))
    forward = jax.jit(local(SHARDED)).lower(*placed[:2]).compile()
    assert collectives(forward, mesh) == []
    compute = jax.jit(
        value_and_gradients(local(SHARDED)), out_shardings=tuple(shardings[i] for i in (2, 0, 1))
    )
    found = collectives(compute.lower(*placed).compile(), mesh)
    assert [c.kind for c in found] == summed
    assert_matches_the_oracle(compute(*placed), SHARDED, operands)


def test_explicit_axes_of_the_result_follow_from_those_of_the_operands():
    operands = random_operands(SHARDED)
    both = P("data", None, None, "group")
    mesh = jax.make_mesh((4, 2), ("data", "group"), (AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, s) for a, s in zip(operands, (both, LAST, both), strict=True)]
        actual = value_and_gradients(local(SHARDED))(*placed)
        specs = [jax.typeof(a).sharding.spec for a in actual]
        assert specs == [both, both, LAST]
    assert_matches_the_oracle(actual, SHARDED, operands)


def test_the_sharding_of_the_result_can_be_asked_for():
    x, w, y = random_operands(SHARDED)
    mesh = jax.make_mesh((4, 2), ("data", "group"), (AxisType.Explicit,) * 2)
    # By positions, as the kernels.
    rows, asked = P("group"), P("data", "group", None, None)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, s) for a, s in zip((x, w, y), (P(), rows, asked), strict=True)]
        with pytest.raises(ValueError, match=r"rhs is sharded over 'group'.*out_sharding=jax.P"):
            local(SHARDED)(*placed[:2])
        actual = value_and_gradients(local(SHARDED, out_sharding=asked))(*placed)
        assert jax.typeof(actual[0]).sharding.spec == asked
        assert jax.typeof(actual[2]).sharding.spec == P("group", None, None, None)
        with pytest.raises(ValueError, match="5 dimensions"):
            local(SHARDED, out_sharding=P(*asked, None))(*placed[:2])
    assert_matches_the_oracle(actual, SHARDED, (x, w, y))


# Arguments.

WRONG = {
    "another spatial shape": (
        {"rhs": np.ones((6, 18, 5, 4), np.float32)},
        ValueError,
        ["rhs must have the shape (6, 18, 5, 5)", "(5, 5)", "got (6, 18, 5, 4)"],
    ),
    "taps left out": (
        {"rhs": np.ones((6, 2, 5, 5), np.float32)},
        ValueError,
        ["(6, 18, 5, 5)", "2 input features per group times 9 taps", "got (6, 2, 5, 5)"],
    ),
    "a dense kernel": (
        {"rhs": np.ones((6, 36, 5, 5), np.float32)},
        ValueError,
        ["(6, 18, 5, 5)", "got (6, 36, 5, 5)"],
    ),
    "groups and inputs": ({"feature_group_count": 3}, ValueError, ["=3", "lhs (4)", "1, 2, 4"]),
    "groups and outputs": (
        {"rhs": np.ones((5, 18, 5, 5), np.float32)},
        ValueError,
        ["feature_group_count=2", "output features of rhs (5)"],
    ),
    "groups as a float": ({"feature_group_count": 2.0}, TypeError, ["integer", "2.0"]),
    "no groups": ({"feature_group_count": 0}, ValueError, ["at least 1", "0"]),
    "taps": ({"filter_shape": (3,)}, ValueError, ["filter_shape", "2 spatial", "got 1"]),
    "dtypes": (
        {"rhs": np.ones((6, 18, 5, 5), np.float16)},
        TypeError,
        ["same dtype", "float32", "float16"],
    ),
    "ranks": ({"rhs": np.ones((6, 18, 5), np.float32)}, ValueError, ["number of dimensions"]),
    "padding": ({"padding": "FULL"}, ValueError, ["padding", "'FULL'"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused(name):
    wrong, error, parts = WRONG[name]
    good = {
        "lhs": np.ones((2, 4, 5, 5), np.float32),
        "rhs": np.ones((6, 18, 5, 5), np.float32),
        "window_strides": (1, 1),
        "padding": "SAME",
        "filter_shape": (3, 3),
        "feature_group_count": 2,
    }
    assert grouped_conv_local(**good).shape == (2, 6, 5, 5)
    with pytest.raises(error) as caught:
        grouped_conv_local(**{**good, **wrong})
    for part in parts:
        assert part in str(caught.value)
