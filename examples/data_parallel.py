"""Training steps of ResNeXt, MobileNet and ConvNeXt with the examples divided among devices.

They are lowered for shapes and not for arrays, so that the devices may be those of a topology.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from benchmark_models import MODELS, ModelName, build, mean_loss
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grouped_conv_jax import grouped_conv
from grouped_conv_jax.placement import Exchange
from grouped_conv_jax.towers import DATA

DataPlacement = Literal["jit", "shard_map"]


def lower_step(
    name: ModelName, dtype: str, mesh: Mesh, placement: DataPlacement, examples: int
) -> jax.stages.Lowered:
    """Returns the step of a model for `examples` images on each device of the axis "data".

    Parameters and momentum are float32 and the same on every device. Under `shard_map` each device
    normalises its own examples and the running averages are averaged; under `jit` the statistics of
    batch normalisation are those of the whole batch.
    """
    graphdef, params, rest = _split(name, dtype)
    optimizer = optax.sgd(0.1, momentum=0.9)
    opt_state = jax.eval_shape(optimizer.init, params)
    is_local = placement == "shard_map"

    def step(params, rest, opt_state, images, labels, key):
        if is_local:
            key = jax.random.fold_in(key, lax.axis_index(DATA))

        def loss(params, rest):
            cast, inputs = jax.tree.map(lambda x: x.astype(dtype), (params, images))
            if is_local:
                # A parameter that becomes varying where it is broadcast to the examples has the
                # gradients of all examples summed over the devices, each as large as the images.
                cast = jax.tree.map(lambda x: lax.pcast(x, DATA, to="varying"), cast)
            net = nnx.merge(graphdef, cast, rest, copy=True)
            mean, rest = mean_loss(net, inputs, labels, key)
            if is_local:
                mean, rest = lax.pmean(mean, DATA), jax.tree.map(_average, rest)
            return mean, rest

        (mean, rest), grads = jax.value_and_grad(loss, has_aux=True)(params, rest)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), rest, opt_state, mean

    if is_local:
        whole, by_example = PartitionSpec(), PartitionSpec(DATA)
        in_specs = (whole, whole, whole, by_example, by_example, whole)
        step = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=whole)
    pixels, batch = MODELS[name].pixels, examples * mesh.shape[DATA]
    replicated = NamedSharding(mesh, PartitionSpec())
    divided = NamedSharding(mesh, PartitionSpec(DATA))
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
        (params, rest, opt_state, key),
    )
    images = jax.ShapeDtypeStruct((batch, pixels, pixels, 3), jnp.float32, sharding=divided)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=divided)
    *state, key = state
    return jax.jit(step, donate_argnums=(0, 1, 2)).lower(*state, images, labels, key)


def exchanges(name: ModelName, dtype: str, devices: int) -> list[Exchange]:
    """Returns what must be exchanged: a loss, and the gradients in the computation's dtype."""
    if devices == 1:
        return []
    numbers = parameter_count(name)
    nbytes = numbers * jnp.dtype(dtype).itemsize + 4
    return [Exchange("gradients", "wgrad", "all-reduce", (DATA,), nbytes)]


def parameter_count(name: ModelName) -> int:
    """Returns how many parameters a model has."""
    return sum(leaf.size for leaf in jax.tree.leaves(_split(name, "float32")[1]))


def _split(name: ModelName, dtype: str):
    """Returns the definition of a model, its parameters and its other state, as shapes."""
    pixels = MODELS[name].pixels
    net = nnx.eval_shape(lambda: build(name, pixels, grouped_conv, jnp.dtype(dtype)))
    return nnx.split(net, nnx.Param, ...)


def _average(x: jax.Array) -> jax.Array:
    return lax.pmean(x, DATA) if jnp.issubdtype(x.dtype, jnp.floating) else x
