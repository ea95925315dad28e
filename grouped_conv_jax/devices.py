"""Kinds of devices: what a measurement is valid for."""

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
        """None if a program for this platform is made without one of its devices, for export."""
        module = context.module_context
        backend = None if module.backend is None else module.get_backend(optional=True)
        return None if backend is None else cls(platform, backend.local_devices()[0].device_kind)

    def device(self) -> Any:
        """One of this kind that this process has.

        Raises:
          RuntimeError: it has none.
        """
        backend = None if self.platform == "another platform" else self.platform
        for device in jax.local_devices(backend=backend):
            if device.device_kind == self.kind:
                return device
        raise RuntimeError(f"this process has no {self}")
