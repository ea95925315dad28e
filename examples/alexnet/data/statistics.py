"""What is to be known of the training images before the training: their mean, and their colours.

The paper subtracts the mean image, and varies colours along the eigenvectors of the covariance of
red, green and blue.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alexnet.data.pipeline import evaluation_batches
from alexnet.data.sources import Dataset, Source, Subset
from alexnet.errors import UsageError

IMAGES = 10_000
BATCH = 32


class Statistics(NamedTuple):
    """Of training images of C channels; all float32."""

    mean_image: np.ndarray
    """(size, size, C), from 0 to 255."""
    std: np.ndarray
    """(C,), of the values of all pixels, at least 1."""
    eigenvalues: np.ndarray
    """(C,), of the covariance of the values scaled to 0 to 1, the largest first."""
    eigenvectors: np.ndarray
    """(C, C), a column for each eigenvalue, its largest component positive."""


def statistics(
    dataset: Dataset, *, images: int = IMAGES, workers: int, cache: Path | None
) -> Statistics:
    """The statistics of the training images, or of some of them, always the same ones.

    Args:
      dataset: the images.
      images: how many of them are looked at.
      workers: processes that decode them.
      cache: a folder to keep the result in, for the next run.

    Raises:
      UsageError: none of the images can be decoded.
    """
    count = min(images, len(dataset.train))
    file = cache and cache / f"statistics-{dataset.fingerprint}-{dataset.size}-{count}.npz"
    saved = file and _load(file, dataset.train.shape)
    if saved:
        return saved
    order = np.random.default_rng(0).permutation(len(dataset.train))[:count]
    result = _compute(Subset(dataset.train, np.sort(order)), workers)
    if file:
        _save(file, result)
    return result


def _compute(source: Source, workers: int) -> Statistics:
    # Sums of whole numbers, and below 2**53: exact in float64, in any order.
    channels = source.shape[-1]
    total = np.zeros(source.shape)
    products = np.zeros((channels, channels))
    count = 0
    with evaluation_batches(
        source, batch_size=BATCH, rows=range(BATCH), workers=workers
    ) as batches:
        for batch in batches:
            for image in batch.images[batch.labels >= 0]:
                pixels = image.astype(np.float64)
                total += pixels
                flat = pixels.reshape(-1, channels)
                products += flat.T @ flat
                count += 1
    if not count:
        raise UsageError(f"none of {len(source)} training images can be decoded")
    pixels = count * source.shape[0] * source.shape[1]
    mean = total.sum((0, 1)) / pixels
    covariance = products / pixels - np.outer(mean, mean)
    eigenvalues, eigenvectors = np.linalg.eigh(covariance / 255**2)
    eigenvalues, eigenvectors = eigenvalues[::-1], eigenvectors[:, ::-1]
    # An eigenvector is one up to its sign, which libraries choose differently.
    largest = np.take_along_axis(
        eigenvectors, np.abs(eigenvectors).argmax(0, keepdims=True), axis=0
    )
    return Statistics(
        (total / count).astype(np.float32),
        # Where an image is of one colour, nothing is divided by 0.
        np.maximum(np.sqrt(np.maximum(np.diag(covariance), 0)), 1).astype(np.float32),
        np.maximum(eigenvalues, 0).astype(np.float32),
        (eigenvectors * np.sign(largest)).astype(np.float32),
    )


def _load(file: Path, shape: tuple[int, int, int]) -> Statistics | None:
    """What was saved; None where nothing was, or something else."""
    channels = shape[-1]
    shapes = Statistics(*map(np.empty, (shape, channels, channels, (channels, channels))))
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as saved:
            result = Statistics(*(saved[name] for name in Statistics._fields))
    except Exception:
        # A file that was damaged raises errors of NumPy, of zip and of zlib.
        return None
    for array, expected in zip(result, shapes, strict=True):
        if array.shape != expected.shape or array.dtype != np.float32:
            return None
    return result if all(np.isfinite(array).all() for array in result) else None


def _save(file: Path, result: Statistics) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when it is complete: other processes may be reading, or writing the same.
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".npz", delete=False) as part:
            np.savez(part, **result._asdict())
        Path(part.name).replace(file)
    except OSError:
        # A folder that cannot be written to costs the next run some time, and this one nothing.
        pass
