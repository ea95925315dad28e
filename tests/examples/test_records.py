"""Images packed into record files are those of the folder; damaged files are told."""

import json
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pack_records
import pytest
from image_folders import damage, images, labels, save_classes
from PIL import Image
from rich.console import Console

from alexnet.data import load
from alexnet.data.records import RecordSource
from alexnet.data.sources import DamagedImage
from alexnet.errors import UsageError


def pack(folder: Path, output: Path, **options) -> str:
    """What the script prints."""
    console = Console(record=True, soft_wrap=True, quiet=True)
    pack_records.pack(pack_records.Pack(f"folder:{folder}", output, **options), console)
    return console.export_text()


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[Path, Path]:
    """A folder of images and its records. Not to be changed."""
    path = tmp_path_factory.mktemp("packed")
    save_classes(path / "images", {"cat": 10, "dog": 5})
    pack(path / "images", path / "records", shards=3)
    return path / "images", path / "records"


def test_records_are_the_images_of_the_folder(packed):
    folder, records = (
        load(f"{kind}:{path}", 36, seed=0)
        for kind, path in zip(("folder", "records"), packed, strict=True)
    )
    assert records.classes == folder.classes == ("cat", "dog")
    assert (records.channels, records.flip) == (3, True)
    for ours, theirs in ((records.train, folder.train), (records.test, folder.test)):
        np.testing.assert_array_equal(images(ours), images(theirs))
        np.testing.assert_array_equal(labels(ours), labels(theirs))
    copy = pickle.loads(pickle.dumps(records.train))
    np.testing.assert_array_equal(images(copy), images(records.train))


def test_files_are_stored_as_they_are(packed):
    source = load(f"records:{packed[1]}", 36, seed=0).train
    assert isinstance(source, RecordSource)
    record = source.record(0)
    assert record.image == (packed[0] / record.name).read_bytes()
    assert len(list(packed[1].glob("train-*-of-00003.array_record"))) == 3
    assert len(list(packed[1].glob("test-*.array_record"))) == 1


def test_the_fingerprint_of_records_is_of_what_is_in_them(packed, tmp_path):
    def again(name, **options):
        pack(packed[0], tmp_path / name, **options)
        return load(f"records:{tmp_path / name}", 36, seed=0).fingerprint

    first = load(f"records:{packed[1]}", 36, seed=0).fingerprint
    assert again("same", shards=3) == first
    assert again("other", shards=3, seed=1) != first


def test_images_can_be_stored_smaller(tmp_path):
    small = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(2):
            Image.fromarray(small).resize((400, 300)).save(tmp_path / label / f"{i}.png")
    pack(tmp_path, tmp_path / "packed", size=32)
    stored, source = (
        load(f"{kind}:{path}", 32, seed=0).train
        for kind, path in (("records", tmp_path / "packed"), ("folder", tmp_path))
    )
    assert isinstance(stored, RecordSource)
    record = stored.record(0)
    assert record.image.startswith(b"\xff\xd8")
    assert abs(images(stored).astype(int) - images(source)).mean() < 2


def test_images_that_cannot_be_packed_are_left_out_and_named(tmp_path):
    save_classes(tmp_path / "images", {"a": 4, "b": 4})
    damage(tmp_path / "images" / "a" / "broken.jpg", "text")
    console = Console(record=True, soft_wrap=True)
    config = pack_records.Pack(f"folder:{tmp_path / 'images'}", tmp_path / "packed", size=8)
    pack_records.pack(config, console)
    assert (
        f"skipped the damaged image {tmp_path / 'images' / 'a' / 'broken.jpg'}: not an image"
        in (console.export_text())
    )
    data = load(f"records:{tmp_path / 'packed'}", 8, seed=0)
    assert len(data.train) + len(data.test) == 8
    assert images(data.train).shape[1:] == (8, 8, 3)


def change(path: Path, at: slice, new: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at] = new
    path.write_bytes(data)


def test_a_damaged_record_is_a_damaged_image(tmp_path):
    save_classes(tmp_path / "images", {"a": 4, "b": 4}, size=(200, 200))
    pack(tmp_path / "images", tmp_path / "packed", shards=1)
    # Of an image in the middle of the file, a checksum of which is no longer right.
    change(
        tmp_path / "packed" / "train-00000-of-00001.array_record", slice(400_000, 400_004), b"!!!!"
    )
    source = load(f"records:{tmp_path / 'packed'}", 8, seed=0).train
    damaged = {}
    for i in range(len(source)):
        try:
            source[i]
        except DamagedImage as error:
            damaged[source.name(i)] = str(error)
    ((name, reason),) = damaged.items()
    assert re.fullmatch(r"train record \d+ of .*packed", name)
    assert reason.startswith("cannot read the record: ")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "classes.json").unlink(), "classes.json, which .*: No such file"),
        (lambda path: (path / "classes.json").write_text("[]"), "is not what pack_records.py"),
        (lambda path: (path / "classes.json").write_text("{"), "is not what pack_records.py"),
        (lambda path: edit(path, format=2), "is not what pack_records.py has written, of format 1"),
        (lambda path: edit(path, classes=None), "is not what pack_records.py"),
        (lambda path: edit(path, test=7), "has 3 test records, of 7 that were packed"),
        (lambda path: first(path).unlink(), "records, of 12 that were packed"),
        (lambda path: [p.unlink() for p in path.glob("train*")], "has 0 train records, of 12"),
        (lambda path: first(path).write_bytes(b""), "cannot read the records of"),
        (lambda path: first(path).write_bytes(bytes(10**5)), "cannot read the records of"),
    ],
)
def test_records_that_are_not_all_there_are_refused(packed, tmp_path, spoil, message):
    for path in packed[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spoil(tmp_path)
    with pytest.raises(UsageError, match=message):
        load(f"records:{tmp_path}", 36, seed=0)


def edit(path: Path, **new) -> None:
    index = json.loads((path / "classes.json").read_text())
    (path / "classes.json").write_text(json.dumps(index | new))


def first(path: Path) -> Path:
    return min(path.glob("train-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "digits"}, '--data must be "folder:DIR", got "digits"'),
        ({"shards": 0}, "--shards must be at least 1, got 0"),
        ({"size": 0}, "--size must be at least 1, got 0"),
        ({"quality": 101}, "--quality must be at most 100, got 101"),
        ({"output": Path()}, "is not empty"),
        ({"output": Path("full/0.png")}, "cannot write to"),
        ({"data": "folder:nowhere"}, "cannot read the folder nowhere"),
    ],
)
def test_packing_is_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    save_classes(tmp_path, {"full": 2})
    settings = {"data": "folder:.", "output": Path("new")} | options
    with pytest.raises(UsageError, match=message):
        pack_records.pack(pack_records.Pack(**settings), Console(quiet=True))


def test_the_script(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_classes(tmp_path / "images", {"a": 4, "b": 4})
    arguments = ["pack_records.py", "--data", "folder:images", "--output", "packed"]
    monkeypatch.setattr(sys, "argv", arguments)
    pack_records.main()
    assert "6 training and 2 test images packed." in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        pack_records.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: packed is not empty; name another folder\n"


def test_tensorflow_datasets_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UsageError, match="pip install tensorflow-datasets"):
        load("tfds:mnist", 32, seed=0)


def test_images_of_tensorflow_datasets(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is optional")
    save_classes(tmp_path, {"cat": 6, "dog": 4})

    # As a data set of which there are only the files.
    class Pets(  # pyright: ignore[reportGeneralTypeIssues]
        tfds.core.GeneratorBasedBuilder,
        skip_registration=True,  # pyright: ignore[reportCallIssue]
    ):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, _):
            files = sorted(tmp_path.glob("*/*.png"))
            return {
                "train": self._generate_examples(files[::2]),
                "test": self._generate_examples(files[1::2]),
            }

        def _generate_examples(self, files):
            for file in files:
                yield file.parent.name + file.name, {"image": file, "label": file.parent.name}

    with pytest.raises(UsageError, match=r"cannot read tfds:pets .*; prepare it with"):
        load(f"tfds:pets@{tmp_path / 'data'}", 30, seed=0)
    Pets(data_dir=tmp_path / "data", file_format="array_record").download_and_prepare()
    data = load(f"tfds:pets@{tmp_path / 'data'}", 30, seed=0)
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.test), data.channels, data.flip) == (5, 5, 3, True)
    folder = load(f"folder:{tmp_path}", 30, seed=0)
    found = {
        image.tobytes(): label
        for source in (folder.train, folder.test)
        for image, label in (source[i] for i in range(len(source)))
    }
    copy = pickle.loads(pickle.dumps(data.train))
    for source in (copy, data.test):
        for i in range(len(source)):
            image, label = source[i]
            assert found.pop(image.tobytes()) == label
    assert not found
    assert data.test.name(2) == "example 2 of pets/1.0.0 test"
