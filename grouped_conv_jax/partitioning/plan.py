"""Which part of a contraction each axis of a mesh splits, and what a device then does.

A part is the batch N, the groups G, the outputs O or the inputs C of a group, an axis of
`jax.vmap`, or a spatial dimension. If the result has it, the work is local; if it is summed over,
there is one all-reduce of the result, or a reduce-scatter if that is to be sharded over the same
axis; along a spatial dimension neighbours exchange halos. Sums over devices are made in the dtype
of the result, as XLA's own are: each device rounds its part. This module knows meshes by the names
and sizes of their axes, and nothing of how XLA is told.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from grouped_conv_jax.partitioning.halo import Halo
from grouped_conv_jax.partitioning.resharding import Axes, Dimensions, Step, divides_evenly, steps
from grouped_conv_jax.spec import OPERANDS, RESULT, Contraction, ConvSpec, MappedAxis, Part, Role

MULTIPLY_ADDS_PER_BYTE = 200
"""What a device computes while a byte is sent: to weigh work done twice against communication."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which mesh axes split which part, and over which axes the result is scattered.

    Attributes:
      contraction: which one.
      spec: of the whole.
      sizes: of the mesh axes.
      split: the axes of each part, the major one first.
      scattered: for dimensions of the result, the axes over which a sum is scattered there.
      given: how the operands are sharded before, and how the result is to be sharded after.
      xla_exchanges: whether XLA makes an all-to-all where an array enters or leaves the program.
    """

    contraction: Contraction
    spec: ConvSpec
    sizes: Mapping[str, int]
    split: Mapping[Part, Axes]
    scattered: Mapping[int, Axes] = dataclasses.field(default_factory=dict)
    given: Mapping[Role, Dimensions] = dataclasses.field(default_factory=dict)
    xla_exchanges: bool = True

    def sharded(self, role: Role) -> Dimensions:
        """The axes of each dimension of an array, as the contraction takes or gives it."""
        dimensions: list[Axes] = [()] * len(self.spec.shape(role))
        for part, axes in self.split.items():
            at = self.spec.dimension(role, part)
            if at is not None:
                # The groups are put in first, and are the outer part of the features.
                dimensions[at] += axes
        if role == RESULT[self.contraction]:
            for at, axes in self.scattered.items():
                dimensions[at] += axes
        return tuple(dimensions)

    def boundary(self, role: Role) -> Dimensions:
        """The axes of each dimension of an array, as the partitioned program takes or gives it.

        The array crosses the boundary as it is `sharded`, and XLA moves it before or after, where
        XLA has a good way. The same movement for two contractions is made once then. Otherwise the
        array crosses as `given`, and `compute` moves it.
        """
        return self.given[role] if self._resharding(role) else self.sharded(role)

    def _resharding(self, role: Role) -> list[Step]:
        """Returns how `compute` moves an array between its sharding as `given` and as `sharded`."""
        if role not in self.given:
            return []
        outside, inside = self.given[role], self.sharded(role)
        if not divides_evenly(outside, inside, self.spec.shape(role), self.sizes):
            return []
        way = (inside, outside) if role == RESULT[self.contraction] else (outside, inside)
        path = steps(*way)
        return path if self._is_beyond_xla(path) else []

    def _is_beyond_xla(self, path: list[Step]) -> bool:
        """Returns whether XLA may copy the whole array to every device to go this way."""
        kinds = [step.kind for step in path]
        if "exchange" not in kinds:
            return "gather" in kinds and "slice" in kinds
        is_alone = kinds.count("exchange") == 1 and {*kinds} <= {"exchange", "permute"}
        return not (self.xla_exchanges and is_alone)

    def parts(self, *which: Part) -> int:
        return math.prod(self.sizes[a] for part in which for a in self.split.get(part, ()))

    @functools.cached_property
    def halos(self) -> dict[int, Halo]:
        """Of the spatial dimensions that are split."""
        spatial = [part for part in self.split if isinstance(part, int)]
        halos = {i: Halo.of(self.spec, i, self.parts(i)) for i in spatial}
        return {i: halo for i, halo in halos.items() if halo is not None}

    @property
    def local_spec(self) -> ConvSpec:
        """Of the convolution that one device does, halos included."""
        spec, padding = self.spec, list(self.spec.padding)
        numbers = spec.dimension_numbers
        lhs, rhs = list(spec.lhs_shape), list(spec.rhs_shape)
        batch, features, *spatial = numbers.lhs_spec
        outputs, inputs, *_ = numbers.rhs_spec
        lhs[batch] = math.ceil(lhs[batch] / self.parts("N"))
        lhs[features] //= self.parts("G", "C")
        rhs[outputs] //= self.parts("G", "O")
        rhs[inputs] //= self.parts("C")
        for i, halo in self.halos.items():
            lhs[spatial[i]] = halo.rows
            padding[i] = halo.padding
        return dataclasses.replace(
            spec,
            lhs_shape=tuple(lhs),
            rhs_shape=tuple(rhs),
            padding=tuple(padding),
            feature_group_count=spec.feature_group_count // self.parts("G"),
            mapped=tuple(
                (factor, size // self.parts(MappedAxis(i)))
                for i, (factor, size) in enumerate(spec.mapped)
            ),
        )

    def compute(self, local: Callable, first: jax.Array, second: jax.Array) -> jax.Array:
        """Computes one device's part of the result from its parts of the operands."""
        values = [
            self._without_garbage(role, self._resharded(role, x))
            for role, x in zip(OPERANDS[self.contraction], (first, second), strict=True)
        ]
        if self.contraction != "dgrad":
            values = [self._exchanged(x) if i == 0 else x for i, x in enumerate(values)]
        out = local(*values, self.local_spec)
        if self.contraction == "dgrad":
            block = jax.ShapeDtypeStruct(self._block_shape(), out.dtype)
            (out,) = jax.linear_transpose(self._exchanged, block)(out)
        summed = [a for part, axes in self.split.items() if self.sums(part) for a in axes]
        for at, axes in self.scattered.items():
            out = lax.psum_scatter(out, axes, scatter_dimension=at, tiled=True)
            summed = [a for a in summed if a not in axes]
        out = lax.psum(out, tuple(summed)) if summed else out
        return self._resharded(RESULT[self.contraction], out)

    def _resharded(self, role: Role, x: jax.Array) -> jax.Array:
        for step in self._resharding(role):
            x = step.apply(x, self.sizes)
        return x

    def _exchanged(self, lhs: jax.Array) -> jax.Array:
        for i, halo in self.halos.items():
            at = self.spec.spatial_dimensions("lhs")[i]
            lhs = halo.exchange(lhs, at, self.split[i], self.sizes)
        return lhs

    def _block_shape(self) -> tuple[int, ...]:
        """Of the input on one device, without the halo."""
        shape = list(self.local_spec.shape("lhs"))
        for i, halo in self.halos.items():
            shape[self.spec.spatial_dimensions("lhs")[i]] = halo.block
        return tuple(shape)

    def _without_garbage(self, role: Role, x: jax.Array) -> jax.Array:
        """Zeros for what is undefined, where it would get into a sum: the elements past the end
        of the whole array, on the last devices, of a batch or of rows that do not divide.
        """
        for part, axes in self.split.items():
            at = self.spec.dimension(role, part)
            if at is None or not ((part == "N" and self.sums("N")) or isinstance(part, int)):
                continue
            size = self.spec.shape(role)[at]
            if x.shape[at] * self.parts(part) > size:
                positions = lax.broadcasted_iota(np.int32, x.shape, at)
                positions += lax.axis_index(axes) * x.shape[at]
                x = jnp.where(positions < size, x, jnp.zeros_like(x))
        return x

    def sums(self, part: Part) -> bool:
        return self.spec.dimension(RESULT[self.contraction], part) is None

    # Which splits there can be, and what they cost.

    def along(self, axis: str) -> Iterator["Plan"]:
        """The plans in which one more axis splits something; last this one, in which every
        device on that axis does the same.
        """
        mapped = map(MappedAxis, range(len(self.spec.mapped)))
        spatial = range(len(self.spec.window_strides))
        parts: tuple[Part, ...] = (*mapped, "G", "N", *spatial, "O", "C")
        for part in parts:
            split = {**self.split, part: (*self.split.get(part, ()), axis)}
            plan = dataclasses.replace(self, split=split)
            if plan._is_possible(part):
                yield plan
        yield self

    def _is_possible(self, part: Part) -> bool:
        spec, groups = self.spec, self.spec.feature_group_count
        if isinstance(part, MappedAxis):
            return spec.mapped[part.number][1] % self.parts(part) == 0
        if isinstance(part, int):
            return Halo.of(spec, part, self.parts(part)) is not None
        if part == "N":
            return spec.lhs_shape[spec.dimension_numbers.lhs_spec[0]] >= self.parts("N")
        if part == "G":
            return groups % self.parts("G") == 0
        # A part of the features is a part of a group only where a device has one group.
        outputs, inputs = (spec.rhs_shape[d] for d in spec.dimension_numbers.rhs_spec[:2])
        size = inputs if part == "C" else outputs // groups
        return groups == self.parts("G") and size % self.parts(part) == 0

    def cost(self, axis: str, given: Mapping[Role, Dimensions]) -> tuple[bool, float]:
        """How many bytes a device sends along an axis, after whether it is for a kernel's gradient
        that inputs or outputs are moved, which grow with the batch: that is summed instead.

        An array that is whole on each of them is cut for nothing; one that is cut is gathered, or
        cut otherwise in an all-to-all. A sum is reduced, and gathered or left scattered. Of several
        axes of a dimension the minor ones are gathered first, and the major ones scattered first:
        then there is less for the minor ones.
        """
        cost, moved = 0.0, False
        for role in OPERANDS[self.contraction]:
            has, needs = (_place(axis, x) for x in (given[role], self.sharded(role)))
            if has is not None and has != needs:
                moved = self.contraction == "wgrad"
                used = {a for axes in self.sharded(role) for a in axes}
                cost += self._nbytes(role) / self._devices(set(has[1]) - used)
        result = RESULT[self.contraction]
        wanted, gets = (_place(axis, x) for x in (given[result], self.sharded(result)))
        split: Part | None = next((part for part, axes in self.split.items() if axis in axes), None)
        if split is None:
            work = self.spec.multiply_adds / math.prod(map(self.parts, self.split))
            cost += work / MULTIPLY_ADDS_PER_BYTE
        elif self.sums(split) and wanted:
            major = filter(self._sums_over, wanted[1])
            cost += self._nbytes(result) / self._devices(major)
        elif self.sums(split):
            cost += 2 * self._nbytes(result)
        elif wanted != gets:
            cost += self._nbytes(result) * (1 if wanted else self.sizes[axis])
        return moved, cost

    def _devices(self, axes: Iterable[str]) -> int:
        return math.prod(self.sizes[axis] for axis in axes)

    def _nbytes(self, role: Role) -> float:
        """Of an array's part on one device."""
        parts = math.prod(self.sizes[a] for axes in self.sharded(role) for a in axes)
        size = math.prod(self.spec.shape(role)) * self.spec.role_dtype(role).itemsize
        return size / parts

    def with_scattered_sums(self, wanted: Dimensions) -> "Plan":
        """Leaves a sum scattered over the axes by which the result is to be sharded anyway."""
        result = RESULT[self.contraction]
        scattered: dict[int, Axes] = {}
        for at, (axes, wants) in enumerate(zip(self.sharded(result), wanted, strict=True)):
            if wants[: len(axes)] != axes:
                continue
            more = itertools.takewhile(self._sums_over, wants[len(axes) :])
            parts = math.prod(self.sizes[a] for a in axes)
            fitting: Axes = ()
            for axis in more:
                parts *= self.sizes[axis]
                if self.spec.shape(result)[at] % parts:
                    break
                fitting += (axis,)
            if fitting:
                scattered[at] = fitting
        return dataclasses.replace(self, scattered=scattered)

    def _sums_over(self, axis: str) -> bool:
        return any(axis in axes and self.sums(part) for part, axes in self.split.items())


def choose(
    contraction: Contraction,
    spec: ConvSpec,
    given: Mapping[Role, Dimensions],
    sizes: Mapping[str, int],
    *,
    xla_exchanges: bool = True,
) -> Plan:
    """The plan for operands that are sharded, and a result that is wanted, as `given`.

    One mesh axis after the other, as they shard the largest array, then the next, splits what
    costs the fewest bytes; see `Plan.cost`. What an axis splits is not thought over again, so that
    arrays with the same axes, in another order each, may be moved more than needed.
    """

    def nbytes(role: Role) -> int:
        return math.prod(spec.shape(role)) * spec.role_dtype(role).itemsize

    plan = Plan(contraction, spec, sizes, {})
    by_size = sorted(given, key=nbytes, reverse=True)
    for axis in dict.fromkeys(a for role in by_size for axes in given[role] for a in axes):
        plan = min(plan.along(axis), key=lambda p: p.cost(axis, given))
    plan = plan.with_scattered_sums(given[RESULT[contraction]])
    return dataclasses.replace(plan, given=given, xla_exchanges=xla_exchanges)


def _place(axis: str, dimensions: Dimensions) -> tuple[int, Axes] | None:
    """Which dimension an axis shards, and the axes that are outside it there."""
    for at, axes in enumerate(dimensions):
        if axis in axes:
            return at, axes[: axes.index(axis)]
    return None
