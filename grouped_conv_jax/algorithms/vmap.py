"""The convolution of one group, mapped over an explicit group axis with `jax.vmap`.

JAX folds the mapped axis back into feature groups, so that XLA sees what the reference gives it.
"""

import jax

from grouped_conv_jax.algorithms import xla
from grouped_conv_jax.spec import Contraction, ConvSpec, Role


def supports(contraction: Contraction, spec: ConvSpec, platform: str) -> str | None:
    return None


def seconds(contraction: Contraction, spec: ConvSpec) -> float:
    """It becomes the same convolution, by a longer way."""
    return xla.seconds(contraction, spec)


temporary_bytes = xla.temporary_bytes


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
    split = [one.unfold(role, "G", x, spec.feature_group_count) for role, x in (a, b)]
    axes = tuple(one.group_dimension(role) for role, _ in (a, b))
    axis = one.group_dimension(result)
    mapped = jax.vmap(lambda x, y: dense(x, y, one), axes, axis)(*split)
    return one.fold(result, "G", mapped, axis)
