"""Kernels in the layouts of libraries, and layers that take them."""

from typing import Any

import numpy as np
import oracle
from cases import random

# Written out for two spatial dimensions, as the libraries document them.
TRANSPOSED = "transposed "


STRIDES = (2, 3)


def kernel_of(letters: str, groups: int, inputs: int, outputs: int, dtype: Any = np.int64):
    """A random kernel of a layer with so many groups, and inputs and outputs of each."""
    axes = letters.removeprefix(TRANSPOSED)
    if axes != letters:
        inputs, outputs = outputs, inputs
    sizes = {"G": groups, "I": inputs, "D": 2, "H": 3, "W": 2}
    sizes["O"] = outputs if "G" in axes else groups * outputs
    return random(letters, tuple(sizes[letter] for letter in axes), dtype)


def layer(x: np.ndarray, kernel: np.ndarray, letters: str, groups: int) -> np.ndarray:
    """A convolution (NCHW) of the input spread out, by the definitions: as `letters` read it."""
    axes = letters.removeprefix(TRANSPOSED)
    transposed = letters[: -len(axes)]
    if "G" in axes:
        missing = "".join(letter for letter in "OI" if letter not in axes)
        kernels = np.moveaxis(kernel, axes.index("G"), 0)
        kernels = kernels.reshape(groups, *[1] * len(missing), *kernels.shape[1:])
        rest = transposed + missing + axes.replace("G", "")
        parts = zip(np.split(x, groups, 1), kernels, strict=True)
        return np.concatenate([layer(part, k, rest, 1) for part, k in parts], 1)
    sizes = dict(zip(axes, kernel.shape, strict=True))
    spatial = "".join(letter for letter in "DHW" if letter in axes)
    steps = dict(zip(spatial, (*STRIDES, 1), strict=False))
    image = f"NC{spatial}"
    # Strides and paddings are in the order of the kernel's letters.
    order = [letter for letter in axes if letter in spatial]
    strides = tuple(steps[letter] for letter in order)
    common = dict(dimension_numbers=(image, axes, image), feature_group_count=groups)
    if not transposed:
        full = [(sizes[letter] - 1,) * 2 for letter in order]
        ones = (1,) * len(order)
        return oracle.forward(
            x, kernel, window_strides=ones, padding=full, lhs_dilation=strides, **common
        )
    # The gradient of a convolution with strides, of an input so large that nothing is left over.
    spread = [
        (n - 1) * steps[letter] + sizes[letter]
        for n, letter in zip(x.shape[2:], spatial, strict=True)
    ]
    shape = (len(x), groups * sizes["I"], *spread)
    return oracle.input_gradient(
        x, kernel, shape, window_strides=strides, padding="VALID", **common
    )


def image_of(groups: int, inputs: int, rank: int = 2) -> np.ndarray:
    return random("image", (2, groups * inputs, *(4, 3, 2)[:rank]), np.int64)
