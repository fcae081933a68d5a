"""Models, tiers and prices: TOML files of named entries, each read strictly as one dataclass."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from harness.errors import UsageError, unknown_name
from harness.untrusted import read_toml

T = TypeVar("T")


def read_catalogue(path: Path, kind: type[T]) -> dict[str, T]:
    """Entries of a TOML file by name; every table is one ``kind`` whose field ``name`` is the table's own name.

    Raises `UsageError` (a hand-written file is part of what was asked) when the file cannot be read, an entry has an
    unknown key, lacks one, or holds a value of the wrong type: a mistyped key must not silently become a default.
    """
    tables = read_toml(path)
    assert dataclasses.is_dataclass(kind)
    hints = get_type_hints(kind)
    # TOML has no null: a key that may be null is null when it is absent.
    required = [field.name for field in dataclasses.fields(kind) if field.default is MISSING]
    nulls = {name: None for name in required if NoneType in get_args(hints[name])}
    entries: dict[str, T] = {}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UsageError(f"{path}: {name!r} is not a table; write [{name}]")
        _refuse_unknown_keys(f"{path}: [{name}]", table, kind)
        try:
            entries[name] = msgspec.convert({**nulls, **table, "name": name}, kind)
        except msgspec.ValidationError as e:
            raise UsageError(f"{path}: [{name}]: {e}") from e
    return entries


def own_catalogue(kind: str) -> Path:
    """Where the user's own ``tiers`` or ``models`` are: $HARNESS_TIERS or the like, else in ~/.config/harness."""
    if named := os.environ.get(f"HARNESS_{kind.upper()}"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "harness" / f"{kind}.toml"


def _refuse_unknown_keys(where: str, table: Mapping[str, object], kind: Any, skip: str = "name") -> None:
    """Look into tables in the table too: ``x = {...}``, ``[[x]]`` and ``[x.any-name]``, as the field's type says."""
    hints = get_type_hints(kind)
    keys = {field.name for field in dataclasses.fields(kind)} - {skip}
    for key, value in table.items():
        if key not in keys:
            raise UsageError(f"{where}: {unknown_name('key', key, keys)}")
        inner = next((arg for arg in get_args(hints[key]) if dataclasses.is_dataclass(arg)), None)
        if inner is None:
            continue
        if get_origin(hints[key]) is dict and isinstance(value, dict):
            parts = [(f"{key}.{label}", part) for label, part in value.items()]
        else:
            parts = [(key, part) for part in (value if isinstance(value, list) else [value])]
        for label, part in parts:
            if isinstance(part, dict):
                _refuse_unknown_keys(f"{where}: [{label}]", part, inner, skip="")
