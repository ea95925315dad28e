"""Images in array_record files, as `pack_records.py` writes them: few large files.

A folder has train-*.array_record and test-*.array_record, and classes.json, which is written last:

    {"format": 1, "classes": ["cat", "dog"], "train": 8, "test": 2, "fingerprint": "0f1e2d3c4b"}

A record is a msgpack map of three: "label" is the number of the class, "name" the name of the image
file, and "image" the bytes of the file: JPEG, PNG or another kind that Pillow reads.
"""

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, cast

import grain
import msgpack
import numpy as np

from alexnet.data.sources import DamagedImage, Dataset, Source, fingerprint, read_image
from alexnet.errors import UsageError

FORMAT = 1
INDEX = "classes.json"
SUFFIX = ".array_record"


class Record(NamedTuple):
    """The content of a record."""

    label: int
    name: str
    image: bytes

    def pack(self) -> bytes:
        return cast(bytes, msgpack.packb(self._asdict()))


class RecordSource(Source):
    """The images of one kind, "train" or "test", in a folder of records."""

    def __init__(self, folder: Path, kind: str, size: int):
        self._title = f"{kind} record {{}} of {folder}"
        shards = sorted(folder.glob(f"{kind}-*{SUFFIX}"))
        records: Any = grain.sources.ArrayRecordDataSource(shards) if shards else ()
        self._records: Sequence[bytes] = records
        self.shape = (size, size, 3)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        record = self.record(index)
        return read_image(BytesIO(record.image), self.shape[0]), record.label

    def name(self, index: int) -> str:
        return self._title.format(index)

    def record(self, index: int) -> Record:
        """Returns a record. Raises DamagedImage if it cannot be read."""
        try:
            return Record(**msgpack.unpackb(self._records[index]))
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            raise DamagedImage(f"cannot read the record: {error}") from error


def load(folder: Path, size: int) -> Dataset:
    """Returns the images that are packed in a folder."""
    try:
        index = json.loads((folder / INDEX).read_text())
        if index["format"] != FORMAT:
            raise ValueError
        classes, mark = tuple(map(str, index["classes"])), fingerprint(str(index["fingerprint"]))
        counts = {kind: index[kind] for kind in ("train", "test")}
    except OSError as error:
        raise UsageError(
            f"cannot read {folder / INDEX}, which pack_records.py writes at its end: "
            f"{error.strerror}"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{folder / INDEX} is not what pack_records.py has written, of format {FORMAT}"
        ) from error
    try:
        sources = {kind: RecordSource(folder, kind, size) for kind in counts}
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"cannot read the records of {folder}: {error}") from error
    for kind, source in sources.items():
        if len(source) != counts[kind]:
            raise UsageError(
                f"{folder} has {len(source)} {kind} records, of {counts[kind]} that were packed"
            )
    return Dataset(sources["train"], sources["test"], classes, 3, flip=True, fingerprint=mark)
