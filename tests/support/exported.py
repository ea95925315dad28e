"""The operations that are exported and compiled for other platforms."""

import jax
import jax.numpy as jnp
import numpy as np
from cases import random

from grouped_conv_jax import (
    channel_shuffle,
    grouped_conv,
    grouped_conv_input_grad,
    grouped_conv_kernel_grad,
    grouped_conv_local,
    grouped_conv_mixed,
    grouped_conv_patches,
    grouped_conv_transpose,
    streaming_conv,
)

NHWC_AND_GROUPS = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 2}


X, W = random("x", (2, 5, 4, 4), np.float32), random("w", (3, 2, 2, 6), np.float32)


OPERATIONS = {
    "padded otherwise": (
        lambda x, w: grouped_conv(x, w, (1, 2), ["CIRCULAR", "REFLECT"], **NHWC_AND_GROUPS),
        (X, W),
    ),
    "transposed": (
        lambda x, w: grouped_conv_transpose(x, w, (2, 1), "SAME", **NHWC_AND_GROUPS),
        (X, W),
    ),
    "input's gradient": (
        lambda y, w: grouped_conv_input_grad(
            (y.shape[0], 5, 4, 4), w, y, (1, 1), "SAME", **NHWC_AND_GROUPS
        ),
        (random("y", (2, 5, 4, 6), np.float32), W),
    ),
    "kernel's gradient": (
        lambda x, y: grouped_conv_kernel_grad(x, W.shape, y, (1, 1), "SAME", **NHWC_AND_GROUPS),
        (X, random("y", (2, 5, 4, 6), np.float32)),
    ),
    "patches": (
        lambda x: grouped_conv_patches(
            x, (3, 2), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (X,),
    ),
    "local": (
        lambda x, w: grouped_conv_local(x, w, (1, 1), "VALID", (3, 2), **NHWC_AND_GROUPS),
        (X, random("local", (3, 3, 12, 6), np.float32)),
    ),
    "mixed": (
        lambda x, w, v: grouped_conv_mixed(
            x, (w, v), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (X, random("w", (3, 3, 1, 2), np.float32), random("v", (5, 5, 2, 2), np.float32)),
    ),
    "streaming": (
        lambda x, w: streaming_conv(x, w, feature_group_count=4),
        (random("x", (2, 7, 4), np.float32), random("w", (3, 1, 4), np.float32)),
    ),
    "shuffled": (lambda x: channel_shuffle(x, 2), (X,)),
}


def with_gradients(operation):
    def loss(*arrays):
        leaves = jax.tree.leaves(operation(*arrays))
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in leaves), leaves

    return lambda *arrays: jax.value_and_grad(loss, range(len(arrays)), has_aux=True)(*arrays)
