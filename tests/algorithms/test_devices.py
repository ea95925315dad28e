"""Kinds of devices: what a CPU's kind is made of, and where it is the same."""

import os
import platform
import subprocess
import sys
import types

import jax
import pytest

from grouped_conv_jax import native
from grouped_conv_jax.algorithms import processor
from grouped_conv_jax.algorithms.devices import Device

X86 = "processor\t: {}\nmodel name\t: {}\ncpu family\t: 6\nmodel\t\t: 85\n\n"
ARM = "processor\t: {}\nCPU implementer\t: 0x41\nCPU variant\t: 0x3\nCPU part\t: {}\n\n"


def here() -> Device:
    return Device.of(jax.devices("cpu")[0])


@pytest.fixture
def anew():
    """Reads the name and the cores again, in the test and after it."""
    for cached in (processor.name, processor.cores):
        cached.cache_clear()
    yield
    for cached in (processor.name, processor.cores):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (
            X86.format(0, "AMD EPYC 7B13 64-Core  Processor ") + X86.format(1, "Another 1"),
            "AMD EPYC 7B13 64-Core Processor",
        ),
        (
            X86.format(0, "Intel(R) Xeon(R) CPU @ 2.20GHz"),
            "Intel(R) Xeon(R) CPU @ 2.20GHz (family 6, model 85)",
        ),
        (X86.format(0, "AMD EPYC"), "AMD EPYC (family 6, model 85)"),
        ("model name\t: Nameless\n", "Nameless"),
        (ARM.format(0, "0xd0c") + ARM.format(1, "0xd0c"), "implementer 0x41 part 0xd0c"),
        (
            ARM.format(0, "0xd0b") + ARM.format(1, "0xd05"),
            "implementer 0x41 part 0xd05 and implementer 0x41 part 0xd0b",
        ),
        ("processor\t: 0\ncpu\t\t: POWER9, altivec supported\n", "POWER9, altivec supported"),
        ("processor\t: 0\nisa\t\t: rv64imafdc\n", "the machine"),
        ("", "the machine"),
        (None, "the machine"),
    ],
)
@pytest.mark.usefixtures("anew")
def test_the_processor_on_linux(cpuinfo, name, monkeypatch, tmp_path):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "the machine")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert processor.name() == name


@pytest.mark.usefixtures("anew")
def test_the_processor_on_macos(monkeypatch):
    def run(command, **_):
        assert command[1:] == ["-n", "machdep.cpu.brand_string"]
        return types.SimpleNamespace(stdout="Apple M2\n")

    def refuse(*_, **__):
        raise FileNotFoundError("sysctl")

    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(subprocess, "run", run)
    assert processor.name() == "Apple M2"
    monkeypatch.setattr(subprocess, "run", refuse)
    assert processor.name() == "Apple M2"  # It is asked once.
    processor.name.cache_clear()
    assert processor.name() == "arm64"


@pytest.mark.usefixtures("anew")
def test_the_processor_on_windows(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    monkeypatch.setattr(platform, "processor", lambda: "AMD64 Family 25 Model 1 Stepping 1")
    assert processor.name() == "AMD64 Family 25 Model 1 Stepping 1"


def test_a_cpu_has_its_processor_instructions_and_threads():
    kind = here()
    threads = processor.threads(jax.local_device_count("cpu"))
    instructions = native.instruction_set() or "no native kernels"
    assert kind.platform == "cpu"
    assert kind.kind.startswith(f"{processor.name()}, {instructions}, {threads} thread")
    assert str(kind) == f"{kind.kind} (cpu)"
    assert kind.short == "cpu"
    assert {Device.of(device) for device in jax.devices("cpu")} == {kind}
    assert kind.find().platform == "cpu"
    assert Device("tpu", "TPU v9").short == "TPU v9 (tpu)"
    with pytest.raises(RuntimeError, match="no device of the kind cpu"):
        Device("cpu", "cpu").find()


@pytest.mark.skipif(len(native.instruction_sets()) < 2, reason="there is one instruction set only")
def test_an_instruction_set_that_is_named_is_part_of_the_kind():
    best, *_, plainest = native.instruction_sets()
    kind = here()
    try:
        native.use_instruction_set(plainest)
        assert native.instruction_set() == plainest
        assert here().kind == kind.kind.replace(f", {best},", f", {plainest},")
    finally:
        native.use_instruction_set(best)
    assert here() == kind


def test_without_kernels_the_kind_says_so(monkeypatch):
    monkeypatch.setattr(native, "instruction_sets", lambda: ())
    monkeypatch.setattr(native, "_limit", None)
    assert ", no native kernels, " in here().kind


PROGRAM = """
import jax, pathlib
from grouped_conv_jax.algorithms import processor
from grouped_conv_jax.algorithms.devices import Device

jax.block_until_ready(jax.jit(lambda x: x @ x)(jax.numpy.ones((64, 64))))
tasks = pathlib.Path("/proc/self/task").glob("*/comm")
print(sum("XLAEigen" in task.read_text() for task in tasks))
print(processor.threads(jax.local_device_count()))
print(Device.of(jax.devices()[0]).kind)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the threads are counted in /proc")
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"PJRT_NPROC": "3"}, 3),
        ({"PJRT_NPROC": "many", "NPROC": "1"}, 1),
        ({"PJRT_NPROC": "0"}, 1),
        ({"PJRT_NPROC": "2", "JAX_NUM_CPU_DEVICES": "5"}, 5),
    ],
    ids=str,
)
def test_the_threads_are_those_of_xla(environment, expected):
    ours = ("PJRT_NPROC", "NPROC", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    lines = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**inherited, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    started, threads, kind = int(lines[0]), int(lines[1]), lines[2]
    assert started == threads == (expected or threads)
    assert kind.endswith(f", {threads} thread{'s' * (threads > 1)}")
    assert kind.rpartition(",")[0] == here().kind.rpartition(",")[0]
