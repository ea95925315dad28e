"""Divides a contraction among the devices of a mesh.

Who decides how it is divided depends on what is known while JAX lowers it:

- Inside `shard_map` the shapes are those of one device, and nothing is left to divide.
- Where the mesh axes are Explicit, the shardings are part of the types. `plan` decides, and the
  program is a `shard_map`. XLA need not ask back, so that this works on every platform, in the
  persistent compilation cache and in `jax.export`.
- Where they are Auto, only XLA knows the shardings. Its partitioner asks here, by
  `custom_partitioning`: it brings the shardings that it found for the operands and the result, and
  `plan` decides.
- Where they are Auto and XLA cannot ask (on a TPU, and in `jax.export`), XLA divides the
  contraction by itself: see `xla_partitioner`.

For XLA's questions the axes of the mesh are cut into axes of prime size, so that one axis of 8
devices can go to 4 groups and to 2 parts of each. (Shardy does likewise, and what it finds cannot
always be said with whole axes.)
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from grouped_conv_jax.jax_compat import Lowering, custom_partitioning, set_xla_metadata
from grouped_conv_jax.partitioning.execution import execute
from grouped_conv_jax.partitioning.explicit_mesh import axes_of_dimensions, has_explicit_axes
from grouped_conv_jax.partitioning.plan import MeshAxes, Plan
from grouped_conv_jax.partitioning.search import best_plan
from grouped_conv_jax.partitioning.xla_partitioner import with_sharding
from grouped_conv_jax.spec import OPERANDS, RESULT, Contraction, ConvSpec, Role
from grouped_conv_jax.version import __version__

WITH_CUSTOM_PARTITIONING = frozenset({"cpu", "cuda", "rocm"})
"""The platforms whose compiler asks `custom_partitioning`. A TPU's does not (jax issue 38196)."""

XLA_EXCHANGES = jax.__version_info__ < (0, 11)
"""Whether XLA makes an all-to-all where an array enters or leaves a custom partition. In jax 0.12
XLA writes shardings in two ways, with and without names, and compares them in vain there.
"""

Computation = Callable[[jax.Array, jax.Array], jax.Array]


class Compute(Protocol):
    """Computes the contraction of a spec: on one device, or on a mesh that XLA divides it over."""

    def __call__(
        self,
        first: jax.Array,
        second: jax.Array,
        spec: ConvSpec,
        divided_over: Mesh | None = None,
    ) -> jax.Array: ...


Note = Callable[[ConvSpec, Mesh | None], None]
"""Takes note of the spec that a device computes, or of a whole one and the mesh that XLA divides it
over.
"""


def divided(
    compute: Compute,
    contraction: Contraction,
    spec: ConvSpec,
    key: str,
    lowering: Lowering,
    note: Note,
) -> Computation:
    """Returns the contraction as the devices that it is lowered for compute it together.

    Args:
      compute: computes the contraction of a spec.
      contraction: the contraction.
      spec: the whole convolution.
      key: what else `compute` depends on, for compilation caches.
      lowering: what it is lowered for.
      note: is told the specs that devices get. Those inside `shard_map` are in the jaxpr already,
        and are not told.
    """

    def local(first: jax.Array, second: jax.Array) -> jax.Array:
        return compute(first, second, spec)

    def whole(first: jax.Array, second: jax.Array) -> jax.Array:
        note(spec, None)
        return local(first, second)

    types, devices = lowering.types, lowering.devices
    if lowering.is_fully_manual:
        return local
    if lowering.manual_axes:
        # XLA dies of a custom partition under manual axes, and miscomputes without one.
        return _on_each_device(whole, types[0].sharding.mesh)
    if devices is None or len(devices) == 1 or spec.is_empty:
        return whole
    meshes = (x.sharding.mesh for x in types if not x.sharding.mesh.empty)
    typed = next(meshes, None)
    if typed is not None and _is_explicit(typed) and not spec.is_symbolic:
        return _in_shard_map(compute, contraction, spec, typed, types, note)
    # Where the shardings do not tell of a mesh, the devices are all on one axis.
    sizes = lowering.mesh_sizes or {"devices": len(devices)}
    mesh = Mesh(np.array(devices).reshape(list(sizes.values())), tuple(sizes))
    if spec.is_symbolic:  # The choice of what XLA divides rightly needs all sizes.
        return _on_each_device(whole, mesh)
    if lowering.is_export or lowering.platform not in WITH_CUSTOM_PARTITIONING:

        def by_xla(first: jax.Array, second: jax.Array) -> jax.Array:
            note(spec, mesh)
            return compute(first, second, spec, divided_over=mesh)

        return by_xla
    return _partitioned(local, compute, contraction, spec, key, mesh, note)


def _is_explicit(mesh: AbstractMesh) -> bool:
    """Returns whether the types tell all shardings: no axis of several devices is Auto."""
    kinds = zip(mesh.axis_types, mesh.shape.values(), strict=True)
    return has_explicit_axes(mesh) and all(
        kind == AxisType.Explicit for kind, size in kinds if size > 1
    )


def _on_each_device(whole: Computation, mesh: Mesh | AbstractMesh) -> Computation:
    """Returns a computation that every device does completely."""

    def replicated(x: jax.Array) -> jax.Array:
        return with_sharding(x, PartitionSpec(), mesh)

    return lambda first, second: replicated(whole(replicated(first), replicated(second)))


# The types tell the shardings.


def _in_shard_map(
    compute: Compute,
    contraction: Contraction,
    spec: ConvSpec,
    mesh: AbstractMesh,
    types: Sequence[Any],
    note: Note,
) -> Computation:
    roles = (*OPERANDS[contraction], RESULT[contraction])
    given: dict[Role, MeshAxes] = {
        role: tuple(axes_of_dimensions(x.sharding, x.ndim))
        for role, x in zip(roles, types, strict=True)
    }
    plan = best_plan(contraction, spec, given, dict(mesh.shape))
    *operands, result = (PartitionSpec(*plan.boundary(role)) for role in roles)

    def computation(first: jax.Array, second: jax.Array) -> jax.Array:
        note(plan.local_spec, None)
        # The mesh is that of the context, whose Explicit axes are Auto inside a lowering.
        function = jax.shard_map(
            functools.partial(execute, plan, compute),
            in_specs=tuple(operands),
            out_specs=result,
            axis_names=set(mesh.axis_names),
            check_vma=False,
        )
        values = zip(roles, (first, second), strict=False)
        with jax.named_scope(f"grouped_conv.{contraction}"):
            out = function(*(_filled_up(x, plan, role) for role, x in values))
            return lax.slice(out, (0,) * out.ndim, spec.shape(roles[2]))

    return computation


def _filled_up(x: jax.Array, plan: Plan, role: Role) -> jax.Array:
    """Pads an array at its ends so that the axes of the plan divide it."""
    config = []
    for size, axes in zip(x.shape, plan.boundary(role), strict=True):
        parts = math.prod(plan.sizes[axis] for axis in axes)
        config.append((0, -size % parts, 0))
    return lax.pad(x, jnp.zeros((), x.dtype), config)


# XLA asks about the shardings.


def _partitioned(
    local: Computation,
    compute: Compute,
    contraction: Contraction,
    spec: ConvSpec,
    key: str,
    mesh: Mesh,
    note: Note,
) -> Computation:
    """Returns a contraction for which XLA asks how to partition it over the devices of a mesh."""
    mesh = _refined(mesh)
    names = (*OPERANDS[contraction], RESULT[contraction])

    def partition(_: Any, operands: Any, result: Any) -> Any:
        given: dict[Role, MeshAxes] = {
            role: _decode(x.sharding, len(x.shape), mesh)
            for role, x in zip(names, (*operands, result), strict=True)
        }
        plan = best_plan(contraction, spec, given, mesh.shape, xla_exchanges=XLA_EXCHANGES)
        note(plan.local_spec, None)

        def on_device(first: jax.Array, second: jax.Array) -> jax.Array:
            # XLA may ask from another thread, without the contexts of the caller, or from the
            # caller's, whose Explicit mesh means nothing here.
            with bits_of(spec), jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
                return execute(plan, compute, first, second)

        shardings = [NamedSharding(mesh, PartitionSpec(*plan.boundary(role))) for role in names]
        return mesh, on_device, shardings[2], tuple(shardings[:2])

    def infer_result(_: Any, operands: Any, result: Any) -> NamedSharding:
        given: dict[Role, MeshAxes] = {
            role: _decode(x.sharding, len(x.shape), mesh)
            for role, x in zip(names[:2], operands, strict=True)
        }
        given[names[2]] = ((),) * len(result.shape)
        plan = best_plan(contraction, spec, given, mesh.shape)
        return NamedSharding(mesh, PartitionSpec(*plan.sharded(names[2])))

    function = custom_partitioning(local)
    rule, sizes = sharding_rule(contraction, spec)
    function.def_partition(
        partition,
        infer_sharding_from_operands=infer_result,  # For GSPMD; Shardy follows the rule.
        sharding_rule=rule,
        decode_shardings=False,
        **sizes,
    )

    def named(first: jax.Array, second: jax.Array) -> jax.Array:
        # XLA sees a pointer to the callback, which jax leaves out of the key of the persistent
        # compilation cache if jax_remove_custom_partitioning_ptr_from_cache_key is set. This is
        # what tells different contractions apart then.
        metadata = f"{__version__} {contraction} {key} {spec}"
        # The scope is what profiles, and reports of collectives, call it.
        with (
            set_xla_metadata(grouped_conv=metadata),
            jax.named_scope(f"grouped_conv.{contraction}"),
        ):
            return function(first, second)

    return named


def bits_of(spec: ConvSpec) -> contextlib.AbstractContextManager[None]:
    """Returns the context in which a contraction is traced: with or without types of 64 bits.

    A convolution may be called in one such context, differentiated in another and lowered in a
    third one. Its dtypes are settled by the call.
    """
    types_of_64_bits = (np.float64, np.complex128, np.int64, np.uint64)
    return jax.enable_x64(
        not {spec.dtype, spec.wide_dtype}.isdisjoint(map(np.dtype, types_of_64_bits))
    )


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


def _decode(sharding: Sharding | None, rank: int, mesh: Mesh) -> MeshAxes:
    """The axes that shard each dimension of an array: where a step along an axis of the mesh leads
    to another part of it, and the farther the more major. None where GSPMD does not know yet.
    """
    if sharding is None:
        return ((),) * rank
    parts = sharding.devices_indices_map((mesh.size,) * rank)
    starts = [[part.start or 0 for part in parts[device]] for device in mesh.devices.flat]
    starts = np.reshape(starts, (*mesh.devices.shape, rank))
    strides: list[dict[str, int]] = [{} for _ in range(rank)]
    for i, axis in enumerate(mesh.axis_names):
        here, there = (np.take(starts, at, axis=i).reshape(-1, rank)[0] for at in (0, 1))
        for dimension in np.flatnonzero(there - here):
            strides[dimension][axis] = there[dimension] - here[dimension]
    return tuple(tuple(sorted(by, key=lambda axis: -by[axis])) for by in strides)
