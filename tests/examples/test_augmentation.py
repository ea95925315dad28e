"""What is done to images on their device, against NumPy."""

import itertools

import jax
import numpy as np
import pytest

from alexnet.data.augmentation import Preprocessing
from alexnet.data.statistics import Statistics
from alexnet.errors import UsageError

SIZE, CROP = 10, 8

IMAGE = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)

STATISTICS = Statistics(
    mean_image=np.linspace(0, 255, SIZE * SIZE * 3, dtype=np.float32).reshape(SIZE, SIZE, 3),
    std=np.asarray([10, 20, 40], np.float32),
    eigenvalues=np.asarray([0.2, 0.02, 0.005], np.float32),
    eigenvectors=np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0].astype(np.float32),
)


@pytest.fixture(params=["standard", "mean"])
def prepared(request) -> Preprocessing:
    return Preprocessing.of(STATISTICS, request.param)


def whole(prepared: Preprocessing) -> np.ndarray:
    """The image, normalized before it is cropped, in float64."""
    return (IMAGE - prepared.mean.astype(np.float64)) / prepared.std


def test_the_paper_subtracts_the_mean_image_and_nothing_else():
    prepared = Preprocessing.of(STATISTICS, "mean")
    np.testing.assert_array_equal(prepared.std, np.ones(3))
    np.testing.assert_allclose(whole(prepared), IMAGE - STATISTICS.mean_image.astype(np.float64))
    usual = Preprocessing.of(STATISTICS, "standard")
    np.testing.assert_allclose(usual.mean, STATISTICS.mean_image.mean((0, 1)), rtol=1e-6)


def crops(image: np.ndarray) -> dict[tuple[int, int, bool], np.ndarray]:
    return {
        (top, left, flip): image[top : top + CROP, left : left + CROP][:, :: -1 if flip else 1]
        for top, left, flip in itertools.product(range(3), range(3), (False, True))
    }


@pytest.mark.parametrize("flip", [False, True])
def test_every_crop_and_its_mirror_image_comes_up(prepared, flip):
    keys = jax.random.split(jax.random.key(0), 300)

    def view(key):
        return prepared.random_view(IMAGE, key, CROP, flip=flip, colour=0.0)

    expected, seen = crops(whole(prepared)), set()
    for found in np.asarray(jax.vmap(view)(keys)):
        (which,) = (at for at, crop in expected.items() if np.allclose(crop, found, atol=1e-4))
        seen.add(which)
    assert len(seen) == (18 if flip else 9)
    assert any(mirrored for _, _, mirrored in seen) == flip


def test_the_middle(prepared):
    expected = crops(whole(prepared))[1, 1, False]
    np.testing.assert_allclose(prepared.middle(IMAGE, CROP), expected, rtol=1e-5, atol=1e-4)


def test_ten_crops(prepared):
    every = crops(whole(prepared))
    places = [(0, 0), (0, 2), (2, 0), (2, 2), (1, 1)]
    expected = [every[(*at, flip)] for flip in (False, True) for at in places]
    np.testing.assert_allclose(prepared.ten_crops(IMAGE, CROP), expected, rtol=1e-5, atol=1e-4)


def test_colours_are_shifted_along_the_principal_components(prepared):
    """Section 4.1: p1 a1 l1 + p2 a2 l2 + p3 a3 l3 is added to every pixel, a ~ N(0, 0.1²)."""
    count = 4000
    flat = np.zeros((CROP, CROP, 3), np.uint8)
    plain = prepared._replace(mean=np.zeros(3, np.float32))

    def view(key):
        return plain.random_view(flat, key, CROP, flip=True, colour=0.1)

    keys = jax.random.split(jax.random.key(3), count)
    views = np.asarray(jax.vmap(view)(keys), np.float64)
    assert np.ptp(views, axis=(1, 2)).max() == 0  # The same for every pixel.
    shifts = views[:, 0, 0] * prepared.std / 255
    along = shifts @ STATISTICS.eigenvectors.astype(np.float64) / STATISTICS.eigenvalues
    assert np.abs(along.mean(0)).max() < 5 * 0.1 / np.sqrt(count)
    np.testing.assert_allclose(along.std(0), 0.1, rtol=5 / np.sqrt(2 * count))
    # What is drawn for the one says nothing of the other, nor of the crop and the mirror.
    ramp = np.broadcast_to(np.arange(SIZE, dtype=np.uint8)[:, None, None], (SIZE, SIZE, 3))
    ramp = ramp * 16 + np.arange(SIZE, dtype=np.uint8)[:, None]
    plain = plain._replace(std=np.ones(3, np.float32))

    def where(key):
        return plain.random_view(ramp, key, CROP, flip=True, colour=0.0)

    corner = np.asarray(jax.vmap(where)(keys))[:, 0, (0, -1), 0]
    top, left = corner.min(1) // 16, corner.min(1) % 16
    drawn = np.column_stack([along, top, left, corner[:, 0] > corner[:, 1]])
    assert {len(np.unique(column)) for column in drawn.T[3:]} == {3, 2}
    assert np.abs(np.corrcoef(drawn.T) - np.eye(6)).max() < 5 / np.sqrt(count)


def test_it_is_saved_and_loaded(prepared, tmp_path):
    prepared.save(tmp_path / "saved.npz")
    for before, after in zip(prepared, Preprocessing.load(tmp_path / "saved.npz"), strict=True):
        np.testing.assert_array_equal(before, after)
        assert after.dtype == np.float32
    (tmp_path / "saved.npz").write_bytes(b"not one")
    with pytest.raises(UsageError, match=r"cannot read .*saved\.npz"):
        Preprocessing.load(tmp_path / "saved.npz")
    with pytest.raises(UsageError, match=r"cannot read .*none\.npz"):
        Preprocessing.load(tmp_path / "none.npz")
