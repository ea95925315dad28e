"""Transposed convolutions that tests run over, and the convolution that each of them is.

The definition is that of lax: a convolution without strides of the input, spread out.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import oracle
from cases import NHWC, Case, each_case

from grouped_conv_jax import grouped_conv_transpose
from grouped_conv_jax.algorithms.table import Implementation

NCHW = ("NCHW", "OIHW", "NCHW")


@dataclasses.dataclass(frozen=True, eq=False)
class Transposed(Case):
    """One call of `grouped_conv_transpose`."""

    @property
    def convolution(self) -> Case:
        """The same, as a convolution of a spread input with the kernel as it meets it."""
        given = dict(self.arguments)
        strides = given.pop("strides")
        more = given.pop("output_padding", None) or (0,) * len(strides)
        given.pop("transpose_kernel", None)
        taps = [self.rhs[d] for d in self._kernel_layout[2:]]
        dilation = given.get("rhs_dilation") or (1,) * len(strides)
        windows = [d * (k - 1) + 1 for k, d in zip(taps, dilation, strict=True)]
        pairs = _pairs(given["padding"], windows, strides)
        given["padding"] = [
            (mode, (low, high + n)) if mode else (low, high + n)
            for (low, high, mode), n in zip(pairs, more, strict=True)
        ]
        arguments = {**given, "window_strides": (1,) * len(strides), "lhs_dilation": strides}
        kernel = self.turned(np.empty(self.rhs)).shape
        return Case(self.name, self.lhs, kernel, arguments)

    @property
    def _kernel_layout(self) -> tuple[int, ...]:
        return oracle.layouts(len(self.rhs) - 2, **self.arguments)["rhs"]

    def turned(self, w: Any) -> Any:
        """The kernel as the convolution has it; with transpose_kernel group by group, end to end
        and inputs for outputs.
        """
        if not self.arguments.get("transpose_kernel"):
            return w
        outputs, inputs, *spatial = self._kernel_layout
        parts = (jnp.split if not isinstance(w, np.ndarray) else np.split)(w, self.groups, outputs)
        swapped = [part.swapaxes(outputs, inputs) for part in parts]
        joined = (jnp if not isinstance(w, np.ndarray) else np).concatenate(swapped, outputs)
        return joined[tuple(slice(None, None, -1 if d in spatial else 1) for d in range(w.ndim))]

    @property
    def out(self) -> tuple[int, ...]:
        return self.convolution.out

    def contractions(self, x: np.ndarray, w: np.ndarray, y: np.ndarray) -> Sequence[np.ndarray]:
        out, dx, dw = self.convolution.contractions(x, self.turned(w), y)
        return out, dx, self.turned(dw)

    @property
    def lengths(self) -> list[float]:
        return self.convolution.lengths

    def conv(self, implementation: Implementation = None, **more: Any) -> Callable[..., Any]:
        return lambda lhs, rhs: grouped_conv_transpose(
            lhs, rhs, **{**self.arguments, **more}, implementation=implementation
        )

    def lax_conv(self, **more: Any) -> Callable[..., Any]:
        conv = self.convolution.lax_conv(**more)
        return lambda lhs, rhs: conv(lhs, self.turned(rhs))


def _pairs(
    padding: Any, windows: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int, str | None]]:
    """(low, high, mode) of each spatial dimension, of the spread input."""
    entries = [padding] * len(windows) if isinstance(padding, str) else padding
    found = []
    for entry, window, stride in zip(entries, windows, strides, strict=True):
        name, amounts = (entry, None) if isinstance(entry, str) else entry
        if not isinstance(name, str):
            found.append((name, amounts, None))
            continue
        total = window - 1 + stride - 1
        same = window - 1 if stride >= window else (total + 1) // 2
        low, high = {
            "VALID": (window - 1, max(window, stride) - 1),
            "CAUSAL": (window - 1, stride - 1),
        }.get(name.upper(), (same, total - same))
        mode = name.upper() if name.upper() in ("CIRCULAR", "REFLECT", "REPLICATE") else None
        found.append((*(amounts or (low, high)), mode))
    return found


def conv(
    name: str,
    lhs: tuple[int, ...],
    rhs: tuple[int, ...],
    strides: Any,
    padding: Any,
    feature_group_count: int = 1,
    layout: Any = None,
    representative: bool = False,
    **more: Any,
) -> Transposed:
    """Returns a case from the arguments of a transposed convolution."""
    arguments = {"strides": strides, "padding": padding, **more}
    if feature_group_count != 1:
        arguments["feature_group_count"] = feature_group_count
    if layout is not None:
        arguments["dimension_numbers"] = layout
    return Transposed(name, lhs, rhs, arguments, representative)


TRANSPOSED: list[Case] = [
    conv("rank 0", (5, 4), (6, 2), (), (), 2, ("NC", "OI", "NC")),
    conv(
        "rank 1, SAME",
        (2, 5, 6),
        (3, 2, 9),
        (2,),
        "SAME",
        3,
        ("NWC", "WIO", "NWC"),
        representative=True,
    ),
    conv("NHWC, VALID", (2, 4, 3, 4), (3, 2, 2, 6), (2, 1), "VALID", 2, NHWC, representative=True),
    conv(
        "as PyTorch has it",
        (2, 4, 4, 3),
        (4, 3, 3, 2),
        (3, 2),
        [(1, 1), (1, 1)],
        2,
        NCHW,
        rhs_dilation=(1, 2),
        transpose_kernel=True,
        output_padding=(2, 1),
        representative=True,
    ),
    conv(
        "transposed kernel, NHWC, three groups",
        (2, 3, 4, 6),
        (2, 3, 2, 6),
        (1, 2),
        "SAME",
        3,
        NHWC,
        transpose_kernel=True,
    ),
    conv(
        "rank 3, cropped, in another layout",
        (4, 2, 3, 2, 4),
        (2, 6, 1, 2, 3),
        (2, 1, 3),
        [(2, -1), (0, 1), (-2, 3)],
        2,
        ("CNDHW", "IODHW", "NDHWC"),
        rhs_dilation=(1, 2, 1),
    ),
    conv("stride larger than the kernel", (2, 3, 4, 4), (1, 2, 2, 4), (3, 3), "SAME", 2, NHWC),
    conv("depthwise", (2, 4, 3, 8), (3, 3, 1, 8), (2, 2), "SAME", 8, NHWC, representative=True),
    conv("one group", (2, 4, 3, 3), (3, 2, 3, 4), (2, 1), [(2, 3), (0, 1)], layout=NHWC),
    conv(
        "circular and reflected",
        (2, 4, 3, 4),
        (3, 4, 2, 6),
        (2, 1),
        ["CIRCULAR", ("REFLECT", (2, 3))],
        2,
        NHWC,
    ),
    conv(
        "replicated and cropped, with a transposed kernel",
        (2, 4, 3, 4),
        (4, 3, 3, 2),
        (3, 2),
        [("REPLICATE", (4, -1)), ("CIRCULAR", (1, 5))],
        2,
        NCHW,
        transpose_kernel=True,
        output_padding=(0, 1),
    ),
    conv(
        "causal", (2, 5, 4), (3, 2, 6), (2,), "CAUSAL", 2, ("NWC", "WIO", "NWC"), rhs_dilation=(2,)
    ),
    conv("no rows, padded", (2, 0, 3, 4), (3, 2, 2, 6), (2, 1), [(3, 2), (0, 1)], 2, NHWC),
    conv("no examples", (0, 3, 3, 4), (3, 2, 2, 6), (2, 1), "SAME", 2, NHWC),
    conv("no inputs", (2, 3, 3, 0), (3, 2, 0, 6), (2, 1), "SAME", 2, NHWC),
    conv("no outputs", (2, 3, 3, 4), (3, 2, 2, 0), (2, 1), "SAME", 2, NHWC),
]
every_transposed = each_case(TRANSPOSED)
representative_transposed = each_case([case for case in TRANSPOSED if case.representative])
