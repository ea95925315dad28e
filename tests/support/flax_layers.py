"""Layers of both kinds, by name, as functions of the same parameters; their outputs and gradients.

All have 6 inputs and 12 outputs, and settings of the same names in linen and nnx.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import random
from flax import nnx

import grouped_conv_jax.linen
import grouped_conv_jax.nnx

IN_FEATURES, FEATURES = 6, 12


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One layer: the name of its class, its settings, and the spatial shape of its inputs."""

    name: str
    settings: Mapping[str, Any]
    spatial: tuple[int, ...]

    def nnx(self, **more: Any) -> Any:
        features = (IN_FEATURES,) if self.name == "DepthwiseConv" else (IN_FEATURES, FEATURES)
        if self.name == "GroupedConvLocal":
            more = {"input_size": self.spatial, **more}
        make = getattr(grouped_conv_jax.nnx, self.name)
        return make(*features, **{"rngs": nnx.Rngs(0), **self.settings, **more})

    def linen(self, **more: Any) -> Any:
        features = {} if self.name == "DepthwiseConv" else {"features": FEATURES}
        make = getattr(grouped_conv_jax.linen, self.name)
        return make(**features, **self.settings, **more)

    def inputs(self, *batch: int) -> jax.Array:
        return jnp.asarray(random(self.name, (*batch, *self.spatial, IN_FEATURES), np.float32))


def kernels(params: Any) -> dict[str, jax.Array]:
    """The kernel, or those of the layers inside, by the initializer that makes them."""
    if "kernel" in params:
        return {"kernel_init": params["kernel"]}
    return {f"{name}_init": inner["kernel"] for name, inner in params.items()}


def as_function(layer: nnx.Module) -> tuple[dict[str, Any], Callable[..., Any]]:
    """The parameters, and what computes the output of them and an input, as in linen."""
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def apply(params_dict: Any, x: jax.Array) -> jax.Array:
        state = jax.tree.map(lambda leaf: leaf, params)
        nnx.replace_by_pure_dict(state, params_dict)
        return nnx.merge(graphdef, state, rest)(x)

    return nnx.to_pure_dict(params), apply


def randomized(params: Any) -> Any:
    """The same shapes, without zeros: a bias begins with them."""

    def draw(path, leaf):
        return jnp.asarray(random(jax.tree_util.keystr(path), leaf.shape, leaf.dtype))

    return jax.tree_util.tree_map_with_path(draw, params)


def outputs_and_gradients(apply: Callable[..., Any], params: Any, x: Any) -> tuple[Any, Any]:
    def loss(params, x):
        y = apply(params, x)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    grads, y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    return y, grads


def assert_trees_close(actual: Any, expected: Any, computed: Any = None) -> None:
    """Within what the dtype allows in which they have been computed."""

    def close(a, e):
        assert a.dtype == e.dtype
        tolerance = (2 if computed else 64) * float(jnp.finfo(computed or a.dtype).eps)
        np.testing.assert_allclose(
            np.float64(a), np.float64(e), atol=tolerance * max(1.0, np.abs(np.float64(e)).max())
        )

    jax.tree.map(close, actual, expected)
