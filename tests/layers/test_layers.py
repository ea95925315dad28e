"""`GroupedConv` is Flax's own Conv: the same parameters, the same outputs and gradients.

The other layers: `test_layers_*`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random
from flax import linen, nnx
from flax_layers import assert_trees_close, outputs_and_gradients
from jaxprs import convolutions

import grouped_conv_jax
from grouped_conv_jax import grouped_conv

# Arguments of a layer with 6 inputs and 12 outputs in 3 groups, and the shape of its input.
LAYERS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "two dimensions": (dict(kernel_size=(3, 3)), (2, 7, 6, 6)),
    "one dimension": (dict(kernel_size=3, padding="CAUSAL"), (2, 9, 6)),
    "three dimensions": (dict(kernel_size=(2, 3, 2), padding="VALID"), (2, 4, 4, 4, 6)),
    "strides and dilation": (
        dict(kernel_size=(3, 2), strides=(2, 1), kernel_dilation=(1, 2), padding=[(1, 0), (2, 1)]),
        (2, 7, 6, 6),
    ),
    "input dilation": (
        dict(kernel_size=(3, 3), input_dilation=2, padding=((1, 1), (1, 1))),
        (2, 4, 4, 6),
    ),
    "circular": (dict(kernel_size=(3, 3), padding="CIRCULAR"), (2, 6, 6, 6)),
    "reflect": (dict(kernel_size=(3, 3), padding="REFLECT"), (2, 6, 6, 6)),
    "an integer of padding": (dict(kernel_size=(3, 3), padding=1), (2, 6, 6, 6)),
    "no batch": (dict(kernel_size=(3, 3)), (6, 6, 6)),
    "two batch dimensions": (dict(kernel_size=(3, 3)), (2, 3, 6, 6, 6)),
    "no bias": (dict(kernel_size=(3, 3), use_bias=False), (2, 6, 6, 6)),
    "mask": (
        dict(kernel_size=(3, 3), mask=np.tri(9, 24, dtype=np.float32).reshape(3, 3, 2, 12)),
        (2, 6, 6, 6),
    ),
    "bfloat16": (dict(kernel_size=(3, 3), dtype=jnp.bfloat16), (2, 6, 6, 6)),
    "precision": (dict(kernel_size=(3, 3), precision="highest"), (2, 6, 6, 6)),
}

each_layer = pytest.mark.parametrize(("arguments", "shape"), LAYERS.values(), ids=LAYERS)


@each_layer
def test_linen_equals_flax(arguments, shape):
    x = jnp.asarray(random("x", shape, np.float32))
    flax = linen.Conv(features=12, feature_group_count=3, **arguments)
    ours = grouped_conv_jax.linen.GroupedConv(features=12, feature_group_count=3, **arguments)
    params = flax.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(0), x), params)
    assert_trees_close(
        outputs_and_gradients(ours.apply, params, x),
        outputs_and_gradients(flax.apply, params, x),
        arguments.get("dtype"),
    )


@each_layer
def test_nnx_equals_flax(arguments, shape):
    x = jnp.asarray(random("x", shape, np.float32))

    def results(layer):
        graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
        y, grads = outputs_and_gradients(
            lambda params, x: nnx.merge(graphdef, params, rest)(x), params, x
        )
        return y, nnx.to_pure_dict(grads[0]), grads[1], nnx.to_pure_dict(params)

    ours = grouped_conv_jax.nnx.GroupedConv(
        6, 12, feature_group_count=3, rngs=nnx.Rngs(0), **arguments
    )
    flax = nnx.Conv(6, 12, feature_group_count=3, rngs=nnx.Rngs(0), **arguments)
    assert_trees_close(results(ours), results(flax), arguments.get("dtype"))


def test_flax_takes_the_op_as_its_convolution():
    x = jnp.asarray(random("x", (2, 6, 6, 6), np.float32))
    arguments: dict[str, Any] = dict(kernel_size=(3, 3), feature_group_count=3)
    plain = nnx.Conv(6, 12, rngs=nnx.Rngs(0), **arguments)
    ours = nnx.Conv(6, 12, conv_general_dilated=grouped_conv, rngs=nnx.Rngs(0), **arguments)
    np.testing.assert_allclose(ours(x), plain(x), rtol=1e-5, atol=1e-5)
    assert len(convolutions(ours, x)) == 1

    layer = linen.Conv(12, conv_general_dilated=grouped_conv, **arguments)
    variables = layer.init(jax.random.key(0), x)
    ours, plain = layer.apply, linen.Conv(12, **arguments).apply
    np.testing.assert_allclose(
        np.asarray(ours(variables, x)), np.asarray(plain(variables, x)), rtol=1e-5, atol=1e-5
    )
    assert len(convolutions(layer.apply, variables, x)) == 1


def test_a_convolution_of_ones_own_is_refused():
    other = jax.lax.conv_general_dilated
    with pytest.raises(TypeError, match="takes no conv_general_dilated; Flax's own Conv takes one"):
        grouped_conv_jax.nnx.GroupedConv(
            6, 6, (3, 3), feature_group_count=2, conv_general_dilated=other, rngs=nnx.Rngs(0)
        )
    with pytest.raises(TypeError, match="takes no conv_general_dilated; Flax's own Conv takes one"):
        grouped_conv_jax.linen.GroupedConv(
            6, (3, 3), feature_group_count=2, conv_general_dilated=other
        )
    with pytest.raises(TypeError, match="takes no conv_general_dilated_cls"):
        grouped_conv_jax.linen.GroupedConv(
            6, (3, 3), feature_group_count=2, conv_general_dilated_cls=lambda: other
        )
    layer = grouped_conv_jax.linen.GroupedConv(6, (3, 3), feature_group_count=2)
    (equation,) = convolutions(
        layer.clone(implementation="vmap").init, jax.random.key(0), jnp.ones((1, 4, 4, 6))
    )
    assert equation.params["implementation"] == "vmap"
