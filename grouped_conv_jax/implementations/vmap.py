"""The convolution of one group, mapped over an explicit group axis with `jax.vmap`.

XLA folds the mapped axis back into feature groups, for the kernel gradient too, where the
reference has batch groups: on a CPU that is the faster form of the two.
"""

import jax

from grouped_conv_jax.implementations import xla
from grouped_conv_jax.spec import ConvSpec, Role


def supports(contraction: str, spec: ConvSpec, platform: str) -> str | None:
    return None


def fprop(lhs: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
    return _each_group(xla.fprop, ("lhs", lhs), ("rhs", rhs), "out", spec)


def dgrad(out: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
    return _each_group(xla.dgrad, ("out", out), ("rhs", rhs), "lhs", spec)


def wgrad(lhs: jax.Array, out: jax.Array, spec: ConvSpec) -> jax.Array:
    return _each_group(xla.wgrad, ("lhs", lhs), ("out", out), "rhs", spec)


def _each_group(
    dense, a: tuple[Role, jax.Array], b: tuple[Role, jax.Array], result: Role, spec: ConvSpec
) -> jax.Array:
    one = spec.one_group()
    (a_split, a_axis), (b_split, b_axis) = (
        one.unfold(role, "G", x, spec.feature_group_count) for role, x in (a, b)
    )
    axis = one.group_dimension(result)
    mapped = jax.vmap(lambda x, y: dense(x, y, one), (a_axis, b_axis), axis)(a_split, b_split)
    return one.fold(result, "G", mapped, axis)
