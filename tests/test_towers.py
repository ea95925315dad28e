"""The net on a mesh is the net on one device: values, gradients, and who talks when."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random
from flax import nnx
from jax.sharding import PartitionSpec
from test_alexnet import TINY

from grouped_conv_jax.collectives import collectives
from grouped_conv_jax.models import AlexNet
from grouped_conv_jax.towers import DATA, GROUP, TowerNet, make_mesh

IMAGES = random("images", (4, 32, 32, 3), np.float32)

MESHES = [(1, 1, 2), (1, 2, 2), (2, 1, 2), (2, 2, 2), (2, 4, 4)]
on_each_mesh = pytest.mark.parametrize(("data", "group", "towers"), MESHES)


def tower_net(data: int, group: int, towers: int) -> TowerNet:
    config = dataclasses.replace(TINY, towers=towers)
    return TowerNet(
        lambda axis_size, rngs: AlexNet(config, axis_size=axis_size, rngs=rngs),
        make_mesh(data, group),
    )


@functools.cache
def whole_params(towers: int):
    net = AlexNet(dataclasses.replace(TINY, towers=towers), rngs=nnx.Rngs(jax.random.key(0)))
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(net, nnx.Param)))


def per_device(net: TowerNet, *, dropout: bool):
    """The whole net's logits, from a program that each device runs on its part."""

    def program(params, images, keys):
        return net.on_device(params)(images, dropout_keys=keys if dropout else None)

    by_example = PartitionSpec(DATA)
    return jax.shard_map(
        program, mesh=net.mesh, in_specs=(net.specs, by_example, by_example), out_specs=by_example
    )


def gradients_and_logits(apply, params):
    """Of a nonlinear loss in the parameters and the images, with dropout."""
    keys = jax.random.split(jax.random.key(7), len(IMAGES))

    def loss(params, images):
        logits = apply(params, images, keys)
        return jnp.sum(jnp.sin(logits)), logits

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, jnp.asarray(IMAGES))


@functools.cache
def expected_gradients_and_logits(towers: int):
    config = dataclasses.replace(TINY, towers=towers)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: AlexNet(config, rngs=nnx.Rngs(0))))
    return gradients_and_logits(
        lambda params, images, keys: nnx.merge(graphdef, params)(images, dropout_keys=keys),
        whole_params(towers),
    )


@on_each_mesh
def test_values_and_gradients_are_those_of_the_whole_net(data, group, towers):
    net = tower_net(data, group, towers)
    params = jax.device_put(whole_params(towers), net.shardings)
    actual = gradients_and_logits(per_device(net, dropout=True), params)
    expected = expected_gradients_and_logits(towers)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, atol=1e-4 * np.abs(e).max()),
        actual,
        expected,
    )
    assert max(np.abs(g).max() for g in jax.tree.leaves(expected[0])) > 1e-2


@pytest.mark.parametrize(("data", "group", "towers"), [(1, 2, 2), (2, 2, 4)])
def test_a_device_holds_the_kernels_of_its_towers_only(data, group, towers):
    net = tower_net(data, group, towers)
    params = net.init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, whole_params(towers))
    column = {d: j for (_, j), d in np.ndenumerate(net.mesh.devices)}
    leaves = jax.tree.leaves([params["convolutions"], params["hidden"]])
    assert len(leaves) == 14
    for leaf in leaves:
        width = leaf.shape[-1] // group
        for shard in leaf.addressable_shards:
            start = column[shard.device] * width
            assert shard.index[-1] == slice(start, start + width, None)
            assert shard.data.shape == (*leaf.shape[:-1], width)


def collectives_of(net: TowerNet) -> list[tuple[str, tuple[str, ...]]]:
    """Kinds and mesh axes of the collectives of the compiled net."""
    abstract = jax.eval_shape(net.init, jax.random.key(0))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(7), len(IMAGES)))
    program = jax.jit(per_device(net, dropout=True))
    compiled = program.lower(abstract, jnp.asarray(IMAGES), keys).compile()
    return sorted((c.kind, c.axes) for c in collectives(compiled, net.mesh))


@pytest.mark.parametrize("data", [1, 2])
def test_the_towers_talk_in_four_places_within_a_replica_and_nowhere_else(data):
    # conv3 and two hidden layers take all towers' features; the logits are a sum.
    assert collectives_of(tower_net(data, 2, 2)) == [
        ("all-gather", (GROUP,)),
        ("all-gather", (GROUP,)),
        ("all-gather", (GROUP,)),
        ("all-reduce", (GROUP,)),
    ]


def test_examples_do_not_talk_in_the_forward_pass():
    assert collectives_of(tower_net(4, 1, 2)) == []


def test_mesh_of_the_first_devices():
    mesh = make_mesh(2, 3)
    assert dict(mesh.shape) == {DATA: 2, GROUP: 3}
    assert mesh.devices.ravel().tolist() == jax.devices()[:6]


@pytest.mark.parametrize(
    ("shape", "message"),
    [((3, 3), "3 x 3 needs 9 devices, there are 8"), ((0, 2), "at least one device on each axis")],
)
def test_a_mesh_that_cannot_be_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(*shape)
