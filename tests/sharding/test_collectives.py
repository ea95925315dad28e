"""What is read from a compiled program is what was written in it."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from grouped_conv_jax.collectives import collectives

SHAPE = (16, 16)
ON_4_BY_2 = (("data", 4), ("group", 2))
ON_2_BY_2_BY_2 = (("a", 2), ("b", 2), ("c", 2))


def mesh_of(axes, devices=None):
    names, sizes = zip(*axes, strict=True)
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(sizes, names, (AxisType.Auto,) * len(names), devices=devices)


def read(function, mesh):
    """The collectives of a program that every device runs on its block of a (16, 16) array."""
    block = P(mesh.axis_names[0], mesh.axis_names[1:])
    program = jax.shard_map(function, mesh=mesh, in_specs=block, out_specs=P(), check_vma=False)
    x = jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=NamedSharding(mesh, block))
    return collectives(jax.jit(program).lower(x).compile(), mesh)


BLOCK = 16 * 16 * 4 // 8
CASES = {
    "psum": (lambda x, axes: lax.psum(x, axes), "all-reduce", lambda n: BLOCK),
    "all_gather": (lambda x, axes: lax.all_gather(x, axes), "all-gather", lambda n: n * BLOCK),
    "psum_scatter": (
        lambda x, axes: lax.psum_scatter(jnp.ravel(x), axes, tiled=True),
        "reduce-scatter",
        lambda n: BLOCK,
    ),
    "all_to_all": (
        lambda x, axes: lax.all_to_all(jnp.ravel(x), axes, 0, 0, tiled=True),
        "all-to-all",
        lambda n: BLOCK,
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("mesh_axes", "axes"),
    [
        (ON_4_BY_2, ("data",)),
        (ON_4_BY_2, ("group",)),
        (ON_4_BY_2, ("data", "group")),
        (ON_4_BY_2, ("group", "data")),
        (ON_2_BY_2_BY_2, ("b",)),
        (ON_2_BY_2_BY_2, ("a", "c")),
        (ON_2_BY_2_BY_2, ("b", "c")),
        (ON_2_BY_2_BY_2, ("a", "b", "c")),
    ],
)
def test_kind_bytes_axes_and_devices(name, mesh_axes, axes):
    function, kind, nbytes = CASES[name]
    mesh = mesh_of(mesh_axes)
    (found,) = read(lambda x: function(x, axes), mesh)
    devices = int(np.prod([mesh.shape[axis] for axis in axes]))
    assert (found.kind, found.nbytes, found.devices) == (kind, nbytes(devices), devices)
    assert found.axes == tuple(axis for axis in mesh.axis_names if axis in axes)
    assert "shard_map" in found.op_name


@pytest.mark.parametrize(("axis", "size"), ON_4_BY_2)
def test_permutation(axis, size):
    pairs = [(i, (i + 1) % size) for i in range(size)]
    (found,) = read(lambda x: lax.ppermute(x, axis, pairs), mesh_of(ON_4_BY_2))
    assert (found.kind, found.nbytes, found.axes) == ("collective-permute", BLOCK, (axis,))


@pytest.mark.parametrize("axis", ["data", "group"])
def test_devices_in_any_order(axis):
    devices = np.array(jax.devices())[[3, 1, 0, 2, 7, 5, 4, 6]].reshape(4, 2)
    (found,) = read(lambda x: lax.psum(x, axis), Mesh(devices, ("data", "group")))
    assert found.axes == (axis,)


def test_half_of_an_axis():
    halves = [[0, 1], [2, 3]]
    (found,) = read(lambda x: lax.psum(x, "data", axis_index_groups=halves), mesh_of(ON_4_BY_2))
    assert (found.axes, found.devices) == (("data",), 2)


def test_an_axis_of_one_device_moves_nothing():
    mesh = mesh_of((("data", 8), ("group", 1)))
    assert read(lambda x: lax.psum(x, "group"), mesh) == []
    assert [c.axes for c in read(lambda x: lax.psum(x, ("data", "group")), mesh)] == [("data",)]


def test_a_program_of_the_partitioner():
    mesh = mesh_of(ON_4_BY_2)
    x = jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=NamedSharding(mesh, P("data", "group")))
    compiled = jax.jit(lambda x: jnp.sum(x, axis=0)).lower(x).compile()
    (found,) = collectives(compiled, mesh)
    assert (found.kind, found.nbytes, found.axes) == ("all-reduce", 8 * 4, ("data",))
    assert found.op_name.endswith("reduce_sum")


def test_pmap():
    compiled = jax.pmap(lambda x: lax.psum(x, "data"), axis_name="data")
    compiled = compiled.lower(jnp.ones((8, 3))).compile()
    (found,) = collectives(compiled, mesh_of((("data", 8),)))
    assert (found.kind, found.nbytes, found.axes) == ("all-reduce", 3 * 4, ("data",))


def test_a_program_of_more_devices_than_the_mesh_is_refused():
    x = jax.ShapeDtypeStruct(
        SHAPE, jnp.float32, sharding=NamedSharding(mesh_of(ON_4_BY_2), P("data"))
    )
    compiled = jax.jit(jnp.sum).lower(x).compile()
    with pytest.raises(ValueError, match="runs on 8 devices, the mesh has 2"):
        collectives(compiled, mesh_of((("data", 2),), jax.devices()[:2]))


# Forms that the CPU backends of the supported versions do not print.


def printed(instruction, header="num_partitions=8"):
    entry = f"ENTRY %main () -> f32[2] {{\n  %x = f32[9]{{0}} parameter(0)\n  {instruction}\n}}\n"
    return types.SimpleNamespace(as_text=lambda: f"HloModule jit_f, {header}\n\n{entry}")


@pytest.mark.parametrize(
    ("groups", "axes", "devices"),
    [
        ("[4,2]<=[8]", ("group",), 2),
        ("[2,4]<=[4,2]T(1,0)", ("data",), 4),
        ("[1,8]<=[8]", ("data", "group"), 8),
        ("{}", ("data", "group"), 8),
        ("{{0, 2}, {4, 6}, {1, 3}, {5, 7}}", ("data",), 2),
        ("{{0},{1,2},{3}}", ("data", "group"), 2),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", ("group",), 2),
        ("mesh['axis_0'=8] {'axis_0'}", ("data", "group"), 8),
        ("mesh['axis_0'=8] {'axis_0':(1)4}", ("data",), 4),
        ("mesh['axis_0'=8] {'axis_0':(4)2}", ("group",), 2),
        ("mesh['axis_0'=8] {'axis_0':(2)2}", ("data",), 2),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ("data", "group"), 4),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", ("group",), 2),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ("data",), 4),
        ("mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'b'}", ("data",), 4),
    ],
)
def test_ways_to_print_groups(groups, axes, devices):
    program = printed(
        "ROOT %r = f32[3]{0} all-reduce(%x), channel_id=1, "
        f'replica_groups={groups}, use_global_device_ids=true, metadata={{op_name="f"}}'
    )
    (found,) = collectives(program, mesh_of(ON_4_BY_2))
    assert (found.axes, found.devices, found.nbytes) == (axes, devices, 12)


@pytest.mark.parametrize("groups", ["{{0},{1}}", "[8,1]<=[8]", "mesh['a'=8,'b'=1] {'b'}"])
def test_groups_of_one_device_move_nothing(groups):
    program = printed(
        f"%r = f32[3] all-gather(%x), replica_groups={groups}, channel_id=1, "
        "use_global_device_ids=true"
    )
    assert collectives(program, mesh_of(ON_4_BY_2)) == []


PAIRS = "channel_id=1, source_target_pairs={{0,1},{1,0},{2,2}}"
GROUPS = "channel_id=1, replica_groups=[4,2]<=[8], use_global_device_ids=true"


@pytest.mark.parametrize(
    ("instruction", "kind", "nbytes"),
    [
        (f"%s = (f32[3]{{0}}, f32[6]{{0}}) all-gather-start(%x), {GROUPS}", "all-gather", 24),
        (
            "%s = ((f32[3], bf16[2]), (f32[6], bf16[4])) all-gather-start(%x, %y), " + GROUPS,
            "all-gather",
            24 + 8,
        ),
        (f"%s = f32[3] all-reduce-start(%x), {GROUPS}", "all-reduce", 12),
        (f"%s = (f32[3], pred[5]) all-reduce-start(%x, %y), {GROUPS}", "all-reduce", 12 + 5),
        (
            "%s = ((f32[6]), f32[3], u32[]) reduce-scatter-start(%x), " + GROUPS,
            "reduce-scatter",
            24,
        ),
        (
            "%s = (bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, bf16[2,3]{1,0}, u32[], u32[]) "
            f"collective-permute-start(%x), {PAIRS}",
            "collective-permute",
            12,
        ),
        (f"%s = (f32[3], /*index=1*/f32[]) all-reduce(%x, %y), {GROUPS}", "all-reduce", 16),
        (f"%s = (s4[3], f8e4m3fn[2]) all-gather(%x, %y), {GROUPS}", "all-gather", 2 + 2),
        (f"%s = c64[3]{{0}} reduce-scatter(%x), {GROUPS}", "reduce-scatter", 48),
        (f"%s = f32[3] collective-permute(%x), {PAIRS}", "collective-permute", 12),
    ],
)
def test_ways_to_print_what_is_moved(instruction, kind, nbytes):
    done = f"\n  %d = f32[6] {kind}-done(%s)" if "-start" in instruction else ""
    (found,) = collectives(printed(instruction + done), mesh_of(ON_4_BY_2))
    assert (found.kind, found.nbytes, found.axes) == (kind, nbytes, ("group",))


def test_parts_of_a_combined_collective():
    """The sums of two layers, which XLA combines, and of the layer that gives each its name."""

    def program(x):
        with jax.named_scope("first"):
            first = lax.psum(x, "data")
        with jax.named_scope("second"):
            return first, lax.psum(x[:1] * 2, "data")

    mesh = mesh_of(ON_4_BY_2)
    (found,) = read(program, mesh)
    assert (found.kind, found.nbytes) == ("all-reduce", BLOCK + BLOCK // 4)
    assert {name.split("/")[-2]: nbytes for name, nbytes in found.parts} == {
        "first": BLOCK,
        "second": BLOCK // 4,
    }


def test_a_collective_that_overlaps_with_several_fusions_is_one():
    """XLA:TPU repeats it in each of the fusions, under the same chain."""
    lines = [
        f'%r = f32[6] all-gather(%x), {GROUPS}, frontend_attributes={{chain_id="{chain}"}}'
        for chain in (0, 0, 1)
    ]
    program = printed("\n  ".join([*lines, f"%r = f32[3] all-gather(%x), {GROUPS}"]))
    found = collectives(program, mesh_of(ON_4_BY_2))
    assert [c.nbytes for c in found] == [24, 24, 12]


def test_an_all_reduce_of_which_each_device_keeps_a_part_is_a_reduce_scatter():
    """XLA:TPU has a fusion for it."""
    text = f"""HloModule m, num_partitions=8

%all-reduce-scatter.1 (input: f32[6]) -> f32[3] {{
  %all-reduce.1 = f32[6] all-reduce(%input), {GROUPS}
}}

ENTRY %main (x: f32[6]) -> f32[6] {{
  %all-reduce.2 = f32[6] all-reduce(%x), {GROUPS}
}}
"""
    program = types.SimpleNamespace(as_text=lambda: text)
    found = collectives(program, mesh_of(ON_4_BY_2))
    assert [(c.kind, c.nbytes) for c in found] == [("reduce-scatter", 24), ("all-reduce", 24)]


def test_names_that_do_not_fit_the_arrays():
    for name in ("f/(a:b)", "f/(a/psum", "f/psum"):
        program = printed(
            f'%s = (f32[3], f32[1], f32[2]) all-reduce(%x), {GROUPS}, metadata={{op_name="{name}"}}'
        )
        (found,) = collectives(program, mesh_of(ON_4_BY_2))
        assert found.parts == ((name, 24),)


@pytest.mark.parametrize(
    ("instruction", "axes"),
    [
        ("all-reduce(%x), replica_groups={{0,1}}, use_global_device_ids=false", ("a",)),
        ("all-reduce(%x), replica_groups={}", ("a",)),
        ("all-reduce(%x), channel_id=1, replica_groups={{0},{1}}", ("b",)),
        ("all-reduce(%x), channel_id=1, replica_groups={{0,1}}", ("a", "b")),
        ("all-to-all(%x), channel_id=1, replica_groups={{0,1,2,3}}", ("b",)),
        ("collective-permute(%x), channel_id=1, source_target_pairs={{0,3}}", ("b",)),
        ("collective-permute(%x), source_target_pairs={{0,1}}", ("a",)),
    ],
)
def test_numbers_of_replicas_and_of_partitions(instruction, axes):
    program = printed(f"%r = f32[3] {instruction}", "replica_count=2, num_partitions=4")
    (found,) = collectives(program, mesh_of((("a", 2), ("b", 4))))
    assert found.axes == axes


def test_what_is_not_known_is_not_guessed():
    program = printed("%r = f32[3] all-reduce(%x), channel_id=1, replica_groups=<0,1>")
    with pytest.raises(NotImplementedError, match="who exchanges with whom"):
        collectives(program, mesh_of(ON_4_BY_2))
    with pytest.raises(NotImplementedError, match="does not print"):
        collectives(types.SimpleNamespace(as_text=lambda: None), mesh_of(ON_4_BY_2))
