"""The peer: PyTorch, where it is installed, on the kind of device that JAX has."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from benchmarks.contenders import Contender, some_examples
from benchmarks.workloads import MADE, Mode, Workload
from grouped_conv_jax.spec import Role

FORMATS = ("channels_last", "contiguous")
"""Of the memory of all arrays: NHWC and NCHW."""


def is_installed() -> bool:
    return importlib.util.find_spec("torch") is not None


def missing() -> str | None:
    """Why it cannot be measured here, or None."""
    if not is_installed():
        return "PyTorch is not installed"
    if jax.default_backend() == "cpu" or _on_gpu():
        return None
    return f"this PyTorch cannot use the {jax.default_backend()}"


def use_cores(count: int) -> None:
    """As many threads as there are cores, as XLA has."""
    _torch().set_num_threads(count)
    # On a GPU the fastest algorithm is sought, as XLA does when it compiles.
    _torch().backends.cudnn.benchmark = True


def product(matrix: jax.Array) -> Callable[[], object]:
    """Computes a square matrix of the dtype of `matrix`, times itself."""
    torch = _torch()
    square = _tensor(np.asarray(matrix).astype(np.float64), str(matrix.dtype))
    return lambda: _done(torch.matmul(square, square))


def by_torch(
    memory_format: str,
    workload: Workload,
    mode: Mode,
    operands: Mapping[Role, np.ndarray],
    dtype: str,
) -> Contender:
    """`torch.nn.functional.conv2d`, and the backward function that autograd would call.

    Raises:
      NotImplementedError: it does not do this.
    """
    torch = _torch()
    format_ = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
    lhs, rhs, out = (
        _tensor(operands[role].transpose(_TO_NCHW[role]), dtype).contiguous(
            memory_format=format_[memory_format]
        )
        for role in ("lhs", "rhs", "out")
    )
    padding = [low for low, _ in workload.padding]
    strides, groups = list(workload.window_strides), workload.feature_group_count

    def forward() -> Any:
        return torch.nn.functional.conv2d(lhs, rhs, None, strides, padding, 1, groups)

    def backward(*roles: Role) -> list[Any]:
        wanted = ["lhs" in roles, "rhs" in roles, False]
        gradients = torch.ops.aten.convolution_backward(
            out, lhs, rhs, None, strides, padding, [1, 1], False, [0, 0], groups, wanted
        )
        return [gradient for gradient in gradients if gradient is not None]

    calls: dict[Mode, Callable[[], list[Any]]] = {
        "fprop": lambda: [forward()],
        "dgrad": lambda: backward("lhs"),
        "wgrad": lambda: backward("rhs"),
        "training": lambda: [forward(), *backward("lhs", "rhs")],
    }

    def call() -> Any:
        with torch.inference_mode():
            return calls[mode]()

    try:
        _done(call())
    except RuntimeError as error:
        # Such as a dtype that it has no kernel for.
        raise NotImplementedError(str(error).partition("\n")[0]) from error
    return Contender(
        start=call,
        results=lambda tensors: [
            some_examples(role, tensor).double().cpu().numpy().transpose(np.argsort(_TO_NCHW[role]))
            for role, tensor in zip(MADE[mode], tensors, strict=True)
        ],
        wait=_done,
    )


_TO_NCHW: dict[Role, tuple[int, ...]] = {
    "lhs": (0, 3, 1, 2),
    "rhs": (3, 2, 0, 1),
    "out": (0, 3, 1, 2),
}


def _torch() -> Any:
    """Imported when it is needed, since it need not be there."""
    return importlib.import_module("torch")


def _on_gpu() -> bool:
    return jax.default_backend() == "gpu" and _torch().cuda.is_available()


def _tensor(array: np.ndarray, dtype: str) -> Any:
    torch = _torch()
    device = "cuda" if _on_gpu() else "cpu"
    return torch.from_numpy(np.array(array)).to(device=device, dtype=getattr(torch, dtype))


def _done(result: Any) -> Any:
    """Waits for the device."""
    if _on_gpu():
        _torch().cuda.synchronize()
    return result
