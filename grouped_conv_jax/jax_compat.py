"""Everything of JAX that this package uses and JAX does not promise to keep.

JAX keeps what its documentation names. What follows is private, experimental, or an attribute that
only JAX's source explains. Other modules get it from here. It works with JAX 0.10 to 0.12, and may
break in any later version:

- `Primitive`, `Jaxpr`, `ClosedJaxpr`, `Literal`, `jaxprs_in_params`, `conv_general_dilated_p` are
  from `jax.extend.core`, which may change between minor versions.
- `ad`, `batching`, `mlir` and `apply_primitive` are from `jax.interpreters`, of which JAX removes a
  part in most versions. `batching.fancy_primitive_batchers` takes the rule of `primitive`.
- `requires_devices` adds to a private set of `jax._src.dispatch`.
- `Lowering` reads the attributes of a lowering rule's `module_context`.
- `varying` reads `aval.mat`, which JAX 0.9 and older called `aval.vma`.
- `make_user_context` is public, but new.
- `custom_partitioning` and `set_xla_metadata` are from `jax.experimental`.
- `set_error_check` and `set_rematerialization` add to private tables. The second one exists since
  JAX 0.11.
- `set_bilinear_taylor_rule` and `register_roofline` add to tables of `jax.experimental`.

`parallel.collectives` reads the text of compiled programs, which XLA does not promise either.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax._src import ad_checkpoint, checkify, core, dispatch
from jax._src.interpreters import partial_eval, remat
from jax.experimental import jet
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.roofline import RooflineResult, RooflineRuleContext, register_roofline
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive, jaxprs_in_params
from jax.extend.core.primitives import conv_general_dilated_p
from jax.interpreters import ad, batching, mlir
from jax.interpreters.xla import apply_primitive
from jax.sharding import AbstractMesh, Mesh

__all__ = [
    "ClosedJaxpr",
    "Jaxpr",
    "Literal",
    "Lowering",
    "Primitive",
    "RooflineResult",
    "RooflineRuleContext",
    "ad",
    "apply_primitive",
    "batching",
    "conv_general_dilated_p",
    "custom_partitioning",
    "jaxprs_in_params",
    "make_user_context",
    "mlir",
    "register_roofline",
    "requires_devices",
    "set_bilinear_taylor_rule",
    "set_error_check",
    "set_rematerialization",
    "set_xla_metadata",
    "varying",
]

make_user_context = jax.make_user_context


def requires_devices(primitive: Primitive) -> None:
    """Makes jit tell the lowering of a primitive which devices it is for.

    `custom_partitioning` must know them (JAX's changelog, 0.4.24).
    """
    dispatch.prim_requires_devices_during_lowering.add(primitive)


def varying(x: Any) -> frozenset[str]:
    """Returns the mesh axes over which an array differs between devices, inside `shard_map`."""
    return jax.typeof(x).mat.varying


@dataclasses.dataclass(frozen=True)
class Lowering:
    """What an equation is lowered for.

    Attributes:
      platform: the platform, for example "cpu".
      types: the types of the operands and of the results, with their shardings.
      devices: the devices, or None if they are not known, as in an export for another platform.
      mesh_sizes: the sizes of the axes of the mesh, empty if the shardings tell of no mesh.
      manual_axes: the axes that are manual, as inside `shard_map`.
      is_fully_manual: whether all axes of the mesh are manual.
      is_export: whether the program must run without this process.
    """

    platform: str
    types: tuple[Any, ...]
    devices: tuple[Any, ...] | None
    mesh_sizes: Mapping[str, int]
    manual_axes: frozenset[str]
    is_fully_manual: bool
    is_export: bool
    _module: Any = dataclasses.field(repr=False)

    @classmethod
    def of(cls, platform: str, context: mlir.LoweringRuleContext) -> "Lowering":
        module = context.module_context
        axes: Any = module.axis_context
        mesh: Mesh | AbstractMesh | None = getattr(axes, "abstract_mesh", None)
        manual = frozenset(getattr(axes, "manual_axes", None) or ())
        devices = getattr(axes, "device_assignment", None)
        return cls(
            platform,
            (*context.avals_in, *context.avals_out),
            None if devices is None else tuple(devices),
            dict(mesh.shape) if mesh is not None and not manual else {},
            manual,
            bool(manual) and manual == frozenset(axes.mesh.axis_names),
            module.lowering_parameters.for_export,
            module,
        )

    def devices_of_process(self) -> tuple[Any, ...]:
        """Returns the devices, or those of the platform that this process has, or none."""
        backend = None if self._module.backend is None else self._module.get_backend(optional=True)
        if backend is None:
            return ()
        return tuple(self.devices or backend.local_devices() or backend.devices())


# The tables of less common transformations.


def set_error_check(primitive: Primitive) -> None:
    """Makes `checkify` report a NaN that a primitive makes, under `float_checks`."""
    checkify.error_checks[primitive] = functools.partial(checkify.nan_error_check, primitive)


def set_bilinear_taylor_rule(primitive: Primitive) -> None:
    """Tells `jet` the Taylor coefficients of a primitive that is linear in both operands."""
    jet.jet_rules[primitive] = functools.partial(jet._bilinear_taylor_rule, primitive)


def set_rematerialization(primitive: Primitive) -> None:
    """Makes the policies of `jax.checkpoint` ask about a primitive under `jax_remat3`.

    That exists since JAX 0.11. Policies are asked only about primitives with a rule there.
    """
    if conv_general_dilated_p in remat.rules:
        remat.rules[primitive] = functools.partial(_rematerialized, primitive)


def _rematerialized(
    primitive: Primitive, trace: Any, first: Any, second: Any, **params: Any
) -> tuple[Any, Any, Callable]:
    """Returns the result, what is saved of it, and how it is computed from that."""
    compute = functools.partial(primitive.bind, **params)
    out = compute(first, second)
    types = core.typeof(first), core.typeof(second)
    case = trace.policy is not None and trace.policy(primitive, *types, **params)
    case = partial_eval.ensure_enum(case)
    if isinstance(case, partial_eval.RecomputeType):
        return out, (), lambda _, first, second: compute(first, second)
    kept = out
    if isinstance(case, partial_eval.Offloadable):
        kept = jax.device_put(out, core.mem_kind_to_space(case.dst), may_alias=False)

    def again(kept: Any, first: Any, second: Any) -> Any:
        if isinstance(case, partial_eval.Offloadable):
            kept = jax.device_put(kept, core.mem_kind_to_space(case.src), may_alias=False)
        return ad_checkpoint.primal_left_tangent_right(kept, compute(first, second))

    return out, kept, again
