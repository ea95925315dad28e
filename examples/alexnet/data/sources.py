"""Where images come from: what all sources have in common, how a file is decoded, and `load`.

A source gives its images by their number, one at a time, so that a set larger than the memory can
be trained on in any order and by several worker processes. The images are somewhat larger than the
net's input, so that a random crop of each can be taken (as in the paper, 224 pixels out of 256).
The sources are in modules of their own, which import what only they need.
"""

import dataclasses
import hashlib
import warnings
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from alexnet.errors import UsageError

TEST_SHARE = 0.2
"""Of the images that are not divided yet, those that are kept for testing."""

KNOWN = '"digits", "photos", "synthetic[:N]", "folder:DIR", "records:DIR" or "tfds:NAME"'

# Pillow warns of odd metadata, which many of a million photographs have.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL(\.|$)")


class DamagedImage(Exception):
    """An image that cannot be decoded; the message says why."""


class Source(Protocol):
    """Images by their number, and their labels. Worker processes get it pickled."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of every image: (size, size, channels)."""
        ...

    @property
    def in_memory(self) -> bool:
        """Whether an image costs so little that worker processes would only be in the way."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """An image, uint8 (size, size, channels), and its label.

        Raises:
          DamagedImage: it cannot be decoded.
        """
        ...

    def name(self, index: int) -> str:
        """What a message calls the image: its file or its record."""
        ...


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training and test images that have nothing in common, and what the labels mean."""

    train: Source
    test: Source
    classes: tuple[str, ...]
    channels: int
    flip: bool
    """Whether an image seen in a mirror is one of the same class."""
    fingerprint: str
    """A short hash of what the examples are: of names, file sizes and labels, or of the pixels."""

    @property
    def size(self) -> int:
        """Of every image, in pixels."""
        return self.train.shape[0]


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images (N, size, size, channels), uint8, and labels (N,) in memory."""

    images: np.ndarray
    labels: np.ndarray
    kind: str

    in_memory = True

    @property
    def shape(self) -> tuple[int, int, int]:
        _, height, width, channels = self.images.shape
        return height, width, channels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])

    def name(self, index: int) -> str:
        return f"image {index} of {self.kind}"


@dataclasses.dataclass(frozen=True)
class Subset:
    """Those images of a source that have the given numbers (N,), in that order."""

    source: Source
    numbers: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.source.shape

    @property
    def in_memory(self) -> bool:
        return self.source.in_memory

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.source[int(self.numbers[index])]

    def name(self, index: int) -> str:
        return self.source.name(int(self.numbers[index]))


def load(name: str, size: int, seed: int) -> Dataset:
    """The data set that `--data` names, its images scaled to `size` pixels.

    The seed chooses the images to test with, where the set does not say which.

    Raises:
      UsageError: there is no such data set, or no images in the folder.
    """
    kind, _, rest = name.partition(":")
    if name in ("digits", "photos"):
        from alexnet.data import packaged

        return packaged.digits(size, seed) if name == "digits" else packaged.photos(size, seed)
    if kind == "synthetic":
        from alexnet.data import synthetic

        return synthetic.parse(rest, size, seed)
    if kind == "folder" and rest:
        from alexnet.data import folder

        return folder.load(Path(rest), size, seed)
    if kind == "records" and rest:
        from alexnet.data import records

        return records.load(Path(rest), size)
    if kind == "tfds" and rest:
        from alexnet.data import tensorflow_records

        return tensorflow_records.load(rest, size)
    raise UsageError(f'--data must be {KNOWN}, got "{name}"')


def read_image(file: Path | BytesIO, size: int, channels: int = 3) -> np.ndarray:
    """The central square of an image, its edge scaled to `size`: uint8 (size, size, channels).

    A large JPEG is decoded at a half, a quarter or an eighth of its size where that is enough, in
    a fraction of the time. Whether the camera was held upright (EXIF) is not looked at, as by
    those who trained on ImageNet before.

    Raises:
      DamagedImage: it cannot be decoded.
    """
    mode = {1: "L", 3: "RGB"}[channels]
    try:
        with Image.open(file) as image:
            image.draft(mode, (size, size))
            image.load()
            pixels = _in_mode(image, mode)
    except UnidentifiedImageError as error:
        raise DamagedImage("not an image, or of an unknown kind") from error
    except MemoryError:
        raise
    except Exception as error:
        # Of bytes that are no image Pillow raises many kinds: OSError, SyntaxError, ValueError ...
        raise DamagedImage(str(error) or type(error).__name__) from error
    edge = min(pixels.size)
    left, top = ((length - edge) / 2 for length in pixels.size)
    square = (left, top, left + edge, top + edge)
    scaled = pixels.resize((size, size), Image.Resampling.BILINEAR, square)
    return np.asarray(scaled).reshape(size, size, channels)


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow would cut the values off at 255.
        image = Image.fromarray(np.uint8(np.asarray(image) >> 8))
    if image.mode == "P" and "transparency" in image.info:
        # Pillow asks for it by a warning.
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def fingerprint(*parts: bytes | str | np.ndarray) -> str:
    """A short hash of all that is given."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        data = np.ascontiguousarray(data).tobytes() if isinstance(data, np.ndarray) else data
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()[:16]


def held_out(source: Source, labels: np.ndarray, seed: int) -> tuple[Subset, Subset]:
    """The images to train with and those to test with: a share of every class, by the seed."""
    from sklearn.model_selection import train_test_split

    test_count = max(round(TEST_SHARE * len(labels)), len(np.unique(labels)))
    train, test = train_test_split(
        np.arange(len(labels)), test_size=test_count, stratify=labels, random_state=seed
    )
    return Subset(source, np.sort(train)), Subset(source, np.sort(test))
