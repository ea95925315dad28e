"""How a contraction is split over the devices of a mesh, where nothing but shardings say so.

Under plain `jit` XLA's partitioner asks here: it brings the shardings that it found for the two
operands and the result, and gets back those to bring them into, and what each device computes on
its part. How it is split is `plan`'s to say; this is how XLA is told.

Axes of the mesh are cut into axes of prime size, so that one of 8 devices can go to 4 groups and
to 2 parts of each. (Shardy does likewise; what it finds cannot always be said with whole axes.)
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import dispatch  # For the one name that `requires_devices` needs.
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from grouped_conv_jax.plan import Dimensions, choose
from grouped_conv_jax.spec import OPERANDS, RESULT, Contraction, ConvSpec, Role
from grouped_conv_jax.version import __version__

Computation = Callable[[jax.Array, jax.Array], jax.Array]


def requires_devices(primitive: Primitive) -> None:
    """Makes jit tell the lowering of a primitive which devices it is for, as
    `custom_partitioning` must know (jax's changelog, 0.4.24).
    """
    dispatch.prim_requires_devices_during_lowering.add(primitive)


def spread(
    compute: Callable[[jax.Array, jax.Array, ConvSpec], jax.Array],
    contraction: Contraction,
    spec: ConvSpec,
    how: str,
    context: mlir.LoweringRuleContext,
    note: Callable[[ConvSpec], None] | None = None,
) -> Computation:
    """A contraction for the devices that it is being lowered for.

    On one device, and inside `shard_map`, where the shapes are those of one device, it is as on
    one device. Where XLA cannot ask, each device computes all of it: inside a `shard_map` with axes
    that are not manual (XLA dies of a custom partition under manual axes), and for `jax.export`,
    which has no place for a Python callback. Left alone, XLA miscomputes some shardings there.

    Args:
      compute: the contraction of a spec on one device.
      contraction: which one.
      spec: of the whole.
      how: what else `compute` depends on, as a key of compilation caches.
      context: of the lowering.
      note: is told the specs that devices get, but for those inside `shard_map`, where they are
        as traced.
    """

    def alone(first: jax.Array, second: jax.Array) -> jax.Array:
        return compute(first, second, spec)

    def whole(first: jax.Array, second: jax.Array) -> jax.Array:
        if note is not None:
            note(spec)
        return alone(first, second)

    axes: Any = context.module_context.axis_context
    if manual := getattr(axes, "manual_axes", None):
        if manual == frozenset(axes.mesh.axis_names):
            return alone
        operand: Any = context.avals_in[0]
        return _on_each_device(whole, operand.sharding.mesh)
    devices = getattr(axes, "device_assignment", None)
    if devices is None or len(devices) == 1 or spec.is_empty:
        return whole
    # Where the shardings do not tell of a mesh, the devices are all on one axis.
    mesh = axes.abstract_mesh
    sizes = {"devices": len(devices)} if mesh is None or mesh.empty else mesh.shape
    mesh = Mesh(np.array(devices).reshape(list(sizes.values())), tuple(sizes))
    if context.module_context.lowering_parameters.for_export:
        return _on_each_device(whole, mesh)
    return _partitioned(alone, compute, contraction, spec, how, mesh, note)


def _on_each_device(whole: Computation, mesh: Mesh | AbstractMesh) -> Computation:
    def replicated(x: jax.Array) -> jax.Array:
        # On an Explicit mesh the axes are Auto here by now, in the mesh of the context.
        here = jax.sharding.get_abstract_mesh()
        sharding = NamedSharding(mesh if here.empty else here, PartitionSpec())
        return jax.lax.with_sharding_constraint(x, sharding)

    return lambda first, second: replicated(whole(replicated(first), replicated(second)))


def _partitioned(
    alone: Computation,
    compute: Callable[[jax.Array, jax.Array, ConvSpec], jax.Array],
    contraction: Contraction,
    spec: ConvSpec,
    how: str,
    mesh: Mesh,
    note: Callable[[ConvSpec], None] | None,
) -> Computation:
    """A contraction as XLA is to partition it over the devices of a mesh."""
    mesh = _refined(mesh)
    names = (*OPERANDS[contraction], RESULT[contraction])

    def partition(_: Any, operands: Any, result: Any) -> Any:
        given: dict[Role, Dimensions] = {
            role: _decode(x.sharding, len(x.shape), mesh)
            for role, x in zip(names, (*operands, result), strict=True)
        }
        plan = choose(contraction, spec, given, mesh.shape)
        if note is not None:
            note(plan.local_spec)
        shardings = [NamedSharding(mesh, PartitionSpec(*plan.sharded(role))) for role in names]
        return mesh, functools.partial(plan.compute, compute), shardings[2], tuple(shardings[:2])

    function = custom_partitioning(alone)
    rule, sizes = sharding_rule(contraction, spec)
    function.def_partition(partition, sharding_rule=rule, decode_shardings=False, **sizes)

    def named(first: jax.Array, second: jax.Array) -> jax.Array:
        # XLA sees a pointer to the callback, which jax leaves out of the key of the persistent
        # compilation cache if jax_remove_custom_partitioning_ptr_from_cache_key is set. This is
        # what tells different contractions apart then.
        metadata = f"{__version__} {contraction} {how} {spec}"
        # The scope is what profiles, and reports of collectives, call it.
        with (
            set_xla_metadata(grouped_conv=metadata),
            jax.named_scope(f"grouped_conv.{contraction}"),
        ):
            return function(first, second)

    return named


def sharding_rule(contraction: Contraction, spec: ConvSpec) -> tuple[str, dict[str, int]]:
    """How Shardy is to propagate shardings: `n h (g c), i c (g o) -> n h (g o)` and the like.

    A factor of size 1 may not stand beside another one; and those that never stand alone must
    have their sizes given, the others must not.
    """
    outputs, inputs = (spec.rhs_shape[d] for d in spec.dimension_numbers.rhs_spec[:2])
    groups = spec.feature_group_count
    sizes = {"g": groups, "c": inputs, "o": outputs // groups}
    features = {
        "lhs": ["n", "gc"],
        "rhs": ["go", "c"],
        "out": ["n", "go"],
    }
    alone = set()

    def value(role: Role) -> str:
        dimensions = [""] * len(spec.shape(role))
        for d, i in enumerate(spec.mapped_axes(role)):
            dimensions[d] = f"m{i}"
        for i, d in enumerate(spec.spatial_dimensions(role)):
            dimensions[d] = f"{'k' if role == 'rhs' else 'x'}{i}"
        for letters, d in zip(features[role], spec.layout(role), strict=False):
            factors = [f for f in letters if sizes.get(f) != 1]
            if len(factors) < 2:
                alone.update(factors)
                dimensions[d] = factors[0] if factors else f"{role}{d}"
            else:
                dimensions[d] = f"({' '.join(factors)})"
        return " ".join(dimensions)

    first, second = map(value, OPERANDS[contraction])
    rule = f"{first}, {second} -> {value(RESULT[contraction])}"
    return rule, {f: n for f, n in sizes.items() if n != 1 and f not in alone}


# Shardings as XLA gives them, in terms of the mesh.


def _refined(mesh: Mesh) -> Mesh:
    """The same devices in the same order, on axes of prime size."""
    sizes = {
        f"{name}:{i}": prime
        for name, size in mesh.shape.items()
        for i, prime in enumerate(_prime_factors(size))
    }
    return Mesh(mesh.devices.reshape(list(sizes.values())), tuple(sizes))


def _prime_factors(n: int) -> list[int]:
    factors = []
    for p in range(2, n + 1):
        while n % p == 0:
            factors.append(p)
            n //= p
    return factors


def _decode(sharding: Sharding, rank: int, mesh: Mesh) -> Dimensions:
    """The axes that shard each dimension of an array: where a step along an axis of the mesh leads
    to another part of it, and the farther the more major.
    """
    parts = sharding.devices_indices_map((mesh.size,) * rank)
    starts = [[part.start or 0 for part in parts[device]] for device in mesh.devices.flat]
    starts = np.reshape(starts, (*mesh.devices.shape, rank))
    strides: list[dict[str, int]] = [{} for _ in range(rank)]
    for i, axis in enumerate(mesh.axis_names):
        here, there = (np.take(starts, at, axis=i).reshape(-1, rank)[0] for at in (0, 1))
        for dimension in np.flatnonzero(there - here):
            strides[dimension][axis] = there[dimension] - here[dimension]
    return tuple(tuple(sorted(by, key=lambda axis: -by[axis])) for by in strides)
