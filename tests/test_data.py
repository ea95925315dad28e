"""The images that the example trains on: nothing of the test is trained on, errors are told."""

import numpy as np
import pytest
from PIL import Image

from alexnet import data
from alexnet.errors import UsageError


def save_classes(folder, counts, size=(40, 30)):
    draw = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = draw.integers(0, 256, (size[1], size[0], 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


def rows(split: data.Split) -> set[bytes]:
    return {image.tobytes() for image in split.images}


def test_digits():
    digits = data.load("digits", 32, seed=0)
    assert digits.train.images.shape == (1438, 36, 36, 1)
    assert digits.test.images.shape == (359, 36, 36, 1)
    assert digits.train.images.dtype == np.uint8
    assert digits.train.labels.dtype == np.int32
    assert digits.classes == tuple("0123456789")
    assert np.bincount(digits.test.labels).min() > 30
    assert not rows(digits.train) & rows(digits.test)


def test_photos():
    photos = data.load("photos", 32, seed=0)
    assert photos.channels == 3
    assert len(photos.classes) == 10
    assert len(photos.train) > 1000
    assert np.bincount(photos.test.labels).min() > 20
    # Every tile is in one of the two, once; tiles of one colour throughout do look the same.
    plain = [i for i in (*photos.train.images, *photos.test.images) if np.ptp(i) < 8]
    both = rows(photos.train) & rows(photos.test)
    assert both <= {image.tobytes() for image in plain}


def test_tiles_do_not_overlap():
    image = np.arange(7 * 9).reshape(7, 9, 1)
    tiles = data._tiles(image, 3)
    assert [tile.shape for tile in tiles] == [(3, 3, 1)] * 6
    assert len(np.unique(np.stack(tiles))) == 6 * 9


def test_the_split_depends_on_the_seed_only():
    first, again, other = (data.digits(36, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.test.images, again.test.images)
    assert (first.test.labels != other.test.labels).any()


def test_a_folder_of_classes(tmp_path):
    save_classes(tmp_path, {"cat": 10, "dog": 5})
    (tmp_path / "notes.txt").write_text("not a class")
    folder = data.load(f"folder:{tmp_path}", 32, seed=0)
    assert folder.classes == ("cat", "dog")
    assert folder.train.images.shape == (12, 36, 36, 3)
    assert np.bincount(folder.train.labels).tolist() == [8, 4]
    assert np.bincount(folder.test.labels).tolist() == [2, 1]
    assert not rows(folder.train) & rows(folder.test)


def test_a_folder_with_a_test_folder(tmp_path):
    save_classes(tmp_path / "train", {"a": 3, "b": 4, "c": 1})
    save_classes(tmp_path / "val", {"c": 2, "a": 1})
    folder = data.load(f"folder:{tmp_path}", 32, seed=0)
    assert folder.classes == ("a", "b", "c")
    assert np.bincount(folder.train.labels).tolist() == [3, 4, 1]
    assert sorted(folder.test.labels.tolist()) == [0, 2, 2]


def test_an_image_is_scaled_and_its_middle_taken(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = data._read(tmp_path / "wide.png", 10)
    assert image.shape == (10, 10, 3)
    assert image[:, 2:8].min() == 200


def test_grey_and_transparent_images_are_read_as_colour(tmp_path):
    Image.new("L", (8, 8), 7).save(tmp_path / "grey.png")
    Image.new("RGBA", (8, 8), (1, 2, 3, 4)).save(tmp_path / "clear.png")
    assert data._read(tmp_path / "grey.png", 8).shape == (8, 8, 3)
    assert data._read(tmp_path / "clear.png", 8).shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "no images in"),
        (lambda path: path.rmdir(), "cannot read the folder .*: No such file"),
        (lambda path: (path / "class").mkdir(), "no images in"),
        (lambda path: save_classes(path, {"a": 3, "b": 1}), "every class needs two .*: b"),
        (
            lambda path: [
                save_classes(path, {"a": 2}),
                (path / "a" / "broken.png").write_bytes(b"not a picture"),
            ],
            "cannot read the image .*broken.png",
        ),
        (
            lambda path: [
                save_classes(path / "train", {"a": 2}),
                save_classes(path / "test", {"b": 2}),
            ],
            "has classes that .* lacks: b",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(tmp_path, prepare, message):
    folder = tmp_path / "images"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(UsageError, match=message):
        data.load(f"folder:{folder}", 32, seed=0)


def test_unknown_data_is_refused():
    with pytest.raises(UsageError, match='must be "digits", "photos" or "folder:DIR", got "cifar"'):
        data.load("cifar", 32, seed=0)


def test_an_epoch_is_an_order_of_its_own():
    split = data.Split(np.zeros((10, 1, 1, 1), np.uint8), np.arange(10, dtype=np.int32))

    def order(seed, epoch):
        return [b.labels.tolist() for b in data.batches(split, 4, seed, epoch)]

    assert [len(batch) for batch in order(0, 0)] == [4, 4]
    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert len({label for batch in order(0, 0) for label in batch}) == 8
