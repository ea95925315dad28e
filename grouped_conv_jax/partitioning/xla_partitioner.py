"""Contractions that XLA's own partitioner divides among devices, where the library cannot do it.

`custom_partitioning` lets the library decide (see `partition`). A TPU does not have it, and
`jax.export` cannot store it. There the shardings of a mesh with Auto axes are known to XLA only, so
XLA divides the program that is lowered. Its partitioner has faults. With JAX 0.10 and 0.12:

- On a mesh with several axes, a sum over devices often runs over axes that it should not, so that
  the result is multiplied by their size. This happens where rows or columns are sharded, and for
  kernel gradients with batch groups.
- Where rows are sharded and a device needs some from beyond its neighbours, results are wrong, or
  the compiler ends the process, on any mesh.
- A grouped convolution that is a matrix product in disguise (one tap, or one output position) is
  refused or computed with the wrong groups. One whose kernel is larger than the image can end the
  process.
- A kernel gradient with feature groups is wrong for a batch of one, and for depthwise convolutions.

This module keeps XLA away from them. `constrained` closes dimensions that XLA must not shard: a
closed dimension is gathered if the caller shards it. `choose` picks an implementation that XLA
divides rightly, and without a needless collective. Both follow from experiments: random shardings
were compiled for CPU devices, where values can be compared, and the collectives of programs for
TPUs were read. `test_xla_partition.py` and `test_tpu.py` repeat them.
"""

import math
from collections.abc import Callable

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from grouped_conv_jax.algorithms import choice
from grouped_conv_jax.algorithms.devices import Device
from grouped_conv_jax.algorithms.table import unsupported
from grouped_conv_jax.partitioning.halo import Halo
from grouped_conv_jax.spec import OPERANDS, RESULT, Contraction, ConvSpec, Role

FEW_TAPS = 128
"""More taps take longer to compile as products of their own than as a loop."""

Compute = Callable[[jax.Array, jax.Array, ConvSpec], jax.Array]
"""Computes one contraction by one implementation."""


def resolve(
    implementation: str | None,
    contraction: Contraction,
    spec: ConvSpec,
    device: Device,
    mesh: Mesh,
    is_export: bool = False,
) -> str:
    """Returns the implementation that was asked for, or `choose`s one.

    Raises:
      NotImplementedError: the implementation that was asked for does not do this.
    """
    if implementation is None:
        return choose(contraction, spec, mesh, device)

    def reason_against(name: str) -> str | None:
        reason = unsupported(name, contraction, spec, device, is_export)
        return reason or miscomputed(name, contraction, spec, mesh)

    return choice.required(implementation, contraction, device, reason_against)


def choose(contraction: Contraction, spec: ConvSpec, mesh: Mesh, device: Device) -> str:
    """Returns the implementation for a contraction that XLA divides.

    Args:
      contraction: the contraction.
      spec: the whole convolution, without mapped axes.
      mesh: the devices that XLA divides it over.
      device: the kind of these devices.
    """
    if spec.feature_group_count == 1:
        return "xla"
    if not _is_degenerate(contraction, spec):
        if contraction != "wgrad":
            return "xla"
        if _has_one_axis(mesh):
            return "lax"
        if not _looks_depthwise(spec):
            return "xla"
    # None of these is a grouped convolution. The first multiplies, the others have loops.
    if math.prod(spec.spatial_shape("rhs")) <= FEW_TAPS:
        return "einsum"
    return "dense" if unsupported("taps", contraction, spec, device) else "taps"


def miscomputed(name: str, contraction: Contraction, spec: ConvSpec, mesh: Mesh) -> str | None:
    """Returns why XLA would miscompute an implementation that was asked for, or None."""
    if spec.feature_group_count == 1:
        return None
    if name not in ("xla", "lax", "vmap", "packed"):  # The others have no grouped convolutions.
        return None
    if _is_degenerate(contraction, spec):
        return (
            "XLA's partitioner miscomputes grouped convolutions with one tap or one position, or "
            "with a kernel larger than the image"
        )
    if contraction == "wgrad" and name == "lax" and not _has_one_axis(mesh):
        return "XLA's partitioner sums batch groups over all axes of a mesh"
    if contraction == "wgrad" and name != "lax" and _looks_depthwise(spec):
        return "XLA's partitioner miscomputes the feature groups of this kernel gradient"
    return None


def _looks_depthwise(spec: ConvSpec) -> bool:
    """Returns whether the feature groups of the kernel gradient have one feature each."""
    return spec.lhs_shape[spec.layout("lhs")[0]] == 1 or 1 in spec.group_width


def _is_degenerate(contraction: Contraction, spec: ConvSpec) -> bool:
    """Returns whether the window or the result of the convolution has one position only, or the
    kernel does not fit into the image.
    """
    window: Role = "out" if contraction == "wgrad" else "rhs"
    sizes = (math.prod(spec.spatial_shape(role)) for role in (window, RESULT[contraction]))
    extents = zip(spec.extent("rhs"), spec.extent("lhs"), strict=True)
    return 1 in sizes or any(kernel > image for kernel, image in extents)


def constrained(compute: Compute, contraction: Contraction, mesh: Mesh) -> Compute:
    """Returns a computation in which XLA does not shard what it would divide wrongly."""
    first_role, second_role = OPERANDS[contraction]

    def closed(first: jax.Array, second: jax.Array, spec: ConvSpec) -> jax.Array:
        first = _closed(first_role, first, spec, mesh)
        second = _closed(second_role, second, spec, mesh)
        return _closed(RESULT[contraction], compute(first, second, spec), spec, mesh)

    return closed


def _closed(role: Role, x: jax.Array, spec: ConvSpec, mesh: Mesh) -> jax.Array:
    """Closes the dimensions of an array that XLA must not shard.

    The batch and the groups stay open, and so do the inputs and outputs of a single group. Rows and
    columns stay open where the mesh has one axis and neighbours have all the rows that a device
    needs.
    """
    groups = spec.feature_group_count
    one = spec if groups == 1 else spec.one_group()
    first, features, *spatial = one.layout(role)
    is_open = {first, features}
    if groups != 1:
        is_open = set() if role == "rhs" else {first}
    if role != "rhs" and _has_one_axis(mesh):
        is_open |= {d for i, d in enumerate(spatial) if _neighbours_suffice(spec, i, mesh.size)}
    dimensions = [PartitionSpec.UNCONSTRAINED if d in is_open else None for d in range(x.ndim)]
    if groups == 1:
        return with_sharding(x, PartitionSpec(*dimensions), mesh)
    # The groups have a dimension of their own, so that the features of a group stay closed.
    at = one.group_dimension(role)
    dimensions.insert(at, PartitionSpec.UNCONSTRAINED)
    x = with_sharding(one.unfold(role, "G", x, groups), PartitionSpec(*dimensions), mesh)
    return one.fold(role, "G", x, at)


def _neighbours_suffice(spec: ConvSpec, spatial: int, devices: int) -> bool:
    """Returns whether devices that share a spatial dimension need to ask their neighbours only."""
    halo = Halo.of(spec, spatial, devices)
    return halo is not None and max(halo.before, halo.after) <= halo.block


def _has_one_axis(mesh: Mesh) -> bool:
    """Returns whether one axis of a mesh has all the devices."""
    return mesh.size in mesh.shape.values()


def with_sharding(x: jax.Array, spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> jax.Array:
    """Constrains the sharding of an array while a primitive is lowered."""
    # On an Explicit mesh the axes are Auto by now, in the mesh of the context.
    here = jax.sharding.get_abstract_mesh()
    sharding = NamedSharding(mesh if here.empty else here, spec)
    return lax.with_sharding_constraint(x, sharding)
