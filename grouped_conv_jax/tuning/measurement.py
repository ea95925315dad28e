"""The measured times of the implementations of one contraction."""

import dataclasses
from collections.abc import Mapping

from grouped_conv_jax.algorithms.ranking import Subject


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
