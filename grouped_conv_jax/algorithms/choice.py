"""Which implementation computes a contraction, for the platform and the shapes at hand."""

import math
from collections.abc import Callable

import numpy as np

from grouped_conv_jax.algorithms import TABLE, dense, memory, unsupported
from grouped_conv_jax.algorithms.devices import DeviceKind
from grouped_conv_jax.algorithms.ranking import Choices
from grouped_conv_jax.spec import Contraction, ConvSpec

TPU_LANES = 128
"""Elements of the last dimension that a TPU's register holds."""


def choose(contraction: Contraction, spec: ConvSpec, platform: str, is_export: bool = False) -> str:
    """The automatic choice.

    On a CPU it is what is expected to be the fastest (`expected_seconds`) of those that compute
    this: `"native"`, nearly always. Where its kernels are missing, for three spatial dimensions,
    other dtypes and what is exported, that comes to:

    - a group for each input (depthwise): `"taps"`, a loop at the speed of memory;
    - narrow groups, of up to 80 products for an output (3 x 3 taps of 8 inputs): `"taps"` for the
      output and the input's gradient, since the matrix products of such groups are too thin;
    - a kernel of one tap: `"patches"`, which are plain matrix products then;
    - other groups, and the kernel's gradient of narrow ones: `"dense"`, one convolution for each;
      in 64 bits, in which XLA has no fast convolution, `"patches"` or `"xla"` for wide ones;
    - one group, groups that are so few and small that any detour is longer, and sizes that are not
      known yet: `"xla"`.

    Implementations that would store more than lax does, or more than three times their arrays, are
    left out (see `memory`).

    On NVIDIA's GPUs, as measured on an H100 (benchmarks/gpu-*.json):

    - the kernel's gradient of more than one group: `"lax"`, which becomes cuDNN's;
    - the input's gradient of a depthwise convolution with strides: `"taps"`, phase by phase;
    - the output and the input's gradient of up to four groups of at least 64 features in 32 bits:
      `"dense"`;
    - all others: `"xla"`, which is lax's own convolution as well.

    On TPUs, by the cycles that XLA:TPU itself estimates for its programs (see docs/tpu.md), since
    no TPU was at hand to measure on. Another implementation than lax's is chosen for a class of
    convolutions whose estimates are lower, by more than 1.5 times in most of them:

    - the input's gradient, and the output without strides, of up to eight groups of at least 24
      features, unless the features of a group in the result are a multiple of the 128 lanes of a
      register: `"dense"`;
    - the kernel's gradient of more than one group: `"lax"`;
    - all others: `"xla"`.

    Elsewhere, where nothing has been measured, lax's own: `"lax"` for the kernel's gradient,
    `"xla"` for the others. `"vmap"` becomes the same convolutions as `"xla"` by a longer way, and
    `"packed"` spoils neighbouring groups where there are infinities or NaN: both are there to be
    asked for.
    """
    if platform != "cpu":
        preferred = _preferred(contraction, spec, platform)
        able = unsupported(preferred, contraction, spec, platform, is_export) is None
        return preferred if able else "xla"
    if spec.is_symbolic or spec.is_empty:
        return "xla"
    able = [n for n in TABLE if unsupported(n, contraction, spec, platform, is_export) is None]
    seconds = {name: expected_seconds(name, contraction, spec, platform) for name in able}
    unasked = [name for name in able if math.isfinite(seconds[name])]
    return min(_within_memory(unasked, contraction, spec), key=seconds.__getitem__)


def _within_memory(names: list[str], contraction: Contraction, spec: ConvSpec) -> list[str]:
    """Leaves out implementations that would store more than lax does, or than three times their
    arrays (see `memory`).

    If all would need more than three times their arrays, as lax itself can for a batch of one
    example in 8 bits, those remain that store no more than lax's own convolution.
    """
    stored = {name: temporary_bytes(name, contraction, spec) for name in names}
    most = memory.limit(contraction, spec)
    within = [name for name in names if stored[name] <= most]
    if stored["xla"] <= memory.most_bytes(contraction, spec) and "xla" not in within:
        within.append("xla")
    return within or [name for name in names if stored[name] <= stored["xla"]]


def temporary_bytes(name: str, contraction: Contraction, spec: ConvSpec) -> int:
    """Returns the estimated size of the arrays that XLA stores on a CPU beside the operands and the
    result; 0 for implementations that say nothing of it.
    """
    module = TABLE[name]
    return module.temporary_bytes(contraction, spec) if hasattr(module, "temporary_bytes") else 0


def _preferred(contraction: Contraction, spec: ConvSpec, platform: str) -> str:
    """Of those that are made for accelerators, if it supports this."""
    groups = spec.feature_group_count
    if spec.is_empty or (isinstance(groups, int) and groups == 1):
        return "xla"
    if platform == "tpu" and not spec.is_symbolic:
        return _preferred_on_tpu(contraction, spec)
    if contraction == "wgrad":
        return "lax"
    if platform == "cuda" and not spec.is_symbolic:
        inputs, outputs = spec.group_width
        has_strides = max(spec.window_strides, default=1) > 1
        if contraction == "dgrad" and inputs == outputs == 1 and has_strides:
            return "taps"
        if groups <= 4 and min(inputs, outputs) >= 64 and spec.dtype == np.float32:
            return "dense"
    return "xla"


def _preferred_on_tpu(contraction: Contraction, spec: ConvSpec) -> str:
    inputs, outputs = spec.group_width
    if contraction == "wgrad":
        return "lax"
    result_width = outputs if contraction == "fprop" else inputs
    has_strides = contraction == "fprop" and max(spec.window_strides, default=1) > 1
    is_wide = min(inputs, outputs) >= 24 and result_width % TPU_LANES != 0
    few = spec.feature_group_count <= dense.UNROLLED
    return "dense" if few and is_wide and not has_strides else "xla"


def expected_seconds(name: str, contraction: Contraction, spec: ConvSpec, platform: str) -> float:
    """What an implementation is expected to take on two cores of a CPU (see `costs`); infinite if
    it is not to be chosen, or if nothing is known of the platform.
    """
    if platform != "cpu" or not hasattr(TABLE[name], "seconds"):
        return math.inf
    return TABLE[name].seconds(contraction, spec)


def resolve(
    implementation: str | None,
    contraction: Contraction,
    spec: ConvSpec,
    platform: str,
    choices: Choices | None = None,
    device: DeviceKind | None = None,
    is_export: bool = False,
) -> str:
    """Returns the name of the implementation to run: the one asked for, the one that is the fastest
    of those measured on such a device, or the automatic choice.

    Args:
      implementation: the one asked for, or None.
      contraction: what is computed.
      spec: the convolution as large as one device computes it.
      platform: the platform that it runs on.
      choices: the measured ones, or None.
      device: the kind of the device, or None if it is not known.
      is_export: whether the program must run without this package.

    Raises:
      NotImplementedError: the implementation that was asked for does not do this.
    """
    if implementation is not None:
        return required(
            implementation,
            contraction,
            platform,
            lambda name: unsupported(name, contraction, spec, platform, is_export),
        )
    fastest = None
    if choices is not None:
        fastest = choices.fastest(contraction, spec, device, is_export)
    return fastest or choose(contraction, spec, platform, is_export)


def required(
    implementation: str,
    contraction: Contraction,
    platform: str,
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
            f"{platform}: {reason}; these do: {', '.join(others)}"
        )
    return implementation
