"""Halos, without devices: the rows that each place is said to read are those that it needs."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from cases import random
from jax import lax

from grouped_conv_jax.partitioning.halo import Halo
from grouped_conv_jax.spec import ConvSpec

GEOMETRIES = [
    {"x": x, "kernel": k, "strides": s, "padding": p, "lhs_dilation": e, "rhs_dilation": d}
    for x, k, s, p, e, d in itertools.product(
        (8, 13), (1, 2, 3, 5), (1, 2, 3), ((0, 0), (1, 1), (0, 3), (-1, 2), (4, -2)), (1, 2), (1, 2)
    )
]


def spec_of(
    *,
    x: int,
    kernel: int,
    strides: int,
    padding: tuple[int, int],
    lhs_dilation: int,
    rhs_dilation: int,
) -> ConvSpec:
    return ConvSpec(
        lhs_shape=(1, 1, x),
        rhs_shape=(1, 1, kernel),
        dtype=np.dtype(np.float32),
        wide_dtype=np.dtype(np.float32),
        window_strides=(strides,),
        padding=(padding,),
        lhs_dilation=(lhs_dilation,),
        rhs_dilation=(rhs_dilation,),
        dimension_numbers=lax.ConvDimensionNumbers((0, 1, 2), (0, 1, 2), (0, 1, 2)),
        feature_group_count=1,
        precision=None,
    )


def convolve(x: np.ndarray, w: np.ndarray, spec: ConvSpec) -> np.ndarray:
    """One row of one feature, from the definition."""
    (s,), ((low, high),) = spec.window_strides, spec.padding
    (e,), (d,) = spec.lhs_dilation, spec.rhs_dilation
    filled = np.zeros(low + high + (len(x) - 1) * e + 1 + 2 * 50)
    filled[50 + low : 50 + low + (len(x) - 1) * e + 1 : e] = x
    # A crop: what is before or after the padded array is not seen.
    filled = filled[50 : len(filled) - 50]
    count = (len(filled) - (len(w) - 1) * d - 1) // s + 1
    return np.array(
        [sum(filled[y * s + k * d] * w[k] for k in range(len(w))) for y in range(count)]
    )


@pytest.mark.parametrize("devices", [2, 4])
def test_the_convolutions_of_the_rows_of_each_place_make_up_the_whole(devices):
    split = 0
    for geometry in GEOMETRIES:
        spec = spec_of(**geometry)
        (rows,) = spec.spatial_shape("out")
        halo = Halo.of(spec, 0, devices)
        if halo is None:
            continue
        split += 1
        x, w = (
            random("x", (geometry["x"],), np.float64),
            random("w", (geometry["kernel"],), np.float64),
        )
        local = dataclasses.replace(spec, lhs_shape=(1, 1, halo.rows), padding=(halo.padding,))
        assert local.spatial_shape("out") == (halo.out_block,)
        beyond = 100
        padded = np.pad(x, beyond)
        got = []
        for place in range(devices):
            start = place * halo.step + halo.first
            assert place * halo.block - halo.before <= start
            assert start + halo.rows <= (place + 1) * halo.block + halo.after
            part = padded[beyond + start : beyond + start + halo.rows]
            got.append(convolve(part, w, local))
        np.testing.assert_allclose(np.concatenate(got)[:rows], convolve(x, w, spec), atol=1e-12)
    assert split > len(GEOMETRIES) / 3


def test_a_halo_is_no_larger_than_the_reach_of_the_kernel():
    same = spec_of(x=32, kernel=5, strides=1, padding=(2, 2), lhs_dilation=1, rhs_dilation=1)
    halo = Halo.of(same, 0, 4)
    assert halo is not None
    assert (halo.block, halo.before, halo.after, halo.rows) == (8, 2, 2, 12)
    strided = spec_of(x=32, kernel=3, strides=2, padding=(0, 1), lhs_dilation=1, rhs_dilation=1)
    halo = Halo.of(strided, 0, 4)
    assert halo is not None
    assert (halo.block, halo.before, halo.after, halo.rows) == (8, 0, 1, 9)


@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        ({"x": 3}, 4),
        ({"x": 9, "lhs_dilation": 2}, 4),
        ({"x": 4, "kernel": 1, "strides": 3, "lhs_dilation": 3, "padding": (1, 0)}, 4),
        ({"padding": (40, -9)}, 4),
    ],
    ids=["fewer rows than devices", "blocks out of step", "padding only", "beyond all devices"],
)
def test_what_has_no_halo(changes, devices):
    geometry = {
        "x": 10, "kernel": 3, "strides": 1, "padding": (1, 1), "lhs_dilation": 1, "rhs_dilation": 1
    }  # fmt: skip
    spec = spec_of(**{**geometry, **changes})
    assert math.prod(spec.out_shape) > 0
    assert Halo.of(spec, 0, devices) is None
