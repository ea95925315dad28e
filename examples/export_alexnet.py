"""Writes a trained net to a folder from which it runs without this package.

python examples/export_alexnet.py --run-dir RUN --output DIR
python examples/export_alexnet.py --weights FILE --net caffe --classes FILE.txt --output DIR
python examples/predict.py IMAGE... --model DIR
python examples/export_alexnet.py --help

What is in DIR, and the lines that load it, are in alexnet/model_io/export.py.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from alexnet.config import NetName
from alexnet.errors import UsageError
from alexnet.model_io import export, trained

Platform = Literal["cpu", "cuda", "rocm", "tpu"]


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes a trained net to a folder from which it runs without this package."""

    output: Path
    """A new folder."""

    run_dir: Path | None = None
    """The folder of a run, whose net is exported."""

    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="newest|best|STEP")] = None
    """With --run-dir: which of its checkpoints, by default the newest.
    The best is that with the least top-1 error on the test images."""

    weights: Path | None = None
    """Published weights, not a run: .onnx (Caffe), .safetensors or .npz (torchvision, ours)."""

    net: NetName | None = None
    """With --weights: the net that they are for."""

    classes: Path | None = None
    """With --weights: a text file with the name of a class in each line, in their order."""

    platforms: tuple[Platform, ...] = ("cpu", "cuda", "rocm", "tpu")
    """What the program can run on."""

    def check(self) -> None:
        """Raises UsageError for what does not go together."""
        if (self.run_dir is None) == (self.weights is None):
            raise UsageError("take one of --run-dir and --weights")
        for name in ("net", "classes"):
            given = getattr(self, name) is not None
            if self.weights and not given:
                raise UsageError(f"--weights needs --{name}")
            if self.run_dir and given:
                raise UsageError(f"--{name} is for --weights; a run knows its own")
        if not self.platforms:
            raise UsageError("name at least one of --platforms")
        if self.checkpoint is not None and self.run_dir is None:
            raise UsageError("--checkpoint is for --run-dir; --weights are one net")


def main() -> None:
    """The command line."""
    try:
        config = tyro.cli(Export)
        config.check()
        # Before the time that it takes to read and to lower.
        export.check_new(config.output)
        model = read(config)
        export.save(model, config.output, config.platforms)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    size = sum(file.stat().st_size for file in config.output.iterdir())
    print(
        f"AlexNet ({model.name}) of {len(model.classes)} classes, for "
        f"{', '.join(config.platforms)}: {size / 1e6:.1f} MB in {config.output}"
    )


def read(config: Export) -> trained.Trained:
    """The net to export.

    Raises:
      UsageError: there is none.
    """
    if config.run_dir:
        return trained.of_run(config.run_dir, config.checkpoint or "newest")
    assert config.weights
    assert config.net
    assert config.classes
    return trained.of_weights(config.weights, config.net, config.classes)


if __name__ == "__main__":
    main()
