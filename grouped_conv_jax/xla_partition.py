"""Contractions that XLA's own partitioner divides among devices, where the library cannot do it.

`custom_partitioning` lets the library decide (see `partition`). A TPU does not have it, and
`jax.export` cannot store it. There the shardings of a mesh with Auto axes are known to XLA only, so
XLA divides the program that is lowered. Its partitioner has faults. With JAX 0.10 and 0.12:

- On a mesh with several axes, a sum over devices often runs over axes that it should not, so that
  the result is multiplied by their size. This happens where rows or columns are sharded, and for
  kernel gradients with batch groups.
- A grouped convolution that is a matrix product in disguise (one tap, or one output position) is
  refused or computed with the wrong groups.
- A kernel gradient with feature groups is wrong for a batch of one.

This module keeps XLA away from them. `constrain` closes dimensions that XLA must not shard: a
closed dimension is gathered if the caller shards it. `choose` picks the implementation that XLA
divides without a needless collective. Both were found by compiling random shardings for CPU devices,
where values can be compared, and by reading the collectives of programs compiled for TPUs;
`tests/test_xla_partition.py` and `tests/test_tpu.py` do the same.
"""

import math

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from grouped_conv_jax.spec import Contraction, ConvSpec, Role

NARROW = 8
"""Features of a group up to which a product per tap beats a kernel gradient with feature groups.

XLA:TPU's own estimates for ResNeXt's groups of 4 and 8 features are 2.7 to 10 times lower.
"""


def choose(contraction: Contraction, spec: ConvSpec, mesh_axes: int) -> str:
    """Returns the implementation for a contraction that XLA divides.

    Args:
      contraction: the contraction.
      spec: the whole convolution, without mapped axes.
      mesh_axes: how many axes of the mesh have more than one device.
    """
    if spec.is_symbolic or spec.feature_group_count == 1:
        return "xla"
    if _is_matrix_product(contraction, spec):
        return "einsum"
    if contraction != "wgrad":
        return "xla"
    width = min(spec.group_width)
    if 1 < width <= NARROW:
        return "einsum"
    if mesh_axes <= 1:
        return "lax"
    batch = spec.lhs_shape[spec.layout("lhs")[0]]
    return "einsum" if width == 1 or batch == 1 else "xla"


def miscomputed(name: str, contraction: Contraction, spec: ConvSpec, mesh_axes: int) -> str | None:
    """Returns why XLA would miscompute an implementation that was asked for, or None."""
    if spec.is_symbolic or spec.feature_group_count == 1:
        return None
    convolves_groups = name in ("xla", "lax", "vmap", "packed")
    if convolves_groups and _is_matrix_product(contraction, spec):
        return "XLA divides grouped convolutions that are matrix products incorrectly"
    if contraction != "wgrad" or not convolves_groups:
        return None
    if name == "lax":
        return (
            "XLA sums batch groups over axes that they are not sharded over" * (mesh_axes > 1)
            or None
        )
    batch = spec.lhs_shape[spec.layout("lhs")[0]]
    if batch == 1 or max(spec.group_width) == 1:
        return "XLA divides the kernel gradient by feature groups incorrectly here"
    return None


def _is_matrix_product(contraction: Contraction, spec: ConvSpec) -> bool:
    """Returns whether the window or the result of the convolution has one position only."""
    window, result = {
        "fprop": ("rhs", "out"),
        "dgrad": ("rhs", "lhs"),
        "wgrad": ("out", "rhs"),
    }[contraction]
    return 1 in (math.prod(spec.spatial_shape(role)) for role in (window, result))  # type: ignore


def constrain(role: Role, x: jax.Array, spec: ConvSpec, mesh: Mesh | AbstractMesh) -> jax.Array:
    """Closes the dimensions of an array that XLA must not shard.

    The batch and the groups stay open, and so do the inputs and outputs of a single group. Rows and
    columns stay open where the mesh has one axis.
    """
    groups = spec.feature_group_count
    one = spec if groups == 1 else spec.one_group()
    first, features, *spatial = one.layout(role)
    is_open = {first, features}
    if groups != 1:
        is_open = set() if role == "rhs" else {first}
    if role != "rhs" and axis_count(mesh) <= 1:
        is_open |= set(spatial)
    dimensions = [PartitionSpec.UNCONSTRAINED if d in is_open else None for d in range(x.ndim)]
    if groups == 1:
        return _constrained(x, dimensions, mesh)
    # The groups have a dimension of their own, so that the features of a group stay closed.
    at = one.group_dimension(role)
    dimensions.insert(at, PartitionSpec.UNCONSTRAINED)
    x = _constrained(one.unfold(role, "G", x, groups), dimensions, mesh)
    return one.fold(role, "G", x, at)


def _constrained(x: jax.Array, dimensions: list, mesh: Mesh | AbstractMesh) -> jax.Array:
    # On an Explicit mesh the axes are Auto by now, in the mesh of the context.
    here = jax.sharding.get_abstract_mesh()
    sharding = NamedSharding(mesh if here.empty else here, PartitionSpec(*dimensions))
    return lax.with_sharding_constraint(x, sharding)


def axis_count(mesh: Mesh | AbstractMesh) -> int:
    """Returns how many axes of a mesh have more than one device."""
    return sum(size > 1 for size in mesh.shape.values())
