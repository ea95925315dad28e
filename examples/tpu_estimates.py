"""Tabulates what XLA:TPU estimates for each implementation of well-known convolutions.

python examples/tpu_estimates.py
python examples/tpu_estimates.py --topology v6e:2x2 --page v6e.md --results v6e.json

Each contraction is compiled by each implementation for one TPU that is not there, and the
compiler's own figures are read off: cycles, FLOPs, bytes that are accessed, and temporary memory.
The automatic choice for TPUs is made by them. This needs libtpu (pip install "jax[tpu]") and takes
a few minutes.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import SingleDeviceSharding

from alexnet.training.topology import topology_devices
from benchmarks.workloads import WORKLOADS, Workload
from grouped_conv_jax import explain
from grouped_conv_jax.algorithms import dense
from grouped_conv_jax.algorithms.table import TABLE
from grouped_conv_jax.spec import OPERANDS
from grouped_conv_jax.tuning.explanation import Row

ROOT = Path(__file__).parent.parent

COMPARED = ("xla", "lax", "dense", "einsum", "packed")
"""The implementations to compile. The others have loops, of which XLA estimates one round only, or
become the program of one of these.
"""


LARGER = ("resnext_s1@32", "resnext_s2_stride2@32", "resnext101_32x8d_s1@32")
"""Larger batches change the order of the estimates for narrow groups."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Compiles the benchmark's convolutions for a TPU, and tabulates the compiler's estimates."""

    topology: str = "v5e:2x2"
    """The TPU."""

    workloads: tuple[str, ...] = (*WORKLOADS, *LARGER)
    """Names of convolutions, as in examples/benchmark.py, with another batch after an @."""

    results: Path = ROOT / "benchmarks" / "tpu-estimates.json"
    """The JSON file to write."""

    page: Path = ROOT / "docs" / "tpu_estimates.md"
    """The Markdown file to write."""


def main() -> None:
    """The command line."""
    options = tyro.cli(Options)
    jax.config.update("jax_platforms", "cpu")
    try:
        device = topology_devices(options.topology)[0]
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    about = {"jax": jax.__version__, "topology": options.topology, "kind": device.device_kind}
    results = kept(options, about)
    for name in options.workloads:
        if name not in {result["workload"] for result in results}:
            print(name, flush=True)
            results += estimates(name, device)
            options.results.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
    options.page.write_text(page(about, results))
    print(options.page)


def kept(options: Options, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the results that there are already, of the same compiler and the same TPU."""
    before = json.loads(options.results.read_text()) if options.results.exists() else {}
    return before["results"] if about.items() <= before.items() else []


def estimates(name: str, device: Any) -> list[dict[str, Any]]:
    """Compiles a convolution and its two gradients by each implementation."""
    workload = named(name)
    sharding = SingleDeviceSharding(device)
    lhs, rhs = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
        for shape in (workload.lhs, workload.rhs)
    )
    found = []
    for row in explain(lhs, rhs, **workload.arguments).rows:
        way = row.implementation
        in_a_loop = way == "dense" and workload.feature_group_count > dense.UNROLLED
        same_as_xla = way == "lax" and row.contraction != "wgrad"
        if row.reason is None and way in COMPARED and not (in_a_loop or same_as_xla):
            found.append({"workload": name, **compile_row(row, device)})
    return found


def named(name: str) -> Workload:
    """Returns a convolution of the benchmark, such as "resnext_s1" or, of 32 images, "...@32"."""
    name, _, batch = name.partition("@")
    return WORKLOADS[name].with_batch(int(batch)) if batch else WORKLOADS[name]


def compile_row(row: Row, device: Any) -> dict[str, Any]:
    """Compiles one contraction by one implementation, and reads the compiler's figures."""
    compute = getattr(TABLE[row.implementation], row.contraction)
    sharding = SingleDeviceSharding(device)
    operands = [
        jax.ShapeDtypeStruct(row.spec.shape(role), row.spec.role_dtype(role), sharding=sharding)
        for role in OPERANDS[row.contraction]
    ]
    compiled = jax.jit(lambda *operands: compute(*operands, row.spec)).lower(*operands).compile()
    analysis, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    return {
        "contraction": row.contraction,
        "implementation": row.implementation,
        "chosen": row.is_chosen,
        "kilocycles": kilocycles(compiled.as_text() or ""),
        "flops": analysis.get("flops"),
        "bytes": analysis.get("bytes accessed"),
        "temporary_bytes": memory.temp_size_in_bytes if memory else 0,
    }


def kilocycles(program: str) -> float:
    """Returns the sum of the cycles that XLA:TPU estimates for the steps of a program."""
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', program))) / 1000


def page(about: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    """Returns the Markdown file."""
    heading = (
        "convolution",
        "computes",
        "by",
        "kilocycles",
        "GFLOP",
        "MB accessed",
        "MB temporary",
    )
    lines = [heading, ("---",) * 3 + ("--:",) * 4]
    for result in results:
        name = result["implementation"]
        lines.append(
            (
                result["workload"],
                result["contraction"],
                f"**{name}**" if result["chosen"] else name,
                f"{result['kilocycles']:,.0f}",
                f"{result['flops'] / 1e9:.2f}",
                f"{result['bytes'] / 1e6:,.0f}",
                f"{result['temporary_bytes'] / 1e6:,.0f}",
            )
        )
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return TEXT.format(**about, table=table)


TEXT = """\
# XLA:TPU's estimates

This page compares the implementations of the benchmark's twelve convolutions in bfloat16. Each
contraction was compiled for one {kind} ({topology}, jax {jax}) by each implementation. **These are
the compiler's own figures, and not those of a stopwatch: nothing was run.** "Kilocycles" is the sum
of the cycles that XLA:TPU's cost model expects of each step of the program. The automatic choice is
in bold. Implementations with loops are left out, since XLA estimates only one round of a loop.

`"einsum"` has lower estimates for narrow groups in small batches of large images. Its advantage
shrinks, or turns round, in larger batches ("@32" has 32 images). It is not chosen automatically.

`"packed"` multiplies the zeros between the groups as well, and has the lowest estimates for narrow
groups of large images. It is not chosen unasked, since infinities and NaNs of one group spoil its
neighbours.

This command makes the page:

```sh
python examples/tpu_estimates.py
```

{table}
"""


if __name__ == "__main__":
    main()
