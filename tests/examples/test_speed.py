"""The measures of speed: what is counted exactly, by clocks that the test turns."""

import dataclasses
import doctest
import itertools
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from alexnet.reports import speed
from alexnet.reports.speed import (
    Throughput,
    peak_flops,
    training_multiply_adds,
)
from grouped_conv_jax.models import AlexNetConfig

# Multiply-adds of each layer for one image, forward, by hand.
SMALL = {
    "conv1": 32 * 32 * 32 * 5 * 5 * 3,
    "conv2": 15 * 15 * 64 * 5 * 5 * 16,
    "conv3": 7 * 7 * 96 * 3 * 3 * 64,
    "conv4": 7 * 7 * 96 * 3 * 3 * 48,
    "conv5": 7 * 7 * 64 * 3 * 3 * 48,
    "fc6": 3 * 3 * 64 * 256,
    "fc7": 256 * 256,
    "fc8": 256 * 10,
}


@pytest.mark.parametrize(("towers", "forward"), [(2, 724_406_816), (1, 1_135_256_096)])
def test_multiply_adds_of_a_step_of_the_paper(towers, forward):
    # Nobody needs the gradient of the image, which is what conv1 sees.
    conv1 = 105_415_200
    assert training_multiply_adds(AlexNetConfig.paper(towers=towers)) == 3 * forward - conv1


def test_multiply_adds_of_a_step_of_the_small_net():
    config = AlexNetConfig.small()
    assert training_multiply_adds(config) == 3 * sum(SMALL.values()) - SMALL["conv1"]
    without = {**SMALL, "conv1": SMALL["conv1"] // 3}
    grey = dataclasses.replace(config, image_channels=1)
    assert training_multiply_adds(grey) == 3 * sum(without.values()) - without["conv1"]


class Clock:
    """Stands still until it is turned."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def throughput(clock: Clock, **options) -> Throughput:
    options = {"devices": 4, "multiply_adds": 1000, "peak": 1e6, **options}
    return Throughput(clock=clock, **options)


def test_the_first_step_only_starts_the_clock():
    clock = Clock()
    running = throughput(clock)
    assert running.images_per_second == running.utilization == 0
    assert running.numbers() == {}
    clock.now += 60
    running.step(32)
    assert running.images_per_second == 0
    for _ in range(3):
        clock.now += 0.5
        running.step(32)
    assert running.images_per_second == 64
    assert running.numbers()["images_per_second_per_device"] == 16
    assert running.utilization == 2 * 1000 * 64 / 1e6


def test_a_pause_does_not_count():
    clock = Clock()
    running = throughput(clock)
    running.step(8)
    with running.paused():
        clock.now += 1000
    # Reading the speed meanwhile does not change it.
    clock.now += 1
    running.step(8)

    def fail() -> None:
        with running.paused():
            clock.now += 1000
            raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        fail()
    clock.now += 1
    running.step(8)
    assert running.images_per_second == 8


def test_the_example_in_the_docstring():
    tried = doctest.testmod(speed)
    assert tried.attempted > 0
    assert tried.failed == 0


def ticking() -> SimpleNamespace:
    """Whenever it is looked at, another second has passed."""
    return SimpleNamespace(perf_counter=itertools.count(0.0, 1.0).__next__)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("devices", [1, 4])
def test_the_peak_counts_what_all_devices_multiply(monkeypatch, devices, dtype):
    # All products of a round take a second by this clock.
    monkeypatch.setattr(speed, "CPU_SIZE", 16)
    monkeypatch.setattr(speed, "time", ticking())
    assert peak_flops(jax.devices()[:devices], dtype) == speed.PRODUCTS * devices * 2 * 16**3


def test_the_peak_is_of_the_order_of_a_plain_product():
    peak = peak_flops(jax.devices()[:2], jnp.float32)
    size = 512
    matrix = jnp.ones((size, size))
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(matrix, matrix))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(multiply(matrix, matrix))
        times.append(time.perf_counter() - began)
    plain = 2 * size**3 / min(times)
    # A busy machine may be several times slower in the one or the other: only the order counts.
    assert plain / 30 < peak < 30 * plain


PROCESS = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from alexnet.reports import speed
speed.CPU_SIZE = 128
print("peak", len(jax.devices()), speed.peak_flops(jax.devices(), "float32"))
"""


@pytest.mark.slow
def test_processes_agree_on_their_peak():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    examples = str(Path(speed.__file__).parents[2])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(number)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([examples, *sys.path])},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    first, second = ([x for x in out.splitlines() if x.startswith("peak")] for out in said)
    assert first == second
    assert first[0].split()[:2] == ["peak", "4"]
