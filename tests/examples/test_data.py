"""The images that the example trains on: nothing of the test is trained on, errors are told."""

import io
import os
import pickle
import re

import numpy as np
import pytest
from image_folders import damage, images, labels, names, save_classes
from PIL import Image

from alexnet.data import load, packaged
from alexnet.data.sources import DamagedImage, Source, read_image
from alexnet.errors import UsageError


def rows(source: Source) -> set[bytes]:
    return {image.tobytes() for image in images(source)}


def test_digits():
    digits = load("digits", 36, seed=0)
    assert images(digits.train).shape == (1438, 36, 36, 1)
    assert images(digits.test).shape == (359, 36, 36, 1)
    assert images(digits.train).dtype == np.uint8
    assert digits.classes == tuple("0123456789")
    assert digits.channels == 1
    assert np.bincount(labels(digits.test)).min() > 30
    assert not rows(digits.train) & rows(digits.test)


def test_photos():
    photos = load("photos", 36, seed=0)
    assert photos.channels == 3
    assert len(photos.classes) == 10
    assert len(photos.train) > 1000
    assert np.bincount(labels(photos.test)).min() > 20
    # Every tile is in one of the two, once; tiles of one colour throughout do look the same.
    plain = [i for i in (*images(photos.train), *images(photos.test)) if np.ptp(i) < 8]
    both = rows(photos.train) & rows(photos.test)
    assert both <= {image.tobytes() for image in plain}


def test_tiles_do_not_overlap():
    image = np.arange(7 * 9).reshape(7, 9, 1)
    tiles = packaged.tiles(image, 3)
    assert tiles.shape == (6, 3, 3, 1)
    assert len(np.unique(tiles)) == 6 * 9


def test_the_split_depends_on_the_seed_only():
    first, again, other = (load("digits", 36, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(images(first.test), images(again.test))
    assert (labels(first.test) != labels(other.test)).any()
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_a_folder_of_classes(tmp_path):
    save_classes(tmp_path, {"cat": 10, "dog": 5})
    (tmp_path / "notes.txt").write_text("not a class")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / "._0.png").write_text("not one either")
    (tmp_path / "dog" / "0.png").rename(tmp_path / "dog" / "A.PNG")
    (tmp_path / "dog" / "more").mkdir()
    (tmp_path / "dog" / "1.png").rename(tmp_path / "dog" / "more" / "1.png")
    folder = load(f"folder:{tmp_path}", 36, seed=0)
    assert folder.classes == ("cat", "dog")
    assert images(folder.train).shape == (12, 36, 36, 3)
    assert np.bincount(labels(folder.train)).tolist() == [8, 4]
    assert np.bincount(labels(folder.test)).tolist() == [2, 1]
    assert not rows(folder.train) & rows(folder.test)
    found = names(folder.train) + names(folder.test)
    assert sorted(found) == sorted(map(str, tmp_path.rglob("[!.]*.[pP][nN][gG]")))
    for i in range(len(folder.train)):
        assert folder.classes[folder.train[i][1]] in folder.train.name(i)


def test_a_folder_with_a_test_folder(tmp_path):
    save_classes(tmp_path / "train", {"a": 3, "b": 4, "c": 1})
    save_classes(tmp_path / "val", {"c": 2, "a": 1})
    (tmp_path / "test").mkdir()
    folder = load(f"folder:{tmp_path}", 36, seed=0)
    assert folder.classes == ("a", "b", "c")
    assert np.bincount(labels(folder.train)).tolist() == [3, 4, 1]
    assert sorted(labels(folder.test).tolist()) == [0, 2, 2]


def test_a_worker_gets_the_same_folder(tmp_path):
    save_classes(tmp_path, {"Käfig": 3, os.fsdecode(b"\xff"): 3})
    folder = load(f"folder:{tmp_path}", 8, seed=0)
    copy = pickle.loads(pickle.dumps(folder.train))
    assert names(copy) == names(folder.train)
    np.testing.assert_array_equal(images(copy), images(folder.train))


def test_the_fingerprint_of_a_folder_is_of_names_sizes_and_labels(tmp_path):
    def of_folder(size=36, seed=0):
        return load(f"folder:{tmp_path}", size, seed).fingerprint

    save_classes(tmp_path, {"a": 5, "b": 5})
    first = of_folder()
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert of_folder(size=8) == first
    found = {first, of_folder(seed=1)}
    image = tmp_path / "a" / "0.png"
    image.write_bytes(image.read_bytes() + b"0")
    found.add(of_folder())
    image.rename(tmp_path / "a" / "00.png")
    found.add(of_folder())
    (tmp_path / "a").rename(tmp_path / "c")
    found.add(of_folder())
    assert len(found) == 5


def test_an_image_is_scaled_and_its_middle_taken(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = read_image(tmp_path / "wide.png", 10)
    assert image.shape == (10, 10, 3)
    assert image[:, 2:8].min() == 200
    tall = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 0, 2)).save(tall, "PNG")
    np.testing.assert_array_equal(read_image(tall, 10), image.transpose(1, 0, 2))


def test_an_image_of_the_right_size_is_not_changed():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    np.testing.assert_array_equal(read_image(file, 12), pixels)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 7, (7, 7, 7)),
        ("LA", (7, 0), (7, 7, 7)),
        ("RGBA", (1, 2, 3, 4), (1, 2, 3)),
        ("I;16", 7 * 257, (7, 7, 7)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_every_kind_of_image_is_read_as_colour(tmp_path, mode, colour, expected):
    Image.new(mode, (8, 8), colour).save(tmp_path / "image.png")
    image = read_image(tmp_path / "image.png", 8)
    np.testing.assert_array_equal(image, np.full((8, 8, 3), expected, np.uint8))


def test_images_of_few_colours_and_of_printers_are_read(tmp_path):
    palette = Image.new("RGB", (8, 8), (255, 0, 0)).quantize(2)
    palette.save(tmp_path / "palette.png", transparency=b"\x80\xff")
    np.testing.assert_array_equal(
        read_image(tmp_path / "palette.png", 8), np.full((8, 8, 3), (255, 0, 0))
    )
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "cmyk.jpg")
    assert read_image(tmp_path / "cmyk.jpg", 8).min() == 255


def test_colour_is_read_as_grey(tmp_path):
    Image.new("RGB", (8, 8), (0, 255, 0)).save(tmp_path / "green.png")
    image = read_image(tmp_path / "green.png", 8, channels=1)
    # ITU-R 601: green makes 0.587 of the brightness.
    np.testing.assert_array_equal(image, np.full((8, 8, 1), round(0.587 * 255), np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_large_jpeg_looks_the_same_decoded_at_a_part_of_its_size(tmp_path, channels):
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    large = Image.fromarray(small).resize((800, 600))
    large.save(tmp_path / "large.jpg", quality=95)
    large.save(tmp_path / "large.png")
    jpeg, png = (
        read_image(tmp_path / f"large.{kind}", 64, channels).astype(int) for kind in ("jpg", "png")
    )
    assert abs(jpeg - png).mean() < 2


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("truncated", "truncated"),
        ("headless", "not an image"),
        ("empty", "not an image"),
        ("text", "not an image"),
        ("broken png", "not an image"),
        ("missing", "No such file"),
    ],
)
def test_a_damaged_image_is_told_from_others(tmp_path, kind, reason):
    damage(tmp_path / "image.jpg", kind)
    with pytest.raises(DamagedImage, match=reason) as caught:
        read_image(tmp_path / "image.jpg", 8)
    assert str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_damaged_file_and_a_lost_link_do_not_keep_a_folder_from_loading(tmp_path):
    save_classes(tmp_path, {"a": 4, "b": 4})
    damage(tmp_path / "a" / "broken.jpg", "text")
    (tmp_path / "b" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    folder = load(f"folder:{tmp_path}", 8, seed=0)
    damaged = set()
    for source in (folder.train, folder.test):
        for i in range(len(source)):
            try:
                source[i]
            except DamagedImage:
                damaged.add(source.name(i))
    assert damaged == {str(tmp_path / "a" / "broken.jpg"), str(tmp_path / "b" / "lost.png")}


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "no images in"),
        (lambda path: path.rmdir(), "cannot read the folder .*: No such file"),
        (lambda path: (path / "class").mkdir(), "no images in"),
        (lambda path: save_classes(path, {"a": 3, "b": 1}), "every class needs two .*: b"),
        (
            lambda path: [save_classes(path / "train", {"a": 2}), (path / "test").mkdir()],
            "no images in .*test",
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
        load(f"folder:{folder}", 36, seed=0)


@pytest.mark.parametrize("name", ["cifar", "folder:", "records:", "tfds:", "digits:8"])
def test_unknown_data_is_refused(name):
    with pytest.raises(UsageError, match=f'--data must be "digits", .*, got "{name}"'):
        load(name, 36, seed=0)


def test_synthetic_images_depend_on_their_number_only():
    first, again, other = (load("synthetic:60:6", 32, seed) for seed in (1, 1, 2))
    assert (len(first.train), len(first.test), len(first.classes)) == (60, 12, 6)
    assert labels(first.train).tolist() == [i % 6 for i in range(60)]
    assert images(first.train).shape == (60, 32, 32, 3)
    np.testing.assert_array_equal(images(first.train)[::-1], images(again.train)[::-1])
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert len(rows(first.train) | rows(first.test)) == 72
    assert not rows(first.train) & rows(other.train)
    copy = pickle.loads(pickle.dumps(first.train))
    np.testing.assert_array_equal(copy[7][0], first.train[7][0])


def test_synthetic_classes_can_be_told_apart():
    data = load("synthetic:400:20", 16, seed=0)
    train, test = (images(source).astype(float) for source in (data.train, data.test))
    # The nearest image, either way round, is one of the same class.
    both = np.concatenate([train, train[:, :, ::-1]])
    distances = ((test[:, None] - both) ** 2).mean((2, 3, 4))
    nearest = np.tile(labels(data.train), 2)[distances.argmin(1)]
    np.testing.assert_array_equal(nearest, labels(data.test))
    # They come either way round.
    of_class = train[labels(data.train) == 0]
    assert len({round(float(i[:, 0].mean() - i[:, -1].mean())) for i in of_class}) > 1


def test_synthetic_images_without_a_number():
    data = load("synthetic", 8, seed=0)
    assert (len(data.train), len(data.test), len(data.classes)) == (12_800, 2_560, 1000)
    assert len(load("synthetic:30", 8, seed=0).classes) == 1000


@pytest.mark.parametrize("text", ["0", "x", "8:0", "8:2:2", "-5", "8:"])
def test_synthetic_images_of_no_number_are_refused(text):
    with pytest.raises(UsageError, match=f'as in synthetic:.*; got "synthetic:{text}"'):
        load(f"synthetic:{text}", 8, seed=0)
