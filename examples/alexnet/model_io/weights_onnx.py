"""Caffe's AlexNet and CaffeNet as ONNX: the weights of a graph that computes what the net does.

Names are not relied on, as converters choose them: layers are taken in the order of the graph.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from alexnet.errors import UsageError
from grouped_conv_jax.models import AlexNetConfig
from grouped_conv_jax.models.alexnet_config import POOL_SIZE, POOL_STRIDE

try:
    import onnx
    import onnx.checker
    import onnx.numpy_helper
except ImportError as error:
    raise UsageError("weights in an .onnx file need the package onnx: pip install onnx") from error

STEPS = {"Relu": "relu", "LRN": "lrn", "MaxPool": "pool"}

IGNORED = frozenset({"Constant", "Dropout", "Flatten", "Identity", "Reshape", "Softmax"})
"""What changes no number, or none but those of the classes after the logits."""


@dataclasses.dataclass
class Layer:
    """A convolution or a product with a matrix, and the nodes that follow it."""

    node: Any
    weight: np.ndarray
    bias: np.ndarray | None
    following: list[Any] = dataclasses.field(default_factory=list)


def read_onnx(path: Path, config: AlexNetConfig) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The weight (outputs, inputs, H, W) or (outputs, inputs) and the bias of each layer.

    Raises:
      UsageError: the file cannot be read, or it computes something else than the net.
    """
    layers = _layers(path)
    names = config.convolution_names + config.dense_names
    kinds = ["Conv" if layer.node.op_type == "Conv" else "Gemm" for layer in layers]
    expected = ["Conv"] * len(config.convolutions) + ["Gemm"] * len(config.dense_names)
    if kinds != expected:
        raise UsageError(
            f"{path} has {kinds.count('Conv')} convolutions and {kinds.count('Gemm')} fully "
            f"connected layers, the net {len(config.convolutions)} and {len(config.dense_names)}, "
            "in this order"
        )
    if not any(node.op_type == "LRN" for layer in layers for node in layer.following):
        raise UsageError(
            f"{path} has no normalisation, so that it is not of Caffe; the weights of torchvision "
            "are read from a .safetensors file"
        )
    for i, (name, layer) in enumerate(zip(names, layers, strict=True)):
        facts = _facts_of_convolution(config, i, layer) if i < len(config.convolutions) else []
        facts.append(("nodes after it", _steps(layer), _expected_steps(config, i)))
        for what, found, wanted in facts:
            if found != wanted:
                raise UsageError(
                    f"{path}: {name} has the {what} {found}, the net {wanted}; "
                    "it may be for the net caffe or caffenet, with two towers"
                )
    return {
        name: (
            layer.weight,
            np.zeros(len(layer.weight), np.float32) if layer.bias is None else layer.bias,
        )
        for name, layer in zip(names, layers, strict=True)
    }


def _load(path: Path) -> Any:
    try:
        # What is in other files, wherever the file says that they are, is not read.
        model = onnx.load_model(path, load_external_data=False)
        elsewhere = [
            tensor.name
            for tensor in model.graph.initializer
            if tensor.data_location == onnx.TensorProto.EXTERNAL
        ]
        if not elsewhere:
            onnx.checker.check_model(model)
    except OSError as error:
        raise UsageError(f"cannot read the weights {path}: {error.strerror}") from error
    except Exception as error:
        # Of protobuf, whose errors have no name that it promises, and of the checker.
        reason = str(error).partition("\n")[0]
        raise UsageError(f"cannot read the weights {path}: no ONNX model, {reason}") from error
    if elsewhere:
        raise UsageError(f"{path} has the numbers of {elsewhere[0]} in another file; merge them")
    return model.graph


def _layers(path: Path) -> list[Layer]:
    graph = _load(path)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    layers: list[Layer] = []
    for node in graph.node:
        if node.op_type == "Constant":
            tensors |= dict.fromkeys(
                node.output, *(a.t for a in node.attribute if a.name == "value")
            )
        found = [tensors.get(name) for name in node.input]
        if node.op_type in ("Conv", "Gemm", "MatMul") and found[1] is not None:
            bias = None if len(found) < 3 else _array(path, found[2])
            layers.append(Layer(node, _weight(path, node, _array(path, found[1])), bias))
        elif node.op_type == "Add" and any(found) and layers and layers[-1].bias is None:
            layers[-1].bias = _array(path, found[0] or found[1]).reshape(-1)
        elif node.op_type in STEPS and layers:
            layers[-1].following.append(node)
        elif node.op_type not in IGNORED:
            raise UsageError(f"{path} has a node {node.op_type} that is not of a net of Caffe's")
    return layers


def _weight(path: Path, node: Any, array: np.ndarray) -> np.ndarray:
    """With the outputs first."""
    if node.op_type == "Conv":
        return array
    attributes = _attributes(node)
    scales = attributes.get("alpha", 1.0), attributes.get("beta", 1.0), attributes.get("transA", 0)
    if scales != (1.0, 1.0, 0) or array.ndim != 2:
        raise UsageError(f"{path}: the node {node.op_type} {node.name} is not a layer of a net")
    return array if attributes.get("transB") else array.T


def _array(path: Path, tensor: Any) -> np.ndarray:
    if tensor is None:
        raise UsageError(f"{path} computes the bias of a layer, which of Caffe's is an array")
    types = onnx.TensorProto
    if tensor.data_type not in (types.FLOAT, types.DOUBLE, types.FLOAT16, types.BFLOAT16):
        raise UsageError(f"{path}: {tensor.name} has numbers that are not floats")
    array = np.asarray(onnx.numpy_helper.to_array(tensor), np.float32)
    if not np.isfinite(array).all():
        raise UsageError(f"{path}: {tensor.name} has numbers that are not finite")
    return array


def _attributes(node: Any) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


# What the graph computes, and what the net does.


def _steps(layer: Layer) -> tuple[str, ...]:
    return tuple(STEPS[node.op_type] for node in layer.following)


def _expected_steps(config: AlexNetConfig, i: int) -> tuple[str, ...]:
    if i < len(config.convolutions):
        return config.convolutions[i].steps
    return ("relu",) if i < len(config.convolutions) + len(config.hidden_units) else ()


def _facts_of_convolution(
    config: AlexNetConfig, i: int, layer: Layer
) -> list[tuple[str, Any, Any]]:
    """What is compared: its name, what it is in the graph, and in the net."""
    conv, found = config.convolutions[i], _attributes(layer.node)
    before, after = conv.padding
    facts = [
        ("groups", found.get("group", 1), config.towers if conv.inputs == "own" else 1),
        ("strides", list(found.get("strides", (1, 1))), [conv.strides] * 2),
        ("padding", list(found.get("pads", (0,) * 4)), [before, before, after, after]),
        ("dilations", list(found.get("dilations", (1, 1))), [1, 1]),
        ("automatic padding", found.get("auto_pad", b"NOTSET"), b"NOTSET"),
    ]
    for node in layer.following:
        found = _attributes(node)
        if node.op_type == "MaxPool":
            *begins, end, other_end = found.get("pads", (0,) * 4)
            edge = conv.positions(config.edges[i])
            facts += [
                ("pool", [*found["kernel_shape"]], [POOL_SIZE] * 2),
                ("strides of its pool", list(found.get("strides", (1, 1))), [POOL_STRIDE] * 2),
                ("padding of its pool", begins, [0, 0]),
                # Caffe rounds up, which converters express as padding at the far edges.
                *(
                    (
                        "pooled size",
                        (edge + more - POOL_SIZE) // POOL_STRIDE + 1,
                        config.edges[i + 1],
                    )
                    for more in (end, other_end)
                ),
            ]
        elif node.op_type == "LRN":
            size = found["size"]
            alpha = found.get("alpha", 1e-4) / size
            towers = 1 if config.lrn_across_towers else config.towers
            facts += [
                ("normalisation over", size, config.lrn_size),
                ("normalisation of towers", 1, towers),
                ("normalisation with alpha", _near(alpha, config.lrn_alpha), config.lrn_alpha),
                *(
                    (f"normalisation with {name}", _near(found.get(name, default), wanted), wanted)
                    for name, default, wanted in (
                        ("beta", 0.75, config.lrn_beta),
                        ("bias", 1.0, config.lrn_k),
                    )
                ),
            ]
    return facts


def _near(found: float, wanted: float) -> float:
    """`wanted` if it is that as float32."""
    return wanted if math.isclose(found, wanted, rel_tol=1e-6) else found
