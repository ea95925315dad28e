"""Keeps tracers out of what a function can write to beside its arguments."""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.core import Tracer


class _Place(NamedTuple):
    """Something that code can write to.

    Attributes:
      name: for messages.
      read: returns its values by name or number.
      write: takes back the values that `read` has returned.
    """

    name: str
    read: Callable[[], dict[Any, Any]]
    write: Callable[[dict[Any, Any]], object]


@contextlib.contextmanager
def kept_state(call: Any) -> Iterator[None]:
    """Restores the state that has got tracers in this context.

    The state is that of the variables that the functions of the call close over or read from their
    module, and that of objects, lists and dictionaries among the arguments, in the variables and in
    attributes. Modules of Flax nnx refuse changes by themselves.

    Raises:
      ValueError: there were tracers.
    """
    places = list(_places("an argument", jax.tree.leaves(call), set()))
    before = [place.read() for place in places]
    changed: dict[str, None] = {}
    try:
        yield
    finally:
        for place, old in zip(places, before, strict=True):
            now = place.read()
            new = [value for key, value in now.items() if old.get(key) is not value]
            if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(new)):
                place.write(old)
                changed[place.name] = None
    if changed:
        raise ValueError(
            f"the function changes {' and '.join(changed)}, so tracing it would leave tracers "
            "there; pass the old value as an argument and return the new one"
        )


def _places(name: str, x: Any, seen: set[int]) -> Iterator[_Place]:
    """Yields what code can write to that has an object by a name."""
    if id(x) in seen:
        return
    seen.add(id(x))
    if isinstance(x, types.MethodType):
        yield from _places(name, [x.__self__, x.__func__], seen)
    elif isinstance(x, functools.partial):
        yield from _places(name, [x.func, x.args, x.keywords], seen)
    elif isinstance(x, types.FunctionType):
        yield from _variables(x, seen)
    elif isinstance(inner := getattr(x, "__wrapped__", None), types.FunctionType):
        yield from _places(name, inner, seen)  # By `jax.jit`, for example.
    elif isinstance(x, list | tuple):
        if isinstance(x, list):
            yield _Place(name, lambda: dict(enumerate(x)), functools.partial(_refill_list, x))
        for value in x:
            yield from _places(name, value, seen)
    elif isinstance(x, dict):
        yield _Place(name, x.copy, functools.partial(_refill, x))
        for value in x.values():
            if isinstance(value, list | dict):
                yield from _places(name, value, seen)
    elif hasattr(x, "__dict__") and not isinstance(x, types.ModuleType | type):
        yield from _places(f"an attribute of the {type(x).__name__}", vars(x), seen)


def _variables(function: types.FunctionType, seen: set[int]) -> Iterator[_Place]:
    """Yields what a function can write to by the names of variables outside it."""
    code, module = function.__code__, function.__globals__
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    places = [_cell(f"the variable {name!r}", cell) for name, cell in cells]
    places += [_global(f"the variable {name!r}", module, name) for name in code.co_names]
    for place in places:
        yield place
        for value in place.read().values():
            # Functions of other modules are libraries, whose variables are their own affair.
            if getattr(value, "__globals__", module) is module:
                yield from _places(place.name, value, seen)


def _cell(named: str, cell: types.CellType) -> _Place:
    """Returns the place of a variable that a function closes over."""

    def read() -> dict[Any, Any]:
        try:
            return {"": cell.cell_contents}
        except ValueError:  # It has no value yet.
            return {}

    def write(old: dict[Any, Any]) -> None:
        if old:
            cell.cell_contents = old[""]
        else:
            del cell.cell_contents

    return _Place(named, read, write)


def _global(named: str, module: dict[str, Any], name: str) -> _Place:
    """Returns the place of a variable of a module."""

    def write(old: dict[Any, Any]) -> None:
        module.pop(name, None)
        module.update(old)

    return _Place(named, lambda: {name: module[name]} if name in module else {}, write)


def _refill(x: dict[Any, Any], old: dict[Any, Any]) -> None:
    x.clear()
    x.update(old)


def _refill_list(x: list[Any], old: dict[int, Any]) -> None:
    x[:] = old.values()
