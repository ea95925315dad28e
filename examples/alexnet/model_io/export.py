"""A trained net in a folder of three files, which runs without this package and its code.

`model.stablehlo` is the program, from pixels to probabilities, for several kinds of devices and
batches of any size. `weights.safetensors` has the arrays, and `model.json` the rest. They are used
with jax, flatbuffers, numpy and safetensors alone:

    import json
    from pathlib import Path
    import numpy as np
    from jax import export, jit
    from safetensors.numpy import load_file
    folder = Path("DIR")
    facts = json.loads((folder / "model.json").read_text())
    program = jit(export.deserialize((folder / "model.stablehlo").read_bytes()).call)
    arrays = load_file(folder / "weights.safetensors")
    images = np.zeros((5, *facts["image_shape"]), np.uint8)  # See facts["images"].
    probabilities = np.asarray(program(arrays, images))  # float32 (5, classes)
    print([facts["classes"][i] for i in probabilities.argmax(axis=1)])
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from safetensors.numpy import load_file, save_file

import grouped_conv_jax
from alexnet.errors import UsageError
from alexnet.model_io.trained import Trained

PROGRAM, WEIGHTS, FACTS = "model.stablehlo", "weights.safetensors", "model.json"
"""The files of the folder."""

FORMAT = 1


def check_new(folder: Path) -> None:
    """Raises UsageError for a folder that has something in it."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not an empty folder; name another one")


def save(model: Trained, folder: Path, platforms: Sequence[str]) -> None:
    """Writes a net to a folder, for some kinds of devices: cpu, cuda, rocm, tpu."""
    program = exported(model, platforms)
    facts = json.dumps(_facts(model, program), indent=2)
    arrays = {name: np.ascontiguousarray(x, np.float32) for name, x in model.arrays.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PROGRAM).write_bytes(program.serialize())
        save_file(arrays, folder / WEIGHTS)
        # This file is written last: it marks a folder that is complete.
        (folder / FACTS).write_text(facts + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from error


def exported(model: Trained, platforms: Sequence[str]) -> export.Exported:
    """Returns the program, a function of arrays by name and of images, without the weights."""
    shape = export.symbolic_shape("batch, ...", like=(0, *model.image_shape))
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), model.arrays)
    program = export.export(jax.jit(model.probabilities), platforms=tuple(platforms))
    return program(arrays, jax.ShapeDtypeStruct(shape, np.uint8))


def _facts(model: Trained, program: export.Exported) -> dict[str, Any]:
    size, _, channels = model.image_shape
    mean, std = np.asarray(model.weights.mean), np.asarray(model.weights.std)
    colours = {1: "grey", 3: "red, green and blue"}[channels]
    return {
        "format": FORMAT,
        "net": model.name,
        "towers": model.net.towers,
        "parameters": sum(array.size for array in jax.tree.leaves(model.weights.params)),
        **model.origin,
        "images": f"The central square of a picture, scaled to {size} x {size} pixels (Pillow's "
        f"BILINEAR), {colours} from 0 to 255, uint8 (batch, {size}, {size}, {channels}). "
        "The program subtracts the mean, divides by the deviation and takes its crops of "
        f"{model.net.image_size} x {model.net.image_size} pixels.",
        "image_shape": model.image_shape,
        "image_size": model.net.image_size,
        "ten_crop": model.ten_crop,
        "mean": mean.mean(tuple(range(mean.ndim - 1))).tolist(),
        "mean_is_an_image": mean.ndim == 3,
        "std": std.tolist(),
        "dtype": model.dtype,
        "platforms": list(program.platforms),
        "calling_convention_version": program.calling_convention_version,
        "versions": {"grouped_conv_jax": grouped_conv_jax.__version__, "jax": jax.__version__},
        "classes": list(model.classes),
    }


@dataclasses.dataclass(frozen=True)
class ExportedNet:
    """An exported net, on this machine's first device."""

    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    arrays: dict[str, jax.Array]
    program: Any
    """Compiled once for each size of a batch."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(self.program(self.arrays, images))


def load(folder: Path) -> ExportedNet:
    """Returns an exported net.

    Raises:
      UsageError: a file is missing or damaged, they do not belong together, or the program is not
        for this machine's devices.
    """
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise ValueError(f"its format is {facts['format']}; known is {FORMAT}")
        classes, shape = tuple(facts["classes"]), tuple(facts["image_shape"])
        program = export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
        arrays = load_file(folder / WEIGHTS)
    except Exception as error:
        # A damaged file raises errors of JSON, flatbuffers, MLIR and safetensors.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UsageError(f"cannot read the exported net in {folder}: {reason}") from error
    platform = jax.devices()[0].platform
    # JAX calls both kinds of GPUs "gpu".
    if not {"gpu": {"cuda", "rocm"}}.get(platform, {platform}) & set(program.platforms):
        raise UsageError(
            f"{folder} was exported for {', '.join(program.platforms)}, not for this machine's "
            f"{platform}"
        )
    return ExportedNet(classes, shape, jax.device_put(arrays), jax.jit(program.call))
