"""Parts with kernels of their own: against the oracle part by part, and what is made one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import NHWC, Case, random
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxprs import convolutions

from grouped_conv_jax import count_multiply_adds, grouped_conv
from grouped_conv_jax.operations.mixed import grouped_conv_mixed


class Mixed:
    """An input, one kernel shape and one set of the oracle's arguments for each part."""

    def __init__(self, name, lhs, parts, merged, arguments, sizes=None):
        self.name, self.merged, self.arguments = name, merged, arguments
        self.rhs = [rhs for rhs, _ in parts]
        numbers = arguments.get("dimension_numbers")
        self.features = oracle.layouts(len(lhs) - 2, numbers)["lhs"][1]
        self.out_features = oracle.layouts(len(lhs) - 2, numbers)["out"][1]
        self.group_sizes = sizes
        self.sizes = sizes or [lhs[self.features] // len(parts)] * len(parts)
        self.lhs = lhs
        self.parts = [
            Case(f"{name} {i}", self._part_shape(i), rhs, self._arguments_of(i, groups))
            for i, (rhs, groups) in enumerate(parts)
        ]

    def _part_shape(self, i):
        shape = list(self.lhs)
        shape[self.features] = self.sizes[i]
        return tuple(shape)

    def _arguments_of(self, i, groups) -> dict[str, Any]:
        more = {**self.arguments, "feature_group_count": groups}
        for name in ("padding", "rhs_dilation"):
            if isinstance(more.get(name), dict):
                more[name] = more[name]["each"][i]
        return more

    def conv(self, **more):
        given = {k: v["each"] if isinstance(v, dict) else v for k, v in self.arguments.items()}
        return lambda lhs, rhs: grouped_conv_mixed(
            lhs, rhs, **given, group_sizes=self.group_sizes, **more
        )

    def random(self, dtype: Any = np.float32, stack=()):
        """An input and the kernels."""
        lhs = random(self.name, (*stack, *self.lhs), dtype)
        return lhs, [
            random(f"{self.name} {i}", (*stack, *shape), dtype) for i, shape in enumerate(self.rhs)
        ]

    def contractions(self, lhs, rhs, out):
        """The oracle's, part by part."""
        ends = np.cumsum(self.sizes)[:-1]
        sizes = [case.out[self.out_features] for case in self.parts]
        lhs = np.split(lhs, ends, self.features)
        out = np.split(out, np.cumsum(sizes)[:-1], self.out_features)
        results = [
            oracle.contractions(x, w, y, **case.arguments)
            for x, w, y, case in zip(lhs, rhs, out, self.parts, strict=True)
        ]
        outs, dx, dw = zip(*results, strict=True)
        return np.concatenate(outs, self.out_features), np.concatenate(dx, self.features), dw

    @property
    def out(self):
        shape = list(self.parts[0].out)
        shape[self.out_features] = sum(case.out[self.out_features] for case in self.parts)
        return tuple(shape)


CASES = [
    # Parts: the kernel's shape and the groups that it makes of its features.
    Mixed(
        "MixConv",
        (2, 6, 5, 12),
        [((3, 3, 1, 6), 6), ((5, 5, 1, 4), 4), ((7, 7, 1, 2), 2)],
        3,
        {"window_strides": (2, 1), "padding": "SAME", "dimension_numbers": NHWC},
        (6, 4, 2),
    ),
    Mixed(
        "uneven dense groups",
        (2, 7, 6, 5),
        [((4, 2, 3, 3), 1), ((3, 5, 3, 3), 1)],
        2,
        {"window_strides": (1, 1), "padding": [(1, 0), (0, 1)]},
        (2, 5),
    ),
    Mixed(
        "neighbours alike",
        (3, 12, 9),
        # The first two are one (of different numbers of groups), then another multiplier, another
        # size, and one as the first ones, but not their neighbour.
        [((4, 1, 3), 2), ((6, 1, 3), 3), ((3, 1, 3), 3), ((2, 1, 5), 2), ((4, 1, 3), 2)],
        4,
        {"window_strides": (1,), "padding": "SAME_LOWER"},
        (2, 3, 3, 2, 2),
    ),
    Mixed(
        "padding and dilation of each part",
        (8, 2, 6, 7),
        [((2, 3, 2, 4), 1), ((1, 3, 5, 4), 2), ((2, 3, 2, 4), 1), ((2, 3, 2, 4), 1)],
        3,
        {
            "window_strides": (1, 2),
            "padding": {
                "each": [
                    ((1, 1), (1, 0)),
                    ((1, 1), (2, 2)),
                    ((2, 2), (1, 2)),
                    ((2, 2), (1, 2)),
                ]
            },
            "rhs_dilation": {"each": [(1, 1), (1, 1), (2, 3), (2, 3)]},
            "dimension_numbers": ("CNHW", "IHWO", "NHWC"),
        },
    ),
    Mixed(
        "dilated input",
        (2, 4, 4, 3),
        [((2, 2, 3, 3), 1), ((4, 1, 3, 3), 2)],
        2,
        {
            "window_strides": (1, 1),
            "padding": [(2, 1), (0, 2)],
            "lhs_dilation": (2, 3),
            "rhs_dilation": (1, 2),
        },
    ),
    Mixed("rank 0", (5, 4), [((3, 2), 1), ((2, 1), 2)], 2, {"window_strides": (), "padding": ()}),
]

LONGER = ["rank 0", "dilated input", "uneven dense groups"]
each_mixed = pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.slow) if c.name in LONGER else c for c in CASES],
    ids=[case.name for case in CASES],
)
(MIXCONV, *_) = CASES


@each_mixed
def test_value_and_gradients_are_those_of_the_oracle_part_by_part(case):
    lhs, rhs = case.random()
    y = random("cotangent", case.out, np.float32)

    @jax.jit
    def compute(lhs, rhs, y):
        out, vjp = jax.vjp(case.conv(), lhs, rhs)
        return out, *vjp(y)

    actual = compute(lhs, rhs, y)
    expected = case.contractions(lhs, rhs, y)
    length = max(max(oracle.lengths(*part.shapes, **part.arguments)) for part in case.parts)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        oracle.assert_close(a, e, length)


@each_mixed
def test_neighbours_that_are_alike_are_one_convolution(case):
    found = convolutions(case.conv(), *case.random())
    assert len(found) == case.merged
    groups = sum(part.groups for part in case.parts)
    assert sum(e.params["spec"].feature_group_count for e in found) == groups


def test_nothing_is_computed_that_is_not_needed():
    lhs, rhs = MIXCONV.random()
    assert count_multiply_adds(MIXCONV.conv(), lhs, rhs) == 2 * 3 * 5 * (6 * 9 + 4 * 25 + 2 * 49)


@pytest.mark.parametrize(
    "padding",
    [
        pytest.param("CIRCULAR", marks=pytest.mark.slow),
        pytest.param("causal", marks=pytest.mark.slow),
        ["REFLECT", "SAME"],
    ],
    ids=str,
)
def test_strings_are_meant_for_each_part(padding):
    lhs, rhs = MIXCONV.random()
    more: dict[str, Any] = {**MIXCONV.arguments, "window_strides": (1, 1)}
    more["padding"] = padding
    actual = grouped_conv_mixed(lhs, rhs, **more, group_sizes=(6, 4, 2))
    assert actual.shape == (2, 6, 5, 12)
    by_part = [
        grouped_conv_mixed(x, [w], **more)
        for x, w in zip(np.split(lhs, [6, 10], -1), rhs, strict=True)
    ]
    np.testing.assert_allclose(actual, jnp.concatenate(by_part, -1), 1e-5, 1e-5)


def specs(**arguments):
    """Of the convolutions that two parts of two features are, in two dimensions."""
    like = jax.ShapeDtypeStruct((2, 4, 6, 6), np.float32)
    kernels = [jax.ShapeDtypeStruct((2, 1, 3, 3), np.float32)] * 2
    given = {"window_strides": (1, 1), "padding": "SAME", **arguments}
    found = convolutions(lambda x, ws: grouped_conv_mixed(x, ws, **given), like, kernels)
    return [e.params["spec"] for e in found]


PAIRS = [(1, 0), (2, 1)]


@pytest.mark.parametrize(
    "padding",
    [
        np.array(PAIRS),
        iter([(1, 0), iter([2, 1])]),
        (np.array([1, 0], np.int64), [2, 1]),
        np.array([PAIRS, PAIRS]),
        iter([tuple(PAIRS), np.array(PAIRS)]),
    ],
    ids=lambda padding: type(padding).__name__,
)
def test_pairs_may_be_any_sequences(padding):
    # Alike in both parts, so one convolution.
    (spec,) = specs(padding=padding)
    assert spec == specs(padding=PAIRS)[0]
    assert spec.padding == tuple(PAIRS)


@pytest.mark.parametrize(
    "rhs_dilation",
    [np.array([2, 1]), iter([2, 1]), np.array([[2, 1], [2, 1]]), [iter([2, 1]), [2, 1]]],
    ids=lambda rhs_dilation: type(rhs_dilation).__name__,
)
def test_dilations_may_be_any_sequences(rhs_dilation):
    (spec,) = specs(rhs_dilation=rhs_dilation)
    assert spec.rhs_dilation == (2, 1)


@pytest.mark.parametrize(
    ("padding", "by_part"),
    [
        ([["CIRCULAR"] * 2] * 2, None),
        ([["causal", (1, 1)], [(1, 1), "CAUSAL"]], None),
        ([[("REFLECT", (1, 1)), "SAME"], ["SAME", ("REPLICATE", (2, 0))]], None),
        ([("SAME", "VALID"), ["SAME", "VALID"]], None),
        # Not by part: an entry for each dimension.
        (["CIRCULAR", "SAME"], [["CIRCULAR", "SAME"]] * 2),
        ([("REFLECT", (1, 1)), (1, 1)], [[("REFLECT", (1, 1)), (1, 1)]] * 2),
        # What is ambiguous in its other spellings.
        (
            [[("REFLECT", None), (1, 1)], [("REPLICATE", None), (1, 1)]],
            [["REFLECT", (1, 1)], ["REPLICATE", (1, 1)]],
        ),
    ],
    ids=str,
)
def test_a_list_is_by_dimension_or_by_part(padding, by_part):
    x = random("x", (2, 4, 6, 6), np.float32)
    kernels = [random(f"w{i}", (2, 1, 3, 3), np.float32) for i in range(2)]

    @jax.jit
    def both(x, kernels):
        parts = zip(jnp.split(x, 2, 1), kernels, by_part or padding, strict=True)
        outs = [
            grouped_conv(part, w, (1, 1), list(pads), feature_group_count=2)
            for part, w, pads in parts
        ]
        return grouped_conv_mixed(x, kernels, (1, 1), padding), jnp.concatenate(outs, 1)

    actual, expected = both(x, kernels)
    np.testing.assert_allclose(actual, expected, 1e-5, 1e-5)


def test_dtypes_and_the_preferred_one():
    lhs, rhs = MIXCONV.random(np.int8)
    out = MIXCONV.conv(preferred_element_type=np.int32)(lhs, rhs)
    assert out.dtype == np.int32
    expected, *_ = MIXCONV.contractions(lhs, rhs, np.zeros(MIXCONV.out))
    np.testing.assert_array_equal(out, expected)


def test_the_implementation_and_the_precision_are_for_every_part():
    found = convolutions(MIXCONV.conv(implementation="xla", precision="highest"), *MIXCONV.random())
    assert [e.params["implementation"] for e in found] == ["xla"] * 3
    assert [e.params["spec"].precision for e in found] == ["highest"] * 3


# Sharding.


@pytest.mark.parametrize(
    ("lhs", "kernels", "asked", "result"),
    [
        pytest.param(P("data"), P(), None, P("data", None, None), marks=pytest.mark.slow),
        pytest.param(
            P("data", "group"), P(), None, P("data", "group", None), marks=pytest.mark.slow
        ),
        (P("data"), P("group"), None, P("data", "group", None)),
        (P(None, None, "group"), P(None, "group"), P("group", "data", None), None),
    ],
    ids=str,
)
def test_explicit_axes(lhs, kernels, asked, result):
    case = Mixed("sharded", (4, 8, 6), [((4, 2, 3), 2), ((8, 2, 5), 2)], 2, SAME)
    x, ws = case.random()
    y = random("cotangent", case.out, np.float32)
    mesh = jax.make_mesh((2, 2), ("data", "group"), (AxisType.Explicit,) * 2)

    @jax.jit
    def compute(x, ws, y):
        out, vjp = jax.vjp(case.conv(out_sharding=asked), x, ws)
        return out, *vjp(y)

    with jax.set_mesh(mesh):
        placed = jax.device_put(x, lhs), [jax.device_put(w, kernels) for w in ws]
        if asked is not None:
            with pytest.raises(ValueError, match=r"rhs\[0\] is sharded .* out_sharding=jax.P"):
                case.conv()(*placed)
        actual = compute(*placed, jax.device_put(y, asked or result))
        assert jax.typeof(actual[0]).sharding.spec == (asked or result)
    expected = case.contractions(x, ws, y)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        oracle.assert_close(a, e, 64)


SAME = {"window_strides": (1,), "padding": "SAME"}


def test_parts_that_would_be_sharded_differently_are_refused():
    mesh = jax.make_mesh((2,), ("group",), (AxisType.Explicit,))
    with jax.set_mesh(mesh):
        w = jnp.ones((2, 1, 3))
        sharded = jax.device_put(w, P("group"))
        with pytest.raises(ValueError, match=r"rhs\[0\] and rhs\[1\] .*reshard the kernels"):
            grouped_conv_mixed(jnp.ones((1, 4, 5)), [w, sharded], **SAME)


# Arguments.


def ones(*shape, dtype: Any = np.float32):
    return np.ones(shape, dtype)


WRONG = {
    "no kernels": ({"rhs": []}, ValueError, ["at least one kernel"]),
    "one kernel, not in a list": ({"rhs": ones(6, 1, 3, 3)}, TypeError, ["rhs", "list", "ndarray"]),
    "a kernel that is none": ({"rhs": [ones(2, 1, 3, 3), 1j, "w"]}, TypeError, ["rhs[2]", "str"]),
    "dtypes": (
        {"rhs": [ones(2, 1, 3, 3), ones(4, 1, 5, 5, dtype=np.float16)]},
        TypeError,
        ["lhs and rhs[1]", "float32", "float16"],
    ),
    "ranks": (
        {"rhs": [ones(2, 1, 3, 3), ones(4, 1, 5)]},
        ValueError,
        ["rhs[1]", "(4)", "(4, 1, 5)"],
    ),
    "uneven features": (
        {"rhs": [ones(2, 1, 3, 3)] * 4, "group_sizes": None},
        ValueError,
        ["4 kernels", "features of lhs (6)", "give group_sizes"],
    ),
    "too few sizes": ({"group_sizes": (6,)}, ValueError, ["2 kernels", "got 1: (6,)"]),
    "sizes that miss features": ({"group_sizes": (2, 3)}, ValueError, ["(6)", "(2, 3)", "are 5"]),
    "a size of 0": ({"group_sizes": (0, 6)}, ValueError, ["group_sizes", "at least 1", "0"]),
    "a size as a float": ({"group_sizes": (2.0, 4)}, TypeError, ["group_sizes", "2.0"]),
    "one size": ({"group_sizes": 3}, TypeError, ["group_sizes", "sequence", "3"]),
    "a depth that does not divide its part": (
        {"rhs": [ones(2, 1, 3, 3), ones(4, 3, 5, 5)]},
        ValueError,
        ["rhs[1] takes 3 input features", "of lhs (4)", "group_sizes says"],
    ),
    "outputs that are not in groups": (
        {"rhs": [ones(3, 1, 3, 3), ones(4, 1, 5, 5)]},
        ValueError,
        ["rhs[0] has 3 output features", "2 groups"],
    ),
    "results of different sizes": (
        {"padding": [(1, 1), (1, 1)]},
        ValueError,
        ["different sizes, (5, 5), (3, 3)", "[(1, 1), (1, 1)]", "'SAME'"],
    ),
    "paddings by dimension or by part": (
        {"padding": [("REFLECT", (1, 1)), ["CIRCULAR", [2, 2]]]},
        ValueError,
        [
            "by dimension, then write [[('REFLECT', (1, 1)), ['CIRCULAR', [2, 2]]], [('REF",
            "by part, then write [[('REFLECT', None), (1, 1)], [('CIRCULAR', None), [2, 2]]]",
        ],
    ),
    "a string for one part": (
        {"padding": ["SAME", ["SAME", "VALID"]]},
        ValueError,
        ["each of 2 spatial dimensions", "[['SAME', 'SAME'], ['SAME', 'SAME']]"],
    ),
    "a string for each of three": (
        {"padding": ["SAME"] * 3},
        ValueError,
        ["each of 2 spatial dimensions", "got 3"],
    ),
    "a mode with its pair for all": (
        {"padding": ("REFLECT", (1, 1))},
        ValueError,
        ["[('REFLECT', (1, 1))] * 2"],
    ),
    "a float in an array": ({"padding": np.ones((2, 2))}, TypeError, ["padding", "1.0"]),
    "no features": (
        {"lhs": ones(2, 0, 5, 5), "group_sizes": None},
        ValueError,
        ["lhs must have features", "2 kernels"],
    ),
    "no taps": ({"rhs": [ones(2, 1, 3, 3), ones(4, 1, 0, 3)]}, ValueError, ["at least one tap"]),
    "paddings for other parts": (
        {"padding": [((1, 1), (1, 1))] * 3},
        ValueError,
        ["padding", "each of the 2 kernels", "for 3"],
    ),
    "dilations for other parts": (
        {"rhs_dilation": [(1, 1)]},
        ValueError,
        ["rhs_dilation", "each of the 2 kernels", "for 1"],
    ),
    "an unknown padding": ({"padding": "FULL"}, ValueError, ["padding", "'FULL'"]),
    "an unknown implementation": ({"implementation": "fast"}, ValueError, ["'fast'", "known"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused(name):
    wrong, error, parts = WRONG[name]
    good = {
        "lhs": ones(2, 6, 5, 5),
        "rhs": [ones(2, 1, 3, 3), ones(4, 1, 5, 5)],
        "window_strides": (1, 1),
        "padding": "SAME",
        "group_sizes": (2, 4),
    }
    with pytest.raises(error) as caught:
        grouped_conv_mixed(**{**good, **wrong})
    for part in parts:
        assert part in str(caught.value)


def test_paddings_of_each_part_can_make_the_results_equally_large():
    lhs, rhs = ones(2, 6, 5, 5), [ones(2, 1, 3, 3), ones(4, 1, 5, 5)]
    each = [((1, 1), (1, 1)), ((2, 2), (2, 2))]
    out = grouped_conv_mixed(lhs, rhs, (2, 2), each, group_sizes=(2, 4))
    assert out.shape == (2, 6, 3, 3)
