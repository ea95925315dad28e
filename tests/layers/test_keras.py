"""Convolutions against the oracles of Keras's own tests, which are written in NumPy."""

import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from cases import every_implementation, random

from grouped_conv_jax import grouped_conv, grouped_conv_transpose

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def oracles(request, tmp_path_factory) -> Iterator[types.SimpleNamespace]:
    """Keras writes its settings into its folder when it is imported, and its tests have a mark."""
    request.config.addinivalue_line("markers", "requires_trainable_backend: of Keras's tests")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("KERAS_BACKEND", "jax")
        environment.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        pytest.importorskip("keras", reason="Keras is not installed")
        found = types.SimpleNamespace()
        for name in ("conv", "conv_transpose", "depthwise_conv"):
            tests = f"keras.src.layers.convolutional.{name}_test"
            module = pytest.importorskip(tests, reason="this Keras comes without its tests")
            for key, value in vars(module).items():
                if key.startswith("np_"):
                    setattr(found, key, value)
        yield found


def layout(rank: int, data_format: str) -> tuple[str, str, str]:
    letters = "DHW"[3 - rank :]
    of_arrays = f"N{letters}C" if data_format == "channels_last" else f"NC{letters}"
    return of_arrays, f"{letters}IO", of_arrays


def operands(name: str, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    return [random(f"keras {name} {i}", shape, np.float64) for i, shape in enumerate(shapes)]


def assert_same(ours: Any, theirs: np.ndarray) -> None:
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, theirs, 1e-12, 1e-12)


# The input, the kernel, strides, padding, dilation and groups.
CONVS: dict[str, tuple[Any, ...]] = {
    "1d": ((2, 9, 4), (3, 2, 6), (2,), "same", (1,), 2),
    "1d, causal": ((2, 8, 6), (3, 2, 3), (1,), "causal", (2,), 3),
    "1d, depthwise": ((2, 8, 3), (2, 1, 6), (1,), "valid", (3,), 3),
    "2d": ((2, 7, 6, 4), (3, 2, 2, 6), (2, 1), "same", (1, 1), 2),
    "2d, one group": ((2, 6, 5, 3), (2, 3, 3, 4), (1, 2), "valid", (1, 1), 1),
    "2d, dilated": ((1, 8, 9, 6), (2, 3, 2, 9), (1, 1), "same", (3, 2), 3),
    "3d": ((1, 5, 4, 6, 4), (3, 2, 2, 2, 4), (2, 1, 2), "same", (1, 1, 1), 2),
    "3d, depthwise": ((1, 4, 5, 4, 3), (2, 3, 2, 1, 3), (1, 1, 1), "valid", (2, 1, 1), 3),
}


def check_conv(
    oracles: Any, name: str, data_format: str, implementation: str | None = None
) -> None:
    lhs, rhs, strides, padding, dilation, groups = CONVS[name]
    rank = len(strides)
    if data_format == "channels_first":
        lhs = (lhs[0], lhs[-1], *lhs[1:-1])
    x, w, bias = operands(name, lhs, rhs, rhs[-1:])
    theirs = getattr(oracles, f"np_conv{rank}d")(
        x, w, bias, strides, padding, data_format, dilation, groups
    )
    ours = grouped_conv(
        x,
        w,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=layout(rank, data_format),
        feature_group_count=groups,
        implementation=implementation,
    )
    ones = (1,) * rank
    per_output = (*ones, -1) if data_format == "channels_last" else (-1, *ones)
    assert_same(ours + bias.reshape(1, *per_output), theirs)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("name", CONVS)
def test_convolutions_are_those_of_keras(oracles, name, data_format):
    check_conv(oracles, name, data_format)


@every_implementation
def test_each_implementation_is_that_of_keras(oracles, implementation):
    check_conv(oracles, "2d, dilated", "channels_last", implementation)


# The input, Keras's depthwise kernel (*taps, inputs, multiplier), strides, padding and dilation.
DEPTHWISE: dict[str, tuple[Any, ...]] = {
    "1d": ((2, 8, 3), (3, 3, 2), (2,), "same", (1,)),
    "1d, dilated": ((2, 9, 4), (2, 4, 1), (1,), "valid", (3,)),
    "2d": ((2, 6, 7, 3), (3, 2, 3, 4), (2, 2), "same", (1, 1)),
    "2d, dilated": ((2, 7, 8, 2), (2, 3, 2, 3), (1, 1), "same", (2, 3)),
}


def depthwise(name: str) -> tuple[jax.Array, list[np.ndarray]]:
    """Ours, and what theirs takes first."""
    lhs, kernel, strides, padding, dilation = DEPTHWISE[name]
    x, w = operands(f"depthwise {name}", lhs, kernel)
    *taps, inputs, multiplier = kernel
    ours = grouped_conv(
        x,
        w.reshape(*taps, 1, inputs * multiplier),
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=layout(len(strides), "channels_last"),
        feature_group_count=inputs,
    )
    return ours, [x, w, np.zeros(inputs * multiplier)]


@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise_convolutions_are_those_of_keras(oracles, name):
    ours, theirs = depthwise(name)
    *_, strides, padding, dilation = DEPTHWISE[name]
    oracle = getattr(oracles, f"np_depthwise_conv{len(strides)}d")
    assert_same(ours, oracle(*theirs, strides, padding, "channels_last", dilation))


@pytest.mark.parametrize("name", ["1d", "2d"])
def test_separable_convolutions_are_those_of_keras(oracles, name):
    between, theirs = depthwise(name)
    *_, strides, padding, dilation = DEPTHWISE[name]
    rank = len(strides)
    ones = (1,) * rank
    (pointwise,) = operands(f"pointwise {name}", (*ones, between.shape[-1], 5))
    ours = grouped_conv(
        between, pointwise, ones, "VALID", dimension_numbers=layout(rank, "channels_last")
    )
    separate = getattr(oracles, f"np_depthwise_conv{rank}d")(
        *theirs, strides, padding, "channels_last", dilation
    )
    expected = getattr(oracles, f"np_conv{rank}d")(
        separate, pointwise, np.zeros(5), ones, "valid", "channels_last", ones, 1
    )
    assert_same(ours, expected)


# The input, Keras's kernel (*taps, outputs / groups, inputs), strides, padding, output padding
# (by default what makes "same" strides times the size) and groups, of which Keras has one only.
TRANSPOSED: dict[str, tuple[Any, ...]] = {
    "1d": ((2, 5, 4), (3, 2, 4), (2,), "same", None, 1),
    "1d, groups": ((2, 5, 6), (4, 2, 6), (3,), "valid", None, 3),
    "1d, output padding": ((2, 4, 4), (3, 3, 4), (3,), "valid", (2,), 2),
    "2d": ((2, 3, 4, 3), (3, 2, 2, 3), (2, 1), "same", None, 1),
    "2d, groups": ((2, 4, 3, 4), (2, 3, 3, 4), (1, 2), "same", None, 2),
    "2d, strides longer than the kernel": ((1, 3, 3, 6), (2, 1, 1, 6), (3, 2), "same", None, 3),
    "2d, output padding": ((1, 3, 4, 4), (3, 2, 1, 4), (3, 2), "valid", (2, 1), 4),
    "3d, groups": ((1, 3, 2, 3, 4), (2, 3, 2, 2, 4), (2, 1, 2), "valid", None, 2),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolutions_are_those_of_keras(oracles, name):
    lhs, rhs, strides, padding, more, groups = TRANSPOSED[name]
    rank = len(strides)
    x, w = operands(f"transposed {name}", lhs, rhs)
    oracle = getattr(oracles, f"np_conv{rank}d_transpose")
    ones = (1,) * rank
    none = np.zeros(rhs[-2])
    theirs = [
        oracle(*of_group, none, strides, padding, more, "channels_last", ones)
        for of_group in zip(np.split(x, groups, -1), np.split(w, groups, -1), strict=True)
    ]
    ours = grouped_conv_transpose(
        x,
        w,
        strides,
        # What output_padding is added to is not the padding that "VALID" stands for.
        padding.upper() if more is None else [(k - 1, k - 1) for k in rhs[:rank]],
        dimension_numbers=layout(rank, "channels_last"),
        feature_group_count=groups,
        transpose_kernel=True,
        output_padding=more,
    )
    assert_same(ours, np.concatenate(theirs, -1))
