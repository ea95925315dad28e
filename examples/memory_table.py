"""Tabulates the temporary memory of convolutions and their gradients, here and in lax.

python examples/memory_table.py
python examples/memory_table.py --dtypes float16 --calls depthwise_x4

Each contraction is compiled for the default device by this library's own choice and by lax, and
XLA's figures are read off: nothing is run. All of them take about half an hour on two cores.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks import machine
from benchmarks.memory import CALLS, CONTRACTIONS, DTYPES, Need, need

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Options:
    """Tabulates the temporary memory of convolutions and their gradients, here and in lax."""

    dtypes: tuple[str, ...] = tuple(DTYPES)
    """Dtypes of the operands."""

    calls: tuple[str, ...] = tuple(CALLS)
    """Names of convolutions."""

    results: Path = ROOT / "benchmarks" / "cpu-memory.json"
    """The JSON file to write."""

    page: Path = ROOT / "docs" / "memory_table.md"
    """The Markdown file to write."""

    from_results: bool = False
    """Compile nothing, but write the page of what is in the JSON file."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = tyro.cli(Options, args=arguments)
    for given, known in ((options.dtypes, DTYPES), (options.calls, CALLS)):
        if unknown := [name for name in given if name not in known]:
            print(f"error: unknown {unknown[0]!r}; known: {', '.join(known)}", file=sys.stderr)
            sys.exit(2)
    if not options.from_results:
        save(options.results, measured(options))
    saved = json.loads(options.results.read_text())
    needs = [Need(**row) for row in saved["needs"]]
    options.page.write_text(page(saved["environment"], needs))
    print(f"wrote {options.results} and {options.page}")


def measured(options: Options) -> list[Need]:
    """Compiles everything, and prints a line for each contraction."""
    needs = []
    for dtype in options.dtypes:
        for name in options.calls:
            for contraction in CONTRACTIONS:
                found = need(name, dtype, contraction)
                print(f"{name} {dtype} {contraction}: {cell(found)}", flush=True)
                needs.append(found)
    return needs


def save(path: Path, needs: Sequence[Need]) -> None:
    environment = machine.environment()
    kept = {name: environment[name] for name in ("date", "platform", "cpu", "cores", "jax")}
    rows = ",\n".join(json.dumps(dataclasses.asdict(n)) for n in needs)
    path.write_text(f'{{\n"environment": {json.dumps(kept)},\n"needs": [\n{rows}\n]\n}}\n')


def page(environment: dict[str, Any], needs: Sequence[Need]) -> str:
    """A table for each contraction."""
    parts = [PAGE.format(**environment, worst=_worst(needs), count=len(needs))]
    dtypes = list(dict.fromkeys(n.dtype for n in needs))
    by_key = {(n.call, n.dtype, n.contraction): n for n in needs}
    for contraction in CONTRACTIONS:
        lines = [["convolution", *dtypes], ["---", *["--:"] * len(dtypes)]]
        for name in dict.fromkeys(n.call for n in needs):
            row = (by_key.get((name, dtype, contraction)) for dtype in dtypes)
            lines.append([name, *(cell(n) if n else "-" for n in row)])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"## {contraction}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def cell(found: Need) -> str:
    """Ours and lax's in shares of the arrays, and who computes it here."""
    ours, lax = (f"{size / found.arrays:.2f}" for size in (found.ours, found.lax))
    return f"{ours} / {lax} {found.implementation}"


def _worst(needs: Sequence[Need]) -> str:
    worst = max(needs, key=lambda n: n.ours / n.arrays)
    more = sum(n.ours > n.lax + n.arrays // 100 for n in needs)
    return (
        f"The largest share here is {worst.ours / worst.arrays:.2f} ({worst.call}, {worst.dtype}, "
        f"{worst.contraction}; lax {worst.lax / worst.arrays:.2f}). In {more} of {len(needs)} "
        "contractions this library stores more than lax, by more than a hundredth of the arrays."
    )


PAGE = """\
# Temporary memory: a table

This page compares what XLA allocates for one contraction beside its operands and its result, in
shares of the size of those arrays: "0.50 / 2.00 taps" is half of the arrays here, computed by
`"taps"`, and twice the arrays in lax. XLA reports these figures (`memory_analysis`) for {platform}
programs of jax {jax}; nothing was run. The native kernels allocate working memory of their own,
which XLA does not see: [Memory](memory.md) has its bound. Integers have no gradients in lax; the
figures are those of the convolutions that lax's rules would make. Operands of int8 have int32
results.

{worst}

This command makes the page:

```sh
python examples/memory_table.py
```"""


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
