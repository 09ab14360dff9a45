"""Log lines: one event a line, to standard error or the journal, with fields as key=value.

    2026-11-22T08:12:03.123Z warning kernel.nft: sets drifted missing=3 table=edge
    <4>kernel.nft: sets drifted missing=3 table=edge            (under systemd: it keeps time and unit itself)

Code logs `log.warning("sets drifted", extra={"fields": {"missing": 3}})`.

Invariants:
    one-event-one-line: whatever a message, field or traceback holds, one line comes out.
    no-control-characters: nothing from outside reaches a terminal or another log line as a control character.
    line-is-bounded: no line is longer than LONGEST_LINE characters.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import TextIO

LONGEST_LINE = 8192
"""Characters; the journal splits lines above 48 KiB (LineMax of journald.conf), and nobody reads this much."""

_PRIORITY = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
"""Least level for each priority of syslog(3); what lies below is 7 (debug)."""


def configure(level: str, stream: TextIO | None = None, environ: Mapping[str, str] = os.environ) -> None:
    """Send the project's log to `stream` (default: standard error) at `level`; called once, by a command's main."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter(journal=goes_to_journal(stream, environ)))
    logger = logging.getLogger("edge")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def goes_to_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether a stream is the journal's: JOURNAL_STREAM names its device and inode (systemd.exec(5)).

    The variable alone proves nothing: it is inherited by whatever a service starts with its output sent elsewhere.
    """
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class LineFormatter(logging.Formatter):
    """Formats one record as one line; with `journal`, an sd-daemon(3) priority stands in for time and level."""

    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its newline."""
        fields = dict(getattr(record, "fields", None) or {})
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        name = record.name.removeprefix("edge.")
        text = f"{name}: {printable(record.getMessage())}" + "".join(
            f" {printable(str(key))}={quoted(value)}" for key, value in fields.items()
        )
        if len(text) > LONGEST_LINE:
            text = text[: LONGEST_LINE - 4] + " ..."
        return self._prefix(record) + text

    def _prefix(self, record: logging.LogRecord) -> str:
        if self._journal:
            return f"<{next((p for level, p in _PRIORITY if record.levelno >= level), 7)}>"
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return f"{moment}.{int(record.msecs):03d}Z {record.levelname.lower()} "


def printable(text: str) -> str:
    """Text with every character that a terminal or a log reader would act on shown as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def quoted(value: object) -> str:
    """A field's value: bare where it is one word, else in double quotes with quotes and backslashes escaped."""
    if isinstance(value, float):
        return str(round(value, 6))
    text = str(value)
    if text and text.isprintable() and not any(c in text for c in ' "=\\'):
        return text
    return '"' + printable(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'
