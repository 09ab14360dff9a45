"""Configuration: one strict schema, every key documented and defaulted, read from TOML.

Invariants:
    defaults-load: the file that `print_defaults` writes loads to the defaults.
    every-key-is-described: no key of the schema lacks a description.
    all-problems-at-once: a message names every wrong key, each with its path, what was expected and what was found.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec

from edge.config.checks import listen_address, problems
from edge.config.problem import Problem
from edge.config.schema import Config
from edge.config.text import default_text
from edge.config.types import merged
from edge.config.types import problems as type_problems
from edge.errors import ConfigError

__all__ = ["DEFAULT_PATH", "Config", "Problem", "default_text", "listen_address", "load", "parse", "warnings"]

DEFAULT_PATH = Path("/etc/edge/edge.toml")
LARGEST_BYTES = 1 << 20
"""A longer file is not a configuration (4096 exempt prefixes take 200 KiB)."""


def load(path: Path | None) -> Config:
    """Read a file; ConfigError names it and everything wrong in it.

    None reads /etc/edge/edge.toml when it is there, and gives the defaults (which refuse nothing) when it is not.
    """
    given, path = path, path or DEFAULT_PATH
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_BYTES + 1)
    except OSError as error:
        if given is None and isinstance(error, FileNotFoundError):
            return Config()
        raise ConfigError(f"{path}: expected a readable file, found: {error.strerror}") from error
    if len(content) > LARGEST_BYTES:
        raise ConfigError(f"{path}: expected at most {LARGEST_BYTES} bytes, found more")
    return parse(content, str(path))


def parse(content: bytes, name: str) -> Config:
    """Read the bytes of a file; `name` is how messages call it."""
    try:
        table: dict[str, Any] = tomllib.loads(content.decode())
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{name}: expected UTF-8 text, found byte {content[error.start]:#04x} (at line {line})"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: expected TOML, found: {error}") from None
    except RecursionError:
        raise ConfigError(f"{name}: expected TOML, found lists or tables nested too deep") from None
    _refuse(name, list(type_problems(Config, table)))
    config = msgspec.convert(merged(msgspec.to_builtins(Config()), table, Config), Config)
    _refuse(name, [problem for problem in problems(config) if not problem.warning])
    return config


def warnings(config: Config) -> list[Problem]:
    """What is allowed and will probably hurt."""
    return [problem for problem in problems(config) if problem.warning]


def _refuse(name: str, found: list[Problem]) -> None:
    """Raise when there is a problem: one on the file's own line, several below it."""
    if len(found) == 1:
        raise ConfigError(f"{name}: {found[0]}")
    if found:
        raise ConfigError(f"{name}: {len(found)} problems\n" + "\n".join(f"  {problem}" for problem in found))
