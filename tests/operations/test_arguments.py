"""Arguments: wrong ones are refused before any work, odd but legal ones are taken as lax does."""

import functools
import inspect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import named
from jax import lax

import grouped_conv_jax.operations.conv
from grouped_conv_jax import grouped_conv, weights

LHS, RHS = (4, 6, 5, 5), (4, 3, 3, 3)
GOOD = {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2}


def ones(shape, dtype: Any = np.float32):
    return np.ones(shape, dtype)


def numbers(lhs, rhs, out):
    return lax.ConvDimensionNumbers(lhs, rhs, out)


ORDER = (0, 1, 2, 3)

# name: (what differs from GOOD, the exception, parts of its message)
WRONG = {
    # Groups.
    "groups do not divide the inputs": (
        {"feature_group_count": 4},
        ValueError,
        ["feature_group_count=4", "features of lhs", "(6)", "divisors: 1, 2, 3, 6"],
    ),
    "groups do not divide the outputs": (
        {"feature_group_count": 3, "rhs": ones((4, 2, 3, 3))},
        ValueError,
        ["feature_group_count=3", "output features of rhs", "(4)", "divisors: 1, 2, 4"],
    ),
    "a dense kernel for two groups": (
        {"rhs": ones((4, 6, 3, 3))},
        ValueError,
        ["rhs takes 6", "6 features in feature_group_count=2, 3 each", "=1 would fit"],
    ),
    "a grouped kernel for one group": (
        {"feature_group_count": 1},
        ValueError,
        ["rhs takes 3", "6 features in feature_group_count=1, 6 each", "=2 would fit"],
    ),
    "channels last without saying so": (
        {"lhs": ones((4, 5, 5, 6)), "rhs": ones((3, 3, 3, 4))},
        ValueError,
        ["feature_group_count=2", "('NHWC', 'HWIO', 'NHWC') would fit"],
    ),
    "a kernel of PyTorch's under HWIO": (
        {"lhs": ones((4, 5, 5, 6)), "dimension_numbers": ("NHWC", "HWIO", "NHWC")},
        ValueError,
        ["('NHWC', 'OIHW', 'NHWC') would fit"],
    ),
    "no groups": ({"feature_group_count": 0}, ValueError, ["feature_group_count", "1", "0"]),
    "negative groups": ({"feature_group_count": -1}, ValueError, ["feature_group_count", "-1"]),
    "groups as a float": ({"feature_group_count": 2.0}, TypeError, ["group", "integer", "2.0"]),
    "groups as a boolean": (
        {"feature_group_count": True},
        TypeError,
        ["feature_group_count", "integer", "True"],
    ),
    "groups as a boolean of numpy": (
        {"feature_group_count": np.True_},
        TypeError,
        ["feature_group_count", "integer", "True"],
    ),
    "batch groups do not divide the batch": (
        {"feature_group_count": 1, "batch_group_count": 3, "rhs": ones((6, 6, 3, 3))},
        ValueError,
        ["batch_group_count=3", "batch of lhs", "(4)", "divisors: 1, 2, 4"],
    ),
    "batch groups do not divide the outputs": (
        {"feature_group_count": 1, "batch_group_count": 4, "rhs": ones((6, 6, 3, 3))},
        ValueError,
        ["batch_group_count=4", "output features of rhs", "(6)", "divisors: 1, 2, 3, 6"],
    ),
    "no batch groups": ({"batch_group_count": 0}, ValueError, ["batch_group_count", "0"]),
    "groups of features and of the batch": (
        {"batch_group_count": 2},
        ValueError,
        ["feature_group_count=2", "batch_group_count=2", "only one"],
    ),
    "a kernel of the wrong depth for batch groups": (
        # 6 are the features of the lhs that the user gave; what becomes of it is not his concern.
        {"feature_group_count": 1, "batch_group_count": 2},
        ValueError,
        ["rhs takes 3", "lhs has 6 features"],
    ),
    # Arrays.
    "mixed dtypes": (
        {"rhs": ones(RHS, np.float16)},
        TypeError,
        ["same dtype", "float32", "float16", "astype"],
    ),
    "integers and floats": (
        {"lhs": ones(LHS, np.int32)},
        TypeError,
        ["same dtype", "int32", "float32"],
    ),
    "ranks that differ": (
        {"rhs": ones((4, 3, 3))},
        ValueError,
        ["same number of dimensions", "(4, 6, 5, 5)", "(4, 3, 3)"],
    ),
    "vectors": (
        {"lhs": ones(6), "rhs": ones(3)},
        ValueError,
        ["at least 2", "(6,)", "(3,)"],
    ),
    "no taps": ({"rhs": ones((4, 3, 0, 3))}, ValueError, ["at least one tap", "(0, 3)"]),
    # Strides and dilations.
    "too few strides": (
        {"window_strides": (1,)},
        ValueError,
        ["window_strides", "2 spatial", "got 1", "(1,)"],
    ),
    "a stride as an integer": (
        {"window_strides": 2},
        TypeError,
        ["window_strides", "sequence", "got 2"],
    ),
    "strides as a string": ({"window_strides": "11"}, TypeError, ["window_strides", "'11'"]),
    "a stride of 0": ({"window_strides": (1, 0)}, ValueError, ["window_strides", "(1, 0)"]),
    "a negative stride": ({"window_strides": (-1, 1)}, ValueError, ["strides", "(-1, 1)"]),
    "a stride as a float": ({"window_strides": (1, 2.0)}, TypeError, ["strides", "2.0"]),
    "too few dilations": (
        {"rhs_dilation": (1,)},
        ValueError,
        ["rhs_dilation", "2 spatial", "got 1"],
    ),
    "a dilation of 0": ({"rhs_dilation": (0, 1)}, ValueError, ["rhs_dilation", "(0, 1)"]),
    # Padding.
    "an unknown padding": (
        {"padding": "FULL"},
        ValueError,
        ["padding", "'FULL'", "SAME", "SAME_LOWER", "VALID"],
    ),
    "a padding as an integer": ({"padding": 1}, TypeError, ["padding", "pairs", "1"]),
    "too few paddings": ({"padding": [(1, 1)]}, ValueError, ["padding", "2 spatial", "got 1"]),
    "integers as paddings": ({"padding": (1, 1)}, ValueError, ["padding", "pairs", "1"]),
    "triples as paddings": ({"padding": [(1, 1, 1)] * 2}, ValueError, ["pairs", "(1, 1, 1)"]),
    "an unknown padding of one dimension": (
        {"padding": ["SAME", "FULL"]},
        ValueError,
        ["'FULL'", "SAME, SAME_LOWER, VALID, CAUSAL, CIRCULAR, REFLECT, REPLICATE"],
    ),
    "a pair of its own for zeros": (
        {"padding": [("SAME", (1, 1)), (1, 1)]},
        ValueError,
        ["('SAME', (1, 1))", "CIRCULAR, REFLECT, REPLICATE"],
    ),
    "one integer for a mode": (
        {"padding": [("REFLECT", 1), (1, 1)]},
        ValueError,
        ["padding", "pairs", "1"],
    ),
    "a mode within a mode": (
        {"padding": [("REFLECT", ("CIRCULAR", None)), (1, 1)]},
        TypeError,
        ["padding", "'CIRCULAR'"],
    ),
    "nothing to repeat": (
        {"padding": ["CIRCULAR", "SAME"], "lhs": ones((4, 6, 0, 5))},
        ValueError,
        ["'CIRCULAR'", "dimension 2 of lhs has size 0"],
    ),
    "a string for a dilated dimension": (
        {"padding": ["SAME", (1, 1)], "lhs_dilation": (2, 1)},
        ValueError,
        ["'SAME'", "lhs_dilation of 2", "pair"],
    ),
    "a padding of floats": ({"padding": [(1.0, 1)] * 2}, TypeError, ["padding", "1.0"]),
    "a string with a dilated input": (
        {"lhs_dilation": (2, 1)},
        ValueError,
        ["'SAME'", "lhs_dilation=(2, 1)", "pair"],
    ),
    "a crop of more than all": (
        {"padding": [(-3, -3), (0, 0)]},
        ValueError,
        ["padding", "(-3, -3)", "5"],
    ),
    # Layouts.
    "a layout of another rank": (
        {"dimension_numbers": ("NCH", "OIH", "NCH")},
        TypeError,
        ["dimension_numbers", "3", "(4, 6, 5, 5)"],
    ),
    "two layouts": ({"dimension_numbers": ("NCHW", "OIHW")}, TypeError, ["length 3", "2"]),
    "a layout without its letters": (
        {"dimension_numbers": ("NCHW", "ABHW", "NCHW")},
        TypeError,
        ["'O' and 'I'", "ABHW"],
    ),
    "a layout with a letter twice": (
        {"dimension_numbers": ("NCHH", "OIHW", "NCHW")},
        TypeError,
        ["duplicate", "NCHH"],
    ),
    "layouts with different spatial letters": (
        {"dimension_numbers": ("NCHW", "OIXY", "NCHW")},
        TypeError,
        ["spatial", "OIXY"],
    ),
    "one string for all layouts": ({"dimension_numbers": "NCHW"}, TypeError, ["tuple", "str"]),
    "a layout as an integer": ({"dimension_numbers": 3}, TypeError, ["tuple", "int"]),
    "numbers of the input that are no permutation": (
        {"dimension_numbers": numbers((0, 1, 2, 2), ORDER, ORDER)},
        ValueError,
        ["lhs_spec", "permutation", "(0, 1, 2, 2)"],
    ),
    "numbers of the kernel that are no permutation": (
        {"dimension_numbers": numbers(ORDER, (1, 2, 3, 4), ORDER)},
        ValueError,
        ["rhs_spec", "permutation", "(1, 2, 3, 4)"],
    ),
    "numbers of the output that are too few": (
        {"dimension_numbers": numbers(ORDER, ORDER, (0, 1, 2))},
        ValueError,
        ["out_spec", "permutation", "(0, 1, 2)"],
    ),
    # The rest.
    "an unknown precision": ({"precision": "superb"}, ValueError, ["recision", "superb"]),
    "three precisions": ({"precision": ("high",) * 3}, ValueError, ["recision", "high"]),
    "a narrower result": (
        {"preferred_element_type": jnp.bfloat16},
        TypeError,
        ["preferred_element_type", "narrower"],
    ),
    "integers of floats": (
        {"preferred_element_type": jnp.int32},
        TypeError,
        ["preferred_element_type", "incompatible"],
    ),
    "an unknown dtype": (
        {"preferred_element_type": "floot"},
        TypeError,
        ["preferred_element_type", "floot"],
    ),
    "a list as a dtype": (
        {"preferred_element_type": [1]},
        TypeError,
        ["preferred_element_type", "[1]"],
    ),
    "a list as an implementation": ({"implementation": []}, TypeError, ["implementation", "list"]),
    "a list as a sharding": ({"out_sharding": []}, TypeError, ["out_sharding", "[]"]),
    "booleans as a padding": (
        {"padding": [(True, True)] * 2},
        TypeError,
        ["padding", "boolean True"],
    ),
    "a mode with its pair for all dimensions": (
        {"padding": ("REFLECT", (1, 1))},
        ValueError,
        ["[('REFLECT', (1, 1))] * 2", "['REFLECT', (1, 1)]"],
    ),
    "bytes as dilations": ({"rhs_dilation": b"ab"}, TypeError, ["rhs_dilation", "b'ab'"]),
    "an unknown implementation": (
        {"implementation": "cudnn"},
        ValueError,
        ["implementation", "'cudnn'", "xla", "vmap", "None"],
    ),
}


def operands_and_arguments(changes):
    changes = {"lhs": ones(LHS), "rhs": ones(RHS), **GOOD, **changes}
    return changes.pop("lhs"), changes.pop("rhs"), changes


@pytest.mark.parametrize("how", ["outside jit", "jit", "eval_shape", "gradient", "vmap"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_argument_is_refused_before_any_work(wrong, how, monkeypatch):
    def work(*_, **__):
        raise AssertionError("it was not refused")

    monkeypatch.setattr(grouped_conv_jax.operations.conv, "contract", work)
    changes, exception, parts = WRONG[wrong]
    lhs, rhs, arguments = operands_and_arguments(changes)

    def conv(lhs, rhs):
        return grouped_conv(lhs, rhs, **arguments)

    call = {
        "outside jit": lambda: conv(lhs, rhs),
        "jit": lambda: jax.jit(conv)(lhs, rhs),
        "eval_shape": lambda: jax.eval_shape(conv, lhs, rhs),
        "gradient": lambda: jax.vjp(conv, lhs, rhs),
        "vmap": lambda: jax.vmap(conv)(lhs[None], rhs[None]),
    }[how]
    with pytest.raises(exception) as refusal:
        call()
    for part in parts:
        assert part in str(refusal.value)


NOT_ARRAYS = {
    "a list": [[[[1.0] * 5] * 5] * 6] * 4,
    "a string": "lhs",
    "None": None,
    "a number of more than 32 bits": 2**31,
    "an array of objects": np.full(LHS, None),
}


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("value", NOT_ARRAYS)
@pytest.mark.parametrize("how", ["outside jit", "jit", "eval_shape"])
def test_what_is_not_an_array_is_refused(value, position, how):
    operands = [ones(LHS), ones(RHS)]
    operands[position] = NOT_ARRAYS[value]
    call = {
        "outside jit": lambda f: f(),
        "jit": lambda f: jax.jit(f)(),
        "eval_shape": jax.eval_shape,
    }[how]
    with pytest.raises(TypeError, match=f"{'lr'[position]}hs must be an array.*asarray"):
        call(lambda: grouped_conv(*operands, **GOOD))  # pyright: ignore[reportArgumentType]


# What cannot be written, or is too long to be read: what is wrong is said all the same.
UNSPEAKABLE = {
    "lists in lists": functools.reduce(lambda inner, _: [inner], range(100_000), []),
    "an integer of 5,000 digits": (10**5000, "a"),
    "a long list": list(range(100_000)),
}


@pytest.mark.parametrize("value", UNSPEAKABLE)
@pytest.mark.parametrize(
    "name",
    ["window_strides", "padding", "lhs_dilation", "feature_group_count", "lhs", "out_sharding"],
)
def test_a_message_is_short_whatever_was_given(value, name):
    arguments: dict[str, Any] = {"lhs": ones(LHS), "rhs": ones(RHS), **GOOD}
    arguments[name] = UNSPEAKABLE[value]
    with pytest.raises((TypeError, ValueError)) as refusal:
        grouped_conv(**arguments)
    assert name in str(refusal.value)
    assert len(str(refusal.value)) < 1000


def test_what_would_divide_is_not_looked_for_among_all_numbers():
    size = 2**31 - 1  # A prime.
    x = jax.ShapeDtypeStruct((1, size), np.float32)
    with pytest.raises(ValueError, match=rf"features of lhs \({size}\); divisors: 1, \.\.\."):
        jax.eval_shape(lambda x: grouped_conv(x, ones((2, 1)), (), [], feature_group_count=2), x)


@pytest.mark.parametrize("value", [1.0, np.float32(1), 2])
def test_a_scalar_is_refused(value):
    with pytest.raises((TypeError, ValueError), match="lhs"):
        grouped_conv(value, ones(RHS), **GOOD)


def test_a_refused_argument_does_not_poison_the_right_one():
    # 2.0 == 2 and True == 1, also as keys of caches.
    right = grouped_conv(ones(LHS), ones(RHS), **GOOD)
    for changes in (
        {"feature_group_count": 2.0},
        {"window_strides": (1.0, 1.0)},
        {"padding": [(1.0, 1.0)] * 2},
    ):
        for _ in range(2):
            with pytest.raises(TypeError, match="integer"):
                grouped_conv(ones(LHS), ones(RHS), **{**GOOD, **changes})
            again = grouped_conv(ones(LHS), ones(RHS), **GOOD)
            np.testing.assert_array_equal(again, right)
    for _ in range(2):
        with pytest.raises(TypeError, match="boolean"):
            grouped_conv(ones(LHS), ones((4, 6, 3, 3)), (1, 1), "SAME", feature_group_count=True)
        grouped_conv(ones(LHS), ones((4, 6, 3, 3)), (1, 1), "SAME", feature_group_count=1)


LEGAL = {
    "groups as an integer of numpy": {"feature_group_count": np.int64(2)},
    "groups as an unsigned integer of numpy": {"feature_group_count": np.uint8(2)},
    "strides as integers of numpy": {"window_strides": (np.int32(2), np.int64(1))},
    "strides as an array": {"window_strides": np.array([2, 1])},
    "strides as a list": {"window_strides": [2, 1]},
    "padding as an array": {"padding": np.array([[1, 2], [0, 1]])},
    "padding as lists": {"padding": [[1, 2], [0, 1]]},
    "padding as integers of numpy": {"padding": ((np.int8(1), np.int64(2)), (0, 1))},
    "padding in lower case": {"padding": "same"},
    "padding in mixed case": {"padding": "Valid"},
    "padding that crops": {"padding": [(-1, 0), (0, -1)]},
    "dilations as arrays": {"padding": "VALID", "rhs_dilation": np.array([2, 1])},
    "input dilations as a list": {"padding": [(0, 0)] * 2, "lhs_dilation": [2, 1]},
    "input dilations of 1 and a string": {"padding": "SAME", "lhs_dilation": (1, 1)},
    "layouts as a list": {"dimension_numbers": ["NCHW", "OIHW", "NHWC"]},
    "layouts as None": {"dimension_numbers": None},
    "layouts with other letters": {"dimension_numbers": ("NCab", "OIab", "NabC")},
    "batch groups of 1 as an integer of numpy": {"batch_group_count": np.int64(1)},
    "precisions as a list": {"precision": ["high", "highest"]},
    "precision as an enum": {"precision": lax.Precision.HIGHEST},
    "result type as a name": {"preferred_element_type": "float32"},
    "result type as a dtype": {"preferred_element_type": jnp.dtype("float32")},
}


@pytest.mark.parametrize("legal", LEGAL)
def test_odd_but_legal_arguments_are_taken_as_lax_takes_them(legal):
    (case,) = named("NCHW")
    x, w, _ = case.random()
    ours, theirs = (
        conv(**LEGAL[legal])(x, w) for conv in (partial(case.conv, "xla"), case.lax_conv)
    )
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


def test_padding_may_be_an_iterator_as_in_lax():
    (case,) = named("NCHW")
    x, w, _ = case.random()
    ours, theirs = (
        conv(padding=zip((1, 0), (2, 1), strict=True))(x, w)
        for conv in (partial(case.conv, "xla"), case.lax_conv)
    )
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_arrays_of_any_kind_are_taken(convert):
    (case,) = named("NHWC")
    x, w, _ = case.random()
    ours = case.conv("xla")(convert(x), convert(w))
    np.testing.assert_array_equal(ours, case.lax_conv()(x, w))


def test_a_numpy_batch_is_cut_into_groups():
    (case,) = named("two batch groups")
    x, w, _ = case.random()
    assert isinstance(x, np.ndarray)
    ours, theirs = case.conv("xla")(x, w), case.lax_conv()(x, w)
    np.testing.assert_allclose(ours, theirs, 1e-5, 1e-5)


@pytest.mark.parametrize("count", range(4, 13))
def test_positional_arguments_are_in_the_order_of_lax(count):
    arguments: Any = (
        ones(LHS),
        ones((4, 6, 3, 3)),
        (2, 1),
        [(1, 2), (0, 1)],
        (1, 2),
        (2, 1),
        ("NCHW", "OIHW", "NHWC"),
        1,
        2,
        "highest",
        "float32",
        None,
    )
    ours = grouped_conv(*arguments[:count])
    theirs = lax.conv_general_dilated(*arguments[:count])
    np.testing.assert_array_equal(ours, theirs)


def test_the_signature_is_that_of_lax():
    ours = dict(inspect.signature(grouped_conv).parameters)
    theirs = inspect.signature(lax.conv_general_dilated).parameters
    implementation = ours.pop("implementation")
    assert implementation.kind is inspect.Parameter.KEYWORD_ONLY
    assert implementation.default is None
    described = [
        [(p.name, p.kind, p.default) for p in parameters.values()] for parameters in (ours, theirs)
    ]
    assert described[0] == described[1]


def test_the_implementation_is_by_name_only():
    with pytest.raises(TypeError, match="positional"):
        grouped_conv(*[None] * 13)  # pyright: ignore[reportCallIssue, reportArgumentType]


@pytest.mark.parametrize("dtype", ["int2", "uint2"])
def test_integers_of_two_bits_are_refused(dtype):
    # XLA ends the process when it joins such arrays.
    x, w = jnp.ones((1, 4, 5, 5), dtype), jnp.ones((4, 2, 3, 3), dtype)
    with pytest.raises(TypeError, match=f"lhs must not be of {dtype}; convert it"):
        grouped_conv(x, w, (1, 1), "SAME", feature_group_count=2)
    with pytest.raises(TypeError, match=f"must not be of {dtype}; convert it"):
        weights.merge_groups([w, w])


def test_a_name_that_cannot_be_written_is_refused():
    nested: Any = 1
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(TypeError, match=r"implementation must be a name, .* or None, got list"):
        grouped_conv(ones(LHS), ones((4, 6, 3, 3)), (1, 1), "SAME", implementation=nested)
