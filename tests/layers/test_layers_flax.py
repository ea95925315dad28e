"""With one group, the layers that Flax has are Flax's: parameters, outputs and gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random
from flax import linen, nnx
from flax_layers import as_function, assert_trees_close, randomized

import grouped_conv_jax.linen
import grouped_conv_jax.nnx

# Arguments of layers with 3 inputs and 4 outputs, and the shape of the input.
TRANSPOSED: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "no strides": (dict(kernel_size=(3, 3), padding=[(1, 2), 0], use_bias=False), (2, 4, 3, 3)),
    "same": (dict(kernel_size=3, strides=(2,), transpose_kernel=True), (2, 2, 5, 3)),
    "valid": (
        dict(kernel_size=(2, 3), strides=(3, 1), padding="VALID", kernel_dilation=(1, 2)),
        (2, 3, 4, 3),
    ),
    "an integer of padding": (
        dict(kernel_size=(2, 1, 3), strides=(1, 1, 2), padding=1, transpose_kernel=True),
        (1, 3, 2, 3, 3),
    ),
    # Odd and even numbers of positions beyond the ends, more than there are strides, and less.
    "circular": (dict(kernel_size=(4, 3), strides=(1, 2), padding="CIRCULAR"), (4, 5, 3)),
    "circular, transposed kernel": (
        dict(
            kernel_size=(4, 3), strides=(1, 2), padding="CIRCULAR", transpose_kernel=True
        ),
        (2, 4, 5, 3),
    ),
    "circular, several times round": (
        dict(
            kernel_size=(6, 2),
            strides=(1, 3),
            padding="CIRCULAR",
            kernel_dilation=(2, 1),
            transpose_kernel=True,
        ),
        (2, 4, 2, 3),
    ),
    "mask and dtype": (
        dict(
            kernel_size=3,
            strides=(2,),
            mask=np.tri(9, 4, dtype=np.float32).reshape(3, 3, 4),
            dtype=jnp.bfloat16,
        ),
        (2, 4, 3),
    ),
}  # fmt: skip

LOCAL: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "one dimension": (dict(kernel_size=3, strides=2, padding="CAUSAL"), (2, 6, 3)),
    "two dimensions": (
        dict(kernel_size=(3, 2), kernel_dilation=(1, 2), padding="CIRCULAR"),
        (3, 4, 3),
    ),
    "three dimensions": (
        dict(kernel_size=(2, 1, 2), padding=1, use_bias=False, input_dilation=(1, 2, 1)),
        (2, 1, 2, 2, 3),
    ),
    "mask and dtype": (
        dict(
            kernel_size=2,
            mask=np.tri(24, 4, dtype=np.float32).reshape(4, 6, 4),
            dtype=jnp.bfloat16,
            padding="REFLECT",
        ),
        (2, 4, 3),
    ),
}


def assert_equal(params, x, actual, expected, computed):
    """Outputs and gradients of several functions of the same arguments, in one program."""

    @jax.jit
    def results(params, x):
        def loss(apply, params, x):
            y = apply(params, x)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

        return [
            jax.grad(loss, argnums=(1, 2), has_aux=True)(apply, params, x)
            for apply in (expected, *actual)
        ]

    wanted, *found = results(params, x)
    for result in found:
        assert_trees_close(result, wanted, computed)


@pytest.mark.parametrize(("arguments", "shape"), TRANSPOSED.values(), ids=TRANSPOSED)
def test_transposed(arguments, shape):
    x = jnp.asarray(random("x", shape, np.float32))
    flax = linen.ConvTranspose(4, **arguments)
    ours = grouped_conv_jax.linen.GroupedConvTranspose(4, feature_group_count=1, **arguments)
    variables, same = jax.jit(lambda key: (flax.init(key, x), ours.init(key, x)))(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, same, variables)

    flax_nnx = nnx.ConvTranspose(3, 4, rngs=nnx.Rngs(0), **arguments)
    ours_nnx = grouped_conv_jax.nnx.GroupedConvTranspose(
        3, 4, feature_group_count=1, rngs=nnx.Rngs(0), **arguments
    )
    params, apply = as_function(ours_nnx)
    jax.tree.map(np.testing.assert_array_equal, params, as_function(flax_nnx)[0])
    assert_equal(
        {"params": randomized(variables["params"])},
        x,
        (ours.apply, lambda variables, x: apply(variables["params"], x)),
        flax.apply,
        arguments.get("dtype"),
    )


@pytest.mark.parametrize(("arguments", "shape"), LOCAL.values(), ids=LOCAL)
def test_local(arguments, shape):
    x = jnp.asarray(random("x", shape, np.float32))
    flax = linen.ConvLocal(4, **arguments)
    ours = grouped_conv_jax.linen.GroupedConvLocal(4, feature_group_count=1, **arguments)
    variables, same = jax.jit(lambda key: (flax.init(key, x), ours.init(key, x)))(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, same, variables)
    assert_equal(
        {"params": randomized(variables["params"])},
        x,
        (ours.apply,),
        flax.apply,
        arguments.get("dtype"),
    )


def compact(*layers: Any) -> linen.Module:
    """A network whose layers are made in a compact method, where Flax names them."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            for make in layers:
                x = make(x)
            return x

    return Net()


def named(name: str, layer: type) -> type:
    """A subclass of a layer with another name."""
    return type(name, (layer,), {})


OURS = grouped_conv_jax.linen

NAMED: dict[str, tuple[Any, Any]] = {
    "GroupedConv": (
        lambda x: named("Conv", OURS.GroupedConv)(6, (3, 3), feature_group_count=3)(x),
        lambda x: linen.Conv(6, (3, 3), feature_group_count=3)(x),
    ),
    "GroupedConvTranspose": (
        lambda x: named("ConvTranspose", OURS.GroupedConvTranspose)(
            6, (3, 3), feature_group_count=1
        )(x),
        lambda x: linen.ConvTranspose(6, (3, 3))(x),
    ),
    "GroupedConvLocal": (
        lambda x: named("ConvLocal", OURS.GroupedConvLocal)(6, (2, 2), feature_group_count=1)(x),
        lambda x: linen.ConvLocal(6, (2, 2))(x),
    ),
    "DepthwiseConv": (
        lambda x: named("Conv", OURS.DepthwiseConv)((3, 3), channel_multiplier=2)(x),
        lambda x: linen.Conv(12, (3, 3), feature_group_count=6)(x),
    ),
    "CausalConv": (
        lambda x: named("Conv", OURS.CausalConv)(6, 3)(x),
        lambda x: linen.Conv(6, 3, padding="CAUSAL", feature_group_count=6)(x),
    ),
    "SeparableConv": (
        lambda x: OURS.SeparableConv(6, (3, 3))(x),
        lambda x: named("SeparableConv", type(compact(
            lambda x: linen.Conv(6, (3, 3), feature_group_count=6, use_bias=False,
                                 name="depthwise")(x),
            lambda x: linen.Conv(6, (1, 1), name="pointwise")(x),
        )))()(x),
    ),
    "a name": (
        lambda x: OURS.GroupedConv(6, (3, 3), feature_group_count=3, name="Conv_1")(x),
        lambda x: linen.Conv(6, (3, 3), feature_group_count=3, name="Conv_1")(x),
    ),
}  # fmt: skip
"""A layer by Flax's name and Flax's own, of 6 inputs."""


@pytest.mark.parametrize(("ours", "flax"), NAMED.values(), ids=NAMED)
def test_a_layer_with_flaxs_name_has_flaxs_parameters_in_a_compact_method(ours, flax):
    x = jnp.ones((2, 4, 4, 6))

    def before(x):
        return linen.Conv(6, (1, 1))(x)

    def after(x):
        return linen.Dense(4)(x)

    found, expected = (
        compact(before, layer, after).init(jax.random.key(0), x) for layer in (ours, flax)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_layers_of_nnx_are_named_by_their_attributes():
    """Each also takes as many keys as Flax's, so that later layers begin with the same values."""
    ours, flax = grouped_conv_jax.nnx, nnx

    def net(*layers: Any) -> Any:
        rngs = nnx.Rngs(0)
        made = nnx.Dict({f"layer{i}": layer(rngs=rngs) for i, layer in enumerate(layers)})
        return nnx.to_pure_dict(nnx.state(made, nnx.Param))

    class Separable(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs):
            self.depthwise = nnx.Conv(
                6, 6, (3, 3), feature_group_count=6, use_bias=False, rngs=rngs
            )
            self.pointwise = nnx.Conv(6, 6, (1, 1), rngs=rngs)

    same = functools.partial
    found = net(
        same(ours.GroupedConv, 6, 6, (3, 3), feature_group_count=3),
        same(ours.DepthwiseConv, 6, (3, 3)),
        same(ours.CausalConv, 6, 6, 3),
        same(ours.GroupedConvTranspose, 6, 6, (3, 3), feature_group_count=1),
        same(ours.SeparableConv, 6, 6, (3, 3)),
        same(nnx.Linear, 6, 6),
    )
    expected = net(
        same(flax.Conv, 6, 6, (3, 3), feature_group_count=3),
        same(flax.Conv, 6, 6, (3, 3), feature_group_count=6),
        same(flax.Conv, 6, 6, 3, feature_group_count=6),
        same(flax.ConvTranspose, 6, 6, (3, 3)),
        Separable,
        same(nnx.Linear, 6, 6),
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
