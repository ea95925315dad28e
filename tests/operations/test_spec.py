"""`ConvSpec`: shapes, costs, folding, and that it is a value."""

import functools
import itertools
import pickle
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import NHWC, Case, each_case, every_case, named
from jaxprs import convolutions

from grouped_conv_jax.spec import ConvSpec, Factor, Role


def spec_of(case: Case, **more) -> ConvSpec:
    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in (case.lhs, case.rhs)]
    (equation,) = convolutions(case.conv(**more), *shapes)
    return equation.params["spec"]


@every_case
def test_out_shape_is_that_of_lax(case):
    operands = [jax.ShapeDtypeStruct(shape, np.float32) for shape in (case.lhs, case.rhs)]
    theirs = jax.eval_shape(case.lax_conv(), *operands)
    assert jax.eval_shape(case.conv(), *operands) == theirs
    assert spec_of(case).out_shape == theirs.shape == case.out


def layer(name, lhs, rhs, strides, padding, groups) -> Case:
    arguments = {
        "window_strides": strides,
        "padding": padding,
        "dimension_numbers": NHWC,
        "feature_group_count": groups,
    }
    return Case(name, lhs, rhs, arguments)


LAYERS = [
    (layer("1x1", (1, 1, 1, 6), (1, 1, 3, 4), (1, 1), "VALID", 2), 4 * 3),
    (layer("AlexNet conv2", (1, 27, 27, 96), (5, 5, 48, 256), (1, 1), "SAME", 2), 223_948_800),
    (layer("AlexNet conv1", (1, 227, 227, 3), (11, 11, 3, 96), (4, 4), "VALID", 1), 105_415_200),
    (layer("depthwise", (2, 8, 8, 16), (3, 3, 1, 16), (2, 2), "SAME", 16), 2 * 16 * 16 * 9),
    (layer("no examples", (0, 8, 8, 4), (3, 3, 2, 4), (1, 1), "SAME", 2), 0),
    (layer("too small", (1, 2, 2, 4), (3, 3, 2, 4), (1, 1), "VALID", 2), 0),
]


@pytest.mark.parametrize(("case", "expected"), LAYERS, ids=[case.name for case, _ in LAYERS])
def test_multiply_adds_of_known_layers(case, expected):
    assert spec_of(case).multiply_adds == expected


def test_groups_divide_the_multiply_adds():
    counts = [
        spec_of(layer("", (1, 5, 5, 12), (3, 3, 12 // g, 12), (1, 1), "SAME", g)).multiply_adds
        for g in (1, 2, 3, 12)
    ]
    assert counts == [counts[0] // g for g in (1, 2, 3, 12)]


FOLDS = [("lhs", f) for f in "NGC"] + [("rhs", f) for f in "GCO"] + [("out", f) for f in "NGO"]
FOLDED = named("NCHW", "both dilated, strided, cropped, three groups", "rank 0", "one group")


@each_case(FOLDED)
@pytest.mark.parametrize(("role", "factor"), FOLDS)
def test_fold_and_unfold_are_inverses(case, role, factor):
    spec = spec_of(case)
    shape = spec.shape(role)

    @functools.partial(jax.jit, static_argnums=1)
    def there_and_back(stack, axis):
        folded = spec.fold(role, factor, stack, axis)
        assert folded.shape == spec.folded(factor, 3).shape(role)
        unfolded = spec.unfold(role, factor, folded, 3)
        return jnp.moveaxis(unfolded, spec.place(role, factor)[0], axis)

    for axis in range(len(shape) + 1):
        stack = jnp.arange(3 * np.prod(shape)).reshape((*shape[:axis], 3, *shape[axis:]))
        np.testing.assert_array_equal(there_and_back(stack, axis), stack)


def test_a_fold_grows_the_arrays_that_have_the_letter_and_no_others():
    spec = spec_of(named("NCHW")[0])
    letters = {"lhs": "NGC", "rhs": "GOC", "out": "NGO"}
    for factor, role in itertools.product(get_args(Factor), get_args(Role)):
        grown = np.prod(spec.folded(factor, 3).shape(role)) // np.prod(spec.shape(role))
        assert grown == (3 if factor in letters[role] else 1)


@pytest.mark.parametrize("factors", ["N", "OC", "GNO"])
def test_merge_and_split_are_inverses(factors):
    spec = spec_of(named("NHWC")[0])
    for size, factor in enumerate(factors, start=2):
        spec = spec.mapped_over(factor, size)
    for role in get_args(Role):
        x = jnp.arange(np.prod(spec.shape(role))).reshape(spec.shape(role))
        merged = spec.merge(role, x)
        assert merged.shape == spec.merged().shape(role)
        np.testing.assert_array_equal(spec.split(role, merged), x)
    assert spec.merged().multiply_adds == spec.multiply_adds


def test_one_group_is_the_dense_convolution_of_each():
    spec = spec_of(named("NCHW")[0]).one_group()
    assert spec.feature_group_count == 1
    assert (spec.lhs_shape, spec.rhs_shape) == ((2, 2, 7, 6), (3, 2, 3, 2))
    assert spec.out_shape == (2, 3, 4, 6)


@every_case
def test_equal_arguments_make_equal_specs(case):
    first, second = spec_of(case), spec_of(case)
    assert first is not second
    assert first == second
    assert hash(first) == hash(second)
    assert pickle.loads(pickle.dumps(first)) == first


def test_other_ways_to_say_the_same_make_equal_specs():
    (case,) = named("NHWC")
    spec = spec_of(case)
    same = [
        {"window_strides": np.array([2, 1]), "feature_group_count": np.int64(2)},
        {"window_strides": [2, 1], "lhs_dilation": (1, 1), "rhs_dilation": [1, 1]},
        {"padding": np.array([[1, 2], [0, 1]])},
        {
            "dimension_numbers": jax.lax.conv_dimension_numbers(
                case.lhs, case.rhs, case.arguments["dimension_numbers"]
            )
        },
        {"preferred_element_type": "float32"},
    ]
    assert [spec_of(case, **more) == spec for more in same] == [True] * len(same)


DIFFERENT = [
    {"window_strides": (2, 2)},
    {"padding": [(1, 2), (0, 2)]},
    {"lhs_dilation": (2, 1)},
    {"rhs_dilation": (2, 1)},
    {"precision": "highest"},
]


@pytest.mark.parametrize("more", DIFFERENT, ids=lambda more: next(iter(more)))
def test_other_arguments_make_other_specs(more):
    (case,) = named("NHWC")
    assert spec_of(case, **more) != spec_of(case)


def test_a_spec_cannot_be_changed():
    spec = spec_of(named("NHWC")[0])
    with pytest.raises(AttributeError, match="assign"):
        spec.feature_group_count = 3  # pyright: ignore[reportAttributeAccessIssue]
