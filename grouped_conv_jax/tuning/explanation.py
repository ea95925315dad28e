"""Which implementation computes what, and why: `explain`."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from grouped_conv_jax.algorithms import choice
from grouped_conv_jax.algorithms.devices import Device
from grouped_conv_jax.algorithms.table import TABLE, unsupported
from grouped_conv_jax.partitioning import xla_partitioner
from grouped_conv_jax.spec import OPERANDS, RESULT, Contraction, ConvSpec
from grouped_conv_jax.text import aligned
from grouped_conv_jax.tuning import calls
from grouped_conv_jax.tuning.context import Tuning, active
from grouped_conv_jax.tuning.occurrences import Occurrence, occurrences


@dataclasses.dataclass(frozen=True)
class Row:
    """One implementation for one contraction, as one device computes it.

    Attributes:
      contraction: "fprop" for the output, "dgrad" for the input's gradient, "wgrad" for the
        kernel's.
      spec: of the forward convolution, mapped axes merged: as large as one device gets it, or
        whole if `divided_by_xla`.
      device: the kind of the device.
      times: how often the function computes it, as far as is known: once for the rounds of a
        `lax.while_loop`, and in every branch of a `lax.cond`.
      implementation: the name.
      is_chosen: whether it is the one that runs.
      is_asked_for: whether that is so because the function says `implementation=`.
      reason: why it does not run here, if it cannot; None if it can.
      runs_unasked: whether it may run without being asked for, however fast it is.
      expected_seconds: by the model behind the automatic choice; None if that does not tell.
      measured_seconds: by the tuning; None if that does not tell.
      divided_by_xla: whether XLA divides the convolution among the devices by itself, as on a
        TPU's mesh with Auto axes, where the library does not learn what one device gets.
    """

    contraction: Contraction
    spec: ConvSpec
    device: Device
    times: int
    implementation: str
    is_chosen: bool
    is_asked_for: bool
    reason: str | None
    runs_unasked: bool
    expected_seconds: float | None
    measured_seconds: float | None
    divided_by_xla: bool = False

    @property
    def flops(self) -> int:
        """Two for each multiply-add, the zeros of the padding included."""
        return 2 * self.spec.multiply_adds

    @property
    def nbytes(self) -> int:
        """Of the operands and the result."""
        return sum(
            math.prod(self.spec.shape(role)) * self.spec.role_dtype(role).itemsize
            for role in (*OPERANDS[self.contraction], RESULT[self.contraction])
        )

    @property
    def description(self) -> str:
        """The convolution in a few words."""
        return describe(self.spec)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` has found; as a string, a table for each contraction.

    Attributes:
      contractions: in the order of the program; the rows of all implementations for each.
    """

    contractions: tuple[tuple[Row, ...], ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(row for rows in self.contractions for row in rows)

    def __str__(self) -> str:
        return "\n\n".join(map(_paragraph, self.contractions)) or "No grouped convolutions."


def explain(*args: Any, tuning: Tuning | None = None, **kwargs: Any) -> Explanation:
    """Says which implementation computes each contraction, and what the others would take.

    `explain(lhs, rhs, window_strides, padding, ...)`, with the arguments of `grouped_conv`, is
    about that convolution and its two gradients, `explain(function, *args, **kwargs)` about all
    grouped convolutions in `function(*args, **kwargs)`; gradients if it takes them. Arrays may be
    `jax.ShapeDtypeStruct`, with shardings where there are several devices.

    Nothing is run. The function is traced; it is compiled only if several devices share a
    convolution in it, since that is where the shapes that each of them gets are decided.

    The function may change its arguments, such as modules and optimizers of Flax nnx: it gets
    copies, and what it changes in them counts as a result. The same holds for the object of a bound
    method and for the arguments in a `functools.partial`. An object that JAX does not know as a
    tree must not change, nor may a variable outside the function.

    Args:
      *args: see above. What is not an array in the arguments of a function is static, and so are
        NumPy's scalars.
      tuning: is put in place of that of the context, which else is explained.
      **kwargs: see above.

    Returns:
      The tables; `rows` are the same as objects.

    Raises:
      ValueError: the function changes a module of Flax that is not among its arguments.
      NotImplementedError: an `implementation` is asked for that does not support its convolution,
        in a function that has to be lowered.

    Example:
      >>> import jax
      >>> from grouped_conv_jax import explain
      >>> x = jax.ShapeDtypeStruct((8, 56, 56, 128), "float32")
      >>> w = jax.ShapeDtypeStruct((3, 3, 4, 128), "float32")
      >>> layout = ("NHWC", "HWIO", "NHWC")
      >>> explanation = explain(
      ...     x, w, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=32,
      ...     implementation="vmap",
      ... )
      >>> print(explanation)  # doctest: +ELLIPSIS
      fprop: 8x56x56x128 -> 8x56x56x128, 3x3, 32 groups of 4->4, stride 1, float32
      once on cpu, 231.2 MFLOP, 25.7 MB
         implementation  expected ms
      ...
      *  vmap ... asked for
      ...
      >>> sorted({row.contraction for row in explanation.rows if row.is_chosen})
      ['dgrad', 'fprop', 'wgrad']
    """
    with tuning or contextlib.nullcontext():
        found = occurrences(*calls.parsed(args, kwargs))
        return Explanation(tuple(_rows(occurrence, active()) for occurrence in found))


def _rows(o: Occurrence, tuning: Tuning | None) -> tuple[Row, ...]:
    """One for each implementation."""
    contraction, spec, device = o.contraction, o.spec, o.device
    measured = {} if tuning is None else tuning.seconds(contraction, spec, o.device)
    if o.implementation is not None:
        chosen = o.implementation
    elif o.divided_over is not None:
        chosen = xla_partitioner.choose(contraction, spec, o.divided_over, device)
    else:
        chosen = choice.resolve(None, contraction, spec, device, o.choices)

    def row(name: str) -> Row:
        algorithm = TABLE[name.partition(":")[0]]
        reason = unsupported(name, contraction, spec, device)
        if reason is None and o.divided_over is not None:
            reason = xla_partitioner.miscomputed(name, contraction, spec, o.divided_over)
        expected = math.inf
        if reason is None:
            if device.platform == "cpu":  # Elsewhere only ratios are known.
                expected = algorithm.seconds(contraction, spec, device)
            if name in measured and measured[name] is None:
                reason = "it failed when it was measured"
        return Row(
            contraction=contraction,
            spec=spec,
            device=o.device,
            times=o.times,
            implementation=name,
            is_chosen=name == chosen,
            is_asked_for=name == o.implementation,
            reason=reason,
            runs_unasked=reason is None and algorithm.runs_unasked,
            expected_seconds=expected if math.isfinite(expected) else None,
            measured_seconds=measured.get(name),
            divided_by_xla=o.divided_over is not None,
        )

    names = list(TABLE)
    # With a config, a name is listed where it is asked for, was measured or is chosen.
    names += [name for name in dict.fromkeys((*measured, chosen)) if name not in TABLE]
    return tuple(map(row, names))


# As text.


def describe(spec: ConvSpec) -> str:
    """A convolution in a few words: shapes, taps, groups, strides, dilations, dtypes."""
    inputs, outputs = spec.group_width
    groups = spec.feature_group_count
    parts = [
        f"{_crossed(spec.lhs_shape)} -> {_crossed(spec.out_shape)}",
        _crossed(spec.spatial_shape("rhs")) or "no taps",
        f"{groups} group{'s' * (groups > 1)} of {inputs}->{outputs}",
    ]
    for name, steps in (
        ("stride", spec.window_strides),
        ("lhs dilation", spec.lhs_dilation),
        ("rhs dilation", spec.rhs_dilation),
    ):
        if set(steps) - ({1} if name != "stride" else set()):
            parts.append(f"{name} {_crossed(steps if len(set(steps)) > 1 else steps[:1])}")
    dtypes = dict.fromkeys([str(spec.dtype), str(spec.wide_dtype)])
    return ", ".join([*parts, " -> ".join(dtypes)])


def _crossed(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _paragraph(rows: Sequence[Row]) -> str:
    row = rows[0]
    often = "once" if row.times == 1 else f"{row.times} times"
    whole = " in all, which XLA divides among the devices"
    size = f"{_prefixed(row.flops)}FLOP, {_prefixed(row.nbytes)}B"
    table = [["", "implementation", "expected ms", "measured ms", ""]]
    for row in rows:
        table.append(
            [
                "*" * row.is_chosen,
                row.implementation,
                _milliseconds(row.expected_seconds),
                _milliseconds(row.measured_seconds),
                _note(row),
            ]
        )
    if all(row.measured_seconds is None for row in rows):
        table = [line[:3] + line[4:] for line in table]
    if all(row.expected_seconds is None for row in rows):
        table = [line[:2] + line[3:] for line in table]
    return "\n".join(
        [
            f"{row.contraction}: {row.description}",
            f"{often} on {row.device.short}, {size}{whole * row.divided_by_xla}",
            *aligned(table, numbers=("expected ms", "measured ms")),
        ]
    )


def _note(row: Row) -> str:
    notes = ["asked for"] if row.is_asked_for else []
    if row.reason is not None:
        notes.append(f"not supported: {row.reason}")
    elif not row.runs_unasked and not row.is_asked_for and not row.is_chosen:
        notes.append("only if asked for")
    return ", ".join(notes)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3f}"


def _prefixed(number: float) -> str:
    """With one of the prefixes of units: 1,234,000 is "1.2 M"."""
    for prefix in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.1f} {prefix}" if prefix else f"{number} "
        number /= 1000
    return f"{number:.1f} T"
