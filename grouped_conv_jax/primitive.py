"""The primitive: one contraction of the trilinear form behind a convolution, and its rules.

A convolution with kernel w is one trilinear form T(x, w, y) = <conv(x, w), y>, and leaving one
argument out gives the three contractions

    fprop(x, w) -> y        dgrad(y, w) -> x        wgrad(x, y) -> w

Each is bilinear, so its jvp is two binds of itself, and its transpose in either operand is the
contraction that computes that operand. Hence one primitive, with the contraction and the spec of
the forward convolution as parameters, is closed under differentiation to any order.

Batching is one table. In letters x is [N, (G C)], w is [(G O), C] and y is [N, (G O)]; each of
N, G, C and O stands in exactly the arrays that a mapped axis can stand in together, so the mapped
axis becomes part of the letter that the mapped operands and the result share. It does so on each
device by itself: until then it is an axis of its own in the spec, so that it can be sharded.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from grouped_conv_jax import jax_compat
from grouped_conv_jax.algorithms import choice, table
from grouped_conv_jax.algorithms.devices import Device
from grouped_conv_jax.algorithms.ranking import choices_of_context
from grouped_conv_jax.algorithms.recording import Equation, Watch, watching
from grouped_conv_jax.algorithms.table import Asked, asked_for, registered_key
from grouped_conv_jax.jax_compat import Lowering, Primitive, ad, batching, mlir
from grouped_conv_jax.partitioning import xla_partitioner
from grouped_conv_jax.partitioning.explicit_mesh import has_explicit_axes, with_auto_axes
from grouped_conv_jax.partitioning.partition import bits_of, divided
from grouped_conv_jax.spec import OPERANDS, RESULT, Contraction, ConvSpec, Factor, Role

COMPUTES: dict[Role, Contraction] = {role: contraction for contraction, role in RESULT.items()}

grouped_conv_p = Primitive("grouped_conv")
grouped_conv_p.def_impl(
    lambda *args, **params: jax_compat.apply_primitive(grouped_conv_p, *args, **params)
)


def contract(
    first: Any,
    second: Any,
    *,
    contraction: Contraction,
    spec: ConvSpec,
    implementation: Asked,
    out_sharding: NamedSharding | None,
) -> jax.Array:
    """Binds the primitive; the operands in the order of `OPERANDS[contraction]`.

    The tuning of the context goes with it, and with all that transformations make of it.
    """
    return _bind(
        first,
        second,
        contraction=contraction,
        spec=spec,
        implementation=implementation,
        choices=None if isinstance(implementation, str) else choices_of_context(),
        out_sharding=out_sharding,
    )


def _bind(first: Any, second: Any, **params: Any) -> jax.Array:
    return grouped_conv_p.bind(*_aligned(first, second), **params)


def _aligned(first: Any, second: Any) -> tuple[Any, Any]:
    """Inside `shard_map`, both operands varying over the same mesh axes.

    The cast is what makes gradients right: its transpose sums the gradient of an operand that is
    replicated over an axis along which the other one differs.
    """
    varying = [jax_compat.varying(x) for x in (first, second)]
    first_missing, second_missing = varying[1] - varying[0], varying[0] - varying[1]
    if first_missing:
        first = jax.lax.pcast(first, tuple(sorted(first_missing)), to="varying")
    if second_missing:
        second = jax.lax.pcast(second, tuple(sorted(second_missing)), to="varying")
    return first, second


# Types.


@grouped_conv_p.def_abstract_eval
def _abstract_eval(first, second, *, contraction, spec, implementation, choices, out_sharding):
    role = RESULT[contraction]
    if out_sharding is None:
        unsharded = PartitionSpec(*[None] * len(spec.shape(role)))
        out_sharding = NamedSharding(first.sharding.mesh, unsharded)
    return first.update(
        shape=spec.shape(role),
        dtype=spec.role_dtype(role),
        weak_type=first.weak_type and second.weak_type,
        sharding=out_sharding,
    )


# Derivatives.


def _transpose_rule(position: int):
    def rule(cotangent, first, second, *, contraction, spec, out_sharding, **choice):
        operands = OPERANDS[contraction]
        values = dict(zip(operands, (first, second), strict=True))
        values[RESULT[contraction]] = cotangent
        sharding = values[operands[position]].aval.sharding
        transposed = COMPUTES[operands[position]]
        return _bind(
            *(values[role] for role in OPERANDS[transposed]),
            contraction=transposed,
            spec=spec,
            out_sharding=sharding if has_explicit_axes(sharding.mesh) else None,
            **choice,
        )

    return rule


ad.defbilinear(grouped_conv_p, _transpose_rule(0), _transpose_rule(1))


# Batching.

_FACTOR: dict[frozenset[Role], Factor] = {
    frozenset({"lhs", "out"}): "N",
    frozenset({"lhs", "rhs"}): "C",
    frozenset({"rhs", "out"}): "O",
    frozenset({"lhs", "rhs", "out"}): "G",
}


def _batching_rule(axis_data, operands, axes, *, contraction, spec, out_sharding, **choice):
    result, roles = RESULT[contraction], OPERANDS[contraction]
    params = {"contraction": contraction, **choice}
    if axes == (None, None):
        return grouped_conv_p.bind(*operands, spec=spec, out_sharding=out_sharding, **params), None
    mapped: set[Role] = {result}
    mapped |= {role for role, axis in zip(roles, axes, strict=True) if axis is not None}
    if out_sharding is not None:
        # Each example is sharded as it would be alone, and the mapped axis as it was.
        dimensions = (axis_data.explicit_mesh_axis, *out_sharding.spec)
        out_sharding = NamedSharding(out_sharding.mesh, PartitionSpec(*dimensions))
    operands = (
        x if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    )
    larger = spec.mapped_over(_FACTOR[frozenset(mapped)], axis_data.size)
    return _bind(*operands, spec=larger, out_sharding=out_sharding, **params), 0


batching.fancy_primitive_batchers[grouped_conv_p] = _batching_rule


# Lowering: the choice of the implementation is made here, per platform, and where there are several
# devices to divide the work among, on the shapes that one of them gets.


def _lowering_rule(platform: str):
    def rule(ctx, *operands, contraction, spec, implementation, choices, out_sharding):
        lowering = Lowering.of(platform, ctx)
        device = Device.lowered_for(lowering)

        def compute(first, second, spec, divided_over=None):
            result = RESULT[contraction]
            if spec.is_empty:
                return jnp.zeros(spec.shape(result), spec.role_dtype(result))
            merged = spec.merged()
            what = asked_for(implementation, contraction), contraction, merged, device
            if divided_over is None:
                name = choice.resolve(*what, choices, lowering.is_export)
            else:
                name = xla_partitioner.resolve(*what, divided_over, lowering.is_export)

            def by_name(first, second, spec):
                return table.compute(name, contraction, first, second, spec, device)

            algorithm = by_name
            if divided_over is not None:
                algorithm = xla_partitioner.constrained(by_name, contraction, divided_over)
            first, second = map(spec.merge, OPERANDS[contraction], (first, second))
            with jax.named_scope(f"grouped_conv.{contraction}.{name}"):
                # A function of its own keeps its constants. A partitioned one may have none.
                out = jax.jit(lambda a, b: algorithm(a, b, merged))(first, second)
            return spec.split(result, out)

        watch: Watch | None = watching.value
        equation = Equation(contraction, spec, implementation, choices)

        def note(computed_spec, divided_over):
            if watch is not None:
                watch.note(equation, device, computed_spec, divided_over)

        # The same ranking may choose differently for another kind of device.
        measured_on = None if choices is None else device
        key = f"{implementation} {choices} {measured_on} {watch} {registered_key()}"
        computation = divided(compute, contraction, spec, key, lowering, note)
        # The type of the result is settled; how it is computed need not be typed as well.
        computation = with_auto_axes(computation, ctx.avals_out[0].sharding)
        with bits_of(spec):
            return mlir.lower_fun(computation, multiple_results=False)(ctx, *operands)

    return rule


jax_compat.requires_devices(grouped_conv_p)
for _platform in ("cpu", "cuda", "rocm", "tpu"):
    mlir.register_lowering(grouped_conv_p, _lowering_rule(_platform), platform=_platform)
mlir.register_lowering(grouped_conv_p, _lowering_rule("another platform"))
