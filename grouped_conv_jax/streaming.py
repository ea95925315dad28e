"""Causal convolution of a sequence that arrives in chunks: `streaming_conv`.

An output sees the past, (k - 1) dilation inputs of it. Those are carried from chunk to chunk, so
that all the chunks' outputs together are those of the whole sequence.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from grouped_conv_jax import arguments
from grouped_conv_jax.conv import grouped_conv

CHANNELS_LAST = ("NWC", "WIO", "NWC")


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
    implementation: str | None = None,
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
      state: what the chunk before returned, or None at the beginning. On Explicit axes it is
        sharded as `lhs`.
      rhs_dilation: one integer, at least 1 (default 1).
      dimension_numbers: as in `grouped_conv`, of one spatial dimension, the time; by default
        channels last, ("NWC", "WIO", "NWC").
      feature_group_count: G; as many as there are features for a depthwise convolution.
      precision: as in lax.
      preferred_element_type: dtype of the output and of the accumulation.
      implementation: as in `grouped_conv`.

    Returns:
      The output, N, T and G * O; and the state: the last (k - 1) dilation inputs, in the layout and
      dtype of `lhs`. Its shape does not depend on T, so `jax.lax.scan` can carry it.

    Raises:
      ValueError, TypeError: an argument is wrong; the message names it and says what would do.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from grouped_conv_jax.streaming import streaming_conv, streaming_conv_state
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
    before = (past, 0)
    if state is not None:
        _check_state(arguments.array_type("state", state), like, time, past)
        lhs = lax.concatenate([jnp.asarray(state), jnp.asarray(lhs)], time)
        before = (0, 0)
    out = grouped_conv(
        lhs,
        rhs,
        (1,),
        [before],
        rhs_dilation=rhs_dilation,
        dimension_numbers=numbers,
        feature_group_count=feature_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
        implementation=implementation,
    )
    return out, _last(jnp.asarray(lhs), time, past)


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
      >>> from grouped_conv_jax.streaming import streaming_conv_state
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
    return jnp.zeros(shape, kernel.dtype if dtype is None else dtype)


def _numbers(lhs_shape: Sequence[int], kernel: Any, dimension_numbers: Any):
    for name, shape in (("lhs", lhs_shape), ("rhs", kernel.shape)):
        if len(shape) != 3:
            raise ValueError(
                f"{name} must have three dimensions (a batch or outputs, features, the time), got "
                f"shape {tuple(shape)}"
            )
    return arguments.layout(lhs_shape, kernel.shape, dimension_numbers)


def _past(kernel: Any, numbers: lax.ConvDimensionNumbers, rhs_dilation: Any) -> int:
    """How many inputs before its own an output sees."""
    (dilation,) = arguments.integers("rhs_dilation", rhs_dilation, 1, default=1)
    return (kernel.shape[numbers.rhs_spec[2]] - 1) * dilation


def _check_state(state: Any, lhs: Any, time: int, past: int) -> None:
    shape = (*lhs.shape[:time], past, *lhs.shape[time + 1 :])
    if state.shape != shape:
        raise ValueError(
            f"state must have the last {past} inputs, shape {shape}, got shape {state.shape}; "
            "begin with None or streaming_conv_state, and give each chunk the state of the one "
            "before"
        )
    arguments.check_same_dtype(lhs=lhs, state=state)


def _last(x: jax.Array, time: int, past: int) -> jax.Array:
    """The last `past` inputs, with zeros before them if there are fewer."""
    size = x.shape[time]
    if missing := max(past - size, 0):
        config = [(missing if d == time else 0, 0, 0) for d in range(x.ndim)]
        x = lax.pad(x, jnp.zeros((), x.dtype), config)
    return lax.slice_in_dim(x, size + missing - past, size + missing, axis=time)
