"""`grouped_conv_mixed`: groups of uneven size, with kernels of different sizes, as one operation.

Tan and Le, "MixConv: Mixed Depthwise Convolutional Kernels", 2019.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from grouped_conv_jax.algorithms import table
from grouped_conv_jax.algorithms.table import Implementation
from grouped_conv_jax.operations import arguments
from grouped_conv_jax.operations.conv import grouped_conv
from grouped_conv_jax.operations.forward import Settings, forward
from grouped_conv_jax.operations.padding import Geometry, Pad, PaddingLike, pads
from grouped_conv_jax.operations.per_part import dilations, listed, paddings
from grouped_conv_jax.partitioning.explicit_mesh import sharding_of_result, with_auto_axes
from grouped_conv_jax.spec import ConvSpec
from grouped_conv_jax.text import shown


@arguments.keeps_64_bits
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
    out_sharding: NamedSharding | PartitionSpec | None = None,
    implementation: Implementation = None,
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
      padding: as in `grouped_conv`, for each part ("SAME" makes the results equally large). A list
        is by dimension, unless each of its entries is a list of n entries itself: then it is by
        part, as [[(1, 1), (1, 1)], ["SAME", ("REFLECT", (2, 2))]].
      lhs_dilation: n integers, at least 1: `lhs` is spread out with zeros between (default 1).
      rhs_dilation: n integers, at least 1: the kernels likewise (default 1); or for each part its
        own n integers.
      dimension_numbers: as in `grouped_conv`.
      group_sizes: the number of features of each part; by default all parts have as many.
      precision: as in lax; by default that of `jax.default_matmul_precision`.
      preferred_element_type: dtype of the result and of the accumulation.
      out_sharding: the sharding of the result where mesh axes are Explicit.
      implementation: as in `grouped_conv`.

    Returns:
      The output: N, the outputs of all parts and n spatial dimensions, in the layout of the third
      string.

    Raises:
      ValueError, TypeError: an argument is wrong; the message names it and says what would do.

    Example:
      Eight features with 3 x 3 kernels and four with 5 x 5 kernels.

      >>> import jax.numpy as jnp
      >>> from grouped_conv_jax import grouped_conv_mixed
      >>> x = jnp.ones((2, 9, 9, 12))
      >>> kernels = [jnp.ones((3, 3, 1, 8)), jnp.ones((5, 5, 1, 4))]
      >>> grouped_conv_mixed(x, kernels, (1, 1), "SAME", group_sizes=(8, 4),
      ...                    dimension_numbers=("NHWC", "HWIO", "NHWC")).shape
      (2, 9, 9, 12)

    References:
      Tan and Le, "MixConv: Mixed Depthwise Convolutional Kernels", 2019.
    """
    table.parsed(implementation)
    like = arguments.array_type("lhs", lhs)
    kernels = _kernel_types(rhs, like)
    numbers = arguments.layout(like.shape, kernels[0].shape, dimension_numbers)
    rank, features = like.ndim - 2, numbers.lhs_spec[1]
    shared = {
        "window_strides": arguments.integers("window_strides", window_strides, rank),
        "lhs_dilation": arguments.integers("lhs_dilation", lhs_dilation, rank, default=1),
        "dimension_numbers": numbers,
        "precision": precision,
        "preferred_element_type": preferred_element_type,
    }
    padding = listed(padding)
    settings = zip(
        kernels,
        _part_sizes(group_sizes, len(kernels), like.shape[features]),
        paddings(padding, len(kernels), rank),
        dilations(listed(rhs_dilation), len(kernels), rank),
        strict=True,
    )
    runs = _runs([_part(i, like, shared, *own) for i, own in enumerate(settings)], numbers)
    specs = [_spec(like, run, shared) for run in runs]
    _check_sizes([spec.spatial_shape("out") for spec in specs], padding)

    def compute(lhs: jax.Array, *rhs: jax.Array) -> jax.Array:
        results, first = [], 0
        for run in runs:
            x = lax.slice_in_dim(lhs, first, first + run.size, axis=features)
            w = jnp.concatenate([rhs[i] for i in run.parts], numbers.rhs_spec[0])
            settings = {**run.arguments, **shared, "implementation": implementation}
            results.append(grouped_conv(x, w, **settings))
            first += run.size
        return jnp.concatenate(results, numbers.out_spec[1])

    sharding = _sharding(like, kernels, runs, specs, out_sharding)
    return with_auto_axes(compute, sharding)(jnp.asarray(lhs), *map(jnp.asarray, rhs))


@dataclasses.dataclass(frozen=True)
class _Part:
    """Features that are convolved as one: of one of the kernels, or of several that are alike."""

    parts: tuple[int, ...]
    kernel: Any
    size: int
    groups: int
    padding: Any
    rhs_dilation: tuple[int, ...]
    pads: tuple[Pad, ...]

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
            and self.pads == other.pads
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
        if features == 0:
            raise ValueError(
                f"lhs must have features for each of the {parts} kernels of rhs, got none"
            )
        if features % parts:
            raise ValueError(
                f"the {parts} kernels of rhs do not divide the features of lhs ({features}) "
                "evenly; give group_sizes"
            )
        group_sizes = [features // parts] * parts
    if not isinstance(group_sizes, Iterable) or isinstance(group_sizes, str):
        raise TypeError(f"group_sizes must be a sequence of integers, got {shown(group_sizes)}")
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
    lhs: Any,
    shared: dict[str, Any],
    kernel: Any,
    size: int,
    padding: Any,
    rhs_dilation: tuple[int, ...],
) -> _Part:
    numbers = shared["dimension_numbers"]
    outputs, depth = (kernel.shape[d] for d in numbers.rhs_spec[:2])
    if depth == 0 or size % depth:
        raise ValueError(
            f"rhs[{index}] takes {depth} input features per group, which do not divide its part "
            f"of the features of lhs ({size}); group_sizes says how many each part has"
        )
    groups = size // depth
    if outputs % groups:
        raise ValueError(
            f"rhs[{index}] has {outputs} output features, which its {groups} groups (of {depth} "
            f"of the {size} features of its part) do not divide"
        )
    arguments.check_taps(kernel.shape, numbers)
    sizes = (lhs.shape[d] for d in numbers.lhs_spec[2:])
    windows = arguments.windows(kernel.shape, numbers, rhs_dilation)
    steps = (shared["window_strides"], shared["lhs_dilation"])
    found = pads(padding, list(map(Geometry, sizes, windows, *steps)))
    return _Part((index,), kernel, size, groups, padding, rhs_dilation, found)


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


def _spec(lhs: Any, run: _Part, shared: dict[str, Any]) -> ConvSpec:
    shape = list(lhs.shape)
    shape[shared["dimension_numbers"].lhs_spec[1]] = run.size
    like = jax.typeof(jax.ShapeDtypeStruct(shape, lhs.dtype))
    return forward(like, run.kernel, Settings(**run.arguments, **shared)).spec


def _check_sizes(sizes: Sequence[tuple[int, ...]], padding: Any) -> None:
    if any(size != sizes[0] for size in sizes):
        raise ValueError(
            f"padding={padding!r} gives the parts results of different sizes, "
            f"{', '.join(map(str, sizes))}; 'SAME' gives equal ones, and so may a padding for each "
            "part"
        )


def _sharding(
    lhs: Any, kernels: Sequence[Any], runs: Sequence[_Part], specs: Sequence[ConvSpec], asked: Any
) -> NamedSharding | None:
    """That which was asked for, or which follows alike for all parts."""
    if asked is not None:
        shape, outputs = list(specs[0].rhs_shape), specs[0].dimension_numbers.rhs_spec[0]
        shape[outputs] = sum(kernel.shape[outputs] for kernel in kernels)
        whole = dataclasses.replace(specs[0], rhs_shape=tuple(shape))
        return sharding_of_result("fprop", whole, lhs, kernels[0], asked)
    found = [
        sharding_of_result("fprop", spec, lhs, kernels[i], None, {"rhs": f"rhs[{i}]"})
        for run, spec in zip(runs, specs, strict=True)
        for i in run.parts
    ]
    for i, sharding in enumerate(found):
        if sharding != found[0]:
            raise ValueError(
                f"the results of rhs[0] and rhs[{i}] would be sharded differently: {found[0]}, "
                f"{sharding}; reshard the kernels with jax.sharding.reshard, or say how the result "
                "is to be sharded with out_sharding=jax.P(...)"
            )
    return found[0]
