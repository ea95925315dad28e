"""Images of TensorFlow Datasets, prepared as array_record files. TensorFlow is not needed."""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from types import ModuleType
from typing import Any

import numpy as np

from alexnet.data.sources import DamagedImage, Dataset, fingerprint, read_image
from alexnet.errors import UsageError

TEST_SPLITS = ("validation", "test")


@dataclasses.dataclass(frozen=True)
class SplitSource:
    """The images of a split.

    Args:
      title: of the split, for messages.
      elements: the data source of tensorflow_datasets, the images in it not decoded.
      keys: what the image and the label are called in an element.
      shape: of an image that is read: (size, size, channels).
    """

    title: str
    elements: Sequence[Mapping[str, Any]]
    keys: tuple[str, str]
    shape: tuple[int, int, int]

    in_memory = False

    def __len__(self) -> int:
        return len(self.elements)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        try:
            element = self.elements[index]
            image, label = (element[key] for key in self.keys)
        except Exception as error:
            # Of array_record or of protobuf, where the file is damaged.
            raise DamagedImage(f"cannot read the record: {error}") from error
        size, _, channels = self.shape
        return read_image(BytesIO(image), size, channels), int(label)

    def name(self, index: int) -> str:
        return f"example {index} of {self.title}"


def load(text: str, size: int) -> Dataset:
    """The data set NAME or NAME@DATA_DIR, which must have been prepared.

    It may be "name", "name/config" or "name:version". Its split "train" is trained on, and its
    split "validation" tested, or else "test".

    Raises:
      UsageError: it is not there, or not one of images and classes.
    """
    name, _, data_dir = text.partition("@")
    tfds = _import()
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
        splits = builder.info.splits
        test_name = next((split for split in TEST_SPLITS if split in splits), None)
        if "train" not in splits or test_name is None:
            raise UsageError(_unprepared(name, f"its splits are {', '.join(splits) or 'none'}"))
        image_key, label_key = builder.info.supervised_keys or ("image", "label")
        decoders = {image_key: tfds.decode.SkipDecoding()}
        train, test = (
            builder.as_data_source(split=split, decoders=decoders) for split in ("train", test_name)
        )
        classes = tuple(builder.info.features[label_key].names)
        channels = 1 if builder.info.features[image_key].shape[-1] == 1 else 3
    except UsageError:
        raise
    except (KeyError, AttributeError, TypeError) as error:
        raise UsageError(f"tfds:{name} is not a set of images, each of one class") from error
    except Exception as error:
        raise UsageError(_unprepared(name, str(error).partition("\n")[0])) from error
    title, keys, shape = builder.info.full_name, (image_key, label_key), (size, size, channels)
    # Sets of grey images are mostly of digits and of letters.
    return Dataset(
        SplitSource(f"{title} train", train, keys, shape),
        SplitSource(f"{title} {test_name}", test, keys, shape),
        classes,
        channels,
        flip=channels == 3,
        fingerprint=fingerprint(title, *classes, f"{len(train)} {len(test)}"),
    )


def _import() -> ModuleType:
    try:
        return importlib.import_module("tensorflow_datasets")
    except ImportError as error:
        raise UsageError(
            "--data tfds:NAME needs a package more: pip install tensorflow-datasets"
        ) from error


def _unprepared(name: str, reason: str) -> str:
    return (
        f"cannot read tfds:{name} ({reason}); prepare it with "
        f"tfds build {name} --file_format=array_record"
    )
