"""The transposed convolution in groups: the input's gradient of a convolution, read forwards."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from grouped_conv_jax.algorithms import table
from grouped_conv_jax.algorithms.table import Implementation
from grouped_conv_jax.incidence import extent, out_size
from grouped_conv_jax.operations import arguments
from grouped_conv_jax.operations.padding import TRANSPOSED, Geometry, PaddingLike, extension, pads
from grouped_conv_jax.partitioning.explicit_mesh import sharding_of_result, with_auto_axes
from grouped_conv_jax.primitive import contract
from grouped_conv_jax.spec import ConvSpec

LAYOUTS = {
    2: ("NC", "IO", "NC"),
    3: ("NHC", "HIO", "NHC"),
    4: ("NHWC", "HWIO", "NHWC"),
    5: ("NHWDC", "HWDIO", "NHWDC"),
}
"""Those of lax, by the rank of the arrays, where there are no dimension_numbers."""


@arguments.keeps_64_bits
def grouped_conv_transpose(
    lhs: ArrayLike,
    rhs: ArrayLike,
    strides: Sequence[int],
    padding: PaddingLike,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvDimensionNumbers | Sequence[str] | None = None,
    feature_group_count: int = 1,
    transpose_kernel: bool = False,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    output_padding: Sequence[int] | None = None,
    out_sharding: NamedSharding | PartitionSpec | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    r"""Transposed convolution (fractionally strided) in groups, in place of `lax.conv_transpose`.

    With the input spread out by the strides, zeros between and around,

    .. math::
        out[n, p, g, o] = \sum_{k, c} spread[n, p + k \cdot dilation, g, c] \; rhs[k, c, g, o]

    Arguments mean what they mean in `jax.lax.conv_transpose` (pairs of padding as without its
    `use_consistent_padding`, which is not here). Computed as the input's
    gradient of a convolution, so as fast and with the same partition over devices.

    Args:
      lhs: the input, rank n + 2: batch N, features G * C, and n >= 0 spatial dimensions.
      rhs: the kernel, rank n + 2 and of the dtype of `lhs`: outputs G * O, inputs per group C, and
        n spatial dimensions. With `transpose_kernel` it is that of the convolution from G * O to
        G * C features: outputs G * C, inputs per group O; under "OIHW" that is a weight of
        PyTorch's or ONNX's, (G * C, O, kh, kw).
      strides: n integers, at least 1: how far apart the input is spread.
      padding: "SAME", "VALID", "CAUSAL", "CIRCULAR", "REFLECT", "REPLICATE", or for each spatial
        dimension one of them, a pair (low, high), or a mode with its pair. Pairs count positions
        beyond the ends of the spread input. "SAME" makes the result strides times the size, as do
        "CAUSAL", where nothing depends on what comes later, and the modes, in which the input is
        continued beyond its ends. A convolution's own padding (low, high), as PyTorch has it,
        is ((k - 1) * dilation - low, (k - 1) * dilation - high) here.
      rhs_dilation: n integers, at least 1 (default 1): the kernel is spread out.
      dimension_numbers: as in `grouped_conv`, of this operation's arrays; by default channels last,
        ("NHWC", "HWIO", "NHWC") for n = 2.
      feature_group_count: G. Divides the features of `lhs` and of the result.
      transpose_kernel: the kernel is that of the convolution that this one transposes: turned
        round, with inputs and outputs exchanged.
      precision: as in lax; by default that of `jax.default_matmul_precision`.
      preferred_element_type: dtype of the result and of the accumulation.
      output_padding: n integers, at least 0 (default 0): positions more at the end. Several sizes
        give the same size under a convolution with strides; this says which one is meant.
      out_sharding: the sharding of the result where mesh axes are Explicit.
      implementation: as in `grouped_conv`.

    Returns:
      The output: N, G * O and n spatial dimensions, in the layout of the third string. A spatial
      size S becomes (S - 1) * stride + low + high - (k - 1) * dilation + output_padding + 1.

    Raises:
      ValueError, TypeError: an argument is wrong; the message names it and says what would do.
      NotImplementedError: when compiled, if the `implementation` asked for does not compute this.

    Example:
      Twice the size, in two groups.

      >>> import jax.numpy as jnp
      >>> from grouped_conv_jax import grouped_conv_transpose
      >>> x, w = jnp.ones((8, 16, 16, 4)), jnp.ones((3, 3, 2, 6))
      >>> grouped_conv_transpose(x, w, (2, 2), "SAME", feature_group_count=2).shape
      (8, 32, 32, 6)

    References:
      Zeiler, Krishnan, Taylor and Fergus, "Deconvolutional Networks", 2010; Dumoulin and Visin, "A
      guide to convolution arithmetic for deep learning", 2016.
    """
    asked = table.parsed(implementation)
    transpose_kernel = arguments.flag("transpose_kernel", transpose_kernel)
    groups = arguments.group_count("feature_group_count", feature_group_count)
    lhs_type, rhs_type = arguments.array_type("lhs", lhs), arguments.array_type("rhs", rhs)
    arguments.check_same_dtype(lhs=lhs_type, rhs=rhs_type)
    if dimension_numbers is None and lhs_type.ndim == rhs_type.ndim:
        dimension_numbers = _default_layout(lhs_type.ndim)
    numbers = arguments.layout(lhs_type.shape, rhs_type.shape, dimension_numbers)
    rank = lhs_type.ndim - 2
    strides = arguments.integers("strides", strides, rank)
    rhs_dilation = arguments.integers("rhs_dilation", rhs_dilation, rank, default=1)
    more = arguments.integers("output_padding", output_padding, rank, default=0, least=0)
    if transpose_kernel:
        _check_transposed_groups(lhs_type.shape, rhs_type.shape, numbers, groups)
    else:
        arguments.check_groups(lhs_type.shape, rhs_type.shape, numbers, groups)
    turned = _turned_shape(rhs_type.shape, numbers.rhs_spec, groups)

    sizes = [lhs_type.shape[d] for d in numbers.lhs_spec[2:]]
    windows = arguments.windows(rhs_type.shape, numbers, rhs_dilation)
    found = pads(padding, list(map(Geometry, sizes, windows, strides)), TRANSPOSED)
    found = [p._replace(high=p.high + n) for p, n in zip(found, more, strict=True)]
    extended, pairs = extension(found, sizes, strides, numbers.lhs_spec[2:])
    lhs_shape = extended.shape(lhs_type.shape)
    precision = arguments.precision(precision)
    outputs = turned if transpose_kernel else rhs_type.shape
    shape: list[Any] = [None] * (2 + rank)
    shape[numbers.out_spec[0]] = lhs_shape[numbers.lhs_spec[0]]
    shape[numbers.out_spec[1]] = outputs[numbers.rhs_spec[0]]
    extents = list(map(extent, (lhs_shape[d] for d in numbers.lhs_spec[2:]), strides))
    arguments.check_crops(pairs, extents)
    for i, d in enumerate(numbers.out_spec[2:]):
        shape[d] = out_size(extents[i], windows[i], 1, pairs[i])
    spec = ConvSpec(
        lhs_shape=tuple(shape),
        rhs_shape=rhs_type.shape if transpose_kernel else turned,
        dtype=lhs_type.dtype,
        wide_dtype=arguments.result_dtype(lhs_type.dtype, precision, preferred_element_type),
        wide="lhs",
        window_strides=strides,
        padding=_of_the_convolution(pairs, windows, strides, lhs_shape, shape, numbers),
        lhs_dilation=(1,) * rank,
        rhs_dilation=rhs_dilation,
        dimension_numbers=numbers._replace(lhs_spec=numbers.out_spec, out_spec=numbers.lhs_spec),
        feature_group_count=groups,
        precision=precision,
    )
    spec = arguments.checked(spec, "lhs")
    operands = extended(lhs), rhs if transpose_kernel else _turned(rhs, spec)
    types = jax.typeof(operands[0]), jax.typeof(operands[1])
    sharding = sharding_of_result("dgrad", spec, *types, out_sharding, {"out": "lhs"})
    return contract(
        *operands,
        contraction="dgrad",
        spec=spec,
        implementation=asked,
        out_sharding=sharding,
    )


def _default_layout(ndim: int) -> tuple[str, str, str]:
    if ndim not in LAYOUTS:
        raise ValueError(
            f"dimension_numbers must be given for arrays of {ndim} dimensions; there are defaults "
            f"for {', '.join(map(str, LAYOUTS))}"
        )
    return LAYOUTS[ndim]


def _check_transposed_groups(lhs_shape: Any, rhs_shape: Any, numbers: Any, groups: int) -> None:
    inputs, outputs = lhs_shape[numbers.lhs_spec[1]], rhs_shape[numbers.rhs_spec[0]]
    arguments.check_divides("feature_group_count", groups, "the features of lhs", inputs)
    if inputs != outputs:
        raise ValueError(
            f"rhs has {outputs} output features, but lhs has {inputs} features: with "
            "transpose_kernel=True the outputs of the kernel are the inputs of this operation"
        )
    arguments.check_taps(rhs_shape, numbers)


def _of_the_convolution(
    pairs: Sequence[tuple[int, int]],
    windows: Sequence[int],
    strides: Sequence[int],
    lhs_shape: Sequence[Any],
    result_shape: Sequence[Any],
    numbers: lax.ConvDimensionNumbers,
) -> tuple[tuple[int, int], ...]:
    """The padding of the convolution that this one transposes."""
    padding = []
    for i, ((low, high), window, stride) in enumerate(zip(pairs, windows, strides, strict=True)):
        before, after = window - 1 - low, window - 1 - high
        size = lhs_shape[numbers.lhs_spec[2 + i]]
        if isinstance(size, int):
            # The same, but for arrays without elements.
            reach = (size - 1) * stride + window
            after = reach - result_shape[numbers.out_spec[2 + i]] - before
        padding.append((before, after))
    return tuple(padding)


def _turned_shape(shape: Sequence[Any], layout: Sequence[int], groups: int) -> tuple[Any, ...]:
    """[(G O), C] as [(G C), O], and the reverse."""
    outputs, inputs = layout[:2]
    turned = list(shape)
    turned[outputs], turned[inputs] = groups * shape[inputs], shape[outputs] // groups
    return tuple(turned)


def _turned(rhs: Any, spec: ConvSpec) -> jax.Array:
    """The kernel [(G O), C] as that of the convolution, [(G C), O] and turned round in space."""
    layout, groups = spec.layout("rhs"), spec.feature_group_count
    order = sorted(range(len(layout)), key=layout.__getitem__)

    def turn(rhs: jax.Array) -> jax.Array:
        w = lax.rev(jnp.transpose(rhs, layout), range(2, len(layout)))
        outputs, inputs, *taps = w.shape
        w = jnp.swapaxes(w.reshape(groups, outputs // groups, inputs, *taps), 1, 2)
        return jnp.transpose(w.reshape(groups * inputs, outputs // groups, *taps), order)

    return with_auto_axes(turn, _turned_sharding(rhs, spec))(rhs)


def _turned_sharding(rhs: Any, spec: ConvSpec) -> NamedSharding:
    """Sharded groups stay so; what is sharded within them does if there is one only."""
    sharding, groups = jax.typeof(rhs).sharding, spec.feature_group_count
    axes = [*sharding.spec, *[None] * (jnp.ndim(rhs) - len(sharding.spec))]
    outputs, inputs = spec.layout("rhs")[:2]
    if groups == 1:
        axes[outputs], axes[inputs] = axes[inputs], axes[outputs]
    else:
        axes[inputs] = None
        names = axes[outputs] if isinstance(axes[outputs], tuple) else (axes[outputs],)
        parts = math.prod(sharding.mesh.shape[name] for name in names if name is not None)
        if groups % parts:
            axes[outputs] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))
