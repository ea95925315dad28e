"""Programs written per device: shard_map with and without checks, and pmap."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Case, any_implementation
from comparison import assert_matches_the_oracle, value_and_gradients
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from per_device import BATCHED, CASE, GROUPS, KERNEL, assert_second_order, mesh, second_order, wave

SHARDED = (BATCHED, KERNEL, BATCHED)


def local(implementation):
    """On each device there is half of the groups."""
    return CASE.conv(implementation, feature_group_count=GROUPS // 2)


def sharded(f, in_specs, out_specs, check_vma: bool = True):
    return jax.jit(
        jax.shard_map(f, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
    )


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
