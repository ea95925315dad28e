"""The search for the best plan, and what a plan costs."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping

from grouped_conv_jax.partitioning.halo import Halo
from grouped_conv_jax.partitioning.plan import Plan
from grouped_conv_jax.partitioning.resharding import Axes, MeshAxes
from grouped_conv_jax.spec import OPERANDS, RESULT, Contraction, ConvSpec, MappedAxis, Part, Role

MULTIPLY_ADDS_PER_BYTE = 200
"""Multiply-adds that a device computes while it sends a byte.

This weighs work that several devices do alike against communication.
"""


def best_plan(
    contraction: Contraction,
    spec: ConvSpec,
    given: Mapping[Role, MeshAxes],
    sizes: Mapping[str, int],
    *,
    xla_exchanges: bool = True,
) -> Plan:
    """Returns the plan for operands that are sharded, and a result that is wanted, as `given`.

    The mesh axes are taken one after the other, first those that shard the largest array. Each
    splits the part that costs the fewest bytes, given what the axes before it split. The choice of
    an axis is not reconsidered, so arrays that have the same axes in different orders may be moved
    more than needed.
    """

    def nbytes(role: Role) -> int:
        return math.prod(spec.shape(role)) * spec.role_dtype(role).itemsize

    plan = Plan(contraction, spec, sizes, {})
    by_size = sorted(given, key=nbytes, reverse=True)
    for axis in dict.fromkeys(a for role in by_size for axes in given[role] for a in axes):
        plan = min(_with_axis(plan, axis), key=lambda p: _cost(p, axis, given))
    plan = _with_scattered_sums(plan, given[RESULT[contraction]])
    return dataclasses.replace(plan, given=given, xla_exchanges=xla_exchanges)


def _with_axis(plan: Plan, axis: str) -> Iterator[Plan]:
    """Yields the plans in which one more axis splits something.

    The last one is the plan itself, in which all devices along that axis do the same.
    """
    mapped = map(MappedAxis, range(len(plan.spec.mapped)))
    spatial = range(len(plan.spec.window_strides))
    parts: tuple[Part, ...] = (*mapped, "G", "N", *spatial, "O", "C")
    for part in parts:
        split = {**plan.split, part: (*plan.split.get(part, ()), axis)}
        longer = dataclasses.replace(plan, split=split)
        if _is_possible(longer, part):
            yield longer
    yield plan


def _is_possible(plan: Plan, part: Part) -> bool:
    """Returns whether a part has enough elements, or divides evenly where it must."""
    spec, groups = plan.spec, plan.spec.feature_group_count
    if isinstance(part, MappedAxis):
        return spec.mapped[part.number][1] % plan.parts(part) == 0
    if isinstance(part, int):
        return Halo.of(spec, part, plan.parts(part)) is not None
    if part == "N":
        return spec.lhs_shape[spec.dimension_numbers.lhs_spec[0]] >= plan.parts("N")
    if part == "G":
        return groups % plan.parts("G") == 0
    # A part of the features is a part of a group only where a device has one group.
    outputs, inputs = (spec.rhs_shape[d] for d in spec.dimension_numbers.rhs_spec[:2])
    size = inputs if part == "C" else outputs // groups
    return groups == plan.parts("G") and size % plan.parts(part) == 0


def _cost(plan: Plan, axis: str, given: Mapping[Role, MeshAxes]) -> tuple[bool, float]:
    """Returns the bytes that a device sends along an axis, as the second number.

    The first one says whether inputs or outputs are moved for a kernel's gradient. They grow with
    the batch, so that the gradient is summed instead, whatever the batch is now.

    An array that is whole on all devices is cut for nothing. One that is cut is gathered, or cut
    otherwise in an all-to-all. A sum is reduced, and gathered or left scattered. Of several axes of
    a dimension the minor ones are gathered first, and the major ones scattered first: then there is
    less for the minor ones.
    """
    cost, moved = 0.0, False
    for role in OPERANDS[plan.contraction]:
        has, needs = (_place(axis, x) for x in (given[role], plan.sharded(role)))
        if has is not None and has != needs:
            moved = plan.contraction == "wgrad"
            used = {a for axes in plan.sharded(role) for a in axes}
            cost += _nbytes(plan, role) / _devices(plan, set(has[1]) - used)
    result = RESULT[plan.contraction]
    wanted, gets = (_place(axis, x) for x in (given[result], plan.sharded(result)))
    split: Part | None = next((part for part, axes in plan.split.items() if axis in axes), None)
    if split is None:
        work = plan.spec.multiply_adds / math.prod(map(plan.parts, plan.split))
        cost += work / MULTIPLY_ADDS_PER_BYTE
    elif plan.sums(split) and wanted:
        major = filter(plan.sums_over, wanted[1])
        cost += _nbytes(plan, result) / _devices(plan, major)
    elif plan.sums(split):
        cost += 2 * _nbytes(plan, result)
    elif wanted != gets:
        cost += _nbytes(plan, result) * (1 if wanted else plan.sizes[axis])
    return moved, cost


def _devices(plan: Plan, axes: Iterable[str]) -> int:
    return math.prod(plan.sizes[axis] for axis in axes)


def _nbytes(plan: Plan, role: Role) -> float:
    """Returns the bytes of an array's part on one device."""
    parts = _devices(plan, itertools.chain(*plan.sharded(role)))
    size = math.prod(plan.spec.shape(role)) * plan.spec.role_dtype(role).itemsize
    return size / parts


def _with_scattered_sums(plan: Plan, wanted: MeshAxes) -> Plan:
    """Leaves a sum scattered over the axes by which the result is to be sharded anyway."""
    result = RESULT[plan.contraction]
    scattered: dict[int, Axes] = {}
    for at, (axes, wants) in enumerate(zip(plan.sharded(result), wanted, strict=True)):
        if wants[: len(axes)] != axes:
            continue
        more = itertools.takewhile(plan.sums_over, wants[len(axes) :])
        parts = _devices(plan, axes)
        fitting: Axes = ()
        for axis in more:
            parts *= plan.sizes[axis]
            if plan.spec.shape(result)[at] % parts:
                break
            fitting += (axis,)
        if fitting:
            scattered[at] = fitting
    return dataclasses.replace(plan, scattered=scattered)


def _place(axis: str, dimensions: MeshAxes) -> tuple[int, Axes] | None:
    """Returns which dimension an axis shards, and the axes that are outside it there."""
    for at, axes in enumerate(dimensions):
        if axis in axes:
            return at, axes[: axes.index(axis)]
    return None
