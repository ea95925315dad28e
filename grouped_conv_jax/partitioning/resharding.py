"""Moves the parts of an array among devices, from one sharding to another.

XLA's partitioner does so as well, but it knows few ways. Where one mesh axis leaves a dimension
while another one comes to a different dimension, it may copy the whole array to every device
("involuntary full rematerialization"). Here any two shardings of the same mesh are a few steps
apart, and what makes an array larger comes last.

An example on a mesh of a = 4 and b = 2 devices. An array (64, 64) is sharded (a, -) and is wanted
as (-, b). Each device has (16, 64). It first slices what it will need of the second dimension,
(16, 32), and then gathers the first one over a: (64, 32). XLA gathers (64, 64) before it slices.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import numpy as np
from jax import lax

Axes = tuple[str, ...]
MeshAxes = tuple[Axes, ...]
"""The mesh axes that shard each dimension of an array, the major one first."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation of every device on its part of an array.

    Attributes:
      kind: "slice" keeps what the device has of dimension `target` after more axes shard it;
        "exchange" is an all-to-all, which takes the axes from dimension `source` to `target`;
        "permute" changes the order of the axes of `source` by a collective-permute; "gather" takes
        the axes from `source`. The axes of an array's dimension that a step takes are the minor
        ones, and those that it adds become the minor ones.
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

    def after(self, has: MeshAxes) -> MeshAxes:
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
        return self._permuted(x, sizes)

    def _permuted(self, x: jax.Array, sizes: Mapping[str, int]) -> jax.Array:
        """Sends every block to the device that has its place in the new order of the axes.

        `lax.ppermute` numbers devices in the order of the mesh. With axes (a, b) of sizes 2 and 3,
        in that order in the mesh, and the new order (b, a), the device at a = 1, b = 0 is number 3.
        Its new block is number 1 of the order (b, a), which device 1 has.
        """
        in_mesh = tuple(axis for axis in sizes if axis in self.axes)

        def blocks(order: Axes) -> np.ndarray:
            shape = [sizes[axis] for axis in order]
            numbers = np.arange(math.prod(shape)).reshape(shape)
            return numbers.transpose([order.index(axis) for axis in in_mesh]).ravel()

        sources = np.argsort(blocks(self.axes))[blocks(self.order)]
        pairs = [(int(source), device) for device, source in enumerate(sources)]
        return lax.ppermute(x, in_mesh, pairs)


def steps(has: MeshAxes, needs: MeshAxes) -> list[Step]:
    """Returns the steps from one sharding to another.

    Slices make the part of a device smaller and come first. Then axes go to the dimensions that
    need them, and get into the order that is needed there. Gathers come last.
    """
    path: list[Step] = []
    while step := (
        _slice(has, needs) or _exchange(has, needs) or _permute(has, needs) or _gather(has, needs)
    ):
        path.append(step)
        has = step.after(has)
    return path


def divides_evenly(
    has: MeshAxes, needs: MeshAxes, shape: Sequence[int], sizes: Mapping[str, int]
) -> bool:
    """Returns whether all devices have parts of the same size before and after every step."""
    for size, before, after in zip(shape, has, needs, strict=True):
        if size % math.prod(sizes[axis] for axis in {*before, *after}):
            return False
    return True


def _slice(has: MeshAxes, needs: MeshAxes) -> Step | None:
    """Returns a slice along axes over which all devices have the same."""
    used = set(itertools.chain(*has))
    for at, wanted in enumerate(needs):
        if free := tuple(axis for axis in wanted if axis not in used):
            return Step("slice", free, target=at)
    return None


def _exchange(has: MeshAxes, needs: MeshAxes) -> Step | None:
    """Returns an all-to-all of the minor axes of a dimension that another dimension needs, or else
    what makes them minor.
    """
    homes = {axis: at for at, axes in enumerate(needs) for axis in axes}
    order = list(itertools.chain(*needs))
    permutes = []
    for source, axes in enumerate(has):
        targets = [homes.get(axis, source) for axis in axes]
        if not axes or targets.count(source) == len(axes):
            continue
        target = targets[-1]
        if target != source:
            _, moved = next(itertools.groupby(reversed(axes), lambda a: homes.get(a)))
            return Step("exchange", tuple(moved)[::-1], source, target)
        going = [axis for axis, at in zip(axes, targets, strict=True) if at != source]
        staying = _ordered([axis for axis in axes if axis not in going], needs[source])
        minor = sorted(going, key=order.index)
        permutes.append(Step("permute", axes, source, order=(*staying, *minor)))
    return permutes[0] if permutes else None


def _permute(has: MeshAxes, needs: MeshAxes) -> Step | None:
    """Returns a change of order within a dimension that has all the axes that it needs."""
    for at, (axes, wanted) in enumerate(zip(has, needs, strict=True)):
        if axes[: len(wanted)] != wanted:
            return Step("permute", axes, at, order=_ordered(axes, wanted))
    return None


def _gather(has: MeshAxes, needs: MeshAxes) -> Step | None:
    """Returns a gather of the axes that no dimension needs."""
    for at, (axes, wanted) in enumerate(zip(has, needs, strict=True)):
        if unused := axes[len(wanted) :]:
            return Step("gather", unused, at)
    return None


def _ordered(axes: Sequence[str], wanted: Axes) -> Axes:
    """Returns the axes in the order in which they are wanted, and then those that are not."""
    order = [*wanted, *axes]
    return tuple(sorted(axes, key=order.index))
