"""What all data sources have in common, and how a file is decoded.

A source gives its images by their number, one at a time. So a set larger than the memory can be
trained on in any order and by several worker processes. The images are somewhat larger than the
net's input, so that a random crop of each can be taken: in the paper, 224 pixels out of 256.
"""

import abc
import dataclasses
import hashlib
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

TEST_SHARE = 0.2
"""The share of the images that is kept for testing, where the set is not divided yet."""

# Pillow warns of odd metadata, which many of a million photographs have.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL(\.|$)")


class DamagedImage(Exception):
    """An image cannot be decoded. The message says why."""


class Source(abc.ABC):
    """Images by their number, and their labels. Worker processes get a source pickled.

    Attributes:
      shape: the shape of every image, (size, size, channels).
      in_memory: whether worker processes would only be in the way of reading an image.
    """

    shape: tuple[int, int, int]
    in_memory = False

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Returns an image, uint8, and its label. Raises DamagedImage if it cannot be decoded."""

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Returns what a message calls the image: its file or its record."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training and test images that have nothing in common, and the names of their classes."""

    train: Source
    test: Source
    classes: tuple[str, ...]
    channels: int
    flip: bool
    """Whether the mirror image of an image is of the same class."""
    fingerprint: str
    """A short hash of the examples: of names, file sizes and labels, or of the pixels."""


class ArraySource(Source):
    """Images (N, size, size, channels), uint8, and labels (N,) in memory."""

    in_memory = True

    def __init__(self, images: np.ndarray, labels: np.ndarray, kind: str):
        self.images, self.labels, self._kind = images, labels, kind
        _, height, width, channels = images.shape
        self.shape = (height, width, channels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])

    def name(self, index: int) -> str:
        return f"image {index} of {self._kind}"


class Subset(Source):
    """The images of a source that have the given numbers (N,), in that order."""

    def __init__(self, source: Source, numbers: np.ndarray):
        self.source, self.numbers = source, numbers
        self.shape, self.in_memory = source.shape, source.in_memory

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.source[int(self.numbers[index])]

    def name(self, index: int) -> str:
        return self.source.name(int(self.numbers[index]))


def read_image(file: Path | BytesIO, size: int, channels: int = 3) -> np.ndarray:
    """Returns the central square of an image, scaled to `size`: uint8 (size, size, channels).

    A large JPEG is decoded at a half, a quarter or an eighth of its size where that is enough, in
    a fraction of the time. The orientation of the camera (EXIF) is ignored, as by others who
    trained on ImageNet.
    """
    mode = {1: "L", 3: "RGB"}[channels]
    try:
        with Image.open(file) as image:
            image.draft(mode, (size, size))
            image.load()
            pixels = _in_mode(image, mode)
    except UnidentifiedImageError as error:
        raise DamagedImage("not an image, or of an unknown kind") from error
    except Exception as error:
        # Pillow raises many kinds for damaged files: OSError, SyntaxError, ValueError ...
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
        # Pillow asks for this step by a warning.
        image = image.convert("RGBA")
    return image.convert(mode)


def fingerprint(*parts: bytes | str | np.ndarray) -> str:
    """Returns a short hash of the parts."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        data = data.tobytes() if isinstance(data, np.ndarray) else data
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()[:16]


def held_out(source: Source, labels: np.ndarray, seed: int) -> tuple[Subset, Subset]:
    """Divides images into those to train on and those to test: a share of every class."""
    from sklearn.model_selection import train_test_split

    test_count = max(round(TEST_SHARE * len(labels)), len(np.unique(labels)))
    train, test = train_test_split(
        np.arange(len(labels)), test_size=test_count, stratify=labels, random_state=seed
    )
    return Subset(source, np.sort(train)), Subset(source, np.sort(test))
