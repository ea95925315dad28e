"""Settings from a file: each is known and of the right type, or the nearest one is named."""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import dacite

from alexnet.errors import UsageError

Settings = TypeVar("Settings")


def checked(cls: type[Settings], settings: Any, path: Path) -> Settings:
    """A dataclass of settings, from what JSON has made of them.

    Args:
      cls: whose settings all have defaults.
      settings: what was read.
      path: where, for messages.

    Raises:
      UsageError: one of them is unknown, and which is nearest to it; or it is of a wrong type.
    """
    hooks: Mapping[Any, Any] = {Path: lambda x: Path(x) if isinstance(x, str) else x}
    try:
        return dacite.from_dict(
            cls, settings, dacite.Config(strict=True, cast=[tuple], type_hooks=hooks)
        )
    except dacite.UnexpectedDataError as error:
        unknown = min(error.keys)
        known = {name: where for where in _paths(cls) for name in (where, where.rpartition(".")[2])}
        nearest = known[_nearest(unknown, known)]
        raise UsageError(f'{path}: unknown setting "{unknown}"; the nearest is "{nearest}"') from (
            error
        )
    except dacite.WrongTypeError as error:
        if get_origin(error.field_type) is Literal:
            nearest = _nearest(str(error.value), get_args(error.field_type))
            raise UsageError(
                f'{path}: unknown {error.field_path} "{error.value}"; the nearest is "{nearest}"'
            ) from error
        raise UsageError(f"{path}: {error}") from error
    except (dacite.DaciteError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path}: {error}") from error


def _nearest(word: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(word, known, n=1, cutoff=0)[0]


def _paths(cls: type[Any]) -> Iterator[str]:
    """Every setting and every part as a file has it, such as "recipe" and "recipe.momentum"."""
    for name, value in vars(cls()).items():
        yield name
        if dataclasses.is_dataclass(value):
            yield from (f"{name}.{field.name}" for field in dataclasses.fields(value))
