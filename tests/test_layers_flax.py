"""With one group, the layers that Flax has are Flax's: parameters, outputs and gradients."""

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
