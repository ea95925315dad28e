"""Kernels in other layouts and groupings: a layer computes with them what it did, exactly."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from kernels import image_of, kernel_of, layer

from grouped_conv_jax import weights
from grouped_conv_jax.weights import (
    convert_kernel,
    densify,
    merge_groups,
    regroup,
    split_groups,
)
from grouped_conv_jax.weights.layouts import NAMED

LAYOUTS = {
    "OIHW": "OIHW",
    "HWIO": "HWIO",
    "IWHO": "IWHO",
    "GOIHW": "GOIHW",
    "HGWIO": "HGWIO",
    "OHIGW": "OHIGW",
    "transposed OIHW": "transposed OIHW",
    "transposed WHIO": "transposed WHIO",
    "transposed GOIHW": "transposed GOIHW",
    "transposed IHOWG": "transposed IHOWG",
    "...IO": "HWIO",
    "O...I": "OHWI",
    "transposed G...OI": "transposed GHWOI",
    "transposed HWIO": "transposed HWIO",
}
NAMES = {
    "caffe": "OIHW",
    "caffe_transposed": "transposed OIHW",
    "equinox": "OIHW",
    "equinox_transposed": "OIHW",
    "flax": "HWIO",
    "flax_transposed": "HWIO",
    "haiku": "HWIO",
    "haiku_transposed": "HWOI",
    "jax": "OIHW",
    "jax_transposed": "HWIO",
    "keras": "HWIO",
    "keras_depthwise": "HWGO",
    "keras_transposed": "transposed HWIO",
    "onnx": "OIHW",
    "onnx_transposed": "transposed OIHW",
    "pytorch": "OIHW",
    "pytorch_transposed": "transposed OIHW",
    "torch": "OIHW",
    "torch_transposed": "transposed OIHW",
}
DEPTHWISE = {"keras_depthwise": "HWGO", "GHWO": "GHWO", "transposed GIHW": "transposed GIHW"}


def assert_same(actual: Any, expected: np.ndarray) -> None:
    """Bit by bit, and NumPy's, laid out as files want it."""
    assert type(actual) is np.ndarray
    assert actual.flags.c_contiguous
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


def assert_every_pair_converts(layouts: dict[str, str], groups, inputs, outputs, rank=2) -> None:
    x = image_of(groups, inputs, rank)
    for source, letters in layouts.items():
        kernel = kernel_of(letters, groups, inputs, outputs)
        expected = layer(x, kernel, letters, groups)
        for target, others in layouts.items():
            converted = convert_kernel(kernel, source, target, groups)
            message = f"{source} to {target}"
            np.testing.assert_array_equal(layer(x, converted, others, groups), expected, message)
            assert_same(convert_kernel(converted, target, source, groups), kernel)


# Layouts.


@pytest.mark.parametrize(("groups", "inputs", "outputs"), [(3, 2, 4), (1, 2, 3), (2, 3, 1)])
def test_a_layer_computes_the_same_in_every_layout(groups, inputs, outputs):
    assert_every_pair_converts(LAYOUTS, groups, inputs, outputs)


def test_depthwise_kernels_have_no_inputs():
    layouts = ["OIHW", "...IO", "HGWIO", "transposed OIHW", "transposed HWIO"]
    some = {name: LAYOUTS[name] for name in layouts}
    assert_every_pair_converts({**some, **DEPTHWISE}, 3, 1, 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_means_its_letters(name):
    letters = NAMES[name]
    kernel = kernel_of(letters, 3, 1, 2)
    assert_same(convert_kernel(kernel, name, letters, 3), kernel)
    assert_same(convert_kernel(kernel, letters, name, 3), kernel)
    other = "HWIO" if letters == "OIHW" else "OIHW"
    expected = convert_kernel(kernel, letters, other, 3)
    assert_same(convert_kernel(kernel, name.upper(), other, 3), expected)
    assert_same(convert_kernel(expected, other, name, 3), kernel)


def test_every_name_is_tested():
    assert NAMES.keys() == NAMED.keys()


@pytest.mark.parametrize(
    ("rank", "layouts"),
    [
        (0, ["OI", "IO", "GIO", "transposed OI"]),
        (1, ["OIW", "WIO", "IWGO", "transposed OIW"]),
        (3, ["OIDHW", "HWDIO", "DGHWIO", "transposed OIDHW", "transposed WDIHO"]),
    ],
)
def test_any_number_of_spatial_dimensions(rank, layouts):
    letters = "DHW"[3 - rank :]
    names = ["torch", "flax", "torch_transposed", "keras_transposed"]
    named = {name: NAMED[name].replace("...", letters) for name in names}
    assert_every_pair_converts({**{text: text for text in layouts}, **named}, 2, 3, 2, rank)


def test_letters_of_any_case_and_any_spatial_letters():
    kernel = random("kernel", (6, 2, 3, 4), np.float32)
    for source, target in [("oihw", "HWio"), ("OI01", "01IO"), ("OITX", "...IO")]:
        assert_same(convert_kernel(kernel, source, target), np.transpose(kernel, (2, 3, 1, 0)))
    # An ellipsis is H, W, in that order, whichever way the other layout has them.
    for source, target in [("torch", "WHIO"), ("OIHW", "WHIO"), ("OIXY", "YXIO")]:
        assert_same(convert_kernel(kernel, source, target), np.transpose(kernel, (3, 2, 1, 0)))
    turned = np.swapaxes(kernel, 2, 3)
    assert_same(convert_kernel(turned, "OIWH", "torch"), kernel)
    assert_same(convert_kernel(kernel, "Torch", "CAFFE"), kernel)


# Groupings.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fewer_groups_compute_the_same(layout):
    letters, groups, inputs = LAYOUTS[layout], 6, 2
    x = image_of(groups, inputs)
    kernel = kernel_of(letters, groups, inputs, 3)
    expected = layer(x, kernel, letters, groups)
    for target in (1, 2, 3, 6):
        wider = regroup(kernel, groups, target, layout)
        np.testing.assert_array_equal(layer(x, wider, letters, target), expected)
    assert_same(regroup(kernel, groups, groups, layout), kernel)
    dense = densify(kernel, groups, layout)
    assert_same(dense, regroup(kernel, groups, 1, layout))
    assert_same(dense, regroup(regroup(kernel, groups, 3, layout), 3, 1, layout))
    assert np.count_nonzero(dense) == np.count_nonzero(kernel)


@pytest.mark.parametrize("layout", [*LAYOUTS, *DEPTHWISE])
def test_groups_alone_compute_their_features(layout):
    letters, groups = {**LAYOUTS, **DEPTHWISE}[layout], 3
    inputs = 1 if layout in DEPTHWISE else 2
    x = image_of(groups, inputs)
    kernel = kernel_of(letters, groups, inputs, 2)
    kernels = split_groups(kernel, groups, layout)
    parts = [layer(x, k, letters, 1) for x, k in zip(np.split(x, groups, 1), kernels, strict=True)]
    np.testing.assert_array_equal(np.concatenate(parts, 1), layer(x, kernel, letters, groups))
    merged = merge_groups(kernels, layout)
    assert_same(merged, kernel)
    assert all(kernel.flags.c_contiguous for kernel in kernels)
    assert not np.shares_memory(merged, kernels[0])


def test_the_default_layout_is_channels_last_of_any_rank():
    for taps in [(), (3,), (3, 2), (3, 2, 2)]:
        kernel = random("kernel", (*taps, 2, 6), np.float32)
        assert densify(kernel, 3).shape == (*taps, 6, 6)
        assert regroup(kernel, 6, 2).shape == (*taps, 6, 6)
        assert split_groups(kernel, 3)[0].shape == (*taps, 2, 2)
        assert merge_groups([kernel, kernel]).shape == (*taps, 2, 12)


def test_what_is_not_finite_stays_in_its_group():
    kernel = np.array([[np.inf, np.nan, -0.0, 4.0]], np.float32)
    dense = densify(kernel, 2)
    expected = np.array([[np.inf, np.nan, 0, 0], [0, 0, -0.0, 4]], np.float32)
    assert dense.tobytes() == expected.tobytes()
    assert np.asarray(densify(jnp.asarray(kernel), 2)).tobytes() == expected.tobytes()


# Arrays of both kinds.


@pytest.mark.parametrize(
    "dtype",
    [
        "bool",
        "bfloat16",
        pytest.param("int8", marks=pytest.mark.slow),
        pytest.param("complex64", marks=pytest.mark.slow),
    ],
)
def test_jax_arrays_are_converted_as_numpy_arrays(dtype):
    kernel = np.asarray(jnp.asarray(random("kernel", (6, 2, 3, 2), np.float32)).astype(dtype))

    def everything(kernel):
        flax = convert_kernel(kernel, "torch_transposed", "flax", 3)
        parts = split_groups(flax, 3)
        return flax, regroup(flax, 6, 2), densify(flax, 3), parts, merge_groups(parts)

    here = everything(kernel)
    traced = jax.jit(everything)(kernel)
    for x, y in zip(jax.tree.leaves(here), jax.tree.leaves(traced), strict=True):
        assert isinstance(y, jax.Array)
        assert x.dtype == dtype
        assert_same(x, np.asarray(y))


def test_a_parameter_of_a_layer_and_gradients_through_a_conversion():
    layer = nnx.Conv(6, 12, (3, 2), feature_group_count=3, rngs=nnx.Rngs(0))
    converted = convert_kernel(layer.kernel, "flax", "torch")
    assert isinstance(converted, jax.Array)
    np.testing.assert_array_equal(converted, np.transpose(layer.kernel[...], (3, 2, 0, 1)))
    cotangent = random("cotangent", (3, 2, 6, 12), np.float32)
    _, vjp = jax.vjp(lambda kernel: densify(kernel, 3), layer.kernel[...])
    diagonal = densify(np.ones((3, 2, 2, 12), bool), 3)
    expected = np.where(diagonal, cotangent, 0)
    np.testing.assert_array_equal(densify(np.asarray(vjp(cotangent)[0]), 3), expected)


def test_explicit_shardings_are_kept():
    mesh = jax.make_mesh((2, 4), ("data", "group"), (AxisType.Explicit,) * 2)
    kernel = random("kernel", (3, 2, 2, 16), np.float32)
    outputs, inputs = P(None, None, None, "group"), P(None, None, "data", None)
    with jax.set_mesh(mesh):
        for spec, target in ((outputs, 1), (inputs, 2)):
            placed = jax.device_put(kernel, NamedSharding(mesh, spec))
            wider = regroup(placed, 4, target)
            assert jax.typeof(wider).sharding.spec == spec
            assert_same(np.asarray(wider), regroup(kernel, 4, target))
            moved = convert_kernel(placed, "flax", "torch", 4)
            assert jax.typeof(moved).sharding.spec == P(spec[3], spec[2], None, None)
            assert_same(np.asarray(moved), convert_kernel(kernel, "flax", "torch"))


def test_numpy_arrays_need_no_device(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a device was asked for")

    kernel = random("kernel", (6, 2, 3, 2), np.float32)
    monkeypatch.setattr(jax, "device_put", refuse)
    monkeypatch.setattr("jax.numpy.asarray", refuse)
    with jax.transfer_guard("disallow"):
        for source, target in itertools.product(["torch", "keras_transposed"], ["GOIHW", "flax"]):
            assert type(convert_kernel(kernel, source, target, 2)) is np.ndarray
        assert type(merge_groups(split_groups(densify(kernel, 2), 1))) is np.ndarray


# What is wrong.

ONES = np.ones((8, 2, 3, 3))
WRONG: Any = 1.0


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        (("NHWC", "HWIO"), ValueError, ["source='NHWC' has no O and no I", "'HWIO'", "keras"]),
        (("OIHW", "OHW"), ValueError, ["target='OHW' has no I"]),
        (("OIHH", "HWIO"), ValueError, ["source='OIHH' has H more than once"]),
        (("OI-W", "HWIO"), ValueError, ["source='OI-W' is no layout", "transposed OI..."]),
        (("tensorflw", "HWIO"), ValueError, ["source='tensorflw'", "torch_transposed", "haiku"]),
        (
            ("HWIO", "matlib"),
            ValueError,
            ["target='matlib' has no O", "'GOIHW'", "pytorch", "equinox_transposed"],
        ),
        (("conflix", "HWIO"), ValueError, ["source='conflix'", "none of the names", "keras"]),
        (("HWIO", "conflix"), ValueError, ["target='conflix'", "none of the names", "keras"]),
        (("OIH...", "HWIO"), ValueError, ["source='OIH...'", "ellipsis and H"]),
        ((None, "HWIO"), TypeError, ["source must be a string", "None"]),
        (("OIHW", 3), TypeError, ["target must be a string", "3"]),
        (("OIW", "WIO"), ValueError, ["source='OIW'", "3 dimensions", "kernel has 4"]),
        (("OIDHW", "torch"), ValueError, ["source='OIDHW'", "5 dimensions", "kernel has 4"]),
        (("torch", "DHWIO"), ValueError, ["target='DHWIO' has 3 spatial", "kernel has 2"]),
        (("OIHW", "XYIO"), ValueError, ["differ in their spatial letters", "HW", "XY"]),
        (("torch_transposed", "flax"), ValueError, ["feature_group_count must be given"]),
        (("torch", "GOIHW"), ValueError, ["feature_group_count must be given", "axis G"]),
        (("torch", "flax", 3), ValueError, ["=3", "axis O", "source='torch'", "(8)", "1, 2, 4"]),
        (("torch", "flax", 0), ValueError, ["feature_group_count must be at least 1"]),
        (("torch", "flax", 2.0), TypeError, ["feature_group_count", "2.0"]),
        (("torch", "flax", True), TypeError, ["feature_group_count", "True"]),
        (("GIHW", "HWIO", 4), ValueError, ["=4", "axis G of the kernel in source='GIHW' has 8"]),
        (
            ("torch", "keras_depthwise", 4),
            ValueError,
            ["target='keras_depthwise' has no axis I", "kernel has 2", "with I"],
        ),
    ],
)
def test_wrong_layouts_are_told(arguments, error, parts):
    with pytest.raises(error) as raised:
        convert_kernel(ONES, *arguments)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        (lambda: regroup(ONES, 4, 3, "torch"), ValueError, ["target_group_count=3", "(4)", "1, 2"]),
        (lambda: regroup(ONES, 2, 4, "torch"), ValueError, ["target_group_count=4", "(2)"]),
        (lambda: regroup(ONES, 3, 1, "torch"), ValueError, ["feature_group_count=3", "(8)"]),
        (lambda: regroup(ONES, 4, WRONG, "torch"), TypeError, ["target_group_count", "1.0"]),
        (lambda: densify(ONES, 2, "HWGO"), ValueError, ["=2", "axis G", "has 3"]),
        (lambda: densify(ONES, 3, "HWGO"), ValueError, ["no axis I", "kernel has 3"]),
        (lambda: densify(ONES[0, 0, 0], 1), ValueError, ["at least 2 dimensions", "has 1"]),
        (lambda: densify([[1.0]], 1), TypeError, ["kernel must be", "list", "np.asarray"]),
        (lambda: merge_groups(WRONG), TypeError, ["kernels must be a list of kernels", "float"]),
        (lambda: split_groups(ONES, 5, "torch"), ValueError, ["=5", "(8)"]),
        (lambda: split_groups(ONES[..., :0], 2**31), ValueError, ["=2147483648", "no outputs"]),
        (lambda: merge_groups([]), ValueError, ["kernels", "at least one"]),
        (lambda: merge_groups([ONES, [1]]), TypeError, ["kernels[1] must be", "list"]),
        (lambda: merge_groups([ONES, ONES[:1]]), ValueError, ["(8, 2, 3, 3)", "at 1 (1, 2, 3"]),
        (lambda: merge_groups([ONES, ONES > 0]), ValueError, ["float64", "bool"]),
    ],
)
def test_wrong_groups_are_told(call, error, parts):
    with pytest.raises(error) as raised:
        call()
    for part in parts:
        assert part in str(raised.value)


def test_only_what_is_public_is_offered():
    public = {"convert_kernel", "densify", "merge_groups", "regroup", "split_groups"}
    assert set(dir(weights)) == set(weights.__all__) == public
