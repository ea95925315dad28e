"""The speed of a run: images per second, and the share of the devices' FLOP/s."""

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grouped_conv_jax import count_multiply_adds
from grouped_conv_jax.models import AlexNet, AlexNetConfig

CPU_SIZE, ACCELERATOR_SIZE = 1024, 8192
"""Rows and columns of the matrices whose product measures the devices' speed."""

PRODUCTS, ROUNDS = 8, 3
"""Products that are measured at a time, and how often. The fastest round counts."""

WINDOW = 50
"""Steps over which the speed is averaged."""


def peak_flops(devices: Sequence[Any], dtype: Any) -> float:
    """Returns the FLOP/s that all devices together reach in large matrix products of a type.

    All devices multiply at once, since some may share a processor. In float32 an accelerator may
    round the factors, as the default precision lets it. All processes get the same number.
    """
    mesh = Mesh(np.asarray(devices), ("device",))
    size = CPU_SIZE if devices[0].platform == "cpu" else ACCELERATOR_SIZE
    sharding = NamedSharding(mesh, PartitionSpec("device"))

    # Zeros would be multiplied with less power, and so with a higher clock, than real numbers.
    @functools.partial(jax.jit, out_shardings=sharding)
    def factors(key: jax.Array) -> jax.Array:
        matrix = jax.random.normal(key, (size, size), jnp.float32) / math.sqrt(size)
        return jnp.broadcast_to(matrix.astype(dtype), (len(devices), size, size))

    multiply = jax.jit(jnp.matmul, out_shardings=sharding)
    # The sum over all devices lets no process begin or end before the others.
    end = jax.jit(lambda x: jnp.sum(x[:, 0, 0]), out_shardings=NamedSharding(mesh, PartitionSpec()))
    lhs, rhs = (factors(jax.random.key(seed)) for seed in range(2))

    def seconds() -> float:
        began = time.perf_counter()
        result = lhs
        for _ in range(PRODUCTS):
            result = multiply(result, rhs)
        jax.block_until_ready(end(result))
        return time.perf_counter() - began

    seconds()
    fastest = multihost_utils.broadcast_one_to_all(
        np.float32(min(seconds() for _ in range(ROUNDS)))
    )
    return 2.0 * size**3 * len(devices) * PRODUCTS / float(fastest)


def training_multiply_adds(config: AlexNetConfig) -> int:
    """Returns the multiply-adds of a training step for one image: forward and gradients.

    The gradient of the image, which nobody needs, is left out. Nothing is computed.
    """
    net = nnx.eval_shape(lambda: AlexNet(config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(net)
    size = config.image_size
    images = jax.ShapeDtypeStruct((1, size, size, config.image_channels), jnp.float32)

    def loss(params: Any, images: jax.Array) -> jax.Array:
        return jnp.sum(nnx.merge(graphdef, params)(images))

    return count_multiply_adds(jax.grad(loss), params, images)


class Throughput:
    """Images per second, over the last steps, of some devices with a `peak` of FLOP/s.

    The first step, which is mostly compilation, only starts the clock, and the time in `paused()`
    does not count. JAX returns before a step is done, so `step` is called once its numbers are
    there. `multiply_adds` are those of one image.

    Example:
      >>> now = iter([10.0, 12.0, 14.0]).__next__
      >>> speed = Throughput(devices=2, multiply_adds=5, peak=500.0, clock=now)
      >>> for _ in range(3):
      ...     speed.step(images=40)
      >>> speed.images_per_second, str(speed)
      (20.0, '20 images/s  40% of peak')
    """

    def __init__(
        self,
        *,
        devices: int,
        multiply_adds: int,
        peak: float,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._devices = devices
        self._multiply_adds = multiply_adds
        self._peak = peak
        self._clock = clock
        self._paused = 0.0
        self._images = 0
        # The end of each of the last steps, and all images until then.
        self._ends: deque[tuple[float, int]] = deque(maxlen=WINDOW + 1)

    def step(self, images: int) -> None:
        """Counts a step on so many images, of all devices together, that has ended."""
        self._images += images
        self._ends.append((self._clock() - self._paused, self._images))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock, as for an evaluation."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - began

    @property
    def images_per_second(self) -> float:
        """Images per second of all devices together; 0 until the second step has ended."""
        if len(self._ends) < 2:
            return 0.0
        (began, before), (ended, after) = self._ends[0], self._ends[-1]
        return (after - before) / max(ended - began, 1e-9)

    @property
    def utilization(self) -> float:
        """Model FLOP utilisation: the share of `peak` that the net's own arithmetic has."""
        # A multiply-add is two operations.
        return 2 * self._multiply_adds * self.images_per_second / self._peak

    def numbers(self) -> dict[str, float]:
        """Returns the numbers to log; none until there are two steps to measure between."""
        if not (speed := self.images_per_second):
            return {}
        return {
            "images_per_second": round(speed, 2),
            "images_per_second_per_device": round(speed / self._devices, 2),
            "model_flop_utilization": round(self.utilization, 4),
        }

    def __str__(self) -> str:
        speed = self.images_per_second
        return f"{speed:.0f} images/s  {self.utilization:.0%} of peak" if speed else ""
