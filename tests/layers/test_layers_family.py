"""What all layers have in common: linen's is nnx's, with any batch dimensions and all options."""

import copy
import pickle
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax_layers import Layer, as_function, assert_trees_close, kernels, randomized
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxprs import convolutions

# One of each.
FAMILY = {
    layer.name: layer
    for layer in (
        Layer("GroupedConv", dict(kernel_size=(3, 2), feature_group_count=3), (4, 5)),
        Layer("DepthwiseConv", dict(kernel_size=(3, 2), channel_multiplier=2), (4, 5)),
        Layer("SeparableConv", dict(kernel_size=(3, 2), strides=2), (4, 5)),
        Layer(
            "GroupedConvTranspose",
            dict(kernel_size=(3, 2), strides=2, feature_group_count=3),
            (3, 4),
        ),
        Layer("GroupedConvLocal", dict(kernel_size=(3, 2), feature_group_count=3), (4, 3)),
        Layer("CausalConv", dict(kernel_size=3, kernel_dilation=2), (9,)),
    )
}

# More of them, with every option that changes what is computed.
MORE = {
    "one dimension": Layer("DepthwiseConv", dict(kernel_size=3, kernel_dilation=2), (8,)),
    "three dimensions": Layer(
        "DepthwiseConv", dict(kernel_size=(2, 1, 3), strides=(1, 2, 1)), (3, 4, 3)
    ),
    "a dilated input": Layer(
        "DepthwiseConv",
        dict(kernel_size=(3, 2), input_dilation=(2, 1), padding=[(1, 1), "CIRCULAR"]),
        (3, 4),
    ),
    "no bias": Layer(
        "DepthwiseConv", dict(kernel_size=(3, 3), use_bias=False, padding="REFLECT"), (4, 4)
    ),
    "separable in three dimensions": Layer(
        "SeparableConv", dict(kernel_size=(2, 1, 2), channel_multiplier=3), (3, 2, 3)
    ),
    "transposed in one dimension": Layer(
        "GroupedConvTranspose", dict(kernel_size=3, strides=3, feature_group_count=2), (5,)
    ),
    "transposed in three": Layer(
        "GroupedConvTranspose",
        dict(kernel_size=(2, 1, 3), strides=(1, 2, 1), feature_group_count=6, padding="VALID"),
        (3, 2, 3),
    ),
    "transposed kernel": Layer(
        "GroupedConvTranspose",
        dict(
            kernel_size=(3, 2),
            strides=(2, 3),
            feature_group_count=3,
            transpose_kernel=True,
            output_padding=1,
            kernel_dilation=2,
            padding="CIRCULAR",
        ),
        (3, 4),
    ),
    "local in one dimension": Layer(
        "GroupedConvLocal", dict(kernel_size=3, strides=2, feature_group_count=1), (7,)
    ),
    "local in three": Layer(
        "GroupedConvLocal",
        dict(kernel_size=(2, 1, 2), padding="VALID", feature_group_count=2, use_bias=False),
        (3, 2, 3),
    ),
    "causal groups": Layer("CausalConv", dict(kernel_size=(4,), feature_group_count=2), (7,)),
}

each_layer = pytest.mark.parametrize("layer", FAMILY.values(), ids=FAMILY)


@pytest.mark.parametrize("layer", [*FAMILY.values(), *MORE.values()], ids=[*FAMILY, *MORE])
def test_linen_is_nnx_and_batch_dimensions_are_examples(layer):
    params, apply = as_function(layer.nnx())
    params, x = randomized(params), layer.inputs(2, 3)
    of_linen = layer.linen()
    shapes = jax.eval_shape(of_linen.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)

    @jax.jit
    def outputs(params, x):
        together = of_linen.apply({"params": params}, x)
        return together[1], together[1, 2], apply(params, x[1]), apply(params, x[1, 2])

    batch, one, nnx_batch, nnx_one = outputs(params, x)
    assert_trees_close((nnx_batch, nnx_one), (batch, one))


@each_layer
def test_masks(layer):
    params, _ = as_function(layer.nnx())
    params = randomized(params)
    masks = {
        name.replace("kernel_init", "mask").replace("_init", "_mask"): np.float32(kernel > 0)
        for name, kernel in kernels(params).items()
    }
    masked = jax.tree.map(
        lambda leaf: jnp.where(leaf > 0, leaf, 0) if leaf.ndim > 2 else leaf, params
    )
    if "bias" in params:
        masked["bias"] = params["bias"]
    _, apply = as_function(layer.nnx(**masks))
    _, unmasked = as_function(layer.nnx())
    of_linen = layer.linen(**masks)

    @jax.jit
    def outputs(x):
        return (
            apply(params, x),
            of_linen.apply({"params": params}, x),
            unmasked(masked, x),
            unmasked(params, x),
        )

    nnx_masked, linen_masked, expected, whole = outputs(layer.inputs(2))
    assert_trees_close((nnx_masked, linen_masked), (expected, expected))
    assert jnp.abs(whole - expected).max() > 0.1


@each_layer
def test_a_mask_of_another_shape_is_refused(layer):
    name = "depthwise_mask" if layer.name == "SeparableConv" else "mask"
    mask = {name: np.ones((3, 2, 5), np.float32)}
    with pytest.raises(ValueError, match=r"[Mm]ask .*shape.*\(3, 2, 5\)"):
        jax.eval_shape(layer.linen(**mask).init, jax.random.key(0), layer.inputs(2))
    with pytest.raises(ValueError, match=r"[Mm]ask .*shape.*\(3, 2, 5\)"):
        jax.eval_shape(layer.nnx(**mask), layer.inputs(2))


@each_layer
def test_dtypes(layer):
    def types(x_dtype: Any, **settings: Any):
        x = jax.ShapeDtypeStruct(layer.inputs(2).shape, x_dtype)
        of_linen = layer.linen(**settings)
        y, variables = jax.eval_shape(of_linen.init_with_output, jax.random.key(0), x)
        of_nnx = nnx.eval_shape(lambda: layer.nnx(**settings))
        params, _ = as_function(of_nnx)
        dtypes = {leaf.dtype for leaf in jax.tree.leaves((variables["params"], params))}
        assert len(dtypes) == 1
        assert jax.eval_shape(lambda m, x: m(x), of_nnx, x).dtype == y.dtype
        return y.dtype, dtypes.pop()

    f32, f16, bf16 = np.dtype(np.float32), np.dtype(np.float16), jnp.dtype(jnp.bfloat16)
    assert types(f32) == (f32, f32)
    with jax.numpy_dtype_promotion("standard"):
        assert types(bf16) == (f32, f32)
    assert types(bf16, param_dtype=bf16) == (bf16, bf16)
    assert types(f32, dtype=bf16) == (bf16, f32)
    assert types(f32, dtype=f16, param_dtype=bf16) == (f16, bf16)


@each_layer
def test_a_preferred_element_type_is_that_of_the_output(layer):
    settings: dict[str, Any] = dict(dtype=jnp.bfloat16, preferred_element_type=jnp.float32)
    x, of_linen = layer.inputs(2), layer.linen(**settings)
    # Flax's own Conv leaves it to the addition to promote the bias.
    with jax.numpy_dtype_promotion("standard"):
        y, _ = jax.eval_shape(of_linen.init_with_output, jax.random.key(0), x)
        assert jax.eval_shape(layer.nnx(**settings), x).dtype == y.dtype == jnp.float32


@each_layer
def test_precision_and_implementation_are_passed_on(layer):
    settings: dict[str, Any] = dict(precision="highest")
    if layer.name != "GroupedConvLocal":
        settings["implementation"] = "dense"
    x = layer.inputs(2)
    of_nnx, of_linen = layer.nnx(**settings), layer.linen(**settings)
    variables = jax.eval_shape(of_linen.init, jax.random.key(0), x)
    for found in (convolutions(of_nnx, x), convolutions(of_linen.apply, variables, x)):
        assert len(found) == {"SeparableConv": 2, "GroupedConvLocal": 0}.get(layer.name, 1)
        for equation in found:
            assert equation.params["implementation"] == "dense"
            assert equation.params["spec"].precision == "highest"


@pytest.mark.parametrize("name", ["GroupedConv", "DepthwiseConv", "CausalConv"])
def test_the_implementation_may_be_set_afterwards(name):
    layer = FAMILY[name]
    made, x = layer.nnx(), layer.inputs(2)
    made.implementation = "patches"
    (equation,) = convolutions(made, x)
    assert equation.params["implementation"] == "patches"
    another = layer.nnx(implementation="patches")
    assert nnx.graphdef(made) == nnx.graphdef(another)
    assert made.conv_general_dilated == another.conv_general_dilated
    made.implementation = "fast"
    with pytest.raises(ValueError, match="unknown implementation 'fast'"):
        made(x)
    with pytest.raises(TypeError, match=f"{name} .* takes no conv_general_dilated"):
        made.conv_general_dilated = jax.lax.conv_general_dilated


@each_layer
def test_partitioning_metadata_is_kept(layer):
    params, _ = as_function(nnx.eval_shape(layer.nnx))
    kernels_axes = {
        name: (*(None,) * (kernel.ndim - 1), "group") for name, kernel in kernels(params).items()
    }
    wanted = {
        name: linen.with_partitioning(linen.initializers.lecun_normal(), axes)
        for name, axes in kernels_axes.items()
    }
    x = layer.inputs(2)
    of_linen = layer.linen(**wanted)
    variables = jax.eval_shape(of_linen.init, jax.random.key(0), x)
    found = kernels(linen.get_partition_spec(variables)["params"])
    assert found == {name: PartitionSpec(*axes) for name, axes in kernels_axes.items()}
    assert jax.eval_shape(of_linen.apply, variables, x).shape[0] == 2

    def made():
        inits = {
            name: nnx.with_partitioning(nnx.initializers.lecun_normal(), axes)
            for name, axes in kernels_axes.items()
        }
        return layer.nnx(**inits)

    with jax.set_mesh(jax.make_mesh((2,), ("group",), (AxisType.Auto,))):
        state = nnx.state(nnx.eval_shape(made), nnx.Param)
    assert kernels(nnx.to_pure_dict(nnx.get_partition_spec(state))) == found


@each_layer
def test_metadata_of_the_parameters_is_kept(layer):
    of_kernel, of_bias = {"layer": "kernel"}, {"layer": "bias"}
    if layer.name == "SeparableConv":
        made = layer.nnx(depthwise_metadata=of_kernel, bias_metadata=of_bias)
        assert made.depthwise.kernel.get_metadata()["layer"] == "kernel"
        made = layer.nnx(pointwise_metadata=of_kernel, bias_metadata=of_bias).pointwise
    else:
        made = layer.nnx(kernel_metadata=of_kernel, bias_metadata=of_bias)
    assert made.kernel.get_metadata()["layer"] == "kernel"
    assert made.bias.get_metadata()["layer"] == "bias"


@each_layer
def test_equal_layers_are_equal_static_data(layer):
    made = layer.nnx()
    listed = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in layer.settings.items()
    }
    others = (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), layer.nnx(**listed))
    graphdef = nnx.graphdef(made)
    for other in others:
        assert nnx.graphdef(other) == graphdef
        assert hash(nnx.graphdef(other)) == hash(graphdef)
    if layer.name != "GroupedConvLocal":
        assert nnx.graphdef(layer.nnx(implementation="xla")) != graphdef
    of_linen = layer.linen()
    assert of_linen == layer.linen()
    assert hash(of_linen) == hash(of_linen.clone()) == hash(copy.deepcopy(of_linen))


@each_layer
def test_equal_layers_are_compiled_once(layer):
    chex.clear_trace_counter()

    apply: Any = nnx.jit(chex.assert_max_traces(n=1)(lambda made, x: made(x)))
    x = layer.inputs(2)
    first, second = (apply(made, x) for made in (layer.nnx(), layer.nnx()))
    np.testing.assert_array_equal(first, second)


@each_layer
def test_explicit_shardings_follow_from_the_operands(layer):
    """The batch of the inputs and the outputs of the kernel are sharded, and so is the output."""
    mesh = jax.make_mesh(
        (2, 3), ("data", "group"), (AxisType.Explicit,) * 2, devices=jax.devices()[:6]
    )

    def sharded(shape: Any, *axes: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    params, apply = as_function(nnx.eval_shape(layer.nnx))
    params = jax.tree.map(lambda leaf: sharded(leaf, *[None] * (leaf.ndim - 1), "group"), params)
    if layer.name == "SeparableConv":
        # A pointwise layer of one group needs all of the features between.
        params["depthwise"] = jax.tree.map(sharded, params["depthwise"])
    x = sharded(layer.inputs(2), "data")
    with jax.set_mesh(mesh):
        y = jax.eval_shape(apply, params, x)
        of_linen = jax.eval_shape(layer.linen().apply, {"params": params}, x)
    assert y.sharding == of_linen.sharding
    assert y.sharding.spec == PartitionSpec("data", *[None] * (y.ndim - 2), "group")
