"""Which collectives a compiled program runs: read from the HLO that XLA prints.

JAX has no stable interface to the instructions of a compiled program, so this reads its text, in
the forms that XLA has given it over the supported versions of JAX. It knows of meshes, and nothing
of convolutions or nets.
"""

import bisect
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, Mesh

_KINDS = (
    "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|"
    "collective-permute|collective-broadcast"
)

# "%name = type kind(operands), attributes". An asynchronous pair is known by its start; one that
# calls a computation has the collective in there, which is found by itself.
_INSTRUCTION = re.compile(
    rf'^ *(?:ROOT )?%?[\w.\-]+ = (?P<type>[^"\n]*?) (?P<kind>{_KINDS})(?P<start>-start)?\('
    r"(?P<attributes>.*)$",
    re.MULTILINE,
)

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$", re.MULTILINE)

_CHAIN = re.compile(r'\bchain_id="?\w+')

_LISTED = r"\{(?:\{[\d, ]*\}(?:, ?)?)*\}"
_IOTA = r"\[(?P<shape>[\d,]+)\]<=\[(?P<base>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?"
_NAMED = (
    r"mesh\[(?P<sizes>[^\]]*)\]"
    r"(?:, ?device_ids=\((?:\[(?P<base>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?|(?P<ids>[\d, ]+))\))?"
    r" ?\{(?P<axes>[^}]*)\}"
)

_ARRAY = re.compile(r"\b(?P<dtype>[a-z]+(?P<bits>\d*)\w*)\[(?P<shape>[\d,<= ]*)\]")

_Groups = list[tuple[int, ...]]


@dataclass(frozen=True)
class Collective:
    """One collective of a compiled program.

    Attributes:
      kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", ...
      nbytes: of what goes in or of what comes out on one device, whichever is more; where XLA has
        combined several arrays into one collective, of all of them.
      axes: of the mesh, those along which the devices that exchange with each other differ, in
        the order of the mesh. They may exchange with a part of such an axis only: see `devices`.
      op_name: where in the traced function it comes from, such as "jit(f)/shard_map/psum".
      devices: how many exchange with each other; 2 for a "collective-permute".
      parts: (op_name, nbytes) of each of the arrays that XLA has combined into the collective, or
        of the collective itself where it is of one, or where their names are not known.
    """

    kind: str
    nbytes: int
    axes: tuple[str, ...]
    op_name: str
    devices: int
    parts: tuple[tuple[str, int], ...]


def collectives(compiled: Any, mesh: Mesh | AbstractMesh) -> list[Collective]:
    """The collectives of a compiled program, in the order in which XLA prints them.

    What devices exchange with themselves only (along an axis of size 1) is left out. A collective
    in the body of a loop is one, however often the loop runs.

    Args:
      compiled: of `jax.jit(f).lower(...).compile()`.
      mesh: the devices that it was compiled for, in that order.

    Raises:
      ValueError: the program runs on more devices than the mesh has.
      NotImplementedError: XLA prints something else than what is known here.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> from grouped_conv_jax.collectives import collectives
      >>> mesh = jax.make_mesh((len(jax.devices()),), ("data",))
      >>> x = jax.ShapeDtypeStruct(
      ...     (840,), "float32", sharding=NamedSharding(mesh, PartitionSpec("data"))
      ... )
      >>> compiled = jax.jit(lambda x: x + x.sum()).lower(x).compile()
      >>> {(c.kind, c.axes, c.nbytes) for c in collectives(compiled, mesh)} <= {
      ...     ("all-reduce", ("data",), 4)
      ... }
      True
    """
    text = compiled.as_text()
    if not text:
        raise NotImplementedError("this backend does not print its compiled programs")
    return list(_collectives(text, mesh))


def _collectives(text: str, mesh: Mesh | AbstractMesh) -> Iterator[Collective]:
    replicas = _integer(text, "replica_count", 1)
    partitions = _integer(text, "num_partitions", mesh.size // replicas)
    if replicas * partitions > mesh.size:
        raise ValueError(
            f"the program runs on {replicas * partitions} devices, the mesh has {mesh.size}"
        )
    headers = list(_COMPUTATION.finditer(text))
    starts = [header.start() for header in headers]
    chains = set()
    for match in _INSTRUCTION.finditer(text):
        kind, attributes = match["kind"], match["attributes"]
        if chain := _CHAIN.search(attributes):
            # XLA:TPU spreads one collective over many fusions, which overlap it with computation.
            if chain[0] in chains:
                continue
            chains.add(chain[0])
        before = bisect.bisect(starts, match.start())
        if kind == "all-reduce" and before:
            # XLA:TPU has a fusion for an all-reduce of which each device keeps a part.
            is_scattered = headers[before - 1]["name"].startswith("all-reduce-scatter")
            kind = "reduce-scatter" if is_scattered else kind
        groups = _groups(kind, attributes, replicas, partitions)
        groups = [group for group in groups if len(set(group)) > 1]
        if groups:
            devices = max(map(len, groups))
            sizes = _sizes(match["type"], match["kind"], bool(match["start"]), devices)
            found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', attributes)
            name = found[1] if found else ""
            names = _combined_names(name)
            parts = zip(names, sizes, strict=True) if len(names) == len(sizes) else ()
            yield Collective(
                kind,
                sum(sizes),
                _axes(groups, mesh),
                name,
                devices,
                tuple(parts) or ((name, sum(sizes)),),
            )


def _integer(text: str, name: str, default: int) -> int:
    found = re.search(rf"^HloModule .*\b{name}=(\d+)", text)
    return int(found[1]) if found else default


# Who exchanges with whom.


def _axes(groups: _Groups, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes of the mesh along which the members of a group differ."""
    shape = tuple(mesh.shape.values())
    differ = np.zeros(len(shape), bool)
    for group in groups:
        places = np.stack(np.unravel_index(group, shape), axis=-1)
        differ |= (places != places[:1]).any(axis=0)
    return tuple(str(axis) for axis, d in zip(mesh.shape, differ, strict=True) if d)


def _groups(kind: str, attributes: str, replicas: int, partitions: int) -> _Groups:
    """The devices that exchange with each other, as places in the device assignment.

    XLA numbers devices in four ways (https://openxla.org/xla/operation_semantics, AllReduce). The
    device assignment is an array of replicas by partitions; a sharded program has one replica,
    that of an old `pmap` one partition.
    """
    printed = _printed_groups(attributes)
    has_channel = "channel_id=" in attributes
    if "use_global_device_ids=true" in attributes:
        return printed or [tuple(range(replicas * partitions))]
    if not has_channel:
        return [
            tuple(replica * partitions + partition for replica in group)
            for group in printed or [range(replicas)]
            for partition in range(partitions)
        ]
    if kind in ("all-gather", "all-reduce", "reduce-scatter"):
        return [
            tuple(r * partitions + p for r in group for p in range(partitions))
            for group in printed or [range(replicas)]
        ]
    return [
        tuple(replica * partitions + partition for partition in group)
        for group in printed or [range(partitions)]
        for replica in range(replicas)
    ]


def _printed_groups(attributes: str) -> _Groups:
    """`replica_groups` or `source_target_pairs`, whichever way they are printed."""
    if listed := re.search(rf"\b(?:replica_groups|source_target_pairs)=({_LISTED})", attributes):
        return [_integers(group) for group in re.findall(r"\{([\d, ]+)\}", listed[1])]
    if iota := re.search(rf"\breplica_groups={_IOTA}", attributes):
        return _rows(_iota(iota["base"], iota["order"]).reshape(_integers(iota["shape"])))
    if named := re.search(rf"\breplica_groups={_NAMED}", attributes):
        return _named_groups(named)
    raise NotImplementedError(f"cannot read who exchanges with whom in: {attributes}")


def _named_groups(named: re.Match) -> _Groups:
    """Of "mesh['a'=4,'b'=2] {'b'}": the devices that differ along the axes in braces.

    An axis may be there in part: of 'a' with 4 devices, "'a':(2)2" is the inner of two factors,
    the one of size 2 with 2 outside it.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", named["sizes"])}
    used = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", named["axes"])
    shape, exchanging = [], []
    for axis, size in sizes.items():
        spans = [
            (int(before), int(before) * int(inner)) if inner else (1, size)
            for name, before, inner in used
            if name == axis
        ]
        cuts = sorted({1, size, *(cut for span in spans for cut in span)})
        for start, stop in itertools.pairwise(cuts):
            shape.append(stop // start)
            exchanging.append(any(a <= start and stop <= b for a, b in spans))
    if named["ids"]:
        ids = np.array(_integers(named["ids"]))
    elif named["base"]:
        ids = _iota(named["base"], named["order"])
    else:
        ids = np.arange(math.prod(sizes.values()))
    inner = [d for d, exchanges in enumerate(exchanging) if exchanges]
    outer = [d for d, exchanges in enumerate(exchanging) if not exchanges]
    members = math.prod(shape[d] for d in inner)
    return _rows(ids.reshape(shape).transpose(outer + inner).reshape(-1, members))


def _iota(base: str, order: str | None) -> np.ndarray:
    """Of "[4,2]T(1,0)": 0, 1, ... in that shape, transposed."""
    shape = _integers(base)
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_integers(order)) if order else ids


def _rows(ids: np.ndarray) -> _Groups:
    return [tuple(int(i) for i in row) for row in ids]


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", text))


# What, and how much.


def _combined_names(name: str) -> list[str]:
    """XLA names what it has combined "jit(f)/(conv1/psum:conv2/psum)": a name for each array."""
    before, opening, inside = name.partition("/(")
    if not opening or not inside.endswith(")"):
        return [name]
    return [f"{before}/{part}" for part in inside.removesuffix(")").split(":")]


def _sizes(printed_type: str, kind: str, start: bool, devices: int) -> list[int]:
    """Bytes of each array, the larger of what goes in and what comes out, from the result's type.

    The start of an asynchronous pair has (what goes in, what comes out, ...) for a result.
    """
    # Layouts and the comments that number the parts of long tuples hold no sizes.
    printed_type = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", printed_type)
    if start and kind != "all-reduce":
        return max((_array_bytes(part) for part in _parts(printed_type)[:2]), key=sum)
    factor = devices if kind == "reduce-scatter" else 1
    return [nbytes * factor for nbytes in _array_bytes(printed_type)]


def _array_bytes(printed_type: str) -> list[int]:
    """Of each array in a type."""
    return [
        -(-_bits(array) * math.prod(_integers(array["shape"])) // 8)
        for array in _ARRAY.finditer(printed_type)
    ]


def _bits(array: re.Match) -> int:
    # pred[] is a byte; token[] is nothing.
    return int(array["bits"] or {"pred": 8}.get(array["dtype"], 0))


def _parts(printed_type: str) -> list[str]:
    """The elements of a tuple, which may be tuples themselves."""
    parts, depth = [""], 0
    for character in printed_type.strip().removeprefix("(").removesuffix(")"):
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
