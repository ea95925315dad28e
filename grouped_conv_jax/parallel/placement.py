"""What a placement costs: who sends what to whom, and what each device holds.

A model says what its layers have to exchange (`Exchange`); a compiled program says what it does
exchange (see `collectives`). `placement_report` puts the two side by side, so that a collective
that nobody asked for is seen. This module knows nothing of any one model.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, Mesh

from grouped_conv_jax.parallel.collectives import collectives
from grouped_conv_jax.spec import Contraction
from grouped_conv_jax.text import aligned

Direction = Literal["forward", "backward"]

NAMELESS = "(no name)"
"""The layer of a collective to which XLA gives no name."""

_Key = tuple[str, str, tuple[str, ...]]
"""A layer, a direction, the axes of the mesh."""


@dataclass(frozen=True)
class Exchange:
    """What the devices along some mesh axes have to exchange for one layer.

    Attributes:
      layer: its name, which is that of the `jax.named_scope` that it is computed in.
      contraction: what it is needed for: the output, the input's gradient or the kernel's.
      kind: the collective that does it with the least traffic, such as "all-gather".
      axes: of the mesh, in the order of the mesh.
      nbytes: of what goes in or of what comes out on one device, whichever is more.
    """

    layer: str
    contraction: Contraction
    kind: str
    axes: tuple[str, ...]
    nbytes: int

    @property
    def direction(self) -> Direction:
        return "forward" if self.contraction == "fprop" else "backward"


@dataclass(frozen=True)
class Row:
    """What one layer exchanges in one direction along the same axes; bytes as in `Exchange`.

    Attributes:
      layer: its name; or where in the traced function the collective is, if that is in no layer;
        or several layers, if what they need is done together and outside of them.
      contraction: "fprop", "dgrad" or "wgrad", or the direction if no exchange was computed here.
      axes: of the mesh.
      computed_kinds: the collectives that have to be.
      computed_nbytes: what they move.
      compiled_kinds: the collectives that are in the compiled program.
      compiled_nbytes: what those move.
    """

    layer: str
    contraction: str
    axes: tuple[str, ...]
    computed_kinds: tuple[str, ...]
    computed_nbytes: int
    compiled_kinds: tuple[str, ...]
    compiled_nbytes: int

    @property
    def excess(self) -> int:
        """Bytes that the compiled program moves beyond what was computed."""
        return max(0, self.compiled_nbytes - self.computed_nbytes)

    @property
    def note(self) -> str:
        """In words, where the compiled program does something else than computed."""
        compiled, computed = " + ".join(self.compiled_kinds), " + ".join(self.computed_kinds)
        if not compiled:
            return "not in the compiled program"
        if not computed:
            return f"{compiled} that was not expected"
        difference = self.compiled_nbytes - self.computed_nbytes
        more = f"{abs(difference):,} bytes {'more' if difference > 0 else 'less'} than computed"
        if compiled != computed:
            return f"{compiled} instead of {computed}" + (f", {more}" if difference else "")
        return f"{compiled} of {more}" if difference else ""


@dataclass(frozen=True)
class Memory:
    """Bytes on each device, and on one device that does everything alone (None: not asked)."""

    name: str
    nbytes: int
    alone: int | None


@dataclass(frozen=True)
class PlacementReport:
    """What `placement_report` has found; as a string, two tables.

    Attributes:
      mesh_shape: (axis, size) of each axis.
      rows: the collectives, those that were computed first.
      memory: what each device holds.
      compared: whether there was anything to compare the compiled program with.
    """

    mesh_shape: tuple[tuple[str, int], ...]
    rows: tuple[Row, ...]
    memory: tuple[Memory, ...]
    compared: bool

    @property
    def notes(self) -> tuple[str, ...]:
        """Where compiled and computed differ, a sentence each."""
        if not self.compared:
            return ()
        return tuple(f"{row.layer} {row.contraction}: {row.note}" for row in self.rows if row.note)

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh_shape)
        title = f"Collectives of one step on a mesh of {mesh}; bytes into or out of a device"
        lines = [title, *self._collectives(), ""]
        if not self.rows:
            lines = [f"No collectives on a mesh of {mesh}.", ""]
        lines += [f"! {note}" for note in self.notes] + [""] * bool(self.notes)
        return "\n".join(lines + self._memory()).rstrip()

    def _collectives(self) -> list[str]:
        table = [["layer", "contraction", "over", "computed", "bytes", "compiled", "bytes"]]
        for row in [*self.rows, *_totals(self.rows)]:
            table.append(
                [
                    _shortened(row.layer),
                    row.contraction,
                    ", ".join(row.axes),
                    " + ".join(row.computed_kinds),
                    f"{row.computed_nbytes:,}",
                    " + ".join(row.compiled_kinds),
                    f"{row.compiled_nbytes:,}",
                ]
            )
        if not self.compared:
            table = [line[:3] + line[5:] for line in table]
        return aligned(table, numbers=("bytes",))

    def _memory(self) -> list[str]:
        if not self.memory:
            return []
        table = [["held by", "each device", "one device alone"]]
        for m in self.memory:
            table.append([m.name, f"{m.nbytes:,}", "" if m.alone is None else f"{m.alone:,}"])
        return aligned(table, numbers=("each device", "one device alone"))


def placement_report(
    compiled: Any,
    mesh: Mesh | AbstractMesh,
    *,
    exchanges: Iterable[Exchange] | None = None,
    held: Mapping[str, Any] | None = None,
    alone: Any = None,
) -> PlacementReport:
    """Compares what a compiled program exchanges with what it has to, and counts what it holds.

    Args:
      compiled: of `jax.jit(f).lower(...).compile()`; nothing is run.
      mesh: the devices that it was compiled for, in that order.
      exchanges: what has to be exchanged, computed without the program, such as
        `grouped_conv_jax.models.alexnet_exchanges`; collectives are told apart by the layers
        named there. Without it, the compiled side alone is reported, by the place in the traced
        function.
      held: trees of arrays, or of `jax.ShapeDtypeStruct` with shardings, by name.
      alone: the same program compiled for one device, to compare the memory with.

    Raises:
      TypeError: it is not compiled.
      ValueError: the program runs on more devices than the mesh has, or an array of `held` says
        nothing of its sharding.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from grouped_conv_jax.placement import placement_report
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> x = jnp.ones((4, 8))
      >>> compiled = jax.jit(jnp.sum).lower(x).compile()
      >>> print(placement_report(compiled, mesh, held={"x": x}))  # doctest: +ELLIPSIS
      No collectives on a mesh of data 1.
      <BLANKLINE>
      held by ... each device  one device alone
      x       ...         128               128
      ...
    """
    if not hasattr(compiled, "memory_analysis"):
        raise TypeError(
            f"compiled must be a compiled program, got {type(compiled).__name__}; compile it with "
            "jax.jit(function).lower(*args).compile()"
        )
    needed = tuple(exchanges or ())
    memory = [_held(name, tree) for name, tree in (held or {}).items()]
    if (temporary := _temporary_bytes(compiled)) is not None:
        memory.append(
            Memory("activations and other temporaries", temporary, _temporary_bytes(alone))
        )
    return PlacementReport(
        tuple((str(axis), size) for axis, size in mesh.shape.items()),
        _rows(compiled, mesh, needed),
        tuple(memory),
        exchanges is not None,
    )


def _rows(
    compiled: Any, mesh: Mesh | AbstractMesh, exchanges: Sequence[Exchange]
) -> tuple[Row, ...]:
    """A row for each layer, direction and axes that either side has."""
    needed, found = defaultdict(list), defaultdict(list)
    for e in exchanges:
        needed[e.layer, e.direction, e.axes].append((e.kind, e.nbytes, e.contraction))
    layers = list(dict.fromkeys(e.layer for e in exchanges))
    for c in collectives(compiled, mesh):
        for op_name, nbytes in c.parts:
            layer = _layer(op_name, layers)
            direction = "backward" if "transpose(" in op_name else "forward" if op_name else ""
            found[layer, direction, c.axes].append((c.kind, nbytes))
    _claim(needed, found)
    _pool(needed, found)
    return tuple(
        Row(
            layer,
            ", ".join(dict.fromkeys(contraction for *_, contraction in needed[key])) or direction,
            axes,
            tuple(sorted({kind for kind, *_ in needed[key]})),
            sum(nbytes for _, nbytes, _ in needed[key]),
            tuple(sorted({kind for kind, _ in found[key]})),
            sum(nbytes for _, nbytes in found[key]),
        )
        for key in list(dict.fromkeys([*needed, *found]))
        for layer, direction, axes in [key]
    )


def _claim(needed: dict[_Key, list], found: dict[_Key, list]) -> None:
    """Moves a collective that a layer needs just so to that layer, whatever it is named after.

    What the partitioner gathers is named, by the version of XLA, after the layer that takes it or
    after the one that made it. XLA:TPU may make an all-reduce without a name of a reduce-scatter.
    """

    def agree(key: _Key) -> bool:
        wanted = [(kind, nbytes) for kind, nbytes, *_ in needed.get(key, ())]
        return sorted(wanted) == sorted(found.get(key, ()))

    def move(collective: tuple[str, int], key: _Key, others: list[_Key]) -> bool:
        for other in others:
            if other[2] == key[2] and not agree(other) and collective in found[other]:
                found[other].remove(collective)
                found.setdefault(key, []).append(collective)
                return True
        return False

    for key, wanted in needed.items():
        for kind, nbytes, *_ in wanted:
            if (kind, nbytes) in found.get(key, ()) or move((kind, nbytes), key, list(found)):
                continue
            if kind == "reduce-scatter":
                nameless = [other for other in found if other[0] == NAMELESS]
                move(("all-reduce", nbytes), key, nameless)
    for key in [key for key, moved in found.items() if not moved]:
        del found[key]


def _pool(needed: dict[_Key, list], found: dict[_Key, list]) -> None:
    """Makes one row of what several layers need and one place does for all of them.

    The gradients of all layers are summed together where a program sums them at its end, and where
    XLA combines their sums: then all are named after one of them.
    """
    layers = {layer for layer, *_ in needed}
    for axes, kind in sorted({(key[2], kind) for key in found for kind, _ in found[key]}):
        of_kind = [k for k in found if k[2] == axes and {what for what, _ in found[k]} == {kind}]
        places = [k for k in of_kind if k[0] not in layers]
        missing = [k for k in needed if k not in found and k[2] == axes]
        missing = [k for k in missing if {what for what, *_ in needed[k]} == {kind}]
        if missing and not places:
            combined = [k for k in of_kind if _excess(k, needed, found) > 0]
            excess = sum(_excess(k, needed, found) for k in combined)
            # The sums of the missing layers are in there if they are as many bytes.
            if excess == sum(nbytes for k in missing for _, nbytes, _ in needed[k]):
                places = combined
                missing = [k for k in needed if k in missing or k in combined]
        if missing and places:
            row = (", ".join(dict.fromkeys(layer for layer, *_ in missing)), "", axes)
            needed[row] = [e for key in missing for e in needed.pop(key)]
            found[row] = [c for key in places for c in found.pop(key)]


def _excess(key: _Key, needed: dict[_Key, list], found: dict[_Key, list]) -> int:
    """Returns how many bytes more a place moves than it needs to."""
    moved = sum(nbytes for _, nbytes in found[key])
    return moved - sum(nbytes for _, nbytes, *_ in needed.get(key, ()))


def _shortened(layers: str) -> str:
    """Returns the names of many layers in a few words: "conv1 ... fc8, loss"."""
    names = layers.split(", ")
    return layers if len(names) <= 3 else f"{names[0]} ... {', '.join(names[-2:])}"


def _layer(op_name: str, layers: Sequence[str]) -> str:
    """The innermost of the layers that an op_name is in; where it is, if it is in none."""
    if layers:
        names = "|".join(map(re.escape, sorted(layers, key=len, reverse=True)))
        if inside := re.findall(rf"(?<![\w.-])(?:{names})(?![\w.-])", op_name):
            return inside[-1]
    return op_name or NAMELESS


def _held(name: str, tree: Any) -> Memory:
    each = alone = 0
    for array in jax.tree.leaves(tree):
        if array.sharding is None:
            raise ValueError(f"{name} has an array of shape {array.shape} without a sharding")
        each += math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        alone += math.prod(array.shape) * array.dtype.itemsize
    return Memory(name, each, alone)


def _temporary_bytes(compiled: Any) -> int | None:
    """The most that a program has at one time beyond its arguments and results."""
    analysis = None if compiled is None else compiled.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def _totals(rows: Sequence[Row]) -> list[Row]:
    """A row for each combination of axes, with the sum of the others."""
    totals = []
    for axes in sorted({row.axes for row in rows}):
        of_axes = [row for row in rows if row.axes == axes]
        computed = sum(row.computed_nbytes for row in of_axes)
        totals.append(
            Row("total", "", axes, (), computed, (), sum(row.compiled_nbytes for row in of_axes))
        )
    return totals
