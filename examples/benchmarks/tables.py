"""A result as tables, one for each mode: for the terminal and in Markdown."""

from collections.abc import Iterator

from rich.table import Table

from benchmarks.results import Ratios, Row, Run, Timing
from benchmarks.workloads import Mode

PEERS = ("lax", "torch")
MISSING = "-"


def table(run: Run, mode: Mode) -> Table:
    """For the terminal."""
    made = Table(
        title=mode, caption=summary(run, mode), title_justify="left", caption_justify="left"
    )
    for name in headings(run):
        made.add_column(name, justify="left" if name in LEFT else "right", no_wrap=True)
    for row in run.of_mode(mode):
        made.add_row(*cells(run, row))
    return made


def markdown(run: Run) -> str:
    """A page with all tables."""
    names = headings(run)
    rule = ["---" if name in LEFT else "--:" for name in names]
    in_flight = run.settings.get("in_flight", 1)
    parts = [
        PAGE.format(
            command=run.settings["command"],
            description=description(run),
            together=f" after {in_flight} have been started" if in_flight > 1 else "",
            **peaks(run),
        )
    ]
    if any(row.workload.transposed for row in run.rows):
        parts.append(TRANSPOSED)
    if len(run.rows) < (rows := run.settings.get("rows", 0)):
        parts.append(f"**The run was stopped after {len(run.rows)} of {rows} rows.**")
    for mode in run.modes:
        lines = [names, rule, *(cells(run, row) for row in run.of_mode(mode))]
        parts.append(f"## {mode}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
        parts.append(summary(run, mode))
    if notes := "\n".join(f"- {note}" for note in left_out(run)):
        parts.append("## Left out\n\n" + notes)
    return "\n\n".join(parts) + "\n"


def description(run: Run) -> str:
    """The device and the versions, in a line."""
    at = run.environment
    device = f"{at['cpu']}, {at['cores']} cores"
    if at["platform"] != "cpu":
        device = f"{at['device_kind']} ({device})"
    versions = [f"{name} {at[name]}" for name in ("jax", "torch") if at[name]]
    return f"{device}; {run.settings['dtype']}; {', '.join(versions)}; {at['date'][:10]}"


def peaks(run: Run) -> dict[str, str]:
    """What the roofline is made of."""
    return {
        "gflops": f"{run.roofline.flops_per_second / 1e9:,.0f}",
        "gigabytes": f"{run.roofline.bytes_per_second / 1e9:,.0f}",
    }


def summary(run: Run, mode: Mode) -> str:
    """The means of the ratios, and the smallest ones."""
    found = ((peer, run.ratios(mode, peer)) for peer in PEERS)
    return "; ".join(_summary(peer, ratios) for peer, ratios in found if ratios)


def _summary(peer: str, ratios: Ratios) -> str:
    return (
        f"{peer}/ours: geometric mean {_ratio(ratios.geometric_mean)}, "
        f"smallest {_ratio(ratios.smallest)} ({ratios.workload})"
    )


def left_out(run: Run) -> Iterator[str]:
    """Who was not timed where, and why; the same reason once."""
    where: dict[tuple[str, str], list[str]] = {}
    for row in run.rows:
        for name, reason in row.left_out.items():
            where.setdefault((name, reason), []).append(f"{row.workload.name} {row.mode}")
    for (name, reason), rows in where.items():
        places = "everywhere" if len(rows) == len(run.rows) else f"in {', '.join(rows)}"
        yield f"{name} {places}: {reason}"


LEFT = ("workload", "implementation")
"""Columns of words."""


def headings(run: Run) -> list[str]:
    """Of the columns."""
    return [
        "workload",
        *(f"{name.removeprefix('ours:')} ms" for name in _timed(run)),
        "lax/ours",
        "torch/ours",
        "spread",
        "roofline",
        "implementation",
        "compile s",
    ]


def cells(run: Run, row: Row) -> list[str]:
    """Of a line."""
    ours = row.timing("ours")
    return [
        row.workload.name,
        *(_milliseconds(row.timing(name)) for name in _timed(run)),
        *(_ratio(row.ratio(peer)) for peer in PEERS),
        f"{ours.spread:.0%}" if ours and ours.calls > 1 else MISSING,
        f"{row.roofline_fraction:.0%}" if row.roofline_fraction else MISSING,
        _chosen(ours),
        f"{ours.compile_seconds:.1f}" if ours and ours.compile_seconds else MISSING,
    ]


def _timed(run: Run) -> list[str]:
    """Who has a column."""
    return ["ours", *PEERS, *(f"ours:{name}" for name in run.settings["implementations"])]


def _milliseconds(timing: Timing | None) -> str:
    return MISSING if timing is None else three_digits(1000 * timing.median)


def _ratio(ratio: float | None) -> str:
    return MISSING if ratio is None else three_digits(ratio)


def three_digits(number: float) -> str:
    """Such as 9,156, 12.3 and 0.0456."""
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:#.3g}"


def _chosen(timing: Timing | None) -> str:
    """The names of the implementations: one if they are all the same."""
    names = list(timing.implementations.values()) if timing else []
    if not names:
        return MISSING
    return names[0] if len(set(names)) == 1 else " / ".join(names)


PAGE = """\
# Milliseconds of a call, by this library, lax and PyTorch

{description}. Made by

```sh
{command}
```

Medians of interleaved calls in one process, after a few that are not timed, compilation apart;
each is waited for{together}. `lax` is `lax.conv_general_dilated` and its own gradients, of which
only the wanted one is computed; `torch` is the faster one of PyTorch's two memory formats, its
arrays lying in that format before. All that are shown have been found to compute the same.
`training` is the output and both gradients of one call. A ratio is the time of the other by ours:
more than 1 is faster than the other. `spread` is the distance of ours' quartiles in shares of the
median, `roofline` the share of ours' time that the machine would need if it did all arithmetic at
the speed of a large matrix product ({gflops} GFLOP/s) or moved each array once at the speed of a
large copy ({gigabytes} GB/s), whichever takes longer (measured at one moment of a machine that may
be shared, and of arrays larger than its caches: more than 100% is possible); `implementation` is
what the library has chosen by itself (for training: of fprop / dgrad / wgrad)."""
"""Of Markdown, before the tables."""

TRANSPOSED = """\
These are transposed convolutions: `fprop` is `grouped_conv_transpose`, computed as the input's
gradient of a convolution, and its own gradients are the other two contractions of that one.
`lax` is `lax.conv_general_dilated` with `lhs_dilation`, since `lax.conv_transpose` takes no groups;
`torch` is `conv_transpose2d`."""
