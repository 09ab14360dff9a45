"""Jinja filter `edge_toml`: a nested dictionary as TOML text.

Invariant: what tomllib reads from the text equals the dictionary.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

BARE_KEY = re.compile(r"[A-Za-z0-9_-]+\Z")


class FilterModule:
    """What Ansible looks for in a file of filters."""

    def filters(self) -> dict[str, Callable[..., str]]:
        """The filters of this file by name."""
        return {"edge_toml": edge_toml}


def edge_toml(value: Mapping[str, Any]) -> str:
    """TOML text of a dictionary; a value that TOML cannot hold is a ValueError that names its key."""
    if not isinstance(value, Mapping):
        raise ValueError(f"edge_config: expected a dictionary, found {type(value).__name__}")
    return "\n".join(table(value, ())).lstrip("\n")


def table(value: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """The lines of one table: its plain values first, since a key after a sub-table's header would belong to that."""
    for name, item in value.items():
        if not (isinstance(item, Mapping) or is_array_of_tables(item)):
            yield f"{key(name, path)} = {inline(item, (*path, str(name)))}"
    for name, item in value.items():
        below = (*path, str(name))
        header = ".".join([*(key(part, path) for part in path), key(name, path)])
        if isinstance(item, Mapping):
            yield from ("", f"[{header}]", *table(item, below))
        elif is_array_of_tables(item):
            for row in item:
                yield from ("", f"[[{header}]]", *table(row, below))


def is_array_of_tables(value: object) -> bool:
    """A list of nothing but dictionaries, and not empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def key(name: object, path: tuple[str, ...]) -> str:
    """A key, quoted where it must be."""
    if not isinstance(name, str):
        raise ValueError(f"edge_config: below {'.'.join(path) or 'the top'}: expected a string as key, found {name!r}")
    return name if BARE_KEY.match(name) else string(name)


def string(value: str) -> str:
    """A basic string. JSON's escapes are a subset of TOML's, which wants DEL escaped too."""
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def inline(value: object, path: tuple[str, ...]) -> str:
    """A value on the right of an equals sign."""
    if isinstance(value, bool):  # before int, which it is as well
        return "true" if value else "false"
    if isinstance(value, str):
        return string(value)
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return repr(float(value)) if math.isfinite(value) else str(float(value))
    if isinstance(value, (datetime.datetime, datetime.date)):
        return value.isoformat()
    if isinstance(value, list):
        return "[" + ", ".join(inline(item, path) for item in value) + "]"
    if isinstance(value, Mapping):
        pairs = (f"{key(name, path)} = {inline(item, (*path, str(name)))}" for name, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    found = "null: leave the key out instead" if value is None else type(value).__name__
    raise ValueError(f"edge_config: {'.'.join(path)}: expected a TOML value, found {found}")
