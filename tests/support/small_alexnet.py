"""A small AlexNet, and parameters for it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from cases import random
from flax import nnx

from grouped_conv_jax.models import ALEXNETS, AlexNet, AlexNetConfig

TINY = dataclasses.replace(
    AlexNetConfig.small(num_classes=7),
    convolutions=tuple(
        dataclasses.replace(layer, features=8 + 4 * i, bias=0.1 * i)
        for i, layer in enumerate(AlexNetConfig.small().convolutions)
    ),
    hidden_units=(12, 16),
)


def narrow(name: str) -> AlexNetConfig:
    """A preset with few features and units, for small images."""
    config = ALEXNETS[name](towers=None, num_classes=7, image_channels=3)
    return dataclasses.replace(
        config,
        convolutions=tuple(
            dataclasses.replace(layer, features=features)
            for layer, features in zip(config.convolutions, (8, 12, 16, 12, 8), strict=True)
        ),
        hidden_units=(12, 16),
        image_size=32 if name == "small" else 67,
    )


def random_params(config: AlexNetConfig) -> dict:
    """Weights of which the logits are neither small nor large, whatever the net begins with."""
    net = nnx.eval_shape(lambda: AlexNet(config, rngs=nnx.Rngs(0)))
    shapes = nnx.to_pure_dict(nnx.state(net, nnx.Param))

    def array(path, leaf):
        inputs = math.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 10
        scale = math.sqrt(2 / inputs)
        return scale * random(jax.tree_util.keystr(path), leaf.shape, np.float32)

    return jax.tree.map_with_path(array, shapes)


def with_params(config: AlexNetConfig, params: dict, dtype=None) -> AlexNet:
    net = nnx.eval_shape(lambda: AlexNet(config, dtype=dtype, rngs=nnx.Rngs(0)))
    nnx.update(net, jax.tree.map(jnp.asarray, params))
    return net
