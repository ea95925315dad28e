"""Programs for TPUs that are not there: what devices exchange, and how much they compute.

libtpu compiles for the topology of a TPU on any CPU. Nothing can be run. test_xla_partition.py and
test_explicit.py check the values of the same programs on CPU devices.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from exported import OPERATIONS, with_gradients
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import CONTRACTIONS, contraction_by, contraction_of, on_dimensions

from alexnet.training.topology import topology_devices
from grouped_conv_jax import explain, grouped_conv, towers, tune
from grouped_conv_jax.collectives import collectives
from grouped_conv_jax.placement import placement_report
from grouped_conv_jax.spec import Contraction

pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu, which is for Linux x86-64")

LAYOUTS = {
    1: (("NWC", "WIO", "NWC"), (32,)),
    2: (("NHWC", "HWIO", "NHWC"), (8, 8)),
    3: (("NDHWC", "DHWIO", "NDHWC"), (8, 4, 4)),
}
"""The layout and the spatial shape of each rank. Larger images take many times as long."""

BATCH, FEATURES = 16, 64

SPLITS = {
    "batch": ({"data": 4}, "data", None),
    "batch over two axes": ({"a": 2, "b": 2}, ("a", "b"), None),
    "batch, an axis unused": ({"data": 2, "unused": 2}, "data", None),
    "groups": ({"unused": 2, "group": 2}, None, "group"),
    "both": ({"data": 2, "group": 2}, "data", "group"),
}
"""For each split: the mesh, the axes of the batch and those of the features."""


@functools.cache
def devices(topology: str = "v5e:2x2"):
    return topology_devices(topology)


def make_mesh(axes: dict[str, int], kind: AxisType = AxisType.Auto) -> Mesh:
    count = math.prod(axes.values())
    shape = np.array(devices()[:count]).reshape(list(axes.values()))
    return Mesh(shape, tuple(axes), axis_types=(kind,) * len(axes))


def convolution(rank: int, groups: int, stride: int) -> Case:
    layout, spatial = LAYOUTS[rank]
    return Case(
        f"rank {rank}, {groups} groups, stride {stride}",
        (BATCH, *spatial, FEATURES),
        (*(3,) * rank, FEATURES // groups, FEATURES),
        {
            "window_strides": (stride,) * rank,
            "padding": "SAME",
            "dimension_numbers": layout,
            "feature_group_count": groups,
        },
    )


def compiled(case: Case, contraction: Contraction, mesh: Mesh, specs, conv=None):
    """One contraction, compiled for arrays that are sharded as `specs` says of lhs, rhs and out."""
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    operands = [
        jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
        for shape, sharding in zip(case.shapes, shardings, strict=True)
    ]
    result = {"fprop": shardings[2], "dgrad": shardings[0], "wgrad": shardings[1]}[contraction]
    function = conv or contraction_of(case, contraction)
    with jax.set_mesh(mesh):
        return jax.jit(function, out_shardings=result).lower(*operands).compile()


def in_shard_map(case: Case, contraction: Contraction, mesh: Mesh, specs, parts: int):
    """Returns one contraction in which each device has one of `parts` parts of the groups."""
    arguments = {**case.arguments, "feature_group_count": case.groups // parts}
    on_device = Case(case.name, case.lhs, case.rhs, arguments)
    out = {"fprop": specs[2], "dgrad": specs[0], "wgrad": specs[1]}[contraction]
    return jax.shard_map(
        contraction_of(on_device, contraction), mesh=mesh, in_specs=tuple(specs), out_specs=out
    )


def flops(program) -> float:
    return program.cost_analysis()["flops"]


@functools.cache
def flops_of_one_device(rank: int, groups: int, stride: int, contraction, batch: int, parts: int):
    """Returns the FLOPs of a device's part of a convolution, compiled for one device alone.

    They are those that XLA counts, or the multiply-adds if these are more: XLA leaves out what is
    multiplied with padding, and counts more where it converts a convolution of few examples.
    """
    case = convolution(rank, groups, stride)
    lhs = (case.lhs[0] // batch, *case.lhs[1:-1], case.lhs[-1] // parts)
    rhs = (*case.rhs[:-1], case.rhs[-1] // parts)
    arguments = {**case.arguments, "feature_group_count": groups // parts}
    local = Case(case.name, lhs, rhs, arguments)
    program = compiled(local, contraction, make_mesh({"one": 1}), (P(),) * 3)
    taps, inputs = math.prod(local.rhs[:-2]), local.rhs[-2]
    return max(flops(program), 2 * math.prod(local.out) * taps * inputs)


def assert_local(rank: int, groups: int, stride: int, split: str, way: str) -> None:
    case = convolution(rank, groups, stride)
    axes, batch, features = SPLITS[split]
    specs = on_dimensions(case, batch=batch, features=features)
    batch_axes = (batch,) if isinstance(batch, str) else batch or ()
    batch_parts = math.prod(axes[axis] for axis in batch_axes)
    parts = axes[features] if features else 1
    for contraction in CONTRACTIONS:
        mesh = make_mesh(axes, AxisType.Explicit if way == "Explicit" else AxisType.Auto)
        conv = in_shard_map(case, contraction, mesh, specs, parts) if way == "shard_map" else None
        program = compiled(case, contraction, mesh, specs, conv)
        found = [(c.kind, c.nbytes, c.axes) for c in collectives(program, mesh)]
        expected = []
        if contraction == "wgrad" and batch:
            expected = [("all-reduce", 4 * math.prod(case.rhs) // parts, batch_axes)]
        assert found == expected, contraction
        alone = flops_of_one_device(rank, groups, stride, contraction, batch_parts, parts)
        assert flops(program) <= 1.1 * alone, contraction


WAYS = ("Auto", "Explicit", "shard_map")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("split", ["batch, an axis unused", "both"])
@pytest.mark.parametrize("groups", [4, FEATURES])
def test_what_devices_share_is_local(groups, split, way):
    assert_local(2, groups, 1, split, way)


GROUPS_AND_SPLITS = [
    (groups, split)
    for groups in (1, 2, 4, 32, FEATURES)
    for split, (_, _, features) in SPLITS.items()
    if groups > 1 or features is None
]


# Compiling for a TPU takes seconds: in one and three dimensions four groups, split both ways, stand
# for all.
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("rank", "groups", "split"),
    [(2, *case) for case in GROUPS_AND_SPLITS] + [(1, 4, "both"), (3, 4, "both")],
)
def test_what_devices_share_is_local_in_every_case(rank, groups, split, way):
    for stride in (1, 2):
        assert_local(rank, groups, stride, split, way)


# Rows.

ROWS = P(None, "data")


def sent(case: Case, contraction: Contraction, mesh: Mesh, conv=None):
    return collectives(compiled(case, contraction, mesh, (ROWS, P(), ROWS), conv), mesh)


def assert_rows_exchange_halos(rank: int, groups: int, stride: int) -> None:
    """On an Explicit mesh neighbours send no more rows than the kernel reaches over."""
    case = convolution(rank, groups, stride)
    mesh = make_mesh({"data": 4}, AxisType.Explicit)
    for contraction in CONTRACTIONS:
        found = sent(case, contraction, mesh)
        kinds = {c.kind for c in found}
        summed = {"all-reduce"} if contraction == "wgrad" else set()
        assert kinds == {"collective-permute"} | summed, contraction
        row = 4 * math.prod(case.lhs) // case.lhs[1]
        halos = sum(c.nbytes for c in found if c.kind == "collective-permute")
        assert halos <= 2 * row, contraction


def assert_rows_as_lax(rank: int, groups: int, stride: int) -> None:
    """On a mesh with one Auto axis devices send no more bytes than in lax's own convolution."""
    case = convolution(rank, groups, stride)
    mesh = make_mesh({"data": 4})
    for contraction in CONTRACTIONS:
        ours = sent(case, contraction, mesh)
        theirs = sent(case, contraction, mesh, contraction_by(case.lax_conv(), contraction))
        assert sum(c.nbytes for c in ours) <= sum(c.nbytes for c in theirs), contraction
        # XLA gathers for some input gradients with strides, too.
        if contraction == "fprop" or (contraction == "dgrad" and stride == 1):
            assert {c.kind for c in ours} == {"collective-permute"}, contraction


@pytest.mark.parametrize("groups", [4, FEATURES])
def test_rows(groups):
    assert_rows_exchange_halos(2, groups, 1)
    assert_rows_as_lax(2, groups, 1)


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("rank", "groups"),
    [(1, 4), *((2, groups) for groups in (1, 2, 4, 32, FEATURES)), (3, FEATURES)],
)
def test_rows_in_every_case(rank, groups, stride):
    assert_rows_exchange_halos(rank, groups, stride)
    assert_rows_as_lax(rank, groups, stride)


def test_rows_of_a_mesh_with_several_auto_axes_are_gathered():
    """XLA multiplies lax's result there by the size of the other axis. docs/tpu.md says so."""
    case = convolution(2, 4, 1)
    mesh = make_mesh({"data": 2, "other": 2})
    for contraction in CONTRACTIONS:
        found = {(c.kind, c.axes) for c in sent(case, contraction, mesh)}
        assert found == {("all-gather", ("data",))}, contraction


# Everything else that a program may have.


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_compiles(name, kind):
    operation, arrays = OPERATIONS[name]
    mesh = make_mesh({"data": 2, "other": 2}, kind)
    batched = 2 if name == "kernel's gradient" else 1
    operands = [
        jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, P("data") if i < batched else P())
        )
        for i, x in enumerate(arrays)
    ]
    with jax.set_mesh(mesh):
        program = jax.jit(with_gradients(operation)).lower(*operands).compile()
    assert {c.axes for c in collectives(program, mesh)} <= {("data",)}


def test_pmap_compiles():
    case = convolution(2, 4, 1)
    lhs = jax.ShapeDtypeStruct((4, BATCH // 4, *case.lhs[1:]), np.float32)
    rhs = jax.ShapeDtypeStruct(case.rhs, np.float32)

    def gradient(x, w):
        return lax.psum(jax.grad(lambda w: jnp.sum(case.conv()(x, w) ** 2))(w), "data")

    mapped = jax.pmap(gradient, "data", in_axes=(0, None), devices=devices())
    program = mapped.lower(lhs, rhs).compile()
    (sum_of_gradients,) = collectives(program, make_mesh({"data": 4}))
    assert sum_of_gradients.kind == "all-reduce"


def test_partly_manual_axes_compile():
    case = convolution(2, 4, 1)
    mesh = make_mesh({"data": 2, "other": 2})
    conv = jax.shard_map(
        case.conv(),
        mesh=mesh,
        in_specs=(P("data"), P()),
        out_specs=P("data"),
        axis_names={"data"},
    )
    program = compiled(case, "fprop", mesh, (P("data"), P(), P("data")), lambda x, w, _: conv(x, w))
    assert collectives(program, mesh) == []


def sharded_operands(kind: AxisType = AxisType.Auto):
    case = convolution(2, 4, 1)
    mesh = make_mesh({"data": 2, "group": 2}, kind)
    specs = on_dimensions(case, batch="data", features="group")
    return case, [
        jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(case.shapes[:2], specs[:2], strict=True)
    ]


def test_explain_names_the_device_of_the_topology():
    case, operands = sharded_operands(AxisType.Explicit)
    explanation = explain(case.conv(), *operands)
    (chosen,) = [row for row in explanation.rows if row.is_chosen]
    assert chosen.device == ("tpu", devices()[0].device_kind)
    assert chosen.spec.lhs_shape == (BATCH // 2, 8, 8, FEATURES // 2)
    assert not chosen.divided_by_xla


def test_explain_says_where_xla_divides():
    case, operands = sharded_operands()
    explanation = explain(case.conv(), *operands)
    (chosen,) = [row for row in explanation.rows if row.is_chosen]
    assert chosen.divided_by_xla
    assert chosen.spec.lhs_shape == case.lhs
    assert "B in all, which XLA divides among the devices" in str(explanation)
    assert "expected ms" not in str(explanation)


def test_explain_inside_shard_map():
    case, _ = sharded_operands()
    mesh = make_mesh({"data": 4})
    batched = jax.shard_map(case.conv(), mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in case.shapes[:2]]
    (chosen,) = [row for row in explain(batched, *shapes).rows if row.is_chosen]
    assert chosen.device.platform == "tpu"
    assert chosen.spec.lhs_shape[0] == BATCH // 4


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_nothing_is_tuned_for_devices_that_are_not_there(kind):
    case, operands = sharded_operands(kind)
    message = "tune runs what it measures, and this process has no device of the kind TPU v5 lite"
    with pytest.raises(RuntimeError, match=message):
        tune(case.conv(), *operands)


def test_a_placement_report_of_a_program_for_a_topology():
    case, (lhs, rhs) = sharded_operands()
    mesh = lhs.sharding.mesh
    loss = jax.jit(jax.grad(lambda w, x: jnp.sum(case.conv()(x, w) ** 2)))
    report = placement_report(loss.lower(rhs, lhs).compile(), mesh, held={"kernel": rhs})
    (row,) = report.rows
    assert (row.compiled_kinds, row.axes) == (("all-reduce",), ("data",))
    assert report.memory[0].nbytes == 4 * math.prod(case.rhs) // 2


def test_lax_sums_the_kernel_gradient_over_unused_axes():
    """If this fails, XLA no longer has the fault, and `xla_partitioner` can be simpler."""
    case = convolution(2, FEATURES, 1)
    mesh = make_mesh({"data": 2, "unused": 2})
    gradient = contraction_by(case.lax_conv(), "wgrad")
    program = compiled(case, "wgrad", mesh, (P("data"), P(), P("data")), gradient)
    assert [c.axes for c in collectives(program, mesh)] == [("data", "unused")]


# Bad input.


@pytest.mark.parametrize("name", ["v9:2x2", "v5e:3x3", "v5e", ""])
def test_an_unknown_topology_is_refused_with_those_that_there_are(name):
    with pytest.raises(ValueError, match=r"GENERATION:CHIPS, like v4:2x2x1, v5e:2x2, v5e:4x4"):
        topology_devices(name)


def test_a_mesh_that_is_no_box_of_chips_is_refused():
    with pytest.raises(ValueError, match="the first 3 of 4 devices form no mesh of 3 x 1"):
        towers.make_mesh(3, 1, devices())
    with pytest.raises(ValueError, match=r"needs 8 devices, there are 4$"):
        towers.make_mesh(4, 2, devices())


def test_a_mesh_of_two_platforms_is_refused():
    mesh = Mesh(np.array([devices()[0], jax.devices("cpu")[0]]), ("data",))
    x, w = (
        jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in (((4, 4, 8, 8), P("data")), ((4, 2, 3, 3), P()))
    )
    conv = functools.partial(
        grouped_conv, window_strides=(1, 1), padding="SAME", feature_group_count=2
    )
    for function in (lambda: jax.jit(conv).lower(x, w), lambda: explain(conv, x, w)):
        with pytest.raises(ValueError, match="devices of one platform, got those of cpu and tpu"):
            function()
