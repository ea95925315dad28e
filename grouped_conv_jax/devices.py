"""Kinds of devices: what a measurement is valid for."""

import contextlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jax.interpreters import mlir


class DeviceKind(NamedTuple):
    """A platform, as implementations are told of it, and JAX's name of the model."""

    platform: str
    kind: str

    def __str__(self) -> str:
        return self.kind if self.kind == self.platform else f"{self.kind} ({self.platform})"

    @classmethod
    def of(cls, device: Any) -> "DeviceKind":
        platform = device.platform
        if platform == "gpu":
            version = device.client.platform_version.lower()
            platform = "rocm" if "rocm" in version else "cuda"
        known = platform in ("cpu", "cuda", "rocm", "tpu")
        return cls(platform if known else "another platform", device.device_kind)

    @classmethod
    def lowered_for(cls, platform: str, context: mlir.LoweringRuleContext) -> "DeviceKind | None":
        """Returns the kind of the devices that a program is lowered for.

        It is None if it is lowered for a platform and not for devices, as `jax.export` does. The
        devices may be those of a topology, which this process does not have.
        """
        module = context.module_context
        backend = None if module.backend is None else module.get_backend(optional=True)
        if backend is None:
            return None
        devices = getattr(module.axis_context, "device_assignment", None)
        devices = devices or backend.local_devices() or backend.devices()
        check_one_platform(devices)
        return cls(platform, devices[0].device_kind) if devices else None

    def device(self) -> Any:
        """Returns a device of this kind that this process has.

        Raises:
          RuntimeError: it has none.
        """
        backend = None if self.platform == "another platform" else self.platform
        with contextlib.suppress(RuntimeError):  # JAX has no such backend here.
            for device in jax.local_devices(backend=backend):
                if device.device_kind == self.kind:
                    return device
        raise RuntimeError(f"this process has no device of the kind {self}")


def check_one_platform(devices: Iterable[Any]) -> None:
    """Raises ValueError unless all devices are of one platform."""
    platforms = sorted({device.platform for device in devices})
    if len(platforms) > 1:
        raise ValueError(
            f"a mesh must have devices of one platform, got those of {' and '.join(platforms)}"
        )
