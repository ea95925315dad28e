"""Algorithms of a program's own, of one contraction, with configs, and chosen by contraction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import named
from comparison import assert_matches_the_oracle, value_and_gradients
from fake_algorithms import CPU, algorithm
from jaxprs import convolutions

from grouped_conv_jax import Tuning, explain, grouped_conv, implementations, tune
from grouped_conv_jax.algorithms import Device, choice, register, table
from grouped_conv_jax.algorithms.xla import Xla
from grouped_conv_jax.linen import GroupedConv as LinenGroupedConv
from grouped_conv_jax.nnx import GroupedConv

XLA = Xla()
(CASE,) = named("NHWC")
X, W, Y = CASE.random()


@pytest.fixture
def registered():
    """Registers algorithms, and removes them afterwards."""
    before = dict(table.TABLE)
    yield register
    for name in table.TABLE.keys() - before:
        del table.TABLE[name], table._registered[name]


def test_a_registered_algorithm_is_known_everywhere(registered):
    registered("mine", algorithm(fprop=XLA.fprop, seconds=lambda *_: -1.0))
    assert implementations()[-1] == "mine"
    rows = explain(CASE.conv(), X, W).rows
    assert [row.implementation for row in rows if row.is_chosen] == ["mine"]
    assert "mine" in dict(tune(CASE.conv(), X, W, repeats=1).measurements[0].seconds)


def test_the_gradient_of_a_forward_algorithm_is_chosen_automatically(registered):
    registered("forward", algorithm(fprop=XLA.fprop))
    step = value_and_gradients(CASE.conv({"fprop": "forward"}))
    text = step.lower(X, W, Y).as_text(debug_info=True)
    assert "grouped_conv.fprop.forward" in text
    assert "grouped_conv.dgrad.forward" not in text
    assert_matches_the_oracle(step(X, W, Y), CASE, (X, W, Y))


@pytest.mark.parametrize("device", [CPU, Device("cuda"), Device("tpu")], ids=lambda d: d.platform)
def test_the_least_seconds_are_chosen_on_every_platform(device, registered):
    (equation,) = convolutions(CASE.conv(), X, W)
    registered("best", algorithm(wgrad=XLA.wgrad, seconds=lambda *_: 1e-12))
    assert choice.choose("wgrad", equation.params["spec"], device) == "best"
    assert choice.choose("fprop", equation.params["spec"], device) != "best"


def test_configs_are_measured_stored_and_chosen(registered, tmp_path):
    seen = []

    def fprop(lhs, rhs, spec, config=None):
        seen.append(config)
        return XLA.fprop(lhs, rhs, spec)

    tiled = algorithm(fprop=fprop, configs=lambda *_: {"small": 8, "large": 128})
    registered("tiled", tiled)
    (measurement,) = tune(CASE.conv(), X, W, repeats=1).measurements
    assert {"tiled", "tiled:small", "tiled:large"} <= dict(measurement.seconds).keys()
    assert {None, 8, 128} == {*seen}
    times = tuple((name, 0.5 if name == "tiled:large" else 1.0) for name, _ in measurement.seconds)
    fastest_first = sorted(times, key=lambda pair: pair[1])
    Tuning((type(measurement)(measurement.subject, tuple(fastest_first)),)).save(tmp_path / "t")
    seen.clear()
    with Tuning.load(tmp_path / "t"):
        np.testing.assert_allclose(CASE.conv()(X, W), CASE.conv("xla")(X, W), 1e-5, 1e-5)
        rows = explain(CASE.conv(), X, W).rows
    assert {*seen} == {128}
    assert [row.implementation for row in rows if row.is_chosen] == ["tiled:large"]


def test_a_config_may_be_asked_for(registered):
    registered("tiled", algorithm(fprop=lambda x, w, spec, _=1: XLA.fprop(x, w, spec)))
    with pytest.raises(NotImplementedError, match="it has no config 'huge', it has none"):
        CASE.conv("tiled:huge")(X, W)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        (3, algorithm(fprop=XLA.fprop), TypeError, "name must be a string, got 3"),
        ("a b", algorithm(fprop=XLA.fprop), ValueError, "name must be an identifier"),
        ("taps", algorithm(fprop=XLA.fprop), ValueError, "an implementation 'taps' already"),
        ("mine", XLA.fprop, TypeError, "algorithm must be an instance of a subclass"),
        ("mine", algorithm(), ValueError, "must override at least one of fprop, dgrad and wgrad"),
    ],
)
def test_what_cannot_be_registered(name, value, error, message):
    with pytest.raises(error, match=message):
        register(name, value)


@pytest.mark.parametrize(
    ("implementation", "error", "message"),
    [
        ({"forward": "taps"}, ValueError, "unknown contraction 'forward' in implementation; known"),
        ({"fprop": "tapz"}, ValueError, "unknown implementation 'tapz'; known"),
        ({"fprop": 3}, TypeError, "a mapping from contractions to names, or None, got int"),
        (["taps"], TypeError, "implementation must be a name, a mapping"),
    ],
)
def test_what_cannot_be_asked_for(implementation, error, message):
    with pytest.raises(error, match=message):
        CASE.conv(implementation)(X, W)


def test_a_mapping_goes_through_transformations_and_layers():
    asked = {"fprop": "taps", "wgrad": "dense"}
    x, w = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 2, 4))

    def loss(x, w):
        y = grouped_conv(
            x,
            w,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
            implementation=asked,
        )
        return jnp.sum(y**2)

    def square_sum(y):
        return jnp.sum(y**2)

    layer = GroupedConv(4, 4, (3, 3), feature_group_count=2, implementation=asked, rngs=_rngs())
    linen = LinenGroupedConv(4, (3, 3), feature_group_count=2, implementation=asked)
    variables = linen.init(jax.random.key(0), x)
    functions = {
        "function": lambda x: jax.grad(loss, argnums=(0, 1))(x, w),
        "vmap": lambda x: jax.vmap(jax.grad(loss, argnums=(0, 1)), (0, None))(x[None], w),
        "nnx": lambda x: jax.grad(lambda layer, x: square_sum(layer(x)))(layer, x),
        "linen": lambda x: jax.grad(lambda v: jnp.sum(jnp.asarray(linen.apply(v, x)) ** 2))(
            variables
        ),
    }
    for name, function in functions.items():
        text = jax.jit(function).lower(x).as_text(debug_info=True)
        assert "grouped_conv.fprop.taps" in text, name
        assert "grouped_conv.wgrad.dense" in text, name
        assert "grouped_conv.wgrad.taps" not in text, name


def _rngs():
    from flax import nnx

    return nnx.Rngs(0)
