"""Packs a folder of images into array_record files, which a network file system reads faster.

python examples/pack_records.py --data folder:DIR --output DIR2
python examples/train_alexnet.py --data records:DIR2
python examples/pack_records.py --help
"""

import dataclasses
import functools
import hashlib
import io
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tyro
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from alexnet.data import folder
from alexnet.data.records import FORMAT, INDEX, SUFFIX, Record
from alexnet.data.sources import DamagedImage, Source, Subset, fingerprint, read_image
from alexnet.errors import UsageError

OPTIONS = "group_size:1,uncompressed"
"""Each record can be read alone; compressing a JPEG once more only takes time."""


@dataclasses.dataclass(frozen=True)
class Pack:
    """Packs a folder of images into array_record files."""

    data: str
    """folder:DIR, with a folder for each class in DIR, or in DIR/train and DIR/val (or test)."""

    output: Path
    """A new folder for the records."""

    shards: int = 16
    """Files for the training images. Those to test with get files of about the same length."""

    size: int | None = None
    """Store the central squares of the images, scaled to so many pixels, as JPEG.
    By default the files are stored as they are."""

    quality: int = 95
    """Of these JPEG, from 1 to 100."""

    threads: int = 8
    """Files that are written at the same time."""

    seed: int = 0
    """Chooses the images to test with where DIR does not."""

    def check(self) -> None:
        """Raises UsageError for what means nothing."""
        if not self.data.startswith("folder:") or self.data == "folder:":
            raise UsageError(f'--data must be "folder:DIR", got "{self.data}"')
        for name in ("shards", "threads", "quality", "size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} must be at least 1, got {value}")
        if self.quality > 100:
            raise UsageError(f"--quality must be at most 100, got {self.quality}")


@dataclasses.dataclass(frozen=True)
class Shard:
    """What has been written to a file."""

    count: int
    digest: bytes
    skipped: list[str]


def main() -> None:
    """The command line."""
    console = Console(soft_wrap=True)
    try:
        pack(tyro.cli(Pack), console)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def pack(config: Pack, console: Console) -> None:
    """Writes the records, and what is in them.

    Raises:
      UsageError: the images or the new folder cannot be used.
    """
    config.check()
    dataset = folder.load(Path(config.data.removeprefix("folder:")), config.size or 1, config.seed)
    try:
        config.output.mkdir(parents=True, exist_ok=True)
        if any(config.output.iterdir()):
            raise UsageError(f"{config.output} is not empty; name another folder")
        counts, digests = {}, []
        with Progress(console=console) as progress:
            for kind, source in (("train", dataset.train), ("test", dataset.test)):
                share = len(source) / len(dataset.train)
                files = max(1, min(round(config.shards * share), len(source)))
                bar = progress.add_task(kind, total=len(source))
                written = write(
                    config, kind, source, files, functools.partial(progress.advance, bar)
                )
                counts[kind] = sum(shard.count for shard in written)
                digests += [shard.digest for shard in written]
                for line in (line for shard in written for line in shard.skipped):
                    console.print(line, markup=False, highlight=False)
        index = {
            "format": FORMAT,
            "classes": dataset.classes,
            **counts,
            "fingerprint": fingerprint(*digests),
        }
        # The mark of a folder that is complete.
        (config.output / INDEX).write_text(json.dumps(index) + "\n")
    except OSError as error:
        raise UsageError(f"cannot write to {config.output}: {error.strerror}") from error
    console.print(f"{counts['train']:,} training and {counts['test']:,} test images packed.")


def write(
    config: Pack, kind: str, source: Source, files: int, advance: Callable[[], None]
) -> list[Shard]:
    """Writes the images of a kind to so many files."""
    parts = np.array_split(np.arange(len(source)), files)
    paths = [config.output / f"{kind}-{i:05}-of-{files:05}{SUFFIX}" for i in range(files)]
    with ThreadPoolExecutor(config.threads) as pool:
        return list(
            pool.map(
                lambda path, part: write_file(config, path, Subset(source, part), advance),
                paths,
                parts,
            )
        )


def write_file(config: Pack, path: Path, source: Source, advance: Callable[[], None]) -> Shard:
    """Writes one file; leaves out the images that cannot be read."""
    writer = array_record_module.ArrayRecordWriter(str(path), OPTIONS)
    skipped, digest, count = [], hashlib.sha256(), 0
    for index in range(len(source)):
        files, number = original(source, index)
        try:
            image = encoded(files.path(number), config)
        except (OSError, DamagedImage) as error:
            skipped.append(f"skipped the damaged image {files.name(number)}: {error}")
        else:
            record = Record(int(files.labels[number]), files.names[number], image).pack()
            writer.write(record)
            digest.update(record)
            count += 1
        advance()
    writer.close()
    return Shard(count, digest.digest(), skipped)


def original(source: Source, index: int) -> tuple[folder.FileSource, int]:
    """The source that lists the files, and the number that an image has there."""
    while isinstance(source, Subset):
        source, index = source.source, int(source.numbers[index])
    assert isinstance(source, folder.FileSource)
    return source, index


def encoded(file: Path, config: Pack) -> bytes:
    """What is stored of an image: the file as it is, or its central square as JPEG."""
    if config.size is None:
        return file.read_bytes()
    stream = io.BytesIO()
    Image.fromarray(read_image(file, config.size)).save(stream, "JPEG", quality=config.quality)
    return stream.getvalue()


if __name__ == "__main__":
    main()
