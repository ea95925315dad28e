"""The convolutions that lax's own rules make, for platforms whose compilers know them.

They are those of "xla" but for the kernel's gradient, which has batch groups here. XLA:GPU gives
that to cuDNN; the feature groups of "xla" it computes up to eight hundred times as slowly. On a CPU
it is the other way round. (Batch groups that XLA partitions come out multiplied by the size of
unused mesh axes; here they are computed on what one device has, after the partition.)
"""

import jax
from jax import lax

from grouped_conv_jax.algorithms import xla
from grouped_conv_jax.algorithms.devices import Device
from grouped_conv_jax.algorithms.xla import Xla
from grouped_conv_jax.spec import Contraction, ConvSpec


class Lax(Xla):
    """The convolutions that lax's own rules make of each contraction."""

    takes_dot_algorithm = True

    def supports(self, contraction: Contraction, spec: ConvSpec, device: Device) -> str | None:
        if contraction == "wgrad" and not isinstance(spec.feature_group_count, int):
            return "it needs to know how many groups there are"
        return None

    def seconds(self, contraction: Contraction, spec: ConvSpec, device: Device) -> float:
        """A CPU computes batch groups as so many times the work."""
        if contraction != "wgrad" or spec.feature_group_count == 1:
            return super().seconds(contraction, spec, device)
        if device.platform != "cpu":
            return 1.0
        return spec.feature_group_count * super().seconds(contraction, spec, device)

    def wgrad(self, lhs: jax.Array, out: jax.Array, spec: ConvSpec) -> jax.Array:
        """[(G C), N] · [(G O), N] -> [C, (G O)], by batch groups: block g of the first dimension
        meets block g of the outputs.
        """
        dtype = spec.operand_dtype("wgrad")
        layouts = (xla.exchanged(spec.layout(role)) for role in ("lhs", "out", "rhs"))
        return xla.convolve(
            lhs.astype(dtype),
            out.astype(dtype),
            spec.rhs_dilation,
            spec.wgrad_padding,
            spec.lhs_dilation,
            spec.window_strides,
            lax.ConvDimensionNumbers(*layouts),
            batch_group_count=spec.feature_group_count,
            precision=spec.precision,
            preferred_element_type=spec.wide_dtype,
        ).astype(spec.role_dtype("rhs"))
