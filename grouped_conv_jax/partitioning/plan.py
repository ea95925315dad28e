"""A plan: which part of a contraction each axis of a mesh splits.

A part is the batch N, the groups G, the outputs O or the inputs C of a group, an axis of
`jax.vmap`, or a spatial dimension. If the result has it, the work is local; if it is summed over,
there is one all-reduce of the result, or a reduce-scatter if that is to be sharded over the same
axis; along a spatial dimension neighbours exchange halos. Sums over devices are made in the dtype
of the result, as XLA's own are: each device rounds its part.

`search` finds the best plan, `execution` has what a device does by it, and `partition` tells XLA.
All three know meshes by the names and sizes of their axes.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

from grouped_conv_jax.partitioning.halo import Halo
from grouped_conv_jax.partitioning.resharding import Axes, MeshAxes, Step, divides_evenly, steps
from grouped_conv_jax.spec import RESULT, Contraction, ConvSpec, MappedAxis, Part, Role


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
    given: Mapping[Role, MeshAxes] = dataclasses.field(default_factory=dict)
    xla_exchanges: bool = True

    def sharded(self, role: Role) -> MeshAxes:
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

    def boundary(self, role: Role) -> MeshAxes:
        """The axes of each dimension of an array, as the partitioned program takes or gives it.

        The array crosses the boundary as it is `sharded`, and XLA moves it before or after, where
        XLA has a good way. The same movement for two contractions is made once then. Otherwise the
        array crosses as `given`, and `execution` moves it.
        """
        return self.given[role] if self.resharding(role) else self.sharded(role)

    def resharding(self, role: Role) -> list[Step]:
        """Returns how `execution` moves an array between its sharding as `given` and as
        `sharded`.
        """
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
        """Returns the number of pieces that parts are split into."""
        return math.prod(self.sizes[a] for part in which for a in self.split.get(part, ()))

    @functools.cached_property
    def halos(self) -> dict[int, Halo]:
        """The halos of the spatial dimensions that are split."""
        spatial = [part for part in self.split if isinstance(part, int)]
        halos = {i: Halo.of(self.spec, i, self.parts(i)) for i in spatial}
        return {i: halo for i, halo in halos.items() if halo is not None}

    @property
    def local_spec(self) -> ConvSpec:
        """The convolution that one device does, halos included."""
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

    @property
    def block_shape(self) -> tuple[int, ...]:
        """The shape of the input on one device, without the halos."""
        shape = list(self.local_spec.shape("lhs"))
        for i, halo in self.halos.items():
            shape[self.spec.spatial_dimensions("lhs")[i]] = halo.block
        return tuple(shape)

    def sums(self, part: Part) -> bool:
        """Returns whether the result is a sum over a part."""
        return self.spec.dimension(RESULT[self.contraction], part) is None

    def sums_over(self, axis: str) -> bool:
        """Returns whether the result is a sum over the devices along an axis."""
        return any(axis in axes and self.sums(part) for part, axes in self.split.items())
