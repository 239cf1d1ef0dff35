"""Settings of a part: its constructor's keyword arguments, checked by name and type."""

import inspect
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, get_args

from huggingface_hub.dataclasses import type_validator


def settings_of(part: type) -> dict[str, inspect.Parameter]:
    """List the settings of a part, with real types: what follows ``d_model`` in its constructor."""
    parameters = inspect.signature(part.__init__, eval_str=True).parameters  # type: ignore[misc]
    return {key: p for key, p in parameters.items() if key not in ("self", "d_model")}


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` where a known name is near, else nothing."""
    near = get_close_matches(word.lower(), list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def check_type(key: str, value: Any, expected: Any) -> Any:
    """Return ``value`` if it has the expected type; whole numbers serve as floats.

    Raises:
        TypeError: If it has another type.
    """
    kinds = get_args(expected) or (expected,)
    if type(value) is int and float in kinds and int not in kinds:
        value = float(value)
    try:
        if isinstance(value, bool) and bool not in kinds and value not in kinds:
            raise TypeError  # a bool is an int to Python
        type_validator(key, value, expected)
    except (TypeError, ValueError):
        wanted = expected.__name__ if isinstance(expected, type) else str(expected)
        raise TypeError(
            f"{key}: expected {wanted.replace('typing.', '')}, "
            f"got {type(value).__name__} {value!r}."
        ) from None
    return value


def lookup(table: Mapping[str, type], name: str, kind: str) -> type:
    """Find a part by name.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in table:
        known = ", ".join(sorted(table))
        raise ValueError(f"no {kind} named {name!r}{suggestion(name, table)}; there are {known}.")
    return table[name]


def resolve(table: Mapping[str, type], entry: Any, kind: str) -> dict[str, Any]:
    """Write out all settings of a part, as plain data.

    Args:
        table: Parts by name.
        entry: The part's name, or a mapping of its ``name`` and settings.
        kind: What the table holds, for messages.

    Raises:
        ValueError: If the name or a key is unknown, or a setting without default is missing.
        TypeError: If a value has the wrong type.
    """
    entry = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise TypeError(
            f"a {kind} is a name, or a mapping with 'name' and settings; got {entry!r}."
        )
    name = entry["name"]
    settings = settings_of(lookup(table, name, kind))
    for key in entry.keys() - settings.keys() - {"name"}:
        raise ValueError(f"{kind} {name!r} has no setting {key!r}{suggestion(key, settings)}.")
    resolved: dict[str, Any] = {"name": name}
    for key, parameter in settings.items():
        value = entry.get(key, parameter.default)
        if value is inspect.Parameter.empty:
            raise ValueError(f"{kind} {name!r} needs its setting {key!r}.")
        resolved[key] = check_type(f"{name}.{key}", value, parameter.annotation)
    return resolved


def build(table: Mapping[str, type], entry: Any, d_model: int, kind: str) -> Any:
    """Make the part that an entry describes, see :func:`resolve`."""
    resolved = resolve(table, entry, kind)
    return table[resolved.pop("name")](d_model, **resolved)
