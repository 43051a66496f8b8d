"""Settings as JSON, checked key by key on the way back."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from pymm.training.errors import SettingsError

T = TypeVar("T")


# Files without a task are CLIP's: they are older than the other tasks.
_FIRST = "clip"


def to_json(settings: Any) -> str:
    """The settings, with the name of their task in front; CLIP's files carry none."""
    task = getattr(settings, "task", _FIRST)
    name = {} if task == _FIRST else {"task": task}
    return json.dumps(name | dataclasses.asdict(settings), indent=2) + "\n"


def task_in(path: Path) -> str:
    """The name of the task that a settings file is of.

    Raises:
        FileNotFoundError, SettingsError: as `load_settings`.
    """
    values = _read(path)
    return str(values.get("task", _FIRST)) if isinstance(values, dict) else _FIRST


def load_settings(cls: type[T], path: Path | str) -> T:
    """Read settings that `to_json` wrote.

    Args:
        cls: the dataclass.
        path: the file.

    Raises:
        FileNotFoundError: when there is no file.
        SettingsError: for a file that is no JSON object or of another task, an unknown key (it names the
            nearest valid ones), a missing key that has no default, or a value of the wrong type.
    """
    path = Path(path)
    values, task = _read(path), getattr(cls, "task", None)
    if task is not None and isinstance(values, dict):
        found = values.pop("task", task)
        if found != task:
            raise SettingsError(f"{path}: settings must be of the task {task}, got {found}")
    return from_dict(cls, values, str(path))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(f"{path}: not JSON: {error}") from error


def from_dict(
    cls: type[T], values: Any, where: str = "settings", prefix: str = "", default: T | None = None
) -> T:
    """Build the dataclass `cls` from nested dictionaries; `where` begins every error.

    What the dictionaries leave out is that of `default`, or the class's own.
    """
    if not isinstance(values, dict):
        raise SettingsError(f"{where}: {prefix.rstrip('.') or 'settings'} must be an object, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    types_of = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise SettingsError(
                f"{where}: unknown key {prefix}{key!s}; {_nearest(key, list(fields), prefix)}"
            )
    defaults = {
        name: _default(f) if default is None else getattr(default, name) for name, f in fields.items()
    }
    for name, known in defaults.items():
        if name not in values and known is dataclasses.MISSING:
            raise SettingsError(f"{where}: the key {prefix}{name} is missing")
    given = {key: _value(types_of[key], values[key], where, prefix + key, defaults[key]) for key in values}
    return cls(**given) if default is None else dataclasses.replace(default, **given)  # type: ignore[type-var]


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _nearest(key: str, valid: list[str], prefix: str) -> str:
    close = difflib.get_close_matches(key, valid, n=3, cutoff=0.5)
    if close:
        return f"nearest: {', '.join(prefix + name for name in close)}"
    return f"valid: {', '.join(prefix + name for name in sorted(valid))}"


def _value(kind: Any, value: Any, where: str, key: str, default: Any = None) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        section = default if isinstance(default, typing.cast(type, kind)) else None
        return from_dict(typing.cast(type, kind), value, where, f"{key}.", section)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        problems = []
        for other in (a for a in arguments if a is not type(None)):
            try:
                return _value(other, value, where, key)
            except SettingsError as error:
                problems.append(error)
        raise problems[0]
    if origin is Literal:
        if any(value == a and type(value) is type(a) for a in arguments):
            return value
        raise SettingsError(f"{where}: {key} must be one of {', '.join(map(repr, arguments))}, got {value!r}")
    if origin is tuple:
        if isinstance(value, list) and (arguments[-1] is Ellipsis or len(value) == len(arguments)):
            each = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
            return tuple(
                _value(t, v, where, f"{key}[{i}]") for i, (t, v) in enumerate(zip(each, value, strict=True))
            )
        length = "a list" if arguments[-1] is Ellipsis else f"a list of {len(arguments)}"
        raise SettingsError(f"{where}: {key} must be {length}, got {value!r}")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise SettingsError(f"{where}: {key} must be of type {kind.__name__}, got {value!r}")
    return value
