"""What the layers compute, against NumPy: which outputs see which inputs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from flax_layers import Layer, as_function, randomized

from grouped_conv_jax import grouped_conv
from grouped_conv_jax.operations.local import grouped_conv_local

LAST = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


def run(layer: Layer, *batch: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """Parameters, an input and the output."""
    params, apply = as_function(layer.nnx())
    params, x = randomized(params), layer.inputs(*batch)
    return jax.tree.map(np.asarray, params), np.asarray(x), np.asarray(jax.jit(apply)(params, x))


def forward(x: np.ndarray, kernel: np.ndarray, **arguments: Any) -> np.ndarray:
    rank = x.ndim - 2
    return oracle.forward(
        x, kernel, **{"window_strides": (1,) * rank, "dimension_numbers": LAST[rank], **arguments}
    )


def test_depthwise():
    layer = Layer(
        "DepthwiseConv", dict(kernel_size=(3, 2), channel_multiplier=2, strides=(2, 1)), (5, 4)
    )
    params, x, y = run(layer, 2)
    expected = forward(
        x, params["kernel"], window_strides=(2, 1), padding="SAME", feature_group_count=6
    )
    oracle.assert_close(y, expected + params["bias"], 7)


def test_separable():
    layer = Layer(
        "SeparableConv",
        dict(kernel_size=(3, 2), channel_multiplier=2, strides=(2, 1), padding="VALID"),
        (5, 4),
    )
    params, x, y = run(layer, 2)
    between = forward(
        x,
        params["depthwise"]["kernel"],
        window_strides=(2, 1),
        padding="VALID",
        feature_group_count=6,
    )
    pointwise = params["pointwise"]["kernel"]
    assert pointwise.shape == (1, 1, 12, 12)
    expected = forward(between, pointwise, padding="VALID")
    oracle.assert_close(y, expected + params["pointwise"]["bias"], 7 * 13)


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_causal(groups):
    layer = Layer(
        "CausalConv", dict(kernel_size=3, kernel_dilation=2, feature_group_count=groups), (7,)
    )
    params, x, y = run(layer, 2)
    assert params["kernel"].shape == (3, 6 // groups, 12)
    expected = forward(
        x, params["kernel"], padding=[(4, 0)], rhs_dilation=(2,), feature_group_count=groups
    )
    oracle.assert_close(y, expected + params["bias"], 1 + 18 / groups)


@pytest.mark.parametrize(
    ("spatial", "settings", "padding"),
    [
        # What PyTorch calls padding=1, output_padding=1, and the same size times the strides.
        ((4,), dict(kernel_size=3, strides=2, padding=1, output_padding=1), [(1, 1)]),
        (
            (3, 4),
            dict(kernel_size=(3, 2), strides=(2, 3), padding=[(2, 1), (0, 1)], kernel_dilation=2),
            [(2, 3), (2, 1)],
        ),
        (
            (2, 3, 2),
            dict(kernel_size=(2, 1, 3), strides=(2, 1, 1), padding="VALID"),
            [(0, 0), (0, 0), (0, 0)],
        ),
    ],
)
@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_transposed_in_groups(spatial, settings, padding, transpose_kernel):
    """The input's gradient of a convolution whose padding is `padding`, of the output's size."""
    groups = 3
    layer = Layer(
        "GroupedConvTranspose",
        dict(**settings, feature_group_count=groups, transpose_kernel=transpose_kernel),
        spatial,
    )
    params, x, y = run(layer, 2)
    kernel = params["kernel"]
    rank = len(spatial)
    taps = kernel.shape[:-2]
    assert kernel.shape[-2:] == ((4, 6) if transpose_kernel else (2, 12))
    if not transpose_kernel:
        # (*taps, C, (G O)) turned round in space, with inputs and outputs exchanged in each group.
        turned = np.flip(kernel, tuple(range(rank))).reshape(*taps, 2, groups, 4)
        kernel = np.moveaxis(turned, -3, -1).reshape(*taps, groups, 4, 2)
        kernel = np.moveaxis(kernel, -3, -2).reshape(*taps, 4, 6)
    strides = settings["strides"]
    expected = oracle.input_gradient(
        x,
        kernel,
        y.shape,
        window_strides=(strides,) if isinstance(strides, int) else strides,
        padding=padding,
        rhs_dilation=(settings.get("kernel_dilation", 1),) * rank,
        dimension_numbers=LAST[rank],
        feature_group_count=groups,
    )
    oracle.assert_close(y, expected + params["bias"], 1 + 2 * np.prod(taps))


def test_local_in_groups():
    layer = Layer(
        "GroupedConvLocal",
        dict(kernel_size=(3, 2), strides=(1, 2), feature_group_count=3, padding=["CIRCULAR", 0]),
        (4, 5),
    )
    params, x, y = run(layer, 2)
    assert params["kernel"].shape == (4, 2, 12, 12)
    assert params["bias"].shape == (4, 2, 12)
    x = np.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)), mode="wrap")
    for row in range(4):
        for column in range(2):
            # The taps of each input together: (C K), where the op has (K, C).
            kernel = params["kernel"][row, column].reshape(2, 3, 2, 12).transpose(1, 2, 0, 3)
            patch = x[:, row : row + 3, 2 * column : 2 * column + 2]
            expected = forward(patch, kernel, padding="VALID", feature_group_count=3)
            expected = expected[:, 0, 0] + params["bias"][row, column]
            oracle.assert_close(y[:, row, column], expected, 13)


PADDINGS: dict[str, tuple[Any, Any]] = {
    "causal in two dimensions": ("CAUSAL", "CAUSAL"),
    "any case": ("replicate", "REPLICATE"),
    "lower": ("same_lower", "SAME_LOWER"),
    "a string for each": (("CAUSAL", "REFLECT"), ("CAUSAL", "REFLECT")),
    "a list": (["VALID", "same"], ("VALID", "SAME")),
    "an integer": (1, [(1, 1), (1, 1)]),
    "a string and an integer": (["REPLICATE", 2], ["REPLICATE", (2, 2)]),
    "a mode with its pair": ((("circular", [2, 0]), [1, 0]), [("CIRCULAR", (2, 0)), (1, 0)]),
    "a mode with an integer": ([("REFLECT", 1)] * 2, [("REFLECT", (1, 1))] * 2),
    "none of its own": ((("CIRCULAR", None), (0, 1)), ["CIRCULAR", (0, 1)]),
}


def test_paddings_of_each_dimension():
    """Which Flax's own Conv refuses."""
    layers = [
        Layer("GroupedConv", dict(kernel_size=(3, 2), feature_group_count=3, padding=given), (4, 5))
        for given, _ in PADDINGS.values()
    ]
    functions = [as_function(layer.nnx()) for layer in layers]
    params, x = randomized(functions[0][0]), layers[0].inputs(2)

    @jax.jit
    def outputs(params, x):
        return {
            name: (
                apply(params, x),
                layer.linen().apply({"params": params}, x),
                grouped_conv(
                    x,
                    params["kernel"],
                    (1, 1),
                    padding,
                    dimension_numbers=LAST[2],
                    feature_group_count=3,
                ),
            )
            for (name, (_, padding)), layer, (_, apply) in zip(
                PADDINGS.items(), layers, functions, strict=True
            )
        }

    for name, (of_nnx, of_linen, op) in outputs(params, x).items():
        np.testing.assert_array_equal(of_nnx, op + params["bias"].reshape(1, 1, 1, -1), name)
        np.testing.assert_array_equal(of_linen, of_nnx, name)


def test_paddings_of_the_other_layers():
    x, given = jnp.ones((2, 4, 5, 6)), ("CIRCULAR", ("REPLICATE", (1, 0)))
    for name, settings in (
        ("DepthwiseConv", {}),
        ("SeparableConv", {}),
        ("GroupedConvTranspose", dict(feature_group_count=3)),
        ("GroupedConvLocal", dict(feature_group_count=3)),
    ):
        layer = Layer(name, dict(kernel_size=(3, 2), padding=given, **settings), (4, 5))
        # Ones: what is beyond the ends is seen where it is not zeros.
        made = layer.nnx(**dict.fromkeys(INITS[name], nnx.initializers.ones))
        y = jax.jit(lambda made, x: made(x))(made, x)
        assert y.shape == (2, 4, 5, 12 if name != "DepthwiseConv" else 6)
        assert jnp.all(y == y[0, 0, 0, 0]), name


INITS = {
    "DepthwiseConv": ("kernel_init",),
    "SeparableConv": ("depthwise_init", "pointwise_init"),
    "GroupedConvTranspose": ("kernel_init",),
    "GroupedConvLocal": ("kernel_init",),
}


def test_local_with_one_kernel_for_all_is_a_convolution():
    layer = Layer("GroupedConvLocal", dict(kernel_size=(3, 2), feature_group_count=3), (4, 5))
    kernel = randomized(jnp.zeros((12, 12)))
    x = layer.inputs(2)
    stacked = jnp.broadcast_to(kernel, (4, 5, 12, 12))
    local = grouped_conv_local(
        x, stacked, (1, 1), "SAME", (3, 2), dimension_numbers=LAST[2], feature_group_count=3
    )
    made = layer.nnx(kernel_init=lambda *_: stacked)
    np.testing.assert_array_equal(made(x), local)
    shared = kernel.reshape(2, 3, 2, 12).transpose(1, 2, 0, 3)
    expected = forward(np.asarray(x), np.asarray(shared), padding="SAME", feature_group_count=3)
    oracle.assert_close(local, expected, 12)
