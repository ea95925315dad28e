"""Convolutions that are large enough for several threads."""

from typing import Any

from cases import NHWC, Case


def conv2d(lhs, rhs, groups, strides=(1, 1), padding: Any = "SAME", dilation=(1, 1)) -> Case:
    arguments = {
        "window_strides": strides,
        "padding": padding,
        "rhs_dilation": dilation,
        "dimension_numbers": NHWC,
        "feature_group_count": groups,
    }
    return Case("native", lhs, rhs, arguments)


LARGE = conv2d((4, 40, 40, 64), (3, 3, 4, 64), 16)


"""Of several tiles for each thread."""
