"""Meshes with Explicit axes, where shardings are part of types."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, auto_axes

from grouped_conv_jax.spec import OPERANDS, RESULT, Contraction, ConvSpec, Role
from grouped_conv_jax.text import shown

Axes = tuple[str, ...]

_Sharded = dict[Role, list[Axes]]
"""The mesh axes of each dimension of the operands."""

_Names = dict[Role, str]
"""What the operation calls them."""


def has_explicit_axes(mesh: Mesh | AbstractMesh) -> bool:
    return AxisType.Explicit in mesh.axis_types


def with_auto_axes(function: Callable, out_sharding: NamedSharding | None) -> Callable:
    """`function` with shardings left to the compiler inside, and its result of a given sharding.

    Axes that are not Explicit, such as the Manual ones within `shard_map`, stay what they are.
    """
    if out_sharding is None:
        return function
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


def mesh_of(*operands: Any) -> AbstractMesh:
    """That of the first operand that is on one, else that of the context."""
    meshes = (x.sharding.mesh for x in operands)
    return next((m for m in meshes if not m.empty), jax.sharding.get_abstract_mesh())


def sharding_of_result(
    contraction: Contraction,
    spec: ConvSpec,
    first: Any,
    second: Any,
    out_sharding: Any,
    names: Mapping[Role, str] = MappingProxyType({}),
) -> NamedSharding | None:
    """That which was asked for, or follows from the types of the operands; None on an Auto mesh.

    Args:
      contraction: which one.
      spec: of the convolution.
      first: the type of the first operand.
      second: the type of the second one.
      out_sharding: that which was asked for, or None.
      names: what the operation calls its arguments, where they are not "lhs" and "rhs".

    Raises:
      ValueError, TypeError: it does not follow; the message says what would mend it. Or what was
        asked for is no sharding of the result.
    """
    mesh = mesh_of(first, second)
    if out_sharding is not None:
        return canonical(out_sharding, spec.shape(RESULT[contraction]), mesh)
    if not has_explicit_axes(mesh):
        return None
    by: _Sharded = {
        role: axes_of_dimensions(x.sharding, len(spec.shape(role)))
        for role, x in zip(OPERANDS[contraction], (first, second), strict=True)
    }
    rule = {"fprop": _fprop, "dgrad": _dgrad, "wgrad": _wgrad}[contraction]
    called: _Names = {"lhs": "lhs", "rhs": "rhs", "out": "cotangent", **names}
    dimensions = rule(spec, by, mesh, called)
    _check_fits(dimensions, spec.shape(RESULT[contraction]), mesh)
    return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in dimensions)))


def canonical(out_sharding: Any, shape: Sequence[Any], mesh: AbstractMesh) -> NamedSharding:
    """What JAX makes of an out_sharding."""
    if not isinstance(out_sharding, NamedSharding | PartitionSpec):
        raise TypeError(
            "out_sharding must be a jax.P(...) or a jax.sharding.NamedSharding, got "
            f"{shown(out_sharding)}"
        )
    spec = out_sharding if isinstance(out_sharding, PartitionSpec) else out_sharding.spec
    if len(spec) > len(shape):
        raise ValueError(
            f"out_sharding={spec} is for {len(spec)} dimensions, but the result has {len(shape)}"
        )
    if spec.unreduced or spec.reduced:
        raise ValueError(f"out_sharding must not have unreduced or reduced mesh axes, got {spec}")
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.eval_shape(
            lambda: lax.broadcasted_iota(np.int32, shape, 0, out_sharding=out_sharding)
        ).sharding


def _fprop(spec: ConvSpec, by: _Sharded, mesh: AbstractMesh, called: _Names) -> list[Axes]:
    """Batch and spatial dimensions as those of `lhs`. The features as the outputs of `rhs`, or by
    groups as the features of `lhs`.
    """
    result: list[Axes] = [()] * len(spec.out_shape)
    for at, source in zip(spec.layout("out"), spec.layout("lhs"), strict=True):
        result[at] = by["lhs"][source]
    outputs, *others = (by["rhs"][d] for d in spec.layout("rhs"))
    if any(others):
        raise _ambiguous(
            f"{called['rhs']} is sharded over {_listed(*others)} in its input features or its taps",
            f"reshard {called['rhs']} with jax.sharding.reshard",
        )
    features = spec.layout("out")[1]
    if _cuts_groups(spec, result[features], mesh) and outputs:
        result[features] = outputs
    else:
        result[features] = _by_groups(
            spec, called["lhs"], result[features], called["rhs"], outputs, mesh
        )
    return result


def _dgrad(spec: ConvSpec, by: _Sharded, mesh: AbstractMesh, called: _Names) -> list[Axes]:
    """Batch and spatial dimensions as those of `out`. The features by groups as those of `out`, or
    of one group as the inputs of `rhs`.
    """
    result: list[Axes] = [()] * len(spec.lhs_shape)
    for at, source in zip(spec.layout("lhs"), spec.layout("out"), strict=True):
        result[at] = by["out"][source]
    outputs, inputs, *taps = (by["rhs"][d] for d in spec.layout("rhs"))
    if any(taps) or (inputs and spec.feature_group_count > 1):
        raise _ambiguous(
            f"{called['rhs']} is sharded over {_listed(inputs, *taps)} within its groups or in its "
            "taps",
            f"reshard {called['rhs']} with jax.sharding.reshard",
        )
    features = spec.layout("lhs")[1]
    whole = _by_groups(spec, called["out"], result[features], called["rhs"], outputs, mesh)
    result[features] = whole or inputs
    return result


def _wgrad(spec: ConvSpec, by: _Sharded, mesh: AbstractMesh, called: _Names) -> list[Axes]:
    """The outputs as the features of `out`, or by groups as those of `lhs`; the inputs of one group
    as the features of `lhs`. What is summed over is whole on each device.
    """
    result: list[Axes] = [()] * len(spec.rhs_shape)
    inputs, outputs = (by[role][spec.layout(role)[1]] for role in ("lhs", "out"))
    at_outputs, at_inputs, *_ = spec.layout("rhs")
    if spec.feature_group_count == 1:
        result[at_outputs], result[at_inputs] = outputs, inputs
    elif outputs and _cuts_groups(spec, outputs, mesh):
        result[at_outputs] = outputs
    else:
        result[at_outputs] = _by_groups(spec, called["lhs"], inputs, called["out"], outputs, mesh)
    return result


def _cuts_groups(spec: ConvSpec, axes: Axes, mesh: AbstractMesh) -> bool:
    return spec.feature_group_count % math.prod(mesh.shape[axis] for axis in axes) != 0


def _by_groups(
    spec: ConvSpec, first: str, a: Axes, second: str, b: Axes, mesh: AbstractMesh
) -> Axes:
    """The axes that shard the groups, of two arrays with features in groups."""
    if a and b and a != b:
        raise _ambiguous(
            f"the features of {first} are sharded over {_listed(a)}, and the outputs of {second} "
            f"over {_listed(b)}",
            "reshard one of them with jax.sharding.reshard",
        )
    if _cuts_groups(spec, a, mesh):
        parts = math.prod(mesh.shape[axis] for axis in a)
        raise _ambiguous(
            f"the features of {first} are sharded over {_listed(a)}, {parts} devices, which cuts "
            f"through its feature_group_count={spec.feature_group_count}",
            f"shard the outputs of {second}, reshard {first} with jax.sharding.reshard",
        )
    return a or b


def _check_fits(dimensions: Sequence[Axes], shape: Sequence[Any], mesh: AbstractMesh) -> None:
    if len(used := [axis for axes in dimensions for axis in axes]) > len(set(used)):
        raise _ambiguous(
            f"the result would be sharded twice over {_listed(*dimensions)}",
            "reshard one of the operands with jax.sharding.reshard",
        )
    for at, axes in enumerate(dimensions):
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if shape[at] % parts:
            raise _ambiguous(
                f"{_listed(axes)} ({parts} devices) would not divide dimension {at} of the "
                f"result {tuple(shape)}",
                "reshard the operand with jax.sharding.reshard",
            )


def axes_of_dimensions(sharding: NamedSharding, rank: int) -> list[Axes]:
    """Returns the mesh axes that shard each dimension.

    Raises:
      ValueError: the array is unreduced or reduced over mesh axes.
    """
    if sharding.spec.unreduced or sharding.spec.reduced:
        raise ValueError(
            f"operands must not have unreduced or reduced mesh axes, got {sharding.spec}; "
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
