"""Describes this process's CPU: the name of the processor and the threads of XLA's pool."""

import contextlib
import functools
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@functools.cache
def name() -> str:
    """Returns the name of the processor, for example "AMD EPYC 7B13 64-Core Processor".

    Virtual machines may hide the model ("Intel(R) Xeon(R) CPU @ 2.20GHz"). The name then ends with
    the processor's family and model: "Intel(R) Xeon(R) CPU @ 2.20GHz (family 6, model 85)".

    Linux on ARM reports numbers only: "implementer 0x41 part 0xd0c" is Arm's Neoverse N1. A system
    that reports nothing leaves the architecture, for example "aarch64".
    """
    found = None
    if platform.system() == "Linux":
        with contextlib.suppress(OSError):
            found = _in_cpuinfo(CPUINFO.read_text(errors="replace"))
    elif platform.system() == "Darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            found = run.stdout
    else:
        found = platform.processor()
    return " ".join((found or platform.machine() or "unknown processor").split())


def _in_cpuinfo(text: str) -> str | None:
    """Returns the processor's name in the text of /proc/cpuinfo, or None if it has none."""
    processors = [_fields(paragraph) for paragraph in re.split(r"\n\s*\n", text)]
    for fields in processors:
        if model_name := fields.get("model name"):
            clockless = model_name.partition("@")[0]
            if re.search(r"\d", clockless) or not {"cpu family", "model"} <= fields.keys():
                return model_name
            return f"{model_name} (family {fields['cpu family']}, model {fields['model']})"
    # A processor with large and small cores has several kinds.
    kinds = {
        f"implementer {fields['CPU implementer']} part {fields['CPU part']}"
        for fields in processors
        if {"CPU implementer", "CPU part"} <= fields.keys()
    }
    if kinds:
        return " and ".join(sorted(kinds))
    return next((fields["cpu"] for fields in processors if "cpu" in fields), None)  # POWER


def _fields(paragraph: str) -> Mapping[str, str]:
    """Returns the fields of one processor: each line is "name<tab>: value"."""
    lines = (line.partition(":") for line in paragraph.splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def threads(devices: int) -> int:
    """Returns the size of the thread pool of XLA's CPU client, which all its devices share.

    XLA makes a thread for each core that the process may use (its affinity, not the quota of a
    container), or as many as $PJRT_NPROC or $NPROC says, and at least one for each device.

    Args:
      devices: the number of CPU devices of this process.
    """
    return max(cores(), devices)


@functools.cache
def cores() -> int:
    """Returns the number of threads that XLA computes with, unless there are more devices."""
    # The client reads them once, when it starts. What changes later has no effect on its pool.
    for variable in ("PJRT_NPROC", "NPROC"):
        with contextlib.suppress(KeyError, ValueError):
            return max(int(os.environ[variable]), 0)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def caches() -> tuple[int, ...]:
    """Returns the bytes of the data caches that a core sees, the first level first.

    An empty tuple means that the system does not tell. Linux does.
    """
    sizes: dict[int, int] = {}
    for index in CACHES.glob("index*"):
        with contextlib.suppress(OSError, ValueError):
            if (index / "type").read_text().strip() != "Instruction":
                size = (index / "size").read_text().strip()
                sizes[int((index / "level").read_text())] = int(size.removesuffix("K")) << 10
    return tuple(sizes[level] for level in sorted(sizes))
