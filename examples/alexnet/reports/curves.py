"""The curves of a run: loss, errors and learning rate by step, from the recorded metrics."""

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
"""Window of the running mean, as a share of the training points."""

Lines = Sequence[dict[str, Any]]


def save_curves(path: Path, metrics: Lines) -> None:
    """Draws what `metrics.read_metrics` returns. The suffix of `path` names the format.

    Training is drawn as faint points and their running mean, tests as points on a line.
    """
    with matplotlib.rc_context({"figure.dpi": 100}):
        draw_curves(metrics).savefig(path)


def draw_curves(metrics: Lines) -> Figure:
    """Returns three panels, one below the other, over the same steps."""
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
    for axes in (loss, error, rate):
        axes.grid(alpha=0.3)
    for axes in (loss, error):
        axes.set_ylim(bottom=0)
        if axes.lines:
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
    return figure


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Returns the mean over `reach` values before and after each value, or as many as there are."""
    window = np.ones(2 * reach + 1)
    counts = np.convolve(np.ones(len(values)), window)[reach : reach + len(values)]
    return np.convolve(values, window)[reach : reach + len(values)] / counts


def _draw_training(axes: Axes, metrics: Lines, name: str, label: str) -> None:
    steps, values = _series(metrics, "train", name)
    if len(steps):
        mean = running_mean(values, round(len(values) * MEAN_SHARE / 2))
        axes.plot(steps, values, ".", color=TRAIN, alpha=0.2, markeredgewidth=0, zorder=1)
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, mean, marker=marker, color=TRAIN, label=label, zorder=2)


def _draw_tests(axes: Axes, metrics: Lines, name: str, label: str, style: str) -> None:
    steps, values = _series(metrics, "eval", name)
    if len(steps):
        axes.plot(steps, values, style, marker="o", markersize=4, color=TEST, label=label, zorder=3)


def _draw_learning_rate(axes: Axes, metrics: Lines) -> None:
    steps, values = _series(metrics, "train", "learning_rate")
    axes.plot(steps, values, color=GREY, marker="o" if len(steps) == 1 else None)
    positive = values[values > 0]
    if len(positive) and positive.max() > 10 * positive.min():
        axes.set_yscale("log")


def _series(metrics: Lines, kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and values of one number, where it was recorded and finite."""
    lines = [
        line for line in metrics if line["kind"] == kind and np.isfinite(line.get(name, np.nan))
    ]
    return np.array([line["step"] for line in lines]), np.array([line[name] for line in lines])
