"""What is measured: named convolutions of well-known networks, the modes, random operands."""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from grouped_conv_jax.operations.arguments import check_divides
from grouped_conv_jax.spec import Role

Mode = Literal["fprop", "dgrad", "wgrad", "training"]
"""One contraction, or the output and both gradients of one call."""

MODES: tuple[Mode, ...] = get_args(Mode)

USED: dict[Mode, tuple[Role, ...]] = {
    "fprop": ("lhs", "rhs"),
    "dgrad": ("out", "rhs"),
    "wgrad": ("lhs", "out"),
    "training": ("lhs", "rhs", "out"),
}
"""The arrays that a mode computes from; `out` is the cotangent of the output."""

MADE: dict[Mode, tuple[Role, ...]] = {
    "fprop": ("out",),
    "dgrad": ("lhs",),
    "wgrad": ("rhs",),
    "training": ("out", "lhs", "rhs"),
}
"""The arrays that a mode computes."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """One two-dimensional convolution: shapes in NHWC and HWIO, and arguments as in lax.

    A transposed one has the strides and the padding of the convolution that it transposes.
    """

    name: str
    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    window_strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    feature_group_count: int
    transposed: bool = False

    @classmethod
    def of(cls, name: str, numbers: Sequence[int], transposed: bool = False) -> "Workload":
        """From N H W Cin Cout k stride G; padded by half of the kernel, rounded down.

        A transposed one is padded by half of (k - stride): the output is `stride` times as large.

        Raises:
          ValueError: there is no such convolution.
        """
        batch, height, width, inputs, outputs, taps, stride, groups = numbers
        if min(numbers) < 1:
            raise ValueError(f"a shape is eight numbers of at least 1, got {tuple(numbers)}")
        if transposed and (taps < stride or (taps - stride) % 2):
            raise ValueError(
                f"a transposed kernel must be larger than its stride by an even number, got {taps} "
                f"and {stride}"
            )
        check_divides("feature_group_count", groups, "the input features", inputs)
        check_divides("feature_group_count", groups, "the output features", outputs)
        padding = (taps - stride) // 2 if transposed else taps // 2
        return cls(
            name=name,
            lhs=(batch, height, width, inputs),
            rhs=(taps, taps, inputs // groups, outputs),
            window_strides=(stride, stride),
            padding=((padding, padding),) * 2,
            feature_group_count=groups,
            transposed=transposed,
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """Of `lax.conv_general_dilated`, beside the arrays."""
        common = {
            "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
            "feature_group_count": self.feature_group_count,
        }
        if not self.transposed:
            return {"window_strides": self.window_strides, "padding": self.padding, **common}
        return {
            "window_strides": (1, 1),
            "padding": tuple(
                (taps - 1 - low, taps - 1 - high)
                for taps, (low, high) in zip(self.rhs[:2], self.padding, strict=True)
            ),
            "lhs_dilation": self.window_strides,
            **common,
        }

    @property
    def out(self) -> tuple[int, ...]:
        spatial = (
            (size - 1) * stride + taps - low - high
            if self.transposed
            else (size + low + high - taps) // stride + 1
            for size, taps, stride, (low, high) in zip(
                self.lhs[1:3], self.rhs[:2], self.window_strides, self.padding, strict=True
            )
        )
        return (self.lhs[0], *spatial, self.rhs[3])

    def shape(self, role: Role) -> tuple[int, ...]:
        return {"lhs": self.lhs, "rhs": self.rhs, "out": self.out}[role]

    def random(self) -> dict[Role, np.ndarray]:
        """A random input, kernel and cotangent of the output, in [-1, 1], float32."""
        draw = np.random.default_rng(zlib.crc32(self.name.encode()))
        roles: tuple[Role, ...] = ("lhs", "rhs", "out")
        return {role: draw.random(self.shape(role), "float32") * 2 - 1 for role in roles}

    def with_batch(self, batch: int) -> "Workload":
        return dataclasses.replace(self, lhs=(batch, *self.lhs[1:]))

    def flops(self, mode: Mode) -> int:
        """Two for each multiply-add, padding counted as if it were data."""
        taps, inputs, outputs = math.prod(self.rhs[:2]), self.rhs[2], self.rhs[3]
        # Each output sees the inputs of its group; transposed, each input the outputs.
        seen = outputs // self.feature_group_count if self.transposed else inputs
        positions = self.lhs if self.transposed else self.out
        return 2 * len(MADE[mode]) * math.prod(positions) * taps * seen

    def elements(self, mode: Mode) -> int:
        """Of what a mode computes from and of what it computes."""
        return sum(math.prod(self.shape(role)) for role in (*USED[mode], *MADE[mode]))


WORKLOADS: dict[str, Workload] = {
    name: Workload.of(name, numbers)
    for name, *numbers in (
        # N, H, W, Cin, Cout, k, stride, G
        ("alexnet_conv2", 16, 27, 27, 96, 256, 5, 1, 2),
        ("alexnet_conv4", 16, 13, 13, 384, 384, 3, 1, 2),
        ("alexnet_conv5", 16, 13, 13, 384, 256, 3, 1, 2),
        ("resnext_s1", 8, 56, 56, 128, 128, 3, 1, 32),
        ("resnext_s2_stride2", 8, 56, 56, 256, 256, 3, 2, 32),
        ("resnext_s3", 8, 14, 14, 512, 512, 3, 1, 32),
        ("resnext101_32x8d_s1", 4, 56, 56, 256, 256, 3, 1, 32),
        ("regnetx_w24", 8, 28, 28, 120, 120, 3, 1, 5),
        ("shufflenet_1x1", 8, 28, 28, 240, 240, 1, 1, 3),
        ("mobilenet_dw", 8, 56, 56, 128, 128, 3, 1, 128),
        ("mobilenet_dw_stride2", 8, 112, 112, 96, 96, 3, 2, 96),
        ("convnext_dw7", 8, 28, 28, 192, 192, 7, 1, 192),
    )
}

TRANSPOSED: dict[str, Workload] = {
    name: Workload.of(name, numbers, transposed=True)
    for name, *numbers in (
        ("up_dense", 16, 14, 14, 128, 64, 4, 2, 1),
        ("up_4_groups", 16, 14, 14, 256, 128, 4, 2, 4),
        ("up_32_groups", 8, 28, 28, 128, 128, 4, 2, 32),
        ("up_depthwise", 8, 28, 28, 256, 256, 4, 2, 256),
        ("up_depthwise_k2", 8, 28, 28, 128, 128, 2, 2, 128),
    )
}
"""Upsampling by two, as decoders and generators do it."""

NAMED = WORKLOADS | TRANSPOSED

QUICK = ("alexnet_conv4", "regnetx_w24", "mobilenet_dw")
"""Those of a quick run: a few groups, more, and a group for each feature."""
