"""XLA's own convolution: the reference. It supports everything.

The contractions are written as explicit convolutions (not through `jax.linear_transpose`): inside
`shard_map` the operands carry their varying axes, which a transpose of an abstract value would
not know of, and the sums would come out wrong.
"""

import jax
from jax import lax

from grouped_conv_jax.spec import ConvSpec


def supports(contraction: str, spec: ConvSpec, platform: str) -> str | None:
    return None


def fprop(lhs: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
    """[N, (G C)] · [(G O), C] -> [N, (G O)]."""
    return lax.conv_general_dilated(
        lhs,
        rhs,
        spec.window_strides,
        spec.padding,
        spec.lhs_dilation,
        spec.rhs_dilation,
        spec.dimension_numbers,
        spec.feature_group_count,
        precision=spec.precision,
        preferred_element_type=spec.out_dtype,
    )


def dgrad(out: jax.Array, rhs: jax.Array, spec: ConvSpec) -> jax.Array:
    """[N, (G O)] · [(G C), O] -> [N, (G C)]: a forward convolution of `out`, dilated by the
    strides, with the kernel turned round and its groups moved from the outputs to the inputs.
    """
    lhs_layout, rhs_layout, out_layout = (spec.layout(role) for role in ("lhs", "rhs", "out"))
    outputs, inputs, *spatial = rhs_layout
    one = spec.one_group()
    rhs, axis = one.unfold("rhs", "G", rhs, spec.feature_group_count)
    rhs = one.fold("rhs", "C", rhs, axis)
    lhs = lax.conv_general_dilated(
        out,
        lax.rev(rhs, spatial).astype(out.dtype),
        spec.lhs_dilation,
        _dgrad_padding(spec),
        spec.window_strides,
        spec.rhs_dilation,
        lax.ConvDimensionNumbers(out_layout, (inputs, outputs, *spatial), lhs_layout),
        spec.feature_group_count,
        precision=spec.precision,
        preferred_element_type=spec.out_dtype,
    )
    return lhs.astype(spec.dtype)


def wgrad(lhs: jax.Array, out: jax.Array, spec: ConvSpec) -> jax.Array:
    """[(G C), N] · [N, (G O)] -> [C, (G O)]: batch and features change places, `out` is the
    kernel, and the groups are batch groups.
    """
    layouts = (spec.layout("lhs"), spec.layout("out"), spec.layout("rhs"))
    rhs = lax.conv_general_dilated(
        lhs.astype(out.dtype),
        out,
        spec.rhs_dilation,
        _wgrad_padding(spec),
        spec.lhs_dilation,
        spec.window_strides,
        lax.ConvDimensionNumbers(*((b, a, *spatial) for a, b, *spatial in layouts)),
        batch_group_count=spec.feature_group_count,
        precision=spec.precision,
        preferred_element_type=spec.out_dtype,
    )
    return rhs.astype(spec.dtype)


def _dgrad_padding(spec: ConvSpec) -> list[tuple[int, int]]:
    """As far as the kernel reaches over each edge: one result for each filled input position."""
    before = [k - 1 - low for k, (low, _) in zip(spec.extent("rhs"), spec.padding, strict=True)]
    sizes = zip(spec.extent("lhs"), spec.extent("rhs"), spec.extent("out"), before, strict=True)
    return [(low, lhs + rhs - 1 - out - low) for lhs, rhs, out, low in sizes]


def _wgrad_padding(spec: ConvSpec) -> list[tuple[int, int]]:
    """The forward padding before, and after it what makes one result for each filled tap."""
    sizes = zip(
        spec.extent("lhs"), spec.extent("rhs"), spec.extent("out"), spec.padding, strict=True
    )
    return [(low, rhs + out - 1 - lhs - low) for lhs, rhs, out, (low, _) in sizes]
