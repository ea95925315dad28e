"""Kernels in C++ for CPUs, called by XLA: the library, if this installation has one.

The library is compiled when the package is installed (see build.py). Without it everything
works by the implementations that are made of JAX operations.
"""

import ctypes
import functools
from pathlib import Path

import jax

from grouped_conv_jax.spec import Contraction

CONTRACTIONS: tuple[Contraction, ...] = ("fprop", "dgrad", "wgrad")

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "library.so"
FAILURE = FOLDER / "failure.txt"
"""Why there is no library, as whoever tried to build it has noted."""


def target(contraction: Contraction) -> str:
    """The name under which XLA knows a contraction."""
    return f"grouped_conv_jax.{contraction}"


@functools.cache
def missing() -> str | None:
    """None if the library is there and XLA knows its functions, else the reason why not."""
    try:
        library = _library()
        for contraction in CONTRACTIONS:
            handler = jax.ffi.pycapsule(getattr(library, f"grouped_conv_{contraction}"))
            jax.ffi.register_ffi_target(target(contraction), handler, platform="cpu")
    except (OSError, AttributeError) as error:
        if FAILURE.exists():
            return FAILURE.read_text().strip()
        return f"the compiled library is not there ({error})"
    except Exception as error:
        return f"XLA does not take the compiled library ({error})"
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.cdll.LoadLibrary(str(LIBRARY))
    library.grouped_conv_instruction_set.restype = ctypes.c_char_p
    return library


def instruction_sets() -> tuple[str, ...]:
    """Those that the kernels are compiled for and that this processor has, the best first; none if
    there are no kernels.
    """
    return () if missing() else tuple(filter(None, _compiled_for()))


def _compiled_for() -> list[str]:
    """All of them, and "" for what this processor does not have."""
    names, library = [], _library()
    while (name := library.grouped_conv_instruction_set(len(names))) is not None:
        names.append(name.decode())
    return names


def instruction_set() -> str | None:
    """Returns the best instruction set that the kernels use, or None if there are no kernels.

    It is the first of `instruction_sets()`, unless `use_instruction_set` has named another one.
    """
    return _limit or next(iter(instruction_sets()), None)


_limit: str | None = None
"""The instruction set that `use_instruction_set` has named."""


def use_instruction_set(name: str) -> None:
    """From now on this one is the best that is used, in all calls of the process; to undo it, use
    the first of `instruction_sets()`.

    Measurements are valid for one instruction set (see `grouped_conv_jax.tune`). Functions that
    were compiled before keep the implementations that were chosen for them.

    Raises:
      ValueError: it is not one of `instruction_sets()`.
    """
    if name not in instruction_sets():
        raise ValueError(
            f"unknown instruction set {name!r}; known: {', '.join(instruction_sets())}"
        )
    global _limit
    _library().grouped_conv_use_instruction_set(_compiled_for().index(name))
    _limit = name
