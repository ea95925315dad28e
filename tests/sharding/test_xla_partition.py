"""Contractions that XLA's own partitioner divides, as on a TPU: the values, on meshes of CPUs.

A TPU's compiler has the same partitioner, and no TPU is needed to see whether it divides rightly
what `xla_partitioner` gives it.
"""

from typing import Any

import jax
import numpy as np
import oracle
import pytest
from cases import Case, any_implementation
from comparison import value_and_gradients
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import (
    CONTRACTIONS,
    DIVIDED,
    SOME,
    SPLITS,
    assert_right,
    contraction_of,
    dense,
    make_mesh,
    on_dimensions,
    random_spec,
    resized,
)
from transformed import TRANSFORMED

from grouped_conv_jax.collectives import collectives
from grouped_conv_jax.partitioning import partition

MESHES = [
    {"data": 2, "group": 2},
    {"data": 4, "group": 2},
    {"a": 2, "b": 2, "c": 2},
    {"devices": 8},
    {"devices": 4},
    {"devices": 2},
    {"a": 3, "b": 2},
]

KINDS_OF_GROUPS = {
    "one group": dense("one group", (8, 6, 5, 16), (3, 3, 16, 16), groups=1),
    "wide groups": dense("wide groups", (8, 6, 5, 32), (3, 3, 16, 64), groups=2),
    "narrow groups": dense("narrow groups", (8, 6, 5, 32), (3, 3, 4, 64), groups=8),
    "depthwise": dense("depthwise", (8, 6, 5, 16), (3, 3, 1, 16), groups=16),
    "multiplied": dense("multiplied", (8, 6, 5, 16), (3, 3, 1, 32), groups=16),
    "one tap": dense("one tap", (8, 6, 5, 32), (1, 1, 16, 64), groups=2),
    "one position": dense("one position", (8, 3, 3, 32), (3, 3, 16, 64), groups=2, padding="VALID"),
    "one example": dense("one example", (1, 6, 5, 32), (3, 3, 16, 64), groups=2),
    "many taps": Case(
        "many taps",
        (1, 200, 32),
        (150, 16, 32),
        {
            "window_strides": (1,),
            "padding": "SAME",
            "dimension_numbers": ("NWC", "WIO", "NWC"),
            "feature_group_count": 2,
        },
    ),
    "large kernel": dense("large kernel", (4, 8, 8, 16), (5, 5, 4, 16), groups=4),
    "sparse": dense(
        "sparse", (4, 8, 8, 16), (3, 3, 4, 16), groups=4, window_strides=(4, 2), rhs_dilation=(2, 1)
    ),
    "strides": dense("strides", (8, 6, 5, 32), (3, 3, 16, 64), groups=2, window_strides=(2, 2)),
}


@pytest.fixture(autouse=True)
def as_on_a_tpu(monkeypatch):
    monkeypatch.setattr(partition, "WITH_CUSTOM_PARTITIONING", frozenset())


def random_shardings(case: Case, seed: int, count: int):
    draw = np.random.default_rng(seed)
    for _ in range(count):
        mesh = make_mesh(**MESHES[draw.integers(len(MESHES))])
        yield mesh, [random_spec(shape, mesh, draw) for shape in case.shapes]


def test_xla_is_not_given_a_callback():
    case = KINDS_OF_GROUPS["wide groups"]
    text = value_and_gradients(case.conv()).lower(*placed(case, "both")[1]).as_text()
    assert "CustomSPMDPartitioning" not in text
    assert "sharding_constraint" in text


def placed(case: Case, split: str):
    axes, batch, features = SPLITS[split]
    mesh = make_mesh(**axes)
    shardings = [
        NamedSharding(mesh, s) for s in on_dimensions(case, batch=batch, features=features)
    ]
    return mesh, [jax.device_put(x, s) for x, s in zip(case.random(), shardings, strict=True)]


@pytest.mark.parametrize("name", KINDS_OF_GROUPS)
def test_random_shardings_are_right(name):
    case = KINDS_OF_GROUPS[name]
    for mesh, specs in random_shardings(case, seed=0, count=3):
        assert_right(case, mesh, specs)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS_OF_GROUPS)
def test_many_random_shardings_are_right(name):
    case = KINDS_OF_GROUPS[name]
    for mesh, specs in random_shardings(case, seed=1, count=40):
        assert_right(case, mesh, specs)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_any_sharding_of_any_case_is_right(seed):
    draw = np.random.default_rng(seed)
    for _ in range(40):
        case = resized(DIVIDED[draw.integers(len(DIVIDED))], draw)
        ((mesh, specs),) = random_shardings(case, int(draw.integers(2**31)), 1)
        assert_right(case, mesh, specs)


# Case, contraction, devices on one axis, shardings of lhs, rhs and out, implementation. XLA gives a
# wrong value for each of them, or ends the process, if it may divide all dimensions.

ROWS, BY_GROUP = P(None, "a"), P(None, None, None, "a")
TALL: dict[str, Any] = {"window_strides": (4, 1), "rhs_dilation": (2, 1)}
FAULTS = [
    (
        dense(
            "depthwise rows", (2, 8, 4, 6), (2, 1, 1, 6), groups=6, window_strides=(2, 1),
            padding=[(1, 2), (2, 3)], rhs_dilation=(2, 1),
        ),
        "wgrad", 8, (ROWS, P(), P()), None,
    ),
    (
        dense("rows", (8, 12, 4, 4), (8, 2, 4, 2), **TALL),
        "dgrad", 4, (ROWS, P(), P()), None,
    ),
    (
        dense("columns to rows", (8, 12, 4, 4), (8, 2, 4, 2), window_strides=(4, 1)),
        "dgrad", 4, (ROWS, P(), P(None, None, "a")), None,
    ),
    (
        dense("each group", (8, 12, 4, 32), (8, 2, 4, 16), groups=8, **TALL),
        "dgrad", 4, (ROWS, P(), P(None, None, "a")), "dense",
    ),
    (
        dense(
            "beyond the neighbours", (2, 12, 2, 2), (8, 1, 2, 2), window_strides=(3, 1),
            rhs_dilation=(2, 1),
        ),
        "dgrad", 4, (ROWS, P(), ROWS), None,
    ),
    (
        dense(
            "far beyond", (2, 16, 2, 2), (8, 1, 2, 2), window_strides=(2, 1),
            padding=[(2, 2), (0, 0)], rhs_dilation=(2, 1),
        ),
        "dgrad", 4, (ROWS, P(), P()), None,
    ),
    (
        dense(
            "kernel larger than the image", (8, 2, 4, 16), (3, 2, 2, 8), groups=8,
            window_strides=(1, 2), padding=[(0, 2), (1, 2)],
        ),
        "dgrad", 8, (BY_GROUP, BY_GROUP, P("a")), None,
    ),
    (
        dense(
            "one row", (8, 2, 4, 16), (3, 2, 2, 8), groups=8, window_strides=(1, 2),
            padding=[(-1, 2), (1, 2)],
        ),
        "dgrad", 8, (BY_GROUP, BY_GROUP, P("a")), None,
    ),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[0].name)
def test_what_xla_is_wrong_about_is_kept_from_it(fault):
    case, contraction, devices, specs, implementation = fault
    mesh = make_mesh(a=devices)
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    operands = case.random()
    placed = [jax.device_put(x, s) for x, s in zip(operands, shardings, strict=True)]
    at = CONTRACTIONS.index(contraction)
    result = {"dgrad": shardings[0], "wgrad": shardings[1]}[contraction]
    function = contraction_of(case, contraction, implementation)
    actual = jax.jit(function, out_shardings=result)(*placed)
    oracle.assert_close(actual, case.contractions(*operands)[at], case.lengths[at])


@any_implementation
@pytest.mark.parametrize("split", ["both", "batch over two axes"])
def test_every_implementation_is_right_or_refuses(split, implementation):
    axes, batch, features = SPLITS[split]
    case = SOME[1]
    specs = on_dimensions(case, batch=batch, features=features)
    assert_right(case, make_mesh(**axes), specs, implementation)


@pytest.mark.parametrize(
    ("name", "implementation", "message"),
    [
        ("wide groups", "lax", "sums batch groups over all axes of a mesh"),
        ("one example", "xla", "miscomputes the feature groups of this kernel gradient"),
        ("depthwise", "vmap", "miscomputes the feature groups of this kernel gradient"),
        ("one tap", "xla", "miscomputes grouped convolutions with one tap or one position, or"),
        ("one position", "packed", "miscomputes grouped convolutions with one tap"),
    ],
)
def test_what_xla_would_miscompute_is_refused(name, implementation, message):
    case = KINDS_OF_GROUPS[name]
    mesh = make_mesh(data=4, group=2)
    operands = jax.device_put(tuple(case.random()), NamedSharding(mesh, P()))
    with pytest.raises(NotImplementedError, match=message) as error:
        value_and_gradients(case.conv(implementation))(*operands)
    assert "these do:" in str(error.value)


@pytest.mark.parametrize("transform", TRANSFORMED, ids=lambda f: f.__name__)
def test_transformed_as_on_one_device(transform):
    case = dense("transformed", (8, 5, 6, 8), (3, 2, 2, 12), groups=4)
    _, (x, w, _) = placed(case, "both")
    expected = jax.jit(transform(case.lax_conv()))(*case.random()[:2])
    length = max(case.lengths) ** 2
    for actual, e in zip(jax.jit(transform(case.conv()))(x, w), expected, strict=True):
        oracle.assert_close(actual, np.asarray(e), length)


@pytest.mark.parametrize("name", ["wide groups", "depthwise", "narrow groups", "one tap"])
@pytest.mark.parametrize("sizes", [(4, 2), (2, 4)], ids=str)
def test_the_kernel_gradient_is_summed_over_the_axes_of_the_batch(name, sizes):
    """lax's own is multiplied by the size of the other axis: see test_partition_by_xla.py."""
    case = KINDS_OF_GROUPS[name]
    mesh = make_mesh(data=sizes[0], other=sizes[1])
    batched, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    x, w, y = case.random()
    operands = jax.device_put((x, w, y), (batched, whole, batched))
    function = jax.jit(contraction_of(case, "wgrad"), out_shardings=whole)
    expected = oracle.kernel_gradient(x, y, w.shape, **case.arguments)
    oracle.assert_close(function(*operands), expected, case.lengths[2])
    # XLA:CPU may gather the batch instead.
    found = collectives(function.lower(*operands).compile(), mesh)
    assert {c.axes for c in found} == {("data",)}
