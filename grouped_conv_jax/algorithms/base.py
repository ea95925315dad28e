"""The interface of an algorithm: `Algorithm`."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from grouped_conv_jax.algorithms.devices import Device
from grouped_conv_jax.spec import Contraction, ConvSpec


class Algorithm:
    """One way to compute contractions on one device.

    A subclass overrides at least one of `fprop`, `dgrad` and `wgrad`. A contraction that it does
    not override is computed by other algorithms. An algorithm knows nothing of differentiation,
    `jax.vmap`, sharding, or of when it is chosen.

    Operands and results have the layouts, shapes and dtypes that the spec says. No array is empty,
    and `spec.mapped` is. The three methods are called while JAX traces, so they must be functions
    of their arguments only.

    Attributes:
      runs_unasked: whether the automatic choice, or a `Tuning`, may choose the algorithm.
        Otherwise it runs only where `implementation=` names it.
      is_exportable: whether programs may contain it that run without this package.
      takes_dot_algorithm: whether it honours a `precision` that names an algorithm of XLA's matrix
        products, such as `jax.lax.DotAlgorithmPreset.BF16_BF16_F32`.
    """

    runs_unasked: bool = True
    is_exportable: bool = True
    takes_dot_algorithm: bool = False

    def supports(self, contraction: Contraction, spec: ConvSpec, device: Device) -> str | None:
        """Returns None if the algorithm computes this, else the reason why not.

        The reason completes the sentence "the algorithm does not compute this: ...".
        """
        return None

    def seconds(self, contraction: Contraction, spec: ConvSpec, device: Device) -> float:
        """Returns the expected time of a contraction that the algorithm supports.

        The automatic choice is the algorithm with the least. Only ratios matter. On a CPU the model
        is in `costs`. On GPUs and TPUs the unit is the time of lax's own contraction. Infinity
        means that the algorithm is not chosen automatically, for instance since nothing was
        measured.
        """
        return math.inf

    def temporary_bytes(self, contraction: Contraction, spec: ConvSpec) -> int:
        """Returns the bytes that XLA stores on a CPU beside the operands and the result, at most.

        The automatic choice avoids algorithms that store too much: see `memory`.
        """
        return 0

    def configs(
        self, contraction: Contraction, spec: ConvSpec, device: Device
    ) -> Mapping[str, Any]:
        """Returns the settings that `tune` tries beside the default, by name.

        A setting, such as the sizes of a tile, is a fourth argument of the three methods, where it
        is not the default. It can be asked for with `implementation="algorithm:name"`.
        """
        return {}

    def fprop(self, lhs: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
        """Returns the output of a convolution from its input and kernel."""
        raise NotImplementedError

    def dgrad(self, out: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
        """Returns the gradient of the input from that of the output and the kernel."""
        raise NotImplementedError

    def wgrad(self, lhs: jax.Array, out: jax.Array, spec: ConvSpec) -> jax.Array:
        """Returns the gradient of the kernel from the input and the gradient of the output."""
        raise NotImplementedError

    def has(self, contraction: Contraction) -> bool:
        """Returns whether the algorithm overrides a contraction."""
        return getattr(type(self), contraction) is not getattr(Algorithm, contraction)
