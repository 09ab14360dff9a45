"""The errors of the project: one tree, each with the exit code it ends a command with.

    EdgeError                    70  internal: a defect of ours
    ├── UsageError               64  a command called wrongly
    ├── UnavailableError         69  kernel, nftables or daemon cannot do what was asked
    ├── ConfigError              78  configuration: names file, key, expectation, finding
    └── InputError               65  data from outside that was refused: names source and place

A message names the object, what was expected and what was found. Code tells errors apart by type,
never by text.
"""

from __future__ import annotations


class EdgeError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code = 70


class UsageError(EdgeError):
    """A command was called with arguments that make no sense."""

    exit_code = 64


class UnavailableError(EdgeError):
    """The kernel, nftables or the daemon cannot do what was asked; says what to do next."""

    exit_code = 69


class ConfigError(EdgeError):
    """The configuration cannot be used; nothing was touched."""

    exit_code = 78


class InputError(EdgeError):
    """One piece of outside data (line, packet, message) was refused; the rest goes on."""

    exit_code = 65
