"""The net on a mesh is the net on one device: values, gradients, and who talks when."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random
from flax import linen, nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from small_alexnet import TINY

from grouped_conv_jax.collectives import collectives
from grouped_conv_jax.linen import GroupedConv
from grouped_conv_jax.models import AlexNet
from grouped_conv_jax.parallel.pmap import Pmap
from grouped_conv_jax.towers import DATA, GROUP, PLACEMENTS, Placement, TowerNet, make_mesh

IMAGES = random("images", (4, 32, 32, 3), np.float32)

on_each_mesh = pytest.mark.parametrize(
    ("data", "group", "towers"),
    [
        pytest.param(1, 2, 2, marks=pytest.mark.slow),
        (2, 2, 2),
        pytest.param(1, 1, 2, marks=pytest.mark.slow),
        pytest.param(4, 1, 2, marks=pytest.mark.slow),
        pytest.param(1, 4, 4, marks=pytest.mark.slow),
        pytest.param(2, 4, 4, marks=pytest.mark.slow),
    ],
)


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


def logits_of(net: TowerNet, placement: Placement = "shard_map"):
    """The whole net's logits with dropout, as a function of global arrays."""
    return net.by_example(lambda net, images, keys: net(images, dropout_keys=keys), placement)


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


def under_pmap(net: TowerNet, params):
    """The gradients of the same loss, taken by each device."""

    def program(params, images, keys):
        def share(params, images):
            logits = net.on_device(params)(images, dropout_keys=keys)
            return jnp.sum(jnp.sin(logits)) / lax.axis_size(GROUP), logits

        (grads, of_images), logits = jax.grad(share, argnums=(0, 1), has_aux=True)(params, images)
        return (net.sum_gradients(grads), lax.psum(of_images, GROUP)), logits

    examples = PartitionSpec(DATA)
    specs = (net.specs, examples, examples)
    pmapped = Pmap(program, net.mesh, specs, ((net.specs, examples), examples))
    return pmapped(params, jnp.asarray(IMAGES), jax.random.split(jax.random.key(7), len(IMAGES)))


@pytest.mark.parametrize(
    "placement", ["shard_map", *(pytest.param(p, marks=pytest.mark.slow) for p in ("jit", "pmap"))]
)
@on_each_mesh
def test_values_and_gradients_are_those_of_the_whole_net(data, group, towers, placement):
    net = tower_net(data, group, towers)
    params = jax.device_put(whole_params(towers), net.shardings)
    if placement == "pmap":
        actual = under_pmap(net, params)
    else:
        actual = gradients_and_logits(logits_of(net, placement), params)
    expected = expected_gradients_and_logits(towers)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, atol=1e-4 * np.abs(e).max()),
        actual,
        expected,
    )
    assert max(np.abs(g).max() for g in jax.tree.leaves(expected[0])) > 1e-2


def test_a_net_is_called_under_pmap():
    net = tower_net(2, 2, 2)
    params = jax.device_put(whole_params(2), net.shardings)
    keys = jax.random.split(jax.random.key(7), len(IMAGES))
    logits = logits_of(net, "pmap")(params, jnp.asarray(IMAGES), keys)
    expected = expected_gradients_and_logits(2)[1]
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
    assert logits.sharding.is_equivalent_to(net.examples, logits.ndim)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 4), (4, 2), (1, 8), (8, 1)])
def test_pmap_of_a_program_of_two_axes_is_its_shard_map(mesh):
    mesh = make_mesh(*mesh)
    x = random("x", (8, 8, 3), np.float32)

    @jax.jit
    def program(x):
        place = jnp.float32(lax.axis_index(DATA) + 10 * lax.axis_index(GROUP))
        both = lax.psum(x, (GROUP, DATA)) + place
        return {
            "sum": lax.psum(x, GROUP) * place,
            "mean": lax.pmean(both, DATA),
            "most": lax.pmax(x, GROUP) - lax.pmin(x, DATA),
            "side by side": lax.all_gather(x, (DATA, GROUP)),
            "other order": lax.all_gather(x, (GROUP, DATA), axis=2),
            "scattered": lax.psum_scatter(jnp.ones(8) * place, DATA, tiled=True),
            "turned": lax.all_to_all(jnp.ones((8, 2)) * place, GROUP, 0, 1, tiled=True),
        }

    by_device = PartitionSpec((DATA, GROUP))
    in_specs = (PartitionSpec(DATA, GROUP),)
    pmapped = Pmap(program, mesh, in_specs, by_device)
    expected = jax.jit(
        jax.shard_map(program, mesh=mesh, in_specs=in_specs, out_specs=by_device, check_vma=False)
    )(x)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-6), pmapped(x), expected)
    assert f"num_partitions={mesh.size}" in str(pmapped.lower(x).compile().as_text())


@pytest.mark.slow
@pytest.mark.parametrize(("data", "group", "towers"), [(1, 2, 2), (2, 2, 4)])
def test_a_device_holds_the_kernels_of_its_towers_only(data, group, towers):
    net = tower_net(data, group, towers)
    params = net.init(jax.random.key(0))
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-6), params, whole_params(towers)
    )
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
    program = jax.jit(logits_of(net))
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.5, 10**400), "data must be an integer, got 1.5"),
        ((1, True), "group must be an integer, got the boolean True"),
        ((1, 1, "cpu"), r"devices must be a sequence such as jax.devices\(\), got 'cpu'"),
        ((1, 1, 8), r"devices must be a sequence such as jax.devices\(\), got 8"),
    ],
)
def test_what_makes_no_mesh_is_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        make_mesh(*arguments)


def test_there_is_no_mesh_of_no_devices():
    with pytest.raises(ValueError, match=r"1 x 1 needs 1 devices, there are 0$"):
        make_mesh(1, 1, [])


@pytest.mark.parametrize(
    ("group", "towers"), [(4, 2), (3, 4)], ids=["more than the towers", "not dividing them"]
)
def test_towers_that_the_devices_cannot_share_are_refused(group, towers):
    message = f"{group} devices on the axis 'group' cannot share {towers} towers evenly"
    with pytest.raises(ValueError, match=message):
        tower_net(1, group, towers)


def test_a_mesh_without_an_axis_is_refused():
    mesh = jax.make_mesh((2, 2), (DATA, "model"), (AxisType.Auto,) * 2)
    with pytest.raises(ValueError, match=r"no axis 'group'; its axes are \('data', 'model'\)"):
        TowerNet(lambda axis_size, rngs: nnx.Linear(4, 4, rngs=rngs), mesh)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ((None, "tower"), r"\['kernel'\] is on the axis 'tower'.* axes are \('data', 'group'\)"),
        ((GROUP, None), r"\['kernel'\] is \(4, 3\) in the net of one device, but .* \(2, 6\)"),
    ],
)
def test_metadata_that_the_mesh_does_not_have_is_refused(axes, message):
    def build(axis_size, rngs):
        return nnx.Linear(
            4,
            6 // (axis_size or 1),
            use_bias=False,
            kernel_metadata={"out_sharding": axes, "eager_sharding": False},
            rngs=rngs,
        )

    with pytest.raises(ValueError, match=message):
        TowerNet(build, make_mesh(1, 2))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_batch_that_does_not_divide_is_refused(placement):
    net = tower_net(4, 2, 2)
    apply = net.by_example(lambda net, images: net(images), placement)
    with pytest.raises(ValueError, match="6 examples does not divide over the 4 devices"):
        apply(net.specs, jnp.ones((6, 32, 32, 3)))


def test_an_unknown_placement_is_refused():
    with pytest.raises(ValueError, match="'xmap'; known: jit, shard_map, pmap"):
        logits_of(tower_net(1, 2, 2), "xmap")  # pyright: ignore[reportArgumentType]


def test_a_linen_layer_is_spread_by_its_own_metadata():
    mesh = make_mesh(2, 4)
    layer = GroupedConv(
        16,
        (3, 3),
        feature_group_count=4,
        use_bias=False,
        kernel_init=linen.with_partitioning(
            linen.initializers.lecun_normal(), (None, None, None, GROUP)
        ),
    )
    x = jnp.asarray(random("x", (4, 6, 6, 8), np.float32))
    variables = layer.init(jax.random.key(0), x)
    specs = linen.get_partition_spec(variables)
    assert specs["params"]["kernel"] == PartitionSpec(None, None, None, GROUP)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    spread = jax.jit(layer.init, out_shardings=shardings)(jax.random.key(0), x)
    (kernel,) = jax.tree.leaves(spread)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 3, 2, 4)}
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(DATA, None, None, GROUP)))
    program = jax.jit(layer.apply).lower(spread, placed).compile()
    assert collectives(program, mesh) == []
    y = program(spread, placed)
    np.testing.assert_allclose(
        np.asarray(y), np.asarray(layer.apply(variables, x)), rtol=1e-5, atol=1e-6
    )
