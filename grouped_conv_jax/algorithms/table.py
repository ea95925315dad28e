"""The table of algorithms, by the names that `implementation=` takes.

To add one to the package: write its file, and a line in `TABLE`. To add one to a program:
`register`.
"""

import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import jax

from grouped_conv_jax.algorithms.base import Algorithm
from grouped_conv_jax.algorithms.dense import Dense
from grouped_conv_jax.algorithms.devices import Device
from grouped_conv_jax.algorithms.einsum import Einsum
from grouped_conv_jax.algorithms.lax import Lax
from grouped_conv_jax.algorithms.native import Native
from grouped_conv_jax.algorithms.packed import Packed
from grouped_conv_jax.algorithms.patches import Patches
from grouped_conv_jax.algorithms.taps import Taps
from grouped_conv_jax.algorithms.vmap import Vmap
from grouped_conv_jax.algorithms.xla import Xla
from grouped_conv_jax.spec import Contraction, ConvSpec
from grouped_conv_jax.text import shown

TABLE: dict[str, Algorithm] = {
    "xla": Xla(),
    "lax": Lax(),
    "vmap": Vmap(),
    "dense": Dense(),
    "einsum": Einsum(),
    "taps": Taps(),
    "patches": Patches(),
    "packed": Packed(),
    "native": Native(),
}

_registered: dict[str, uuid.UUID] = {}


class ByContraction(NamedTuple):
    """The implementation that is asked for of each contraction, or None."""

    fprop: str | None = None
    dgrad: str | None = None
    wgrad: str | None = None


Implementation = str | Mapping[str, str | None] | ByContraction | None
"""What `implementation=` takes: a name, a name for some contractions, or None."""

Asked = str | ByContraction | None
"""An `Implementation` that has been checked, and can be hashed."""


def implementations() -> tuple[str, ...]:
    """Returns the names that `implementation=` takes.

    >>> import grouped_conv_jax
    >>> grouped_conv_jax.implementations()
    ('xla', 'lax', 'vmap', 'dense', 'einsum', 'taps', 'patches', 'packed', 'native')
    """
    return tuple(TABLE)


def register(name: str, algorithm: Algorithm) -> None:
    """Adds an algorithm to those that `implementation=`, `explain` and `tune` know.

    Register it before programs are compiled: JAX keeps what it has compiled, with the algorithms
    that were chosen then. Programs that several devices share under plain `jit` are not found in a
    persistent compilation cache by another process, since the algorithm may have changed.

    Args:
      name: a name that is not taken, an identifier of Python.
      algorithm: an instance of a subclass of `Algorithm`.

    Raises:
      ValueError: the name is taken, or is no identifier; or the algorithm has no contraction.
      TypeError: the name is no string, or the algorithm is no `Algorithm`.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {shown(name)}")
    if not name.isidentifier():
        raise ValueError(f"name must be an identifier such as 'winograd', got {shown(name)}")
    if name in TABLE:
        raise ValueError(f"there is an implementation {name!r} already")
    if not isinstance(algorithm, Algorithm):
        raise TypeError(
            "algorithm must be an instance of a subclass of grouped_conv_jax.algorithms.Algorithm, "
            f"got {shown(algorithm)}"
        )
    if not any(algorithm.has(contraction) for contraction in get_args(Contraction)):
        raise ValueError("algorithm must override at least one of fprop, dgrad and wgrad")
    TABLE[name] = algorithm
    _registered[name] = uuid.uuid4()


def registered_key() -> str:
    """Returns a text for compilation caches that differs where a program registers algorithms."""
    return ",".join(f"{name}:{number}" for name, number in _registered.items())


def parsed(implementation: Any) -> Asked:
    """Checks what `implementation=` was given, and makes it hashable.

    Raises:
      TypeError: it is no name and no mapping.
      ValueError: a name or a contraction is unknown.
    """
    if isinstance(implementation, ByContraction):
        implementation = implementation._asdict()
    if not isinstance(implementation, Mapping):
        _check_name(implementation)
        return implementation
    if unknown := [key for key in implementation if key not in ByContraction._fields]:
        raise ValueError(
            f"unknown contraction {shown(unknown[0])} in implementation; "
            f"known: {', '.join(ByContraction._fields)}"
        )
    for name in implementation.values():
        _check_name(name)
    return ByContraction(**implementation) if any(implementation.values()) else None


def _check_name(name: Any) -> None:
    if name is not None and not isinstance(name, str):
        raise TypeError(
            "implementation must be a name, a mapping from contractions to names, or None, got "
            f"{type(name).__name__}"
        )
    if name is not None and find(name) is None:
        raise ValueError(f"unknown implementation {name!r}; known: {', '.join(TABLE)}, or None")


def find(name: str) -> Algorithm | None:
    """Returns the algorithm of an implementation, with or without a config, or None."""
    return TABLE.get(name.partition(":")[0])


def asked_for(implementation: Asked, contraction: Contraction) -> str | None:
    """Returns the name that was asked for of a contraction, or None."""
    if isinstance(implementation, ByContraction):
        return getattr(implementation, contraction)
    return implementation


def unsupported(
    name: str,
    contraction: Contraction,
    spec: ConvSpec,
    device: Device,
    is_export: bool = False,
) -> str | None:
    """Returns None if an implementation computes a contraction here, else the reason why not."""
    base, _, config = name.partition(":")
    algorithm = TABLE[base]
    if not algorithm.has(contraction):
        return f"it has no {contraction}"
    if is_export and not algorithm.is_exportable:
        return "what jax.export makes must run without this package"
    if spec.has_dot_algorithm and not algorithm.takes_dot_algorithm:
        return f"it has no such algorithm as precision={spec.precision}"
    if reason := algorithm.supports(contraction, spec, device):
        return reason
    if config and config not in (known := algorithm.configs(contraction, spec, device)):
        return f"it has no config {config!r}, it has {', '.join(map(repr, known)) or 'none'}"
    return None


def variants(name: str, contraction: Contraction, spec: ConvSpec, device: Device) -> list[str]:
    """Returns an implementation, and the implementation with each of its configs."""
    configs = TABLE[name].configs(contraction, spec, device)
    return [name, *(f"{name}:{config}" for config in configs)]


def compute(
    name: str,
    contraction: Contraction,
    first: jax.Array,
    second: jax.Array,
    spec: ConvSpec,
    device: Device,
) -> jax.Array:
    """Computes a contraction by a named implementation that supports it."""
    base, _, config = name.partition(":")
    algorithm = TABLE[base]
    method = getattr(algorithm, contraction)
    if not config:
        return method(first, second, spec)
    return method(first, second, spec, algorithm.configs(contraction, spec, device)[config])
