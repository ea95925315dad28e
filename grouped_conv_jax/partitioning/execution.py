"""What one device does by a plan: it moves, convolves and sums its parts of the arrays."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from grouped_conv_jax.partitioning.plan import Plan
from grouped_conv_jax.spec import OPERANDS, RESULT, Role


def execute(plan: Plan, local: Callable, first: jax.Array, second: jax.Array) -> jax.Array:
    """Computes one device's part of the result from its parts of the operands.

    Args:
      plan: how the contraction is divided.
      local: computes a contraction on one device, from two operands and their spec.
      first: this device's part of the first operand, as the plan's `boundary` has it.
      second: this device's part of the second operand.
    """
    values = [
        _without_garbage(plan, role, _resharded(plan, role, x))
        for role, x in zip(OPERANDS[plan.contraction], (first, second), strict=True)
    ]
    if plan.contraction != "dgrad":
        values[0] = _with_halos(plan, values[0])
    out = local(*values, plan.local_spec)
    if plan.contraction == "dgrad":
        # Rows of the gradient that belong to neighbours are sent back and added up there.
        block = jax.ShapeDtypeStruct(plan.block_shape, out.dtype)
        (out,) = jax.linear_transpose(lambda lhs: _with_halos(plan, lhs), block)(out)
    summed = [a for part, axes in plan.split.items() if plan.sums(part) for a in axes]
    for at, axes in plan.scattered.items():
        out = lax.psum_scatter(out, axes, scatter_dimension=at, tiled=True)
        summed = [a for a in summed if a not in axes]
    out = lax.psum(out, tuple(summed)) if summed else out
    return _resharded(plan, RESULT[plan.contraction], out)


def _resharded(plan: Plan, role: Role, x: jax.Array) -> jax.Array:
    """Moves an array between its sharding outside and inside, where XLA does not."""
    for step in plan.resharding(role):
        x = step.apply(x, plan.sizes)
    return x


def _with_halos(plan: Plan, lhs: jax.Array) -> jax.Array:
    """Adds the rows of neighbours that the outputs of this device read."""
    for i, halo in plan.halos.items():
        at = plan.spec.spatial_dimensions("lhs")[i]
        lhs = halo.exchange(lhs, at, plan.split[i], plan.sizes)
    return lhs


def _without_garbage(plan: Plan, role: Role, x: jax.Array) -> jax.Array:
    """Replaces what is undefined by zeros, where it would get into a sum.

    Where a batch or rows do not divide evenly, the last devices have elements past the end of the
    whole array. With 10 rows on 4 devices, each has 3, and the last one 2 of these beyond the end.
    """
    for part, axes in plan.split.items():
        at = plan.spec.dimension(role, part)
        if at is None or not ((part == "N" and plan.sums("N")) or isinstance(part, int)):
            continue
        size = plan.spec.shape(role)[at]
        if x.shape[at] * plan.parts(part) > size:
            positions = lax.broadcasted_iota(np.int32, x.shape, at)
            positions += lax.axis_index(axes) * x.shape[at]
            x = jnp.where(positions < size, x, jnp.zeros_like(x))
    return x
