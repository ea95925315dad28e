"""A trained net in a folder of three files, for others, who need neither this package nor its code.

`model.stablehlo` is the program, from pixels to probabilities, for several kinds of devices and
batches of any size; `weights.safetensors` what it has learned; `model.json` the rest. To be used
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
from safetensors.numpy import load_file

import grouped_conv_jax
from alexnet.errors import UsageError
from alexnet.model_io.trained import Trained
from alexnet.model_io.weights import write_weights

PROGRAM, WEIGHTS, FACTS = "model.stablehlo", "weights.safetensors", "model.json"
"""What the folder has."""

FORMAT = 1

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def check_new(folder: Path) -> None:
    """Raises UsageError for a folder that has something in it."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not an empty folder; name another one")


def save(model: Trained, folder: Path, platforms: Sequence[str] = PLATFORMS) -> None:
    """Writes a net to a new folder.

    Args:
      model: the net.
      folder: to be made; it may exist if it is empty.
      platforms: what the program shall run on, of `PLATFORMS`.

    Raises:
      UsageError: there is something in the folder, or it cannot be written.
    """
    check_new(folder)
    platforms = tuple(dict.fromkeys(platforms))
    if not platforms or set(platforms) - set(PLATFORMS):
        raise UsageError(f"--platforms must be some of {', '.join(PLATFORMS)}, got {platforms}")
    program = exported(model, platforms)
    facts = json.dumps(_facts(model, program), indent=2)
    try:
        serialized = program.serialize()
    except ImportError as error:
        raise UsageError("exporting needs flatbuffers: pip install flatbuffers") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PROGRAM).write_bytes(serialized)
        write_weights(folder / WEIGHTS, *model.weights)
        # What writes it makes it one's own alone.
        (folder / WEIGHTS).chmod((folder / PROGRAM).stat().st_mode)
        # The mark of a folder that is complete.
        (folder / FACTS).write_text(facts + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from error


def exported(model: Trained, platforms: Sequence[str]) -> export.Exported:
    """The program, of arrays by name and of images, which has none of the weights in it."""
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
    """What `save` has written, on this machine's first device. A `trained.Classifier`."""

    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    arrays: dict[str, jax.Array]
    program: Any
    """Compiled once for each size of a batch."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(self.program(self.arrays, images))


def load(folder: Path) -> ExportedNet:
    """An exported net.

    Raises:
      UsageError: a file is missing or damaged, they do not belong together, or the program is not
        for this machine's devices.
    """
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise UsageError(f"{folder} has the format {facts['format']}; known is {FORMAT}")
        classes, (height, width, channels) = tuple(facts["classes"]), facts["image_shape"]
        program = export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
        arrays = load_file(folder / WEIGHTS)
    except UsageError:
        raise
    except ImportError as error:
        raise UsageError("an exported net needs flatbuffers: pip install flatbuffers") from error
    except Exception as error:
        # A damaged file raises errors of JSON, flatbuffers, MLIR and safetensors.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UsageError(f"cannot read the exported net in {folder}: {reason}") from error
    shape = (height, width, channels)
    _check(folder, program, arrays, shape, len(classes))
    return ExportedNet(classes, shape, jax.device_put(arrays), jax.jit(program.call))


def _check(
    folder: Path,
    program: export.Exported,
    arrays: dict[str, np.ndarray],
    image_shape: tuple[int, ...],
    classes: int,
) -> None:
    """Raises UsageError unless the files belong together and to this machine."""
    (weights, images), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    expected = {name: aval.shape for name, aval in weights.items()}
    if expected != {name: array.shape for name, array in arrays.items()}:
        raise UsageError(f"the weights that {folder / PROGRAM} asks for are not in {WEIGHTS}")
    if images.shape[1:] != image_shape or program.out_avals[0].shape[1:] != (classes,):
        raise UsageError(f"{folder / FACTS} tells of another net than {PROGRAM} is")
    # JAX calls both kinds of GPUs so.
    platform = jax.devices()[0].platform
    names = ("cuda", "rocm") if platform == "gpu" else (platform,)
    if not set(names) & set(program.platforms):
        raise UsageError(
            f"{folder} was exported for {', '.join(program.platforms)}, not for this machine's "
            f"{platform}"
        )
