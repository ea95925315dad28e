"""The statistics of the training images are those of NumPy, and kept for the next run."""

import numpy as np
import pytest
from image_folders import damage, save_classes

from alexnet.data import load
from alexnet.data.sources import ArraySource
from alexnet.data.statistics import Statistics, statistics
from alexnet.errors import UsageError


def as_source(images: np.ndarray) -> ArraySource:
    return ArraySource(images, np.zeros(len(images), np.int32), "images")


def random_images(channels: int = 3) -> np.ndarray:
    draw = np.random.default_rng(0)
    shades = draw.integers(0, 100, (40, 6, 6, 1))
    return (shades + draw.integers(0, 60, (40, 6, 6, channels))).astype(np.uint8)


def oracle(images: np.ndarray) -> Statistics:
    values = images.astype(np.float64)
    pixels = values.reshape(-1, images.shape[-1])
    covariance = np.cov(pixels / 255, rowvar=False, bias=True).reshape(images.shape[-1:] * 2)
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    return Statistics(values.mean(0), pixels.std(0), eigenvalues[::-1], eigenvectors[:, ::-1])


@pytest.mark.parametrize("channels", [1, 3])
def test_statistics(channels):
    images = random_images(channels)
    ours, expected = statistics(as_source(images), workers=0), oracle(images)
    for array, other in zip(ours[:3], expected[:3], strict=True):
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, other, rtol=1e-5)
    assert ours.eigenvectors.dtype == np.float32
    signs = np.sign((ours.eigenvectors * expected.eigenvectors).sum(0))
    np.testing.assert_allclose(ours.eigenvectors, expected.eigenvectors * signs, atol=1e-5)
    assert (ours.eigenvectors.max(0) >= abs(ours.eigenvectors).max(0)).all()


def test_statistics_of_some_images():
    images = random_images()
    some = statistics(as_source(images), images=10, workers=0)
    again = statistics(as_source(images), images=10, workers=0)
    for array, other in zip(some, again, strict=True):
        np.testing.assert_array_equal(array, other)
    # They are ten of these.
    total = some.mean_image.astype(np.float64) * 10
    np.testing.assert_allclose(total, total.round(), atol=1e-4)
    assert abs(some.mean_image - images[:10].mean(0)).max() > 1


def test_statistics_of_images_of_one_colour():
    images = np.full((4, 5, 5, 3), 200, np.uint8)
    found = statistics(as_source(images), workers=0)
    np.testing.assert_array_equal(found.mean_image, 200)
    np.testing.assert_array_equal(found.std, 1)
    np.testing.assert_array_equal(found.eigenvalues, 0)


def test_damaged_images_do_not_count(tmp_path):
    save_classes(tmp_path / "train", {"a": 6, "b": 5})
    save_classes(tmp_path / "val", {"a": 1})
    damage(tmp_path / "train" / "a" / "3.png", "truncated")
    damage(tmp_path / "train" / "b" / "0.png", "text")
    data = load(f"folder:{tmp_path}", 16, seed=0)
    sound = np.stack([data.train[i][0] for i in range(11) if i not in (3, 6)])
    found = statistics(data.train, workers=0)
    np.testing.assert_allclose(found.mean_image, sound.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.std, oracle(sound).std, rtol=1e-6)


def test_statistics_of_nothing(tmp_path):
    save_classes(tmp_path, {"a": 2, "b": 2})
    for file in tmp_path.rglob("*.png"):
        damage(file, "text")
    with pytest.raises(UsageError, match="none of 2 training images can be decoded"):
        statistics(load(f"folder:{tmp_path}", 8, 0).train, workers=0)
