"""The expected time of a contraction: in seconds on two cores of a CPU with AVX-512.

The constants are measured, in 32 bits, on the AMD EPYC of benchmarks/cpu-float32-epyc.json. Only
the ratios of the implementations matter, and those hold on other CPUs as far as they are like it:
cores make all of them faster, and so do wider vectors. Where they do not, `tune` measures.

On GPUs and TPUs only times relative to lax's own contractions are known, and those are the unit
there.
"""

import math

from grouped_conv_jax.spec import OPERANDS, RESULT, Contraction, ConvSpec, Role

BYTES_PER_SECOND = 25e9
"""Of a copy, read and written."""

DENSE_FLOPS = 240e9
"""Per second, of a large matrix product or a wide dense convolution."""

CALL = 20e-6
"""What one more step of a program takes, however small."""


def nbytes(spec: ConvSpec, *roles: Role) -> int:
    """Of some of the arrays."""
    return sum(math.prod(spec.shape(role)) * spec.role_dtype(role).itemsize for role in roles)


def all_bytes(contraction: Contraction, spec: ConvSpec) -> int:
    """Of the operands and the result."""
    return nbytes(spec, *OPERANDS[contraction], RESULT[contraction])


def flops(spec: ConvSpec) -> int:
    """Of one contraction, a multiply-add as two."""
    return 2 * spec.multiply_adds


def convolution_rate(contraction: Contraction, spec: ConvSpec) -> float:
    """FLOP/s of the dense convolution of one group."""
    rate = dense_rate(contraction, spec)
    if math.prod(spec.spatial_shape("rhs")) == 1:
        rate *= 0.6  # What is packed for a convolution is used for one tap only.
    return rate


def dense_rate(contraction: Contraction, spec: ConvSpec) -> float:
    """FLOP/s of the matrix product that the convolution of one group is.

    What is packed of one operand is used as often as the result has columns; and what is packed
    takes longer, the shorter the sums are. The kernel's gradient has long sums and few results.
    """
    inputs, outputs = spec.group_width
    dense = DENSE_FLOPS * 4 / max(4, spec.accumulator.itemsize)
    if contraction == "wgrad":
        return 0.8 * dense / (1 + (32 / min(inputs, outputs)) ** 1.5)
    summed, columns = (inputs, outputs) if contraction == "fprop" else (outputs, inputs)
    depth = summed * math.prod(spec.spatial_shape("rhs"))
    return dense / (1 + (18 / columns) ** 2) / (1 + 40 / depth)
