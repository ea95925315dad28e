"""Weights of whole nets in files: ours, and those that were published for Caffe and torchvision.

Nothing is unpickled, and nothing is believed: each array has the name and the shape that the net
asks for, and a graph (ONNX) computes what the net does.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from alexnet.errors import UsageError
from grouped_conv_jax.models import AlexNet, AlexNetConfig

SUFFIXES = (".safetensors", ".npz")

CONVERT = {
    **dict.fromkeys(
        (".pth", ".pt", ".pkl", ".pickle", ".ckpt", ".bin"),
        "reading it could run any program in it; convert a file that you trust: python -c "
        "\"import torch, safetensors.torch as s; s.save_file(torch.load('alexnet.pth', "
        "weights_only=True), 'alexnet.safetensors')\"",
    ),
    ".caffemodel": "take the same weights as ONNX, bvlcalexnet-12.onnx (net caffe) or "
    "caffenet-12.onnx (net caffenet) of the ONNX model zoo",
}
"""What to do with files that are not read."""

TORCHVISION_LAYERS = {
    "conv1": "features.0",
    "conv2": "features.3",
    "conv3": "features.6",
    "conv4": "features.8",
    "conv5": "features.10",
    "fc6": "classifier.1",
    "fc7": "classifier.4",
    "fc8": "classifier.6",
}


class Preprocessing(NamedTuple):
    """What was subtracted from pixels of 0 to 255, and what they were then divided by."""

    mean: np.ndarray
    std: np.ndarray


CAFFE = Preprocessing(np.array((123, 117, 104), np.float32), np.ones(3, np.float32))
"""Red, green and blue. Caffe's own training subtracts a mean image, of which this is the mean."""

TORCHVISION = Preprocessing(
    255 * np.array((0.485, 0.456, 0.406), np.float32),
    255 * np.array((0.229, 0.224, 0.225), np.float32),
)


class Weights(NamedTuple):
    """Parameters of a whole net, and the images that they expect."""

    params: Any
    """Nested dicts of float32 arrays, as `nnx.to_pure_dict(nnx.state(net, nnx.Param))`."""
    mean: np.ndarray | None
    """Of pixels of 0 to 255, to be subtracted: (C,), or (size, size, C); None if not known."""
    std: np.ndarray | None
    """To divide by after that, (C,)."""


def read_weights(path: Path, config: AlexNetConfig) -> Weights:
    """The weights in a file, for the net that is to have them.

    Args:
      path: a file of `write_weights`; torchvision's state dict of alexnet as .safetensors or .npz,
        for the net "one-weird-trick"; or Caffe's bvlc_alexnet or CaffeNet as .onnx, for "caffe"
        or "caffenet".
      config: the net.

    Raises:
      UsageError: the file cannot be read or is not for this net.
    """
    suffix = path.suffix.lower()
    if mend := CONVERT.get(suffix):
        raise UsageError(f"weights are not read from {path}: {mend}")
    expected = nnx.to_pure_dict(
        nnx.state(nnx.eval_shape(lambda: AlexNet(config, rngs=nnx.Rngs(0))), nnx.Param)
    )
    shapes = {name: leaf.shape for name, leaf in by_name(expected).items()}
    if suffix == ".onnx":
        # Imports onnx, which few have and which takes its time.
        from alexnet.model_io.weights_onnx import read_onnx

        layers = read_onnx(path, config)
        arrays = _from_channels_first(path, config, shapes, layers)
        conv1 = arrays["conv1.kernel"]
        if conv1.shape[2] == 3:
            # Caffe's images are blue, green, red.
            arrays["conv1.kernel"] = np.ascontiguousarray(conv1[:, :, ::-1])
        mean, std = CAFFE
    elif suffix in SUFFIXES:
        arrays, mean, std = _read_arrays(path, config, shapes)
    else:
        raise UsageError(f"weights must be a file .safetensors, .npz or .onnx, got {path}")
    params = jax.tree.map_with_path(lambda keys, _: arrays[_name(keys, expected)], expected)
    return Weights(params, mean, std)


def write_weights(
    path: Path,
    params: Any,
    mean: np.ndarray | None = None,
    std: np.ndarray | None = None,
) -> None:
    """Writes the parameters of a whole net, as conv1.kernel, conv1.bias, ..., fc8.bias.

    Args:
      path: what to write, .safetensors or .npz.
      params: as in `Weights`.
      mean: of pixels of 0 to 255, (C,) or (size, size, C), if the net is to be used without it
        being known from elsewhere.
      std: (C,), of the same.

    Raises:
      UsageError: the file cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"weights are written to a file .safetensors or .npz, got {path}")
    arrays = by_name(params)
    arrays |= {name: x for name, x in (("mean", mean), ("std", std)) if x is not None}
    arrays = {name: np.ascontiguousarray(x, np.float32) for name, x in arrays.items()}
    try:
        # Renamed when it is complete: what is there stays whole if this is stopped.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".weights-") as folder:
            part = Path(folder) / f"weights{path.suffix.lower()}"
            if part.suffix == ".npz":
                np.savez(part, **arrays)  # pyright: ignore[reportArgumentType]
            else:
                safetensors.numpy.save_file(arrays, part)
            part.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UsageError(f"cannot write the weights {path}: {error}") from error


# Names.


def by_name(params: Any) -> dict[str, Any]:
    return {_name(keys, params): leaf for keys, leaf in jax.tree.leaves_with_path(params)}


def _name(keys: tuple[Any, ...], params: Any) -> str:
    """What the paper calls the layer of a parameter, and whether it is the kernel or the bias."""
    convolutions, hidden = (len(params.get(name, ())) for name in ("convolutions", "hidden"))
    match [key.key for key in keys]:
        case ["convolutions", i, kind]:
            return f"conv{int(i) + 1}.{kind}"
        case ["hidden", i, kind]:
            return f"fc{convolutions + int(i) + 1}.{kind}"
        case ["classes", kind]:
            return f"fc{convolutions + hidden + 1}.{kind}"
        case _:
            return f"fc{convolutions + hidden + 1}.bias"


# Arrays by name: ours and torchvision's.


def _read_arrays(
    path: Path, config: AlexNetConfig, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, np.ndarray], np.ndarray | None, np.ndarray | None]:
    arrays = _load(path)
    if any(name.startswith(("features.", "classifier.")) for name in arrays):
        layers = _torchvision_layers(path, config, arrays)
        return _from_channels_first(path, config, shapes, layers), TORCHVISION.mean, TORCHVISION.std
    mean, std = (arrays.pop(name, None) for name in ("mean", "std"))
    _check_names(path, arrays, shapes)
    for name, shape in shapes.items():
        _check_shape(path, name, arrays[name].shape, [shape])
    channels = (config.image_channels,)
    if mean is not None:
        images = [(size, size, *channels) for size in (config.stored_size, config.image_size)]
        _check_shape(path, "mean", mean.shape, [channels, *images])
    if std is not None:
        _check_shape(path, "std", std.shape, [channels])
    return arrays, mean, std


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        if path.suffix.lower() == ".npz":
            # Opened here, as NumPy leaves a damaged file open.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
                arrays = {name: saved[name] for name in saved.files}
        else:
            arrays = safetensors.numpy.load_file(path)
    except Exception as error:
        # A damaged file raises errors of NumPy, of zip, of zlib and of Python's own parser.
        raise UsageError(f"cannot read the weights {path}: {error}") from error
    return {name: _float32(path, name, array) for name, array in arrays.items()}


def _float32(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    # NumPy does not count bfloat16 among its own.
    if not jax.numpy.issubdtype(array.dtype, np.floating):
        raise UsageError(f"{path}: {name} has numbers of type {array.dtype}, not floats")
    array = np.asarray(array, np.float32)
    if not np.isfinite(array).all():
        raise UsageError(f"{path}: {name} has numbers that are not finite")
    return array


def _torchvision_layers(
    path: Path, config: AlexNetConfig, arrays: Mapping[str, np.ndarray]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    if _computation(config) != _computation(AlexNetConfig.one_weird_trick()):
        raise UsageError(f"{path} is torchvision's alexnet; it is for the net one-weird-trick")
    _check_names(
        path,
        arrays,
        [f"{layer}.{kind}" for layer in TORCHVISION_LAYERS.values() for kind in ("weight", "bias")],
    )
    return {
        ours: (arrays[f"{layer}.weight"], arrays[f"{layer}.bias"])
        for ours, layer in TORCHVISION_LAYERS.items()
    }


def _computation(config: AlexNetConfig) -> Any:
    """What a net does, apart from its width."""
    return [
        (conv.kernel_size, conv.inputs, conv.strides, conv.padding, conv.steps)
        for conv in config.convolutions
    ], len(config.hidden_units)


# Layers of others, which have channels before pixels, outputs before inputs.


def _from_channels_first(
    path: Path,
    config: AlexNetConfig,
    shapes: Mapping[str, tuple[int, ...]],
    layers: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Our kernels and biases, of (outputs, inputs, H, W) and (outputs, inputs)."""
    pixels, channels = config.pooled_size, config.convolutions[-1].features
    arrays = {}
    for layer, (weight, bias) in layers.items():
        *edges, inputs, outputs = shapes[f"{layer}.kernel"]
        _check_shape(path, f"the weight of {layer}", weight.shape, [(outputs, inputs, *edges)])
        _check_shape(path, f"the bias of {layer}", bias.shape, [(outputs,)])
        if layer == config.dense_names[0]:
            weight = weight.reshape(outputs, channels, pixels, pixels)
        kernel = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
        arrays[f"{layer}.kernel"] = np.ascontiguousarray(kernel).reshape(*edges, inputs, outputs)
        arrays[f"{layer}.bias"] = bias
    return arrays


def _check_names(path: Path, found: Any, expected: Any) -> None:
    if missing := set(expected) - set(found):
        raise UsageError(f"{path} lacks {', '.join(sorted(missing))}, which the net has")
    if extra := set(found) - set(expected):
        raise UsageError(f"{path} has {', '.join(sorted(extra))}, which the net lacks")


def _check_shape(
    path: Path, name: str, found: tuple[int, ...], expected: list[tuple[int, ...]]
) -> None:
    if found not in expected:
        raise UsageError(f"{path}: {name} is {found}, not {' or '.join(map(str, expected))}")
