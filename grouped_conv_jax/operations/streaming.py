"""Causal convolution of a sequence that arrives in chunks: `streaming_conv`.

An output sees the past, (k - 1) dilation inputs of it. Those are carried from chunk to chunk, so
that all the chunks' outputs together are those of the whole sequence.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from grouped_conv_jax.algorithms.table import Implementation
from grouped_conv_jax.operations import arguments
from grouped_conv_jax.operations.conv import grouped_conv
from grouped_conv_jax.operations.forward import Settings, forward
from grouped_conv_jax.partitioning.explicit_mesh import (
    has_explicit_axes,
    mesh_of,
    sharding_of_result,
    with_auto_axes,
)
from grouped_conv_jax.text import shown

CHANNELS_LAST = ("NWC", "WIO", "NWC")


@arguments.keeps_64_bits
def streaming_conv(
    lhs: ArrayLike,
    rhs: ArrayLike,
    state: ArrayLike | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvDimensionNumbers | Sequence[str] | None = CHANNELS_LAST,
    feature_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    out_sharding: NamedSharding | PartitionSpec | None = None,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    r"""Causal grouped convolution of the next chunk of a sequence.

    With the k taps of the kernel the output at a time t is

    .. math::
        out[n, t, g, o] = \sum_{j < k, c} lhs[n, t - (k - 1 - j) \cdot dilation, g, c]
            \; rhs[j, c, g, o]

    where times before the chunk are read from the state, and those before the sequence are zeros.
    However the sequence is cut, the outputs are those of `grouped_conv` with CAUSAL padding.

    Args:
      lhs: the chunk: batch N, T >= 0 times, features G * C.
      rhs: the kernel, of the dtype of `lhs`: k taps, inputs per group C, outputs G * O.
      state: what the chunk before returned, or None at the beginning. Where mesh axes are Explicit
        it is brought to the sharding of `lhs`, with the times whole; a carry of `jax.lax.scan` must
        have that from the beginning (`jax.sharding.reshard`).
      rhs_dilation: one integer, at least 1 (default 1).
      dimension_numbers: as in `grouped_conv`, of one spatial dimension, the time; by default
        channels last, ("NWC", "WIO", "NWC").
      feature_group_count: G; as many as there are features for a depthwise convolution.
      precision: as in lax.
      preferred_element_type: dtype of the output and of the accumulation.
      out_sharding: the sharding of the output where mesh axes are Explicit.
      implementation: as in `grouped_conv`.

    Returns:
      The output, N, T and G * O; and the state: the last (k - 1) dilation inputs, in the layout and
      dtype of `lhs`. Its shape does not depend on T, so `jax.lax.scan` can carry it.

    Raises:
      ValueError, TypeError: an argument is wrong; the message names it and says what would do.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from grouped_conv_jax import streaming_conv, streaming_conv_state
      >>> x, w = jnp.ones((2, 10, 8)), jnp.ones((4, 1, 8))
      >>> first, state = streaming_conv(x[:, :7], w, feature_group_count=8)
      >>> second, state = streaming_conv(x[:, 7:], w, state, feature_group_count=8)
      >>> first.shape, second.shape, state.shape
      ((2, 7, 8), (2, 3, 8), (2, 3, 8))

      One input at a time:

      >>> def step(state, x):
      ...     out, state = streaming_conv(x[:, None], w, state, feature_group_count=8)
      ...     return state, out[:, 0]
      >>> start = streaming_conv_state(2, w, feature_group_count=8)
      >>> jax.lax.scan(step, start, jnp.moveaxis(x, 1, 0))[1].shape
      (10, 2, 8)

    References:
      Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023 (a
      depthwise one of four taps in every block); van den Oord et al., "WaveNet", 2016 (dilated).
    """
    like, kernel = arguments.array_type("lhs", lhs), arguments.array_type("rhs", rhs)
    numbers = _numbers(like.shape, kernel, dimension_numbers)
    past = _past(kernel, numbers, rhs_dilation)
    time = numbers.lhs_spec[2]
    shape = (*like.shape[:time], past, *like.shape[time + 1 :])
    arguments.check_bytes("the state", shape, like.dtype)
    settings = {
        "rhs_dilation": rhs_dilation,
        "dimension_numbers": numbers,
        "feature_group_count": feature_group_count,
        "precision": precision,
        "preferred_element_type": preferred_element_type,
    }
    if state is None:
        x = _joined(jnp.zeros(shape, like.dtype), lhs, time)
        seen, before = lhs, (past, 0)
    else:
        _check_state(arguments.array_type("state", state), like, shape)
        x = _joined(state, lhs, time)
        seen, before = x, (0, 0)
        if out_sharding is None:
            # That of the chunk, which may be sharded in time.
            spec = forward(like, kernel, Settings((1,), [(past, 0)], **settings)).spec
            out_sharding = sharding_of_result("fprop", spec, like, kernel, None)
    out = grouped_conv(
        seen,
        rhs,
        (1,),
        [before],
        **settings,
        out_sharding=out_sharding,
        implementation=implementation,
    )
    size = like.shape[time]
    return out, lax.slice_in_dim(x, size, size + past, axis=time)


def streaming_conv_state(
    batch: int,
    rhs: Any,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvDimensionNumbers | Sequence[str] | None = CHANNELS_LAST,
    feature_group_count: int = 1,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """The state of `streaming_conv` before a sequence: zeros, (k - 1) dilation inputs.

    Args:
      batch: N, the number of sequences.
      rhs: the kernel, or a `jax.ShapeDtypeStruct` of it.
      rhs_dilation: as in `streaming_conv`.
      dimension_numbers: as in `streaming_conv`.
      feature_group_count: as in `streaming_conv`.
      dtype: that of the inputs, by default that of `rhs`.

    Returns:
      The state, in the layout of the inputs.

    Raises:
      ValueError, TypeError: an argument is wrong; the message names it and says what would do.

    Example:
      >>> import jax.numpy as jnp
      >>> from grouped_conv_jax import streaming_conv_state
      >>> streaming_conv_state(2, jnp.ones((4, 1, 8)), (2,), feature_group_count=8).shape
      (2, 6, 8)
    """
    kernel = arguments.array_type("rhs", rhs)
    groups = arguments.group_count("feature_group_count", feature_group_count)
    numbers = _numbers((0, 0, 0), kernel, dimension_numbers)
    (examples,) = arguments.integers("batch", (batch,), 1, least=0)
    features = groups * kernel.shape[numbers.rhs_spec[1]]
    shape = [0, 0, 0]
    for d, size in zip(
        numbers.lhs_spec, (examples, features, _past(kernel, numbers, rhs_dilation)), strict=True
    ):
        shape[d] = size
    try:
        element_type = kernel.dtype if dtype is None else jnp.dtype(dtype)
    except Exception:  # NumPy raises whatever comes of reading a string as a dtype.
        raise TypeError(f"dtype must be one such as jnp.float32, got {shown(dtype)}") from None
    arguments.check_bytes("the state", shape, element_type)
    return jnp.zeros(shape, element_type)


def _numbers(lhs_shape: Sequence[int], kernel: Any, dimension_numbers: Any):
    if len(lhs_shape) != 3:
        raise ValueError(
            f"lhs must have three dimensions (batch, features, the time), got shape "
            f"{tuple(lhs_shape)}; one input is a chunk of one time, x[:, t : t + 1]"
        )
    if len(kernel.shape) != 3:
        raise ValueError(
            f"rhs must have three dimensions (outputs, inputs, the taps), got shape "
            f"{tuple(kernel.shape)}"
        )
    return arguments.layout(lhs_shape, kernel.shape, dimension_numbers)


def _past(kernel: Any, numbers: lax.ConvDimensionNumbers, rhs_dilation: Any) -> int:
    """How many inputs before its own an output sees."""
    (dilation,) = arguments.integers("rhs_dilation", rhs_dilation, 1, default=1)
    arguments.check_taps(kernel.shape, numbers)
    return (kernel.shape[numbers.rhs_spec[2]] - 1) * dilation


def _check_state(state: Any, lhs: Any, shape: tuple[int, ...]) -> None:
    if state.shape != shape:
        raise ValueError(
            f"state must be the last inputs, for lhs of shape {tuple(lhs.shape)} an array of shape "
            f"{shape}, got shape {state.shape}; begin with None or streaming_conv_state, and give "
            "each chunk the state of the one before. Has lhs its axis of the time? One input is a "
            "chunk of one time, x[:, t : t + 1]"
        )
    arguments.check_same_dtype(lhs=lhs, state=state)


def _joined(state: ArrayLike, lhs: ArrayLike, time: int) -> jax.Array:
    """What was before the chunk, and the chunk; sharded as the chunk, but with the times whole."""
    like = jax.typeof(lhs)
    mesh, sharding = mesh_of(like, jax.typeof(state)), None
    if has_explicit_axes(mesh):
        axes = [*like.sharding.spec, *[None] * (3 - len(like.sharding.spec))]
        axes[time] = None
        sharding = NamedSharding(mesh, PartitionSpec(*axes))

    def join(state: jax.Array, lhs: jax.Array) -> jax.Array:
        return lax.concatenate([state, lhs], time)

    return with_auto_axes(join, sharding)(jnp.asarray(state), jnp.asarray(lhs))
