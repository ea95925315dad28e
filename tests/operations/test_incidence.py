"""Steps and padding far beyond the arrays: what meets is the same with short ones."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import NHWC, random
from hypothesis import given
from hypothesis import strategies as st

from grouped_conv_jax import (
    grouped_conv,
    grouped_conv_input_grad,
    grouped_conv_kernel_grad,
    grouped_conv_local,
    grouped_conv_patches,
    grouped_conv_transpose,
)
from grouped_conv_jax.incidence import Incidence, shortened

X, W = random("x", (1, 8, 6, 4), np.float32), random("w", (3, 3, 2, 4), np.float32)
PAIRS = [(1, 1), (1, 1)]


def meeting(line: Incidence) -> set[tuple[int, ...]]:
    rows = itertools.product(*map(range, line[:3]))
    return {
        (y, k, x)
        for y, k, x in rows
        if y * line.stride + k * line.rhs_dilation - x * line.lhs_dilation == line.low
    }


counts = st.integers(1, 5)
steps = st.one_of(st.integers(1, 9), st.sampled_from([2**20, 2**40, 3 * 2**40, 2**40 + 1]))


@given(counts, counts, counts, steps, steps, steps, st.data())
def test_the_same_rows_and_taps_meet(
    outputs, taps, inputs, stride, rhs_dilation, lhs_dilation, data
):
    where = [data.draw(st.integers(0, n - 1)) for n in (outputs, taps, inputs)]
    meets = where[0] * stride + where[1] * rhs_dilation - where[2] * lhs_dilation
    low = data.draw(st.one_of(st.just(meets), st.integers(-20, 20), st.sampled_from([2**70])))
    line = Incidence(outputs, taps, inputs, stride, rhs_dilation, lhs_dilation, low)
    assert meeting(shortened(line)) == meeting(line)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # An ordinary convolution stays what it is.
        (Incidence(8, 3, 8, 1, 1, 1, 1), Incidence(8, 3, 8, 1, 1, 1, 1)),
        (Incidence(4, 3, 8, 2, 2, 1, 1), Incidence(4, 3, 8, 2, 2, 1, 1)),
        # The dilation leads past the image: the tap in the middle is the only one that meets it.
        (Incidence(8, 3, 8, 1, 2**40, 1, 2**40), Incidence(8, 3, 8, 1, 15, 1, 15)),
        # The stride leads past image and kernel: one output reads them.
        (Incidence(5, 3, 8, 2**19, 1, 1, 2**20), Incidence(5, 3, 8, 10, 1, 1, 20)),
        # The stride and the gaps are equal: each output reads an input with the same tap.
        (Incidence(8, 3, 8, 2**31, 1, 2**31, 1), Incidence(8, 3, 8, 1, 15, 1, 15)),
    ],
)
def test_short_steps(line, expected):
    assert shortened(line) == expected


def relation(size, taps, outputs, stride, rhs_dilation, lhs_dilation, low) -> np.ndarray:
    """Which output row, tap and input row meet, as an array of zeros and ones."""
    found = np.zeros((outputs, taps, size))
    for y, k in itertools.product(range(outputs), range(taps)):
        x, rest = divmod(y * stride + k * rhs_dilation - low, lhs_dilation)
        if rest == 0 and 0 <= x < size:
            found[y, k, x] = 1
    return found


SETTINGS = [
    dict(padding="SAME", rhs_dilation=(2**31 - 1,) * 2),
    dict(padding="SAME", rhs_dilation=(2**63, 2)),
    dict(padding="SAME", window_strides=(2**62, 1)),
    dict(padding="SAME_LOWER", window_strides=(2**31, 3), rhs_dilation=(1, 2**32)),
    dict(padding=[(2**20, 2**20), (1, 1)], window_strides=(2**19, 1)),
    dict(padding=[(2**62, 2**62 - 100), (1, 1)], window_strides=(2**60, 1)),
    dict(padding=[(2**64, 2**64), (1, 1)], window_strides=(2**61 + 1, 1)),
    dict(padding=[(-(2**31), 2**31 + 2), (1, 1)]),
    dict(padding=[(2**31, -(2**31)), (1, 1)]),
    dict(padding=PAIRS, window_strides=(2**31, 1), lhs_dilation=(2**31, 1)),
    dict(padding=PAIRS, window_strides=(2**33, 1), lhs_dilation=(2**31, 1)),
    dict(padding=[(5, 2**40), (1, 1)], window_strides=(2**39, 1), lhs_dilation=(2**38, 1)),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_values_and_gradients_with_huge_numbers(settings):
    rank = 2
    strides = settings.get("window_strides", (1, 1))
    taps_apart = settings.get("rhs_dilation", (1, 1))
    gaps = settings.get("lhs_dilation", (1, 1))
    lines = []
    for i in range(rank):
        size, taps = X.shape[1 + i], W.shape[i]
        window = (taps - 1) * taps_apart[i] + 1
        if isinstance(settings["padding"], str):
            outputs = -(-size // strides[i])
            total = max(0, (outputs - 1) * strides[i] + window - size)
            low = total // 2 if settings["padding"] == "SAME" else total - total // 2
        else:
            low, high = settings["padding"][i]
            outputs = ((size - 1) * gaps[i] + 1 + low + high - window) // strides[i] + 1
        lines.append(relation(size, taps, outputs, strides[i], taps_apart[i], gaps[i], low))
    x = X.astype(np.float64).reshape(1, 8, 6, 2, 2)
    w = W.astype(np.float64).reshape(3, 3, 2, 2, 2)

    def conv(x, w):
        settings_of_call = {"window_strides": (1, 1), **settings}
        return grouped_conv(x, w, dimension_numbers=NHWC, feature_group_count=2, **settings_of_call)

    out = np.einsum("aih,bjw,nhwgc,ijcgo->nabgo", *lines, x, w)
    cotangent = random("y", (1, *out.shape[1:3], 4), np.float32)
    y = cotangent.astype(np.float64).reshape(out.shape)
    expected = (
        out,
        np.einsum("aih,bjw,nabgo,ijcgo->nhwgc", *lines, y, w),
        np.einsum("aih,bjw,nhwgc,nabgo->ijcgo", *lines, x, y),
    )

    @jax.jit
    def contractions(x, w, y):
        result, vjp = jax.vjp(conv, x, w)
        return result, *vjp(y)

    for one, other in zip(contractions(X, W, cotangent), expected, strict=True):
        np.testing.assert_allclose(one, other.reshape(one.shape), 1e-4, 1e-4)


ARRAYS = {"dimension_numbers": NHWC, "feature_group_count": 2}
TOO_LARGE = {
    "strides of a transposed convolution": (
        lambda: grouped_conv_transpose(X, W, (2**31 - 1, 1), "SAME", **ARRAYS),
        "at most 2147483647",
    ),
    "gaps": (
        lambda: grouped_conv(X, W, (1, 1), PAIRS, (2**31, 1), **ARRAYS),
        "at most 2147483647",
    ),
    "an output padding": (
        lambda: grouped_conv_transpose(X, W, (1, 1), "SAME", output_padding=(2**40, 0), **ARRAYS),
        "at most 2147483647",
    ),
    "a result beyond 64 bits": (
        lambda: grouped_conv(X, W, (1, 1), [(2**31, 2**31), (2**31, 2**31)], **ARRAYS),
        "bytes",
    ),
    "steps that have nothing in common": (
        lambda: grouped_conv(X, W, (2**40, 1), PAIRS, (2**40 + 1, 1), **ARRAYS),
        "too large to be computed together",
    ),
    "an input": (
        lambda: grouped_conv_input_grad(
            (1, 2**40, 6, 4), W, jnp.ones((1, 8, 6, 4)), (2**37, 1), "SAME", **ARRAYS
        ),
        "at most 2147483647",
    ),
    "a kernel": (
        lambda: grouped_conv_kernel_grad(
            X, (2**40, 3, 2, 4), jnp.ones((1, 8, 6, 4)), (1, 1), "SAME", **ARRAYS
        ),
        "at most 2147483647",
    ),
    "taps of patches": (
        lambda: grouped_conv_patches(X, (2**40, 2**40), (1, 1), "SAME", dimension_numbers=NHWC),
        "bytes",
    ),
    "taps of kernels of their own": (
        lambda: grouped_conv_local(X, W, (1, 1), "SAME", (2**40, 3), **ARRAYS),
        "shape",
    ),
    "a continued input": (
        lambda: grouped_conv(X, W, (1, 1), [("CIRCULAR", (2**40, 0)), (1, 1)], **ARRAYS),
        "at most 2147483647",
    ),
    "taps of kernels of their own, of types": (
        lambda: jax.eval_shape(
            lambda x, w: grouped_conv_local(x, w, (1, 1), "SAME", (2**31 - 1, 1), **ARRAYS),
            jax.ShapeDtypeStruct(X.shape, X.dtype),
            jax.ShapeDtypeStruct((8, 6, 2 * (2**31 - 1), 4), X.dtype),
        ),
        "at most 2147483647 can be read",
    ),
    "groups": (
        lambda: grouped_conv(
            X, W, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=2**70
        ),
        "feature_group_count=1180591620717411303424 does not divide",
    ),
}


@pytest.mark.parametrize("call", TOO_LARGE)
def test_what_cannot_be_computed_is_refused(call):
    compute, message = TOO_LARGE[call]
    with pytest.raises(ValueError, match=message):
        compute()


@pytest.mark.parametrize("channels_first", [False, True])
def test_patches_of_many_taps(channels_first):
    padded = np.zeros((2, 6 + 600, 3), np.float32)
    padded[:, 300:306] = x = random("x", (2, 6, 3), np.float32)
    expected = np.stack([padded[:, y * 2 + np.arange(301) * 2] for y in range(3)], 1)
    expected = np.moveaxis(expected, -1, 2).reshape(2, 3, 3 * 301)
    layout = ("NWC", "WIO", "NWC")
    if channels_first:
        layout, x, expected = ("NCW", "OIW", "NCW"), x.swapaxes(1, 2), expected.swapaxes(1, 2)
    found = grouped_conv_patches(x, (301,), (2,), [(300, 300)], None, (2,), layout)
    np.testing.assert_array_equal(found, expected)
