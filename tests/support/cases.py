"""The one list of convolutions that every test runs over, and their random operands."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import lax

import grouped_conv_jax
from grouped_conv_jax import grouped_conv
from grouped_conv_jax.algorithms.table import Implementation

IMPLEMENTATIONS = (None, *grouped_conv_jax.implementations())


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One convolution: shapes, and the arguments of `grouped_conv`.

    `representative` cases are those of the tests that are too long for all of them.
    """

    name: str
    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    arguments: Mapping[str, Any]
    representative: bool = False

    @property
    def out(self) -> tuple[int, ...]:
        return oracle.out_shape(self.lhs, self.rhs, **self.arguments)

    @property
    def groups(self) -> int:
        return self.arguments.get("feature_group_count", 1)

    def random(self, dtype: Any = np.float32, *, stack: tuple[int, ...] = ()) -> list[np.ndarray]:
        """A random input, kernel and output cotangent, in [-1, 1]; `stack` more axes in front."""
        return [random(f"{self.name} {i}", (*stack, *s), dtype) for i, s in enumerate(self.shapes)]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return self.lhs, self.rhs, self.out

    def contractions(self, x: np.ndarray, w: np.ndarray, y: np.ndarray) -> Sequence[np.ndarray]:
        """The output, and both gradients for the output's cotangent y, by the oracle."""
        return oracle.contractions(x, w, y, **self.arguments)

    @property
    def lengths(self) -> list[float]:
        """Of the longest sum of each contraction."""
        return oracle.lengths(*self.shapes, **self.arguments)

    def conv(self, implementation: Implementation = None, **more: Any) -> Callable[..., Any]:
        return lambda lhs, rhs: grouped_conv(
            lhs, rhs, **{**self.arguments, **more}, implementation=implementation
        )

    def lax_conv(self, **more: Any) -> Callable[..., Any]:
        """lax's own, of an input that is padded before if it is not with zeros."""
        arguments = {**self.arguments, **more}
        if not self.is_beyond_lax:
            return lambda lhs, rhs: lax.conv_general_dilated(lhs, rhs, **arguments)
        sources = oracle.sources(self.lhs, self.rhs, **self.arguments)
        spatial = oracle.layouts(len(self.lhs) - 2, **self.arguments)["lhs"][2:]
        arguments |= {"padding": "VALID", "lhs_dilation": None}

        def conv(lhs, rhs):
            for dimension, source in zip(spatial, sources, strict=True):
                lhs = jnp.take(lhs, np.maximum(source, 0), dimension)
                is_there = (source >= 0).astype(lhs.dtype)
                lhs *= is_there.reshape(-1, *[1] * (lhs.ndim - 1 - dimension))[(None,) * dimension]
            return lax.conv_general_dilated(lhs, rhs, **arguments)

        return conv

    @property
    def is_beyond_lax(self) -> bool:
        """Whether lax does not know the padding."""
        text = str(self.arguments["padding"]).upper()
        return any(n in text for n in ("CIRCULAR", "REFLECT", "REPLICATE", "CAUSAL"))


def random(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Uniform in [-1, 1] (complex: in both parts; integers: in -8 ... 8), the same for a name."""
    # Not hash(), which differs from one process to the next.
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    if np.issubdtype(dtype, np.integer):
        return draw.integers(-8, 9, shape).astype(dtype)
    values = draw.uniform(-1, 1, shape)
    if np.issubdtype(dtype, np.complexfloating):
        return (values + 1j * draw.uniform(-1, 1, shape)).astype(dtype)
    return values.astype(dtype)


NHWC = ("NHWC", "HWIO", "NHWC")


def conv(
    name: str,
    lhs: tuple[int, ...],
    rhs: tuple[int, ...],
    window_strides: Any,
    padding: Any,
    feature_group_count: int = 1,
    layout: Any = None,
    representative: bool = False,
    **more: Any,
) -> Case:
    """Returns a case from the arguments of a convolution."""
    arguments = {"window_strides": window_strides, "padding": padding, **more}
    if feature_group_count != 1:
        arguments["feature_group_count"] = feature_group_count
    if layout is not None:
        arguments["dimension_numbers"] = layout
    return Case(name, lhs, rhs, arguments, representative)


CASES = [
    # Ranks.
    conv("rank 0", (5, 4), (6, 2), (), (), 2),
    conv("rank 0, outputs before inputs", (4, 5), (2, 6), (), "SAME", 2, ("CN", "IO", "CN")),
    conv("rank 1", (3, 4, 9), (6, 2, 3), (2,), "SAME", 2, representative=True),
    conv("rank 1, features last", (2, 8, 6), (4, 2, 3), (1,), [(3, 0)], 3, ("NWC", "WIO", "NWC")),
    conv(
        "rank 3",
        (2, 4, 4, 5, 3),
        (6, 2, 2, 3, 1),
        (1, 2, 1),
        [(1, 0), (1, 1), (0, 0)],
        2,
        lhs_dilation=(1, 1, 2),
        rhs_dilation=(2, 1, 1),
    ),
    conv(
        "rank 3, features last",
        (1, 4, 3, 5, 6),
        (2, 2, 3, 2, 3),
        (2, 1, 2),
        "SAME",
        3,
        ("NDHWC", "DHWIO", "NDHWC"),
    ),
    # Layouts, with strides and paddings that tell the spatial dimensions apart.
    conv("NCHW", (2, 4, 7, 6), (6, 2, 3, 2), (2, 1), [(1, 2), (0, 1)], 2),
    conv(
        "NHWC", (2, 7, 6, 4), (3, 2, 2, 6), (2, 1), [(1, 2), (0, 1)], 2, NHWC, representative=True
    ),
    conv(
        "CNHW to NHCW",
        (4, 2, 7, 6),
        (2, 3, 2, 6),
        (2, 1),
        [(1, 2), (0, 1)],
        2,
        ("CNHW", "IHWO", "NHCW"),
    ),
    conv(
        "spatial letters in three orders",
        (2, 7, 6, 4),
        (2, 3, 2, 6),
        (1, 2),
        [(0, 1), (1, 2)],
        2,
        ("NHWC", "WHIO", "NWHC"),
        rhs_dilation=(2, 1),
    ),
    conv(
        "ConvDimensionNumbers",
        (7, 4, 6, 2),
        (3, 6, 2, 2),
        (1, 3),
        [(0, 1), (1, 2)],
        2,
        lax.ConvDimensionNumbers((3, 1, 2, 0), (1, 2, 3, 0), (2, 3, 1, 0)),
    ),
    # Strides and dilations.
    conv("strides that do not reach the last rows", (2, 2, 8, 9), (4, 1, 3, 2), (3, 4), "VALID", 2),
    conv("strides larger than the kernel", (2, 4, 9, 8), (4, 2, 1, 2), (3, 3), "SAME", 2),
    conv(
        "input dilated",
        (2, 4, 4, 3),
        (6, 2, 3, 3),
        (1, 1),
        [(2, 1), (0, 2)],
        2,
        lhs_dilation=(2, 3),
    ),
    conv("kernel dilated", (2, 4, 8, 7), (6, 2, 3, 2), (1, 1), "VALID", 2, rhs_dilation=(2, 3)),
    conv(
        "kernel dilated, SAME", (2, 4, 8, 7), (4, 2, 3, 2), (2, 1), "SAME", 2, rhs_dilation=(2, 3)
    ),
    conv(
        "both dilated, strided, cropped, three groups",
        (6, 2, 5, 6),
        (2, 3, 2, 9),
        (2, 3),
        [(-2, 5), (3, -1)],
        3,
        ("CNHW", "IHWO", "NHCW"),
        lhs_dilation=(2, 3),
        rhs_dilation=(3, 2),
        representative=True,
    ),
    # Paddings.
    conv("SAME, odd remainder", (1, 2, 6, 5), (2, 1, 4, 2), (1, 2), "SAME", 2),
    conv("SAME_LOWER", (1, 2, 6, 5), (2, 1, 4, 2), (1, 2), "SAME_LOWER", 2),
    conv("lower-case same_lower", (1, 2, 6, 5), (2, 1, 2, 4), (1, 1), "same_lower", 2),
    conv("lower-case valid", (1, 2, 6, 5), (2, 1, 2, 4), (1, 1), "valid", 2),
    conv("negative padding", (2, 4, 7, 8), (4, 2, 3, 2), (1, 2), [(-1, -2), (-3, 1)], 2),
    conv("padding larger than the kernel", (1, 4, 3, 2), (4, 2, 2, 3), (1, 2), [(4, 3), (0, 6)], 2),
    conv("circular", (2, 7, 6, 4), (3, 2, 2, 6), (2, 1), "CIRCULAR", 2, NHWC, representative=True),
    conv(
        "reflected further than there is",
        (1, 2, 3, 1),
        (4, 1, 3, 3),
        (1, 2),
        [("REFLECT", (5, 4)), "reflect"],
        2,
    ),
    conv(
        "replicated, kernel dilated",
        (2, 4, 6, 5),
        (2, 2, 2, 4),
        (1, 1),
        "REPLICATE",
        2,
        rhs_dilation=(3, 1),
    ),
    conv(
        "causal", (2, 7, 4), (3, 1, 8), (1,), "CAUSAL", 4, ("NWC", "WIO", "NWC"), rhs_dilation=(2,)
    ),
    conv(
        "a padding for each dimension, input dilated, cropped",
        (2, 2, 4, 3, 5),
        (4, 1, 2, 2, 3),
        (1, 1, 2),
        [("CIRCULAR", (3, -1)), ("REPLICATE", (2, 3)), "SAME"],
        2,
        lhs_dilation=(2, 3, 1),
    ),
    conv(
        "two batch groups, circular and causal",
        (4, 3, 6, 5),
        (6, 3, 3, 2),
        (2, 1),
        ["CIRCULAR", ("CAUSAL", None)],
        batch_group_count=2,
    ),
    # XLA:CPU before jax 0.12 reads past the end of an array that is cropped on the low side and
    # padded on the high side, as the first of these is, and the input gradient of the second.
    conv("cropped before, padded after", (2, 4, 7, 7), (4, 2, 3, 3), (2, 2), [(-1, 2), (-1, 2)], 2),
    conv(
        "padded before by more than the kernel",
        (2, 4, 7, 7),
        (4, 2, 2, 2),
        (1, 1),
        [(3, 0), (3, 0)],
        2,
    ),
    # Groups.
    conv("one group", (2, 3, 6, 5), (4, 3, 3, 3), (1, 1), "SAME"),
    conv("three groups, 6 to 9 features", (2, 6, 5, 5), (9, 2, 3, 3), (1, 1), "SAME", 3),
    conv("four groups, 8 to 4 features", (2, 8, 5, 4), (4, 2, 2, 3), (1, 1), "VALID", 4),
    conv("depthwise", (2, 8, 6, 5), (8, 1, 3, 3), (1, 1), "SAME", 8),
    conv(
        "depthwise, multiplier 2",
        (2, 6, 5, 4),
        (3, 3, 1, 8),
        (2, 1),
        "SAME",
        4,
        NHWC,
        representative=True,
    ),
    conv("depthwise, multiplier 3", (2, 4, 6, 5), (12, 1, 2, 3), (1, 1), "VALID", 4),
    conv(
        "two batch groups",
        (4, 3, 6, 5),
        (6, 3, 3, 2),
        (2, 1),
        [(1, 0), (0, 1)],
        batch_group_count=2,
        representative=True,
    ),
    conv(
        "three batch groups, features last",
        (6, 5, 4, 2),
        (2, 3, 2, 3),
        (1, 1),
        "SAME",
        layout=NHWC,
        rhs_dilation=(2, 1),
        batch_group_count=3,
    ),
    conv(
        "two batch groups, batch between the features",
        (3, 4, 5),
        (3, 2, 4),
        (1,),
        [(1, 1)],
        layout=("CNW", "IWO", "WNC"),
        lhs_dilation=(2,),
        batch_group_count=2,
    ),
    # Kernels.
    conv("kernel 1x1", (2, 4, 3, 4), (6, 2, 1, 1), (1, 1), "VALID", 2),
    conv("kernel 1x1, strided", (2, 4, 5, 4), (2, 2, 1, 1), (2, 3), "SAME", 2),
    conv("kernel 2x4", (2, 4, 5, 6), (4, 2, 2, 4), (1, 1), "SAME", 2),
    conv("kernel as large as the input", (2, 4, 3, 4), (6, 2, 3, 4), (1, 1), "VALID", 2),
    # Nothing to compute.
    conv("kernel larger than the input", (2, 4, 3, 6), (4, 2, 5, 3), (1, 1), "VALID", 2),
    conv(
        "cropped to nothing",
        (2, 4, 4, 3),
        (4, 2, 3, 3),
        (1, 1),
        [(-8, 6), (1, 1)],
        2,
        lhs_dilation=(2, 2),
        representative=True,
    ),
    conv("no examples", (0, 4, 5, 5), (4, 2, 3, 3), (1, 1), "SAME", 2, representative=True),
    conv(
        "no examples, batch groups", (0, 4, 5, 5), (4, 4, 3, 3), (1, 1), "SAME", batch_group_count=2
    ),
    conv("no outputs", (2, 4, 5, 5), (0, 2, 3, 3), (1, 1), "SAME", 2),
    conv("no inputs", (2, 0, 5, 5), (4, 0, 3, 3), (1, 1), "SAME", 2),
    conv("no rows, padded", (2, 4, 0, 5), (4, 2, 3, 3), (1, 1), [(2, 2), (1, 1)], 2),
]

assert len({case.name for case in CASES}) == len(CASES), "names must be unique"


def named(*names: str) -> list[Case]:
    chosen = [case for case in CASES if case.name in names]
    assert len(chosen) == len(names), f"a name of {names} is not a case"
    return chosen


def each_case(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


every_case = each_case(CASES)
representative_cases = each_case([case for case in CASES if case.representative])
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)

# For what does not depend on the implementation (derivatives, batching, partition): by the choice;
# by each of them in the slow tests.
any_implementation = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(name, marks=() if name is None else pytest.mark.slow)
        for name in IMPLEMENTATIONS
    ],
    ids=str,
)
