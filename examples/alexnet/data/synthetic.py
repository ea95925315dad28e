"""Images made on the fly from their number alone, to measure with and to try things out.

Every class is a pattern of smooth waves, which a net can learn; noise lies over it.
"""

import numpy as np

from alexnet.data.sources import Dataset, fingerprint
from alexnet.errors import UsageError

IMAGES, CLASSES = 12_800, 1000
TEST_PART = 5
"""One test image for so many training images."""

WAVE, NOISE = 96, 64
"""Grey levels of a wave along one axis, and of the noise; two waves and the noise are below 256."""

OFFSETS = 2**16
"""Different pieces of noise."""


class SyntheticSource:
    """Image i shows class i modulo the number of classes, either way round.

    Args:
      count: how many images.
      classes: how many classes.
      size: pixels along an edge.
      seed: of the patterns.
      part: of the noise; 0 to train with, 1 to test with.
    """

    in_memory = False

    def __init__(self, count: int, classes: int, size: int, seed: int, part: int):
        self._count = count
        self._seeds = (seed, part)
        self.shape = (size, size, 3)
        draw = np.random.default_rng(seed)
        # Of each class, axis and channel one wave.
        cycles = draw.integers(1, 5, (classes, 2, 1, 3))
        phases = draw.uniform(0, 2 * np.pi, (classes, 2, 1, 3))
        angles = 2 * np.pi * cycles * (np.arange(size) / size)[:, None] + phases
        self._waves = ((WAVE - 1) * (0.5 + 0.5 * np.cos(angles))).astype(np.uint8)
        self._noise = draw.integers(0, NOISE, size * size * 3 + OFFSETS, np.uint8)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        label = index % len(self._waves)
        down, across = self._waves[label]
        draw = np.random.default_rng((*self._seeds, index))
        if draw.random() < 0.5:
            across = across[::-1]
        offset = draw.integers(OFFSETS)
        image = self._noise[offset : offset + down.size * len(down)].reshape(self.shape).copy()
        for channel in range(3):
            image[:, :, channel] += down[:, channel, None] + across[:, channel]
        return image, label

    def name(self, index: int) -> str:
        return f"synthetic image {index}"


def parse(text: str, size: int, seed: int) -> Dataset:
    """The data set of "", "N" or "N:CLASSES".

    Raises:
      UsageError: it is something else.
    """
    numbers = text.split(":") if text else []
    if len(numbers) > 2 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise UsageError(
            "--data synthetic can have the number of images and that of classes behind it, "
            f'as in synthetic:{IMAGES}:{CLASSES}; got "synthetic:{text}"'
        )
    count, classes = (*map(int, numbers), *(IMAGES, CLASSES)[len(numbers) :])
    train = SyntheticSource(count, classes, size, seed, part=0)
    test = SyntheticSource(-(-count // TEST_PART), classes, size, seed, part=1)
    mark = fingerprint("synthetic", f"{count} {classes} {seed}")
    names = tuple(f"pattern {label}" for label in range(classes))
    return Dataset(train, test, names, 3, flip=True, fingerprint=mark)
