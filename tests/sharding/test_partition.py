"""Plain jit on meshes: what is computed where, what is sent, and that the values are right."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import partition_table
import pytest
from cases import Case, any_implementation, each_case
from comparison import assert_matches_the_oracle, value_and_gradients
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import (
    CONTRACTIONS,
    DIVIDED,
    MESH,
    SOME,
    SPLITS,
    assert_local,
    assert_right,
    compiled,
    dense,
    flops,
    make_mesh,
    on_dimensions,
    random_spec,
    resized,
    sent,
    whole_flops,
)
from transformed import (
    TRANSFORMED,
)

from grouped_conv_jax.collectives import Collective, collectives
from grouped_conv_jax.partitioning.search import best_plan
from grouped_conv_jax.spec import ConvSpec


@any_implementation
@pytest.mark.parametrize("split", ["both", "batch over two axes", "groups over two axes"])
@each_case(SOME)
def test_batch_and_groups_are_local(case, split, implementation):
    assert_local(case, split, implementation)


@pytest.mark.parametrize("split", [s for s in SPLITS if s != "both"])
def test_batch_and_groups_are_local_on_any_mesh(split):
    assert_local(SOME[1], split, None)


@pytest.mark.slow
@pytest.mark.parametrize("split", list(SPLITS))
@each_case(DIVIDED)
def test_every_case_is_local(case, split):
    assert_local(case, split, None)


def kinds(found: list[Collective]) -> list[tuple[str, tuple[str, ...], int]]:
    return sorted((c.kind, c.axes, c.devices) for c in found)


# What cannot be local: right, and with no more than it takes.


def test_outputs_of_one_group_on_several_devices_gather_the_input():
    # conv3 of AlexNet: each tower's filters see both towers.
    case = dense("all see all", (8, 6, 6, 16), (3, 3, 16, 24))
    features = P("data", None, None, "group"), P(None, None, None, "group")
    specs = (features[0], features[1], features[0])
    nbytes = 4 * 8 // 4 * 6 * 6 * 16
    found = {c: sent(case, c, MESH, specs) for c in CONTRACTIONS}
    assert [(c.kind, c.axes, c.nbytes) for c in found["fprop"]] == [
        ("all-gather", ("group",), nbytes)
    ]
    assert [(c.kind, c.axes, c.nbytes) for c in found["dgrad"]] == [
        ("reduce-scatter", ("group",), nbytes)
    ]
    assert kinds(found["wgrad"]) == [("all-gather", ("group",), 2), ("all-reduce", ("data",), 4)]
    assert_right(case, MESH, specs)


def test_a_sum_over_sharded_inputs_is_one_all_reduce():
    case = dense("row parallel", (2, 6, 6, 16), (3, 3, 16, 24))
    specs = (P(None, None, None, "group"), P(None, None, "group"), P())
    assert kinds(sent(case, "fprop", MESH, specs)) == [("all-reduce", ("group",), 2)]
    assert kinds(sent(case, "dgrad", MESH, specs)) == []
    assert kinds(sent(case, "wgrad", MESH, specs)) == []
    assert_right(case, MESH, specs)


def test_channels_cut_through_groups_talk_within_their_group():
    # Four groups on eight devices: each device has half of one group's inputs and outputs.
    mesh = make_mesh(group=8)
    case = dense("cut", (1, 16, 16, 32), (3, 3, 8, 32), groups=4)
    whole = int(np.prod(case.lhs)) * 4
    features = P(None, None, None, "group")
    for contraction in CONTRACTIONS:
        found = sent(case, contraction, mesh, (features,) * 3)
        assert all(c.devices == 2 for c in found)
        assert 0 < sum(c.nbytes for c in found) <= 2 * whole / 4
        # XLA does not look into native kernels.
        alone = whole_flops(case, contraction, "xla")
        work = flops(compiled(case, contraction, mesh, (features,) * 3, "xla"))
        assert work == pytest.approx(alone / 8, rel=0.1)
    assert_right(case, mesh, (features,) * 3)


def test_groups_that_the_axis_does_not_divide():
    # Six groups on four devices: two parts of three groups, and the rest is found elsewhere.
    mesh = make_mesh(group=4)
    case = dense("six groups", (4, 8, 8, 24), (3, 3, 4, 24), groups=6)
    features = P(None, None, None, "group")
    for contraction in CONTRACTIONS:
        found = sent(case, contraction, mesh, (features,) * 3)
        assert found
        assert all(c.devices == 2 for c in found)
        # Half of an activation and half of the kernel, gathered by two; or less.
        assert sum(c.nbytes for c in found) <= 4 * (case_size(case, 0) + case_size(case, 1)) / 2
    assert_right(case, mesh, (features,) * 3)


def case_size(case: Case, role: int) -> int:
    return int(np.prod(case.shapes[role]))


def test_a_kernel_that_is_sharded_otherwise_is_what_is_moved():
    case = dense("kernel apart", (8, 16, 16, 16), (3, 3, 4, 16), groups=4)
    batch = P("data", None, None, "group")
    kernel_bytes = 4 * int(np.prod(case.rhs))
    for kernel in (P(None, None, "group"), P(None, None, None, "data"), P(None, None, "data")):
        for contraction in ("fprop", "dgrad"):
            found = sent(case, contraction, MESH, (batch, kernel, batch))
            assert 0 < sum(c.nbytes for c in found) <= 2 * kernel_bytes
        assert_right(case, MESH, (batch, kernel, batch))


@pytest.mark.parametrize("sizes", [(4, 2), (2, 4)], ids=str)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kernel", [P(None, None, None, "fsdp"), P(None, None, "fsdp")], ids=str)
def test_a_kernel_sharded_over_a_part_of_the_batch_is_what_is_gathered(sizes, groups, kernel):
    # Fully sharded data parallelism: the batch over both axes, the kernel over one.
    mesh = make_mesh(data=sizes[0], fsdp=sizes[1])
    case = dense("fsdp", (8, 16, 16, 16), (3, 3, 16 // groups, 16), groups)
    batch = P(("data", "fsdp"))
    nbytes = 4 * int(np.prod(case.rhs))
    for contraction in ("fprop", "dgrad"):
        found = sent(case, contraction, mesh, (batch, kernel, batch))
        assert [(c.kind, c.axes, c.nbytes) for c in found] == [("all-gather", ("fsdp",), nbytes)]
    found = sent(case, "wgrad", mesh, (batch, kernel, batch))
    assert {c.kind for c in found} <= {"all-reduce", "reduce-scatter"}
    assert sum(c.nbytes for c in found) <= 2 * nbytes
    assert_right(case, mesh, (batch, kernel, batch))


def test_the_gradient_of_a_kernel_sharded_like_the_batch_is_scattered():
    # As in ZeRO: each device keeps a part of the kernel for the examples of all.
    mesh = make_mesh(data=8)
    case = dense("zero", (8, 16, 16, 16), (3, 3, 4, 16), groups=4)
    specs = (P("data"), P(None, None, None, "data"), P("data"))
    assert kinds(sent(case, "wgrad", mesh, specs)) == [("reduce-scatter", ("data",), 8)]
    assert kinds(sent(case, "fprop", mesh, specs)) == [("all-gather", ("data",), 8)]
    assert_right(case, mesh, specs)


@any_implementation
@pytest.mark.parametrize("batch", [5, 6, 7])
def test_a_batch_that_the_axis_does_not_divide(batch, implementation):
    case = dense("uneven", (batch, 5, 6, 8), (3, 2, 2, 12), groups=4)
    batched = P("data", None, None, "group")
    assert_right(case, MESH, (batched, P(None, None, None, "group"), batched), implementation)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_any_sharding_of_any_case_is_right(seed):
    draw = np.random.default_rng(seed)
    meshes = [{"data": 4, "group": 2}, {"data": 2, "group": 4}, {"a": 2, "b": 2, "c": 2}]
    meshes += [{"d": 8}, {"data": 2, "group": 3}]
    for _ in range(40):
        case = resized(DIVIDED[draw.integers(len(DIVIDED))], draw)
        mesh = make_mesh(**meshes[draw.integers(len(meshes))])
        specs = [random_spec(shape, mesh, draw) for shape in case.shapes]
        assert_right(case, mesh, specs)


# The choice, without devices.


def spec_of(case: Case) -> ConvSpec:
    jaxpr = jax.make_jaxpr(case.conv())(*(np.zeros(s, np.float32) for s in case.shapes[:2]))
    return jaxpr.eqns[0].params["spec"]


def test_the_choice_of_what_each_axis_splits():
    spec = spec_of(dense("choice", (8, 8, 8, 16), (3, 3, 4, 16), groups=4))
    sizes = {"a": 2, "b": 2, "c": 2}
    by_batch, by_features = (("a", "b"), (), (), ()), ((), (), (), ("a", "b", "c"))
    whole = ((),) * 4
    plan = best_plan("fprop", spec, {"lhs": by_batch, "rhs": whole, "out": whole}, sizes)
    assert dict(plan.split) == {"N": ("a", "b")}
    # Four groups: two axes for them, the third one has the outputs of a group.
    plan = best_plan("fprop", spec, dict.fromkeys(("lhs", "rhs", "out"), by_features), sizes)
    assert dict(plan.split) == {"G": ("a", "b"), "O": ("c",)}
    plan = best_plan("wgrad", spec, {"lhs": by_batch, "out": by_batch, "rhs": by_features}, sizes)
    assert dict(plan.split) == {"N": ("a", "b")}
    assert dict(plan.scattered) == {3: ("a", "b")}
    plan = best_plan("fprop", spec, {"lhs": whole, "rhs": whole, "out": whole}, sizes)
    assert dict(plan.split) == {}


# Transformations.


def placed(case: Case) -> list[jax.Array]:
    specs = on_dimensions(case, batch="data", features="group")
    return [
        jax.device_put(x, NamedSharding(MESH, spec))
        for x, spec in zip(case.random(), specs, strict=True)
    ]


@any_implementation
@pytest.mark.parametrize("transform", TRANSFORMED, ids=lambda f: f.__name__)
def test_transformed_on_a_mesh_is_as_on_one_device(transform, implementation):
    case = dense("transformed", (8, 5, 6, 8), (3, 2, 2, 12), groups=4)
    x, w, _ = placed(case)
    program = jax.jit(transform(case.conv(implementation)))
    expected = jax.jit(transform(case.lax_conv()))(*case.random()[:2])
    length = max(case.lengths) ** 2
    for actual, e in zip(program(x, w), expected, strict=True):
        oracle.assert_close(actual, np.asarray(e), length)


@pytest.mark.parametrize("transform", TRANSFORMED, ids=lambda f: f.__name__)
def test_transformed_on_a_mesh_is_local(transform):
    case = dense("transformed", (8, 5, 6, 8), (3, 2, 2, 12), groups=4)
    x, w, _ = placed(case)
    program = jax.jit(transform(case.conv())).lower(x, w).compile()
    found = collectives(program, MESH)
    # Sums over the batch for kernel gradients, and scalars; nothing is gathered.
    assert {c.kind for c in found} <= {"all-reduce"}


@pytest.mark.parametrize("axis", [0, 1])
def test_a_mapped_axis_can_be_sharded_and_the_batch_beside_it(axis):
    # Frames of videos: mapped over the frames, or over the videos.
    case = dense("frames", (8, 5, 6, 8), (3, 2, 2, 12), groups=4)
    videos = jax.ShapeDtypeStruct(
        (8, 4, *case.lhs[1:]), np.float32, sharding=NamedSharding(MESH, P("data", "group"))
    )
    kernel = jax.ShapeDtypeStruct(case.rhs, np.float32, sharding=NamedSharding(MESH, P()))
    mapped = jax.vmap(case.conv(), (axis, None), axis)
    program = jax.jit(mapped).lower(videos, kernel).compile()
    assert collectives(program, MESH) == []
    assert program.output_shardings.spec[:2] == ("data", "group")


def test_jit_of_several_devices_from_outside_jit_and_from_shardings_without_a_mesh():
    case = dense("eager", (8, 5, 6, 8), (3, 2, 2, 12), groups=4)
    x, w, _ = placed(case)
    length = case.lengths[0]
    expected = oracle.forward(*case.random()[:2], **case.arguments)
    oracle.assert_close(case.conv()(x, w), expected, length)
    stacked = jax.pmap(lambda x: x)(case.random()[0])
    oracle.assert_close(jax.jit(case.conv())(stacked, np.asarray(w)), expected, length)


def test_a_sharded_program_can_be_exported():
    case = dense("exported", (8, 5, 6, 8), (3, 2, 2, 12), groups=4)
    operands = placed(case)
    program = jax.export.export(value_and_gradients(case.conv()))(*operands)
    assert program.nr_devices == 8
    assert_matches_the_oracle(jax.jit(program.call)(*operands), case, case.random())


@pytest.mark.usefixtures("x64")
def test_64_bit_types_of_a_context():
    case = dense("64 bits", (8, 8, 6, 8), (3, 2, 2, 12), groups=4)
    rows = P(None, "data", None, "group")
    shardings = [NamedSharding(MESH, s) for s in (rows, P(None, None, None, "group"), rows)]
    operands = case.random(np.float64)
    placed = jax.device_put(tuple(operands), tuple(shardings))
    actual = value_and_gradients(case.conv())(*placed)
    assert all(a.dtype == np.float64 for a in actual)
    assert_matches_the_oracle(actual, case, operands)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_16_bit_types(dtype):
    # Sums over devices are made of what each has rounded: as many more roundings as devices.
    case = dense("16 bits", (8, 8, 6, 8), (3, 2, 2, 12), groups=4)
    rows = P("data", "group")
    operands = case.random(dtype)
    shardings = [NamedSharding(MESH, s) for s in (rows, P(), rows)]
    placed = jax.device_put(tuple(operands), tuple(shardings))
    actual = value_and_gradients(case.conv())(*placed)
    expected = case.contractions(*operands)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.asarray(a, np.float64), e, atol=4 * eps * np.abs(e).max())


def test_a_program_has_one_mesh():
    # JAX's own limit for what is told its devices when it is lowered.
    case = dense("two meshes", (8, 5, 6, 8), (3, 2, 2, 12), groups=4)
    x, w, _ = case.random()
    x = jax.device_put(x, NamedSharding(make_mesh(data=8), P("data")))
    w = jax.device_put(w, NamedSharding(MESH, P()))
    with pytest.raises(ValueError, match="mesh should be the same"):
        jax.jit(case.conv())(x, w)


def test_what_xla_sees_tells_specs_apart():
    # The key of the persistent compilation cache can be made without the pointer to the callback.
    texts = []
    for padding in ("SAME", [(2, 0), (1, 0)]):
        case = dense("padded", (8, 5, 6, 8), (3, 2, 2, 12), groups=4, padding=padding)
        x, w, _ = placed(case)
        text = jax.jit(case.conv("xla")).lower(x, w).as_text()
        assert "CustomSPMDPartitioning" in text
        texts.append(re.sub(r'backend_config = "\d+"', "", text))
    assert "fprop xla" in texts[0]
    assert texts[0] != texts[1]


def test_an_implementation_that_cannot_says_so_by_itself(monkeypatch):
    from grouped_conv_jax.algorithms.table import TABLE

    case = dense("refused", (8, 5, 6, 8), (3, 2, 2, 12), groups=4)
    monkeypatch.setattr(type(TABLE["vmap"]), "supports", lambda *_: "not today")
    with pytest.raises(NotImplementedError, match="not today"):
        compiled(case, "fprop", MESH, (P(),) * 3, "vmap")


@pytest.mark.slow
def test_the_table_in_the_docs_is_what_its_command_writes():
    table = partition_table.page(MESH)
    committed = (Path(partition_table.__file__).parents[1] / "docs" / "partition.md").read_text()
    rows = [[line for line in text.splitlines() if "|" in line] for text in (table, committed)]
    assert len(rows[0]) == 2 + 2 * 3 * len(partition_table.SHARDED)
    assert rows[0] == rows[1]
