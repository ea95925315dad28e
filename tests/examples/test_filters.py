"""The picture of the filters of conv1, and how coloured they are."""

import matplotlib.image
import numpy as np
import pytest
from cases import random

from alexnet.reports.filters import colour_saturation, save_filters


def grey(each: int) -> np.ndarray:
    return np.repeat(random("grey", (5, 5, 1, each), np.float64), 3, axis=2)


def coloured(each: int) -> np.ndarray:
    """Red against green: what is brighter in one is darker in the other."""
    pattern = random("colour", (5, 5, 1, each), np.float64)
    return np.concatenate([pattern, -pattern, 0 * pattern], axis=2)


def saturation_by_loops(kernel: np.ndarray, towers: int) -> list[float]:
    """By projection on the direction (1, 1, 1) / sqrt(3), one pixel after the other."""
    height, width, _, features = kernel.shape
    shares = []
    for feature in range(features):
        w = kernel[..., feature] - kernel[..., feature].mean()
        along = sum((w[y, x] @ np.ones(3)) ** 2 / 3 for y in range(height) for x in range(width))
        shares.append(1 - along / np.sum(w**2))
    each = features // towers
    return [float(np.mean(shares[i * each : (i + 1) * each])) for i in range(towers)]


@pytest.mark.parametrize("towers", [1, 2, 4])
def test_saturation_against_loops(towers):
    kernel = random("kernel", (4, 3, 3, 8), np.float64) + 0.7
    found = colour_saturation(kernel, towers)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, saturation_by_loops(kernel, towers), rtol=1e-10)


def test_saturation_of_grey_and_of_pure_colour():
    kernel = np.concatenate([grey(6), coloured(6)], axis=3)
    np.testing.assert_allclose(colour_saturation(kernel, 2), [0, 1], atol=1e-12)
    np.testing.assert_allclose(colour_saturation(kernel[..., ::-1], 2), [1, 0], atol=1e-12)
    # Half of the one tower's filters.
    np.testing.assert_allclose(colour_saturation(kernel, 1), [0.5], atol=1e-12)
    # Neither the contrast of a filter nor its own mean counts.
    np.testing.assert_allclose(colour_saturation(9 * kernel - 4, 2), [0, 1], atol=1e-12)


def test_saturation_of_random_weights():
    kernel = random("many", (11, 11, 3, 96), np.float32)
    np.testing.assert_allclose(colour_saturation(kernel, 2), [2 / 3, 2 / 3], atol=0.02)


@pytest.mark.parametrize("value", [0.0, 0.1, 3.0])
def test_saturation_where_there_is_nothing_to_see(value):
    flat = np.full((5, 5, 3, 4), value, np.float32)
    np.testing.assert_array_equal(colour_saturation(flat, 2), [0, 0])
    # Plain red is a colour.
    flat[:, :, 1:] = value - 1
    np.testing.assert_allclose(colour_saturation(flat, 2), [1, 1])


def test_saturation_of_images_without_colours():
    np.testing.assert_array_equal(
        colour_saturation(random("one channel", (5, 5, 1, 6), np.float32), 2), [0, 0]
    )


def picture(path, kernel, towers) -> np.ndarray:
    save_filters(path, kernel, towers)
    return matplotlib.image.imread(path)[..., :3]


def test_the_towers_are_drawn_one_below_the_other(tmp_path):
    kernel = np.concatenate([grey(6), coloured(6)], axis=3)
    image = picture(tmp_path / "filters.png", kernel, 2)
    colour = np.ptp(image, axis=-1)
    height = len(image)
    assert colour[: height // 2].max() < 0.01 < 0.5 < colour[height // 2 :].max()
    # From dark to bright, in each block.
    for block in (image[: height // 2], image[height // 2 :]):
        assert block.mean(axis=-1).min() < 0.4
    # The first filter is that of the kernel: the same order of brightness.
    filters = kernel[..., 0, 0]
    bright, dark = (np.unravel_index(f, (5, 5)) for f in (filters.argmax(), filters.argmin()))
    left, top, side = first_filter(image)

    def at(position) -> float:
        y, x = (int((p + 0.5) * side / 5) for p in position)
        return float(image[top + y, left + x].mean())

    assert at(dark) < 0.02
    assert at(bright) > 0.98


def first_filter(image: np.ndarray) -> tuple[int, int, int]:
    """Left, top and side of the first square that is not white, below the title."""
    dark = image.mean(axis=-1) < 0.995
    # Pieces of one row of filters are what is dark for long; letters of a title are not.
    rows = np.flatnonzero(dark.mean(axis=1) > 0.5)
    top = int(rows[0])
    side = next(i for i in range(1, len(image)) if not dark[top + i].any())
    left = int(np.flatnonzero(dark[top : top + side].any(axis=0))[0])
    return left, top, side


@pytest.mark.parametrize(("channels", "features", "towers"), [(1, 10, 2), (3, 34, 1), (4, 6, 2)])
def test_other_numbers_of_channels_and_filters(tmp_path, channels, features, towers):
    kernel = random("other", (5, 5, channels, features), np.float32)
    image = picture(tmp_path / "filters.png", kernel, towers)
    # One channel is grey, and so is the mean of more than three.
    assert (np.ptp(image, axis=-1).max() > 0.3) == (channels == 3)
    # Some of every row: 34 filters have three of them, the last with two.
    rows = towers * -(-features // towers // 16)
    starts = np.diff((image.mean(axis=-1) < 0.5).any(axis=1).astype(int)) == 1
    assert starts.sum() >= rows


def test_filters_of_equal_numbers_are_drawn(tmp_path):
    image = picture(tmp_path / "filters.png", np.zeros((3, 3, 3, 2)), 1)
    assert image.min() < 0.02
