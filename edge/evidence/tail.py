"""Follows a log file by polling: the lines added since the last look, through everything that happens to log files.

A file is known by its open descriptor, not by its name. A new file under the name (rename and create) is read from its
start, and the old one is read on for a while, because the syslog daemon writes to it until it is told to reopen. A file
that was cut (truncate, copytruncate) is read from its start again: the bytes just before the place we read from are
compared at every read, so a file that was cut and has already grown past that place is noticed too. What a
copytruncate cuts away between our last read and the cut is lost; with rename nothing is. At the first look a file that
exists is followed from its end: old lines are no news.

Invariants:
    never-blocks: one poll reads at most `bytes_per_poll` and waits for nothing.
    whole-lines-only: a line is given when its newline is there, once, and never joined across a cut.
    bounded-memory: no more than one poll's bytes and one longest line are held for each file, and at most
        `retired_files` old files.
"""

from __future__ import annotations

import logging
import os
import stat
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Protocol

import msgspec

from edge.core.model import Event
from edge.errors import InputError, UnavailableError
from edge.evidence.jsonl import at_line
from edge.evidence.stats import SourceStats

log = logging.getLogger(__name__)

_MARK_BYTES = 256
"""Bytes before the reading place that must still be there at the next read; two log lines, so they hold a time."""


class TailParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a log file is followed."""

    bytes_per_poll: Annotated[
        int,
        msgspec.Meta(
            ge=65_536,
            le=1 << 28,
            description="Bytes read in one poll; the rest waits for the next and shows as lag. 4 MiB are about 25 000 "
            "lines of Postfix.",
        ),
    ] = 4 << 20
    line_bytes: Annotated[
        int,
        msgspec.Meta(
            ge=1024,
            le=1 << 20,
            description="Longest line in bytes; longer ones are left out and counted. rsyslog's own limit is 8 KiB.",
        ),
    ] = 65_536
    linger_s: Annotated[
        float,
        msgspec.Meta(
            ge=0,
            le=3600,
            description="Seconds an old file is read on after a new one took its name; logrotate tells the syslog "
            "daemon to reopen only after that.",
        ),
    ] = 60.0
    retired_files: Annotated[
        int, msgspec.Meta(ge=1, le=64, description="Old files read on at the same time; the oldest is closed first.")
    ] = 4


class LineDecoder(Protocol):
    """What makes events of lines."""

    def feed(self, line: bytes, ts_s: float) -> Event | None:
        """One line without its newline; InputError when it cannot be used."""

    def counts(self) -> Mapping[str, int]:
        """Its totals by name."""

    def dropped(self) -> int:
        """Evidence it could not use."""


class _File:
    """One open file: where we are in it, and the beginning of a line whose end is not written yet."""

    def __init__(self, descriptor: int, *, at_end: bool) -> None:
        self.descriptor = descriptor
        status = os.fstat(descriptor)
        self.identity = (status.st_dev, status.st_ino)
        self.offset = 0
        self.mark = b""
        self.partial = b""
        self.skipping = False  # inside a line that is left out
        self.retired_s = 0.0
        self.cuts = 0
        self.long_lines = 0
        if at_end and status.st_size:
            self.offset = status.st_size
            self.mark = os.pread(descriptor, _MARK_BYTES, max(0, status.st_size - _MARK_BYTES))
            self.skipping = not self.mark.endswith(b"\n")

    def read(self, budget: int, line_bytes: int) -> tuple[list[bytes], int]:
        """(whole lines, bytes read), at most `budget` bytes."""
        start = self.offset - len(self.mark)
        data = os.pread(self.descriptor, len(self.mark) + budget, start)
        if not data.startswith(self.mark):
            self._rewind()
            data = os.pread(self.descriptor, budget, 0)
        fresh = data[len(self.mark) :]
        if not fresh:
            return [], 0
        self.offset += len(fresh)
        self.mark = data[-_MARK_BYTES:]
        if not fresh.strip(b"\0"):
            self._skip_hole()
            return [], len(fresh)
        return self._lines(fresh, line_bytes), len(fresh)

    def lag_bytes(self) -> int:
        return max(0, os.fstat(self.descriptor).st_size - self.offset)

    def _rewind(self) -> None:
        self.cuts += 1
        self.offset = 0
        self.mark = self.partial = b""
        self.skipping = False

    def _skip_hole(self) -> None:
        """A writer that does not append leaves a hole as long as the old file when that is cut; jump over it."""
        self.partial = b""
        try:
            self.offset = os.lseek(self.descriptor, self.offset, os.SEEK_DATA)
        except OSError:
            return  # no data beyond, or a file system that cannot tell: read on
        self.mark = b""

    def _lines(self, fresh: bytes, line_bytes: int) -> list[bytes]:
        head, *rest = fresh.split(b"\n")
        joined = (self.partial + head).lstrip(b"\0")  # the end of a hole
        if not rest:
            if not self.skipping:
                self._keep(joined, line_bytes)
            return []
        first = [] if self.skipping else [joined]
        self.partial, self.skipping = b"", False
        self._keep(rest.pop(), line_bytes)
        lines = first + rest
        if len(fresh) > line_bytes or (first and len(first[0]) > line_bytes):
            whole = [line for line in lines if len(line) <= line_bytes]
            self.long_lines += len(lines) - len(whole)
            lines = whole
        return lines

    def _keep(self, partial: bytes, line_bytes: int) -> None:
        if len(partial) > line_bytes:
            self.long_lines += 1
            self.skipping = True
            partial = b""
        self.partial = partial


class Tail:
    """The lines of a file that is rotated, cut, removed and made again. `close()` it."""

    def __init__(self, path: Path, params: TailParams) -> None:
        self.path = path
        self.bytes = 0
        self.errors = 0
        self._params = params
        self._current: _File | None = None
        self._retired: deque[_File] = deque()
        self._first_look = True
        self._trouble = ""
        self._rotations = 0
        self._cuts = 0
        self._long_lines = 0
        self._unread = 0

    def read(self, now_s: float) -> list[bytes]:
        """Lines since the last call without their newlines, old files first; bounded by `bytes_per_poll`."""
        budget = self._params.bytes_per_poll
        lines: list[bytes] = []
        self._look(now_s)
        for file in [*self._retired, *([self._current] if self._current else [])]:
            if budget <= 0:
                break
            try:
                fresh, count = file.read(budget, self._params.line_bytes)
            except OSError as error:
                self._failed(error)
                continue
            lines += fresh
            budget -= count
            self.bytes += count
        self._close_lingering(now_s)
        return lines

    def lag_bytes(self) -> int:
        """Bytes that are in the files and were not read yet."""
        return sum(file.lag_bytes() for file in self._files())

    def dropped(self) -> int:
        """Lines left out because they were too long."""
        return self._long_lines + sum(file.long_lines for file in self._files())

    def counts(self) -> Mapping[str, int]:
        """`rotations`, `cuts`, `unread_bytes` (in old files when they were closed)."""
        cuts = self._cuts + sum(file.cuts for file in self._files())
        return {"rotations": self._rotations, "cuts": cuts, "unread_bytes": self._unread}

    def close(self) -> None:
        """Give every descriptor back; the next read starts over, at the end of the file."""
        for file in self._files():
            self._close(file)
        self._retired.clear()
        self._current = None
        self._first_look = True

    def _files(self) -> list[_File]:
        return [*self._retired, *([self._current] if self._current else [])]

    def _look(self, now_s: float) -> None:
        """Open the file that has the name now, unless it is the one we have."""
        try:
            found = self.path.stat()
            if self._current is not None and self._current.identity == (found.st_dev, found.st_ino):
                return
            file = self._open()
        except (OSError, UnavailableError) as error:
            if isinstance(error, FileNotFoundError):
                self._first_look = False  # what appears from now on is news from its first byte
            self._failed(error)
            return
        self._first_look = False
        self._trouble = ""
        if self._current is not None:
            self._rotations += 1
            self._current.retired_s = now_s
            self._retired.append(self._current)
            if len(self._retired) > self._params.retired_files:
                self._close(self._retired.popleft())
        self._current = file

    def _open(self) -> _File:
        # Without O_NONBLOCK a FIFO under the name would hold the daemon until somebody writes to it.
        descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UnavailableError(f"{self.path}: expected a regular file to follow, found something else")
            return _File(descriptor, at_end=self._first_look)
        except BaseException:
            os.close(descriptor)
            raise

    def _failed(self, error: Exception) -> None:
        """Count trouble at every poll, but say it once. A file that is not there between two rotations is no error."""
        absent = isinstance(error, FileNotFoundError)
        self.errors += not absent
        if str(error) != self._trouble:
            self._trouble = str(error)
            level = logging.INFO if absent else logging.WARNING
            log.log(level, "log file cannot be read", extra={"fields": {"path": str(self.path), "error": str(error)}})

    def _close_lingering(self, now_s: float) -> None:
        while self._retired and now_s - self._retired[0].retired_s >= self._params.linger_s:
            if self._retired[0].lag_bytes():
                return  # there is more than one poll's worth left in it
            self._close(self._retired.popleft())

    def _close(self, file: _File) -> None:
        self._cuts += file.cuts
        self._long_lines += file.long_lines
        self._unread += file.lag_bytes() + len(file.partial)
        os.close(file.descriptor)


class TailSource:
    """A followed file as a source of evidence (ports.EvidenceSource): every event has its arrival time."""

    def __init__(self, name: str, tail: Tail, decoder: LineDecoder, now_s: Callable[[], float]) -> None:
        self._name = name
        self._tail = tail
        self._decoder = decoder
        self._now_s = now_s
        self._lines = 0
        self._events = 0
        self._refused = 0
        self._last_event_s: float | None = None

    def poll(self) -> list[Event]:
        """Events of the lines since the last call, oldest first; bounded by the tail's bytes."""
        now_s = self._now_s()
        events: list[Event] = []
        feed = self._decoder.feed
        refusal: InputError | None = None
        refused_before = self._refused
        for line in self._tail.read(now_s):
            self._lines += 1
            try:
                event = feed(line, now_s)
            except InputError as error:
                self._refused += 1
                refusal = refusal or at_line(str(self._tail.path), self._lines, error)
                continue
            if event is not None:
                events.append(event)
        if refusal is not None:
            count = self._refused - refused_before
            log.warning(
                "lines refused", extra={"fields": {"source": self._name, "count": count, "first": str(refusal)}}
            )
        if events:
            self._events += len(events)
            self._last_event_s = now_s
        return events

    def close(self) -> None:
        """Close the file."""
        self._tail.close()

    def stats(self) -> SourceStats:
        """Totals for /metrics and `edge status`."""
        return SourceStats(
            name=self._name,
            events=self._events,
            errors=self._refused + self._tail.errors,
            dropped=self._tail.dropped() + self._decoder.dropped(),
            lines=self._lines,
            bytes=self._tail.bytes,
            lag_bytes=self._tail.lag_bytes(),
            last_event_s=self._last_event_s,
            detail={**self._tail.counts(), **self._decoder.counts()},
        )
