"""The SMTP client of the lab: one connection from a chosen source address, one command at a time.

Invariants:
    replies-are-bounded: a line has at most MAX_LINE bytes, a reply at most MAX_LINES lines.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from edge.lab import network

MAX_LINE = 2048
"""Bytes of a reply line; RFC 5321 4.5.3.1.5 allows 512."""

MAX_LINES = 64
"""Lines of one reply; an EHLO answer has about a dozen."""

REPLY_S = 10.0
"""Time the server gets for one reply; only a machine under heavy load needs more than milliseconds."""

_IPV6_FREEBIND = 78  # linux/in6.h: bind to an address that no interface carries
_IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h: choose the port at connect, so that one source may use all of them


class NotServedError(Exception):
    """The server did not serve: no connection, no reply in time, or the connection ended."""


class Dialogue:
    """An open SMTP connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def reply(self) -> tuple[int, list[str]]:
        """Read one reply: its code and its lines. NotServedError when there is none."""
        lines: list[str] = []
        try:
            async with asyncio.timeout(REPLY_S):
                while len(lines) < MAX_LINES:
                    line = (await self._reader.readuntil(b"\n")).decode("ascii", "replace").rstrip()
                    lines.append(line[4:])
                    if line[3:4] != "-":
                        return int(line[:3]), lines
        except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise NotServedError(f"no reply: {error}") from None
        raise NotServedError(f"a reply of more than {MAX_LINES} lines")

    async def say(self, line: str) -> int:
        """Send one command; the code of its reply."""
        return (await self.ask(line))[0]

    async def ask(self, line: str) -> tuple[int, list[str]]:
        """Send one command (or a whole message with its final dot); its reply."""
        self._writer.write(line.encode() + b"\r\n")
        return await self.reply()


@asynccontextmanager
async def dial(source: str, *, timeout_s: float) -> AsyncIterator[tuple[Dialogue, float]]:
    """Connect from `source` to port 25 of the lab's server and read the greeting.

    Gives the dialogue and the moment the connection was made (CLOCK_MONOTONIC, seconds). NotServedError when there is
    no connection within `timeout_s`, or no greeting.
    """
    sock = _bound(source)
    target = network.SERVER_V6 if ":" in source else network.SERVER_V4
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.get_running_loop().sock_connect(sock, (target, 25))
        connected_s = time.monotonic()
        reader, writer = await asyncio.open_connection(sock=sock, limit=MAX_LINE)
    except (OSError, TimeoutError) as error:
        sock.close()
        raise NotServedError(f"no connection: {error}") from None
    except BaseException:
        sock.close()
        raise
    try:
        dialogue = Dialogue(reader, writer)
        code, _ = await dialogue.reply()
        if code != 220:
            raise NotServedError(f"greeted with {code}")
        yield dialogue, connected_s
    finally:
        writer.close()


def _bound(source: str) -> socket.socket:
    """A socket of the current namespace that will connect from `source`."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
        sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
        sock.bind((source, 0))
    except BaseException:
        sock.close()
        raise
    return sock
