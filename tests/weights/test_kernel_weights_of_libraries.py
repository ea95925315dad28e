"""Kernels of other libraries, converted: their layers and ours compute the same."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import random
from flax import nnx
from jax import lax
from kernels import STRIDES, image_of, kernel_of, layer

from grouped_conv_jax.operations.transpose import grouped_conv_transpose
from grouped_conv_jax.weights import convert_kernel


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 3])
def test_weights_of_pytorch(groups, rank):
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    x = random("x", (2, 6, *(5, 4, 3)[:rank]), np.float32)
    taps, strides = (3, 2, 2)[:rank], (*STRIDES, 1)[:rank]
    given = torch.from_numpy(x)
    channels_last = "DHW"[3 - rank :] + "IO"

    weight = random("weight", (12, 6 // groups, *taps), np.float32)
    conv = getattr(torch.nn.functional, f"conv{rank}d")
    expected = conv(given, torch.from_numpy(weight), groups=groups)
    out = oracle.forward(
        x,
        convert_kernel(weight, "torch", channels_last),
        window_strides=(1,) * rank,
        padding="VALID",
        dimension_numbers=(f"NC{channels_last[:-2]}", channels_last, f"NC{channels_last[:-2]}"),
        feature_group_count=groups,
    )
    np.testing.assert_allclose(out, expected.numpy(), rtol=1e-4, atol=1e-5)
    parameter = torch.nn.Parameter(torch.from_numpy(weight))
    with pytest.raises(TypeError, match=r"got Parameter; .* layer.weight.detach\(\).numpy\(\)"):
        convert_kernel(parameter, "torch", channels_last)

    weight = random("weight", (6, 12 // groups, *taps), np.float32)
    conv = getattr(torch.nn.functional, f"conv_transpose{rank}d")
    expected = conv(given, torch.from_numpy(weight), stride=strides, groups=groups)
    kernel = convert_kernel(weight, "torch_transposed", channels_last, groups)
    out = layer(x, kernel, channels_last, groups)
    np.testing.assert_allclose(out, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["flax", "keras_transposed"])
def test_the_transposed_convolution_takes_both(layout):
    x = image_of(3, 2).astype(np.float32)
    weight = kernel_of("transposed OIHW", 3, 2, 4).astype(np.float32)
    out = grouped_conv_transpose(
        np.moveaxis(x, 1, -1),
        convert_kernel(weight, "torch_transposed", layout, 3),
        STRIDES,
        [(2, 2), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
        transpose_kernel=layout == "keras_transposed",
    )
    expected = layer(x, weight, "transposed OIHW", 3)
    expected = np.moveaxis(expected, 1, -1)
    np.testing.assert_allclose(out, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "jax")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        pytest.importorskip("keras", reason="compares with Keras, which is not installed")
        return importlib.import_module("keras")


@pytest.mark.slow
def test_weights_of_keras(keras):
    x = random("x", (2, 5, 4, 6), np.float32)
    arguments = dict(strides=2, padding="valid", data_format="channels_last")
    first = np.moveaxis(x, -1, 1)

    kernel = random("kernel", (3, 2, 6, 2), np.float32)
    expected = keras.ops.depthwise_conv(x, kernel, **arguments)
    converted = convert_kernel(kernel, "keras_depthwise", "OIHW")
    out = oracle.forward(
        first, converted, window_strides=(2, 2), padding="VALID", feature_group_count=6
    )
    np.testing.assert_allclose(np.moveaxis(out, 1, -1), expected, rtol=1e-4, atol=1e-5)

    kernel = random("kernel", (3, 2, 2, 9), np.float32)
    expected = keras.ops.conv(x, kernel, **arguments)
    converted = convert_kernel(kernel, "keras", "OIHW", 3)
    out = oracle.forward(
        first, converted, window_strides=(2, 2), padding="VALID", feature_group_count=3
    )
    np.testing.assert_allclose(np.moveaxis(out, 1, -1), expected, rtol=1e-4, atol=1e-5)

    kernel = random("kernel", (3, 2, 4, 6), np.float32)
    expected = keras.ops.conv_transpose(x, kernel, **{**arguments, "strides": STRIDES})
    converted = convert_kernel(kernel, "keras_transposed", "OIHW", 1)
    out = np.moveaxis(layer(first, converted, "OIHW", 1), 1, -1)
    # Where the strides exceed the kernel Keras goes on with zeros.
    assert not np.any(expected[:, out.shape[1] :])
    assert not np.any(expected[:, :, out.shape[2] :])
    np.testing.assert_allclose(
        out, expected[:, : out.shape[1], : out.shape[2]], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_weights_of_flax(transpose_kernel):
    x = random("x", (2, 4, 3, 6), np.float32)
    flax = nnx.ConvTranspose(
        6,
        4,
        (3, 2),
        STRIDES,
        padding=[(2, 2), (1, 1)],
        use_bias=False,
        transpose_kernel=transpose_kernel,
        rngs=nnx.Rngs(0),
    )
    layout = "keras_transposed" if transpose_kernel else "flax_transposed"
    kernel = convert_kernel(np.asarray(flax.kernel), layout, "OIHW", 1)
    out = layer(np.moveaxis(x, -1, 1), kernel, "OIHW", 1)
    np.testing.assert_allclose(np.moveaxis(out, 1, -1), flax(jnp.asarray(x)), rtol=1e-4, atol=1e-5)


def test_kernels_of_jax_without_dimension_numbers():
    x = random("x", (2, 6, 4, 3), np.float32)
    weight = random("weight", (9, 2, 3, 2), np.float32)
    expected = lax.conv_general_dilated(
        jnp.asarray(x), jnp.asarray(weight), (1, 1), "VALID", feature_group_count=3
    )
    out = oracle.forward(
        x,
        convert_kernel(weight, "jax", "HWIO"),
        window_strides=(1, 1),
        padding="VALID",
        dimension_numbers=("NCHW", "HWIO", "NCHW"),
        feature_group_count=3,
    )
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)

    weight = random("weight", (3, 2, 6, 4), np.float32)
    expected = lax.conv_transpose(
        jnp.moveaxis(x, 1, -1), jnp.asarray(weight), STRIDES, [(2, 2), (1, 1)]
    )
    kernel = convert_kernel(weight, "jax_transposed", "OIHW")
    out = np.moveaxis(layer(x, kernel, "OIHW", 1), 1, -1)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_weights_of_equinox():
    equinox = pytest.importorskip("equinox", reason="compares with Equinox, which is not installed")
    x = random("x", (6, 4, 3), np.float32)
    settings = dict(groups=3, use_bias=False, key=jax.random.key(0))
    conv = equinox.nn.Conv2d(6, 9, (3, 2), padding=((2, 2), (1, 1)), **settings)
    transposed = equinox.nn.ConvTranspose2d(6, 9, (3, 2), STRIDES[:1] * 2, **settings)
    kernel = convert_kernel(np.asarray(conv.weight), "equinox", "HWIO")
    out = oracle.forward(
        x[None],
        kernel,
        window_strides=(1, 1),
        padding=[(2, 2), (1, 1)],
        dimension_numbers=("NCHW", "HWIO", "NCHW"),
        feature_group_count=3,
    )
    np.testing.assert_allclose(out[0], conv(jnp.asarray(x)), rtol=1e-4, atol=1e-5)
    kernel = convert_kernel(np.asarray(transposed.weight), "equinox_transposed", "HWIO")
    out = grouped_conv_transpose(
        x[None],
        kernel,
        (2, 2),
        [(2, 2), (1, 1)],
        dimension_numbers=("NCHW", "HWIO", "NCHW"),
        feature_group_count=3,
    )
    np.testing.assert_allclose(out[0], transposed(jnp.asarray(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_weights_of_haiku():
    haiku = pytest.importorskip("haiku", reason="compares with Haiku, which is not installed")
    x = jnp.asarray(random("x", (2, 4, 3, 6), np.float32))

    def compute(layer):
        """What the layer makes of the image, and its weights."""
        function = haiku.without_apply_rng(haiku.transform(lambda x: layer()(x)))
        params = function.init(jax.random.key(0), x)
        ((weights,),) = (list(parameters.values()) for parameters in [*params.values()][:1])
        return function.apply(params, x), np.asarray(weights)

    nhwc: dict[str, Any] = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    out, weights = compute(
        lambda: haiku.Conv2D(9, (3, 2), padding="VALID", with_bias=False, feature_group_count=3)
    )
    kernel = convert_kernel(weights, "haiku", "HWIO")
    valid = dict(window_strides=(1, 1), padding="VALID", **nhwc)
    expected = oracle.forward(np.asarray(x), kernel, **valid, feature_group_count=3)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)

    out, weights = compute(
        lambda: haiku.DepthwiseConv2D(2, (3, 2), padding="VALID", with_bias=False)
    )
    expected = oracle.forward(
        np.asarray(x), convert_kernel(weights, "haiku", "HWIO"), **valid, feature_group_count=6
    )
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)

    out, weights = compute(
        lambda: haiku.Conv2DTranspose(4, (3, 2), STRIDES[:1] * 2, padding="VALID", with_bias=False)
    )
    kernel = convert_kernel(weights, "haiku_transposed", "HWIO")
    expected = grouped_conv_transpose(x, kernel, (2, 2), "VALID", **nhwc)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
