"""One thing that is wrong with a configuration: which key, what was expected, what was found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """`key` is the path from the top of the file (limits.mx.new.64.burst). A warning does not stop the daemon."""

    key: str
    expected: str
    found: str
    warning: bool = False

    def __str__(self) -> str:
        return f"{self.key}: expected {self.expected}, found {self.found}"


def shown(value: object) -> str:
    """A value as the message shows it: TOML's word for booleans and tables, cut where it is long."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else text[:77] + "..."
