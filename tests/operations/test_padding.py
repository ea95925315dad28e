"""What stands beyond the ends of the input, and how the ways to say it relate."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import NHWC, Case, random
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxprs import primitives
from meshes import MESH, assert_local, assert_right, divided

from grouped_conv_jax import grouped_conv, grouped_conv_transpose

NUMPY = {"CIRCULAR": "wrap", "REFLECT": "reflect", "REPLICATE": "edge"}
X = random("x", (2, 5, 4, 4), np.float32)
W = random("w", (3, 4, 2, 6), np.float32)


def conv(padding, strides=(1, 1), **more):
    return grouped_conv(
        X, W, strides, padding, dimension_numbers=NHWC, feature_group_count=2, **more
    )


@pytest.mark.parametrize("mode", NUMPY)
@pytest.mark.parametrize(
    "pairs",
    [((1, 2), (2, 1)), ((9, 0), (0, 11)), ((-1, 2), (2, -1)), ((0, 0), (3, 3)), ((70, 3), (0, 61))],
    ids=str,
)
def test_a_mode_is_what_numpy_pads_with(mode, pairs):
    cropped = X[:, max(0, -pairs[0][0]) :, : 4 + min(0, pairs[1][1])]
    # A crop is made on one end, and what is beyond the other one is still that of all.
    whole = np.pad(X, ((0, 0), *[(max(low, 0), max(high, 0)) for low, high in pairs], (0, 0)),
                   mode=NUMPY[mode])  # pyright: ignore # fmt: skip
    cut = [slice(max(-low, 0), whole.shape[1 + i] - max(-high, 0)) for i, (low, high) in
           enumerate(pairs)]  # fmt: skip
    padded = whole[:, cut[0], cut[1]]
    assert padded.shape[1] == cropped.shape[1] + max(0, pairs[0][0]) + max(0, pairs[0][1])
    expected = grouped_conv(padded, W, (1, 1), "VALID", dimension_numbers=NHWC,
                            feature_group_count=2)  # fmt: skip
    np.testing.assert_allclose(conv([(mode, pair) for pair in pairs]), expected, 1e-5, 1e-5)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("CIRCULAR", "circular"),
        ("CIRCULAR", ["CIRCULAR", "Circular"]),
        ("CIRCULAR", [("CIRCULAR", None), ["CIRCULAR", (1, 2)]]),
        ("CIRCULAR", [("CIRCULAR", (1, 1)), ("CIRCULAR", np.array([1, 2]))]),
        ("CAUSAL", [(2, 0), (3, 0)]),
        ("SAME", ["SAME", (1, 2)]),
        ("SAME_LOWER", [("SAME_LOWER", None), (2, 1)]),
        ("VALID", ["VALID", (0, 0)]),
        ([("REPLICATE", (0, 0)), "VALID"], "VALID"),
    ],
    ids=str,
)
def test_ways_to_say_the_same(one, other):
    np.testing.assert_array_equal(conv(one), conv(other))


@pytest.mark.parametrize("mode", NUMPY)
def test_a_mode_keeps_the_size_and_is_cut_by_strides(mode):
    assert conv(mode).shape == (2, 5, 4, 6)
    np.testing.assert_allclose(conv(mode, (2, 3)), conv(mode)[:, ::2, ::3], 1e-5, 1e-5)


@pytest.mark.parametrize("shift", [1, 3])
def test_circular_commutes_with_a_rotation(shift):
    rotated = grouped_conv(
        np.roll(X, shift, 1), W, (1, 1), "CIRCULAR", dimension_numbers=NHWC, feature_group_count=2
    )
    np.testing.assert_allclose(rotated, np.roll(conv("CIRCULAR"), shift, 1), 1e-5, 1e-5)
    up = [
        grouped_conv_transpose(x, W, (2, 3), "CIRCULAR", feature_group_count=2)
        for x in (X, np.roll(X, shift, 1))
    ]
    np.testing.assert_allclose(up[1], np.roll(up[0], 2 * shift, 1), 1e-5, 1e-5)


def test_causal_results_do_not_depend_on_what_comes_later():
    later = X.copy()
    later[:, 3:] = 7
    for f in (
        lambda x: grouped_conv(x, W, (1, 1), ["CAUSAL", "SAME"], dimension_numbers=NHWC,
                               feature_group_count=2)[:, :3],
        lambda x: grouped_conv_transpose(x, W, (2, 1), ["CAUSAL", "SAME"],
                                         feature_group_count=2)[:, :6],
    ):  # fmt: skip
        np.testing.assert_array_equal(f(X), f(later))
        assert not np.array_equal(f(X), f(-X))


def test_what_needs_no_padding_is_not_padded():
    w = np.ones((1, 1, 2, 6), np.float32)
    found = primitives(
        lambda: grouped_conv(X, w, (1, 1), "REFLECT", dimension_numbers=NHWC, feature_group_count=2)
    )
    assert set(found) == {"grouped_conv"}


CASE = Case(
    "circular and reflected",
    (2, 8, 5, 4),
    (3, 4, 2, 6),
    {
        "window_strides": (1, 2),
        "padding": ["CIRCULAR", "REFLECT"],
        "dimension_numbers": NHWC,
        "feature_group_count": 2,
    },
)


@pytest.mark.parametrize("split", ["both", "batch"])
def test_batch_and_groups_are_local(split):
    assert_local(divided(CASE), split, "xla")


@pytest.mark.parametrize(
    "rows", [P(None, "data"), P(None, None, "group"), P("group", "data")], ids=str
)
def test_rows_on_several_devices(rows):
    assert_right(CASE, MESH, (rows, P(), rows))


@pytest.mark.parametrize("padding", ["CIRCULAR", "REFLECT", "REPLICATE", "CAUSAL"])
def test_batch_and_rows_can_be_symbolic(padding):
    batch, rows = export.symbolic_shape("b, h", constraints=["h >= 4"])
    arguments = {**CASE.arguments, "padding": [padding, "SAME"]}
    case = Case("symbolic", CASE.lhs, CASE.rhs, arguments)
    compute = jax.jit(jax.value_and_grad(lambda x, w: jnp.sum(case.conv()(x, w)), (0, 1)))
    x, w, _ = case.random()
    program = export.export(compute)(
        jax.ShapeDtypeStruct((batch, rows, *x.shape[2:]), np.float32), w
    )
    _, (dx, dw) = program.call(x, w)
    _, *expected = case.contractions(x, w, np.ones(case.out))
    for a, e, length in zip((dx, dw), expected, case.lengths[1:], strict=True):
        oracle.assert_close(a, e, length)


@pytest.mark.parametrize("padding", [["SAME", "SAME"], ["CAUSAL", ("SAME_LOWER", None)]], ids=str)
def test_rows_with_strides_can_be_symbolic_by_dimension(padding):
    rows = export.symbolic_shape("h")[0]
    arguments = {**CASE.arguments, "window_strides": (2, 1), "padding": padding}
    case = Case("symbolic", CASE.lhs, CASE.rhs, arguments)
    x, w, _ = case.random()
    shape = jax.ShapeDtypeStruct((2, rows, *x.shape[2:]), np.float32)
    program = export.export(jax.jit(case.conv()))(shape, w)
    expected = case.contractions(x, w, np.zeros(case.out))[0]
    oracle.assert_close(program.call(x, w), expected, case.lengths[0])


@pytest.mark.parametrize("kind", ["explicit", "shard_map"])
def test_rows_that_are_padded_are_whole_on_each_device(kind):
    case = divided(CASE)
    x, w, _ = case.random()
    expected = case.contractions(x, w, np.zeros(case.out))[0]
    if kind == "explicit":
        with jax.set_mesh(jax.make_mesh((4, 2), ("data", "group"))):
            placed = jax.device_put(x, P(None, "data", None, "group"))
            out = jax.jit(case.conv())(placed, w)
            assert jax.typeof(out).sharding.spec == P(None, None, None, "group")
    else:
        local = case.conv(feature_group_count=case.groups // 2)
        features = P("data", None, None, "group")
        spread = jax.shard_map(
            local, mesh=MESH, in_specs=(features, P(None, None, None, "group")), out_specs=features
        )
        out = jax.jit(spread)(jax.device_put(x, NamedSharding(MESH, P())), w)
    oracle.assert_close(out, expected, case.lengths[0])
