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
    """`torch.nn.functional.conv2d` or `conv_transpose2d`, and what autograd would call backward.

    Raises:
      NotImplementedError: it does not do this.
    """
    torch = _torch()
    format_ = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
    lhs, rhs, out = (
        _tensor(_to_torch(operands[role], role, workload), dtype).contiguous(
            memory_format=format_[memory_format]
        )
        for role in ("lhs", "rhs", "out")
    )
    padding = [low for low, _ in workload.padding]
    strides, groups = list(workload.window_strides), workload.feature_group_count

    def forward() -> Any:
        if workload.transposed:
            return torch.nn.functional.conv_transpose2d(lhs, rhs, None, strides, padding, 0, groups)
        return torch.nn.functional.conv2d(lhs, rhs, None, strides, padding, 1, groups)

    def backward(*roles: Role) -> list[Any]:
        wanted = ["lhs" in roles, "rhs" in roles, False]
        gradients = torch.ops.aten.convolution_backward(
            *(out, lhs, rhs, None, strides, padding, [1, 1]),
            *(workload.transposed, [0, 0], groups, wanted),
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
            _from_torch(some_examples(role, tensor).double().cpu().numpy(), role, workload)
            for role, tensor in zip(MADE[mode], tensors, strict=True)
        ],
        wait=_done,
    )


def _to_torch(array: np.ndarray, role: Role, workload: Workload) -> np.ndarray:
    """From NHWC and HWIO; a transposed kernel is turned round, its inputs outermost."""
    if role != "rhs":
        return array.transpose(0, 3, 1, 2)
    if not workload.transposed:
        return array.transpose(3, 2, 0, 1)
    high, wide, inputs, _ = array.shape
    groups = array[::-1, ::-1].reshape(high, wide, inputs, workload.feature_group_count, -1)
    return groups.transpose(3, 2, 4, 0, 1).reshape(-1, groups.shape[-1], high, wide)


def _from_torch(array: np.ndarray, role: Role, workload: Workload) -> np.ndarray:
    if role != "rhs":
        return array.transpose(0, 2, 3, 1)
    if not workload.transposed:
        return array.transpose(2, 3, 1, 0)
    outputs, high, wide = array.shape[1:]
    groups = array.reshape(workload.feature_group_count, -1, outputs, high, wide)
    return groups.transpose(3, 4, 1, 0, 2).reshape(high, wide, groups.shape[1], -1)[::-1, ::-1]


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
