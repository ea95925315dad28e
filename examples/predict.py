"""Says what is in pictures, by a trained net: that of a run, or one of export_alexnet.py.

python examples/predict.py IMAGE... --model runs/RUN
python examples/predict.py IMAGE... --model DIR --top 1 --json
python examples/predict.py --help
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from alexnet.data.sources import DamagedImage, read_image
from alexnet.errors import UsageError
from alexnet.model_io import export, trained
from alexnet.training.run import CONFIG

BATCH = 32
"""Images that are answered together, at most."""


@dataclasses.dataclass(frozen=True)
class Predict:
    """Says what is in pictures, by a trained net.

    The exit code is 1 if some of the pictures cannot be read, and 2 if none can.
    """

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Files, JPEG, PNG or what else Pillow reads."""

    model: Path
    """The folder of a run, or one that export_alexnet.py has written."""

    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="newest|best|STEP")] = None
    """Which of a run's checkpoints, by default the newest.
    The best is that with the least top-1 error on the test images."""

    top: int = 5
    """So many classes of each picture, the most probable first."""

    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print a JSON object in a line for each picture."""

    def check(self) -> None:
        """Raises UsageError for what means nothing."""
        if not self.images:
            raise UsageError("name at least one image")
        if self.top < 1:
            raise UsageError(f"--top must be at least 1, got {self.top}")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A class, and how probable it is."""

    label: str
    probability: float


def main() -> None:
    """The command line."""
    try:
        config = tyro.cli(Predict)
        config.check()
        model = load(config.model, config.checkpoint)
        answered = 0
        for path, found in predictions(model, config.images, config.top):
            print(as_json(path, found) if config.as_json else as_text(path, found), flush=True)
            answered += 1
        if not answered:
            raise UsageError("none of the images can be read")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(int(answered < len(config.images)))


def load(folder: Path, checkpoint: str | None) -> trained.Trained | export.ExportedNet:
    """The net in a folder.

    Raises:
      UsageError: there is none.
    """
    if (folder / export.FACTS).is_file():
        if checkpoint is not None:
            raise UsageError(f"--checkpoint is for a run; {folder} is an exported net")
        return export.load(folder)
    if (folder / CONFIG).is_file():
        return trained.of_run(folder, checkpoint or "newest")
    raise UsageError(
        f"--model must be the folder of a run ({CONFIG}) or of an exported net ({export.FACTS}), "
        f"got {folder}"
    )


def predictions(
    model: trained.Trained | export.ExportedNet, paths: Sequence[Path], top: int
) -> Iterator[tuple[Path, list[Prediction]]]:
    """The most probable classes of each file, in the order given.

    A file that cannot be read is told on stderr and left out.
    """
    size, _, channels = model.image_shape
    rows = min(BATCH, len(paths))
    for start in range(0, len(paths), rows):
        read, images = [], np.zeros((rows, *model.image_shape), np.uint8)
        for path in paths[start : start + rows]:
            try:
                images[len(read)] = read_image(path, size, channels)
                read.append(path)
            except DamagedImage as error:
                print(f"cannot read {path}: {reason(error)}", file=sys.stderr)
        if read:
            # The last batch is as long as the others, so that there is one to compile.
            for path, row in zip(read, model(images)[: len(read)], strict=True):
                yield path, best(model.classes, row, top)


def best(classes: Sequence[str], probabilities: np.ndarray, top: int) -> list[Prediction]:
    """The most probable classes, the first of equal ones first."""
    order = np.argsort(-probabilities, stable=True)[:top]
    return [Prediction(classes[i], float(probabilities[i])) for i in map(int, order)]


def reason(error: DamagedImage) -> str:
    """Why a file cannot be read, without its name, which the operating system would repeat."""
    cause = error.__cause__
    return cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error)


def as_text(path: Path, found: Sequence[Prediction]) -> str:
    """A line for the file and one for each class."""
    return "\n".join([str(path), *(f"{p.probability:8.2%}  {p.label}" for p in found)])


def as_json(path: Path, found: Sequence[Prediction]) -> str:
    """One line, in which a probability has all its digits."""
    classes = [{"class": p.label, "probability": p.probability} for p in found]
    return json.dumps({"file": str(path), "predictions": classes})


if __name__ == "__main__":
    main()
