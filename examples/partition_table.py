"""What plain jit sends and computes for a grouped convolution, here and in lax.

python examples/partition_table.py

Compiles the three contractions of one convolution for eight CPU devices, reads the collectives
from the compiled programs, runs them, and writes docs/partition.md.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import grouped_conv_jax
from grouped_conv_jax.collectives import collectives

ARGUMENTS = {
    "window_strides": (1, 1),
    "padding": "SAME",
    "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
}
LHS, RHS, GROUPS = (16, 28, 28, 128), (3, 3, 4, 128), 32

# How the work is split does not depend on the implementation; with the one that lax has, XLA counts
# the work of both alike (it counts a loop's body once).
grouped_conv = functools.partial(grouped_conv_jax.grouped_conv, implementation="xla")

SHARDED = {
    "batch": (P("data"), P(), P("data")),
    "groups": (P(None, None, None, "group"),) * 3,
    "batch and groups": (
        P("data", None, None, "group"),
        P(None, None, None, "group"),
        P("data", None, None, "group"),
    ),
    "rows": (P(None, "data"), P(), P(None, "data")),
    "groups, over both axes": (P(None, None, None, ("data", "group")),) * 3,
}
"""The shardings of input, kernel and output; the gradients have those of what they belong to."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Tabulates what plain jit makes of a grouped convolution on a mesh of 4 x 2 devices."""

    output: Path = Path("docs/partition.md")
    """The table to write."""


def main() -> None:
    """The command line."""
    options = tyro.cli(Options)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page(jax.make_mesh((4, 2), ("data", "group"), (AxisType.Auto,) * 2)))
    print(f"wrote {options.output}")


def page(mesh: Mesh) -> str:
    """The whole page."""
    rows = "\n".join(table(mesh))
    return f"""# What plain jit makes of a grouped convolution

Input {LHS}, kernel {RHS}, {GROUPS} groups, float32, on a mesh of data 4 x group 2 CPU devices
(Auto axes), jax {jax.__version__}. Made by

```sh
python examples/partition_table.py
```

With `implementation="xla"` here: what is sent does not depend on the implementation, and XLA counts
the work of both alike. Bytes are those that a device sends or receives in a collective, whichever
is more; work is what a device computes, in shares of the whole (with 8 devices and nothing done
twice: 1/8, or 1/4 and 1/2 where only one axis of the mesh is used); the error is the largest one,
in shares of the largest element of the same contraction on one device (1.0: twice as large as it
should be), and 0 if it is rounding.

| sharded | computed | by | collectives | bytes | work | error |
| --- | --- | --- | --- | --: | --: | --: |
{rows}
"""


def table(mesh: Mesh) -> Iterator[str]:
    """The lines of the table."""
    for name, specs in SHARDED.items():
        for contraction in ("output", "input's gradient", "kernel's gradient"):
            for by, conv in {"here": grouped_conv, "lax": lax.conv_general_dilated}.items():
                cells = [name, contraction, by, *measured(mesh, specs, contraction, conv)]
                yield f"| {' | '.join(cells)} |"


def measured(mesh: Mesh, specs: Any, contraction: str, conv: Callable) -> list[str]:
    """Collectives, their bytes, the share of the work of one device, and the error."""
    shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
    operands = jax.device_put(arrays(), shardings)
    function, result = computing(contraction, conv)
    program = jax.jit(function, out_shardings=shardings[result]).lower(*operands).compile()
    sent = collectives(program, mesh)
    kinds = [c.kind for c in sent]
    counts = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
    expected, work = alone(contraction)
    difference = np.asarray(program(*operands)) - expected
    error = np.abs(difference).max() / np.abs(expected).max()
    return [
        ", ".join(counts) or "none",
        f"{sum(c.nbytes for c in sent):,}",
        f"{flops(program) / work:.3f}",
        f"{error:.1f}" if error > 1e-4 else "0",
    ]


def computing(contraction: str, conv: Callable) -> tuple[Callable, int]:
    """One contraction of input, kernel and output's gradient; which of them it is shaped like."""
    conv = functools.partial(conv, **ARGUMENTS, feature_group_count=GROUPS)
    if contraction == "output":
        return lambda x, w, y: conv(x, w), 2
    if contraction == "input's gradient":
        return lambda x, w, y: jax.vjp(lambda x: conv(x, w), x)[1](y)[0], 0
    return lambda x, w, y: jax.vjp(lambda w: conv(x, w), w)[1](y)[0], 1


@functools.cache
def alone(contraction: str) -> tuple[np.ndarray, float]:
    """The result on one device, and the work."""
    function, _ = computing(contraction, grouped_conv)
    program = jax.jit(function).lower(*arrays()).compile()
    return np.asarray(program(*arrays())), flops(program)


@functools.cache
def arrays() -> tuple[jax.Array, ...]:
    """A random input, kernel and gradient of the output."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (LHS, RHS, (*LHS[:3], RHS[3]))
    return tuple(jax.random.uniform(k, s, minval=-1) for k, s in zip(keys, shapes, strict=True))


def flops(program: Any) -> float:
    """As XLA counts them, of one device."""
    return program.cost_analysis()["flops"]


if __name__ == "__main__":
    main()
