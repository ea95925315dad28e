"""`grouped_conv_mixed`: groups of uneven size, with kernels of different sizes, as one operation.

Tan and Le, "MixConv: Mixed Depthwise Convolutional Kernels", 2019.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from grouped_conv_jax import arguments
from grouped_conv_jax.algorithms import check_name
from grouped_conv_jax.conv import grouped_conv
from grouped_conv_jax.forward import forward
from grouped_conv_jax.padding import PaddingLike


def grouped_conv_mixed(
    lhs: ArrayLike,
    rhs: Sequence[ArrayLike],
    window_strides: Sequence[int],
    padding: PaddingLike,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | Sequence[Sequence[int]] | None = None,
    dimension_numbers: lax.ConvDimensionNumbers | Sequence[str] | None = None,
    group_sizes: Sequence[int] | None = None,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    r"""Convolves each part of the features with a kernel of its own, of any size.

    Part i of the features of `lhs` is convolved with `rhs[i]`, in as many groups as the kernel's
    depth divides the part into, and the results are joined in their order:

    .. math:: out = concat_i \; conv(lhs_i, rhs_i), \quad G_i = group\_sizes_i / depth_i

    So kernels of depth 1 make it a depthwise convolution with kernels of mixed sizes (MixConv), and
    kernels as deep as their part make it a convolution in groups of uneven sizes. Neighbours that
    can be one grouped convolution are.

    Args:
      lhs: the input, rank n + 2: batch N, features, and n >= 0 spatial dimensions.
      rhs: the kernels, one for each part, each of rank n + 2 and of the dtype of `lhs`: the outputs
        of the part, its inputs per group, and n spatial dimensions.
      window_strides: n integers, at least 1.
      padding: as in `grouped_conv`, for each part ("SAME" makes the results equally large); or for
        each part its own n pairs (low, high).
      lhs_dilation: n integers, at least 1: `lhs` is spread out with zeros between (default 1).
      rhs_dilation: n integers, at least 1: the kernels likewise (default 1); or for each part its
        own n integers.
      dimension_numbers: as in `grouped_conv`.
      group_sizes: the number of features of each part; by default all parts have as many.
      precision: as in lax; by default that of `jax.default_matmul_precision`.
      preferred_element_type: dtype of the result and of the accumulation.
      implementation: as in `grouped_conv`.

    Returns:
      The output: N, the outputs of all parts and n spatial dimensions, in the layout of the third
      string.

    Raises:
      ValueError, TypeError: an argument is wrong; the message names it and says what would do.

    Example:
      Eight features with 3 x 3 kernels and four with 5 x 5 kernels.

      >>> import jax.numpy as jnp
      >>> from grouped_conv_jax.mixed import grouped_conv_mixed
      >>> x = jnp.ones((2, 9, 9, 12))
      >>> kernels = [jnp.ones((3, 3, 1, 8)), jnp.ones((5, 5, 1, 4))]
      >>> grouped_conv_mixed(x, kernels, (1, 1), "SAME", group_sizes=(8, 4),
      ...                    dimension_numbers=("NHWC", "HWIO", "NHWC")).shape
      (2, 9, 9, 12)

    References:
      Tan and Le, "MixConv: Mixed Depthwise Convolutional Kernels", 2019.
    """
    check_name(implementation)
    like = arguments.array_type("lhs", lhs)
    kernels = _kernel_types(rhs, like)
    numbers = arguments.layout(like.shape, kernels[0].shape, dimension_numbers)
    features = numbers.lhs_spec[1]
    parts = [
        _part(i, numbers, *settings)
        for i, settings in enumerate(
            zip(
                kernels,
                _part_sizes(group_sizes, len(kernels), like.shape[features]),
                _for_each_part("padding", padding, len(kernels), _is_pairs),
                _for_each_part("rhs_dilation", rhs_dilation, len(kernels), _is_sequence),
                strict=True,
            )
        )
    ]
    shared = {
        "window_strides": window_strides,
        "lhs_dilation": lhs_dilation,
        "dimension_numbers": numbers,
        "precision": precision,
        "preferred_element_type": preferred_element_type,
    }
    runs = _runs(parts, numbers)
    _check_sizes([_out_sizes(like, run, numbers, shared) for run in runs], padding)
    results, first = [], 0
    for run in runs:
        x = lax.slice_in_dim(jnp.asarray(lhs), first, first + run.size, axis=features)
        w = jnp.concatenate([jnp.asarray(rhs[i]) for i in run.parts], numbers.rhs_spec[0])
        results.append(grouped_conv(x, w, **run.arguments, **shared, implementation=implementation))
        first += run.size
    return jnp.concatenate(results, numbers.out_spec[1])


@dataclasses.dataclass(frozen=True)
class _Part:
    """Features that are convolved as one: of one of the kernels, or of several that are alike."""

    parts: tuple[int, ...]
    kernel: Any
    size: int
    groups: int
    padding: Any
    rhs_dilation: Any

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "padding": self.padding,
            "rhs_dilation": self.rhs_dilation,
            "feature_group_count": self.groups,
        }

    def is_like(self, other: "_Part", outputs: int) -> bool:
        """Whether both can be groups of one convolution: but for the number of their groups, which
        the dimension `outputs` of a kernel has, they are the same.
        """
        shapes = [list(part.kernel.shape) for part in (self, other)]
        for part, shape in zip((self, other), shapes, strict=True):
            shape[outputs] //= part.groups
        return (
            shapes[0] == shapes[1]
            and self.padding == other.padding
            and self.rhs_dilation == other.rhs_dilation
        )

    def joined(self, other: "_Part", outputs: int) -> "_Part":
        shape = list(self.kernel.shape)
        shape[outputs] += other.kernel.shape[outputs]
        return dataclasses.replace(
            self,
            parts=self.parts + other.parts,
            kernel=jax.typeof(jax.ShapeDtypeStruct(shape, self.kernel.dtype)),
            size=self.size + other.size,
            groups=self.groups + other.groups,
        )


def _kernel_types(rhs: Any, lhs: Any) -> list[Any]:
    if not isinstance(rhs, list | tuple):
        raise TypeError(
            f"rhs must be a list or tuple of kernels, one for each part, got {type(rhs).__name__}"
        )
    if not rhs:
        raise ValueError("rhs must have at least one kernel, got none")
    kernels = [arguments.array_type(f"rhs[{i}]", kernel) for i, kernel in enumerate(rhs)]
    for i, kernel in enumerate(kernels):
        arguments.check_same_dtype(**{"lhs": lhs, f"rhs[{i}]": kernel})
        if kernel.ndim != lhs.ndim:
            raise ValueError(
                f"rhs[{i}] must have as many dimensions as lhs ({lhs.ndim}), got shape "
                f"{tuple(kernel.shape)}"
            )
    return kernels


def _part_sizes(group_sizes: Any, parts: int, features: int) -> list[int]:
    """How many features each part has."""
    if group_sizes is None:
        if features % parts:
            raise ValueError(
                f"the {parts} kernels of rhs do not divide the features of lhs ({features}) "
                "evenly; give group_sizes"
            )
        group_sizes = [features // parts] * parts
    if not isinstance(group_sizes, Iterable) or isinstance(group_sizes, str):
        raise TypeError(f"group_sizes must be a sequence of integers, got {group_sizes!r}")
    sizes = [arguments.group_count("group_sizes", size) for size in group_sizes]
    if len(sizes) != parts:
        raise ValueError(
            f"group_sizes must have one size for each of the {parts} kernels of rhs, got "
            f"{len(sizes)}: {tuple(sizes)}"
        )
    if sum(sizes) != features:
        raise ValueError(
            f"group_sizes must add up to the features of lhs ({features}), got {tuple(sizes)}, "
            f"which are {sum(sizes)}"
        )
    return sizes


def _part(
    index: int,
    numbers: lax.ConvDimensionNumbers,
    kernel: Any,
    size: int,
    padding: Any,
    rhs_dilation: Any,
) -> _Part:
    outputs, depth = (kernel.shape[d] for d in numbers.rhs_spec[:2])
    if depth == 0 or size % depth:
        raise ValueError(
            f"rhs[{index}] takes {depth} input features per group, which do not divide its part "
            f"of the features of lhs (group_sizes[{index}]={size})"
        )
    groups = size // depth
    if outputs % groups:
        raise ValueError(
            f"rhs[{index}] has {outputs} output features, which its {groups} groups (of {depth} "
            f"of the group_sizes[{index}]={size} features) do not divide"
        )
    return _Part((index,), kernel, size, groups, padding, rhs_dilation)


def _for_each_part(name: str, value: Any, parts: int, is_for_one: Callable[[Any], bool]) -> list:
    """One value for each part, given once or for each of them."""
    if not _is_sequence(value) or not value or not all(map(is_for_one, value)):
        return [value] * parts
    if len(value) != parts:
        raise ValueError(
            f"{name} must be given once, or for each of the {parts} kernels of rhs; got it for "
            f"{len(value)}: {value}"
        )
    return [tuple(tuple(d) if _is_sequence(d) else d for d in entry) for entry in value]


def _is_sequence(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_pairs(value: Any) -> bool:
    """Whether it is the padding of all spatial dimensions, not that of one: made of pairs itself.

    A mode with its pair, as ("REFLECT", (1, 1)), is that of one.
    """
    return _is_sequence(value) and all(map(_is_sequence, value)) and len(value) > 0


def _runs(parts: Sequence[_Part], numbers: lax.ConvDimensionNumbers) -> list[_Part]:
    """Neighbours that are alike as one."""
    outputs = numbers.rhs_spec[0]
    runs = [parts[0]]
    for part in parts[1:]:
        if runs[-1].is_like(part, outputs):
            runs[-1] = runs[-1].joined(part, outputs)
        else:
            runs.append(part)
    return runs


def _out_sizes(
    lhs: Any, run: _Part, numbers: lax.ConvDimensionNumbers, shared: dict[str, Any]
) -> tuple[int, ...]:
    """The spatial shape of the result."""
    shape = list(lhs.shape)
    shape[numbers.lhs_spec[1]] = run.size
    like = jax.typeof(jax.ShapeDtypeStruct(shape, lhs.dtype))
    return forward(like, run.kernel, **run.arguments, **shared).spec.spatial_shape("out")


def _check_sizes(sizes: Sequence[tuple[int, ...]], padding: Any) -> None:
    if any(size != sizes[0] for size in sizes):
        raise ValueError(
            f"padding={padding!r} gives the parts results of different sizes, "
            f"{', '.join(map(str, sizes))}; 'SAME' gives equal ones, and so may a padding for each "
            "part"
        )
