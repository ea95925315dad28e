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
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from jaxprs import equations
from small_alexnet import TINY, narrow, random_params, with_params

from grouped_conv_jax import count_multiply_adds
from grouped_conv_jax.models import ALEXNETS, AlexNet, AlexNetConfig, alexnet_exchanges
from grouped_conv_jax.models.alexnet import local_response_normalization
from grouped_conv_jax.towers import DATA, GROUP, TowerNet, make_mesh


def abstract_net(config: AlexNetConfig):
    net = nnx.eval_shape(lambda: AlexNet(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(net)
    size = config.image_size
    images = jax.ShapeDtypeStruct((1, size, size, config.image_channels), jnp.float32)
    return (lambda state, images: nnx.merge(graphdef, state)(images)), state, images


def parameters(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("name", "towers", "expected", "multiply_adds"),
    [
        ("paper", None, 60_965_224, 724_406_816),
        ("paper", 1, 62_378_344, 1_135_256_096),
        ("cuda-convnet", None, 60_965_224, 724_406_816),
        ("caffe", None, 60_965_224, 724_406_816),
        ("caffenet", None, 60_965_224, 724_406_816),
        ("one-weird-trick", None, 61_100_840, 714_188_480),
        ("one-tower", None, 59_798_312, 391_514_384),
    ],
)
def test_parameters_and_multiply_adds(name, towers, expected, multiply_adds):
    config = ALEXNETS[name](towers=towers, num_classes=1000, image_channels=3)
    apply, state, images = abstract_net(config)
    assert parameters(state) == expected
    assert count_multiply_adds(apply, state, images) == multiply_adds


def test_one_tower_by_hand():
    # Positions, taps times inputs, features; then the fully connected layers, with one position.
    layers = [
        (55 * 55, 11 * 11 * 3, 48),
        (27 * 27, 5 * 5 * 48, 128),
        (13 * 13, 3 * 3 * 128, 192),
        (13 * 13, 3 * 3 * 192, 192),
        (13 * 13, 3 * 3 * 192, 256),
        (1, 6 * 6 * 256, 4096),
        (1, 4096, 4096),
        (1, 4096, 1000),
    ]
    apply, state, images = abstract_net(AlexNetConfig.one_tower())
    pure = nnx.to_pure_dict(state)
    own = [*pure["convolutions"].values(), *pure["hidden"].values()]
    own.append([pure["classes"], pure["classes_bias"]])
    assert [parameters(layer) for layer in own] == [(taps + 1) * out for _, taps, out in layers]
    assert count_multiply_adds(apply, state, images) == sum(math.prod(layer) for layer in layers)


@pytest.mark.parametrize("name", ALEXNETS)
def test_presets_take_classes_channels_and_towers(name):
    config = ALEXNETS[name](towers=None, num_classes=11, image_channels=1)
    apply, state, images = abstract_net(config)
    assert nnx.eval_shape(apply, state, images).shape == (1, 11)
    assert images.shape[-1] == 1
    assert config.stored_size == {"small": 36, "photos": 73}.get(name, 256)
    if name in ("one-weird-trick", "one-tower"):
        assert config.towers == 1
        with pytest.raises(ValueError, match=f"towers must be 1 in the net '{name}', got 2"):
            ALEXNETS[name](towers=2, num_classes=11, image_channels=1)
    else:
        assert config.towers == 2
        assert ALEXNETS[name](towers=4, num_classes=11, image_channels=1).towers == 4


def test_224_pixels_make_55_positions_as_rounding_up_does():
    # The last position begins at 216 and sees no more than 8 pixels; what is beyond counts as 0.
    paper = AlexNetConfig.paper(num_classes=2)
    conv1 = dataclasses.replace(paper.convolutions[0], features=4)
    net = AlexNet(
        dataclasses.replace(paper, convolutions=(conv1,), hidden_units=()), rngs=nnx.Rngs(0)
    )
    image = random("image", (1, 224, 224, 3), np.float32)
    y = net.convolutions[0](jnp.asarray(image))
    positions = 1 + math.ceil((224 - 11) / 4)
    assert y.shape == (1, positions, positions, 4) == (1, 55, 55, 4)
    kernel = np.asarray(nnx.to_pure_dict(nnx.state(net))["convolutions"][0]["kernel"])
    for row, column in [(0, 0), (7, 54), (54, 30), (54, 54), (53, 53)]:
        seen = image[0, 4 * row : 4 * row + 11, 4 * column : 4 * column + 11]
        height, width, _ = seen.shape
        expected = np.einsum("hwc,hwco->o", seen, kernel[:height, :width])
        np.testing.assert_allclose(y[0, row, column], expected, rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize(
    ("name", "stds", "biases"),
    [
        (
            "cuda-convnet",
            (0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01),
            (0, 1, 0, 1, 1, 1, 1, 0),
        ),
        (
            "caffe",
            (0.01, 0.01, 0.01, 0.01, 0.01, 0.005, 0.005, 0.01),
            (0, 0.1, 0, 0.1, 0.1, 0.1, 0.1, 0),
        ),
        pytest.param(
            "caffenet",
            (0.01, 0.01, 0.01, 0.01, 0.01, 0.005, 0.005, 0.01),
            (0, 1, 0, 1, 1, 1, 1, 0),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_initialisation_of_presets(name, stds, biases):
    net = AlexNet(dataclasses.replace(narrow(name), num_classes=64), rngs=nnx.Rngs(0))
    layers = (*net.convolutions, *net.hidden, net.classes)
    for layer, std in zip(layers, stds, strict=True):
        kernel = np.asarray(layer.kernel[...])
        assert abs(kernel.std() / std - 1) < 5 / math.sqrt(2 * kernel.size) < 0.4
    params = nnx.to_pure_dict(nnx.state(net))
    own = (*params["convolutions"].values(), *params["hidden"].values())
    found = (*(layer["bias"] for layer in own), params["classes_bias"])
    for array, bias in zip(found, biases, strict=True):
        np.testing.assert_array_equal(array, np.full(array.shape, np.float32(bias)))


def numpy_lrn(x: np.ndarray, config: AlexNetConfig) -> np.ndarray:
    """Section 3.3, feature by feature: over neighbours within one tower, or across them."""
    y = np.empty_like(x)
    width = x.shape[-1] // (1 if config.lrn_across_towers else config.towers)
    reach = config.lrn_size // 2
    for feature in range(x.shape[-1]):
        tower = feature // width * width
        low, high = max(tower, feature - reach), min(tower + width, feature + reach + 1)
        total = np.sum(x[..., low:high] ** 2, axis=-1)
        y[..., feature] = (
            x[..., feature] / (config.lrn_k + config.lrn_alpha * total) ** config.lrn_beta
        )
    return y


def numpy_spatial_lrn(x: np.ndarray, config: AlexNetConfig) -> np.ndarray:
    """Pixel by pixel: over a square around it."""
    y = np.empty_like(x)
    reach = config.lrn_size // 2
    for row, column in np.ndindex(x.shape[1:3]):
        rows = slice(max(0, row - reach), row + reach + 1)
        columns = slice(max(0, column - reach), column + reach + 1)
        total = np.sum(x[:, rows, columns] ** 2, axis=(1, 2))
        divisor = (config.spatial_lrn_k + config.spatial_lrn_alpha * total) ** config.lrn_beta
        y[:, row, column] = x[:, row, column] / divisor
    return y


def numpy_max_pool(x: np.ndarray) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    return windows[:, ::2, ::2].max(axis=(-2, -1))


def numpy_alexnet(params: dict, config: AlexNetConfig, images: np.ndarray) -> np.ndarray:
    """The whole net in float64, with the towers' layers as grouped convolutions of the oracle."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    steps = {
        "relu": lambda x, config: np.maximum(x, 0),
        "lrn": numpy_lrn,
        "spatial lrn": numpy_spatial_lrn,
        "pool": lambda x, config: numpy_max_pool(x),
    }
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
        x = x + params["convolutions"][i]["bias"]
        for step in layer.steps:
            x = steps[step](x, config)
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


RELU_LRN_POOL, RELU_POOL, RELU_POOL_LRN = (
    ("relu", "lrn", "pool"),
    ("relu", "pool"),
    ("relu", "pool", "lrn"),
)
STEPS = {
    "paper": (RELU_LRN_POOL, RELU_LRN_POOL, RELU_POOL),
    "cuda-convnet": (
        ("lrn", "pool", "relu"),
        ("relu", "lrn", "spatial lrn", "pool"),
        ("pool", "relu"),
    ),
    "caffe": (RELU_LRN_POOL, RELU_LRN_POOL, RELU_POOL),
    "caffenet": (RELU_POOL_LRN, RELU_POOL_LRN, RELU_POOL),
    "one-weird-trick": (RELU_POOL, RELU_POOL, RELU_POOL),
    "one-tower": (RELU_LRN_POOL, RELU_LRN_POOL, RELU_POOL),
}
"""What follows conv1, conv2 and conv5; conv3 and conv4 have a ReLU only."""


@pytest.mark.parametrize("name", STEPS)
def test_each_preset_against_numpy(name):
    config = narrow(name)
    steps = [layer.steps for layer in config.convolutions]
    assert (steps[0], steps[1], steps[4]) == STEPS[name]
    assert steps[2] == steps[3] == ("relu",)
    # What the sources divide by the size of the window.
    divisor = 1 if name in ("paper", "one-tower", "one-weird-trick") else 5
    assert config.lrn_alpha == 1e-4 / divisor
    assert config.spatial_lrn_alpha == 1e-3 / 5**2
    assert config.lrn_k == (1 if name.startswith("caffe") else 2)
    assert config.lrn_across_towers == name.startswith("caffe")
    # Ten thousand and a thousand times as much shows clearly where the windows are.
    config = dataclasses.replace(config, lrn_alpha=1 / divisor, spatial_lrn_alpha=1 / 25)
    params = random_params(config)
    images = 2 * random("images", (2, 67, 67, 3), np.float32)
    expected = numpy_alexnet(params, config, images)
    assert np.abs(expected).max() > 0.1
    logits = jax.jit(with_params(config, params))(jnp.asarray(images))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


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


def test_dropout_falls_on_inputs_or_outputs_of_the_hidden_layers():
    for on, units in (("outputs", 16), ("inputs", 12)):
        config = dataclasses.replace(TINY, hidden_units=(12, 16), dropout_on=on)
        net = with_params(config, jax.tree.map(np.zeros_like, random_params(config)))
        dropped = []
        net._drop = lambda x, keys, layer, dropped=dropped: (dropped.append(x.shape), x)[1]
        net(jnp.zeros((2, 32, 32, 3)), dropout_keys=jax.random.split(jax.random.key(0), 2))
        assert dropped[-1] == (2, units)
        assert dropped[0] == ((2, 12) if on == "outputs" else (2, 3, 3, 24))


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(narrow("caffe"), lrn_alpha=0.2),
        dataclasses.replace(narrow("caffenet"), lrn_alpha=0.2),
        dataclasses.replace(narrow("cuda-convnet"), lrn_alpha=0.2, dropout_on="inputs"),
    ],
    ids=["caffe", "caffenet", "cuda-convnet with dropout on inputs"],
)
def test_presets_on_two_devices_as_on_one(config):
    net = TowerNet(
        lambda size, rngs: AlexNet(config, axis_size=size, rngs=rngs), make_mesh(data=1, group=2)
    )
    params = random_params(config)
    images = jnp.asarray(random("images", (2, 67, 67, 3), np.float32))
    keys = jax.random.split(jax.random.key(5), 2)
    logits = net.by_example(lambda net, images, keys: net(images, dropout_keys=keys))
    whole = with_params(config, params)(images, dropout_keys=keys)
    np.testing.assert_allclose(jax.jit(logits)(params, images, keys), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (("relu", "norm"), "the steps of conv2 must be among 'relu', 'lrn', 'spatial lrn', 'pool'"),
        (("pool", "pool"), "the steps of conv2 must differ"),
    ],
)
def test_steps_that_there_are_not_are_refused(steps, message):
    conv1, conv2, *others = TINY.convolutions
    wrong = (conv1, dataclasses.replace(conv2, steps=steps), *others)
    with pytest.raises(ValueError, match=message):
        AlexNet(dataclasses.replace(TINY, convolutions=wrong), rngs=nnx.Rngs(0))


# The type in which the net computes.


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_net_of_16_bits_against_float32(dtype):
    params = random_params(TINY)
    images = jnp.asarray(random("images", (4, 32, 32, 3), np.float32))

    def loss(params, dtype):
        logits = with_params(TINY, params, dtype)(images)
        return jnp.sum(jnp.square(logits)), logits

    half, single = (
        jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(params, type_)
        for type_ in (dtype, None)
    )
    (_, logits), grads = half
    (_, expected), expected_grads = single
    assert logits.dtype == jnp.float32
    eps = float(jnp.finfo(dtype).eps)
    scale = float(jnp.abs(expected).max())
    assert 0 < np.abs(logits - expected).max() < 3 * eps * scale
    # Where rounding moves a maximum to another pixel, or a sign, the whole gradient goes there.
    for grad, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert grad.dtype == jnp.float32
        assert np.isfinite(grad).all()
        assert np.linalg.norm(grad - wanted) < 6 * math.sqrt(eps) * np.linalg.norm(wanted)


def test_normalisation_of_float16_does_not_overflow():
    x = np.full((1, 1, 1, 8), 1000, np.float16)
    y = local_response_normalization(jnp.asarray(x), 5, 1e-4, 0.75, 2.0)
    assert y.dtype == jnp.float16
    config = dataclasses.replace(TINY, towers=1)
    np.testing.assert_allclose(y, numpy_lrn(x.astype(np.float64), config), rtol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "name"), [(jnp.float8_e4m3fn, "float8_e4m3fn"), (jnp.int32, "int32")]
)
def test_a_type_that_the_net_cannot_compute_in_is_refused(dtype, name):
    with pytest.raises(TypeError, match=f"dtype must be a floating-point type .*, got {name}"):
        AlexNet(TINY, dtype=dtype, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("config", [TINY, narrow("caffe"), narrow("caffenet")])
def test_what_devices_exchange_in_a_compute_type(config, dtype):
    """Of the program as it is written: what it gathers, scatters and sums, in bytes."""
    mesh = AbstractMesh((2, 2), (DATA, GROUP), (AxisType.Auto,) * 2)
    examples = 3

    def loss(params, images):
        net = nnx.merge(graphdef, params)
        return jax.lax.psum(jnp.sum(jnp.sin(net(images))), DATA)

    part = nnx.eval_shape(lambda: AlexNet(config, dtype=dtype, axis_size=2, rngs=nnx.Rngs(0)))
    graphdef = nnx.split(part)[0]
    whole = nnx.split(nnx.eval_shape(lambda: AlexNet(config, rngs=nnx.Rngs(0))))[1]
    specs = nnx.to_pure_dict(nnx.get_partition_spec(whole))
    program = jax.shard_map(loss, mesh=mesh, in_specs=(specs, P(DATA)), out_specs=P())
    shape = (2 * examples, config.image_size, config.image_size, 3)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    jaxpr = jax.make_jaxpr(jax.grad(program))(nnx.to_pure_dict(whole), images)

    found: dict[str, int] = dict.fromkeys(("all-gather", "reduce-scatter", "wgrad"), 0)
    kinds = {"all_gather": "all-gather", "reduce_scatter": "reduce-scatter"}
    for equation in equations(jaxpr):
        kind = kinds.get(equation.primitive.name)
        if equation.primitive.name.startswith("psum") and equation.params["axes"] == (DATA,):
            kind = "wgrad"
        if kind:
            arrays = equation.outvars if kind == "all-gather" else equation.invars
            # But for the loss.
            found[kind] += sum(v.aval.size * v.aval.dtype.itemsize for v in arrays if v.aval.shape)
    expected = dict.fromkeys(found, 0)
    for exchange in alexnet_exchanges(config, examples, {DATA: 2, GROUP: 2}, dtype=dtype):
        kind = "wgrad" if exchange.contraction == "wgrad" else exchange.kind
        if kind in expected:
            expected[kind] += exchange.nbytes
    assert found == expected
