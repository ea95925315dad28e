"""Meshes of several devices: shard_map with and without checks, pmap, and Explicit axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import NHWC, Case, any_implementation, random
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_values import assert_matches_the_oracle, value_and_gradients

from grouped_conv_jax.collectives import collectives

GROUPS = 4
CASE = Case(
    "sharded",
    (8, 5, 6, 8),
    (3, 2, 2, 12),
    {
        "window_strides": (2, 1),
        "padding": "SAME",
        "dimension_numbers": NHWC,
        "feature_group_count": GROUPS,
    },
)
BATCHED = P("data", None, None, "group")
KERNEL = P(None, None, None, "group")
SHARDED = (BATCHED, KERNEL, BATCHED)


def local(implementation):
    """On each device there is half of the groups."""
    return CASE.conv(implementation, feature_group_count=GROUPS // 2)


def mesh(kind: AxisType = AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "group"), axis_types=(kind, kind))


def sharded(f, in_specs, out_specs, check_vma: bool = True):
    return jax.jit(
        jax.shard_map(f, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
    )


def wave(conv):
    return lambda x, w: jnp.sum(jnp.sin(conv(x, w)))


@functools.cache
def second_order_of_lax():
    x, w, _ = CASE.random()
    return jax.jit(second_order(CASE.lax_conv()))(x, w)


def second_order(conv):
    """The gradient of the norm of the gradient."""

    def norm(x, w):
        return sum(jnp.sum(g**2) for g in jax.grad(wave(conv), (0, 1))(x, w))

    return jax.grad(norm, (0, 1))


def assert_second_order(actual) -> None:
    length = max(oracle.lengths(*CASE.shapes, **CASE.arguments)) ** 2
    for a, e in zip(actual, second_order_of_lax(), strict=True):
        oracle.assert_close(a, np.asarray(e), length)


@any_implementation
@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_through_shard_map_are_those_of_one_device(implementation, check_vma):
    conv = sharded(local(implementation), (BATCHED, KERNEL), BATCHED, check_vma)
    operands = CASE.random()
    assert_matches_the_oracle(value_and_gradients(conv)(*operands), CASE, operands)
    assert_second_order(jax.jit(second_order(conv))(*operands[:2]))


@any_implementation
def test_gradients_within_shard_map_are_summed_over_the_batch(implementation):
    compute = sharded(value_and_gradients(local(implementation)), SHARDED, (BATCHED, *SHARDED[:2]))
    operands = CASE.random()
    assert_matches_the_oracle(compute(*operands), CASE, operands)


@any_implementation
def test_without_checks_the_sum_over_the_batch_is_made_by_hand(implementation):
    def compute(x, w, y):
        out, dx, dw = value_and_gradients(local(implementation))(x, w, y)
        return out, dx, jax.lax.psum(dw, "data")

    operands = CASE.random()
    actual = sharded(compute, SHARDED, (BATCHED, *SHARDED[:2]), check_vma=False)(*operands)
    assert_matches_the_oracle(actual, CASE, operands)


@any_implementation
def test_grad_of_grad_within_shard_map_is_that_of_one_device(implementation):
    conv = local(implementation)

    def norm(x, w):
        dx, dw = jax.grad(wave(conv), (0, 1))(x, w)
        # dw is the same on all of "data" and dx is not: its square counts once.
        return jax.lax.psum(jnp.sum(dx**2), "data") + jnp.sum(dw**2)

    actual = sharded(jax.grad(norm, (0, 1)), (BATCHED, KERNEL), (BATCHED, KERNEL))(
        *CASE.random()[:2]
    )
    assert_second_order(actual)


@any_implementation
@pytest.mark.parametrize("axes", ["group", "none"])
def test_what_is_replicated_stays_replicated(axes, implementation):
    # On the axes that no operand varies over, there is nothing to sum.
    spec = KERNEL if axes == "group" else P()
    conv = local(implementation) if axes == "group" else CASE.conv(implementation)
    compute = sharded(value_and_gradients(conv), (spec,) * 3, (spec,) * 3)
    operands = CASE.random()
    assert_matches_the_oracle(compute(*operands), CASE, operands)


@any_implementation
def test_a_sharded_kernel_and_a_replicated_input_sum_the_gradient_of_the_input(implementation):
    # Outputs 0-5 and 6-11 of one group, on two devices that both see all the inputs.
    case = Case("dense", CASE.lhs, (3, 2, 8, 12), {**CASE.arguments, "feature_group_count": 1})
    compute = sharded(
        value_and_gradients(case.conv(implementation)),
        (P("data"), KERNEL, BATCHED),
        (BATCHED, P("data"), KERNEL),
    )
    operands = case.random()
    assert_matches_the_oracle(compute(*operands), case, operands)


@any_implementation
def test_vmap_and_jvp_within_shard_map(implementation):
    conv = local(implementation)
    x, w, _ = CASE.random()
    dx = x[::-1]

    def compute(x, w, dx):
        per_example = jax.vmap(jax.grad(lambda w, x: wave(conv)(x[None], w)), (None, 0))
        # Or else the gradients of the i-th examples of all devices would be summed.
        own = jax.lax.pcast(w, "data", to="varying")
        return jax.jvp(lambda x: conv(x, w), (x,), (dx,))[1], per_example(own, x)

    tangent, per_example = sharded(
        compute, (BATCHED, KERNEL, BATCHED), (BATCHED, P("data", *KERNEL))
    )(x, w, dx)
    length = oracle.lengths(*CASE.shapes, **CASE.arguments)
    oracle.assert_close(tangent, oracle.forward(dx, w, **CASE.arguments), length[0])
    out = oracle.forward(x, w, **CASE.arguments)
    expected = [
        oracle.kernel_gradient(xi[None], np.cos(o)[None], w.shape, **CASE.arguments)
        for xi, o in zip(x, out, strict=True)
    ]
    assert per_example.shape == (8, *w.shape)
    oracle.assert_close(per_example, np.stack(expected), length[0] * length[2])


@any_implementation
@pytest.mark.parametrize(
    ("manual", "rest"),
    [
        (AxisType.Auto, AxisType.Auto),
        (AxisType.Auto, AxisType.Explicit),
        (AxisType.Explicit, AxisType.Explicit),
    ],
    ids=lambda kind: kind.name,
)
def test_a_partly_manual_shard_map(implementation, manual, rest):
    kinds = jax.make_mesh((4, 2), ("data", "group"), axis_types=(manual, rest))
    x, w, y = CASE.random()
    with jax.set_mesh(kinds):
        spec = P("data") if manual == AxisType.Explicit else P()
        x, y = (jax.device_put(a, NamedSharding(kinds, spec)) for a in (x, y))
        conv = jax.shard_map(
            CASE.conv(implementation),
            in_specs=(P("data"), P()),
            out_specs=P("data"),
            axis_names={"data"},
        )
        actual = jax.jit(lambda x, w, y: (conv(x, w), *jax.vjp(conv, x, w)[1](y)))(x, w, y)
    assert_matches_the_oracle(actual, CASE, [np.asarray(a) for a in (x, w, y)])


@any_implementation
def test_batch_groups_within_shard_map(implementation):
    case = Case("batch groups", (4, 3, 5), (4, 3, 3), {
        "window_strides": (1,), "padding": "SAME", "batch_group_count": 2
    })  # fmt: skip
    x, w, y = case.random()
    stacks = [np.stack([a, -a, 2 * a, 0 * a]) for a in (x, y)]

    def compute(x, w, y):
        out, dx, dw = value_and_gradients(case.conv(implementation))(x[0], w, y[0])
        return out[None], dx[None], dw

    out, dx, dw = sharded(compute, (P("data"), P(), P("data")), (P("data"), P("data"), P()))(
        stacks[0], w, stacks[1]
    )
    expected = oracle.contractions(x, w, y, **case.arguments)
    lengths = case.lengths
    for i, scale in enumerate([1, -1, 2, 0]):
        oracle.assert_close(out[i], scale * expected[0], 2 * lengths[0])
        oracle.assert_close(dx[i], scale * expected[1], 2 * lengths[1])
    oracle.assert_close(dw, (1 + 1 + 4) * expected[2], 6 * lengths[2])


# XLA's partitioner multiplies the kernel gradient by the size of the axes that nothing is sharded
# over when it is computed with batch groups; lax's own is wrong in that way.
@any_implementation
@pytest.mark.parametrize(
    "specs",
    [
        SHARDED,
        (P("data"), P(), P("data")),
        (P("data"), KERNEL, BATCHED),
        (KERNEL, KERNEL, KERNEL),
        (P(), P(), P()),
    ],
    ids=["batch and groups", "batch", "batch, groups of the kernel", "groups", "nothing"],
)
def test_operands_on_an_auto_mesh(specs, implementation):
    operands = CASE.random()
    placed = [
        jax.device_put(a, NamedSharding(mesh(), spec))
        for a, spec in zip(operands, specs, strict=True)
    ]
    actual = value_and_gradients(CASE.conv(implementation))(*placed)
    assert_matches_the_oracle(actual, CASE, operands)


@any_implementation
def test_batch_groups_on_an_auto_mesh(implementation):
    arguments = {"window_strides": (1,), "padding": "SAME", "batch_group_count": 2}
    case = Case("batch groups, sharded", (8, 3, 5), (4, 3, 3), arguments)
    operands = case.random()
    batched = NamedSharding(mesh(), P("data"))
    whole = NamedSharding(mesh(), P())
    placed = [
        jax.device_put(a, sharding)
        for a, sharding in zip(operands, (batched, whole, batched), strict=True)
    ]
    actual = value_and_gradients(case.conv(implementation))(*placed)
    assert_matches_the_oracle(actual, case, operands)


@any_implementation
def test_pmap(implementation):
    x, w, y = operands = CASE.random()
    compute = jax.pmap(value_and_gradients(CASE.conv(implementation)), in_axes=(0, None, 0))
    out, dx, dw = compute(x[:, None], w, y[:, None])
    assert_matches_the_oracle((out[:, 0], dx[:, 0], dw.sum(0)), CASE, operands)


# Explicit axes: the sharding is a part of the type.


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
def test_an_unknown_axis_is_refused():
    x, w, _ = place((P("data"), P(), P()))
    with pytest.raises(ValueError, match="daata"):
        CASE.conv(out_sharding=P("daata"))(x, w)


def test_a_sharding_without_a_mesh_is_refused_as_in_lax():
    x, w, _ = CASE.random()
    for conv in (CASE.conv, CASE.lax_conv):
        with pytest.raises(ValueError, match="mesh"):
            conv(out_sharding=P("data"))(x, w)
