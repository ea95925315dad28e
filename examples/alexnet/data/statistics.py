"""The mean and the principal colours of the training images.

The paper subtracts the mean image, and varies colours along the eigenvectors of the covariance of
red, green and blue.
"""

from typing import NamedTuple

import numpy as np

from alexnet.data.pipeline import evaluation_batches
from alexnet.data.sources import Source, Subset
from alexnet.errors import UsageError

IMAGES = 10_000
BATCH = 32


class Statistics(NamedTuple):
    """Statistics of images of C channels; all float32."""

    mean_image: np.ndarray
    """(size, size, C), from 0 to 255."""
    std: np.ndarray
    """(C,): the deviation of the values of all pixels, at least 1."""
    eigenvalues: np.ndarray
    """(C,): of the covariance of the values scaled to 0 to 1, the largest first."""
    eigenvectors: np.ndarray
    """(C, C): a column for each eigenvalue, its largest component positive."""


def statistics(train: Source, *, images: int = IMAGES, workers: int) -> Statistics:
    """Returns the statistics of training images, or of some of them, always the same ones.

    Args:
      train: the images.
      images: number of them that are looked at.
      workers: processes that decode them.

    Raises:
      UsageError: none of the images can be decoded.
    """
    chosen = np.random.default_rng(0).permutation(len(train))[:images]
    source = Subset(train, np.sort(chosen))
    channels = source.shape[-1]
    # Sums of whole numbers below 2**53 are exact in float64, in any order.
    total, products, count = np.zeros(source.shape), np.zeros((channels, channels)), 0
    with evaluation_batches(
        source, batch_size=BATCH, rows=range(BATCH), workers=workers
    ) as batches:
        for batch in batches:
            sound = batch.images[batch.labels >= 0].astype(np.float64)
            total += sound.sum(axis=0)
            flat = sound.reshape(-1, channels)
            products += flat.T @ flat
            count += len(sound)
    if not count:
        raise UsageError(f"none of {len(source)} training images can be decoded")
    pixels = count * source.shape[0] * source.shape[1]
    mean = total.sum((0, 1)) / pixels
    covariance = products / pixels - np.outer(mean, mean)
    eigenvalues, eigenvectors = np.linalg.eigh(covariance / 255**2)
    eigenvalues, eigenvectors = eigenvalues[::-1], eigenvectors[:, ::-1]
    # Libraries choose the sign of an eigenvector differently.
    largest = np.take_along_axis(
        eigenvectors, np.abs(eigenvectors).argmax(0, keepdims=True), axis=0
    )
    return Statistics(
        (total / count).astype(np.float32),
        # Where an image is of one colour, nothing is divided by 0.
        np.sqrt(np.maximum(np.diag(covariance), 1)).astype(np.float32),
        np.maximum(eigenvalues, 0).astype(np.float32),
        (eigenvectors * np.sign(largest)).astype(np.float32),
    )
