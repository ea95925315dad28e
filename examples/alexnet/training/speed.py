"""How fast a run is: images per second, the share of the devices' FLOP/s, and compilations."""

import dataclasses
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
"""Rows and columns of the matrices that are multiplied to find out what devices can do."""

ROUNDS, ROUND_SECONDS = 3, 0.06
"""How often it is measured, of which the fastest counts, and for about how long."""

COMPILED = "/jax/core/compile/backend_compile_duration"
"""What JAX tells its listeners of each program, whether it is compiled or read from the cache."""

FROM_CACHE = "/jax/compilation_cache/cache_hits"


def peak_flops(devices: Sequence[Any], dtype: Any) -> float:
    """FLOP/s that `devices` reach together in large matrix products of a type, as measured now.

    All devices multiply at once, so that those which share a processor share it here too. In
    float32 an accelerator may round the factors, as the default precision lets it. Takes a
    fraction of a second and a compilation. Of several processes all must call it, with the devices
    of all; they get the same number.
    """
    mesh = Mesh(np.asarray(devices), ("device",))
    size = CPU_SIZE if devices[0].platform == "cpu" else ACCELERATOR_SIZE
    sharding = NamedSharding(mesh, PartitionSpec("device"))

    # Zeros would be multiplied with less power, and so with a higher clock, than real numbers.
    @functools.partial(jax.jit, out_shardings=sharding)
    def factors(key: jax.Array) -> jax.Array:
        matrix = jax.random.normal(key, (size, size), jnp.float32) / math.sqrt(size)
        return jnp.broadcast_to(matrix.astype(dtype), (len(devices), size, size))

    @functools.partial(jax.jit, out_shardings=sharding)
    def multiply(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return jnp.matmul(lhs, rhs)

    # Of all devices, so that no process begins or ends before the others.
    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def end(products: jax.Array) -> jax.Array:
        return jnp.sum(products[:, 0, 0])

    lhs, rhs = (factors(jax.random.key(seed)) for seed in range(2))

    def seconds(products: int) -> float:
        began = time.perf_counter()
        result = lhs
        for _ in range(products):
            result = multiply(result, rhs)
        jax.block_until_ready(end(result))
        return time.perf_counter() - began

    seconds(1)
    products = int(_agreed(max(1, round(ROUND_SECONDS / seconds(1)))))
    fastest = min(seconds(products) for _ in range(ROUNDS))
    return 2.0 * size**3 * len(devices) * products / _agreed(fastest)


def _agreed(number: float) -> float:
    """The number of the first process."""
    return float(multihost_utils.broadcast_one_to_all(np.float32(number)))


def training_multiply_adds(config: AlexNetConfig) -> int:
    """Multiply-adds of a training step for one image: forward, and the gradients.

    Those of the kernels and of every layer's input, but for the image, whose gradient nobody
    needs. Nothing is computed.
    """
    net = nnx.eval_shape(lambda: AlexNet(config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(net)
    size = config.image_size
    images = jax.ShapeDtypeStruct((1, size, size, config.image_channels), jnp.float32)

    def loss(params: Any, images: jax.Array) -> jax.Array:
        return jnp.sum(nnx.merge(graphdef, params)(images))

    return count_multiply_adds(jax.grad(loss), params, images)


class Throughput:
    """Images per second, over the last steps.

    The first step, which is mostly compilation, only starts the clock, and what is done in
    `paused()` does not count. JAX returns before a step is done, so call `step` once its numbers
    are there, or when they are waited for every few steps take a window that is much longer.

    Args:
      devices: that share the work.
      multiply_adds: of one image, as `training_multiply_adds` counts them.
      peak: FLOP/s of all devices, as `peak_flops` measures them, or None if that is not known.
      window: how many steps the speed is of.
      clock: seconds that have passed; another one for a test.

    Example:
      >>> now = iter([10.0, 12.0, 14.0]).__next__
      >>> speed = Throughput(devices=2, multiply_adds=5, peak=500.0, clock=now)
      >>> for _ in range(3):
      ...     speed.step(images=40)
      >>> speed.images_per_second, speed.per_device, speed.utilization
      (20.0, 10.0, 0.4)
    """

    def __init__(
        self,
        *,
        devices: int,
        multiply_adds: int,
        peak: float | None,
        window: int = 50,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._devices = devices
        self._multiply_adds = multiply_adds
        self._peak = peak
        self._clock = clock
        self._paused = 0.0
        self._images = 0
        # When each of the last steps ended, and all images until then.
        self._ends: deque[tuple[float, int]] = deque(maxlen=window + 1)

    def step(self, images: int) -> None:
        """A step on so many images, of all devices together, has ended."""
        self._images += images
        self._ends.append((self._clock() - self._paused, self._images))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While this lasts the clock stands, as for an evaluation."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - began

    @property
    def images_per_second(self) -> float:
        """Of all devices together; 0 until the second step has ended."""
        if len(self._ends) < 2:
            return 0.0
        (began, before), (ended, after) = self._ends[0], self._ends[-1]
        return (after - before) / max(ended - began, 1e-9)

    @property
    def per_device(self) -> float:
        """Images per second, divided by the devices."""
        return self.images_per_second / self._devices

    @property
    def utilization(self) -> float | None:
        """Model FLOP utilisation: the share of `peak` that the net's own arithmetic has."""
        if self._peak is None:
            return None
        # A multiply-add is two operations.
        return 2 * self._multiply_adds * self.images_per_second / self._peak


@dataclasses.dataclass
class Compilations:
    """Programs that JAX has got ready to run, and the seconds that it took."""

    programs: int = 0
    from_cache: int = 0
    seconds: float = 0.0

    @property
    def compiled(self) -> int:
        """Those that were not in the persistent compilation cache, or where there is none."""
        return self.programs - self.from_cache


@contextmanager
def counting_compilations() -> Iterator[Compilations]:
    """Counts, while this lasts, what is compiled and what the persistent cache has.

    In all threads. What jit still has in memory is neither.
    """
    counts = Compilations()

    def on_duration(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED:
            counts.programs += 1
            counts.seconds += duration_secs

    def on_event(event: str, **_: Any) -> None:
        if event == FROM_CACHE:
            counts.from_cache += 1

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    jax.monitoring.register_event_listener(on_event)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)
        jax.monitoring.unregister_event_listener(on_event)
