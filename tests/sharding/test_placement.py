"""The report of a placement: what is computed is what is compiled, and what is not is said."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small_alexnet import TINY

from grouped_conv_jax import grouped_conv
from grouped_conv_jax.models import AlexNet, AlexNetConfig, alexnet_exchanges
from grouped_conv_jax.placement import Exchange, Memory, placement_report
from grouped_conv_jax.towers import DATA, GROUP, TowerNet, make_mesh

EXAMPLES = 3


@functools.cache
def report_of_gradients(data, group, towers):
    """Of the parameters' gradients of a net, each device with `EXAMPLES` examples."""
    config = dataclasses.replace(TINY, towers=towers)
    mesh = make_mesh(data, group)
    net = TowerNet(lambda size, rngs: AlexNet(config, axis_size=size, rngs=rngs), mesh)

    def loss(params, images):
        return lax.psum(jnp.sum(jnp.sin(net.on_device(params)(images))), DATA)

    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(net.init, jax.random.key(0)),
        net.shardings,
    )
    by_example = NamedSharding(mesh, P(DATA))
    images = jax.ShapeDtypeStruct((data * EXAMPLES, 32, 32, 3), np.float32, sharding=by_example)
    program = jax.shard_map(loss, mesh=mesh, in_specs=(net.specs, P(DATA)), out_specs=P())
    compiled = jax.jit(jax.grad(program)).lower(params, images).compile()
    exchanges = alexnet_exchanges(config, EXAMPLES, mesh.shape)
    return placement_report(compiled, mesh, exchanges=exchanges, held={"parameters": params})


@pytest.mark.parametrize(
    ("data", "group", "towers"),
    [
        (1, 1, 2),
        (2, 2, 2),
        (2, 2, 4),
        *(
            pytest.param(*sizes, marks=pytest.mark.slow)
            for sizes in [(1, 2, 2), (4, 1, 2), (2, 4, 4)]
        ),
    ],
)
def test_alexnet_moves_what_was_computed_and_nothing_else(data, group, towers):
    report = report_of_gradients(data, group, towers)
    assert report.notes == ()
    for row in report.rows:
        assert row.compiled_kinds == row.computed_kinds
        assert row.compiled_nbytes == row.computed_nbytes > 0
    layers = {row.layer for row in report.rows if row.axes == (GROUP,)}
    assert layers == ({"conv3", "fc6", "fc7", "fc8"} if group > 1 else set())
    assert len([row for row in report.rows if row.axes == (DATA,)]) == (8 if data > 1 else 0)


def test_memory_of_a_device_against_one_alone():
    (parameters, _) = report_of_gradients(2, 4, 4).memory
    (whole, _) = report_of_gradients(1, 1, 2).memory
    assert whole.nbytes == whole.alone
    assert parameters.alone is not None
    # All is cut in four but the bias of the classes.
    bias = TINY.num_classes * 4
    assert parameters.nbytes - bias == (parameters.alone - bias) // 4


def test_what_the_papers_towers_exchange():
    """Values per image of each tower: 21,632, 4,608, 2,048; and 1,000 logits."""
    exchanges = alexnet_exchanges(AlexNetConfig.paper(), 1, {"data": 1, "group": 2})
    assert [(e.layer, e.contraction, e.kind, e.nbytes // 4) for e in exchanges] == [
        ("conv3", "fprop", "all-gather", 2 * 21_632),
        ("conv3", "dgrad", "reduce-scatter", 2 * 21_632),
        ("fc6", "fprop", "all-gather", 2 * 4_608),
        ("fc6", "dgrad", "reduce-scatter", 2 * 4_608),
        ("fc7", "fprop", "all-gather", 2 * 2_048),
        ("fc7", "dgrad", "reduce-scatter", 2 * 2_048),
        ("fc8", "fprop", "all-reduce", 1_000),
    ]
    assert {e.axes for e in exchanges} == {("group",)}


@pytest.mark.parametrize("group", [1, 2])
def test_gradients_of_all_parameters_are_summed_over_the_examples(group):
    exchanges = alexnet_exchanges(AlexNetConfig.paper(), 7, {"data": 8, "group": group})
    sums = [e for e in exchanges if e.contraction == "wgrad"]
    assert {(e.kind, e.axes) for e in sums} == {("all-reduce", ("data",))}
    whole = 60_965_224 - 1_000
    assert sum(e.nbytes for e in sums) == 4 * (whole // group + 1_000)
    assert alexnet_exchanges(AlexNetConfig.paper(), 7, {"data": 1, "group": 1}) == ()


# Any function, on any mesh.


def compiled_on(mesh, function, spec, shape=(8, 16)):
    x = jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, spec))
    return jax.jit(function).lower(x).compile()


def gathering(mesh, *layers):
    """A program in which each layer gathers the rows that the last has left on each device."""

    def on_device(x):
        for layer in layers:
            with jax.named_scope(layer):
                x = jnp.sin(lax.all_gather(x, "a", tiled=True)[:2])
        return x

    program = jax.shard_map(on_device, mesh=mesh, in_specs=P("a"), out_specs=P("a"))
    return compiled_on(mesh, program, P("a"))


@pytest.fixture
def mesh():
    return jax.make_mesh((4, 2), ("a", "b"), (AxisType.Auto,) * 2)


def test_a_gather_that_nobody_asked_for_is_said(mesh):
    replicated = NamedSharding(mesh, P())
    compiled = compiled_on(
        mesh, lambda x: jnp.sin(lax.with_sharding_constraint(x, replicated)), P("a")
    )
    other = Exchange("layer2", "fprop", "all-reduce", ("b",), 4)
    report = placement_report(compiled, mesh, exchanges=[other])
    (missing, found) = report.rows
    assert missing.note == "not in the compiled program"
    assert (found.compiled_kinds, found.axes) == (("all-gather",), ("a",))
    assert found.excess == 8 * 16 * 4
    assert found.note == "all-gather that was not expected"
    assert "all-gather that was not expected" in str(report)


@pytest.mark.parametrize(
    ("kind", "nbytes", "note"),
    [
        ("all-gather", 512, ""),
        ("all-gather", 128, "all-gather of 384 bytes more than computed"),
        ("all-gather", 600, "all-gather of 88 bytes less than computed"),
        ("collective-permute", 512, "all-gather instead of collective-permute"),
    ],
)
def test_a_layer_that_moves_something_else_is_said(mesh, kind, nbytes, note):
    compiled = gathering(mesh, "layer1")
    needed = Exchange("layer1", "fprop", kind, ("a",), nbytes)
    report = placement_report(compiled, mesh, exchanges=[needed])
    (row,) = report.rows
    assert (row.layer, row.contraction, row.note) == ("layer1", "fprop", note)
    assert report.notes == ((f"layer1 fprop: {note}",) if note else ())


def test_a_collective_may_be_named_after_the_layer_before(mesh):
    def on_device(x):
        with jax.named_scope("layer1"):
            x = lax.all_gather(x, "a", tiled=True)
        with jax.named_scope("layer2"):
            return lax.all_gather(jnp.sin(x), "a", tiled=True)[:2]

    program = jax.shard_map(on_device, mesh=mesh, in_specs=P("a"), out_specs=P("a"))
    compiled = compiled_on(mesh, program, P("a"))
    needed = [
        Exchange("layer2", "fprop", "all-gather", ("a",), 512),
        Exchange("layer3", "fprop", "all-gather", ("a",), 2048),
    ]
    report = placement_report(compiled, mesh, exchanges=needed)
    assert [(row.layer, row.note) for row in report.rows] == [("layer2", ""), ("layer3", "")]


def test_what_layers_need_may_be_done_elsewhere(mesh):
    compiled = gathering(mesh, "end")
    needed = [
        Exchange("layer1", "wgrad", "all-gather", ("a",), 256),
        Exchange("layer2", "wgrad", "all-gather", ("a",), 200),
        Exchange("layer2", "fprop", "all-reduce", ("a",), 8),
        Exchange("layer2", "dgrad", "all-gather", ("b",), 8),
    ]
    rows = placement_report(compiled, mesh, exchanges=needed).rows
    assert [(r.layer, r.contraction, r.computed_nbytes, r.compiled_nbytes) for r in rows] == [
        ("layer2", "fprop", 8, 0),
        ("layer2", "dgrad", 8, 0),
        ("layer1, layer2", "wgrad", 456, 512),
    ]
    assert rows[-1].note == "all-gather of 56 bytes more than computed"


def printed(*instructions):
    """What XLA:TPU prints of some instructions."""
    text = "\n  ".join(("HloModule m, num_partitions=8", *instructions))
    return types.SimpleNamespace(as_text=lambda: text, memory_analysis=lambda: None)


GROUPS = "channel_id=1, replica_groups=[4,2]<=[8], use_global_device_ids=true"


def test_the_sums_of_all_layers_may_be_named_after_one_of_them(mesh):
    metadata = 'metadata={op_name="f/transpose(jvp())/layer2/psum"}'
    compiled = printed(f"%r = (f32[3], f32[5]) all-reduce(%x, %y), {GROUPS}, {metadata}")
    needed = [
        Exchange("layer1", "wgrad", "all-reduce", ("b",), 12),
        Exchange("layer2", "wgrad", "all-reduce", ("b",), 20),
    ]
    (row,) = placement_report(compiled, mesh, exchanges=needed).rows
    assert (row.layer, row.note, row.compiled_nbytes) == ("layer1, layer2", "", 32)
    more = [*needed, Exchange("layer3", "wgrad", "all-reduce", ("b",), 4)]
    rows = placement_report(compiled, mesh, exchanges=more).rows
    assert [row.note for row in rows] == [
        "not in the compiled program",
        "all-reduce of 12 bytes more than computed",
        "not in the compiled program",
    ]


def test_a_reduce_scatter_may_be_an_all_reduce_without_a_name(mesh):
    compiled = printed(f"%r = f32[3] all-reduce(%x), {GROUPS}")
    needed = [Exchange("layer1", "dgrad", "reduce-scatter", ("b",), 12)]
    (row,) = placement_report(compiled, mesh, exchanges=needed).rows
    assert (row.layer, row.note) == ("layer1", "all-reduce instead of reduce-scatter")


def test_a_collective_without_a_name_has_no_direction(mesh):
    (row,) = placement_report(printed(f"%r = f32[3] all-reduce(%x), {GROUPS}"), mesh).rows
    assert (row.layer, row.contraction) == ("(no name)", "")


def test_the_names_of_many_layers_are_shortened(mesh):
    metadata = 'metadata={op_name="f/transpose(jvp())/layer0/psum"}'
    compiled = printed(f"%r = (f32[3], f32[9]) all-reduce(%x, %y), {GROUPS}, {metadata}")
    needed = [Exchange(f"layer{i}", "wgrad", "all-reduce", ("b",), 12) for i in range(4)]
    report = placement_report(compiled, mesh, exchanges=needed)
    assert "layer0 ... layer2, layer3" in str(report)


def test_layers_are_told_apart_by_whole_names(mesh):
    compiled = gathering(mesh, "conv1", "conv11")
    needed = [Exchange(name, "fprop", "all-gather", ("a",), 512) for name in ("conv1", "conv11")]
    report = placement_report(compiled, mesh, exchanges=needed)
    assert [(row.layer, row.note) for row in report.rows] == [("conv1", ""), ("conv11", "")]


def test_without_a_computed_side_there_is_nothing_to_flag(mesh):
    report = placement_report(gathering(mesh, "layer1"), mesh)
    (row,) = report.rows
    assert "layer1" in row.layer
    assert (row.axes, row.compiled_kinds, row.compiled_nbytes) == (("a",), ("all-gather",), 512)
    assert report.notes == ()
    assert "computed" not in str(report)


def test_as_text(mesh):
    needed = Exchange("layer1", "fprop", "all-gather", ("a",), 128)
    text = str(placement_report(gathering(mesh, "layer1"), mesh, exchanges=[needed]))
    assert text.partition("\n\nheld by")[0].splitlines() == [
        "Collectives of one step on a mesh of a 4 x b 2; bytes into or out of a device",
        "layer   contraction  over  computed    bytes  compiled    bytes",
        "layer1  fprop        a     all-gather    128  all-gather    512",
        "total                a                   128                512",
        "",
        "! layer1 fprop: all-gather of 384 bytes more than computed",
    ]


def test_alone(mesh):
    alone = compiled_on(make_mesh(1, 1), jnp.sin, P())
    compiled = compiled_on(mesh, jnp.sin, P("a", "b"))
    x = jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, P("a", "b")))
    report = placement_report(compiled, mesh, held={"x": x}, alone=alone)
    assert report.memory[0] == Memory("x", 64, 512)
    assert report.memory[1].alone is not None
    assert str(report).startswith("No collectives on a mesh of a 4 x b 2.\n\nheld by")


def test_an_array_that_does_not_say_where_it_is_is_refused(mesh):
    compiled = compiled_on(mesh, jnp.sin, P("a"))
    with pytest.raises(ValueError, match=r"x has an array of shape \(3,\) without a sharding"):
        placement_report(compiled, mesh, held={"x": jax.ShapeDtypeStruct((3,), np.float32)})


def test_what_is_not_compiled_is_refused_with_the_mend(mesh):
    with pytest.raises(TypeError, match=r"compile it with jax\.jit\(function\)\.lower"):
        placement_report(jax.jit(jnp.sum), mesh)


def test_a_sharded_grouped_convolution_is_called_by_its_name(mesh):
    def loss(x, w):
        return jnp.sum(grouped_conv(x, w, (1,), "SAME", feature_group_count=2))

    x = jax.ShapeDtypeStruct((8, 4, 6), np.float32, sharding=NamedSharding(mesh, P("a")))
    w = jax.ShapeDtypeStruct((4, 2, 3), np.float32, sharding=NamedSharding(mesh, P()))
    (row,) = placement_report(jax.jit(jax.grad(loss, 1)).lower(x, w).compile(), mesh).rows
    assert "grouped_conv.wgrad" in row.layer
