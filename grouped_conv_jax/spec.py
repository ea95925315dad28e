"""What is static about one convolution: `ConvSpec`, and the shapes, sizes and costs that follow.

The spec describes the *forward* convolution; the two gradient contractions are described by the
same spec (see `contraction`). It is built and validated once, by `operations.arguments` and
`operations.forward`, and trusted after. This module knows nothing of differentiation, devices or
algorithms.

Letters: N batch, G groups, C input features per group, O output features per group, K taps.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from grouped_conv_jax.incidence import Incidence, extent, out_size, shortened

Role = Literal["lhs", "rhs", "out"]
"""The three arguments of the trilinear form: the input, the kernel and the output."""

Factor = Literal["N", "G", "C", "O"]


class MappedAxis(NamedTuple):
    """An axis that `jax.vmap` has put before the others, by its number in `ConvSpec.mapped`."""

    number: int


Part = Factor | int | MappedAxis
"""What devices can share: a factor, a spatial dimension by its number, or a mapped axis."""

Contraction = Literal["fprop", "dgrad", "wgrad"]
"""What is computed from the other two: the output, the input's gradient, the kernel's."""

OPERANDS: dict[Contraction, tuple[Role, Role]] = {
    "fprop": ("lhs", "rhs"),
    "dgrad": ("out", "rhs"),
    "wgrad": ("lhs", "out"),
}
RESULT: dict[Contraction, Role] = {"fprop": "out", "dgrad": "lhs", "wgrad": "rhs"}

_PLACES: dict[tuple[Role, Factor], tuple[int, bool]] = {
    ("lhs", "N"): (0, False),
    ("lhs", "G"): (1, False),
    ("lhs", "C"): (1, True),
    ("rhs", "G"): (0, False),
    ("rhs", "O"): (0, True),
    ("rhs", "C"): (1, False),
    ("out", "N"): (0, False),
    ("out", "G"): (1, False),
    ("out", "O"): (1, True),
}
"""[N, (G C)], [(G O), C] and [N, (G O)]: the place of a letter in the layout of an array, and
whether it is the inner one of two, with the groups outside."""


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """A forward grouped convolution: shapes, dtypes and canonical arguments.

    Attributes are those of `jax.lax.conv_general_dilated` in canonical form: tuples of integers,
    padding as pairs, `dimension_numbers` as a `ConvDimensionNumbers` of tuples.

    `dtype` is that of the two operands that were given, `wide_dtype` that of what was computed from
    them (`preferred_element_type`; sums are made in it), and `wide` which array that was: the
    output, or the input or the kernel where a gradient is what was asked for.

    `mapped` are the axes over which `jax.vmap` has mapped the convolution, the outermost first:
    each with its size, and the factor that it multiplies. The arrays that have the factor have the
    axis, before the dimensions of `lhs_shape`, `rhs_shape` and `out_shape`.
    """

    lhs_shape: tuple[int, ...]
    rhs_shape: tuple[int, ...]
    dtype: np.dtype
    wide_dtype: np.dtype
    window_strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    dimension_numbers: lax.ConvDimensionNumbers
    feature_group_count: int
    precision: Any
    wide: Role = "out"
    mapped: tuple[tuple[Factor, int], ...] = ()

    # Where things are.

    def layout(self, role: Role) -> tuple[int, ...]:
        """Positions of the dimensions of one array: (batch or outputs, features, *spatial)."""
        before = len(self.mapped_axes(role))
        return tuple(before + d for d in self._own_layout(role))

    def _own_layout(self, role: Role) -> Sequence[int]:
        lhs, rhs, out = self.dimension_numbers
        return {"lhs": lhs, "rhs": rhs, "out": out}[role]

    def mapped_axes(self, role: Role) -> list[int]:
        """Which of the mapped axes an array has, in the order of its first dimensions."""
        return [i for i, (factor, _) in enumerate(self.mapped) if (role, factor) in _PLACES]

    def group_dimension(self, role: Role) -> int:
        """The dimension whose outer factor is the group: (G C), (G O) and (G O)."""
        return self.layout(role)[0 if role == "rhs" else 1]

    def spatial_dimensions(self, role: Role) -> tuple[int, ...]:
        return self.layout(role)[2:]

    def dimension(self, role: Role, part: Part) -> int | None:
        """Where a part lives in an array: None if nowhere. The taps of the kernel are no part of a
        spatial dimension.
        """
        if isinstance(part, MappedAxis):
            axes = self.mapped_axes(role)
            return axes.index(part.number) if part.number in axes else None
        if isinstance(part, int):
            return None if role == "rhs" else self.spatial_dimensions(role)[part]
        return self.place(role, part)[0] if (role, part) in _PLACES else None

    # How large they are.

    @functools.cached_property
    def out_shape(self) -> tuple[int, ...]:
        batch = self.lhs_shape[self._own_layout("lhs")[0]]
        features = self.rhs_shape[self._own_layout("rhs")[0]]
        spatial = map(
            out_size, self.extent("lhs"), self.extent("rhs"), self.window_strides, self.padding
        )
        shape: list[Any] = [None] * len(self.lhs_shape)
        for d, size in zip(self._own_layout("out"), (batch, features, *spatial), strict=True):
            shape[d] = size
        return tuple(shape)

    def shape(self, role: Role) -> tuple[int, ...]:
        """Of an array, mapped axes and all."""
        own: tuple[int, ...] = getattr(self, f"{role}_shape")
        return (*(self.mapped[i][1] for i in self.mapped_axes(role)), *own)

    def role_dtype(self, role: Role) -> np.dtype:
        return self.wide_dtype if role == self.wide else self.dtype

    def operand_dtype(self, contraction: Contraction) -> np.dtype:
        """What both operands are converted to, without a loss."""
        return self.wide_dtype if self.wide in OPERANDS[contraction] else self.dtype

    def spatial_shape(self, role: Role) -> tuple[int, ...]:
        shape = self.shape(role)
        return tuple(shape[d] for d in self.spatial_dimensions(role))

    @property
    def has_dot_algorithm(self) -> bool:
        """Whether `precision` is an algorithm for matrix products, which lax takes for convolutions
        as well, and XLA does not heed there.
        """
        given = self.precision if isinstance(self.precision, tuple) else (self.precision,)
        algorithms = (lax.DotAlgorithm, lax.DotAlgorithmPreset)
        names = lax.DotAlgorithmPreset.__members__.keys() - {"DEFAULT"}
        return any(isinstance(p, algorithms) or (isinstance(p, str) and p in names) for p in given)

    @property
    def accumulator(self) -> np.dtype:
        """The dtype of sums: `wide_dtype`, or 32 bits for narrower floats."""
        dtype = np.dtype(self.wide_dtype)
        narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
        return np.dtype(np.float32) if narrow else dtype

    def extent(self, role: Role) -> tuple[int, ...]:
        """Spatial sizes with the gaps filled: those of the dilations, for `out` of the strides."""
        step = {"lhs": self.lhs_dilation, "rhs": self.rhs_dilation, "out": self.window_strides}
        sizes = self.spatial_shape(role)
        return tuple(map(extent, sizes, step[role]))

    @property
    def dgrad_padding(self) -> list[tuple[int, int]]:
        """Of the output, where it is convolved with the kernel turned round: as far as the kernel
        reaches over each edge; one result for each filled position of the input.
        """
        before = [k - 1 - low for k, (low, _) in zip(self.extent("rhs"), self.padding, strict=True)]
        sizes = (self.extent(role) for role in ("lhs", "rhs", "out"))
        return [
            (low, lhs + rhs - 1 - out - low)
            for lhs, rhs, out, low in zip(*sizes, before, strict=True)
        ]

    @property
    def wgrad_padding(self) -> list[tuple[int, int]]:
        """Of the input, where the output is its kernel: the forward padding before, and after it
        what makes one result for each filled tap.
        """
        sizes = (self.extent(role) for role in ("lhs", "rhs", "out"))
        return [
            (low, rhs + out - 1 - lhs - low)
            for lhs, rhs, out, (low, _) in zip(*sizes, self.padding, strict=True)
        ]

    @property
    def group_width(self) -> tuple[int, int]:
        """C and O: the inputs and the outputs of a group."""
        outputs, inputs = (self.rhs_shape[d] for d in self._own_layout("rhs")[:2])
        return inputs, outputs // self.feature_group_count

    @property
    def is_symbolic(self) -> bool:
        """Whether a size is not known yet, as `jax.export` allows."""
        sizes = (*self.shape("lhs"), *self.shape("rhs"), *self.shape("out"))
        return not all(isinstance(n, int) for n in sizes)

    @property
    def is_empty(self) -> bool:
        """Whether an array has no elements, so that there is nothing to compute."""
        return any(0 in self.shape(role) for role in ("lhs", "rhs", "out"))

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of any of the three contractions, padding counted as if it were data."""
        inputs_per_group = self.rhs_shape[self._own_layout("rhs")[1]]
        taps = math.prod(self.spatial_shape("rhs"))
        times = math.prod(size for _, size in self.mapped)
        return times * math.prod(self.out_shape) * taps * inputs_per_group

    # One layout for all, as algorithms like it.

    def to_channels_last(self, role: Role, x: jax.Array) -> jax.Array:
        """An array with its features last: (batch, *spatial, features), the kernel as (*spatial,
        inputs, outputs).
        """
        return jnp.transpose(x, self._channels_last(role))

    def from_channels_last(self, role: Role, x: jax.Array) -> jax.Array:
        """Undoes `to_channels_last`."""
        order = self._channels_last(role)
        return jnp.transpose(x, sorted(range(len(order)), key=order.__getitem__))

    def _channels_last(self, role: Role) -> tuple[int, ...]:
        first, features, *spatial = self.layout(role)
        return (*spatial, features, first) if role == "rhs" else (first, *spatial, features)

    # The mapped axes.

    def mapped_over(self, factor: Factor, size: int) -> "ConvSpec":
        """The spec of as many of these convolutions, along a new first axis."""
        return dataclasses.replace(self, mapped=((factor, size), *self.mapped))

    def merged(self) -> "ConvSpec":
        """The spec of the one convolution that all the mapped ones are together."""
        spec = dataclasses.replace(self, mapped=())
        for factor, size in reversed(self.mapped):
            spec = spec.folded(factor, size)
        return spec

    def merge(self, role: Role, x: jax.Array) -> jax.Array:
        """An array with its mapped axes as `merged` has it."""
        if not self.mapped:
            return x
        (factor, _), *others = self.mapped
        inner = dataclasses.replace(self, mapped=tuple(others))
        if (role, factor) not in _PLACES:
            return inner.merge(role, x)
        x = jax.vmap(functools.partial(inner.merge, role))(x)
        return inner.merged().fold(role, factor, x, 0)

    def split(self, role: Role, x: jax.Array) -> jax.Array:
        """Undoes `merge`."""
        if not self.mapped:
            return x
        (factor, size), *others = self.mapped
        inner = dataclasses.replace(self, mapped=tuple(others))
        if (role, factor) not in _PLACES:
            return inner.split(role, x)
        merged = inner.merged()
        x = jnp.moveaxis(merged.unfold(role, factor, x, size), merged.place(role, factor)[0], 0)
        return jax.vmap(functools.partial(inner.split, role))(x)

    # Folding one more axis into a convolution without mapped ones: for those, and for an explicit
    # group axis.

    def place(self, role: Role, factor: Factor) -> tuple[int, int]:
        """Where a factor lives: (dimension, how many blocks of that dimension are outside it)."""
        index, within_groups = _PLACES[role, factor]
        return self.layout(role)[index], self.feature_group_count if within_groups else 1

    def folded(self, factor: Factor, size: int) -> "ConvSpec":
        """The spec of the convolution in which `factor` has become `size` times as large."""

        def grow(role: Role, shape: tuple[int, ...]) -> tuple[int, ...]:
            if (role, factor) not in _PLACES:
                return shape
            dimension, _ = self.place(role, factor)
            return (*shape[:dimension], shape[dimension] * size, *shape[dimension + 1 :])

        return dataclasses.replace(
            self,
            lhs_shape=grow("lhs", self.lhs_shape),
            rhs_shape=grow("rhs", self.rhs_shape),
            feature_group_count=self.feature_group_count * (size if factor == "G" else 1),
        )

    def fold(self, role: Role, factor: Factor, x: jax.Array, axis: int) -> jax.Array:
        """Merges the extra `axis` of `x` into `factor`, as the outer part of it."""
        dimension, outer = self.place(role, factor)
        at = dimension + (axis <= dimension)
        split = (*x.shape[:at], outer, x.shape[at] // outer, *x.shape[at + 1 :])
        x = jnp.moveaxis(x.reshape(split), axis + (axis > at), dimension + 1)
        merged = (*x.shape[:dimension], math.prod(x.shape[dimension : dimension + 3]))
        return x.reshape(*merged, *x.shape[dimension + 3 :])

    def unfold(self, role: Role, factor: Factor, x: jax.Array, size: int) -> jax.Array:
        """Undoes `fold`: takes the axis out again, to stand before the factor's dimension."""
        dimension, outer = self.place(role, factor)
        shape = x.shape
        inner = shape[dimension] // (outer * size)
        x = x.reshape(*shape[:dimension], outer, size, inner, *shape[dimension + 1 :])
        x = jnp.moveaxis(x, dimension + 1, dimension)
        return x.reshape(*shape[:dimension], size, outer * inner, *shape[dimension + 1 :])

    def shortened(self) -> "ConvSpec":
        """The spec with the smallest steps and padding that mean the same (see `incidence`)."""
        if self.is_symbolic:
            return self
        lines = [
            shortened(Incidence(*line))
            for line in zip(
                self.spatial_shape("out"),
                self.spatial_shape("rhs"),
                self.spatial_shape("lhs"),
                self.window_strides,
                self.rhs_dilation,
                self.lhs_dilation,
                (low for low, _ in self.padding),
                strict=True,
            )
        ]
        return dataclasses.replace(
            self,
            window_strides=tuple(line.stride for line in lines),
            rhs_dilation=tuple(line.rhs_dilation for line in lines),
            lhs_dilation=tuple(line.lhs_dilation for line in lines),
            padding=tuple((line.low, line.high) for line in lines),
        )

    def one_group(self) -> "ConvSpec":
        """The dense convolution that each group is."""

        def shrink(role: Role) -> tuple[int, ...]:
            shape, dimension = self.shape(role), self.group_dimension(role)
            size = shape[dimension] // self.feature_group_count
            return (*shape[:dimension], size, *shape[dimension + 1 :])

        return dataclasses.replace(
            self, lhs_shape=shrink("lhs"), rhs_shape=shrink("rhs"), feature_group_count=1
        )
