"""The event socket takes evidence from anybody its file lets in, and no client can hurt another or the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from edge.core.model import Event
from edge.errors import UnavailableError
from edge.evidence.jsonl import JsonLines
from edge.evidence.socket import EventSocket, EventSocketParams

GOOD = b'{"ts": 1, "src": "2001:db8::7", "dport": 25, "handshake": true, "mta": {"verdict": "spam"}}\n'
DEADLINE_S = 20.0


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, DEADLINE_S))


async def until(condition: Callable[[], bool], polled: EventSocket | None = None) -> None:
    """Let the loop turn until the condition holds, polling meanwhile if asked; the test's own deadline ends it."""
    while not condition():
        if polled is not None:
            polled.poll()
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def listening(path: Path, clock: Clock | None = None, **params: Any) -> AsyncIterator[EventSocket]:
    events = EventSocket(path, EventSocketParams(**params), clock or Clock(), decoder=JsonLines())
    await events.start()
    try:
        yield events
    finally:
        await events.stop()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.sock"


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.setblocking(False)
    client.connect(str(path))
    return client


async def send(client: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(client, data)


async def closed(client: socket.socket) -> bool:
    try:
        return await asyncio.get_running_loop().sock_recv(client, 1) == b""
    except ConnectionResetError:
        return True


def test_events_arrive_with_their_arrival_time(path: Path) -> None:
    async def test() -> None:
        async with listening(path) as events:
            with connect(path) as one, connect(path) as two:
                await send(one, GOOD[:31])
                await send(two, GOOD * 3)
                await until(lambda: events.stats().events == 3)
                await send(one, GOOD[31:] + b"\r\n \n" + GOOD)
                await until(lambda: events.stats().events == 5)
            found = events.poll()
            assert [(event.ts_s, event.lo) for event in found] == [(100.0, 7)] * 5
            assert events.poll() == []
            await until(lambda: events.stats().detail["clients"] == 0)
            stats = events.stats()
            assert (stats.errors, stats.dropped, stats.lines, stats.last_event_s) == (0, 0, 5, 100.0)

    run(test())


def test_a_last_line_without_newline_counts(path: Path) -> None:
    async def test() -> None:
        async with listening(path) as events:
            with connect(path) as client:
                await send(client, GOOD.rstrip())
            await until(lambda: events.stats().events == 1)

    run(test())


def test_a_sender_may_come_again(path: Path) -> None:
    async def test() -> None:
        async with listening(path, clients=1) as events:
            for turn in range(1, 8):
                with connect(path) as client:
                    await send(client, GOOD)
                    await until(lambda turn=turn: events.stats().events == turn)  # type: ignore[misc]  # bound at once
                await until(lambda: events.stats().detail["clients"] == 0)

    run(test())


@pytest.mark.parametrize(
    "garbage", [b"EHLO x\n", os.urandom(4099).replace(b"\n", b"") + b"\n", b'{"ts": 1}\n', b"[" * 7001 + b"\n"]
)
def test_garbage_ends_a_client(path: Path, garbage: bytes) -> None:
    async def test() -> None:
        async with listening(path, errors_in_a_row=7) as events:
            with connect(path) as bad, connect(path) as good:
                await send(bad, (garbage * 6 + GOOD) * 3)
                await until(lambda: events.stats().lines == 21, polled=events)
                assert not events.stats().detail["clients_ended"], "a good line forgives"
                await send(bad, garbage * 7)
                assert await closed(bad)
                await send(good, GOOD)
                await until(lambda: events.stats().events == 4)
            assert events.stats().errors == 18 + 7 + 1

    run(test())


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_too_long_ends_a_client(path: Path, end: bytes) -> None:
    async def test() -> None:
        async with listening(path, line_bytes=1024) as events:
            with connect(path) as bad, connect(path) as good:
                await send(good, GOOD[:7])
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    await send(bad, b"x" * 100_003 + end)
                assert await closed(bad)
                await send(good, GOOD[7:])
                await until(lambda: events.stats().events == 1)
            assert events.stats().detail["clients_ended"] == 1

    run(test())


def test_one_client_cannot_starve_others(path: Path) -> None:
    """A client that sends without end is read for its share; a quiet one is heard at once."""

    async def test() -> None:
        async with listening(path, bytes_per_poll=131_072) as events:
            with connect(path) as flood, connect(path) as quiet:
                sending = asyncio.create_task(send(flood, GOOD * 100_003))
                await until(lambda: events.stats().bytes > 65_536)
                for _ in range(1009):
                    await asyncio.sleep(0)
                most = 65_536 + 262_144  # a share and one read of asyncio
                assert events.stats().bytes <= most
                before = events.stats().events
                await send(quiet, GOOD)
                await until(lambda: events.stats().events == before + 1)
                for _ in range(3):
                    held = events.stats().bytes
                    events.poll()
                    for _ in range(1009):
                        await asyncio.sleep(0)
                    assert events.stats().bytes - held <= most
                assert not sending.done()
                sending.cancel()
            assert events.stats().detail["overflow"] == 0

    run(test())


def test_everything_a_fast_sender_wrote_arrives(path: Path) -> None:
    async def test() -> None:
        count = 20_011
        async with listening(path) as events:
            found: list[Event] = []
            with connect(path) as client:
                sending = asyncio.create_task(send(client, GOOD * count))
                while len(found) < count:
                    found += events.poll()
                    await asyncio.sleep(0)
                await sending
            assert len(found) == count

    run(test())


def test_waiting_events_are_bounded(path: Path) -> None:
    async def test() -> None:
        async with listening(path, waiting_events=101) as events:
            with connect(path) as client:
                await send(client, GOOD * 307)
                await until(lambda: events.stats().lines == 307)
            assert len(events.poll()) == 101
            assert events.stats().dropped == events.stats().detail["overflow"] == 206

    run(test())


def test_clients_are_limited_and_the_silent_give_way(path: Path) -> None:
    async def test() -> None:
        clock = Clock()
        async with listening(path, clock, clients=2, idle_s=60) as events:
            with connect(path) as silent, connect(path) as busy:
                await until(lambda: events.stats().detail["clients"] == 2)
                with connect(path) as third:
                    assert await closed(third)
                clock.now_s += 61
                await send(busy, GOOD)
                await until(lambda: events.stats().events == 1)
                with connect(path) as fourth:
                    assert await closed(silent)
                    await send(fourth, GOOD)
                    await until(lambda: events.stats().events == 2)
                    assert events.stats().detail["clients"] == 2
            assert events.stats().detail["clients_turned_away"] == 2

    run(test())


def test_the_files_mode_is_the_access_control(path: Path) -> None:
    async def test() -> None:
        async with listening(path, mode=0o620):
            assert stat.S_IMODE(path.stat().st_mode) == 0o620
        assert not path.exists()

    run(test())


def test_live_socket_is_never_taken(path: Path) -> None:
    async def test() -> None:
        async with listening(path) as first:
            second = EventSocket(path, EventSocketParams(), Clock(), decoder=JsonLines())
            with pytest.raises(UnavailableError, match="another process"):
                await second.start()
            await second.stop()
            with connect(path) as client:
                await send(client, GOOD)
                await until(lambda: first.stats().events == 1)

    run(test())


def test_a_stale_socket_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def test() -> None:
        async with listening(path) as events:
            with connect(path) as client:
                await send(client, GOOD)
                await until(lambda: events.stats().events == 1)

    run(test())


def test_another_kind_of_file_is_left_alone(path: Path) -> None:
    path.write_text("precious")
    events = EventSocket(path, EventSocketParams(), Clock(), decoder=JsonLines())
    with pytest.raises(UnavailableError, match="left there"):
        run(events.start())
    assert path.read_text() == "precious"


@pytest.mark.parametrize("name", ["none/events.sock", "x" * 120])
def test_a_path_that_cannot_be_used_is_said(tmp_path: Path, name: str) -> None:
    events = EventSocket(tmp_path / name, EventSocketParams(), Clock(), decoder=JsonLines())
    with pytest.raises(UnavailableError, match="expected to listen"):
        run(events.start())


def test_stopping_leaves_a_successors_socket(path: Path) -> None:
    async def test() -> None:
        first = EventSocket(path, EventSocketParams(), Clock(), decoder=JsonLines())
        await first.start()
        path.unlink()
        async with listening(path):
            await first.stop()
            assert path.exists()

    run(test())
