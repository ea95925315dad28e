"""Layers of inputs whose sizes are symbols, or whose shardings are types."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from flax_layers import IN_FEATURES, Layer, as_function, assert_trees_close, randomized
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# Those that Flax's Conv would pad by itself are in the default run.
each_string = pytest.mark.parametrize(
    "padding",
    [
        "CAUSAL",
        "CIRCULAR",
        "REFLECT",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("SAME", "VALID", "REPLICATE")),
    ],
)


def padded(padding: Any) -> Layer:
    return Layer(
        "GroupedConv", dict(kernel_size=(3, 2), feature_group_count=3, padding=padding), (4, 5)
    )


def of_both_kinds(layer: Layer) -> tuple[Any, Any, Any]:
    """The parameters, and functions of them and an input."""
    params, apply = as_function(layer.nnx())
    of_linen = layer.linen()
    return randomized(params), apply, lambda params, x: of_linen.apply({"params": params}, x)


@pytest.mark.parametrize("kind", [0, 1], ids=["nnx", "linen"])
@each_string
def test_rows_can_be_symbolic_under_a_string_as_under_a_list(kind, padding):
    params, *functions = of_both_kinds(padded(padding))
    _, *listed = of_both_kinds(padded([padding] * 2))
    shape = export.symbolic_shape(f"n, h, w, {IN_FEATURES}", constraints=["h >= 3", "w >= 3"])

    def both(params, x):
        return functions[kind](params, x), listed[kind](params, x)

    program = export.export(jax.jit(both))(
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params),
        jax.ShapeDtypeStruct(shape, np.float32),
    )
    x = padded(padding).inputs(2)
    by_string, by_list = program.call(params, x)
    np.testing.assert_array_equal(by_string, by_list)
    assert_trees_close(by_string, functions[kind](params, x))


@each_string
def test_rows_can_be_sharded_under_a_string_as_under_a_list(padding):
    mesh = jax.make_mesh((2,), ("rows",), (AxisType.Explicit,), devices=jax.devices()[:2])
    params, *functions = of_both_kinds(padded(padding))
    _, *listed = of_both_kinds(padded([padding] * 2))
    x = padded(padding).inputs(2)
    sharding = NamedSharding(mesh, PartitionSpec(None, "rows"))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        sharded = jax.device_put(x, sharding)
        found = jax.jit(lambda *given: [f(*given) for f in (*functions, *listed)])(params, sharded)
    assert len({y.sharding.spec for y in found}) == 1
    alone, *_ = of_both_kinds(padded(padding))
    expected = jax.jit(functions[0])(alone, x)
    assert_trees_close([np.asarray(y) for y in found], [np.asarray(expected)] * 4)


@pytest.mark.parametrize("kind", [0, 1], ids=["nnx", "linen"])
def test_the_time_of_a_causal_layer_can_be_symbolic(kind):
    layer = Layer("CausalConv", dict(kernel_size=3, kernel_dilation=2), (9,))
    params, *functions = of_both_kinds(layer)
    # Shorter sequences than the past that an output sees, too.
    shape = export.symbolic_shape(f"n, t, {IN_FEATURES}", constraints=["t >= 1"])
    program = export.export(jax.jit(functions[kind]))(
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params),
        jax.ShapeDtypeStruct(shape, np.float32),
    )
    assert program.out_avals[0].shape[1] == shape[1]
    for x in (layer.inputs(2), layer.inputs(2)[:, :2]):
        assert_trees_close(program.call(params, x), functions[kind](params, x))


@pytest.mark.parametrize(
    "layer",
    [
        Layer("GroupedConv", dict(kernel_size=(2, 3), feature_group_count=3), (4, 5)),
        Layer("GroupedConvTranspose", dict(kernel_size=(2, 3), feature_group_count=3), (4, 5)),
        Layer("GroupedConvLocal", dict(kernel_size=(2, 3), feature_group_count=3), (4, 5)),
        Layer("CausalConv", dict(kernel_size=4, feature_group_count=3), (9,)),
    ],
    ids=lambda layer: layer.name,
)
def test_an_out_sharding_says_what_does_not_follow(layer):
    """Where the taps are does not say where the outputs are to be."""
    mesh = jax.make_mesh((2,), ("taps",), (AxisType.Explicit,), devices=jax.devices()[:2])

    def typed(shape: Any, *axes: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    graphdef, params, rest = nnx.split(nnx.eval_shape(layer.nnx), nnx.Param, ...)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: typed(leaf, *["taps"] * ("kernel" in jax.tree_util.keystr(path))), params
    )
    x = typed(layer.inputs(2))
    wanted = PartitionSpec("taps", *[None] * (len(x.shape) - 1))

    def outputs(method, out_sharding):
        def call(params, x):
            return getattr(nnx.merge(graphdef, params, rest), method)(x, out_sharding=out_sharding)

        with jax.set_mesh(mesh):
            return jax.eval_shape(call, params, x)

    methods = ("__call__", "stream") if layer.name == "CausalConv" else ("__call__",)
    for method in methods:
        with pytest.raises(ValueError, match=r"out_sharding=jax\.P"):
            outputs(method, None)
        y = outputs(method, wanted)
        assert (y[0] if method == "stream" else y).sharding.spec == wanted
