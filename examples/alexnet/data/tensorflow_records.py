"""Images of TensorFlow Datasets, prepared as array_record files. TensorFlow is not needed."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np

from alexnet.data.sources import DamagedImage, Dataset, Source, fingerprint, read_image
from alexnet.errors import UsageError


class SplitSource(Source):
    """The images of a split: elements of tensorflow_datasets, with undecoded images."""

    def __init__(
        self,
        title: str,
        elements: Sequence[Mapping[str, Any]],
        keys: tuple[str, str],
        shape: tuple[int, int, int],
    ):
        self._title, self._elements, self._keys, self.shape = title, elements, keys, shape

    def __len__(self) -> int:
        return len(self._elements)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        try:
            image, label = (self._elements[index][key] for key in self._keys)
        except Exception as error:
            # array_record and protobuf raise different errors for a damaged file.
            raise DamagedImage(f"cannot read the record: {error}") from error
        size, _, channels = self.shape
        return read_image(BytesIO(image), size, channels), int(label)

    def name(self, index: int) -> str:
        return f"example {index} of {self._title}"


def load(text: str, size: int) -> Dataset:
    """Returns the prepared data set NAME or NAME@DATA_DIR.

    NAME may be "name", "name/config" or "name:version". The split "train" is trained on; the split
    "validation", or else "test", is tested.
    """
    try:
        import tensorflow_datasets as tfds  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError("--data tfds:NAME needs: pip install tensorflow-datasets") from error
    name, _, data_dir = text.partition("@")
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
        info = builder.info
        keys = info.supervised_keys or ("image", "label")
        channels = 1 if info.features[keys[0]].shape[-1] == 1 else 3
        classes = tuple(info.features[keys[1]].names)
        decoders = {keys[0]: tfds.decode.SkipDecoding()}

        def source(split: str) -> SplitSource:
            elements = builder.as_data_source(split=split, decoders=decoders)
            return SplitSource(f"{info.full_name} {split}", elements, keys, (size, size, channels))

        train = source("train")
        test = source("validation" if "validation" in info.splits else "test")
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"cannot read tfds:{name} ({reason}); it must be a set of images with classes, and be "
            f"prepared with tfds build {name} --file_format=array_record"
        ) from error
    mark = fingerprint(info.full_name, *classes, f"{len(train)} {len(test)}")
    # Grey images are mostly digits and letters, whose mirror images are of no class.
    return Dataset(train, test, classes, channels, flip=channels == 3, fingerprint=mark)
