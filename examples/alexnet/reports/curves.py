"""The curves of a run: loss, errors and learning rate by step, from what `metrics` recorded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

TRAIN, TEST, GREY = "#4477aa", "#cc6633", "#777777"

MEAN_SHARE = 1 / 40
"""Of the training points, how many a running mean is of."""

LOG_FROM, LOG_DECADES = 10, 4
"""A learning rate that spans more than this factor has a log scale, of so many decades at most."""


def save_curves(path: Path, metrics: Sequence[dict[str, Any]]) -> None:
    """Draws what `metrics.read_metrics` gives; the suffix of `path` names the format, as .png.

    Training is drawn as faint points and their running mean, tests as points on a line. A run
    without some of the numbers has a panel that says so.
    """
    with matplotlib.rc_context({"figure.dpi": 100}):
        draw_curves(metrics).savefig(path)


def draw_curves(metrics: Sequence[dict[str, Any]]) -> Figure:
    """Three panels, one below the other, over the same steps."""
    figure = Figure(figsize=(8, 9), layout="constrained", facecolor="white")
    loss, error, rate = figure.subplots(3, sharex=True, gridspec_kw={"height_ratios": (3, 3, 1.5)})
    _draw_training(loss, metrics, "loss", "training")
    _draw_tests(loss, metrics, "loss", "test", "-")
    loss.set_ylabel("loss (nats per image)")
    _draw_training(error, metrics, "top1_error", "training top-1")
    _draw_tests(error, metrics, "top1_error", "test top-1", "-")
    _draw_tests(error, metrics, "top5_error", "test top-5", "--")
    error.set_ylabel("error (% of images)")
    error.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=""))
    _draw_learning_rate(rate, metrics)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step (batches)")
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))
    rate.set_xlim(0, 1.02 * max((line["step"] for line in metrics), default=1) or 1)
    for axes in (loss, error, rate):
        axes.grid(alpha=0.3)
        if not axes.lines:
            axes.text(0.5, 0.5, "not recorded", color=GREY, ha="center", transform=axes.transAxes)
            axes.set_yticks([])
    for axes in (loss, error):
        if axes.lines:
            axes.set_ylim(0, 1.05 * axes.dataLim.ymax or 1)
            # Above, where it hides nothing.
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
    return figure


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Of each value, `reach` before it and `reach` after it, or as many as there are."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    index = np.arange(len(values))
    starts = np.maximum(index - reach, 0)
    ends = np.minimum(index + reach + 1, len(values))
    return (total[ends] - total[starts]) / (ends - starts)


def _draw_training(axes: Axes, metrics: Sequence[dict[str, Any]], name: str, label: str) -> None:
    steps, values = _series(metrics, "train", name)
    if len(steps):
        mean = running_mean(values, round(len(values) * MEAN_SHARE / 2))
        axes.plot(steps, values, ".", color=TRAIN, alpha=0.2, markeredgewidth=0, zorder=1)
        # One point has no line to be seen by.
        axes.plot(
            steps, mean, marker="o" if len(steps) == 1 else None, color=TRAIN, label=label, zorder=2
        )


def _draw_tests(
    axes: Axes, metrics: Sequence[dict[str, Any]], name: str, label: str, style: str
) -> None:
    steps, values = _series(metrics, "eval", name)
    if len(steps):
        axes.plot(steps, values, style, marker="o", markersize=4, color=TEST, label=label, zorder=3)


def _draw_learning_rate(axes: Axes, metrics: Sequence[dict[str, Any]]) -> None:
    steps, values = _series(metrics, "train", "learning_rate")
    if not len(steps):
        return
    axes.plot(steps, values, color=GREY, marker="o" if len(steps) == 1 else None)
    positive = values[values > 0]
    if len(positive) and positive.max() > LOG_FROM * positive.min():
        # A warm-up from 0 and a cosine to 0 have no logarithm at their ends.
        axes.set_yscale("log", nonpositive="mask")
        lowest = max(positive.min(), positive.max() * 10.0**-LOG_DECADES)
        axes.set_ylim(lowest / 1.5, positive.max() * 1.5)
    else:
        axes.set_ylim(bottom=0)


def _series(
    metrics: Sequence[dict[str, Any]], kind: str, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one number, where it was recorded and finite."""
    lines = [line for line in metrics if line.get("kind") == kind and name in line]
    steps = np.array([line["step"] for line in lines], np.int64)
    values = np.array([line[name] for line in lines], np.float64)
    finite = np.isfinite(values)
    return steps[finite], values[finite]
