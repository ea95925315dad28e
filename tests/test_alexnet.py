"""AlexNet against the figures of the paper and against a NumPy version of the whole net."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import random
from flax import nnx

from grouped_conv_jax import count_multiply_adds
from grouped_conv_jax.models import AlexNet, AlexNetConfig
from grouped_conv_jax.models.alexnet import local_response_normalization

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = dataclasses.replace(
    AlexNetConfig.small(num_classes=7),
    convolutions=tuple(
        dataclasses.replace(layer, features=8 + 4 * i, bias=0.1 * i)
        for i, layer in enumerate(AlexNetConfig.small().convolutions)
    ),
    hidden_units=(12, 16),
)


def abstract_net(config: AlexNetConfig):
    net = nnx.eval_shape(lambda: AlexNet(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(net)
    size = config.image_size
    images = jax.ShapeDtypeStruct((1, size, size, config.image_channels), jnp.float32)
    return (lambda state, images: nnx.merge(graphdef, state)(images)), state, images


def parameters(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("towers", "expected", "multiply_adds"),
    [(2, 60_965_224, 724_406_816), (1, 62_378_344, 1_135_256_096)],
)
def test_parameters_and_multiply_adds_of_the_paper(towers, expected, multiply_adds):
    apply, state, images = abstract_net(AlexNetConfig.paper(towers=towers))
    assert parameters(state) == expected
    assert count_multiply_adds(apply, state, images) == multiply_adds


def test_parameters_of_each_layer_of_the_paper():
    _, state, _ = abstract_net(AlexNetConfig.paper())
    state = nnx.to_pure_dict(state)
    assert [parameters(layer) for layer in state["convolutions"].values()] == [
        34_944,
        307_456,
        885_120,
        663_936,
        442_624,
    ]
    assert [parameters(layer) for layer in state["hidden"].values()] == [37_752_832, 16_781_312]
    assert parameters([state["classes"], state["classes_bias"]]) == 4_097_000


def test_feature_maps_of_the_paper():
    config = AlexNetConfig.paper()
    sizes, size = [], config.image_size
    for layer in config.convolutions:
        size = (size + sum(layer.padding) - layer.kernel_size) // layer.strides + 1
        sizes.append(size)
        size = (size - 3) // 2 + 1 if layer.pool else size
    assert sizes == [55, 27, 13, 13, 13]
    assert config.pooled_size == size == 6


@pytest.mark.parametrize("towers", [1, 8])
def test_any_number_of_towers_that_divides_the_features(towers):
    config = AlexNetConfig.small(towers=towers)
    net = nnx.eval_shape(lambda: AlexNet(config, rngs=nnx.Rngs(0)))
    out = nnx.eval_shape(lambda net, images: net(images), net, jnp.ones((3, 32, 32, 3)))
    assert out.shape == (3, 10)
    own = [layer.feature_group_count for layer in net.convolutions]
    assert own == [1, towers, 1, towers, towers]


def test_towers_that_do_not_divide_the_features_are_refused():
    with pytest.raises(ValueError, match=r"towers=5 does not divide the features of conv1 \(96\)"):
        AlexNet(AlexNetConfig.paper(towers=5), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="towers must be at least 1, got 0"):
        AlexNet(AlexNetConfig.paper(towers=0), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="3 devices on the axis 'group' cannot share 2 towers"):
        AlexNet(AlexNetConfig.paper(), axis_size=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="image_size=12 leaves nothing"):
        AlexNet(dataclasses.replace(AlexNetConfig.small(), image_size=12), rngs=nnx.Rngs(0))


def test_initialisation_of_the_paper():
    # The paper's layers, with fewer hidden units so that there is less to draw.
    config = dataclasses.replace(AlexNetConfig.paper(), hidden_units=(64, 64))
    net = AlexNet(config, rngs=nnx.Rngs(0))
    for layer in (*net.convolutions, *net.hidden, net.classes):
        kernel = np.asarray(layer.kernel[...])
        assert abs(kernel.mean()) < 4 * 0.01 / math.sqrt(kernel.size)
        assert abs(kernel.std() - 0.01) < 4 * 0.01 / math.sqrt(2 * kernel.size)
    for layer, bias in zip((*net.convolutions, *net.hidden), (0, 1, 0, 1, 1, 1, 1), strict=True):
        assert layer.bias is not None
        np.testing.assert_array_equal(layer.bias[...], np.full(layer.bias.shape, bias))
    np.testing.assert_array_equal(net.classes_bias[...], np.zeros(1000))


def numpy_lrn(x: np.ndarray, config: AlexNetConfig) -> np.ndarray:
    """Section 3.3, feature by feature: over neighbours within one tower."""
    y = np.empty_like(x)
    width = x.shape[-1] // config.towers
    reach = config.lrn_size // 2
    for feature in range(x.shape[-1]):
        tower = feature // width * width
        low, high = max(tower, feature - reach), min(tower + width, feature + reach + 1)
        total = np.sum(x[..., low:high] ** 2, axis=-1)
        y[..., feature] = (
            x[..., feature] / (config.lrn_k + config.lrn_alpha * total) ** config.lrn_beta
        )
    return y


def numpy_max_pool(x: np.ndarray) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    return windows[:, ::2, ::2].max(axis=(-2, -1))


def numpy_alexnet(params: dict, config: AlexNetConfig, images: np.ndarray) -> np.ndarray:
    """The whole net in float64, with the towers' layers as grouped convolutions of the oracle."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    x = images.astype(np.float64)
    for i, layer in enumerate(config.convolutions):
        x = oracle.forward(
            x,
            params["convolutions"][i]["kernel"],
            window_strides=(layer.strides,) * 2,
            padding=(layer.padding,) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=config.towers if layer.inputs == "own" else 1,
        )
        x = np.maximum(x + params["convolutions"][i]["bias"], 0)
        x = numpy_lrn(x, config) if layer.normalize else x
        x = numpy_max_pool(x) if layer.pool else x
    x = x.reshape(len(x), -1)
    for layer in params["hidden"].values():
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
    return x @ params["classes"]["kernel"] + params["classes_bias"]


@pytest.mark.parametrize(
    ("towers", "alpha"),
    [
        (2, 1.0),
        pytest.param(1, 1e-4, marks=pytest.mark.slow),
        pytest.param(2, 1e-4, marks=pytest.mark.slow),
        pytest.param(4, 1.0, marks=pytest.mark.slow),
    ],
)
def test_the_whole_net_against_numpy(towers, alpha):
    # With alpha = 1 a window that crossed a tower's edge would show clearly.
    config = dataclasses.replace(TINY, towers=towers, lrn_alpha=alpha)
    net = AlexNet(config, rngs=nnx.Rngs(3))
    images = random("images", (2, 32, 32, 3), np.float32)
    params = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    expected = numpy_alexnet(params, config, images)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(net(jnp.asarray(images)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_local_response_normalization_against_its_definition(size):
    x = 3 * random("features", (2, 3, 3, 6), np.float32)
    config = dataclasses.replace(TINY, towers=1, lrn_size=size, lrn_alpha=0.5)
    y = local_response_normalization(jnp.asarray(x), size, 0.5, config.lrn_beta, config.lrn_k)
    if size % 2:
        np.testing.assert_allclose(y, numpy_lrn(x.astype(np.float64), config), rtol=1e-5)
    else:
        # An even window has one neighbour more before than after.
        squares = np.pad(np.float64(x) ** 2, [(0, 0)] * 3 + [(1, 0)])
        total = squares[..., 1:] + squares[..., :-1]
        np.testing.assert_allclose(
            y, x / (config.lrn_k + 0.5 * total) ** config.lrn_beta, rtol=1e-5
        )


def test_dropout_is_keyed_by_example_layer_and_tower():
    # Nothing but dropout between equal units: weights of 0, biases of 1.
    config = dataclasses.replace(TINY, hidden_units=(400, 400), hidden_bias=1.0)
    net = AlexNet(config, rngs=nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(1), 3)
    units = jnp.ones((3, 400))
    first, second = (np.asarray(net._drop(units, keys, layer)) for layer in (0, 1))
    np.testing.assert_array_equal(np.unique(first), [0.0, 2.0])
    assert abs(first.mean() - 1) < 4 / math.sqrt(first.size)
    assert (first != second).any()
    assert (first[0] != first[1]).any()
    assert (first[:, :200] != first[:, 200:]).any()
    alone = net._drop(units[1:2], keys[1:2], 0)
    np.testing.assert_array_equal(alone[0], first[1])
    np.testing.assert_array_equal(net._drop(units, None, 0), units)


def test_without_dropout_keys_the_net_is_deterministic():
    net = AlexNet(TINY, rngs=nnx.Rngs(0))
    images = jnp.asarray(random("images", (2, 32, 32, 3), np.float32))
    np.testing.assert_array_equal(net(images), net(images))
    keys = jax.random.split(jax.random.key(0), 2)
    assert (net(images) != net(images, dropout_keys=keys)).any()
