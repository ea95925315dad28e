"""The fastest implementations by measurement, as compiled programs depend on them: `Choices`.

A `Tuning` is entered as a context of JAX's own, so that compiled functions notice it. An operation
that is called in the context carries the `Choices` along, through transformations, to where its
implementation is chosen.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable
from typing import NamedTuple, get_args

from grouped_conv_jax import jax_compat
from grouped_conv_jax.algorithms.devices import Device
from grouped_conv_jax.algorithms.table import find, unsupported
from grouped_conv_jax.spec import Contraction, ConvSpec, Role

context = jax_compat.make_user_context(None)
"""Holds the `Tuning` of the context, or None."""


def choices_of_context() -> "Choices | None":
    """Returns the ranking of the context's tuning; None if there is none, or it is empty."""
    return None if context.value is None else context.value.choices


class Subject(NamedTuple):
    """What was measured: a contraction of a spec (by its `spec_key`) on a kind of device."""

    device: Device
    contraction: Contraction
    spec: str


@dataclasses.dataclass(frozen=True, repr=False)
class Choices:
    """Which implementations are the fastest: what the compiled program depends on.

    Those that took part in a measurement, in order, for each subject.
    """

    ranking: tuple[tuple[Subject, tuple[str, ...]], ...]

    def fastest(
        self,
        contraction: Contraction,
        spec: ConvSpec,
        device: Device,
        is_export: bool = False,
    ) -> str | None:
        """Returns the first that may be chosen; None if this was not measured on such a device."""
        for name in self._names.get(Subject(device, contraction, spec_key(spec)), ()):
            algorithm = find(name)
            if algorithm is None or not algorithm.runs_unasked:
                continue
            if not unsupported(name, contraction, spec, device, is_export):
                return name
        return None

    @functools.cached_property
    def _names(self) -> dict[Subject, tuple[str, ...]]:
        return dict(self.ranking)

    @functools.cached_property
    def digest(self) -> str:
        """The same in every process, for the keys of compilation caches."""
        return digest(self.ranking)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Choices({self.digest})"


def spec_key(spec: ConvSpec) -> str:
    """A name for a spec without mapped axes, of all that it says, in the notation of XLA.

    Padding and dilations, which may be said in two ways, are always there; a default precision
    is not.
    """
    lhs, out = _labels("bf", spec.layout("lhs")), _labels("bf", spec.layout("out"))
    parts = [
        *(f"{spec.role_dtype(role)}{_listed(spec.shape(role))}" for role in get_args(Role)),
        f"dim_labels={lhs}_{_labels('oi', spec.layout('rhs'))}->{out}",
        f"feature_group_count={spec.feature_group_count}",
        f"stride={_crossed(spec.window_strides)}",
        f"pad={_crossed(f'{low}_{high}' for low, high in spec.padding)}",
        f"lhs_dilate={_crossed(spec.lhs_dilation)}",
        f"rhs_dilate={_crossed(spec.rhs_dilation)}",
    ]
    if spec.precision is not None:
        both = spec.precision if isinstance(spec.precision, tuple) else (spec.precision,)
        parts.append(f"precision={','.join(str(p).lower() for p in both)}")
    return " ".join(parts)


def _labels(features: str, layout: tuple[int, ...]) -> str:
    """The letter of each dimension: those of `features`, and spatial dimensions by number."""
    letters = [*features, *map(str, range(len(layout) - 2))]
    return "".join(letters[layout.index(d)] for d in range(len(layout)))


def _listed(shape: Iterable[object]) -> str:
    return f"[{','.join(map(str, shape))}]"


def _crossed(numbers: Iterable[object]) -> str:
    return "x".join(map(str, numbers))


def digest(value: tuple) -> str:
    """Returns a hash that is the same in every process."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
