"""Kinds of devices: what a measurement is valid for."""

import contextlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from grouped_conv_jax import native
from grouped_conv_jax.algorithms import processor
from grouped_conv_jax.jax_compat import Lowering


class Device(NamedTuple):
    """The model of a device. Measurements are valid for one kind of device.

    JAX calls every CPU "cpu". A CPU's kind is therefore made of the processor's name, the
    instruction set of the native kernels, and the size of XLA's thread pool, for example
    "AMD EPYC 7B13 64-Core Processor, avx2, 2 threads".

    Attributes:
      platform: the platform by which implementations are chosen, for example "cpu" or "cuda".
      kind: JAX's name of the model, for example "NVIDIA H100 80GB HBM3", or what a CPU has instead.
    """

    platform: str
    kind: str = ""

    def __str__(self) -> str:
        return self.kind if self.kind == self.platform else f"{self.kind} ({self.platform})"

    @property
    def short(self) -> str:
        """A shorter name of the kind, which is "cpu" for all CPUs."""
        return self.platform if self.platform == "cpu" else str(self)

    @classmethod
    def of(cls, device: Any) -> "Device":
        platform = device.platform
        if platform == "gpu":
            version = device.client.platform_version.lower()
            platform = "rocm" if "rocm" in version else "cuda"
        known = platform in ("cpu", "cuda", "rocm", "tpu")
        return cls(platform if known else "another platform", _kind(device))

    @classmethod
    def lowered_for(cls, lowering: Lowering) -> "Device":
        """Returns the device that a program is lowered for.

        Its kind is not known if the program is lowered for several platforms, or for one that this
        process does not use. `jax.export` may do so. A program that is exported for the platform of
        this process is lowered for its devices: on a CPU, for this processor.

        The devices may be those of a topology, which this process does not have. CPU devices of
        other processes are taken to have the same processor as those of this process.
        """
        devices = lowering.devices_of_process()
        check_one_platform(devices)
        return cls(lowering.platform, _kind(devices[0]) if devices else "")

    @property
    def is_known(self) -> bool:
        """Whether the kind is known."""
        return bool(self.kind)

    @property
    def instruction_set(self) -> str | None:
        """The instruction set of the native kernels on a CPU, for example "avx2"."""
        return native.instruction_set() if self.platform == "cpu" else None

    @property
    def cores(self) -> int | None:
        """The cores of a CPU that XLA computes on."""
        return processor.cores() if self.platform == "cpu" else None

    @property
    def caches(self) -> tuple[int, ...] | None:
        """The bytes of a CPU's data caches that one core sees, the first level first."""
        return processor.caches() if self.platform == "cpu" else None

    def find(self) -> Any:
        """Returns a device of this kind that this process has.

        Raises:
          RuntimeError: it has none.
        """
        backend = None if self.platform == "another platform" else self.platform
        with contextlib.suppress(RuntimeError):  # JAX has no such backend here.
            for device in jax.local_devices(backend=backend):
                if _kind(device) == self.kind:
                    return device
        raise RuntimeError(f"this process has no device of the kind {self}")


def _kind(device: Any) -> str:
    """Returns the name of a device's model, which on a CPU is that of its processor and more."""
    if device.platform != "cpu":
        return device.device_kind
    instructions = native.instruction_set() or "no native kernels"
    threads = processor.threads(device.client.local_device_count())
    return f"{processor.name()}, {instructions}, {threads} thread{'s' * (threads > 1)}"


def check_one_platform(devices: Iterable[Any]) -> None:
    """Raises ValueError unless all devices are of one platform."""
    platforms = sorted({device.platform for device in devices})
    if len(platforms) > 1:
        raise ValueError(
            f"a mesh must have devices of one platform, got those of {' and '.join(platforms)}"
        )
