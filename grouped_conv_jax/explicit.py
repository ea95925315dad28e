"""Meshes with Explicit axes, where shardings are part of types."""

import math
from collections.abc import Callable

from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, auto_axes

from grouped_conv_jax.spec import ConvSpec

Axes = tuple[str, ...]


def has_explicit_axes(mesh: AbstractMesh) -> bool:
    return AxisType.Explicit in mesh.axis_types


def untyped(function: Callable, out_sharding: NamedSharding) -> Callable:
    """`function` with shardings left to the compiler inside, and its result of a given sharding.

    Axes that are not Explicit, such as the Manual ones within `shard_map`, stay what they are.
    """
    mesh = out_sharding.mesh
    explicit = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    )
    if not explicit:
        return function
    wrapped: Callable = auto_axes(function, axes=explicit, out_sharding=out_sharding)
    return wrapped


def result_sharding(spec: ConvSpec, lhs: NamedSharding, rhs: NamedSharding) -> NamedSharding:
    """The sharding of a convolution's result that follows from those of its operands.

    Batch and spatial dimensions are sharded as those of `lhs`. The features are sharded as the
    outputs of `rhs`, or by groups as the features of `lhs`.

    Raises:
      ValueError: it does not follow; the message says what would mend it.
    """
    mesh = rhs.mesh if lhs.mesh.empty else lhs.mesh
    by_lhs, by_rhs = _axes(lhs, len(spec.lhs_shape)), _axes(rhs, len(spec.rhs_shape))
    result: list[Axes] = [()] * len(spec.out_shape)
    for at, source in zip(spec.layout("out"), spec.layout("lhs"), strict=True):
        result[at] = by_lhs[source]
    outputs, *others = (by_rhs[d] for d in spec.layout("rhs"))
    if any(others):
        raise _ambiguous(
            f"rhs is sharded over {_listed(*others)} in its input features or its taps",
            "reshard rhs with jax.sharding.reshard",
        )
    features = spec.layout("out")[1]
    result[features] = _features(spec, result[features], outputs, mesh)
    if len(used := [axis for axes in result for axis in axes]) > len(set(used)):
        raise _ambiguous(
            f"the result would be sharded twice over {_listed(*result)}",
            "reshard one of lhs and rhs with jax.sharding.reshard",
        )
    for at, axes in enumerate(result):
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if spec.out_shape[at] % parts:
            raise _ambiguous(
                f"{_listed(axes)} ({parts} devices) would not divide dimension {at} of the "
                f"result {spec.out_shape}",
                "reshard lhs with jax.sharding.reshard",
            )
    return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in result)))


def _features(spec: ConvSpec, inputs: Axes, outputs: Axes, mesh: Mesh | AbstractMesh) -> Axes:
    """The axes that shard the features of the result, from those of lhs and the outputs of rhs."""
    groups = spec.feature_group_count
    parts = math.prod(mesh.shape[axis] for axis in inputs)
    if groups % parts == 0:
        if inputs and outputs and inputs != outputs:
            raise _ambiguous(
                f"the features of lhs are sharded over {_listed(inputs)}, and the outputs of rhs "
                f"over {_listed(outputs)}",
                "reshard one of them with jax.sharding.reshard",
            )
        return inputs or outputs
    if not outputs:
        raise _ambiguous(
            f"the features of lhs are sharded over {_listed(inputs)}, {parts} devices, which cuts "
            f"through its feature_group_count={groups}",
            "shard the outputs of rhs, reshard lhs with jax.sharding.reshard",
        )
    return outputs


def _axes(sharding: NamedSharding, rank: int) -> list[Axes]:
    """The mesh axes of each dimension, as tuples."""
    if sharding.spec.unreduced or sharding.spec.reduced:
        raise ValueError(
            f"lhs and rhs must not have unreduced or reduced mesh axes, got {sharding.spec}; "
            "reshard them with jax.sharding.reshard"
        )
    entries = [*sharding.spec, *[None] * (rank - len(sharding.spec))]
    return [() if e is None else e if isinstance(e, tuple) else (e,) for e in entries]


def _listed(*dimensions: Axes) -> str:
    return ", ".join(repr(axis) for axes in dimensions for axis in axes)


def _ambiguous(what: str, mend: str) -> ValueError:
    return ValueError(
        f"{what}, so that the sharding of the result does not follow; {mend}, or say how the "
        "result is to be sharded with out_sharding=jax.P(...)"
    )
