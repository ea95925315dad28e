"""What layers refuse, and when; and what their initial values are."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import FlaxError
from flax_layers import FEATURES, IN_FEATURES, Layer

import grouped_conv_jax.linen
import grouped_conv_jax.nnx

ALL = (
    "GroupedConv",
    "DepthwiseConv",
    "SeparableConv",
    "GroupedConvTranspose",
    "GroupedConvLocal",
    "CausalConv",
)
WINDOWS = ALL[:-1]
UNMASKED = tuple(name for name in ALL if name != "SeparableConv")
GROUPED = ("GroupedConv", "GroupedConvTranspose", "GroupedConvLocal", "CausalConv")

# For which layers, with what, which error, and what it says.
WRONG: dict[str, tuple[tuple[str, ...], dict[str, Any], type[Exception], str]] = {
    "no taps": (ALL, dict(kernel_size=0), ValueError, r"kernel_size must be at least 1, got \(0,"),
    "taps as a float": (ALL, dict(kernel_size=(3.0,)), TypeError, r"kernel_size.*integers.*3\.0"),
    "a stride of 0": (
        WINDOWS,
        dict(strides=0),
        ValueError,
        r"strides must be at least 1.*\(0, 0\)",
    ),
    "too many strides": (
        WINDOWS,
        dict(strides=(1, 1, 1)),
        ValueError,
        r"=\(3, 2\) has two .*strides=\(1, 1, 1\) has three",
    ),
    "dilations": (
        WINDOWS,
        dict(kernel_dilation=(1,)),
        ValueError,
        r"two .* kernel_dilation=\(1,\) has one",
    ),
    "an unknown padding": (WINDOWS, dict(padding="FULL"), ValueError, "'FULL'; known: SAME, "),
    "one unknown padding": (WINDOWS, dict(padding=("SAME", "FULL")), ValueError, "'FULL'; known: "),
    "too few paddings": (WINDOWS, dict(padding=[1]), ValueError, r"two .* padding=\[1\] has one"),
    "no padding": (WINDOWS, dict(padding=None), TypeError, "padding.*None"),
    "three to a pair": (WINDOWS, dict(padding=[(1, 1, 1), 1]), ValueError, r"pairs.*\(1, 1, 1\)"),
    "groups": (GROUPED, dict(feature_group_count=4), ValueError, r"=4 does not divide .*\(6\)"),
    "groups as a float": (GROUPED, dict(feature_group_count=3.0), TypeError, r"got 3\.0"),
    "groups as a boolean": (GROUPED, dict(feature_group_count=True), TypeError, "boolean True"),
    "no groups": (GROUPED, dict(feature_group_count=0), ValueError, "at least 1, got 0"),
    "an implementation": (
        tuple(name for name in ALL if name != "GroupedConvLocal"),
        dict(implementation="fast"),
        ValueError,
        "unknown implementation 'fast'",
    ),
    "a multiplier of 0": (
        ("DepthwiseConv", "SeparableConv"),
        dict(channel_multiplier=0),
        ValueError,
        "channel_multiplier must be at least 1, got 0",
    ),
    "a multiplier as a float": (
        ("DepthwiseConv", "SeparableConv"),
        dict(channel_multiplier=1.0),
        TypeError,
        r"channel_multiplier.*1\.0",
    ),
    "an output padding": (
        ("GroupedConvTranspose",),
        dict(output_padding=(1, -1)),
        ValueError,
        r"output_padding must be at least 0, got \(1, -1\)",
    ),
    "lower, transposed": (
        ("GroupedConvTranspose",),
        dict(padding="SAME_LOWER"),
        ValueError,
        "'SAME_LOWER'; known: ",
    ),
    "a kernel turned or not": (
        ("GroupedConvTranspose",),
        dict(transpose_kernel="no"),
        TypeError,
        "transpose_kernel must be True or False, got 'no'",
    ),
    "a list as the mask": (UNMASKED, dict(mask=[1]), TypeError, r"mask must be an array, got \w+;"),
    "a mode alone, a tuple": (
        WINDOWS,
        dict(padding=("REFLECT", (1, 1))),
        ValueError,
        r"one dimension; for all of them write \[\('REFLECT', \(1, 1\)\)\] \* 2",
    ),
    "a mode alone, of an integer": (
        WINDOWS,
        dict(padding=("circular", 1)),
        ValueError,
        r"one dimension; for all of them write \[\('circular', 1\)\] \* 2",
    ),
    "paddings that are true": (WINDOWS, dict(padding=True), TypeError, "padding.*got True"),
    "two times": (("CausalConv",), dict(kernel_size=(3, 3)), ValueError, "one spatial dimension"),
}


def layer_of(name: str, settings: dict[str, Any]) -> Layer:
    right: dict[str, Any] = dict(kernel_size=3 if name == "CausalConv" else (3, 2))
    if name in ("GroupedConv", "GroupedConvTranspose", "GroupedConvLocal"):
        right["feature_group_count"] = 3
    if isinstance(settings.get("kernel_size"), int) and name != "CausalConv":
        settings = {**settings, "kernel_size": (settings["kernel_size"], 2)}
    return Layer(name, {**right, **settings}, (4,) if name == "CausalConv" else (4, 5))


@pytest.mark.parametrize(("names", "settings", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_refused_when_the_layer_is_made_or_called(names, settings, error, message):
    for name in names:
        layer = layer_of(name, settings)
        with pytest.raises(error, match=message):
            layer.nnx()
        with pytest.raises(error, match=message):
            layer.linen().init(jax.random.key(0), layer.inputs(1))


@pytest.mark.parametrize("name", ALL)
def test_inputs_of_too_few_dimensions_or_other_features_are_refused(name):
    layer = layer_of(name, {})
    made, of_linen, x = layer.nnx(), layer.linen(), layer.inputs()
    variables = jax.eval_shape(of_linen.init, jax.random.key(0), x)
    few, more = jnp.ones(IN_FEATURES), jnp.ones((*layer.spatial, IN_FEATURES * 3))
    rank = len(layer.spatial)
    with pytest.raises(ValueError, match=rf"{rank} spatial dimensions.*got shape \(6,\)"):
        jax.eval_shape(made, few)
    with pytest.raises(ValueError, match=rf"{rank} spatial dimensions.*got shape \(6,\)"):
        jax.eval_shape(of_linen.init, jax.random.key(0), few)
    with pytest.raises(ValueError, match=r"in_features=6 .*got shape .*18\)"):
        jax.eval_shape(made, more)
    with pytest.raises((ValueError, FlaxError)):
        jax.eval_shape(of_linen.apply, variables, more)


@pytest.mark.parametrize("name", ALL)
def test_inputs_that_are_no_arrays_are_refused(name):
    layer = layer_of(name, {})
    made, of_linen = layer.nnx(), layer.linen()
    for given, error, message in (
        ([1.0, 2.0], TypeError, "inputs must be an array, got list"),
        (np.float32(1), ValueError, rf"{len(layer.spatial)} spatial dimensions.*got shape \(\)"),
    ):
        with pytest.raises(error, match=message):
            made(given)
        with pytest.raises(error, match=message):
            of_linen.init(jax.random.key(0), given)


NUMBERS = [
    (4.0, TypeError, "features must be an integer, got 4.0"),
    ("4", TypeError, "features must be an integer, got '4'"),
    (True, TypeError, "features must be an integer, got the boolean True"),
    (0, ValueError, "features must be at least 1, got 0"),
    (-6, ValueError, "features must be at least 1, got -6"),
]


@pytest.mark.parametrize(("number", "error", "message"), NUMBERS)
def test_features_are_integers_of_at_least_one(number, error, message):
    for name in ALL:
        layer = layer_of(name, {})
        make = getattr(grouped_conv_jax.nnx, name)
        settings = {**layer.settings, "rngs": nnx.Rngs(0)}
        if name == "GroupedConvLocal":
            settings["input_size"] = 4
        both = (IN_FEATURES,) if name == "DepthwiseConv" else (IN_FEATURES, FEATURES)
        for position, argument in enumerate(("in_features", "out_features")[: len(both)]):
            given: list[Any] = list(both)
            given[position] = number
            with pytest.raises(error, match=f"{argument[:-8]}{message}"):
                make(*given, **settings)
        if name != "DepthwiseConv":
            of_linen = getattr(grouped_conv_jax.linen, name)(number, **layer.settings)
            with pytest.raises(error, match=message):
                of_linen.init(jax.random.key(0), layer.inputs(1))


def test_what_is_of_other_dimensions_than_the_kernel_is_shown_as_it_was_given():
    """Among them positional arguments in the order of another layer."""
    make, of_linen = grouped_conv_jax.nnx, grouped_conv_jax.linen
    x = jnp.ones((1, 4, 5, 8))
    message = r"kernel_size=8 has one spatial dimension, but strides=\(3, 3\) has two"
    with pytest.raises(ValueError, match=message):
        make.DepthwiseConv(8, 8, (3, 3), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message.replace("8", "12")):
        of_linen.GroupedConv(8, 12, (3, 3), feature_group_count=4)
    for name in WINDOWS:
        layer = layer_of(name, dict(padding=["REFLECT", (1, 1)]))
        layer = Layer(name, {**layer.settings, "kernel_size": 3}, (4,))
        message = r"kernel_size=3 has one .*padding=\['REFLECT', \(1, 1\)\] has two"
        with pytest.raises(ValueError, match=message):
            layer.nnx()
        with pytest.raises(ValueError, match=message):
            layer.linen().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"\(3, 2\) has two .*output_padding=\(1,\) has one"):
        layer_of("GroupedConvTranspose", dict(output_padding=(1,))).nnx()


OTHERS = {
    "groups": "feature_group_count",
    "stride": "strides",
    "dilation": "kernel_dilation",
    "dilation_rate": "kernel_dilation",
    "bias": "use_bias",
    "kernel_initializer": "kernel_init",
}


# What those do not have: by another name it is not promised.
WITHOUT = {
    "DepthwiseConv": ("feature_group_count", "out_features", "features"),
    "SeparableConv": ("feature_group_count", "kernel_init"),
    "CausalConv": ("strides", "padding"),
}


def assert_named(layer: str, make: Any, other: str, ours: str, *without: str) -> None:
    has = ours not in (*WITHOUT.get(layer, ()), *without)
    message = (
        rf"^{other} is named {ours} here" if has else rf"argument '{other}'|takes no {other}: "
    )
    with pytest.raises(TypeError, match=message):
        make(**{other: 1})


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", ALL)
def test_names_of_other_libraries(name, other):
    layer = layer_of(name, {})
    without = {k: v for k, v in layer.settings.items() if k != "feature_group_count"}
    for make in (layer.nnx, layer.linen, Layer(name, without, layer.spatial).nnx):
        assert_named(name, make, other, OTHERS[other])


@pytest.mark.parametrize("name", ALL)
def test_names_that_few_layers_have(name):
    layer = layer_of(name, {})
    for make in (layer.nnx, layer.linen):
        few = () if name in ("DepthwiseConv", "SeparableConv") else ("channel_multiplier",)
        assert_named(name, make, "depth_multiplier", "channel_multiplier", *few)
        few = () if name == "SeparableConv" else ("depthwise_init",)
        assert_named(name, make, "depthwise_initializer", "depthwise_init", *few)


@pytest.mark.parametrize("name", ALL)
def test_names_of_features(name):
    settings = layer_of(name, {}).settings
    of_linen = functools.partial(getattr(grouped_conv_jax.linen, name), **settings)
    of_nnx = functools.partial(getattr(grouped_conv_jax.nnx, name), **settings)
    for other in ("filters", "out_channels"):
        assert_named(name, of_linen, other, "features")
        assert_named(name, of_nnx, other, "out_features")
    assert_named(name, of_nnx, "in_channels", "in_features")
    with pytest.raises(TypeError, match="in_channels is what the inputs have, and not given"):
        of_linen(in_channels=8)


@pytest.mark.parametrize("name", ALL)
def test_a_padding_mode_is_part_of_the_padding(name):
    layer = layer_of(name, {})
    message = "padding_mode is part of padding here: padding='CIRC"
    without = r"argument 'padding_mode'|takes no padding: it moves by one and sees the past only"
    for make in (layer.nnx, layer.linen):
        with pytest.raises(TypeError, match=without if name == "CausalConv" else message):
            make(padding_mode="circular")


def test_missing_groups():
    for name in ("GroupedConv", "GroupedConvTranspose", "GroupedConvLocal"):
        layer = Layer(name, dict(kernel_size=(3, 2)), (4, 5))
        with pytest.raises(TypeError, match="feature_group_count is required; 1 for a plain conv"):
            layer.nnx()
        with pytest.raises(TypeError, match="feature_group_count is required; 1 for a plain conv"):
            layer.linen()


@pytest.mark.parametrize("name", ALL)
def test_inputs_without_features_are_refused(name):
    settings = {} if name == "DepthwiseConv" else {"features": 4}
    settings |= {"feature_group_count": 1} if name in GROUPED else {}
    layer = getattr(grouped_conv_jax.linen, name)(kernel_size=3, **settings)
    with pytest.raises(ValueError, match=r"at least one feature, got shape \(2, 5, 0\)"):
        layer.init(jax.random.key(0), jnp.ones((2, 5, 0)))


@pytest.mark.parametrize("size", [2**62, 10**5000], ids=["64 bits", "5,000 digits"])
def test_what_no_memory_has_room_for_is_refused(size):
    linen_layers, nnx_layers = grouped_conv_jax.linen, grouped_conv_jax.nnx
    x, rngs = jnp.ones((2, 5, 4)), nnx.Rngs(0)
    for layer in (
        linen_layers.GroupedConv(4, size, feature_group_count=1),
        linen_layers.GroupedConvTranspose(size, 3, feature_group_count=1),
        linen_layers.GroupedConvLocal(size, 3, feature_group_count=1),
        linen_layers.DepthwiseConv(3, channel_multiplier=size),
        linen_layers.SeparableConv(4, 3, channel_multiplier=size),
        linen_layers.CausalConv(size, 3, feature_group_count=1),
    ):
        with pytest.raises(ValueError, match="the kernel would have the shape"):
            layer.init(jax.random.key(0), x)
    for make in (
        lambda: nnx_layers.GroupedConv(4, size, 3, feature_group_count=1, rngs=rngs),
        lambda: nnx_layers.GroupedConvTranspose(4, 4, size, feature_group_count=1, rngs=rngs),
        lambda: nnx_layers.GroupedConvLocal(
            4, size, 3, input_size=5, feature_group_count=1, rngs=rngs
        ),
        lambda: nnx_layers.DepthwiseConv(4, 3, channel_multiplier=size, rngs=rngs),
        lambda: nnx_layers.SeparableConv(size, 4, 3, rngs=rngs),
        lambda: nnx_layers.CausalConv(4, 4, size, rngs=rngs),
    ):
        with pytest.raises(ValueError, match="the kernel would have the shape"):
            make()
    state = nnx_layers.CausalConv(4, 4, 3, rngs=rngs).initial_state
    with pytest.raises(ValueError, match="the state would have the shape"):
        state(size)


def test_a_local_layer_has_a_position_at_least():
    settings: dict[str, Any] = dict(kernel_size=3, padding="VALID", feature_group_count=1)
    of_linen = grouped_conv_jax.linen.GroupedConvLocal(4, **settings)
    message = r"large enough .* spatial shape \(2,\) give outputs of \(0,\)"
    with pytest.raises(ValueError, match=message):
        of_linen.init(jax.random.key(0), jnp.ones((1, 2, 4)))
    with pytest.raises(ValueError, match=message):
        grouped_conv_jax.nnx.GroupedConvLocal(4, 4, input_size=2, rngs=nnx.Rngs(0), **settings)


def test_a_local_layer_knows_the_size_of_its_inputs():
    layer = Layer("GroupedConvLocal", dict(kernel_size=(3, 2), feature_group_count=3), (4, 5))
    assert layer.nnx(input_size=4).input_size == (4, 4)
    with pytest.raises(ValueError, match=r"spatial shape \(4, 5\).*got \(5, 5\)"):
        layer.nnx()(jnp.ones((2, 5, 5, 6)))
    with pytest.raises(ValueError, match=r"two .*input_size=\(4, 5, 6\) has three"):
        layer.nnx(input_size=(4, 5, 6))


def test_arguments_that_a_layer_has_settled_are_refused():
    make = grouped_conv_jax.nnx
    with pytest.raises(TypeError, match="DepthwiseConv takes no feature_group_count"):
        make.DepthwiseConv(6, 3, feature_group_count=2, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="takes no out_features: it has in_features"):
        make.DepthwiseConv(6, 3, out_features=12, rngs=nnx.Rngs(0))
    for name in ("strides", "padding", "input_dilation"):
        given: dict[str, Any] = {name: 1}
        with pytest.raises(TypeError, match=f"CausalConv takes no {name}"):
            make.CausalConv(6, 6, 3, rngs=nnx.Rngs(0), **given)
    other: Any = jax.lax.conv_general_dilated
    with pytest.raises(TypeError, match=r"DepthwiseConv .* takes no conv_general_dilated"):
        make.DepthwiseConv(6, 3, conv_general_dilated=other, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"GroupedConvLocal .* takes no conv_general_dilated"):
        grouped_conv_jax.linen.GroupedConvLocal(
            6, 3, feature_group_count=1, conv_general_dilated=other
        )
    for name in ("GroupedConvTranspose", "GroupedConvLocal"):
        with pytest.raises(TypeError, match="feature_group_count"):
            getattr(grouped_conv_jax.linen, name)(12, (3, 3))
        with pytest.raises(TypeError, match="feature_group_count"):
            getattr(make, name)(6, 12, (3, 3), input_size=4, rngs=nnx.Rngs(0))


def lecun(**axes: Any) -> Any:
    return nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", **axes)


@pytest.mark.parametrize(
    ("made", "fan_in"),
    [
        # The docstrings say so. 64 inputs, 96 outputs, 3 x 2 taps.
        (("GroupedConv", dict(feature_group_count=4)), 6 * 16),
        (("DepthwiseConv", dict(channel_multiplier=8)), 6),
        (("GroupedConvTranspose", dict(feature_group_count=4)), 6 * 16),
        (("GroupedConvTranspose", dict(feature_group_count=4, transpose_kernel=True)), 6 * 24),
        (
            (
                "GroupedConvTranspose",
                dict(
                    feature_group_count=4,
                    transpose_kernel=True,
                    kernel_init=nnx.initializers.variance_scaling(
                        4, "fan_in", "truncated_normal", in_axis=-1, out_axis=-2
                    ),
                ),
            ),
            6 * 16,
        ),
        (("GroupedConvLocal", dict(feature_group_count=4, input_size=(2, 3))), 6 * 6 * 16),
        (
            (
                "GroupedConvLocal",
                dict(
                    feature_group_count=4, input_size=(2, 3), kernel_init=lecun(batch_axis=(0, 1))
                ),
            ),
            6 * 16,
        ),
    ],
)
def test_fan_in(made, fan_in):
    name, settings = made
    features = (64,) if name == "DepthwiseConv" else (64, 96)
    layer = getattr(grouped_conv_jax.nnx, name)(*features, (3, 2), rngs=nnx.Rngs(0), **settings)
    kernel = np.asarray(layer.kernel[...])
    assert kernel.size > 3000
    assert math.isclose(kernel.std(), fan_in**-0.5, rel_tol=0.06)


def test_fan_in_of_the_layers_inside():
    layer = grouped_conv_jax.nnx.SeparableConv(
        64, 96, (3, 2), channel_multiplier=8, rngs=nnx.Rngs(0)
    )
    assert math.isclose(np.std(layer.depthwise.kernel[...]), 6**-0.5, rel_tol=0.06)
    assert math.isclose(np.std(layer.pointwise.kernel[...]), 512**-0.5, rel_tol=0.06)


def test_features_of_the_outputs():
    assert (
        grouped_conv_jax.nnx.DepthwiseConv(
            6, 3, channel_multiplier=2, rngs=nnx.Rngs(0)
        ).out_features
        == FEATURES
    )


def test_an_initializer_that_makes_no_array_is_refused():
    nothing: Any = lambda *_: None  # noqa: E731
    layer = grouped_conv_jax.linen.SeparableConv(6, (3, 3), depthwise_init=nothing)
    with pytest.raises(TypeError, match="kernel must be an array, got NoneType"):
        layer.init(jax.random.key(0), jnp.ones((1, 4, 4, 4)))
