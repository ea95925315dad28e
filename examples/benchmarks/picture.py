"""A picture of a result: a panel for each contraction, a bar for each contender and workload."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.results import Run
from benchmarks.tables import description, three_digits
from benchmarks.workloads import Mode, Workload
from drawings.files import save

CONTENDERS = {
    "ours": ("grouped_conv_jax", "#2266aa"),
    "torch": ("PyTorch", "#ee8833"),
    "lax": ("lax.conv_general_dilated", "#bbbbbb"),
}
"""From the top of a group to the bottom: what they are called, and their colours."""

PANELS: Mapping[Mode, str] = {
    "fprop": "output (fprop)",
    "dgrad": "input's gradient (dgrad)",
    "wgrad": "kernel's gradient (wgrad)",
    "training": "all three (training)",
}

MOST_PANELS = 3
"""More do not fit beside each other; training, the last, is mostly the sum of the others."""

SUFFIXES = (".svg", ".png")

GREY = "#666666"
HEADER, ROW = 0.8, 0.48
"""Inches above the panels, and from one workload to the next."""

BAR = 0.27
"""Height of a bar, in shares of a row."""


def save_picture(path: Path, run: Run) -> None:
    """Draws a run; the suffix of `path` names the format, such as .svg or .png."""
    settings: dict[Any, Any] = {"figure.dpi": 100, "font.size": 9}
    with matplotlib.rc_context(settings):
        save(draw_picture(run), path, settings)


def draw_picture(run: Run) -> Figure:
    """The bars of all workloads in the modes that there are."""
    modes = sorted(run.modes, key=list(PANELS).index)[:MOST_PANELS]
    workloads = list(dict.fromkeys(row.workload for row in run.rows))
    height = HEADER + 0.4 + ROW * len(workloads)
    below_header = (0, 0, 1, 1 - HEADER / height)
    figure = Figure(
        figsize=(9, height),
        facecolor="white",
        layout=ConstrainedLayoutEngine(rect=below_header),
    )
    panels = figure.subplots(1, len(modes), sharex=True, sharey=True, squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        _draw_panel(axes, run, mode, workloads)
    panels[0].set_xscale("log")
    panels[0].set_xlim(*_limits(run, modes))
    _draw_labels(panels[0], workloads)
    _draw_header(figure, panels[0], run)
    return figure


def _draw_header(figure: Figure, axes: Axes, run: Run) -> None:
    """What it is, what it was measured on, and the colours."""

    def below_top(inches: float) -> float:
        return 1 - inches / figure.get_figheight()

    title = "Milliseconds of one call, shorter is better (logarithmic)"
    figure.text(0.5, below_top(0.08), title, weight="bold", fontsize=11, ha="center", va="top")
    figure.text(0.5, below_top(0.32), description(run), color=GREY, ha="center", va="top")
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="upper center",
        bbox_to_anchor=(0.5, below_top(0.48)),
        ncols=len(CONTENDERS),
        frameon=False,
    )


def _draw_panel(axes: Axes, run: Run, mode: Mode, workloads: Sequence[Workload]) -> None:
    """One mode: groups of bars, each with its number."""
    rows = {row.workload: row for row in run.of_mode(mode)}
    for place, (name, (title, colour)) in enumerate(CONTENDERS.items()):
        timings = {
            index: timing
            for index, workload in enumerate(workloads)
            if workload in rows and (timing := rows[workload].timing(name))
        }
        if not timings:
            continue
        ys = [index + (place - 1) * BAR for index in timings]
        milliseconds = [1000 * timing.median for timing in timings.values()]
        bars = axes.barh(ys, milliseconds, height=BAR, color=colour, label=title)
        axes.bar_label(
            bars,
            [three_digits(ms) for ms in milliseconds],
            padding=2,
            fontsize=7,
            color="black" if name == "ours" else GREY,
            weight="bold" if name == "ours" else "normal",
        )
    axes.set_title(PANELS[mode], fontsize=9.5)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_labels(axes: Axes, workloads: Sequence[Workload]) -> None:
    """The names of the workloads, what each is, and the numbers below."""
    axes.set_yticks(range(len(workloads)), [workload.name for workload in workloads])
    axes.set_ylim(len(workloads) - 0.45, -0.55)
    for index, (label, workload) in enumerate(zip(axes.get_yticklabels(), workloads, strict=True)):
        label.set_verticalalignment("bottom")
        axes.annotate(
            _geometry(workload),
            (0, index),
            xycoords=axes.get_yaxis_transform(),
            xytext=(-3.5, -2),
            textcoords="offset points",
            color=GREY,
            fontsize=7.5,
            ha="right",
            va="top",
        )
    axes.xaxis.set_major_locator(LogLocator(numticks=9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _geometry(workload: Workload) -> str:
    """Such as 8x56x56, 256 to 256, 3x3 by 2, 32 groups."""
    batch, height, width, inputs = workload.lhs
    *taps, _, outputs = workload.rhs
    word = "up by" if workload.transposed else "by"
    step = f" {word} {workload.window_strides[0]}" if max(workload.window_strides) > 1 else ""
    return (
        f"{batch}x{height}x{width}, {inputs} to {outputs}, {taps[0]}x{taps[1]}{step}, "
        f"{workload.feature_group_count} groups"
    )


def _limits(run: Run, modes: Sequence[Mode]) -> tuple[float, float]:
    """Of the numbers below: all bars can be seen, and there is room for the numbers beside them."""
    shown = (
        1000 * timing.median
        for row in run.rows
        for name in CONTENDERS
        if row.mode in modes and (timing := row.timing(name))
    )
    times = sorted(shown)
    low, high = times[0] / 1.5, times[-1]
    return low, high * (high / low) ** 0.2
