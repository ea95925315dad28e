"""Grouped convolution for JAX: right under every transformation, in place of lax's own.

`grouped_conv` is the operation, and what begins with its name are its relatives; `nnx`, `linen` and
`models` (imported when first used, since they need Flax) are the layers and networks on top of it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from grouped_conv_jax import weights
from grouped_conv_jax.algorithms import implementations
from grouped_conv_jax.counting import (
    count_bytes,
    count_flops,
    count_multiply_adds,
    count_parameters,
)
from grouped_conv_jax.operations.conv import grouped_conv
from grouped_conv_jax.operations.gradients import grouped_conv_input_grad, grouped_conv_kernel_grad
from grouped_conv_jax.operations.local import grouped_conv_local
from grouped_conv_jax.operations.mixed import grouped_conv_mixed
from grouped_conv_jax.operations.patches import grouped_conv_patches
from grouped_conv_jax.operations.shuffle import channel_shuffle
from grouped_conv_jax.operations.streaming import streaming_conv, streaming_conv_state
from grouped_conv_jax.operations.transpose import grouped_conv_transpose
from grouped_conv_jax.rules import convs_saveable
from grouped_conv_jax.tuning.context import Tuning
from grouped_conv_jax.tuning.explanation import Explanation, explain
from grouped_conv_jax.tuning.tuner import tune
from grouped_conv_jax.version import __version__

if TYPE_CHECKING:
    from grouped_conv_jax import linen as linen
    from grouped_conv_jax import models, towers
    from grouped_conv_jax import nnx as nnx

# Not linen and nnx, which are Flax's own names as well: `import *` is not to replace them.

__all__ = [
    "Explanation",
    "Tuning",
    "__version__",
    "channel_shuffle",
    "convs_saveable",
    "count_bytes",
    "count_flops",
    "count_multiply_adds",
    "count_parameters",
    "explain",
    "grouped_conv",
    "grouped_conv_input_grad",
    "grouped_conv_kernel_grad",
    "grouped_conv_local",
    "grouped_conv_mixed",
    "grouped_conv_patches",
    "grouped_conv_transpose",
    "implementations",
    "models",
    "streaming_conv",
    "streaming_conv_state",
    "towers",
    "tune",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name in ("linen", "models", "nnx", "towers"):
        return importlib.import_module(f"grouped_conv_jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "linen", "nnx"])
