"""Grouped convolution for JAX: right under every transformation, in place of lax's own.

`grouped_conv` is the operation; `nnx`, `linen` and `models` (imported when first used, since
they need Flax) are the layers and networks on top of it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from grouped_conv_jax.algorithms import implementations
from grouped_conv_jax.conv import grouped_conv
from grouped_conv_jax.counting import count_multiply_adds
from grouped_conv_jax.explanation import Explanation, explain
from grouped_conv_jax.gradients import grouped_conv_input_grad, grouped_conv_kernel_grad
from grouped_conv_jax.measuring import tune
from grouped_conv_jax.transpose import grouped_conv_transpose
from grouped_conv_jax.tuning import Tuning
from grouped_conv_jax.version import __version__

if TYPE_CHECKING:
    from grouped_conv_jax import linen, models, nnx, towers

__all__ = [
    "Explanation",
    "Tuning",
    "__version__",
    "count_multiply_adds",
    "explain",
    "grouped_conv",
    "grouped_conv_input_grad",
    "grouped_conv_kernel_grad",
    "grouped_conv_transpose",
    "implementations",
    "linen",
    "models",
    "nnx",
    "towers",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in ("linen", "models", "nnx", "towers"):
        return importlib.import_module(f"grouped_conv_jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
