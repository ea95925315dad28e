"""Patches: against the oracle's convolution with a kernel of ones, and that data is only moved."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, NHWC, Case, each_case, named, random
from jax import export, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxprs import primitives

from grouped_conv_jax.collectives import collectives
from grouped_conv_jax.operations.patches import grouped_conv_patches


def patches_of(case: Case) -> Case:
    """The convolution that takes patches: a group for each feature, an output for each tap."""
    layouts = oracle.layouts(len(case.lhs) - 2, **case.arguments)
    features = case.lhs[layouts["lhs"][1]]
    rhs = list(case.rhs)
    outputs, inputs, *spatial = layouts["rhs"]
    rhs[outputs], rhs[inputs] = features * math.prod(case.rhs[d] for d in spatial), 1
    arguments = {**case.arguments, "feature_group_count": features}
    return Case(case.name, case.lhs, tuple(rhs), arguments)


def taps(case: Case) -> tuple[int, ...]:
    layout = oracle.layouts(len(case.lhs) - 2, **case.arguments)["rhs"]
    return tuple(case.rhs[d] for d in layout[2:])


def arguments(case: Case) -> dict[str, Any]:
    rest = {k: v for k, v in case.arguments.items() if k != "feature_group_count"}
    return {"filter_shape": taps(case), **rest}


def ones(case: Case) -> np.ndarray:
    """The kernel that sees one tap of one feature for each output."""
    layout = oracle.layouts(len(case.lhs) - 2, **case.arguments)["rhs"]
    count = math.prod(taps(case))
    eye = np.tile(np.eye(count), (case.groups, 1)).reshape(-1, 1, *taps(case))
    return np.transpose(eye, np.argsort(layout))


def value_and_gradient(case: Case):
    def compute(x, y):
        out, vjp = jax.vjp(lambda x: grouped_conv_patches(x, **arguments(case)), x)
        return out, *vjp(y)

    return jax.jit(compute)


PATCHES = [
    case for case in CASES if "batch_group_count" not in case.arguments and case.name != "no inputs"
]
CHOSEN = named(
    "rank 0",
    "rank 3",
    "spatial letters in three orders",
    "both dilated, strided, cropped, three groups",
    "strides that do not reach the last rows",
    "kernel larger than the input",
    "no rows, padded",
)


@each_case([patches_of(case) for case in CHOSEN])
def test_value_and_gradient_are_those_of_the_oracle(case):
    x, _, y = case.random()
    out, gradient = value_and_gradient(case)(x, y)
    np.testing.assert_array_equal(out, oracle.forward(x, ones(case), **case.arguments))
    expected = oracle.input_gradient(y, ones(case), x.shape, **case.arguments)
    oracle.assert_close(gradient, expected, math.prod(taps(case)))


@pytest.mark.slow
@each_case([patches_of(case) for case in PATCHES])
def test_value_and_gradient_are_right_in_every_case(case):
    test_value_and_gradient_are_those_of_the_oracle(case)


@each_case([patches_of(case) for case in named("rank 0, outputs before inputs", "CNHW to NHCW")])
def test_they_are_those_of_lax(case):
    x, *_ = case.random()
    actual = grouped_conv_patches(x, **arguments(case))
    expected = jax.jit(lambda x: lax.conv_general_dilated_patches(x, **arguments(case)))(x)
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.slow
@each_case([patches_of(case) for case in named("rank 3, features last", "SAME_LOWER")])
def test_they_are_those_of_lax_in_more_layouts(case):
    test_they_are_those_of_lax(case)


def test_no_features_give_none():
    assert grouped_conv_patches(jnp.ones((2, 0, 5)), (3,), (1,), "SAME").shape == (2, 0, 5)


@pytest.mark.parametrize(
    ("padding", "mode", "widths"),
    [
        ("CIRCULAR", "wrap", (1, 1)),
        ("reflect", "reflect", (1, 1)),
        ([("REPLICATE", (0, 3))], "edge", (0, 3)),
        ("CAUSAL", "constant", (2, 0)),
    ],
)
def test_every_padding_of_grouped_conv(padding, mode, widths):
    x = random("padding", (2, 3, 6), np.float32)
    padded = np.pad(x, ((0, 0), (0, 0), widths), mode=mode)
    actual = grouped_conv_patches(x, (3,), (1,), padding)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 3, axis=2)
    expected = np.moveaxis(windows, 3, 2).reshape(2, 9, -1)
    np.testing.assert_array_equal(actual, expected)


def test_the_patches_of_a_group_are_a_block():
    (case,) = named("three groups, 6 to 9 features")
    x, w, _ = case.random(np.float64)
    patches = np.asarray(grouped_conv_patches(x, **arguments(patches_of(case))), np.float64)
    n, _, *positions = patches.shape
    blocks = patches.reshape(n, case.groups, -1, *positions)
    kernels = w.reshape(case.groups, -1, blocks.shape[2])
    out = np.einsum("ngi...,goi->ngo...", blocks, kernels).reshape(case.out)
    oracle.assert_close(out.astype(np.float32), oracle.forward(x, w, **case.arguments), 18)


# Data is moved, and nothing is computed.


def test_there_is_no_product_in_it():
    x = jnp.ones((2, 5, 6, 4))

    def loss(x):
        return jnp.sum(grouped_conv_patches(x, (3, 2), (1, 1), "SAME", dimension_numbers=NHWC))

    found = primitives(jax.grad(loss), x)
    assert not {"grouped_conv", "conv_general_dilated", "dot_general", "mul"} & set(found)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_what_is_not_finite_stays_where_it_is(dtype):
    x = np.ones((1, 2, 5), np.float32)
    x[0, 0, 2], x[0, 1, 3] = np.inf, np.nan
    out = np.asarray(grouped_conv_patches(x.astype(dtype), (2,), (1,), "SAME"), np.float32)
    # Features: (first, at the position), (first, after it), and those of the second.
    np.testing.assert_array_equal(np.argwhere(np.isinf(out)), [[0, 0, 2], [0, 1, 1]])
    np.testing.assert_array_equal(np.argwhere(np.isnan(out)), [[0, 2, 3], [0, 3, 2]])
    assert set(out[np.isfinite(out)]) == {0, 1}


@pytest.mark.parametrize(
    "dtype",
    [
        "bfloat16",
        "complex64",
        "uint32",
        *[
            pytest.param(dtype, marks=pytest.mark.slow)
            for dtype in ("float16", "float8_e4m3fn", "int8", "uint8", "int32")
        ],
    ],
)
def test_every_dtype_is_exact(dtype):
    dtype = jnp.dtype(dtype)
    (case,) = named("both dilated, strided, cropped, three groups")
    case = patches_of(case)
    x = case.random(np.complex64 if dtype.kind == "c" else np.float32)[0]
    if dtype.kind in "iu":
        # Numbers that float32 does not have.
        x = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, x.shape, dtype)
    x = x.astype(dtype)
    wide = np.complex128 if dtype.kind == "c" else np.float64
    actual = grouped_conv_patches(x, **arguments(case))
    assert actual.dtype == dtype
    expected = oracle.forward(x.astype(wide), ones(case), **case.arguments)
    np.testing.assert_array_equal(np.asarray(actual).astype(wide), expected)


def test_the_preferred_type_is_that_of_the_result():
    x = random("preferred", (1, 2, 5), np.int8)
    out = grouped_conv_patches(x, (2,), (1,), "VALID", preferred_element_type=np.int32)
    assert out.dtype == np.int32
    np.testing.assert_array_equal(out, grouped_conv_patches(x, (2,), (1,), "VALID"))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_the_gradient_adds_16_bit_floats_up_in_32_bits(dtype):
    # In 16 bits a sum of ones stops growing at 256 (bfloat16) or 2048 (float16).
    def total(x):
        out = grouped_conv_patches(x, (8,) * 4, (1,) * 4, "SAME")
        return jnp.sum(out, dtype=jnp.float32)

    gradient = jax.jit(jax.grad(total))(jnp.ones((1, 1, 8, 8, 8, 8), dtype))
    assert gradient.dtype == dtype
    # The element that the windows at all positions see.
    assert float(jnp.max(gradient)) == 8**4


# Transformations.


@pytest.mark.parametrize(
    ("padding", "strides"),
    [
        ("VALID", (2, 2)),
        ("SAME", (1, 1)),
        pytest.param("VALID", (1, 1), marks=pytest.mark.slow),
        pytest.param("SAME", (2, 2), marks=pytest.mark.slow),
    ],
)
def test_an_exported_program_takes_any_rows_and_columns(padding, strides):
    def compute(x):
        def patches(x):
            return grouped_conv_patches(
                x, (3, 2), strides, padding, rhs_dilation=(1, 2), dimension_numbers=NHWC
            )

        out, vjp = jax.vjp(patches, x)
        return out, vjp(jnp.ones_like(out))[0]

    shape = export.symbolic_shape("b, h, w, 2")
    program = export.export(jax.jit(compute))(jax.ShapeDtypeStruct(shape, np.float32))
    # With fewer rows or columns than the window has, there are no patches without padding.
    for shape in [(2, 7, 6, 2), (1, 3, 9, 2), (1, 2, 1, 2)]:
        x = random("symbolic", shape, np.float32)
        layout = {"window_strides": strides, "padding": padding, "dimension_numbers": NHWC}
        rest = {**layout, "rhs_dilation": (1, 2), "feature_group_count": 2}
        case = Case("symbolic", shape, (3, 2, 1, 12), rest)
        out, gradient = program.call(x)
        np.testing.assert_array_equal(out, oracle.forward(x, ones(case), **rest))
        expected = oracle.input_gradient(np.ones(out.shape), ones(case), shape, **rest)
        np.testing.assert_array_equal(gradient, expected)


# Sharding.


def make_mesh(kind: AxisType) -> Mesh:
    return jax.make_mesh((4, 2), ("data", "group"), (kind,) * 2)


@pytest.mark.parametrize(
    "spec", [P("data"), P(None, None, None, "group"), P("data", None, None, "group")], ids=str
)
def test_nothing_is_sent_where_batch_or_features_are_sharded(spec):
    mesh = make_mesh(AxisType.Auto)
    lhs = (8, 7, 6, 4)
    more = {"window_strides": (2, 1), "padding": "SAME", "dimension_numbers": NHWC}
    case = Case("sharded", lhs, (3, 2, 1, 24), {**more, "feature_group_count": 4})
    x, _, y = case.random()
    sharded = NamedSharding(mesh, spec)
    placed = [jax.device_put(a, sharded) for a in (x, y)]
    compute = value_and_gradient(case)
    program = compute.lower(*placed).compile()
    assert collectives(program, mesh) == []
    out, gradient = compute(*placed)
    assert out.sharding.is_equivalent_to(sharded, 4)
    assert gradient.sharding.is_equivalent_to(sharded, 4)
    np.testing.assert_array_equal(out, oracle.forward(x, ones(case), **case.arguments))


@pytest.mark.parametrize("spec", [P("data"), P("data", None, None, "group")], ids=str)
def test_explicit_axes_of_the_result_are_those_of_the_input(spec):
    x = random("explicit", (8, 7, 6, 4), np.float32)
    with jax.set_mesh(make_mesh(AxisType.Explicit)):
        placed = jax.device_put(x, spec)

        @jax.jit
        def compute(x):
            out, vjp = jax.vjp(
                lambda x: grouped_conv_patches(x, (3, 2), (1, 1), "SAME", dimension_numbers=NHWC),
                x,
            )
            return out, vjp(out)[0]

        out, gradient = compute(placed)
        assert jax.typeof(out).sharding.spec == P(*spec, *[None] * (4 - len(spec)))
        assert jax.typeof(gradient).sharding == jax.typeof(placed).sharding
    for actual, expected in zip((out, gradient), compute(x), strict=True):
        np.testing.assert_allclose(actual, expected, 1e-6, 1e-6)


# Arguments.

WRONG = {
    "no spatial dimensions": ({"filter_shape": ()}, ValueError, ["filter_shape", "2 spatial"]),
    "a number": ({"filter_shape": 3}, TypeError, ["filter_shape", "sequence", "3"]),
    "no taps": ({"filter_shape": (3, 0)}, ValueError, ["filter_shape", "at least 1", "(3, 0)"]),
    "floats": ({"filter_shape": (3, 2.0)}, TypeError, ["filter_shape", "integers", "2.0"]),
    "strides": ({"window_strides": (1,)}, ValueError, ["window_strides", "2 spatial"]),
    "padding": ({"padding": "FULL"}, ValueError, ["'FULL'", "SAME", "CIRCULAR"]),
    "layout": ({"dimension_numbers": ("NCH", "OIH", "NCH")}, TypeError, ["dimension_numbers"]),
    "a vector": (
        {"lhs": np.ones(3, np.float32), "filter_shape": ()},
        ValueError,
        ["lhs must have at least 2 dimensions", "(3,)"],
    ),
    "a number as lhs": ({"lhs": np.float32(1)}, ValueError, ["lhs must have at least 2", "()"]),
    "a list": ({"lhs": [[1.0]]}, TypeError, ["lhs", "array", "list"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused(name):
    wrong, error, parts = WRONG[name]
    good = {
        "lhs": np.ones((2, 4, 5, 5), np.float32),
        "filter_shape": (3, 3),
        "window_strides": (1, 1),
        "padding": "SAME",
    }
    with pytest.raises(error) as caught:
        grouped_conv_patches(**{**good, **wrong})
    for part in parts:
        assert part in str(caught.value)
