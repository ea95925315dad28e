"""What it was measured on: device, versions, and the most that the machine does."""

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import grouped_conv_jax
from benchmarks import pytorch
from benchmarks.measure import interleaved
from grouped_conv_jax.algorithms import processor

SIZES = {"cpu": (2048, 2**27), "accelerator": (8192, 2**28)}
"""Rows of the matrices that are multiplied, and elements of the array that is written."""


def environment() -> dict[str, Any]:
    """The device and the versions of what is measured."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "cpu": processor.name(),
        "cores": cores(),
        "xla_flags": os.environ.get("XLA_FLAGS"),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "grouped_conv_jax": grouped_conv_jax.__version__,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "torch": importlib.metadata.version("torch") if pytorch.is_installed() else None,
    }


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Roofline(NamedTuple):
    """The most that the machine was seen to do."""

    flops_per_second: float
    bytes_per_second: float

    def seconds(self, flops: int, nbytes: int) -> float:
        """The least time for a computation: that of its arithmetic or that of its memory."""
        return max(flops / self.flops_per_second, nbytes / self.bytes_per_second)


def roofline(dtype: str) -> Roofline:
    """Measured: a large matrix product in `dtype`, and a large array written over itself.

    The product is the faster one of JAX's and PyTorch's (jax 0.10 multiplies bfloat16 on a CPU as
    float32). The bytes are those read and those written; in place, since a new array would cost a
    CPU the time of getting its pages, and of reading what is to be overwritten.
    """
    size, length = SIZES["cpu" if jax.default_backend() == "cpu" else "accelerator"]
    matrix = jax.random.uniform(jax.random.key(0), (size, size), "float32", minval=-1)
    matrix = matrix.astype(dtype)
    product = jax.jit(jnp.matmul)
    negative = jax.jit(jnp.negative, donate_argnums=0)
    array = jnp.ones(length, "float32")

    def overwrite() -> None:
        nonlocal array
        array = jax.block_until_ready(negative(array))

    calls: dict[str, Callable[[], object]] = {
        "overwrite": overwrite,
        "jax": lambda: jax.block_until_ready(product(matrix, matrix)),
    }
    if pytorch.missing() is None:
        calls["torch"] = pytorch.product(matrix)
    times = interleaved(calls, turns=5, calls=3, budget=1.0)
    overwritten, *products = (min(seconds) for seconds in times.values())
    return Roofline(2 * size**3 / min(products), 2 * array.nbytes / overwritten)
