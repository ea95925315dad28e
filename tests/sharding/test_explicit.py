"""Meshes with Explicit axes, where the sharding is a part of the type."""

import functools
import subprocess
import sys

import jax
import numpy as np
import oracle
import pytest
from cases import Case, any_implementation, random
from comparison import assert_matches_the_oracle, value_and_gradients
from jax.experimental import serialize_executable
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from per_device import (
    BATCHED,
    CASE,
    KERNEL,
    assert_second_order,
    mesh,
    second_order,
    wave,
)

from grouped_conv_jax.collectives import collectives


@pytest.fixture
def explicit():
    with jax.set_mesh(mesh(AxisType.Explicit)):
        yield


def spec_of(array) -> P:
    # Without the Nones at the end, which are the same.
    names = list(jax.typeof(array).sharding.spec)
    while names and names[-1] is None:
        names.pop()
    return P(*names)


def place(specs):
    return [jax.device_put(a, spec) for a, spec in zip(CASE.random(), specs, strict=True)]


def outside_jit(conv):
    def compute(x, w, y):
        out, vjp = jax.vjp(conv, x, w)
        return out, *vjp(y)

    return compute


@pytest.mark.usefixtures("explicit")
@any_implementation
@pytest.mark.parametrize("how", ["jit", "outside jit"])
def test_a_batch_sharded_input_gives_a_batch_sharded_result(how, implementation):
    specs = (P("data"), P(), P("data"))
    conv = CASE.conv(implementation)
    compute = value_and_gradients(conv) if how == "jit" else outside_jit(conv)
    actual = compute(*place(specs))
    assert [spec_of(a) for a in actual] == [P("data"), P("data"), P()]
    assert_matches_the_oracle(actual, CASE, CASE.random())


@pytest.mark.usefixtures("explicit")
@any_implementation
@pytest.mark.parametrize("form", ["PartitionSpec", "NamedSharding"])
def test_out_sharding_of_a_kernel_sharded_by_groups(form, implementation):
    out = BATCHED if form == "PartitionSpec" else NamedSharding(jax.sharding.get_mesh(), BATCHED)
    conv = CASE.conv(implementation, out_sharding=out)
    actual = value_and_gradients(conv)(*place((P("data"), KERNEL, BATCHED)))
    assert [spec_of(a) for a in actual] == [BATCHED, P("data"), KERNEL]
    assert_matches_the_oracle(actual, CASE, CASE.random())


@pytest.mark.usefixtures("explicit")
@any_implementation
def test_second_order_on_explicit_axes(implementation):
    x, w, _ = place((P("data"), P(), P("data")))
    actual = jax.jit(second_order(CASE.conv(implementation)))(x, w)
    assert [spec_of(a) for a in actual] == [P("data"), P()]
    assert_second_order(actual)


@pytest.mark.usefixtures("explicit")
@any_implementation
@pytest.mark.parametrize(
    ("lhs", "rhs", "out"),
    [
        (BATCHED, KERNEL, BATCHED),
        (BATCHED, P(), BATCHED),
        (P("data"), KERNEL, BATCHED),
        (KERNEL, KERNEL, KERNEL),
        (P(None, None, None, ("group", "data")), P(), P(None, None, None, ("group", "data"))),
        (P(None, "data", None, "group"), P(), P(None, "data", None, "group")),
    ],
    ids=str,
)
def test_the_sharding_of_the_result_follows_from_the_operands(lhs, rhs, out, implementation):
    # Eight groups, for eight devices, and eight rows.
    case = Case("explicit", (8, 16, 6, 16), (3, 2, 2, 24), {
        **CASE.arguments, "feature_group_count": 8
    })  # fmt: skip
    operands = case.random()
    placed = [jax.device_put(a, spec) for a, spec in zip(operands, (lhs, rhs, out), strict=True)]
    compute = value_and_gradients(case.conv(implementation))
    actual = compute(*placed)
    assert [spec_of(a) for a in actual] == [out, lhs, rhs]
    assert_matches_the_oracle(actual, case, operands)
    # Everything stays where it is; only rows need those of the neighbours.
    program = jax.jit(case.conv(implementation)).lower(*placed[:2]).compile()
    sent = {c.kind for c in collectives(program, jax.sharding.get_mesh())}
    assert sent == ({"collective-permute"} if "data" in lhs[1:2] else set())


@pytest.mark.usefixtures("explicit")
def test_outputs_may_be_sharded_within_a_group():
    case = Case("dense", CASE.lhs, (3, 2, 8, 12), {**CASE.arguments, "feature_group_count": 1})
    operands = case.random()
    for lhs in (P("data"), BATCHED):
        x, w, y = map(jax.device_put, operands, (lhs, KERNEL, BATCHED))
        actual = value_and_gradients(case.conv())(x, w, y)
        assert [spec_of(a) for a in actual] == [BATCHED, lhs, KERNEL]
        assert_matches_the_oracle(actual, case, operands)


@pytest.mark.usefixtures("explicit")
@pytest.mark.parametrize(
    ("groups", "lhs", "rhs", "message"),
    [
        (4, BATCHED, P(None, None, "group"), "rhs is sharded over 'group' in its input features"),
        (4, P(), P("group"), "rhs is sharded over 'group' in its input features or its taps"),
        (4, BATCHED, P(None, None, None, "data"), "features of lhs .* 'group', and the outputs"),
        (4, P("data"), P(None, None, None, "data"), "sharded twice over 'data', 'data'"),
        (1, BATCHED, P(), "2 devices, which cuts through its feature_group_count=1, so"),
        (4, P(None, None, "group"), P(), "'group' .2 devices. would not divide dimension 2"),
    ],
)
def test_what_does_not_follow_is_refused_with_the_mend(groups, lhs, rhs, message):
    x = jax.device_put(np.ones((8, 5, 6, 8), np.float32), lhs)
    w = jax.device_put(np.ones((4, 4, 8 // groups, 12), np.float32), rhs)
    conv = functools.partial(
        CASE.conv(padding="VALID", window_strides=(1, 1), feature_group_count=groups)
    )
    with pytest.raises(ValueError, match=message) as error:
        jax.jit(conv)(x, w)
    assert "out_sharding=jax.P(...)" in str(error.value)
    assert "jax.sharding.reshard" in str(error.value)
    # It does once it is said.
    said = jax.jit(
        CASE.conv(
            padding="VALID",
            window_strides=(1, 1),
            feature_group_count=groups,
            out_sharding=P("data"),
        )
    )(x, w)
    assert spec_of(said) == P("data")
    expected = np.full(said.shape, 16 * 8 / groups)
    np.testing.assert_array_equal(said, expected)


@pytest.mark.usefixtures("explicit")
def test_sums_that_are_yet_to_be_made_are_refused():
    w = place((P(), P(), P()))[1]

    def conv(x):
        return CASE.conv()(jax.sharding.reshard(x, P("data", unreduced=frozenset({"group"}))), w)

    with pytest.raises(ValueError, match="must not have unreduced or reduced mesh axes"):
        jax.jit(conv)(CASE.random()[0])


@pytest.mark.usefixtures("explicit")
@any_implementation
def test_gradients_for_each_example_on_explicit_axes(implementation):
    x, w, _ = place((BATCHED, KERNEL, BATCHED))
    conv = CASE.conv(implementation)
    each = jax.vmap(jax.grad(lambda w, x: wave(conv)(x[None], w)), (None, 0))
    actual = jax.jit(each)(w, x)
    assert spec_of(actual) == P("data", *KERNEL)
    x, w = (np.asarray(a) for a in (x, w))
    expected = [jax.grad(lambda w, x=x: wave(CASE.lax_conv())(x[None], w))(w) for x in x]
    length = oracle.lengths(*CASE.shapes, **CASE.arguments)
    oracle.assert_close(actual, np.stack(expected), length[0] * length[2])


@pytest.mark.usefixtures("explicit")
def test_the_type_of_the_result_is_that_of_lax():
    x, w, _ = place((P("data"), P(), P("data")))
    rows = jax.device_put(np.ones((1, 8, 4, 8), np.float32), P(None, None, "data"))
    for lhs in (x, rows):
        ours, theirs = (jax.typeof(conv(lhs, w)) for conv in (CASE.conv(), CASE.lax_conv()))
        assert ours == theirs


@pytest.mark.usefixtures("explicit")
def test_vmap_over_a_sharded_axis_keeps_its_sharding_as_in_lax():
    stack = jax.device_put(random("stack", (4, 2, *CASE.lhs[1:]), np.float32), P("data"))
    w = place((P(), P(), P()))[1]
    ours, theirs = (
        jax.jit(jax.vmap(lambda x, conv=conv: conv(x, w)))(stack)
        for conv in (CASE.conv(), CASE.lax_conv())
    )
    assert spec_of(ours) == spec_of(theirs) == P("data")
    length = oracle.lengths(*CASE.shapes, **CASE.arguments)[0]
    oracle.assert_close(ours, np.asarray(theirs), length)


@pytest.mark.usefixtures("explicit")
def test_vmap_over_kernels_keeps_the_sharding_of_the_batch():
    x = place((P("data"), P(), P()))[0]
    kernels = random("kernels", (3, *CASE.rhs), np.float32)
    out = jax.jit(jax.vmap(CASE.conv(), (None, 0)))(x, kernels)
    assert spec_of(out) == P(None, "data")
    length = oracle.lengths(*CASE.shapes, **CASE.arguments)[0]
    for kernel, o in zip(kernels, np.asarray(out), strict=True):
        oracle.assert_close(o, oracle.forward(np.asarray(x), kernel, **CASE.arguments), length)


@pytest.mark.usefixtures("explicit")
def test_batch_groups_of_a_sharded_batch_are_taken_as_lax_takes_them():
    x, w = (random(n, s, np.float32) for n, s in (("x", (8, 3, 5)), ("w", (4, 3, 3))))
    arguments = {"window_strides": (1,), "padding": "SAME", "batch_group_count": 2}
    case = Case("batch groups", x.shape, w.shape, arguments)
    placed = jax.device_put(x, P("data"))
    ours, theirs = (conv(placed, w) for conv in (case.conv(), case.lax_conv()))
    assert spec_of(ours) == spec_of(theirs)
    oracle.assert_close(ours, oracle.forward(x, w, **arguments), 9)


@pytest.mark.usefixtures("explicit")
def test_an_unreduced_result_is_refused():
    x, w, _ = place((BATCHED, P(), BATCHED))
    unreduced = P("data", unreduced=frozenset({"group"}))
    with pytest.raises(ValueError, match="out_sharding must not have unreduced or reduced"):
        CASE.conv(out_sharding=unreduced)(x, w)


@pytest.mark.usefixtures("explicit")
def test_an_unknown_axis_is_refused():
    x, w, _ = place((P("data"), P(), P()))
    with pytest.raises(ValueError, match="daata"):
        CASE.conv(out_sharding=P("daata"))(x, w)


def test_a_sharding_without_a_mesh_is_refused_as_in_lax():
    x, w, _ = CASE.random()
    for conv in (CASE.conv, CASE.lax_conv):
        with pytest.raises(ValueError, match="mesh"):
            conv(out_sharding=P("data"))(x, w)


# The program has no callback, so that it can be kept, sent and compiled anywhere.


def gradients(x, w):
    return jax.grad(lambda x, w: wave(CASE.conv())(x, w), (0, 1))(x, w)


@pytest.mark.usefixtures("explicit")
def test_the_program_has_no_callback():
    x, w, _ = place((BATCHED, KERNEL, BATCHED))
    lowered = jax.jit(gradients).lower(x, w)
    assert "CustomSPMDPartitioning" not in lowered.as_text()
    assert "manual_computation" in lowered.as_text()


@pytest.mark.usefixtures("explicit")
def test_a_compiled_program_can_be_serialized():
    x, w, _ = place((BATCHED, KERNEL, BATCHED))
    compiled = jax.jit(gradients).lower(x, w).compile()
    loaded = serialize_executable.deserialize_and_load(*serialize_executable.serialize(compiled))
    for a, b in zip(loaded(x, w), compiled(x, w), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("explicit")
def test_an_exported_program_is_local():
    x, w, _ = place((BATCHED, KERNEL, BATCHED))
    exported = jax.export.export(jax.jit(gradients))(x, w)
    loaded = jax.export.deserialize(exported.serialize())
    assert loaded.nr_devices == 8
    program = jax.jit(loaded.call)
    for a, b in zip(program(x, w), jax.jit(gradients)(x, w), strict=True):
        np.testing.assert_allclose(a, b, 1e-5, 1e-5)
    found = collectives(program.lower(x, w).compile(), jax.sharding.get_mesh())
    assert {c.kind for c in found} == {"all-reduce"}


@pytest.mark.usefixtures("explicit")
@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_a_cpu_exports_for_several_accelerators(platform):
    x, w, _ = place((BATCHED, KERNEL, BATCHED))
    exported = jax.export.export(jax.jit(gradients), platforms=(platform,))(x, w)
    assert exported.nr_devices == 8
    assert "manual_computation" in exported.mlir_module()


CACHED = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
from grouped_conv_jax import grouped_conv
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
with jax.set_mesh(jax.make_mesh((2,), ("data",))):
    x = jax.device_put(jax.numpy.ones((4, 4, 8)), jax.P("data"))
    conv = lambda x, w: grouped_conv(x, w, (1,), "SAME", feature_group_count=2)
    jax.jit(conv)(x, jax.numpy.ones((4, 2, 3))).block_until_ready()
print(found.count("/jax/compilation_cache/cache_misses"))
"""


def test_another_process_finds_the_program_in_the_compilation_cache(tmp_path):
    def misses() -> int:
        command = [sys.executable, "-c", CACHED, str(tmp_path)]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(ended.stdout)

    assert misses() > 0
    assert misses() == 0
