"""Holds a parsed file against the schema, key by key: every problem is named by its path, and all come at once."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from typing import Any, get_args

import msgspec
from msgspec import inspect

from edge.config.problem import Problem, shown


def problems(struct: type[msgspec.Struct], table: dict[str, Any], path: str = "") -> Iterator[Problem]:
    """What in `table` does not fit `struct`: unknown keys, wrong types, values out of range."""
    known = {field.encode_name: field.type for field in msgspec.structs.fields(struct)}
    for key, value in table.items():
        here = f"{path}.{key}" if path else key
        if key not in known:
            yield Problem(key=here, expected=_nearest(key, known), found="an unknown key")
        elif (section := section_type(known[key])) is not None:
            if isinstance(value, dict):
                yield from problems(section, value, here)
            else:
                yield Problem(key=here, expected="a table", found=shown(value))
        else:
            yield from _leaf(known[key], value, here)


def merged(default: dict[str, Any], table: dict[str, Any], struct: type[msgspec.Struct]) -> dict[str, Any]:
    """`default` with the keys of `table` put over it, section by section; lists and free tables are replaced whole."""
    result = dict(default)
    for field in msgspec.structs.fields(struct):
        key = field.encode_name
        if key in table:
            section = section_type(field.type)
            result[key] = merged(default[key], table[key], section) if section else table[key]
    return result


def section_type(annotation: Any) -> type[msgspec.Struct] | None:
    """The struct behind a field's annotation, or None for a plain value."""
    bare = get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation
    return bare if isinstance(bare, type) and issubclass(bare, msgspec.Struct) else None


def _nearest(key: str, known: dict[str, Any]) -> str:
    """What to write instead of an unknown key."""
    close = difflib.get_close_matches(key, known, n=1)
    return f"{close[0]} (did you mean that?)" if close else "one of " + ", ".join(known)


def _leaf(annotation: Any, value: Any, path: str) -> Iterator[Problem]:
    """The problem with one plain value, if it has one. TOML's nan and inf fit no key."""
    wrong = isinstance(value, float) and not math.isfinite(value)
    try:
        msgspec.convert(value, annotation, strict=True)
    except msgspec.ValidationError:
        wrong = True
    if wrong:
        yield Problem(key=path, expected=described(inspect.type_info(annotation)), found=shown(value))


def described(info: inspect.Type) -> str:
    """A type as a person would say it: 'a whole number from 1 to 65535'."""
    match info:
        case inspect.Metadata(type=inspect.IntType(ge=int(least), le=int(most)), extra={"form": "octal"}):
            return f"an octal number from {least:#o} to {most:#o}, written with 0o"
        case inspect.Metadata(type=inner):
            return described(inner)
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType():
            return "a whole number" + _range(info)
        case inspect.FloatType():
            return "a number" + _range(info)
        case inspect.LiteralType(values=values):
            return " or ".join(f'"{v}"' if isinstance(v, str) else str(v) for v in values)
        case inspect.StrType(pattern=str(pattern)):
            return f"a string that matches {pattern}"
        case inspect.StrType(max_length=int(longest)):
            return f"a string of at most {longest} characters"
        case inspect.StrType():
            return "a string"
        case inspect.VarTupleType(item_type=item) | inspect.ListType(item_type=item):
            return f"a list ({_count(info)}), each {described(item)}"
        case inspect.DictType(value_type=value):
            return f"a table, each value {described(value)}"
        case inspect.UnionType(types=types):
            return " or ".join(described(t) for t in types if not isinstance(t, inspect.NoneType))
        case _:
            return type(info).__name__.removesuffix("Type").lower()


def _range(info: inspect.IntType | inspect.FloatType) -> str:
    """The bounds of a number: ' from 1 to 9', ' above 0', nothing where it has none."""
    low = (
        f" from {_plain(info.ge)}"
        if info.ge is not None
        else f" above {_plain(info.gt)}"
        if info.gt is not None
        else ""
    )
    high = (
        f" to {_plain(info.le)}" if info.le is not None else f" below {_plain(info.lt)}" if info.lt is not None else ""
    )
    return low + (" up" if low and high and info.ge is None else "") + high


def _plain(number: float) -> str:
    """A bound without exponent or empty decimals."""
    return str(int(number)) if number == int(number) else str(number)


def _count(info: inspect.VarTupleType | inspect.ListType) -> str:
    """How many items a list may have."""
    low, high = info.min_length or 0, info.max_length
    return f"{low} to {high} items" if high is not None else f"at least {low} items"
