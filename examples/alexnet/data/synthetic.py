"""Images made on the fly from their number alone, to measure speed and to try things out.

Each class is a pattern of smooth waves, which a net can learn, with noise over it.
"""

import numpy as np

from alexnet.data.sources import Dataset, Source, fingerprint
from alexnet.errors import UsageError

IMAGES, CLASSES = 12_800, 1000
TEST_PART = 5
"""Training images for each test image."""

WAVE, NOISE = 96, 64
"""Grey levels of a wave along one axis, and of the noise. Two waves and the noise are below 256."""

OFFSETS = 2**16
"""Number of different pieces of noise."""


class SyntheticSource(Source):
    """Image i shows class i modulo the number of classes, either way round.

    The seed chooses the patterns, and `part` the noise: 0 to train with, 1 to test with.
    """

    def __init__(self, count: int, classes: int, size: int, seed: int, part: int):
        self._count = count
        self._seeds = (seed, part)
        self.shape = (size, size, 3)
        draw = np.random.default_rng(seed)
        # There is one wave for each class, axis and channel.
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
        image += down[:, None] + across
        return image, label

    def name(self, index: int) -> str:
        return f"synthetic image {index}"


def parse(text: str, size: int, seed: int) -> Dataset:
    """Returns the data set of "", "N" or "N:CLASSES". Raises UsageError for other texts."""
    numbers = text.split(":") if text else []
    if len(numbers) > 2 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise UsageError(
            f"--data synthetic:N:CLASSES takes two numbers, as in synthetic:{IMAGES}:{CLASSES}; "
            f'got "synthetic:{text}"'
        )
    count, classes = (*map(int, numbers), *(IMAGES, CLASSES)[len(numbers) :])
    train = SyntheticSource(count, classes, size, seed, part=0)
    test = SyntheticSource(-(-count // TEST_PART), classes, size, seed, part=1)
    mark = fingerprint("synthetic", f"{count} {classes} {seed}")
    names = tuple(f"pattern {label}" for label in range(classes))
    return Dataset(train, test, names, 3, flip=True, fingerprint=mark)
