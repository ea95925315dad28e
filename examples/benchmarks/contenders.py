"""What is measured: one mode of one workload, ready to be called, by this library and by lax."""

import dataclasses
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import lax

from benchmarks.workloads import MADE, USED, Mode, Workload
from grouped_conv_jax import grouped_conv, grouped_conv_transpose
from grouped_conv_jax.spec import Role

SCOPE = re.compile(r"grouped_conv\.(fprop|dgrad|wgrad)\.(\w+)")
"""How the library's contractions are named in a compiled program, with what computes them."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """A program with its operands.

    Attributes:
      start: computes everything once; on a GPU it may return before that is done.
      results: what `call` has returned, as arrays in NHWC and HWIO, in the order of `MADE`; of a
        large batch a few examples.
      wait: returns what `start` has returned when it is there.
      compile_seconds: tracing and compilation; None where there is none.
      temporary_bytes: what it needs at one time beside operands and results, as far as the
        compiler knows; None where there is none.
      implementations: which of the library's computes each contraction.
    """

    start: Callable[[], Any]
    results: Callable[[Any], list[np.ndarray]]
    wait: Callable[[Any], Any] = lambda result: result
    compile_seconds: float | None = None
    temporary_bytes: int | None = None
    implementations: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def call(self, times: int = 1) -> Any:
        """Computes everything so many times, one after the other, and returns when it is there."""
        for _ in range(times - 1):
            self.start()
        return self.wait(self.start())


def some_examples(made: Role, x: Any) -> Any:
    """Eight of the batch, the first and the last among them, or all; of a kernel everything."""
    if made == "rhs" or len(x) <= 8:
        return x
    return x[np.linspace(0, len(x) - 1, 8).astype(int)]


Conv = Callable[[jax.Array, jax.Array, Workload], jax.Array]
"""The convolution of a workload, of an input and a kernel."""


def by_jax(
    conv: Conv,
    workload: Workload,
    mode: Mode,
    operands: Mapping[Role, jax.Array],
) -> Contender:
    """A contender that calls `conv`.

    Raises:
      NotImplementedError: it does not do this.
    """
    arrays = [operands[role] for role in USED[mode]]
    began = time.perf_counter()
    program = jax.jit(function(conv, workload, mode)).lower(*arrays).compile()
    compile_seconds = time.perf_counter() - began
    memory = program.memory_analysis()
    return Contender(
        start=lambda: program(*arrays),
        results=lambda out: [
            np.asarray(some_examples(role, x)).astype(np.float64)
            for role, x in zip(MADE[mode], out, strict=True)
        ],
        wait=jax.block_until_ready,
        compile_seconds=compile_seconds,
        temporary_bytes=memory.temp_size_in_bytes if memory else None,
        implementations=_implementations(program.as_text() or ""),
    )


def ours(implementation: str | None) -> Conv:
    """The library's convolution, by one of its implementations or the one that it chooses."""

    def conv(lhs: jax.Array, rhs: jax.Array, workload: Workload) -> jax.Array:
        arguments = workload.arguments
        if not workload.transposed:
            return grouped_conv(lhs, rhs, **arguments, implementation=implementation)
        del arguments["window_strides"]
        strides = arguments.pop("lhs_dilation")
        return grouped_conv_transpose(lhs, rhs, strides, **arguments, implementation=implementation)

    return conv


def by_lax(lhs: jax.Array, rhs: jax.Array, workload: Workload) -> jax.Array:
    """`lax.conv_transpose` takes no groups; what it is made of does."""
    return lax.conv_general_dilated(lhs, rhs, **workload.arguments)


def function(conv: Conv, workload: Workload, mode: Mode) -> Callable[..., tuple[jax.Array, ...]]:
    """From the arrays that the mode uses to those that it makes, and nothing else computed."""

    def convolve(lhs, rhs):
        return conv(lhs, rhs, workload)

    def like(role: Role, array: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(workload.shape(role), array.dtype)

    def fprop(lhs, rhs):
        return (convolve(lhs, rhs),)

    def dgrad(out, rhs):
        return jax.linear_transpose(lambda lhs: convolve(lhs, rhs), like("lhs", out))(out)

    def wgrad(lhs, out):
        return jax.linear_transpose(lambda rhs: convolve(lhs, rhs), like("rhs", out))(out)

    def training(lhs, rhs, out):
        result, transposed = jax.vjp(convolve, lhs, rhs)
        return result, *transposed(out)

    functions: dict[Mode, Callable[..., tuple[jax.Array, ...]]] = {
        "fprop": fprop,
        "dgrad": dgrad,
        "wgrad": wgrad,
        "training": training,
    }
    return functions[mode]


def _implementations(program: str) -> dict[str, str]:
    """As the names in a compiled program tell, which is what runs and not what should."""
    found: dict[str, set[str]] = {"fprop": set(), "dgrad": set(), "wgrad": set()}
    for contraction, name in SCOPE.findall(program):
        found[contraction].add(name)
    return {contraction: "+".join(sorted(names)) for contraction, names in found.items() if names}
