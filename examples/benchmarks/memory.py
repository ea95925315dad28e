"""Temporary memory of single contractions, by this library and by lax, in all dtypes."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.contenders import SCOPE
from benchmarks.workloads import MADE, USED, WORKLOADS
from grouped_conv_jax import grouped_conv, grouped_conv_input_grad, grouped_conv_kernel_grad
from grouped_conv_jax.spec import Contraction, Role

CONTRACTIONS: tuple[Contraction, ...] = ("fprop", "dgrad", "wgrad")

DTYPES: dict[str, str | None] = {
    "float32": None,
    "float64": None,
    "bfloat16": None,
    "float16": None,
    "float8_e4m3fn": None,
    "float8_e5m2": None,
    "complex64": None,
    "complex128": None,
    "int32": None,
    "int8": "int32",
}
"""The dtypes of the operands, and those of the results (`preferred_element_type`)."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A convolution of any rank and layout: shapes, and the arguments of `grouped_conv`."""

    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, lhs: tuple[int, ...], outputs: int, taps: int, groups: int, **more: Any) -> "Call":
        """Of an input (N, *S, C), or (N, C, *S) if `dimension_numbers` is None."""
        rank = len(lhs) - 2
        letters = "DHW"[3 - rank :]
        layout = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
        layout = more.pop("dimension_numbers", layout)
        inputs = lhs[1 if layout is None else -1] // groups
        rhs = (*[taps] * rank, inputs, outputs)
        return cls(
            lhs,
            (outputs, inputs, *rhs[:rank]) if layout is None else rhs,
            {
                "window_strides": (more.pop("stride", 1),) * rank,
                "padding": [(taps // 2, taps // 2)] * rank,
                "dimension_numbers": layout,
                "feature_group_count": groups,
                **more,
            },
        )


CALLS: dict[str, Call] = {
    name: Call(workload.lhs, workload.rhs, workload.arguments)
    for name, workload in WORKLOADS.items()
} | {
    "depthwise_x4": Call.of((8, 28, 28, 64), 256, 3, 64),
    "depthwise_x4_stride2": Call.of((8, 28, 28, 64), 256, 3, 64, stride=2),
    "dilated": Call.of((8, 28, 28, 128), 128, 3, 2, rhs_dilation=(2, 2)),
    "channels_first": Call.of((8, 128, 28, 28), 128, 3, 2, dimension_numbers=None),
    "sequence": Call.of((8, 1024, 128), 128, 3, 2),
    "sequence_depthwise": Call.of((8, 1024, 64), 64, 31, 64),
    "volume": Call.of((4, 14, 14, 14, 64), 64, 3, 2),
    "volume_depthwise": Call.of((4, 14, 14, 14, 64), 64, 3, 64),
}
"""The benchmark's convolutions, and others of all kinds."""


@dataclasses.dataclass(frozen=True)
class Need:
    """The bytes of one contraction: its operands and results, and what is stored beside them."""

    call: str
    dtype: str
    contraction: Contraction
    arrays: int
    ours: int
    lax: int
    implementation: str


def need(name: str, dtype: str, contraction: Contraction) -> Need:
    """Compiles a contraction, by this library's own choice and by lax, for the default device."""
    call = CALLS[name]
    with jax.enable_x64(True):
        arrays = _arrays(call, dtype)
        operands = [arrays[role] for role in USED[contraction]]
        ours = jax.jit(_ours(call, dtype)[contraction]).lower(*operands).compile()
        theirs = jax.jit(_lax(call, dtype)[contraction]).lower(*operands).compile()
    chosen = {found for _, found in SCOPE.findall(ours.as_text() or "")}
    results = [arrays[role] for role in MADE[contraction]]
    return Need(
        call=name,
        dtype=dtype,
        contraction=contraction,
        arrays=sum(math.prod(a.shape) * a.dtype.itemsize for a in (*operands, *results)),
        ours=temporary_bytes(ours),
        lax=temporary_bytes(theirs),
        implementation="+".join(sorted(chosen)),
    )


def temporary_bytes(compiled: Any) -> int:
    """Returns the size of what XLA allocates for a program beside operands and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def _arrays(call: Call, dtype: str) -> dict[Role, jax.ShapeDtypeStruct]:
    lhs, rhs = (jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in (call.lhs, call.rhs))
    out = jax.eval_shape(_ours(call, dtype)["fprop"], lhs, rhs)
    return {"lhs": lhs, "rhs": rhs, "out": jax.ShapeDtypeStruct(out.shape, out.dtype)}


def _ours(call: Call, dtype: str, **more: Any) -> dict[Contraction, Callable]:
    arguments = {**call.arguments, "preferred_element_type": DTYPES[dtype], **more}
    return {
        "fprop": lambda lhs, rhs: grouped_conv(lhs, rhs, **arguments),
        "dgrad": lambda out, rhs: grouped_conv_input_grad(call.lhs, rhs, out, **arguments),
        "wgrad": lambda lhs, out: grouped_conv_kernel_grad(lhs, call.rhs, out, **arguments),
    }


def _lax(call: Call, dtype: str) -> dict[Contraction, Callable]:
    """The convolution and its transposes by lax. It has no gradients of integers: theirs are the
    convolutions that its rules would make, `implementation="lax"`.
    """
    preferred = DTYPES[dtype]

    def conv(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            lhs, rhs, **call.arguments, preferred_element_type=preferred and jnp.dtype(preferred)
        )

    if np.issubdtype(jnp.dtype(dtype), np.integer):
        return {**_ours(call, dtype, implementation="lax"), "fprop": conv}
    return {
        "fprop": conv,
        "dgrad": lambda out, rhs: _transposed(lambda x: conv(x, rhs), call.lhs, dtype)(out)[0],
        "wgrad": lambda lhs, out: _transposed(lambda w: conv(lhs, w), call.rhs, dtype)(out)[0],
    }


def _transposed(function: Callable, shape: Sequence[int], dtype: str) -> Callable:
    return jax.linear_transpose(function, jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))
