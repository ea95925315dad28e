"""Images: where they come from, their batches, their statistics and their augmentation."""

from pathlib import Path

from alexnet.data import folder, records, synthetic, tensorflow_records
from alexnet.data.sources import Dataset
from alexnet.errors import UsageError

KNOWN = '"digits", "photos", "synthetic[:N]", "folder:DIR", "records:DIR" or "tfds:NAME"'


def load(name: str, size: int, seed: int) -> Dataset:
    """Returns the data set that `--data` names, its images scaled to `size` pixels.

    The seed chooses the test images, where the set does not say which they are.
    """
    kind, _, text = name.partition(":")
    if name in ("digits", "photos"):
        # The packages with the images take a second to import.
        from alexnet.data import packaged

        return packaged.digits(size, seed) if name == "digits" else packaged.photos(size, seed)
    if kind == "synthetic":
        return synthetic.parse(text, size, seed)
    if kind == "folder" and text:
        return folder.load(Path(text), size, seed)
    if kind == "records" and text:
        return records.load(Path(text), size)
    if kind == "tfds" and text:
        return tensorflow_records.load(text, size)
    raise UsageError(f'--data must be {KNOWN}, got "{name}"')
