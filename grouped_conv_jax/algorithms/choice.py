"""Chooses the implementation of a contraction from its shapes and the device."""

import math
from collections.abc import Callable

from grouped_conv_jax.algorithms import memory
from grouped_conv_jax.algorithms.devices import Device
from grouped_conv_jax.algorithms.ranking import Choices
from grouped_conv_jax.algorithms.table import TABLE, unsupported
from grouped_conv_jax.spec import Contraction, ConvSpec


def choose(
    contraction: Contraction, spec: ConvSpec, device: Device, is_export: bool = False
) -> str:
    """Returns the implementation that is expected to be the fastest on a device.

    Of the algorithms that support the contraction and run unasked, it is the one with the least
    `Algorithm.seconds`. On a CPU this is `"native"` in nearly all cases. Where its kernels are
    missing, for three spatial dimensions, other dtypes and exported programs, it is:

    - `"taps"` for depthwise convolutions: a loop at the speed of memory;
    - `"taps"` for the output and the input's gradient of narrow groups, of up to 80 products for an
      output (3 x 3 taps of 8 inputs), since the matrix products of such groups are too thin;
    - `"patches"` for kernels of one tap, which makes them plain matrix products;
    - `"dense"`, one convolution for each group, for other groups and for the kernel's gradient of
      narrow ones; in 64 bits, in which XLA has no fast convolution, `"patches"` or `"xla"` for wide
      groups;
    - `"xla"` for one group, for groups that are so few and small that any detour is longer, and for
      sizes that are not known yet.

    On a CPU, algorithms that would store more than lax does, or more than three times their arrays,
    are left out (see `memory`).

    On NVIDIA's GPUs, as measured on an H100 (benchmarks/gpu-*.json), it is:

    - `"lax"` for the kernel's gradient of more than one group, which becomes cuDNN's;
    - `"taps"`, phase by phase, for the input's gradient of a depthwise convolution with strides;
    - `"dense"` for the output and the input's gradient of up to four groups of at least 64 features
      in 32 bits;
    - `"xla"` for all others, which is lax's own convolution as well.

    On TPUs the rules follow the cycles that XLA:TPU estimates for its programs (see docs/tpu.md),
    since no TPU was at hand to measure on:

    - `"dense"` for the input's gradient, and the output without strides, of up to eight groups of
      at least 24 features, unless the features of a group in the result are a multiple of the 128
      lanes of a register;
    - `"lax"` for the kernel's gradient of more than one group;
    - `"xla"` for all others.

    Elsewhere, where nothing was measured, it is lax's own convolution: `"lax"` for the kernel's
    gradient, `"xla"` for the others. `"vmap"` becomes the same convolutions as `"xla"` by a longer
    way. `"packed"` spoils neighbouring groups where there are infinities or NaN, and runs only
    where it is asked for.
    """
    if spec.is_empty:
        return "xla"
    seconds = {
        name: algorithm.seconds(contraction, spec, device)
        for name, algorithm in TABLE.items()
        if algorithm.runs_unasked and not unsupported(name, contraction, spec, device, is_export)
    }
    names = [name for name in seconds if math.isfinite(seconds[name])]
    if device.platform == "cpu" and not spec.is_symbolic:
        names = _within_memory(names, contraction, spec)
    return min(names, key=seconds.__getitem__)


def _within_memory(names: list[str], contraction: Contraction, spec: ConvSpec) -> list[str]:
    """Leaves out implementations that would store more than lax does, or than three times their
    arrays (see `memory`).

    If all would need more than three times their arrays, as lax itself can for a batch of one
    example in 8 bits, those remain that store no more than lax's own convolution.
    """
    stored = {name: TABLE[name].temporary_bytes(contraction, spec) for name in names}
    most = memory.limit(contraction, spec)
    within = [name for name in names if stored[name] <= most]
    if stored["xla"] <= memory.most_bytes(contraction, spec) and "xla" not in within:
        within.append("xla")
    return within or [name for name in names if stored[name] <= stored["xla"]]


def resolve(
    implementation: str | None,
    contraction: Contraction,
    spec: ConvSpec,
    device: Device,
    choices: Choices | None = None,
    is_export: bool = False,
) -> str:
    """Returns the name of the implementation to run: the one asked for, the one that is the fastest
    of those measured on such a device, or the automatic choice.

    Args:
      implementation: the one asked for, or None.
      contraction: what is computed.
      spec: the convolution as large as one device computes it.
      device: the device that it runs on.
      choices: the measured ones, or None.
      is_export: whether the program must run without this package.

    Raises:
      NotImplementedError: the implementation that was asked for does not do this.
    """
    if implementation is not None:
        return required(
            implementation,
            contraction,
            device,
            lambda name: unsupported(name, contraction, spec, device, is_export),
        )
    fastest = None
    if choices is not None:
        fastest = choices.fastest(contraction, spec, device, is_export)
    return fastest or choose(contraction, spec, device, is_export)


def required(
    implementation: str,
    contraction: Contraction,
    device: Device,
    reason_against: Callable[[str], str | None],
) -> str:
    """Returns the implementation that was asked for.

    Raises:
      NotImplementedError: there is a reason against it; the message names those without.
    """
    if reason := reason_against(implementation):
        others = [name for name in TABLE if reason_against(name) is None]
        raise NotImplementedError(
            f"implementation {implementation!r} does not compute this {contraction} on "
            f"{device.platform}: {reason}; these do: {', '.join(others)}"
        )
    return implementation
