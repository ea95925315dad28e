"""Images in a folder for each class. At the start the files are only listed, not read."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from alexnet.data.sources import Dataset, Source, fingerprint, held_out, read_image
from alexnet.errors import UsageError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

READERS = 16
"""Class folders that are listed at the same time: a network file system answers slowly."""


class FileSource(Source):
    """Image files below a folder, by their names, and their labels (N,)."""

    def __init__(self, folder: Path, names: tuple[str, ...], labels: np.ndarray, size: int):
        self._folder, self.names, self.labels = folder, names, labels
        self.shape = (size, size, 3)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return read_image(self.path(index), self.shape[0]), int(self.labels[index])

    def path(self, index: int) -> Path:
        return self._folder / self.names[index]

    def name(self, index: int) -> str:
        return str(self.path(index))


def load(path: Path, size: int, seed: int) -> Dataset:
    """Returns the images in class folders below `path`, or below its train and val (or test)."""
    try:
        folders = {entry.name for entry in path.iterdir() if entry.is_dir()}
        test_name = "val" if "val" in folders else "test"
        if {"train", test_name} <= folders:
            return _divided_already(path / "train", path / test_name, size)
        classes, files, mark = _list_classes(path, size)
    except OSError as error:
        raise UsageError(
            f"cannot read the folder {error.filename or path}: {error.strerror}"
        ) from error
    counts = np.bincount(files.labels)
    if scarce := [name for name, count in zip(classes, counts, strict=True) if count < 2]:
        raise UsageError(
            f"every class needs two images, one of them to test with; only one in {path}: "
            f"{', '.join(scarce)}"
        )
    train, test = held_out(files, files.labels, seed)
    mark = fingerprint(mark, train.numbers, test.numbers)
    return Dataset(train, test, classes, 3, flip=True, fingerprint=mark)


def _divided_already(train_path: Path, test_path: Path, size: int) -> Dataset:
    classes, train, train_mark = _list_classes(train_path, size)
    test_classes, test, test_mark = _list_classes(test_path, size)
    if unknown := set(test_classes) - set(classes):
        raise UsageError(
            f"{test_path} has classes that {train_path} lacks: {', '.join(sorted(unknown))}"
        )
    test.labels = np.array([classes.index(name) for name in test_classes], np.int32)[test.labels]
    mark = fingerprint(train_mark, test_mark)
    return Dataset(train, test, classes, 3, flip=True, fingerprint=mark)


def _list_classes(path: Path, size: int) -> tuple[tuple[str, ...], FileSource, str]:
    """Returns the classes of a folder, their files, and a hash of names, lengths and labels."""
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir())
    with ThreadPoolExecutor(READERS) as pool:
        listed = zip(folders, pool.map(_images, folders), strict=True)
    files = {folder.name: found for folder, found in listed if found}
    if not files:
        raise UsageError(
            f"no images in {path}; there should be a folder for each class with "
            f"{', '.join(sorted(SUFFIXES))} files in it"
        )
    names, lengths = zip(*(file for found in files.values() for file in found), strict=True)
    labels = np.repeat(np.arange(len(files), dtype=np.int32), [len(f) for f in files.values()])
    joined, sizes = os.fsencode("".join(names)), np.array(lengths, np.int64)
    mark = fingerprint("\n".join(files), joined, sizes, labels)
    return tuple(files), FileSource(path, names, labels, size), mark


def _images(folder: Path) -> list[tuple[str, int]]:
    """Returns the images of a class: their names, from the class's folder on, and lengths."""
    found = []
    for parent, _, names in os.walk(folder, followlinks=True):
        for path in (Path(parent, name) for name in names):
            name = path.relative_to(folder.parent).as_posix()
            if path.suffix.lower() in SUFFIXES and "/." not in name:
                # A link that leads nowhere counts as a damaged image, once it is read.
                found.append((name, path.stat().st_size if path.exists() else -1))
    return sorted(found)
