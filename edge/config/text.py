"""The default configuration as a commented TOML file, written from the schema, so that the two cannot disagree."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Meta

from edge.config.schema import Config
from edge.config.types import section_type
from edge.parameters import OCTAL, Limit

WIDTH = 100
INLINE = (Limit,)
"""Structs written on one line, `{ rate_per_min = 600.0, burst = 300 }`, their own description behind them."""


def default_text() -> str:
    """A complete file: every key with its description and its default. Loading it gives `Config()`."""
    lines = [*_comment(inspect.getdoc(Config) or ""), *_table(Config(), "")]
    return "\n".join(lines).strip() + "\n"


def _table(value: msgspec.Struct, path: str) -> Iterator[str]:
    """The keys of one section, then the sections below it."""
    below: list[tuple[msgspec.structs.FieldInfo, msgspec.Struct]] = []
    own = inspect.get_annotations(type(value))
    for field in sorted(msgspec.structs.fields(value), key=lambda f: f.name not in own):  # a section's own keys first
        content = getattr(value, field.name)
        if isinstance(content, INLINE):
            yield from _inline(field.encode_name, content, _description(field.type))
        elif isinstance(content, msgspec.Struct):
            below.append((field, content))
        else:
            text = f"{content:#o}" if _is_octal(field.type) else _value(content)
            yield from ("", *_comment(_description(field.type)), f"{field.encode_name} = {text}")
    for field, content in below:
        here = f"{path}.{field.encode_name}" if path else field.encode_name
        text = _description(field.type) or inspect.getdoc(type(content)) or ""
        yield from ("", "", *_comment(text))
        if _has_keys(content):
            yield f"[{here}]"
        yield from _table(content, here)


def _has_keys(value: msgspec.Struct) -> bool:
    """Whether a section holds anything but further sections."""
    return any(section_type(f.type) is None or section_type(f.type) in INLINE for f in msgspec.structs.fields(value))


def _description(annotation: Any) -> str:
    """The text of a field's Meta; empty where it has none."""
    metas = [m for m in getattr(annotation, "__metadata__", ()) if isinstance(m, Meta) and m.description]
    return str(metas[-1].description) if metas else ""


def _is_octal(annotation: Any) -> bool:
    return any(isinstance(m, Meta) and m.extra == OCTAL for m in getattr(annotation, "__metadata__", ()))


def _comment(text: str) -> list[str]:
    """A text as comment lines; blank lines keep paragraphs apart."""
    lines: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n") if text else []:
        if lines:
            lines.append("#")
        lines += textwrap.wrap(
            " ".join(paragraph.split()), WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
        )
    return lines


def _value(value: object) -> str:
    """One value in TOML; JSON's strings are TOML's basic strings."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:_}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_value(str(k))} = {_value(v)}" for k, v in value.items()) + " }" if value else "{}"
    if isinstance(value, tuple | list | frozenset):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    raise TypeError(f"a default of type {type(value).__name__} has no form in TOML")


def _inline(key: str, value: msgspec.Struct, text: str) -> list[str]:
    """A struct on one line, with its description behind it where that fits."""
    fields = msgspec.structs.fields(value)
    line = f"{key} = {{ " + ", ".join(f"{f.encode_name} = {_value(getattr(value, f.name))}" for f in fields) + " }"
    beside = f"{line}  # {text}"
    return [beside] if len(beside) <= WIDTH else ["", *_comment(text), line]
