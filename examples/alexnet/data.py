"""The images: two sets that come with installed packages, and a folder of one's own.

All of them end as uint8 arrays in memory, somewhat larger than the net's input, so that a random
crop of each can be trained on (as in the paper, 224 pixels out of 256).
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import skimage.data
import sklearn.datasets
from PIL import Image
from sklearn.model_selection import train_test_split

from alexnet.errors import UsageError

TEST_SHARE = 0.2
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

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


@dataclasses.dataclass(frozen=True)
class Split:
    """Images (N, size, size, channels), uint8, and their labels (N,), int32."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training and test images that have nothing in common, and what the labels mean."""

    train: Split
    test: Split
    classes: tuple[str, ...]
    flip: bool
    """Whether an image seen in a mirror is one of the same class."""

    @property
    def channels(self) -> int:
        return self.train.images.shape[-1]


def load(name: str, image_size: int, seed: int) -> Dataset:
    """The data set that `--data` names, its images 8/7 of `image_size` large.

    Raises:
      UsageError: there is no such data set, or no images in the folder.
    """
    size = image_size * 8 // 7
    if name == "digits":
        return digits(size, seed)
    if name == "photos":
        return photos(size, seed)
    if name.startswith("folder:") and name != "folder:":
        return folder(Path(name.removeprefix("folder:")), size, seed)
    raise UsageError(f'--data must be "digits", "photos" or "folder:DIR", got "{name}"')


def digits(size: int, seed: int) -> Dataset:
    """The 1,797 handwritten digits of scikit-learn, 8 pixels wide, enlarged."""
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = np.stack(
        [
            np.asarray(Image.fromarray(np.uint8(image * (255 / 16))).resize((size, size)))
            for image in pixels.reshape(-1, 8, 8)
        ]
    )
    train, test = _held_out(images[..., None], labels, seed)
    return Dataset(train, test, tuple("0123456789"), flip=False)


def photos(size: int, seed: int) -> Dataset:
    """Tiles of ten photographs, each tile labelled by its photograph.

    The tiles of a photograph do not overlap, so that the test tiles show regions of which
    nothing was trained on.
    """
    tiles, labels = [], []
    for label, photograph in enumerate(PHOTOGRAPHS.values()):
        image = Image.fromarray(photograph())
        # Twelve tiles along the shorter edge of every photograph, so that none is rare.
        scale = 12 * size / min(image.size)
        image = image.resize([round(edge * scale) for edge in image.size])
        found = _tiles(np.asarray(image), size)
        tiles.extend(found)
        labels.extend([label] * len(found))
    train, test = _held_out(np.stack(tiles), np.array(labels), seed)
    return Dataset(train, test, tuple(PHOTOGRAPHS), flip=True)


def folder(path: Path, size: int, seed: int) -> Dataset:
    """Images in class folders below `path`, or below `path`/train and `path`/test (or val)."""
    try:
        names = {entry.name for entry in path.iterdir() if entry.is_dir()}
    except OSError as error:
        raise UsageError(f"cannot read the folder {path}: {error.strerror}") from error
    test_name = next((name for name in ("test", "val") if name in names), None)
    if "train" in names and test_name:
        classes, train = _read_classes(path / "train", size)
        test_classes, test = _read_classes(path / test_name, size)
        if unknown := set(test_classes) - set(classes):
            raise UsageError(
                f"{path / test_name} has classes that {path / 'train'} lacks: "
                f"{', '.join(sorted(unknown))}"
            )
        labels = np.array([classes.index(name) for name in test_classes], np.int32)
        return Dataset(train, Split(test.images, labels[test.labels]), classes, flip=True)
    classes, images = _read_classes(path, size)
    scarce = [name for label, name in enumerate(classes) if np.sum(images.labels == label) < 2]
    if scarce:
        raise UsageError(
            f"every class needs two images, one of them to test with; only one in {path}: "
            f"{', '.join(scarce)}"
        )
    train, test = _held_out(images.images, images.labels, seed)
    return Dataset(train, test, classes, flip=True)


def batches(split: Split, batch_size: int, seed: int, epoch: int) -> Iterator[Split]:
    """One epoch in an order of its own; the last images of it that fill no batch are left out."""
    order = np.random.default_rng((seed, epoch)).permutation(len(split))
    for start in range(0, len(split) - batch_size + 1, batch_size):
        chosen = order[start : start + batch_size]
        yield Split(split.images[chosen], split.labels[chosen])


def padded_batches(split: Split, batch_size: int) -> Iterator[Split]:
    """Every image once, in order; the last batch is filled up with images of label -1."""
    for start in range(0, len(split), batch_size):
        images = split.images[start : start + batch_size]
        labels = split.labels[start : start + batch_size]
        missing = batch_size - len(labels)
        yield Split(
            np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0))),
            np.pad(labels, (0, missing), constant_values=-1),
        )


def _held_out(images: np.ndarray, labels: np.ndarray, seed: int) -> tuple[Split, Split]:
    """A share of every class for testing, the same one for a seed."""
    labels = labels.astype(np.int32)
    indices = np.arange(len(labels))
    test_count = max(round(TEST_SHARE * len(labels)), len(np.unique(labels)))
    train, test = train_test_split(
        indices, test_size=test_count, stratify=labels, random_state=seed
    )
    return Split(images[train], labels[train]), Split(images[test], labels[test])


def _tiles(image: np.ndarray, size: int) -> list[np.ndarray]:
    rows, columns = (edge // size for edge in image.shape[:2])
    return [
        image[row * size : (row + 1) * size, column * size : (column + 1) * size]
        for row in range(rows)
        for column in range(columns)
    ]


def _read_classes(path: Path, size: int) -> tuple[tuple[str, ...], Split]:
    files = {
        entry.name: sorted(f for f in entry.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
        for entry in sorted(path.iterdir())
        if entry.is_dir()
    }
    files = {name: found for name, found in files.items() if found}
    if not files:
        raise UsageError(
            f"no images in {path}; there should be a folder for each class with "
            f"{', '.join(sorted(IMAGE_SUFFIXES))} files in it"
        )
    images = [_read(file, size) for found in files.values() for file in found]
    labels = [label for label, found in enumerate(files.values()) for _ in found]
    return tuple(files), Split(np.stack(images), np.array(labels, np.int32))


def _read(file: Path, size: int) -> np.ndarray:
    """The central square of an image, its shorter edge scaled to `size`."""
    try:
        with Image.open(file) as image:
            scale = size / min(image.size)
            width, height = (max(size, round(edge * scale)) for edge in image.size)
            pixels = np.asarray(image.convert("RGB").resize((width, height)))
    except (OSError, Image.DecompressionBombError) as error:
        raise UsageError(f"cannot read the image {file}: {error}") from error
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]
