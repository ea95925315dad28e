"""Two small sets of images that come with installed packages: handwritten digits and photographs.

They are made at the start and kept in memory.
"""

from collections.abc import Callable

import numpy as np
import skimage.data
import sklearn.datasets
from PIL import Image

from alexnet.data.sources import ArraySource, Dataset, fingerprint, held_out

PHOTOGRAPHS: dict[str, Callable[[], np.ndarray]] = {
    "china": lambda: sklearn.datasets.load_sample_image("china.jpg"),
    "flower": lambda: sklearn.datasets.load_sample_image("flower.jpg"),
    "astronaut": skimage.data.astronaut,
    "cat": skimage.data.chelsea,
    "coffee": skimage.data.coffee,
    "hubble": skimage.data.hubble_deep_field,
    "motorcycle": lambda: skimage.data.stereo_motorcycle()[0],
    "retina": skimage.data.retina,
    "rocket": skimage.data.rocket,
    "tissue": skimage.data.immunohistochemistry,
}

TILES = 12
"""Tiles along the shorter edge of every photograph, so that none is rare."""


def digits(size: int, seed: int) -> Dataset:
    """Returns the 1,797 handwritten digits of scikit-learn, 8 pixels wide, enlarged."""
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = [
        np.asarray(Image.fromarray(np.uint8(image * (255 / 16))).resize((size, size)))
        for image in pixels.reshape(-1, 8, 8)
    ]
    source = ArraySource(np.stack(images)[..., None], labels.astype(np.int32), "digits")
    return _divided(source, tuple("0123456789"), seed, flip=False)


def photos(size: int, seed: int) -> Dataset:
    """Returns tiles of ten photographs, each labelled by its photograph.

    The tiles of a photograph do not overlap, so no pixel of a test tile was trained on.
    """
    found, labels = [], []
    for label, photograph in enumerate(PHOTOGRAPHS.values()):
        image = Image.fromarray(photograph())
        scale = TILES * size / min(image.size)
        width, height = (round(edge * scale) for edge in image.size)
        of_image = tiles(np.asarray(image.resize((width, height))), size)
        found.extend(of_image)
        labels.extend([label] * len(of_image))
    source = ArraySource(np.stack(found), np.array(labels, np.int32), "photos")
    return _divided(source, tuple(PHOTOGRAPHS), seed, flip=True)


def tiles(image: np.ndarray, size: int) -> np.ndarray:
    """Returns the squares that an image divides into, without the rest at its edges."""
    rows, columns, channels = (image.shape[0] // size, image.shape[1] // size, image.shape[2])
    grid = image[: rows * size, : columns * size].reshape(rows, size, columns, size, channels)
    return grid.swapaxes(1, 2).reshape(-1, size, size, channels)


def _divided(source: ArraySource, classes: tuple[str, ...], seed: int, *, flip: bool) -> Dataset:
    train, test = held_out(source, source.labels, seed)
    mark = fingerprint(source.images, source.labels, train.numbers, test.numbers)
    return Dataset(train, test, classes, source.shape[-1], flip, mark)
