"""Weights of whole nets in files: ours, and those that were published for Caffe and torchvision.

Nothing is unpickled, and nothing is trusted: each array must have the name and the shape that the
net asks for, and a graph (ONNX) must compute what the net does.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from flax import nnx

from alexnet.errors import UsageError
from grouped_conv_jax.models import AlexNet, AlexNetConfig

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
"""Advice for files that are not read."""

TORCHVISION_LAYERS = {
    **{f"conv{i}": f"features.{at}" for i, at in enumerate((0, 3, 6, 8, 10), 1)},
    **{f"fc{i}": f"classifier.{at}" for i, at in enumerate((1, 4, 6), 6)},
}
"""torchvision's names of the layers."""


class Weights(NamedTuple):
    """Parameters of a whole net, and the normalization of the images that they expect."""

    params: Any
    """Nested dicts of float32 arrays, as `nnx.to_pure_dict(nnx.state(net, nnx.Param))`."""
    mean: np.ndarray | None
    """Subtracted from pixels of 0 to 255: (C,) or (size, size, C); None if not known."""
    std: np.ndarray | None
    """(C,); pixels are divided by it after that."""


CAFFE = np.array((123, 117, 104), np.float32), np.ones(3, np.float32)
"""Mean and deviation. Caffe's training subtracts a mean image of this mean, red, green, blue."""

TORCHVISION = tuple(
    255 * np.array(x, np.float32) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
)
"""Mean and deviation of torchvision's images."""


def abstract_params(config: AlexNetConfig) -> Any:
    """Returns the shapes of a net's parameters, as `Weights.params`."""
    net = nnx.eval_shape(lambda: AlexNet(config, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(net, nnx.Param))


def by_name(params: Any) -> dict[str, Any]:
    """Returns the parameters as conv1.kernel, conv1.bias, ..., fc8.bias."""
    return {_name(keys, params): leaf for keys, leaf in jax.tree.leaves_with_path(params)}


def named_arrays(weights: Weights) -> dict[str, Any]:
    """Returns the parameters by name, and "mean" and "std" if they are known."""
    arrays = by_name(weights.params) | {"mean": weights.mean, "std": weights.std}
    return {name: array for name, array in arrays.items() if array is not None}


def read_weights(path: Path, config: AlexNetConfig) -> Weights:
    """Returns the weights in a file, for the net that is to have them.

    An array file (.safetensors or .npz) has the names of `named_arrays`, or those of torchvision's
    alexnet, for the net "one-weird-trick". An .onnx file has Caffe's bvlc_alexnet or CaffeNet, for
    "caffe" or "caffenet".
    """
    suffix = path.suffix.lower()
    if advice := CONVERT.get(suffix):
        raise UsageError(f"weights are not read from {path}: {advice}")
    if suffix == ".onnx":
        from alexnet.model_io.caffe import read_onnx

        arrays, (mean, std) = _channels_last(path, config, read_onnx(path, config)), CAFFE
        if (conv1 := arrays["conv1.kernel"]).shape[2] == 3:
            # Caffe's images are blue, green, red.
            arrays["conv1.kernel"] = np.ascontiguousarray(conv1[:, :, ::-1])
    elif suffix in (".safetensors", ".npz"):
        arrays = _load(path)
        if any(name.startswith(("features.", "classifier.")) for name in arrays):
            layers = _torchvision_layers(path, config, arrays)
            arrays, (mean, std) = _channels_last(path, config, layers), TORCHVISION
        else:
            mean, std = (arrays.pop(name, None) for name in ("mean", "std"))
    else:
        raise UsageError(f"weights must be a file .safetensors, .npz or .onnx, got {path}")
    expected = abstract_params(config)
    shapes = {name: leaf.shape for name, leaf in by_name(expected).items()}
    _check_names(path, arrays, shapes)
    for name, shape in shapes.items():
        _check_shape(path, name, arrays[name], [shape])
    channels, sizes = (config.image_channels,), (config.stored_size, config.image_size)
    _check_shape(path, "mean", mean, [channels, *((size, size, *channels) for size in sizes)])
    _check_shape(path, "std", std, [channels])
    params = jax.tree.map_with_path(lambda keys, _: arrays[_name(keys, expected)], expected)
    return Weights(params, mean, std)


def _name(keys: tuple[Any, ...], params: Any) -> str:
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


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        if path.suffix.lower() == ".npz":
            # The file is opened here, since NumPy leaves a damaged one open.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
                arrays = dict(saved)
        else:
            arrays = safetensors.numpy.load_file(path)
    except Exception as error:
        # A damaged file raises errors of NumPy, of zip, of zlib and of Python's own parser.
        raise UsageError(f"cannot read the weights {path}: {error}") from error
    return {name: as_float32(path, name, array) for name, array in arrays.items()}


def as_float32(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    """Returns the array in float32. Raises UsageError unless its numbers are finite floats."""
    # NumPy does not count bfloat16 among its own types.
    if not jax.numpy.issubdtype(array.dtype, np.floating):
        raise UsageError(f"{path}: {name} has numbers of type {array.dtype}, not floats")
    array = np.asarray(array, np.float32)
    if not np.isfinite(array).all():
        raise UsageError(f"{path}: {name} has numbers that are not finite")
    return array


def _torchvision_layers(
    path: Path, config: AlexNetConfig, arrays: Mapping[str, np.ndarray]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    def computation(net: AlexNetConfig) -> Any:
        names = ("kernel_size", "inputs", "strides", "padding", "steps")
        return [[getattr(conv, name) for name in names] for conv in net.convolutions]

    if computation(config) != computation(AlexNetConfig.one_weird_trick()):
        raise UsageError(f"{path} is torchvision's alexnet; it is for the net one-weird-trick")
    names = {
        ours: (f"{theirs}.weight", f"{theirs}.bias") for ours, theirs in TORCHVISION_LAYERS.items()
    }
    _check_names(path, arrays, [name for pair in names.values() for name in pair])
    return {layer: (arrays[weight], arrays[bias]) for layer, (weight, bias) in names.items()}


def _channels_last(
    path: Path, config: AlexNetConfig, layers: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns our kernels and biases, of (outputs, inputs, H, W) and (outputs, inputs)."""
    edge, channels = config.pooled_size, config.convolutions[-1].features
    arrays = {}
    for layer, (weight, bias) in layers.items():
        outputs = len(weight)
        if layer == config.dense_names[0]:
            # The features of a pooled image are numbered by channel first there, by pixel here.
            _check_shape(path, layer, weight, [(outputs, channels * edge**2)])
            weight = weight.reshape(outputs, channels, edge, edge)
            kernel = weight.transpose(2, 3, 1, 0).reshape(-1, outputs)
        else:
            kernel = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
        arrays |= {f"{layer}.kernel": np.ascontiguousarray(kernel), f"{layer}.bias": bias}
    return arrays


def _check_names(path: Path, found: Any, expected: Any) -> None:
    if missing := set(expected) - set(found):
        raise UsageError(f"{path} lacks {', '.join(sorted(missing))}, which the net has")
    if extra := set(found) - set(expected):
        raise UsageError(f"{path} has {', '.join(sorted(extra))}, which the net lacks")


def _check_shape(
    path: Path, name: str, array: np.ndarray | None, expected: list[tuple[int, ...]]
) -> None:
    if array is not None and array.shape not in expected:
        raise UsageError(f"{path}: {name} is {array.shape}, not {' or '.join(map(str, expected))}")
