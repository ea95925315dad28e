"""The filters of conv1 by tower: their picture, and how coloured they are (figure 3 of the paper).

Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural
Networks", NeurIPS 2012.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

COLUMNS = 16
"""Most filters side by side."""


def save_filters(path: Path, kernel: Any, towers: int) -> None:
    """Draws the kernels of conv1, (height, width, channels, features), a block for each tower.

    Each filter is scaled by itself, so that its least number is dark and its largest one bright.
    """
    kernel = np.asarray(kernel, np.float32)
    channels, features = kernel.shape[2:]
    each = features // towers
    columns = min(each, COLUMNS)
    rows = -(-each // columns)
    figure = Figure(figsize=(columns * 0.6, towers * (rows * 0.6 + 0.5)), layout="constrained")
    blocks = figure.subfigures(towers, squeeze=False)[:, 0]
    saturations = colour_saturation(kernel, towers)
    for tower, (block, saturation) in enumerate(zip(blocks, saturations, strict=True)):
        coloured = f": colour saturation {saturation:.2f}" if channels > 1 else ""
        block.suptitle(f"tower {tower + 1}{coloured}", fontsize="medium")
        axes = block.subplots(rows, columns, squeeze=False).ravel()
        for axis in axes:
            axis.set_axis_off()
        for axis, index in zip(axes, range(tower * each, (tower + 1) * each), strict=False):
            filters = kernel[..., index]
            image = (filters - filters.min()) / (np.ptp(filters) or 1.0)
            # One channel is drawn in grey; more than three have no colours to be shown in.
            shown = image if channels == 3 else image.mean(axis=-1)
            axis.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    with matplotlib.rc_context({"figure.dpi": 100}):
        figure.savefig(path)


def colour_saturation(kernel: Any, towers: int) -> np.ndarray:
    """Returns how coloured each tower's filters of conv1 are: 0 for grey, 1 for pure colour.

    In figure 3 of the paper one tower's filters are colour-agnostic and the other's
    colour-specific, in every run, whatever the initial weights. This number is near 0 for the one
    and large for the other. A tower's number is the mean over its filters w of

        sum over y, x, c of (v[y, x, c] - g[y, x])²
        -------------------------------------------,  v = w - mean(w),  g[y, x] = mean over c of v
              sum over y, x, c of v[y, x, c]²

    the share of a filter's energy that is not along grey, which is the direction r = g = b. The
    mean is one number for the filter, so that a filter of one plain colour counts as colour. A
    filter of equal numbers counts as grey. Independent random weights in C channels have about
    (C - 1) / C, 2/3 for colours and 0 for images of one channel.
    """
    kernel = np.asarray(kernel, np.float64)
    whole = kernel - kernel.mean((0, 1, 2), keepdims=True)
    colour = whole - whole.mean(axis=2, keepdims=True)
    energy = np.sum(whole**2, axis=(0, 1, 2))
    # The energy of equal numbers is their rounding.
    plain = energy <= 1e-12 * np.sum(kernel**2, axis=(0, 1, 2))
    share = np.sum(colour**2, axis=(0, 1, 2)) / np.where(plain, 1.0, energy)
    return np.where(plain, 0.0, share).reshape(towers, -1).mean(axis=1)
