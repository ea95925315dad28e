"""What `explain` says of convolutions and of functions, without running them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import named
from comparison import value_and_gradients
from fake_algorithms import algorithm
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tunings import FOR_VMAP, HERE, made_up

from grouped_conv_jax import Explanation, explain, grouped_conv, implementations
from grouped_conv_jax.algorithms import choice
from grouped_conv_jax.algorithms.table import TABLE, unsupported
from grouped_conv_jax.algorithms.xla import Xla
from grouped_conv_jax.towers import make_mesh

XLA = Xla()
CONTRACTIONS = ("fprop", "dgrad", "wgrad")
(CASE,) = named("NHWC")
X, W, Y = CASE.random()
CONV = CASE.conv()


def chosen(explanation: Explanation) -> dict[str, str]:
    return {row.contraction: row.implementation for row in explanation.rows if row.is_chosen}


def times(explanation: Explanation) -> dict[str, int]:
    return {rows[0].contraction: rows[0].times for rows in explanation.contractions}


def local_shapes(explanation: Explanation) -> set[tuple[tuple[int, ...], int]]:
    """The shapes of the inputs and the groups of what one device computes."""
    return {(row.spec.lhs_shape, row.spec.feature_group_count) for row in explanation.rows}


# One convolution.


def test_a_convolution_is_explained_in_all_contractions():
    explanation = explain(X, W, **CASE.arguments)
    assert times(explanation) == dict.fromkeys(CONTRACTIONS, 1)
    assert len(explanation.rows) == 3 * len(implementations())
    for row in explanation.rows:
        arguments = row.contraction, row.spec, HERE
        assert row.reason == unsupported(row.implementation, *arguments)
        assert row.is_chosen == (row.implementation == choice.choose(*arguments))
        assert row.device == HERE
        assert not row.is_asked_for
        assert row.measured_seconds is None
        if row.expected_seconds is not None:
            assert row.expected_seconds == TABLE[row.implementation].seconds(*arguments)
        assert row.flops == 2 * 2 * 4 * 6 * 6 * 3 * 2 * 2
        assert row.nbytes == 4 * (X.size + W.size + Y.size)
        assert row.description == "2x7x6x4 -> 2x4x6x6, 3x2, 2 groups of 2->3, stride 2x1, float32"


def test_shapes_are_enough_and_arguments_may_be_named():
    x, w = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (X, W))
    assert explain(lhs=x, rhs=w, **CASE.arguments) == explain(X, W, **CASE.arguments)
    padding, strides = CASE.arguments["padding"], CASE.arguments["window_strides"]
    layout = CASE.arguments["dimension_numbers"]
    positional = explain(x, w, strides, padding, None, (1, 1), layout, 2, 1, None, np.float32)
    assert positional == explain(X, W, **CASE.arguments)


def test_integers_have_no_gradients():
    explanation = explain(X.astype(np.int8), W.astype(np.int8), **CASE.arguments)
    assert times(explanation) == {"fprop": 1}


def test_what_is_asked_for_is_chosen():
    explanation = explain(X, W, **CASE.arguments, implementation="vmap")
    assert chosen(explanation) == dict.fromkeys(CONTRACTIONS, "vmap")
    assert {row.implementation for row in explanation.rows if row.is_asked_for} == {"vmap"}


def test_why_not(monkeypatch):
    fussy = algorithm(
        supports=lambda *_: "it rains", seconds=lambda *_: 0.0, fprop=XLA.fprop, wgrad=XLA.wgrad
    )
    monkeypatch.setitem(TABLE, "fussy", fussy)
    explanation = explain(X, W, **CASE.arguments)
    reasons = {r.contraction: r.reason for r in explanation.rows if r.implementation == "fussy"}
    assert reasons == {"fprop": "it rains", "dgrad": "it has no dgrad", "wgrad": "it rains"}
    assert "fussy                        not supported: it rains" in str(explanation)
    assert all(r.expected_seconds is None for r in explanation.rows if r.implementation == "fussy")


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("rank 0", "5x4 -> 5x6, no taps, 2 groups of 2->3, float32"),
        ("rank 1", "3x4x9 -> 3x6x5, 3, 2 groups of 2->3, stride 2, float32"),
        ("one group", "2x3x6x5 -> 2x4x6x5, 3x3, 1 group of 3->4, stride 1, float32"),
        (
            "both dilated, strided, cropped, three groups",
            "6x2x5x6 -> 2x3x9x6, 3x2, 3 groups of 2->3, stride 2x3, lhs dilation 2x3, "
            "rhs dilation 3x2, float32",
        ),
    ],
)
def test_descriptions(name, description):
    (case,) = named(name)
    (rows, *_) = explain(case.conv(), *case.random()[:2]).contractions
    assert rows[0].description == description


# Functions.


def test_a_function_is_counted():
    def function(x, w):
        y = CONV(x, w) + jax.checkpoint(CONV)(x, w) + CONV(x[:1], w)
        return jax.lax.scan(lambda y, _: (y + jax.jit(CONV)(x, w), None), y, length=3)[0]

    found = {r[0].spec.lhs_shape[0]: r[0].times for r in explain(function, X, W).contractions}
    assert found == {1: 1, 2: 5}
    assert explain(jnp.sin, X).rows == ()
    assert str(explain(jnp.sin, X)) == "No grouped convolutions."
    (empty,) = named("no examples")
    assert explain(empty.conv(), *empty.random()[:2]).rows == ()


def test_gradients_are_explained_where_the_function_takes_them():
    step = value_and_gradients(CONV)
    assert times(explain(step, X, W, Y)) == dict.fromkeys(CONTRACTIONS, 1)
    assert times(explain(CONV, X, W)) == {"fprop": 1}
    second = jax.grad(lambda x: jnp.sum(jnp.sin(jax.grad(lambda x: jnp.sum(CONV(x, W) ** 2))(x))))
    assert times(explain(second, X)) == {"fprop": 2, "dgrad": 2}


def test_mapped_convolutions_are_explained_as_one():
    explanation = explain(jax.vmap(CONV), np.stack([X] * 3), np.stack([W] * 3))
    assert local_shapes(explanation) == {((2, 7, 6, 12), 6)}


def test_arguments_may_be_trees_named_and_static():
    def function(arrays, name, *, w, preferred):
        assert name == "static"
        return grouped_conv(arrays["x"], w, **CASE.arguments, preferred_element_type=preferred)

    explanation = explain(function, {"x": X}, "static", w=W, preferred=np.float32)
    assert times(explanation) == {"fprop": 1}
    compiled = jax.jit(function, static_argnames=("name", "preferred"))
    assert explain(compiled, {"x": X}, "static", w=W, preferred=np.float32) == explanation


def test_nothing_is_run_or_lowered(monkeypatch):
    def work(*_):
        raise AssertionError("it was lowered")

    monkeypatch.setitem(TABLE, "eager", algorithm(seconds=lambda *_: -1.0, fprop=work))
    ran = []

    def function(x, w):
        jax.debug.callback(lambda: ran.append(1))
        return CONV(x, w)

    # With several devices, it would have to be lowered to know whether they share the work.
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert chosen(explain(function, X, W)) == {"fprop": "eager"}
    assert ran == []


def test_a_refusal_is_part_of_the_explanation(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setitem(TABLE, "nothing", algorithm(supports=lambda *_: "no", fprop=XLA.fprop))
    explanation = explain(CASE.conv("nothing"), X, W)
    assert chosen(explanation) == {"fprop": "nothing"}
    assert "asked for, not supported: no" in str(explanation)


# Times.


def test_a_tuning_is_shown_with_its_choice():
    step = value_and_gradients(CONV)
    tuning = made_up(step, X, W, Y, times={**FOR_VMAP, "dense": None})
    with tuning:
        inside = explain(step, X, W, Y)
    assert chosen(inside) == dict.fromkeys(CONTRACTIONS, "vmap")
    assert explain(step, X, W, Y, tuning=tuning) == inside
    assert chosen(explain(step, X, W, Y)) != chosen(inside)
    measured = {r.implementation: r.measured_seconds for r in inside.rows}
    assert measured["vmap"] == FOR_VMAP["vmap"]
    assert measured["taps"] is None
    failed = {r.reason for r in inside.rows if r.implementation == "dense"}
    assert failed == {"it failed when it was measured"}


def test_the_tables(monkeypatch):
    for name, known in TABLE.items():
        time = 1e-4 * len(name)
        monkeypatch.setattr(type(known), "seconds", lambda *_, time=time: time)
    tuning = made_up(CONV, X, W, times=FOR_VMAP)

    def twice(x, w):
        return CONV(x, w) + CONV(2 * x, w)

    first, second = str(explain(twice, X, W, tuning=tuning)), str(explain(twice, X, W))
    description = "fprop: 2x7x6x4 -> 2x4x6x6, 3x2, 2 groups of 2->3, stride 2x1, float32"
    assert first.splitlines()[:3] == [
        description,
        "2 times on cpu, 6.9 kFLOP, 2.8 kB",
        "   implementation  expected ms  measured ms",
    ]
    assert {
        "   xla                   0.300        2.000",
        "*  vmap                  0.400        1.000",
        "   packed                0.600               only if asked for",
    } <= set(first.splitlines())
    assert second.splitlines()[:4] == [
        *first.splitlines()[:2],
        "   implementation  expected ms",
        "*  xla                   0.300",
    ]


# Several devices.


@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_the_shapes_of_one_device(axes):
    mesh = make_mesh(2, 2)
    if axes == "Explicit":
        kinds = (jax.sharding.AxisType.Explicit,) * 2
        mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, kinds)
    x = jax.device_put(X, NamedSharding(mesh, P("data", None, None, "group")))
    w = jax.ShapeDtypeStruct(
        W.shape, W.dtype, sharding=NamedSharding(mesh, P(None, None, None, "group"))
    )
    explanation = explain(x, w, **CASE.arguments)
    assert times(explanation) == dict.fromkeys(CONTRACTIONS, 1)
    assert local_shapes(explanation) == {((1, 7, 6, 2), 1)}

    def loop(x, w):
        return jax.lax.scan(lambda y, _: (y + CONV(x, w), None), CONV(x, w), length=3)[0]

    assert times(explain(loop, x, w)) == {"fprop": 4}
    assert local_shapes(explain(loop, x, w)) == {((1, 7, 6, 2), 1)}


def test_one_convolution_that_is_shared_in_two_ways():
    mesh = make_mesh(2, 1)
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    y = jax.device_put(X, NamedSharding(mesh, P()))
    explanation = explain(lambda x, y, w: (CONV(x, w), CONV(y, w), CONV(x + 1, w)), x, y, W)
    found = {r[0].spec.lhs_shape[0]: r[0].times for r in explanation.contractions}
    assert found == {1: 2, 2: 1}


def test_the_work_of_one_device_in_shard_map():
    mesh, examples = make_mesh(2, 1), P("data")
    spread = jax.shard_map(CONV, mesh=mesh, in_specs=(examples, P()), out_specs=examples)
    assert local_shapes(explain(spread, X, W)) == {((1, 7, 6, 4), 2)}
    both = explain(lambda x, w: spread(x, w) + CONV(x, w), X, W)
    assert local_shapes(both) >= {((1, 7, 6, 4), 2)}
    assert sum(r[0].times for r in both.contractions) == 2


def test_axes_that_are_not_manual_leave_the_work_whole():
    mesh, examples = make_mesh(2, 2), P("data")
    spread = jax.shard_map(
        CONV, mesh=mesh, in_specs=(examples, P()), out_specs=examples, axis_names={"data"}
    )
    assert local_shapes(explain(spread, X, W)) == {((1, 7, 6, 4), 2)}


def test_what_is_in_pmap():
    assert local_shapes(explain(jax.pmap(CONV, in_axes=(0, None)), X[:, None], W)) == {
        ((1, 7, 6, 4), 2)
    }


# Profiles.


@pytest.mark.parametrize("name", implementations())
def test_a_compiled_program_names_the_implementation(name):
    (case,) = named("depthwise, multiplier 2")
    program = jax.jit(case.conv(name)).lower(*case.random()[:2]).compile()
    found = set(re.findall(r'op_name="[^"]*grouped_conv\.(\w+\.\w+)', program.as_text() or ""))
    assert found == {f"fprop.{name}"}


def test_a_compiled_program_names_all_contractions():
    program = value_and_gradients(CASE.conv("xla")).lower(X, W, Y).compile()
    found = set(re.findall(r'op_name="[^"]*grouped_conv\.(\w+\.\w+)', program.as_text() or ""))
    assert found == {f"{contraction}.xla" for contraction in CONTRACTIONS}
