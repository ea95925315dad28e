"""Images in array_record files, as `pack_records.py` writes them: few large files, read anywhere.

A folder has train-*.array_record and test-*.array_record, and classes.json, which is written last:

    {"format": 1, "classes": ["cat", "dog"], "train": 8, "test": 2, "fingerprint": "0f1e2d3c4b"}

A record is a msgpack map of three: "label", the number of the class; "name", of the file that the
image was in; "image", that file as it was: JPEG, PNG or another kind that Pillow reads.
"""

import dataclasses
import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, cast

import grain
import msgpack
import numpy as np

from alexnet.data.sources import DamagedImage, Dataset, fingerprint, read_image
from alexnet.errors import UsageError

FORMAT = 1
INDEX = "classes.json"
SUFFIX = ".array_record"


class Record(NamedTuple):
    """What is in a record."""

    label: int
    name: str
    image: bytes

    def pack(self) -> bytes:
        return cast(bytes, msgpack.packb(self._asdict()))

    @classmethod
    def unpack(cls, packed: bytes) -> "Record":
        """The record that `pack` has made these bytes of.

        Raises:
          DamagedImage: nobody has.
        """
        try:
            record = cls(**msgpack.unpackb(packed))
            if [type(part) for part in record] != [int, str, bytes]:
                raise TypeError(f"the record has {[type(part).__name__ for part in record]}")
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise DamagedImage(f"not a record of {FORMAT=}: {error}") from error
        return record


@dataclasses.dataclass(frozen=True)
class RecordSource:
    """The images of one kind, "train" or "test", in a folder of records."""

    folder: Path
    kind: str
    size: int
    records: Sequence[bytes]

    in_memory = False

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.size, self.size, 3

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        record = self._record(index)
        return read_image(BytesIO(record.image), self.size), record.label

    def name(self, index: int) -> str:
        place = f"{self.kind} record {index} of {self.folder}"
        try:
            return f"{place} ({self._record(index).name})"
        except DamagedImage:
            return place

    def _record(self, index: int) -> Record:
        try:
            packed = self.records[index]
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise DamagedImage(f"cannot read the record: {error}") from error
        return Record.unpack(packed)


def load(folder: Path, size: int) -> Dataset:
    """The images that are packed in a folder.

    Raises:
      UsageError: there are none, or not all.
    """
    try:
        index = json.loads((folder / INDEX).read_text())
        if index["format"] != FORMAT:
            raise UsageError(f"{folder / INDEX} has format {index['format']}, not {FORMAT}")
        classes, mark = tuple(map(str, index["classes"])), str(index["fingerprint"])
        train, test = (_open(folder, kind, size, index[kind]) for kind in ("train", "test"))
    except OSError as error:
        raise UsageError(
            f"cannot read {folder / INDEX}, which pack_records.py writes at its end: "
            f"{error.strerror}"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{folder / INDEX} is not what pack_records.py has written") from error
    return Dataset(train, test, classes, 3, flip=True, fingerprint=fingerprint(mark))


def _open(folder: Path, kind: str, size: int, count: Any) -> RecordSource:
    shards = sorted(folder.glob(f"{kind}-*{SUFFIX}"))
    try:
        records = grain.sources.ArrayRecordDataSource(shards) if shards else ()
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"cannot read the {kind} records of {folder}: {error}") from error
    records = cast(Sequence[bytes], records)
    if not shards or len(records) != count:
        raise UsageError(f"{folder} has {len(records)} {kind} records, of {count} that were packed")
    return RecordSource(folder, kind, size, records)
