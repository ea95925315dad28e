"""Weights in files: those of PyTorch and of Caffe give their logits, and wrong files are told."""

import dataclasses
import math
import pickle
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from cases import random
from small_alexnet import narrow, random_params, with_params
from torch_alexnets import torch_alexnet

from alexnet.errors import UsageError
from alexnet.model_io.weights import CAFFE, TORCHVISION, Weights, named_arrays, read_weights
from grouped_conv_jax.models import AlexNetConfig


def images_of(config: AlexNetConfig, count: int = 2) -> np.ndarray:
    size = config.image_size
    return random("images", (count, size, size, 3), np.float32)


def logits_of(config: AlexNetConfig, params) -> np.ndarray:
    return np.asarray(jax.jit(with_params(config, params))(jnp.asarray(images_of(config))))


def assert_same(params, expected) -> None:
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for found, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert type(found) is np.ndarray
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, wanted)


# Ours.


def write(path: Path, arrays: dict) -> Path:
    """Writes arrays to a .safetensors or .npz file."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        safetensors.numpy.save_file(arrays, path)
    return path


def ours(config: AlexNetConfig) -> dict:
    """Random parameters by name."""
    return named_arrays(Weights(random_params(config), None, None))


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("name", ["paper", "small"])
def test_what_was_written_is_read(tmp_path, name, suffix):
    config = narrow(name)
    arrays = ours(config)
    names = [*(f"conv{i}" for i in range(1, 6)), "fc6", "fc7", "fc8"]
    assert set(arrays) == {f"{name}.{kind}" for name in names for kind in ("kernel", "bias")}
    read = read_weights(write(tmp_path / f"weights{suffix}", arrays), config)
    assert_same(read.params, random_params(config))
    assert read.mean is None
    assert read.std is None


@pytest.mark.parametrize("shape", [(3,), (67, 67, 3), (76, 76, 3)])
def test_the_mean_of_the_images_goes_with_the_weights(tmp_path, shape):
    config = narrow("paper")
    mean, std = random("mean", shape, np.float32), random("std", (3,), np.float32)
    arrays = ours(config) | {"mean": mean, "std": std}
    read = read_weights(write(tmp_path / "weights.npz", arrays), config)
    np.testing.assert_array_equal(read.mean, mean)
    np.testing.assert_array_equal(read.std, std)


def test_numbers_of_16_bits_are_read_as_float32(tmp_path):
    config = narrow("paper")
    half = {name: array.astype(jnp.bfloat16) for name, array in ours(config).items()}
    read = read_weights(write(tmp_path / "weights.safetensors", half), config).params
    rounded = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16).astype(np.float32), random_params(config)
    )
    assert_same(read, rounded)


# Of PyTorch.


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("size", [99, 224])
def test_weights_of_torchvision_give_its_logits(tmp_path, size, suffix):
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(narrow("one-weird-trick"), image_size=size)
    assert config.pooled_size == (2 if size == 99 else 6)
    net = torch_alexnet(config)
    path = tmp_path / f"alexnet{suffix}"
    state = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    read = read_weights(write(path, state), config)
    with torch.no_grad():
        images = torch.from_numpy(images_of(config).transpose(0, 3, 1, 2).copy())
        expected = net(images).numpy()
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(logits_of(config, read.params), expected, rtol=1e-4, atol=1e-5)
    # As torchvision says it, of pixels from 0 to 1.
    assert (read.mean, read.std) == TORCHVISION
    np.testing.assert_allclose(TORCHVISION[0] / 255, (0.485, 0.456, 0.406), rtol=1e-6)
    np.testing.assert_allclose(TORCHVISION[1] / 255, (0.229, 0.224, 0.225), rtol=1e-6)


def torchvision_file(folder: Path, config: AlexNetConfig) -> Path:
    """Arrays of the names and shapes of torchvision's, without PyTorch."""
    shapes, inputs = {}, 3
    for number, conv in zip((0, 3, 6, 8, 10), config.convolutions, strict=True):
        shapes[f"features.{number}"] = (conv.features, inputs, *[conv.kernel_size] * 2)
        inputs = conv.features
    inputs *= config.pooled_size**2
    for number, units in zip((1, 4, 6), (*config.hidden_units, config.num_classes), strict=True):
        shapes[f"classifier.{number}"] = (units, inputs)
        inputs = units
    arrays = {f"{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}
    arrays |= {f"{name}.bias": np.ones(shape[0], np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(arrays, folder / "alexnet.safetensors")
    return folder / "alexnet.safetensors"


def test_weights_of_torchvision_for_another_net_are_refused(tmp_path):
    config = narrow("one-weird-trick")
    path = torchvision_file(tmp_path, config)
    read_weights(path, config)
    with pytest.raises(UsageError, match="torchvision's alexnet; it is for the net one-weird"):
        read_weights(path, narrow("one-tower"))
    wide = dataclasses.replace(config, hidden_units=(12, 24))
    message = r"alexnet.safetensors: fc8.kernel is \(16, 7\), not \(24, 7\)"
    with pytest.raises(UsageError, match=message):
        read_weights(path, wide)
    arrays = safetensors.numpy.load_file(path)
    del arrays["features.8.bias"]
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(UsageError, match=r"lacks features\.8\.bias, which the net has"):
        read_weights(path, config)


# Of Caffe, by ONNX.


def caffe_model(config: AlexNetConfig, arrays=None, **changes):
    """A graph of Caffe's kind, and its arrays: channels first, blue before green before red."""
    onnx = pytest.importorskip("onnx")
    node, tensors, nodes, x = onnx.helper.make_node, {}, [], "data"
    arrays = arrays or caffe_arrays(config)

    def add(op, *names, **attributes):
        nonlocal x
        # Names that say nothing: converters choose their own.
        nodes.append(node(op, [x, *names], [f"t{len(nodes)}"], **attributes))
        x = f"t{len(nodes) - 1}"

    def name_of(array):
        tensors[f"w{len(tensors)}"] = onnx.numpy_helper.from_array(array, f"w{len(tensors)}")
        return f"w{len(tensors) - 1}"

    for i, conv in enumerate(config.convolutions):
        weight, bias = (name_of(array) for array in arrays[i])
        groups = 2 if i in (1, 3, 4) else 1
        before, after = conv.padding
        pads, strides = [before, before, after, after], [conv.strides] * 2
        attributes = {"group": groups, "pads": pads, "strides": strides}
        add("Conv", weight, bias, **{**attributes, **changes.get("Conv", {})})
        for step in conv.steps:
            if step == "relu":
                add("Relu")
            elif step == "lrn":
                lrn = {"size": 5, "alpha": 1e-4, "beta": 0.75, "bias": 1.0}
                add("LRN", **{**lrn, **changes.get("LRN", {})})
            else:
                pool = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 0, 0]}
                add("MaxPool", **{**pool, **changes.get("MaxPool", {})})
    add("Flatten")
    for i, (weight, bias) in enumerate(arrays[5:]):
        if changes.get("fc") == "MatMul":
            add("MatMul", name_of(weight.T.copy()))
            add("Add", name_of(bias))
        else:
            add("Gemm", name_of(weight), name_of(bias), transB=1)
        if i < 2:
            add("Relu")
            add("Dropout")
    add("Softmax")
    size = config.image_size
    image = onnx.helper.make_tensor_value_info("data", 1, (1, 3, size, size))
    out = onnx.helper.make_tensor_value_info(x, 1, (1, config.num_classes))
    graph = onnx.helper.make_graph(nodes, "net", [image], [out], list(tensors.values()))
    opset = onnx.helper.make_opsetid("", 13)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    onnx.checker.check_model(model)
    return model


def caffe_arrays(config: AlexNetConfig) -> list[tuple[np.ndarray, np.ndarray]]:
    shapes, inputs = [], 3
    for i, conv in enumerate(config.convolutions):
        groups = 2 if i in (1, 3, 4) else 1
        shapes.append((conv.features, inputs // groups, conv.kernel_size, conv.kernel_size))
        inputs = conv.features
    inputs *= config.pooled_size**2
    for units in (*config.hidden_units, config.num_classes):
        shapes.append((units, inputs))
        inputs = units
    return [
        (
            np.float32(math.sqrt(2 / math.prod(shape[1:]))) * random(f"w{i}", shape, np.float32),
            random(f"b{i}", shape[:1], np.float32),
        )
        for i, shape in enumerate(shapes)
    ]


def answer_of(model, image: np.ndarray) -> np.ndarray:
    """What the graph computes, by ONNX's own evaluator."""
    op_run = pytest.importorskip("onnx.reference.op_run")

    # That of onnx 1.23 normalises as many channels as there are images, and no others.
    class LRN(op_run.OpRun):
        def _run(self, x, alpha, beta, bias, size):
            reach = size // 2
            padded = np.pad(np.square(x), ((0, 0), (reach, reach), (0, 0), (0, 0)))
            total = sum(padded[:, i : i + x.shape[1]] for i in range(size))
            return (x / (bias + alpha / size * total) ** beta,)

    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator(model, new_ops=[LRN])
    (answer,) = evaluator.run(None, {"data": image[None]})
    return answer[0]


@pytest.mark.parametrize(
    ("name", "fc", "size"),
    [
        ("caffe", "Gemm", 99),
        ("caffenet", "MatMul", 99),
        ("caffe", "MatMul", 227),
    ],
)
def test_weights_of_caffe_give_its_answers(tmp_path, name, fc, size):
    onnx = pytest.importorskip("onnx")
    config = dataclasses.replace(narrow(name), image_size=size)
    assert config.pooled_size == (2 if size == 99 else 6)
    # So large that normalisation shows.
    config = dataclasses.replace(config, lrn_alpha=2.0)
    model = caffe_model(config, fc=fc, LRN={"alpha": 10.0})
    onnx.save(model, tmp_path / "net.onnx")
    read = read_weights(tmp_path / "net.onnx", config)
    logits = logits_of(config, read.params)
    # The graph's image is ours with blue first.
    images = images_of(config).transpose(0, 3, 1, 2)[:, ::-1]
    for image, ours in zip(images, logits, strict=True):
        answer = answer_of(model, image)
        exponentials = np.exp(np.float64(ours))
        assert np.ptp(answer) > 0.05
        np.testing.assert_allclose(exponentials / exponentials.sum(), answer, rtol=1e-4)
    assert (read.mean, read.std) == CAFFE
    np.testing.assert_array_equal(read.mean, (123, 117, 104))
    np.testing.assert_array_equal(read.std, (1, 1, 1))


@pytest.mark.parametrize(
    ("net", "changes", "message"),
    [
        ("caffenet", {}, r"conv1 has the nodes after it .*'lrn', 'pool'\), the net .*'pool', 'lrn"),
        ("paper", {}, r"conv1 has the padding \[0, 0, 0, 0\], the net \[0, 0, 3, 3\]"),
        ("caffe", {"Conv": {"dilations": [2, 2]}}, r"conv1 has the dilations \[2, 2\], the net"),
        ("caffe", {"LRN": {"alpha": 1e-3}}, r"normalisation with alpha 0\.0002.*, the net 2e-05"),
        ("caffe", {"LRN": {"bias": 2.0}}, r"normalisation with bias 2\.0, the net 1\.0"),
        ("caffe", {"LRN": {"size": 3}}, r"conv1 has the normalisation over 3, the net 5"),
        ("caffe", {"MaxPool": {"pads": [1, 1, 0, 0]}}, r"the padding of its pool \[1, 1\]"),
        ("caffe", {"MaxPool": {"kernel_shape": [2, 2]}}, r"the pool \[2, 2\], the net \[3, 3\]"),
    ],
)
def test_a_graph_that_computes_something_else_is_refused(tmp_path, net, changes, message):
    onnx = pytest.importorskip("onnx")
    onnx.save(caffe_model(narrow("caffe"), **changes), tmp_path / "net.onnx")
    with pytest.raises(UsageError, match=r"net\.onnx: .*" + message):
        read_weights(tmp_path / "net.onnx", narrow(net))


def test_other_groups_shapes_and_layers_of_a_graph_are_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    config, path = narrow("caffe"), tmp_path / "net.onnx"
    model = caffe_model(config)
    onnx.save(model, path)
    with pytest.raises(UsageError, match=r"conv2 has the groups 2, the net 4; .* two towers"):
        read_weights(path, dataclasses.replace(config, towers=4))
    wide = dataclasses.replace(config, num_classes=9)
    with pytest.raises(UsageError, match=r"fc8.kernel is \(16, 7\), not \(16, 9\)"):
        read_weights(path, wide)
    deep = dataclasses.replace(config, hidden_units=(12,))
    with pytest.raises(
        UsageError, match=r"5 convolutions and 3 fully connected .*, the net 5 and 2"
    ):
        read_weights(path, deep)
    plain = narrow("one-weird-trick")
    onnx.save(caffe_model(plain), path)
    with pytest.raises(UsageError, match="has no normalisation, so it is not of Caffe"):
        read_weights(path, plain)


def test_rounding_up_in_pooling_changes_nothing(tmp_path):
    # 15 and 7 pixels, to which a window of 3 every 2 pixels fits.
    onnx = pytest.importorskip("onnx")
    config = narrow("caffe")
    model = caffe_model(config, MaxPool={"pads": [0, 0, 1, 1]})
    onnx.save(model, tmp_path / "net.onnx")
    onnx.save(caffe_model(config), tmp_path / "same.onnx")
    assert_same(
        read_weights(tmp_path / "net.onnx", config).params,
        read_weights(tmp_path / "same.onnx", config).params,
    )


# Files that are damaged, wrong or dangerous.


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("alexnet.pth", "safetensors.torch as s; s.save_file(torch.load('alexnet.pth', weights_"),
        ("alexnet.pt", "reading it could run any program in it"),
        ("alexnet.pkl", "reading it could run any program in it"),
        ("net.caffemodel", "bvlcalexnet-12.onnx"),
        ("net.h5", "must be a file .safetensors, .npz or .onnx"),
    ],
)
def test_files_that_are_not_read(tmp_path, name, mend):
    (tmp_path / name).write_bytes(pickle.dumps({}))
    with pytest.raises(UsageError, match=re.escape(mend)):
        read_weights(tmp_path / name, narrow("paper"))


def test_the_shown_conversion_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    config = narrow("one-weird-trick")
    torch.save(torch_alexnet(config).state_dict(), tmp_path / "alexnet.pth")
    save_file(
        torch.load(tmp_path / "alexnet.pth", weights_only=True), tmp_path / "alexnet.safetensors"
    )
    read_weights(tmp_path / "alexnet.safetensors", config)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_nothing_is_unpickled(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, weight=np.array([Bomb()], object))
    with pytest.raises(UsageError, match=r"cannot read the weights .*allow_pickle"):
        read_weights(path, narrow("paper"))
    for content in (pickle.dumps(Bomb()), b"\x93NUMPY"):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="cannot read the weights"):
            read_weights(path, narrow("paper"))
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(UsageError, match="cannot read the weights"):
        read_weights(path, narrow("paper"))


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".onnx"])
def test_damaged_files_are_told(tmp_path, suffix):
    config = narrow("caffe")
    path = tmp_path / f"weights{suffix}"
    with pytest.raises(UsageError, match=f"cannot read the weights .*{suffix}"):
        read_weights(path, config)
    if suffix == ".onnx":
        pytest.importorskip("onnx").save(caffe_model(config), path)
    else:
        write(path, ours(config))
    read_weights(path, config)
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"\xff" * 1000):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match=rf"weights\{suffix}"):
            read_weights(path, config)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"conv3.kernel": (3, 3, 12, 15)},
            r"conv3\.kernel is \(3, 3, 12, 15\), not \(3, 3, 12, 16",
        ),
        ({"fc6.bias": None}, r"lacks fc6\.bias, which the net has"),
        ({"fc9.bias": (3,)}, r"has fc9\.bias, which the net lacks"),
        ({"mean": (3, 67, 67)}, r"mean is \(3, 67, 67\), not \(3,\) or \(76, 76, 3\) or \(67, 67"),
        ({"std": (1,)}, r"std is \(1,\), not \(3,\)"),
        ({"fc7.bias": np.full(16, np.nan, np.float32)}, r"fc7\.bias has numbers that are not fin"),
        ({"fc7.bias": np.ones(16, np.int32)}, r"fc7\.bias has numbers of type int32, not floats"),
    ],
)
def test_arrays_that_the_net_does_not_have(tmp_path, suffix, changes, message):
    config = narrow("paper")
    path = tmp_path / f"weights{suffix}"
    arrays = ours(config)
    for name, change in changes.items():
        arrays.pop(name, None)
        if isinstance(change, tuple):
            arrays[name] = np.ones(change, np.float32)
        elif change is not None:
            arrays[name] = change
    write(path, arrays)
    with pytest.raises(UsageError, match=rf"weights\{suffix}:? " + message):
        read_weights(path, config)


def test_arrays_of_a_graph_that_are_elsewhere_or_damaged_are_told(tmp_path):
    onnx = pytest.importorskip("onnx")
    config, path = narrow("caffe"), tmp_path / "net.onnx"
    model = caffe_model(config)
    model.graph.initializer[2].raw_data = model.graph.initializer[2].raw_data[:-4]
    onnx.save(model, path)
    with pytest.raises(UsageError, match=r"cannot read the weights .*net\.onnx: .*w2"):
        read_weights(path, config)
    onnx.save(caffe_model(config), path, save_as_external_data=True, size_threshold=0)
    with pytest.raises(UsageError, match=r"the numbers of w\d are in another file"):
        read_weights(path, config)
    arrays = caffe_arrays(config)
    arrays[3] = (arrays[3][0], arrays[3][1].astype(np.int32))
    onnx.save(caffe_model(config, arrays), path)
    with pytest.raises(UsageError, match=r"w7 has numbers of type int32, not floats"):
        read_weights(path, config)
    arrays[3] = (arrays[3][0], np.full_like(arrays[3][1], np.inf, np.float32))
    onnx.save(caffe_model(config, arrays), path)
    with pytest.raises(UsageError, match=r"w7 has numbers that are not finite"):
        read_weights(path, config)
