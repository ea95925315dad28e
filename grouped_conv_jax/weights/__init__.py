"""Kernels between the layouts of libraries and between groupings.

`convert_kernel` changes the layout of a kernel. `regroup`, `densify`, `split_groups` and
`merge_groups` change its groups. All take arrays of NumPy and of JAX, and return the same kind.
"""

from grouped_conv_jax.weights.conversion import (
    convert_kernel,
    densify,
    merge_groups,
    regroup,
    split_groups,
)

__all__ = ["convert_kernel", "densify", "merge_groups", "regroup", "split_groups"]


def __dir__() -> list[str]:
    return __all__
