"""Meshes with Explicit axes, where shardings are part of types."""

from collections.abc import Callable

from jax.sharding import AbstractMesh, AxisType, NamedSharding, auto_axes


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
