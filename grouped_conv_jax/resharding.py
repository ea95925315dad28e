"""Moves the parts of an array among devices, from one sharding to another.

XLA's partitioner does so as well, but it knows few ways. Where one mesh axis leaves a dimension
while another one comes to a different dimension, or where a mesh axis changes dimensions, it may
copy the whole array to every device ("involuntary full rematerialization"). Here any two shardings
of the same mesh are a few steps apart, and no step makes an array larger before it must.

An example on a mesh of a = 4 and b = 2 devices. An array (64, 64) is sharded (a, -) and is wanted
as (-, b). Each device has (16, 64). It first slices what it will need of the second dimension,
(16, 32), and then gathers the first one over a: (64, 32). XLA gathers (64, 64) before it slices.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import jax
import numpy as np
from jax import lax

Axes = tuple[str, ...]
Dimensions = tuple[Axes, ...]
"""The mesh axes that shard each dimension of an array, the major one first."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation of every device on its part of an array.

    Attributes:
      kind: "slice" keeps what the device has of dimension `target` after more axes shard it;
        "exchange" is an all-to-all, which takes the axes from dimension `source` to `target`;
        "permute" changes the order of the axes of `source` by a collective-permute; "gather" takes
        the axes from `source`.
      axes: the mesh axes, the major one first; those of a "permute" in their old order.
      source: the dimension that loses the axes.
      target: the dimension that gets the axes.
      order: the new order of the axes of a "permute".
    """

    kind: Literal["slice", "exchange", "permute", "gather"]
    axes: Axes
    source: int = -1
    target: int = -1
    order: Axes = ()

    def after(self, has: Dimensions) -> Dimensions:
        """Returns the sharding after this step, given the one before."""
        dimensions = list(has)
        if self.source >= 0:
            kept = has[self.source][: len(has[self.source]) - len(self.axes)]
            dimensions[self.source] = kept + self.order
        if self.target >= 0:
            dimensions[self.target] += self.axes
        return tuple(dimensions)

    def apply(self, x: jax.Array, sizes: Mapping[str, int]) -> jax.Array:
        """Returns the device's part after this step, given the one before."""
        if self.kind == "slice":
            size = x.shape[self.target] // math.prod(sizes[axis] for axis in self.axes)
            start = lax.axis_index(self.axes) * size
            return lax.dynamic_slice_in_dim(x, start, size, self.target)
        if self.kind == "exchange":
            return lax.all_to_all(x, self.axes, self.target, self.source, tiled=True)
        if self.kind == "gather":
            return lax.all_gather(x, self.axes, axis=self.source, tiled=True)
        return lax.ppermute(x, self.axes, self._permutation(sizes))

    def _permutation(self, sizes: Mapping[str, int]) -> list[tuple[int, int]]:
        """Returns pairs of the device that has a block and the device that gets the block.

        Devices are numbered along `axes`, and device i has block i. With axes (a, b) of sizes 2 and
        3 and the new order (b, a), the device at a = 1, b = 0 is number 3. Its new block is number
        1 of the order (b, a), which device 1 has.
        """
        shape = [sizes[axis] for axis in self.order]
        blocks = np.arange(math.prod(shape)).reshape(shape)
        blocks = blocks.transpose([self.order.index(axis) for axis in self.axes])
        return [(int(block), device) for device, block in enumerate(blocks.flat)]


def steps(has: Dimensions, needs: Dimensions) -> Iterator[Step]:
    """Yields the steps from one sharding to another.

    A slice comes first, since it makes the part of a device smaller, and a gather last. Axes that
    are where they must be are never moved again, so that this ends.
    """
    while has != needs:
        step = (_slice(has, needs) or _exchange(has, needs) or _permute(has, needs)) or _gather(
            has, needs
        )
        yield step
        has = step.after(has)


def is_divided_evenly(dimensions: Dimensions, shape: Sequence[int], sizes: Mapping[str, int]):
    """Returns whether every device has a part of the same size."""
    parts = (math.prod(sizes[axis] for axis in axes) for axes in dimensions)
    return all(size % n == 0 for size, n in zip(shape, parts, strict=True))


def _slice(has: Dimensions, needs: Dimensions) -> Step | None:
    """Returns a slice along axes over which all devices have the same."""
    used = set(itertools.chain(*has))
    for at, missing in _missing(has, needs):
        if free := tuple(itertools.takewhile(lambda axis: axis not in used, missing)):
            return Step("slice", free, target=at)
    return None


def _exchange(has: Dimensions, needs: Dimensions) -> Step | None:
    """Returns an all-to-all of the most axes that go from one dimension to another."""
    for source, surplus in _surplus(has, needs):
        for target, missing in _missing(has, needs):
            for start in range(len(surplus)):
                axes = surplus[start:]
                if axes == missing[: len(axes)]:
                    return Step("exchange", axes, source, target)
    return None


def _permute(has: Dimensions, needs: Dimensions) -> Step | None:
    """Returns a change of order within a dimension: first the axes that stay, then the axes that
    another dimension needs, and last the axes that no dimension needs.
    """
    used = set(itertools.chain(*needs))
    for source, surplus in _surplus(has, needs):
        kept = len(has[source]) - len(surplus)
        stays = [axis for axis in needs[source][kept:] if axis in surplus]
        goes = [axis for axis in surplus if axis not in stays]
        order = (*stays, *sorted(goes, key=lambda axis: axis not in used))
        if order != surplus:
            return Step("permute", surplus, source, order=order)
    return None


def _gather(has: Dimensions, needs: Dimensions) -> Step:
    """Returns a gather of axes that no dimension needs, or else of one that is in the way."""
    used = set(itertools.chain(*needs))
    for source, surplus in _surplus(has, needs):
        unused = tuple(itertools.takewhile(lambda axis: axis not in used, reversed(surplus)))
        if unused:
            return Step("gather", unused[::-1], source)
    source, surplus = next(_surplus(has, needs))
    return Step("gather", surplus[-1:], source)


def _surplus(has: Dimensions, needs: Dimensions) -> Iterator[tuple[int, Axes]]:
    """Yields the dimensions that have axes where others must be, and those axes."""
    for at, (axes, wanted) in enumerate(zip(has, needs, strict=True)):
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(axes, wanted, strict=False))
        if surplus := axes[len(list(same)) :]:
            yield at, surplus


def _missing(has: Dimensions, needs: Dimensions) -> Iterator[tuple[int, Axes]]:
    """Yields the dimensions that have nothing but what they must have, and what comes next."""
    for at, (axes, wanted) in enumerate(zip(has, needs, strict=True)):
        if axes == wanted[: len(axes)] and axes != wanted:
            yield at, wanted[len(axes) :]
