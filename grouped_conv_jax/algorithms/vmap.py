"""The convolution of one group, mapped over an explicit group axis with `jax.vmap`.

JAX folds the mapped axis back into feature groups, so that XLA sees what the reference gives it.
"""

import jax

from grouped_conv_jax.algorithms.base import Algorithm
from grouped_conv_jax.algorithms.devices import Device
from grouped_conv_jax.algorithms.xla import Xla
from grouped_conv_jax.spec import Contraction, ConvSpec, Role

XLA = Xla()


class Vmap(Algorithm):
    """The convolution of one group, mapped over an explicit group axis with `jax.vmap`."""

    takes_dot_algorithm = True

    def seconds(self, contraction: Contraction, spec: ConvSpec, device: Device) -> float:
        """It becomes the same convolution as XLA's, by a longer way."""
        return XLA.seconds(contraction, spec, device)

    def temporary_bytes(self, contraction: Contraction, spec: ConvSpec) -> int:
        return XLA.temporary_bytes(contraction, spec)

    def fprop(self, lhs: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
        return _each_group(XLA.fprop, ("lhs", lhs), ("rhs", rhs), "out", spec)

    def dgrad(self, out: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
        return _each_group(XLA.dgrad, ("out", out), ("rhs", rhs), "lhs", spec)

    def wgrad(self, lhs: jax.Array, out: jax.Array, spec: ConvSpec) -> jax.Array:
        return _each_group(XLA.wgrad, ("lhs", lhs), ("out", out), "rhs", spec)


def _each_group(
    dense, a: tuple[Role, jax.Array], b: tuple[Role, jax.Array], result: Role, spec: ConvSpec
) -> jax.Array:
    one = spec.one_group()
    split = [one.unfold(role, "G", x, spec.feature_group_count) for role, x in (a, b)]
    axes = tuple(one.group_dimension(role) for role, _ in (a, b))
    axis = one.group_dimension(result)
    mapped = jax.vmap(lambda x, y: dense(x, y, one), axes, axis)(*split)
    return one.fold(result, "G", mapped, axis)
