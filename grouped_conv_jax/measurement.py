"""One measurement, and the names of what was measured, in which it is kept in files."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple, get_args

from grouped_conv_jax.devices import DeviceKind
from grouped_conv_jax.spec import Contraction, ConvSpec, Role


class Subject(NamedTuple):
    """What was measured: a contraction of a spec (by its `spec_key`) on a kind of device."""

    device: DeviceKind
    contraction: Contraction
    spec: str


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Seconds of each implementation, the fastest first, and None for those that failed."""

    subject: Subject
    seconds: tuple[tuple[str, float | None], ...]

    @classmethod
    def of(cls, subject: Subject, seconds: Mapping[str, float | None]) -> "Measurement":
        def rank(name: str) -> tuple[bool, float, str]:
            time = seconds[name]
            return time is None, time or 0.0, name

        return cls(subject, tuple((name, seconds[name]) for name in sorted(seconds, key=rank)))

    def updated(self, newer: "Measurement") -> "Measurement":
        """Both, and where both have an implementation the newer time."""
        return self.of(self.subject, {**dict(self.seconds), **dict(newer.seconds)})


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
