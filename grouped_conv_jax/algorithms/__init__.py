"""The ways to compute a contraction, one module each.

An implementation is a module with any of three functions,

    fprop(lhs, rhs, spec) -> out      dgrad(out, rhs, spec) -> lhs      wgrad(lhs, out, spec) -> rhs

(arrays in the layouts of `spec`, the results in its shapes and dtypes; no array is empty), and

    supports(contraction, spec, platform) -> None, or the reason why not

and, to be chosen without being asked for,

    seconds(contraction, spec) -> what it is expected to take on a CPU (see `costs`)
    temporary_bytes(contraction, spec) -> what XLA stores there beside the operands and the result
        (see `memory`), at most; 0 if there is no such function

where `platform` is "cpu", "cuda", "rocm", "tpu" or "another platform". If it compiles to a call of
code that is not part of the program, it says `IS_EXPORTABLE = False`; if it multiplies otherwise
than by XLA's convolutions, `CONVOLVES_BY_XLA = False`. It knows nothing of differentiation, vmap,
sharding or of when it is chosen. To add one: write the file, and a line with its name in `TABLE`.
"""

import importlib
from types import ModuleType

from grouped_conv_jax.spec import Contraction, ConvSpec

TABLE: dict[str, ModuleType] = {
    name: importlib.import_module(f"{__name__}.{name}")
    for name in (
        "xla",
        "lax",
        "vmap",
        "dense",
        "einsum",
        "taps",
        "patches",
        "packed",
        "native",
    )
}


def implementations() -> tuple[str, ...]:
    """The names that `implementation=` takes.

    >>> import grouped_conv_jax
    >>> grouped_conv_jax.implementations()
    ('xla', 'lax', 'vmap', 'dense', 'einsum', 'taps', 'patches', 'packed', 'native')
    """
    return tuple(TABLE)


def check_name(name: str | None) -> None:
    """Raises TypeError or ValueError unless `name` is in the table, or None."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"implementation must be a name or None, got {type(name).__name__}")
    if name is not None and name not in TABLE:
        raise ValueError(f"unknown implementation {name!r}; known: {', '.join(TABLE)}, or None")


def unsupported(
    name: str,
    contraction: Contraction,
    spec: ConvSpec,
    platform: str,
    is_export: bool = False,
) -> str | None:
    """None if the implementation computes this contraction here, else the reason why not."""
    module = TABLE[name]
    if not hasattr(module, contraction):
        return f"it has no {contraction}"
    if is_export and not getattr(module, "IS_EXPORTABLE", True):
        return "what jax.export makes must run without this package"
    if spec.has_dot_algorithm and not getattr(module, "CONVOLVES_BY_XLA", True):
        return f"it has no such algorithm as precision={spec.precision}"
    return module.supports(contraction, spec, platform)
