"""Caffe's AlexNet and CaffeNet as ONNX: the weights of a graph that computes what the net does.

Converters choose the names in a graph. So layers are taken in the order of the graph.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.checker
import onnx.numpy_helper

from alexnet.errors import UsageError
from alexnet.model_io.weights import as_float32
from grouped_conv_jax.models import AlexNetConfig
from grouped_conv_jax.models.alexnet_config import POOL_SIZE, POOL_STRIDE

STEPS = {"Relu": "relu", "LRN": "lrn", "MaxPool": "pool"}

IGNORED = frozenset({"Constant", "Dropout", "Flatten", "Identity", "Reshape", "Softmax"})
"""Nodes that change no number, except for those of the classes after the logits."""


class Layer(NamedTuple):
    """A convolution or a matrix product, and the nodes that follow it."""

    node: Any
    weight: np.ndarray
    bias: np.ndarray
    following: list[Any]


def read_onnx(path: Path, config: AlexNetConfig) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the weight (outputs, inputs[, H, W]) and the bias of each layer.

    Raises:
      UsageError: the file cannot be read, or it computes something else than the net.
    """
    layers = _layers(path)
    names = config.convolution_names + config.dense_names
    found = [layer.node.op_type == "Conv" for layer in layers]
    if found != [name in config.convolution_names for name in names]:
        raise UsageError(
            f"{path} has {sum(found)} convolutions and {len(found) - sum(found)} fully connected "
            f"layers, the net {len(config.convolutions)} and {len(config.dense_names)}"
        )
    if not any(node.op_type == "LRN" for layer in layers for node in layer.following):
        raise UsageError(
            f"{path} has no normalisation, so it is not of Caffe; the weights of torchvision "
            "are read from a .safetensors file"
        )
    for i, (name, layer) in enumerate(zip(names, layers, strict=True)):
        for what, (of_graph, of_net) in _facts(config, i, layer).items():
            if of_graph != of_net:
                raise UsageError(
                    f"{path}: {name} has the {what} {of_graph}, the net {of_net}; "
                    "it may be for the net caffe or caffenet, with two towers"
                )
    return {name: (layer.weight, layer.bias) for name, layer in zip(names, layers, strict=True)}


def _load(path: Path) -> Any:
    try:
        # Arrays in other files, wherever the graph says that they are, are not read.
        model = onnx.load_model(path, load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                raise ValueError(f"the numbers of {tensor.name} are in another file; merge them")
        onnx.checker.check_model(model)
    except Exception as error:
        # protobuf's and the checker's errors have no name that they promise.
        reason = str(error).partition("\n")[0]
        raise UsageError(f"cannot read the weights {path}: {reason}") from error
    return model.graph


def _layers(path: Path) -> list[Layer]:
    graph = _load(path)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    layers: list[Layer] = []

    def array(name: str) -> np.ndarray:
        if name not in tensors:
            raise UsageError(f"{path} computes the weights of a layer; Caffe's are arrays")
        return as_float32(path, name, onnx.numpy_helper.to_array(tensors[name]))

    for node in graph.node:
        kind, inputs, attributes = node.op_type, node.input, _attributes(node)
        if kind == "Constant":
            tensors[node.output[0]] = attributes.get("value")
        elif kind in ("Conv", "Gemm", "MatMul"):
            weight = array(inputs[1])
            if kind == "MatMul" or (kind == "Gemm" and not attributes.get("transB")):
                weight = weight.T
            bias = array(inputs[2]) if len(inputs) > 2 else np.zeros(len(weight), np.float32)
            layers.append(Layer(node, weight, bias, []))
        elif kind == "Add" and layers and layers[-1].node.op_type == "MatMul":
            bias = array(next((x for x in inputs if x in tensors), ""))
            layers[-1] = layers[-1]._replace(bias=bias.reshape(-1))
        elif kind in STEPS and layers:
            layers[-1].following.append(node)
        elif kind not in IGNORED:
            raise UsageError(f"{path} has a node {kind} that is not of a net of Caffe's")
    return layers


def _attributes(node: Any) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _facts(config: AlexNetConfig, i: int, layer: Layer) -> dict[str, tuple[Any, Any]]:
    """Returns what is compared: by its name, the value in the graph and in the net."""
    steps = tuple(STEPS[node.op_type] for node in layer.following)
    if i >= len(config.convolutions):
        relu = ("relu",) if i < len(config.convolutions) + len(config.hidden_units) else ()
        return {"nodes after it": (steps, relu)}
    conv, found = config.convolutions[i], _attributes(layer.node)
    before, after = conv.padding
    facts = {
        "nodes after it": (steps, conv.steps),
        "groups": (found.get("group", 1), config.towers if conv.inputs == "own" else 1),
        "strides": ([*found.get("strides", (1, 1))], [conv.strides] * 2),
        "padding": ([*found.get("pads", (0,) * 4)], [before, before, after, after]),
        "dilations": ([*found.get("dilations", (1, 1))], [1, 1]),
    }
    for node in layer.following:
        found = _attributes(node)
        if node.op_type == "MaxPool":
            # Caffe rounds up, which converters express as padding at the far edges.
            facts |= {
                "pool": ([*found["kernel_shape"]], [POOL_SIZE] * 2),
                "strides of its pool": ([*found.get("strides", (1, 1))], [POOL_STRIDE] * 2),
                "padding of its pool": ([*found.get("pads", (0,) * 4)][:2], [0, 0]),
            }
        elif node.op_type == "LRN":
            facts |= _lrn_facts(found, config)
    return facts


def _lrn_facts(found: dict[str, Any], config: AlexNetConfig) -> dict[str, tuple[Any, Any]]:
    numbers = {
        "alpha": (found.get("alpha", 1e-4) / found["size"], config.lrn_alpha),
        "beta": (found.get("beta", 0.75), config.lrn_beta),
        "bias": (found.get("bias", 1.0), config.lrn_k),
    }
    return {
        "normalisation over": (found["size"], config.lrn_size),
        "normalisation of towers": (1, 1 if config.lrn_across_towers else config.towers),
        # ONNX has float32 numbers, the net Python's.
        **{
            f"normalisation with {name}": (float(f"{a:.5g}"), float(f"{b:.5g}"))
            for name, (a, b) in numbers.items()
        },
    }
