"""Kernels of other libraries, in other layouts and in other groupings, converted without loss.

Nothing is computed, values are only moved, and zeros put between them. A kernel is a NumPy array,
and then so is the result (a checkpoint is converted without a device), or a jax array, traced or
not, of any dtype and any number of spatial dimensions.

Layouts are strings ("HWIO", "torch", "transposed OIHW"), which `layouts` explains.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grouped_conv_jax.operations import arguments
from grouped_conv_jax.partitioning.explicit_mesh import with_auto_axes
from grouped_conv_jax.weights.layouts import KernelLayout, parsed_layout, spatial_letters


def convert_kernel(
    kernel: Any, source: str, target: str, feature_group_count: int | None = None
) -> Any:
    r"""The same kernel in another layout: the layer computes with it what it did.

    With G groups of C inputs and O outputs, a kernel k of a transposed layer is, laid out as
    "GOIHW" and as "transposed GOIHW",

    .. math::
        k[g, o, c, i, j] = k_T[g, c, o, H - 1 - i, W - 1 - j]

    Args:
      kernel: NumPy or jax array, in the layout `source`.
      source: the layout that it has: letters ("HWIO", "GOIHW", "transposed OI...") or a name
        ("torch", "keras_depthwise"), as `grouped_conv_jax.weights.layouts` explains them.
      target: the layout to convert to, with the same spatial letters.
      feature_group_count: G. May be left out if `source` has an axis G, or if the axes are only
        put into another order.

    Returns:
      The kernel in the layout `target`, of the same dtype.

    Raises:
      ValueError, TypeError: a layout is none, or is not that of this kernel; the groups are not
        told, or do not divide it; a group has more inputs than a depthwise `target` has room for.

    Example:
      A PyTorch weight, its depthwise one for Keras, and its transposed one (Cin, Cout / G, 3, 3).

      >>> import numpy as np
      >>> from grouped_conv_jax.weights import convert_kernel
      >>> convert_kernel(np.ones((8, 2, 3, 3)), "torch", "HWIO").shape
      (3, 3, 2, 8)
      >>> convert_kernel(np.ones((8, 1, 3, 3)), "torch", "keras_depthwise", 4).shape
      (3, 3, 4, 2)
      >>> convert_kernel(np.ones((8, 2, 3, 3)), "torch_transposed", "HWIO", 4).shape
      (3, 3, 2, 8)
    """
    xp, kernel = _array("kernel", kernel)
    given, wanted = parsed_layout("source", source), parsed_layout("target", target)
    spatial = spatial_letters(given, wanted, kernel.ndim)
    if feature_group_count is None:
        needs_groups = "G" in wanted.letters or given.is_transposed != wanted.is_transposed
        if needs_groups and "G" not in given.letters:
            raise ValueError(
                f"feature_group_count must be given to convert from source={source!r} to "
                f"target={target!r}, since source has no axis G that tells it"
            )
    grouped = _to_groups(xp, kernel, given, spatial, feature_group_count)
    if given.is_transposed != wanted.is_transposed:
        grouped = xp.flip(xp.swapaxes(grouped, 1, 2), tuple(range(3, grouped.ndim)))
    return _from_groups(xp, grouped, wanted, spatial)


def regroup(
    kernel: Any, feature_group_count: int, target_group_count: int, layout: str = "...IO"
) -> Any:
    r"""The kernel for fewer groups that computes the same: zeros where groups are put together.

    Each of the new groups is r = G / `target_group_count` of the old ones, one after the other, and
    its kernel is block-diagonal,

    .. math::
        out[r' O + o, c' C + c] = kernel_{r'}[o, c] \; [r' = c'], \quad 0 \le r', c' < r

    so that the weights of one network serve one with another grouping.

    Args:
      kernel: NumPy or jax array; in all C inputs per group and G * O outputs.
      feature_group_count: G, its groups.
      target_group_count: the groups that it is to have; divides G.
      layout: as in `convert_kernel`; by default that of Flax, any number of spatial dimensions
        before I and O. "torch" for PyTorch.

    Returns:
      The kernel with r * C inputs per group and G * O outputs, in the same layout; where mesh axes
      are Explicit and groups have no axis of their own, sharded in the same way.

    Raises:
      ValueError, TypeError: `target_group_count` does not divide G, or G the kernel; `layout` is
        not that of this kernel, or has no axis I for more than one input.

    Example:
      The parameters of a net, layer by layer, for one whose convolutions have two groups:

      >>> import jax, numpy as np
      >>> from grouped_conv_jax.weights import regroup
      >>> params = {"conv1": {"kernel": np.ones((3, 3, 2, 8)), "bias": np.ones(8)},
      ...           "conv2": {"kernel": np.ones((3, 3, 1, 8)), "bias": np.ones(8)}}
      >>> groups = {"conv1": 4, "conv2": 8}
      >>> def convert(path, leaf):
      ...     layer, name = (key.key for key in path)
      ...     return regroup(leaf, groups[layer], 2) if name == "kernel" else leaf
      >>> jax.tree.map(np.shape, jax.tree.map_with_path(convert, params))["conv2"]
      {'bias': (8,), 'kernel': (3, 3, 4, 8)}
    """
    xp, kernel = _array("kernel", kernel)
    parsed = parsed_layout("layout", layout)
    spatial = spatial_letters(parsed, parsed, kernel.ndim)
    groups = arguments.group_count("feature_group_count", feature_group_count)
    target = arguments.group_count("target_group_count", target_group_count)
    arguments.check_divides("target_group_count", target, "feature_group_count", groups)

    def spread(kernel: Any) -> Any:
        return _block_diagonal(xp, kernel, parsed, spatial, groups, target)

    if xp is jnp and "G" not in parsed.letters:
        # No axis becomes smaller, so that each is sharded as it was.
        spread = with_auto_axes(spread, jax.typeof(kernel).sharding)
    return spread(kernel)


def densify(kernel: Any, feature_group_count: int, layout: str = "...IO") -> Any:
    """The kernel for one group that computes the same: zeros between the groups.

    It is `regroup` to a single group.

    Args:
      kernel: NumPy or jax array; in all C inputs per group and G * O outputs.
      feature_group_count: G, its groups.
      layout: as in `regroup`.

    Returns:
      The kernel with G * C inputs and G * O outputs, in the same layout.

    Raises:
      ValueError, TypeError: as in `regroup`.

    Example:
      >>> import numpy as np
      >>> from grouped_conv_jax.weights import densify
      >>> densify(np.array([[1, 2, 3, 4]]), feature_group_count=2)
      array([[1, 2, 0, 0],
             [0, 0, 3, 4]])
    """
    return regroup(kernel, feature_group_count, 1, layout)


def split_groups(kernel: Any, feature_group_count: int, layout: str = "...IO") -> list[Any]:
    """The kernels of the groups, each that of a convolution of one group.

    Args:
      kernel: NumPy or jax array; in all C inputs per group and G * O outputs.
      feature_group_count: G, its groups.
      layout: as in `regroup`.

    Returns:
      G kernels with C inputs and O outputs, in the same layout.

    Raises:
      ValueError, TypeError: G does not divide the kernel; `layout` is not that of this kernel.

    Example:
      >>> import numpy as np
      >>> from grouped_conv_jax.weights import split_groups
      >>> [kernel.shape for kernel in split_groups(np.ones((3, 3, 4, 6)), 2)]
      [(3, 3, 4, 3), (3, 3, 4, 3)]
    """
    xp, kernel = _array("kernel", kernel)
    parsed = parsed_layout("layout", layout)
    axes = parsed.axes(spatial_letters(parsed, parsed, kernel.ndim))
    groups = _checked_groups(kernel.shape, parsed, axes, feature_group_count)
    axis = axes.index("G" if "G" in axes else "O")
    return [_contiguous(xp, part) for part in xp.split(kernel, groups, axis)]


def merge_groups(kernels: Sequence[Any], layout: str = "...IO") -> Any:
    """The kernel of which `kernels` are the groups, in their order: undoes `split_groups`.

    Args:
      kernels: NumPy or jax arrays of one shape and dtype, C inputs and O outputs each.
      layout: as in `regroup`.

    Returns:
      The kernel with C inputs per group and O outputs for each of the kernels.

    Raises:
      ValueError, TypeError: there are none, they differ in shape or dtype, or `layout` is not
        theirs.

    Example:
      >>> import numpy as np
      >>> from grouped_conv_jax.weights import merge_groups
      >>> merge_groups([np.ones((3, 3, 4, 3)), np.ones((3, 3, 4, 3))]).shape
      (3, 3, 4, 6)
    """
    if not isinstance(kernels, Iterable):
        raise TypeError(
            f"kernels must be a list of kernels, one for each group, got {type(kernels).__name__}"
        )
    arrays = [_array(f"kernels[{i}]", kernel) for i, kernel in enumerate(kernels)]
    if not arrays:
        raise ValueError("kernels must have at least one kernel, got none")
    first = arrays[0][1]
    for i, (_, kernel) in enumerate(arrays):
        if (kernel.shape, kernel.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"kernels must have one shape and dtype, got {first.shape} {first.dtype} and at "
                f"{i} {kernel.shape} {kernel.dtype}"
            )
    parsed = parsed_layout("layout", layout)
    axes = parsed.axes(spatial_letters(parsed, parsed, first.ndim))
    xp = np if all(xp is np for xp, _ in arrays) else jnp
    axis = axes.index("G" if "G" in axes else "O")
    return xp.concatenate([kernel for _, kernel in arrays], axis)


# From any layout to the axes G, O, I and the spatial ones, and back.


def _checked_groups(shape: Sequence[int], layout: KernelLayout, axes: str, groups: Any) -> int:
    """The groups of a kernel: those of its axis G, or as many as the argument says."""
    if groups is not None:
        groups = arguments.group_count("feature_group_count", groups)
    if "G" in axes:
        count = shape[axes.index("G")]
        if groups not in (None, count):
            raise ValueError(
                f"feature_group_count={groups}, but axis G of the kernel in {layout} has {count}"
            )
        return count
    groups = groups or 1
    what, outputs = f"axis O of the kernel in {layout}", shape[axes.index("O")]
    if outputs == 0 and groups > 1:  # Any number divides 0, and as many groups would be made.
        raise ValueError(f"feature_group_count={groups}, but {what} has no outputs to divide")
    arguments.check_divides("feature_group_count", groups, what, outputs)
    return groups


def _to_groups(xp: Any, kernel: Any, layout: KernelLayout, spatial: str, groups: Any) -> Any:
    axes, shape = layout.axes(spatial), list(kernel.shape)
    groups = _checked_groups(shape, layout, axes, groups)
    if "G" not in axes:
        at = axes.index("O")
        shape[at : at + 1] = groups, shape[at] // groups
        axes = axes.replace("O", "GO")
    absent = "".join(letter for letter in "OI" if letter not in axes)
    axes = absent + axes
    kernel = kernel.reshape(*[1] * len(absent), *shape)
    return xp.transpose(kernel, [axes.index(letter) for letter in "GOI" + spatial])


def _from_groups(xp: Any, kernel: Any, layout: KernelLayout, spatial: str) -> Any:
    """Undoes `_to_groups`."""
    axes, order = layout.axes(spatial), "GOI" + spatial
    sizes = dict(zip(order, kernel.shape, strict=True))
    absent = [letter for letter in "OI" if letter not in axes]
    for letter in absent:
        if sizes[letter] != 1:
            raise ValueError(
                f"{layout} has no axis {letter}, so that it is 1 in a group, but the kernel has "
                f"{sizes[letter]}; take a layout with {letter}"
            )
    split = axes if "G" in axes else axes.replace("O", "GO")
    kernel = xp.transpose(kernel, [order.index(letter) for letter in (*absent, *split)])
    if "G" not in axes:
        sizes["O"] *= sizes["G"]
    return _contiguous(xp, kernel.reshape([sizes[letter] for letter in axes]))


def _block_diagonal(
    xp: Any, kernel: Any, layout: KernelLayout, spatial: str, groups: int, target: int
) -> Any:
    grouped = _to_groups(xp, kernel, layout, spatial, groups)
    _, outputs, inputs, *taps = grouped.shape
    blocks = groups // target
    # Chosen, not multiplied by 0 and 1: an infinity in one group is none in the others.
    diagonal = np.eye(blocks, dtype=bool).reshape(1, blocks, 1, blocks, 1, *[1] * len(taps))
    spread = grouped.reshape(target, blocks, outputs, 1, inputs, *taps)
    spread = xp.where(diagonal, spread, xp.zeros((1,) * spread.ndim, kernel.dtype))
    merged = spread.reshape(target, blocks * outputs, blocks * inputs, *taps)
    return _from_groups(xp, merged, layout, spatial)


# Arrays.


def _array(name: str, value: Any) -> tuple[Any, Any]:
    """The module that has the functions for an array, and the array."""
    if isinstance(value, np.ndarray):
        return np, value
    if isinstance(value, jax.Array) or hasattr(value, "__jax_array__"):
        array = jnp.asarray(value)
        arguments.check_bits(name, array.dtype)
        return jnp, array
    kind = type(value)
    is_of_torch = kind.__module__.startswith("torch")
    mend = "layer.weight.detach().numpy()" if is_of_torch else "np.asarray"
    raise TypeError(
        f"{name} must be a NumPy or jax array, got {kind.__name__}; convert it with {mend}"
    )


def _contiguous(xp: Any, array: Any) -> Any:
    """A view of NumPy's as an array of its own: files are written from memory as it lies."""
    return np.ascontiguousarray(array) if xp is np else array
