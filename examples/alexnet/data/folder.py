"""Images in a folder for each class. At start the files are only listed, not read."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alexnet.data.sources import Dataset, Source, fingerprint, held_out, read_image
from alexnet.errors import UsageError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

READERS = 16
"""Class folders that are listed at the same time: a network file system answers slowly."""


class Names:
    """Many strings in one piece: a million paths are quickly sent to a worker and small in it."""

    def __init__(self, names: Sequence[str]):
        encoded = [os.fsencode(name) for name in names]
        self.joined = b"".join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self.joined[start : self._ends[index]])


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Image files below a folder, (N,) of them, and their labels (N,)."""

    folder: Path
    names: Names
    labels: np.ndarray
    size: int

    in_memory = False

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.size, self.size, 3

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return read_image(self.path(index), self.size), int(self.labels[index])

    def path(self, index: int) -> Path:
        return self.folder / self.names[index]

    def name(self, index: int) -> str:
        return str(self.path(index))


class Listing(NamedTuple):
    """The classes of a folder, their files, and a hash of what there is."""

    classes: tuple[str, ...]
    files: FileSource
    fingerprint: str


def load(path: Path, size: int, seed: int) -> Dataset:
    """Images in class folders below `path`, or below `path`/train and `path`/val (or test).

    Raises:
      UsageError: there are no images, or not enough of a class.
    """
    try:
        names = {entry.name for entry in path.iterdir() if entry.is_dir()}
        test_name = next((name for name in ("val", "test") if name in names), None)
        if "train" in names and test_name:
            return _divided_already(path / "train", path / test_name, size)
        found = _list_classes(path, size)
    except OSError as error:
        raise UsageError(
            f"cannot read the folder {error.filename or path}: {error.strerror}"
        ) from error
    counts = np.bincount(found.files.labels)
    scarce = [name for name, count in zip(found.classes, counts, strict=True) if count < 2]
    if scarce:
        raise UsageError(
            f"every class needs two images, one of them to test with; only one in {path}: "
            f"{', '.join(scarce)}"
        )
    train, test = held_out(found.files, found.files.labels, seed)
    mark = fingerprint(found.fingerprint, train.numbers, test.numbers)
    return Dataset(train, test, found.classes, 3, flip=True, fingerprint=mark)


def _divided_already(train_path: Path, test_path: Path, size: int) -> Dataset:
    train, test = _list_classes(train_path, size), _list_classes(test_path, size)
    if unknown := set(test.classes) - set(train.classes):
        raise UsageError(
            f"{test_path} has classes that {train_path} lacks: {', '.join(sorted(unknown))}"
        )
    number = {name: label for label, name in enumerate(train.classes)}
    labels = np.array([number[name] for name in test.classes], np.int32)[test.files.labels]
    test_files: Source = dataclasses.replace(test.files, labels=labels)
    mark = fingerprint(train.fingerprint, test.fingerprint)
    return Dataset(train.files, test_files, train.classes, 3, flip=True, fingerprint=mark)


def _list_classes(path: Path, size: int) -> Listing:
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir())
    with ThreadPoolExecutor(READERS) as pool:
        listed = pool.map(lambda folder: sorted(_images(folder, f"{folder.name}/")), folders)
        files = {folder.name: found for folder, found in zip(folders, listed, strict=True) if found}
    if not files:
        raise UsageError(
            f"no images in {path}; there should be a folder for each class with "
            f"{', '.join(sorted(SUFFIXES))} files in it"
        )
    names = Names([name for found in files.values() for name, _ in found])
    sizes = np.array([length for found in files.values() for _, length in found], np.int64)
    labels = np.repeat(np.arange(len(files), dtype=np.int32), [len(f) for f in files.values()])
    mark = fingerprint("\n".join(files), names.joined, sizes, labels)
    return Listing(tuple(files), FileSource(path, names, labels, size), mark)


def _images(folder: Path | str, prefix: str) -> Iterator[tuple[str, int]]:
    """Names below a class folder, with the prefix before them, and lengths in bytes."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _images(entry.path, f"{prefix}{entry.name}/")
            elif "." + entry.name.rpartition(".")[2].lower() in SUFFIXES:
                yield prefix + entry.name, _length(entry)


def _length(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        # A link that leads nowhere is a damaged image like others, when it is to be read.
        return -1
