"""The control socket: how `edge status`, `edge block` and the other verbs talk to the daemon.

A Unix stream socket whose file mode is the access control. A request is one JSON object on one line, with the verb and
its arguments; the reply is one too:

    {"verb": "explain", "what": "2001:db8::1"}
    {"ok": true, "result": {...}}      {"ok": false, "error": "...", "exit": 64}

A connection may carry several requests, one after the other.

Invariants:
    mode-from-the-start: nobody outside the configured mode and group can ever connect, not even for a moment.
    live-daemon-is-not-displaced: a socket that somebody serves is left alone, and the error names the process.
    hostile-client-does-no-harm: requests are bounded in size, waiting in time, connections in number.
"""

from __future__ import annotations

import asyncio
import fcntl
import grp
import logging
import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from edge.errors import ConfigError, EdgeError, InputError, UnavailableError, UsageError

log = logging.getLogger(__name__)

Handlers = Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]
"""What answers each verb: the request without its verb in, the result out. Runs on the daemon's loop: be quick."""

LONGEST_REQUEST = 64 * 1024
LONGEST_REPLY = 16 << 20
"""Bytes; 50,000 listed entries. A longer answer is refused and must be asked for in parts."""

MOST_CONNECTIONS = 32
BACKLOG = 32
REQUEST_TIMEOUT_S = 10.0
"""For one request to arrive whole, and for one reply to be taken."""

_ERRORS = {error.exit_code: error for error in (UsageError, InputError, UnavailableError, EdgeError, ConfigError)}


class ControlServer:
    """The daemon's end. Make it with `start`; everything runs on the loop that called it."""

    def __init__(self, path: Path, handlers: Handlers, timeout_s: float) -> None:
        self._path = path
        self._handlers = handlers
        self._timeout_s = timeout_s
        self._server: asyncio.Server | None = None
        self._inode: tuple[int, int] | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(
        cls, path: Path, handlers: Handlers, *, mode: int = 0o660, group: str = "", timeout_s: float = REQUEST_TIMEOUT_S
    ) -> ControlServer:
        """Listen on `path`; UnavailableError when another process serves it or it cannot be made."""
        server = cls(path, handlers, timeout_s)
        listener = _listen(path, mode, _group_id(group))
        status = path.stat()
        server._inode = status.st_dev, status.st_ino
        server._server = await asyncio.start_unix_server(
            server._connected, sock=listener, limit=LONGEST_REQUEST, backlog=BACKLOG
        )
        return server

    async def close(self) -> None:
        """Stop listening, end every connection, and remove the socket if it is still ours."""
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        with suppress(FileNotFoundError):
            status = self._path.stat()
            if (status.st_dev, status.st_ino) == self._inode:
                self._path.unlink()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until it ends, errs, or is too slow."""
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        writer.transport.set_write_buffer_limits(high=0)  # drain() waits until the client has taken all
        try:
            if len(self._connections) > MOST_CONNECTIONS:
                await self._reply(
                    writer, _refusal(UnavailableError(f"{MOST_CONNECTIONS} connections are open already"))
                )
                return
            while await self._one_request(reader, writer):
                pass
        except (ConnectionError, TimeoutError) as error:
            log.debug("control connection ended early", extra={"fields": {"error": error or type(error).__name__}})
        finally:
            self._connections.discard(task)
            # abort, not close: what the client does not read must not keep the connection in memory
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def _one_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False when there is none left or the client has lost its place."""
        try:
            # timeout(), not wait_for(): in Python 3.11 that may swallow the cancellation by close()
            async with asyncio.timeout(self._timeout_s):
                line = await reader.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                await self._reply(
                    writer, _refusal(InputError("expected one JSON object and a newline, found no newline"))
                )
            return False
        except asyncio.LimitOverrunError:
            refusal = InputError(f"expected a request of at most {LONGEST_REQUEST} bytes, found a longer one")
            await self._reply(writer, _refusal(refusal))
            return False
        await self._reply(writer, self._answer(line))
        return True

    async def _reply(self, writer: asyncio.StreamWriter, reply: bytes) -> None:
        writer.write(reply)
        async with asyncio.timeout(self._timeout_s):
            await writer.drain()

    def _answer(self, line: bytes) -> bytes:
        """The reply to one line; a handler's own error is answered, any other is logged and answered as internal."""
        try:
            verb, arguments = _request(line)
            handler = self._handlers.get(verb)
            if handler is None:
                raise UsageError(f"expected a verb of {', '.join(sorted(self._handlers))}, found {verb[:64]!r}")
            reply = msgspec.json.encode({"ok": True, "result": handler(arguments)}) + b"\n"
            if len(reply) > LONGEST_REPLY:
                raise UsageError(f"the answer has {len(reply)} bytes, more than {LONGEST_REPLY}: ask for less")
        except EdgeError as error:
            return _refusal(error)
        except Exception as error:  # a defect of ours must not end the daemon; it is logged whole
            log.exception("control request failed", extra={"fields": {"request": line[:256]}})
            return _refusal(EdgeError(f"internal error ({type(error).__name__}); the daemon's log has the traceback"))
        return reply


def call(path: Path, verb: str, *, timeout_s: float = 10.0, **arguments: Any) -> dict[str, Any]:
    """Ask the daemon and wait for its answer: the result, or the error it answered with.

    UnavailableError when no daemon answers within `timeout_s` seconds; its message says what to do.
    """
    request = msgspec.json.encode({"verb": verb, **arguments}) + b"\n"
    deadline = time.monotonic() + timeout_s
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            with suppress(BrokenPipeError, ConnectionResetError):  # refused unread: the reply says why
                connection.sendall(request)
            line = _read_line(connection, deadline)
    except TimeoutError:
        raise UnavailableError(f"the daemon on {path} did not answer within {timeout_s:g} s: see its log") from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise UnavailableError(f"no daemon answers on {path}: is it running? start it with `edge run`") from None
    except PermissionError:
        raise UnavailableError(f"no access to {path}: {_who_may(path)}") from None
    except OSError as error:
        raise UnavailableError(f"cannot talk to the daemon on {path}: {error.strerror or error}") from error
    return _result(path, line)


def _read_line(connection: socket.socket, deadline: float) -> bytes:
    """One line, read before the deadline; ConnectionError when the daemon closes first."""
    chunks: list[bytes] = []
    size = 0
    while not chunks or not chunks[-1].endswith(b"\n"):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        connection.settimeout(left_s)
        chunk = connection.recv(1 << 18)
        if not chunk:
            raise ConnectionError("it closed the connection without an answer")
        chunks.append(chunk)
        size += len(chunk)
        if size > LONGEST_REPLY + (1 << 18):
            raise ConnectionError("its answer is longer than any answer may be")
    return b"".join(chunks)


def _result(path: Path, line: bytes) -> dict[str, Any]:
    """The result in a reply; raises the error in it."""
    try:
        reply = msgspec.json.decode(line, type=dict[str, Any])
        if reply["ok"]:
            return dict(reply["result"])
        error, exit_code = str(reply["error"]), reply["exit"]
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError) as wrong:
        raise UnavailableError(f"{path}: expected a reply of edge's daemon, found {line[:64]!r}") from wrong
    raise _ERRORS.get(exit_code, EdgeError)(error)


def _request(line: bytes) -> tuple[str, dict[str, Any]]:
    """Verb and arguments of one line; InputError when it is not a request."""
    try:
        request = msgspec.json.decode(line)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InputError(f"expected one JSON object on a line, found: {error}") from None
    if not isinstance(request, dict) or not isinstance(request.get("verb"), str):
        raise InputError('expected a JSON object with a "verb", found something else')
    return request.pop("verb"), request


def _refusal(error: EdgeError) -> bytes:
    return msgspec.json.encode({"ok": False, "error": str(error), "exit": error.exit_code}) + b"\n"


def _listen(path: Path, mode: int, group: int | None) -> socket.socket:
    """A listening socket at `path` that had its final owner and mode before anybody could reach it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with _only_one(path.parent):
            _refuse_to_displace(path)
            temporary.unlink(missing_ok=True)  # of a killed process that had our number
            # the mode of an unbound socket becomes the mode of its file: only we can connect until chmod
            os.fchmod(listener.fileno(), 0o600)
            listener.bind(str(temporary))
            if group is not None:
                os.chown(temporary, -1, group)
            temporary.chmod(mode)
            listener.listen(BACKLOG)
            temporary.rename(path)
    except OSError as error:
        listener.close()
        temporary.unlink(missing_ok=True)
        raise UnavailableError(
            f"{path}: expected to make the control socket, found: {error.strerror or error}"
        ) from error
    except EdgeError:
        listener.close()
        raise
    return listener


@contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Hold a lock on the directory: of two daemons that start at once, the second sees the first's socket."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _refuse_to_displace(path: Path) -> None:
    """UnavailableError when something that is not a stale socket is at `path`."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise UnavailableError(
                f"{path}: expected a socket or nothing, found another kind of file; it was left alone"
            )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            with suppress(TimeoutError, BlockingIOError):  # its backlog is full: it lives
                probe.connect(str(path))
            pid = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    except (FileNotFoundError, ConnectionRefusedError):
        return  # nothing there, or a socket that nobody serves
    who = f"process {pid}" if pid > 0 else "another process"
    raise UnavailableError(f"{path}: {who} serves this socket; stop it first (`edge status` asks it)")


def _group_id(group: str) -> int | None:
    try:
        return grp.getgrnam(group).gr_gid if group else None
    except KeyError:
        raise ConfigError(f"control.group: expected a group of this host, found {group!r}") from None


def _who_may(path: Path) -> str:
    """What to do about a refused connection."""
    try:
        status = path.stat()
        group = grp.getgrgid(status.st_gid).gr_name
        return f"be root or in group {group}"
    except (OSError, KeyError):
        return "be root, or in the group of control.group"
