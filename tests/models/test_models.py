"""ResNeXt, MobileNet and ConvNeXt: published figures, the same in PyTorch; their benchmark."""

import functools
import importlib
import json
import math
from collections.abc import Iterator
from typing import Any

import benchmark_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random
from flax import nnx
from jax import lax

from benchmarks import pytorch
from grouped_conv_jax import count_multiply_adds, grouped_conv
from grouped_conv_jax.counting import count_bytes, count_flops, count_parameters
from grouped_conv_jax.layers import Convolution
from grouped_conv_jax.models import ConvNeXt, MobileNet, ResNeXt

NETS = (ResNeXt, MobileNet, ConvNeXt)

TINY: dict[type, dict[str, Any]] = {
    ResNeXt: dict(stage_sizes=(1, 2), feature_group_count=4, group_features=2, stem_features=8),
    MobileNet: dict(blocks=((16, 1), (32, 2), (32, 1)), width_multiplier=0.5),
    ConvNeXt: dict(stage_sizes=(1, 2), features=(8, 16), layer_scale=0.5),
}


def tiny(net: type, **more: Any) -> Any:
    return net(5, **{**TINY[net], **more}, rngs=nnx.Rngs(0))


def images(size: int = 16) -> np.ndarray:
    return random("images", (3, size, size, 3), np.float32)


@pytest.mark.parametrize(
    ("net", "parameters", "multiply_adds", "published"),
    [
        (ResNeXt, 25_028_904, 4_230_479_872, "4.23e+09"),
        (MobileNet, 4_231_976, 568_740_352, "5.69e+08"),
        (ConvNeXt, 28_589_128, 4_455_531_264, "4.46e+09"),
    ],
)
def test_published_parameters_and_multiply_adds(net, parameters, multiply_adds, published):
    graphdef, params, rest = nnx.split(
        nnx.eval_shape(lambda: net(rngs=nnx.Rngs(0))), nnx.Param, ...
    )
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == parameters

    def forward(params, rest, image):
        return nnx.merge(graphdef, params, rest)(image)

    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    assert jax.eval_shape(forward, params, rest, image).shape == (1, 1000)
    counted = count_multiply_adds(forward, params, rest, image)
    assert counted == multiply_adds
    assert f"{counted:.2e}" == published


@pytest.mark.parametrize(
    ("net", "more", "pixels", "millions", "mega_multiply_adds"),
    [
        # Tables 6 and 7 of the paper of MobileNet.
        (MobileNet, dict(width_multiplier=0.25), 224, 0.5, 41),
        *(
            pytest.param(*values, marks=pytest.mark.slow)
            for values in [
                (MobileNet, dict(width_multiplier=0.5), 224, 1.3, 149),
                (MobileNet, dict(width_multiplier=0.75), 224, 2.6, 325),
                (MobileNet, {}, 192, 4.2, 418),
                (MobileNet, {}, 128, 4.2, 186),
                # ConvNeXt-S and -B, and ResNeXt-101 32x4d.
                (ConvNeXt, dict(stage_sizes=(3, 3, 27, 3)), 224, 50, 8_700),
                (
                    ConvNeXt,
                    dict(stage_sizes=(3, 3, 27, 3), features=(128, 256, 512, 1024)),
                    224,
                    89,
                    15_400,
                ),
                (ResNeXt, dict(stage_sizes=(3, 4, 23, 3)), 224, 44, 8_000),
            ]
        ),
    ],
)
def test_published_figures_of_other_sizes(net, more, pixels, millions, mega_multiply_adds):
    model = nnx.eval_shape(lambda: net(**more, rngs=nnx.Rngs(0)))
    image = jax.ShapeDtypeStruct((1, pixels, pixels, 3), jnp.float32)
    digits = 1 if millions < 10 else 0
    assert round(count_parameters(model) / 1e6, digits) == millions
    multiply_adds = count_multiply_adds(model, image)
    assert round(multiply_adds / 1e6, -2 if net is not MobileNet else 0) == mega_multiply_adds
    assert count_flops(model, image) == 2 * multiply_adds
    # Each parameter of a contraction is read, and so are the pixels.
    assert count_bytes(model, image) > 4 * (0.9 * count_parameters(model) + 3 * pixels**2)


def test_feature_maps_of_the_papers():
    def last_map(net, after):
        found = []

        def conv(*args, **kwargs):
            found.append(grouped_conv(*args, **kwargs))
            return found[-1]

        def forward():
            net(conv_general_dilated=conv, rngs=nnx.Rngs(0))(jnp.zeros((1, 224, 224, 3)))
            return [found[i] for i in after]

        return [x.shape[1:] for x in jax.eval_shape(forward)]

    assert last_map(ResNeXt, (0, 3, -1)) == [(112, 112, 64), (56, 56, 256), (7, 7, 2048)]
    assert last_map(MobileNet, (0, 2, -1)) == [(112, 112, 32), (112, 112, 64), (7, 7, 1024)]
    assert last_map(ConvNeXt, (0, 1, -1)) == [(56, 56, 96), (56, 56, 96), (7, 7, 768)]


def value_and_gradients(net: Any, images: np.ndarray) -> Any:
    """Logits in training, gradients of a sum of them, and the state after it."""
    graphdef, params, rest = nnx.split(net, nnx.Param, ...)
    cotangent = random("cotangent", (len(images), 5), np.float32)

    def total(params, rest):
        net = nnx.merge(graphdef, params, rest, copy=True)
        logits = net(jnp.asarray(images))
        return jnp.vdot(logits, cotangent), (logits, nnx.split(net, nnx.Param, ...)[2])

    gradients, (logits, rest) = jax.jit(jax.grad(total, has_aux=True))(params, rest)
    return logits, gradients, nnx.filter_state(rest, nnx.BatchStat)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "other"),
    [
        (MobileNet, lax.conv_general_dilated),
        (MobileNet, Convolution("vmap")),
        (ResNeXt, lax.conv_general_dilated),
        (ConvNeXt, lax.conv_general_dilated),
    ],
)
def test_training_is_the_same_by_any_convolution(net, other):
    here = value_and_gradients(tiny(net), images())
    there = value_and_gradients(tiny(net, conv_general_dilated=other), images())
    assert here[0].shape == (3, 5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(there))
    for x, y in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        size = np.abs(y).max()
        assert 0 < size < np.inf
        # Of a scale whose effect the next normalisation undoes, the gradient is mostly rounding.
        np.testing.assert_allclose(x, y, atol=1e-4 * size + 1e-6 * largest)


@pytest.mark.parametrize("net", [pytest.param(ResNeXt, marks=pytest.mark.slow), MobileNet])
def test_evaluation_goes_by_the_averages_of_training(net):
    model = tiny(net)
    before = nnx.clone(nnx.state(model, nnx.BatchStat))
    model(images())
    trained = model(images())
    after = nnx.clone(nnx.state(model, nnx.BatchStat))
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (x != y).any()
    model.eval()
    alone = jnp.concatenate([model(image[None]) for image in images()])
    np.testing.assert_allclose(model(images()), alone, rtol=1e-4, atol=1e-5)
    assert (trained != alone).any()
    for x, y in zip(
        jax.tree.leaves(after), jax.tree.leaves(nnx.state(model, nnx.BatchStat)), strict=True
    ):
        np.testing.assert_array_equal(x, y)
    model.train()
    np.testing.assert_allclose(model(images()), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_stochastic_depth_skips_later_blocks_more_often_and_whole_examples():
    model = tiny(ConvNeXt, stage_sizes=(1, 2), stochastic_depth_rate=0.6)
    blocks = [stage.layers[-1 - i] for stage in model.stages for i in range(len(stage.layers))]
    rates = [block.skip.rate for block in blocks if hasattr(block, "skip")]
    np.testing.assert_allclose(sorted(rates), [0, 0.3, 0.6])
    block = model.stages[-1].layers[-1]
    x = jnp.asarray(random("features", (40, 2, 2, 16), np.float32))
    change = block(x) - x
    model.eval()
    whole = block(x) - x
    skipped = np.asarray(jnp.all(change == 0, axis=(1, 2, 3)))
    assert 10 < skipped.sum() < 38
    np.testing.assert_allclose(change[~skipped], whole[~skipped] / 0.4, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(model(images()), model(images()))


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
def test_bfloat16_is_computed_in_and_parameters_stay_float32(net):
    model = tiny(net, dtype=jnp.bfloat16)
    model.eval()
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert {leaf.dtype for leaf in params} == {jnp.dtype("float32")}
    # Flax's own layers mix the types of statistics and images.
    with jax.numpy_dtype_promotion("standard"):
        out = jax.eval_shape(lambda x: model(x), jnp.zeros((1, 16, 16, 3), jnp.bfloat16))
    assert out.dtype == jnp.bfloat16


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("shape", [(16, 16, 3), (2, 16, 16, 4), (2, 3, 16, 16)])
def test_images_of_another_shape_are_refused(net, shape):
    with pytest.raises(ValueError, match=r"images must be \(N, H, W, 3\)"):
        tiny(net)(jnp.zeros(shape))


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"at least 8, got \(2, 16, 7, 3\)"):
        tiny(ConvNeXt)(jnp.zeros((2, 16, 7, 3)))
    with pytest.raises(ValueError, match="stage_sizes has 1 stages, features has 2"):
        tiny(ConvNeXt, stage_sizes=(1,))
    with pytest.raises(ValueError, match=r"width_multiplier=0.01 leaves nothing of 16 features"):
        tiny(MobileNet, width_multiplier=0.01)


# The same models in PyTorch, which the benchmark compares with.


@pytest.fixture
def torch_models() -> Any:
    pytest.importorskip("torch")
    return importlib.import_module("benchmarks.torch_models")


def to_torch(model: Any, peer: Any) -> None:
    """Gives the PyTorch model the parameters and averages of ours, by name."""
    ours = {
        ".".join(str(key) for key in path if key != "layers"): np.asarray(leaf)
        for path, leaf in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    }
    names = {"weight": ("kernel", "scale"), "running_mean": ("mean",), "running_var": ("var",)}
    state = peer.state_dict()
    for name, tensor in state.items():
        prefix, _, kind = name.rpartition(".")
        if kind == "num_batches_tracked":
            continue
        found = [f"{prefix}.{k}" for k in names.get(kind, (kind,)) if f"{prefix}.{k}" in ours]
        array = ours.pop(found[0] if found else name.replace(".", "_"))
        order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim, range(array.ndim))
        tensor.numpy()[...] = array.transpose(order)
    assert not ours


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
def test_the_model_in_pytorch_is_the_same(net, torch_models):
    more = {"stochastic_depth_rate": 0.0} if net is ConvNeXt else {}
    model = tiny(net, **more)
    peer = getattr(torch_models, net.__name__)(5, **TINY[net], **more)
    to_torch(model, peer)
    x = random("images", (3, 32, 32, 3), np.float32)
    nchw = torch_models.torch.from_numpy(x).permute(0, 3, 1, 2)
    for _ in range(2):
        # Training: the second time with other averages.
        np.testing.assert_allclose(model(x), peer(nchw).detach(), rtol=1e-3, atol=1e-4)
    model.eval()
    peer.eval()
    # PyTorch's averages are of the unbiased variance.
    np.testing.assert_allclose(model(x), peer(nchw).detach(), rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_alexnet_in_pytorch_is_the_same(torch_models):
    config = benchmark_models.alexnet_config(67)
    # One position is left, so that it does not matter how it is made a vector of.
    assert config.pooled_size == 1
    net: Any = benchmark_models.build("alexnet", 67, lax.conv_general_dilated, None)
    peer = torch_models.AlexNet(config).eval()
    to_torch(net, peer)
    x = random("images", (2, 67, 67, 3), np.float32)
    nchw = torch_models.torch.from_numpy(x).permute(0, 3, 1, 2)
    expected = peer(nchw).detach()
    np.testing.assert_allclose(net(jnp.asarray(x)), expected, rtol=1e-3, atol=1e-5)


# The benchmark itself.


@pytest.fixture
def compilation_cache() -> Iterator[None]:
    """On again, which the benchmark has switched off."""
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.fixture
def small_mobilenet(monkeypatch) -> None:
    """Two blocks of what the benchmark trains."""
    modules: list[Any] = [benchmark_models]
    if pytorch.missing() is None:
        modules.append(importlib.import_module("benchmarks.torch_models"))
    for module in modules:
        small = functools.partial(module.MobileNet, blocks=((64, 1), (128, 2)))
        monkeypatch.setattr(module, "MobileNet", small)


@pytest.mark.slow
@pytest.mark.usefixtures("compilation_cache", "small_mobilenet")
def test_the_benchmark_from_its_options_to_its_file(tmp_path, capsys):
    output = tmp_path / "new" / "results.json"
    sizes = ["--models", "mobilenet", "--pixels", "32", "--batch", "2"]
    timing = ["--turns", "1", "--calls", "2"]
    benchmark_models.main([*sizes, *timing, "--output", str(output)])
    report = json.loads(output.read_text())
    assert report["environment"]["jax"] == jax.__version__
    assert report["options"]["batch"] == [2]
    (result,) = report["results"]
    contenders = result["contenders"]
    installed = pytorch.missing() is None
    assert len(contenders) == (4 if installed else 2)
    for contender in contenders.values():
        seconds = contender["seconds"]
        assert len(seconds["all"]) == 2
        assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
        assert contender["images_per_second"] == 2 / seconds["median"]
        # One step at least is not timed; of short ones there are more.
        assert len(contender["losses"]) >= 3
        assert np.isfinite(contender["losses"]).all()
    ours, lax_ = contenders["ours"], contenders["lax"]
    np.testing.assert_allclose(ours["losses"][:3], lax_["losses"][:3], rtol=1e-3)
    assert len(set(ours["losses"])) >= 3
    # Parameters and momentum, updated in place.
    assert ours["memory"]["alias"] > 2 * 4 * result["parameters"]
    shown = capsys.readouterr().out
    for text in ("MobileNet v1", "ours/lax", *(["ours/torch"] if installed else [])):
        assert text in shown


@pytest.mark.usefixtures("compilation_cache")
def test_the_benchmark_where_pytorch_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(pytorch, "missing", lambda: "PyTorch is not installed")
    with pytest.raises(SystemExit, match="2"):
        benchmark_models.main(["--models", "mobilenet", "--contenders", "torch"])
    assert "torch is left out: PyTorch is not installed" in capsys.readouterr().out


def test_the_benchmark_refuses_what_it_cannot_measure(capsys):
    for options, message in {
        "--batch 0": "--batch must be at least 1, got 0",
        "--models convnext_tiny --pixels 31": "at least 32",
        "--models alexnet --pixels 40": "image_size=40 leaves nothing",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            benchmark_models.main(options.split())
        assert message in capsys.readouterr().err
