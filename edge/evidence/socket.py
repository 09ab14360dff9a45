"""Takes evidence as JSON lines on a Unix stream socket; the file's mode is the access control. Nothing is answered.

The daemon's loop drives it: asyncio callbacks read, `poll()` hands over. Every poll gives the clients together
`bytes_per_poll` bytes of credit, in equal shares; a client that has used up its share is not read from until the next
poll, so its own writes wait and nobody else notices. Datagrams are not taken: they have no such brake.

Invariants:
    one-client-cannot-starve-others: between two polls a client is read for its share and one buffer at most.
    garbage-ends-a-client: `errors_in_a_row` refused lines in a row, or one line too long, close its connection.
    bounded: clients, credit, line length and waiting events have limits.
    live-socket-is-never-taken: a path where somebody listens, or that is no socket, is refused and left as it is.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import stat
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec

from edge.core.model import Event
from edge.errors import InputError, UnavailableError
from edge.evidence.jsonl import JsonLines, at_line
from edge.evidence.stats import SourceStats

log = logging.getLogger(__name__)

_LEAST_SHARE_BYTES = 65_536
"""What a client may send before its first poll: a page of lines, less than the kernel's own buffer."""


class EventSocketParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How evidence is taken from the event socket."""

    mode: Annotated[
        int,
        msgspec.Meta(
            ge=0o600,
            le=0o777,
            description="Mode of the socket file, which decides who may send evidence. 0o660 (432): the daemon's "
            "user and group.",
        ),
    ] = 0o660
    clients: Annotated[
        int,
        msgspec.Meta(
            gt=0, le=4096, description="Connections at once; each sender keeps one open. More are closed at once."
        ),
    ] = 32
    bytes_per_poll: Annotated[
        int,
        msgspec.Meta(
            ge=65_536,
            le=1 << 28,
            description="Bytes taken from all clients together in one poll, in equal shares but 64 KiB at least. 8 MiB "
            "are about 40 000 lines, a tenth of a second of work.",
        ),
    ] = 8 << 20
    line_bytes: Annotated[
        int,
        msgspec.Meta(
            ge=1024, le=1 << 20, description="Longest line in bytes; a client that sends a longer one is closed."
        ),
    ] = 8192
    waiting_events: Annotated[
        int,
        msgspec.Meta(
            gt=0,
            le=1_000_000,
            description="Events kept for the next poll; further ones are dropped and counted. Above what the clients "
            "can send in one poll, so 0 is expected.",
        ),
    ] = 262_144
    errors_in_a_row: Annotated[
        int,
        msgspec.Meta(
            gt=0,
            le=100_000,
            description="Refused lines in a row after which a client is closed: it speaks something else.",
        ),
    ] = 100
    idle_s: Annotated[
        float,
        msgspec.Meta(
            gt=0,
            le=86_400,
            description="Seconds of silence after which a client gives way to a new one when all places are taken.",
        ),
    ] = 300.0


class _Client(asyncio.Protocol):
    """One connection: cuts lines, spends credit."""

    def __init__(self, server: EventSocket, number: int) -> None:
        self._server = server
        self._partial = bytearray()
        self._errors_in_a_row = 0
        self._paused = False
        self._credit = _LEAST_SHARE_BYTES
        self.number = number
        self.lines = 0
        self.heard_s = 0.0
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._server.joined(self)

    def eof_received(self) -> None:
        if self._partial:
            self._line(bytes(self._partial))  # the last line of a sender that ends without a newline

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.left(self)

    def data_received(self, data: bytes) -> None:
        if self.transport is None or self.transport.is_closing():
            return
        self.heard_s = self._server.heard(len(data))
        self._credit -= len(data)
        if self._credit <= 0:
            self._paused = True
            self.transport.pause_reading()
        self._partial += data
        lines = self._partial.split(b"\n")
        self._partial = lines.pop()
        for line in lines:
            if line and not line.isspace() and not self._line(bytes(line)):
                return
        if len(self._partial) > self._server.params.line_bytes:
            self._end(f"a line longer than {self._server.params.line_bytes} bytes")

    def refill(self, credit: int) -> None:
        """Give the share of a new poll, less what was overdrawn."""
        self._credit = min(credit, self._credit + credit)
        if self._paused and self._credit > 0 and self.transport is not None and not self.transport.is_closing():
            self._paused = False
            self.transport.resume_reading()

    def _line(self, line: bytes) -> bool:
        """Use one line; False when it was the last this client may send."""
        self.lines += 1
        if len(line) > self._server.params.line_bytes:
            self._end(f"a line longer than {self._server.params.line_bytes} bytes")
            return False
        if self._server.take(self, line):
            self._errors_in_a_row = 0
            return True
        self._errors_in_a_row += 1
        if self._errors_in_a_row < self._server.params.errors_in_a_row:
            return True
        self._end(f"{self._errors_in_a_row} refused lines in a row")
        return False

    def _end(self, why: str) -> None:
        self._partial.clear()
        self._server.ended(self, why)
        if self.transport is not None:
            self.transport.abort()


class EventSocket:
    """The socket as a source of evidence (ports.EvidenceSource). `start()` and `stop()` run in the daemon's loop.

    `now_s` is the daemon's clock: every event has its arrival time.
    """

    def __init__(
        self,
        path: Path,
        params: EventSocketParams,
        now_s: Callable[[], float],
        *,
        decoder: JsonLines,
        name: str = "event_socket",
    ) -> None:
        self.params = params
        self._path = path
        self._now_s = now_s
        self._decoder = decoder
        self._name = name
        self._server: asyncio.Server | None = None
        self._identity: tuple[int, int] | None = None
        self._clients: dict[int, _Client] = {}
        self._waiting: deque[Event] = deque()
        self._joined = 0
        self._turned_away = 0
        self._ended = 0
        self._lines = 0
        self._events = 0
        self._bytes = 0
        self._errors = 0
        self._overflow = 0
        self._last_event_s: float | None = None
        self._said_refusal = False

    async def start(self) -> None:
        """Listen. UnavailableError when another process listens there, or the path cannot be used."""
        listener = _listener(self._path, self.params.mode)
        try:
            found = self._path.stat()
            self._identity = (found.st_dev, found.st_ino)
            self._server = await asyncio.get_running_loop().create_unix_server(self._new_client, sock=listener)
        except BaseException:
            listener.close()
            raise

    async def stop(self) -> None:
        """Close every connection and take the socket file away, unless it is no longer ours. Waiting events stay."""
        if self._server is None:
            return
        self._server.close()
        for client in list(self._clients.values()):
            if client.transport is not None:
                client.transport.abort()
        await self._server.wait_closed()
        self._server = None
        try:
            found = self._path.lstat()
        except FileNotFoundError:
            return
        if (found.st_dev, found.st_ino) == self._identity:
            self._path.unlink(missing_ok=True)

    def poll(self) -> list[Event]:
        """Events since the last call, oldest first; renews the clients' credit."""
        events = list(self._waiting)
        self._waiting.clear()
        self._said_refusal = False
        share = max(_LEAST_SHARE_BYTES, self.params.bytes_per_poll // max(1, len(self._clients)))
        for client in self._clients.values():
            client.refill(share)
        return events

    def stats(self) -> SourceStats:
        """Totals for /metrics and `edge status`."""
        return SourceStats(
            name=self._name,
            events=self._events,
            errors=self._errors,
            dropped=self._overflow + self._decoder.dropped(),
            lines=self._lines,
            bytes=self._bytes,
            last_event_s=self._last_event_s,
            detail={
                "clients": len(self._clients),
                "clients_turned_away": self._turned_away,
                "clients_ended": self._ended,
                "overflow": self._overflow,
                **self._decoder.counts(),
            },
        )

    def _new_client(self) -> _Client:
        self._joined += 1
        return _Client(self, self._joined)

    def joined(self, client: _Client) -> None:
        """A connection is there; it or a silent one goes when there is no place."""
        client.heard_s = self._now_s()
        if len(self._clients) >= self.params.clients:
            quietest = min(self._clients.values(), key=lambda other: other.heard_s)
            silent = client.heard_s - quietest.heard_s > self.params.idle_s
            leaving = quietest if silent else client
            self._turned_away += 1
            log.warning("client turned away", extra={"fields": {"socket": str(self._path), "client": leaving.number}})
            self._clients.pop(leaving.number, None)
            if leaving.transport is not None:
                leaving.transport.abort()
            if leaving is client:
                return
        self._clients[client.number] = client

    def left(self, client: _Client) -> None:
        """A connection is gone."""
        self._clients.pop(client.number, None)

    def heard(self, count: int) -> float:
        """Bytes came; returns the time."""
        self._bytes += count
        return self._now_s()

    def ended(self, client: _Client, why: str) -> None:
        """We close a client because of what it sends."""
        self._ended += 1
        self._errors += 1
        fields = {"socket": str(self._path), "client": client.number, "line": client.lines, "why": why}
        log.warning("client closed", extra={"fields": fields})

    def take(self, client: _Client, line: bytes) -> bool:
        """Use one line; False when it was refused."""
        self._lines += 1
        try:
            event = self._decoder.feed(line, self._now_s())
        except InputError as error:
            self._errors += 1
            if not self._said_refusal:  # once a poll
                self._said_refusal = True
                place = at_line(f"{self._path} client {client.number}", client.lines, error)
                log.warning("line refused", extra={"fields": {"socket": str(self._path), "error": str(place)}})
            return False
        if event is None:
            return True
        if len(self._waiting) >= self.params.waiting_events:
            self._overflow += 1
            return True
        self._waiting.append(event)
        self._events += 1
        self._last_event_s = event.ts_s
        return True


def _listener(path: Path, mode: int) -> socket.socket:
    """A bound socket with its file's mode set before anybody can connect."""
    _clear_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.bind(str(path))
        path.chmod(mode)
    except OSError as error:
        listener.close()
        raise UnavailableError(f"{path}: expected to listen on it, found: {error.strerror or error}") from None
    return listener


def _clear_stale(path: Path) -> None:
    """Remove a socket file nobody listens on; refuse everything else that is there."""
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise UnavailableError(f"{path}: expected a place for a socket, found: {error.strerror}") from None
    if not stat.S_ISSOCK(kind):
        raise UnavailableError(
            f"{path}: expected no file or an old socket, found another kind of file; it is left there"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass  # its queue is full: somebody listens
        except OSError as error:
            raise UnavailableError(f"{path}: expected to find out who listens, found: {error.strerror}") from None
    raise UnavailableError(f"{path}: expected no listener, found another process; stop it or choose another path")
