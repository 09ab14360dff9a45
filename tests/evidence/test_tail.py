"""A log file is followed through everything that happens to log files; no line is lost, doubled or torn."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge.core.model import Event
from edge.errors import InputError
from edge.evidence.jsonl import JsonLines
from edge.evidence.postfix_log import PostfixLog, PostfixParams
from edge.evidence.tail import Tail, TailParams, TailSource

PARAMS = TailParams()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mail.log"


@pytest.fixture
def open_tail(path: Path) -> Iterator[Callable[..., Tail]]:
    tails: list[Tail] = []

    def make(params: TailParams = PARAMS) -> Tail:
        tails.append(Tail(path, params))
        return tails[-1]

    yield make
    for tail in tails:
        tail.close()


def append(path: Path, text: bytes) -> None:
    with path.open("ab") as file:
        file.write(text)


def test_old_lines_are_no_news(path: Path, open_tail: Callable[..., Tail]) -> None:
    append(path, b"old\nhalf")
    tail = open_tail()
    assert tail.read(0) == []
    append(path, b" a line\nnew\n")
    assert tail.read(0) == [b"new"]
    assert tail.read(0) == []


def test_a_file_that_comes_late_is_read_from_its_start(path: Path, open_tail: Callable[..., Tail]) -> None:
    tail = open_tail()
    assert tail.read(0) == []
    append(path, b"one\ntwo\n")
    assert tail.read(0) == [b"one", b"two"]
    assert tail.errors == 0


def test_whole_lines_only(path: Path, open_tail: Callable[..., Tail]) -> None:
    append(path, b"")
    tail = open_tail()
    tail.read(0)
    for piece in (b"a", b"b\nc", b"", b"d", b"\n\n"):
        append(path, piece)
        append(path, b"")
    assert tail.read(0) == [b"ab", b"cd", b""]
    append(path, b"never ended")
    assert tail.read(0) == []
    path.write_bytes(b"fresh\n")
    assert tail.read(0) == [b"fresh"]


def test_rename_and_create_loses_nothing(path: Path, open_tail: Callable[..., Tail]) -> None:
    """logrotate `create`: the new file is there at once, the old one is written to until the daemon reopens."""
    append(path, b"")
    tail = open_tail()
    tail.read(0)
    append(path, b"1\n2\nhal")
    old = path.rename(path.with_suffix(".1"))
    append(path, b"")
    assert tail.read(1) == [b"1", b"2"]
    append(old, b"f\n3\n")
    append(path, b"4\n")
    assert tail.read(2) == [b"half", b"3", b"4"]
    append(old, b"5\n")
    assert tail.read(2 + PARAMS.linger_s) == [b"5"]
    append(old, b"too late\n")
    append(path, b"6\n")
    assert tail.read(3 + PARAMS.linger_s) == [b"6"]
    assert tail.counts()["rotations"] == 1


def test_many_rotations_between_two_looks(path: Path, open_tail: Callable[..., Tail]) -> None:
    append(path, b"")
    tail = open_tail(TailParams(retired_files=2))
    tail.read(0)
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # counts descriptors, not paths
    for turn in range(7):
        append(path, b"%d\n" % turn)
        assert tail.read(0) == [b"%d" % turn]
        path.rename(path.with_suffix(f".{turn}"))
    append(path, b"7\n")
    assert tail.read(0) == [b"7"]
    assert len(os.listdir("/proc/self/fd")) == descriptors + 2  # noqa: PTH208  # as above


@pytest.mark.parametrize("grown", [1, 7, 997])
def test_cut_and_grown_beyond_the_old_place(path: Path, open_tail: Callable[..., Tail], grown: int) -> None:
    """copytruncate, or an editor: the file keeps its inode, its size alone does not tell."""
    append(path, b"")
    tail = open_tail()
    tail.read(0)
    append(path, b"".join(b"old line %d\n" % n for n in range(101)) + b"half")
    assert len(tail.read(0)) == 101
    os.truncate(path, 0)
    fresh = [b"new line %d" % n for n in range(grown)]
    append(path, b"\n".join(fresh) + b"\n")
    assert tail.read(0) == fresh
    assert tail.counts()["cuts"] == 1


def test_cut_to_nothing_and_seen_empty(path: Path, open_tail: Callable[..., Tail]) -> None:
    append(path, b"x\n")
    tail = open_tail()
    tail.read(0)
    os.truncate(path, 0)
    assert tail.read(0) == tail.read(0) == []
    append(path, b"y\n")
    assert tail.read(0) == [b"y"]
    assert tail.counts()["cuts"] == 1


def test_a_hole_is_jumped_over(path: Path, open_tail: Callable[..., Tail]) -> None:
    """A writer without O_APPEND goes on at its old place after a copytruncate: the file starts with gigabytes of 0."""
    append(path, b"x\n")
    tail = open_tail()
    tail.read(0)
    os.truncate(path, 0)
    with path.open("r+b") as file:
        file.seek((3 << 30) + 1)
        file.write(b"after\nnext\n")
    lines = [line for _ in range(3) for line in tail.read(0)]
    assert lines == [b"after", b"next"]
    assert tail.bytes < 3 * PARAMS.bytes_per_poll


def test_removed_and_absent_for_a_while(path: Path, open_tail: Callable[..., Tail]) -> None:
    append(path, b"x\n")
    tail = open_tail()
    tail.read(0)
    with path.open("ab") as writer:
        path.unlink()
        writer.write(b"still written\n")
        writer.flush()
        assert tail.read(1) == [b"still written"]
        assert tail.read(2) == []
    append(path, b"back\n")
    assert tail.read(3) == [b"back"]
    assert tail.errors == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permission_trouble_passes(path: Path, open_tail: Callable[..., Tail]) -> None:
    append(path, b"old\n")
    path.chmod(0)
    tail = open_tail()
    assert tail.read(0) == []
    assert tail.errors == 1
    path.chmod(0o600)
    assert tail.read(0) == []
    append(path, b"new\n")
    assert tail.read(0) == [b"new"]


def test_trouble_at_the_first_look_makes_no_old_line_news(path: Path, open_tail: Callable[..., Tail]) -> None:
    path.symlink_to(path)  # trouble that root has too
    tail = open_tail()
    assert tail.read(0) == []
    assert tail.errors == 1
    path.unlink()
    append(path, b"old\n")
    assert tail.read(0) == []
    append(path, b"new\n")
    assert tail.read(0) == [b"new"]


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_no_regular_file(
    path: Path, open_tail: Callable[..., Tail], make: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    make(path)
    tail = open_tail()
    with caplog.at_level(logging.WARNING):
        assert tail.read(0) == tail.read(0) == []
    assert tail.errors == 2
    assert len(caplog.records) == 1, "said once, counted twice"


def test_never_blocks_and_bounded_memory(path: Path, open_tail: Callable[..., Tail]) -> None:
    append(path, b"")
    params = TailParams(bytes_per_poll=65_536, line_bytes=1024)
    tail = open_tail(params)
    tail.read(0)
    append(path, b"x" * 1_000_003 + b"\nshort\n" + b"y" * 1025 + b"\n" + b"z" * 1024 + b"\n")
    assert tail.lag_bytes() > 1_000_003
    lines: list[bytes] = []
    for _ in range(16):
        before = tail.bytes
        lines += tail.read(0)
        assert tail.bytes - before <= params.bytes_per_poll
        if not tail.lag_bytes():
            break
    assert lines == [b"short", b"z" * 1024]
    assert tail.dropped() == 2
    assert tail.lag_bytes() == 0


def test_binary_junk_is_lines_like_any(path: Path, open_tail: Callable[..., Tail]) -> None:
    append(path, b"")
    tail = open_tail()
    tail.read(0)
    junk = bytes(range(256)).replace(b"\n", b"")
    append(path, b"a" + junk + b"\n" + b"b\r\n")
    assert tail.read(0) == [b"a" + junk, b"b\r"]


@given(st.lists(st.tuples(st.sampled_from(["append", "half", "rename", "cut", "remove", "read"]), st.integers(1, 7))))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_history_gives_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[str, int]]
) -> None:
    """Every line is given once, in order; only what was cut away unread, or torn by a cut, may be missing."""
    path = tmp_path_factory.mktemp("tail") / "mail.log"
    tail = Tail(path, TailParams(retired_files=64))
    got = list(tail.read(0))
    serial = 0
    half = b""
    expected: list[bytes] = []
    pending: list[bytes] = []  # whole lines since the last read
    for step, count in history:
        if step in ("append", "half"):
            new = [b"line %d of the log" % n for n in range(serial, serial + count)]
            serial += count
            text = b"\n".join(new) + (b"\n" if step == "append" else b"")
            append(path, text)
            whole = (half + text).split(b"\n")
            half = whole.pop()
            pending += whole
        elif step == "rename" and path.exists():
            got += tail.read(0)
            expected, pending, half = expected + pending, [], b""
            path.rename(path.with_name(f"mail.log.{serial}.{len(list(path.parent.iterdir()))}"))
        elif step == "cut" and path.exists():
            got += tail.read(0)
            expected, pending, half = expected + pending, [], b""
            os.truncate(path, 0)
        elif step == "remove" and path.exists():
            got += tail.read(0)
            expected, pending, half = expected + pending, [], b""
            path.unlink()
        got += tail.read(0) if step == "read" else []
        if step == "read":
            expected, pending = expected + pending, []
    got += tail.read(0)
    tail.close()
    assert got == expected + pending


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        self.now_s += 1
        return self.now_s


REJECT = b"Nov  2 08:03:43 mx1 postfix/smtpd[7]: NOQUEUE: reject: RCPT from x[2001:db8::7]: 550 5.1.1 <a@b>: No; x\n"


def test_source_gives_events_with_their_arrival_time(path: Path, open_tail: Callable[..., Tail]) -> None:
    append(path, REJECT)
    source = TailSource("postfix", open_tail(), PostfixLog(PostfixParams()), Clock())
    assert source.poll() == []
    append(path, REJECT * 7 + b"\xff junk\n")
    events = source.poll()
    assert [(event.ts_s, event.lo) for event in events] == [(102.0, 7)] * 7
    stats = source.stats()
    assert (stats.name, stats.events, stats.lines, stats.errors, stats.dropped) == ("postfix", 7, 8, 0, 0)
    assert (stats.bytes, stats.lag_bytes, stats.last_event_s) == (len(REJECT) * 7 + 7, 0, 102.0)


def test_source_refuses_lines_and_goes_on(
    path: Path, open_tail: Callable[..., Tail], caplog: pytest.LogCaptureFixture
) -> None:
    source = TailSource("events", open_tail(), JsonLines(), Clock())
    source.poll()
    append(path, b'junk\n{"ts": 1, "src": "2001:db8::7", "dport": 25, "handshake": true}\nmore junk\n')
    with caplog.at_level(logging.WARNING):
        assert len(source.poll()) == 1
    assert source.stats().errors == 2
    (record,) = caplog.records
    fields = record.__dict__["fields"]
    assert (fields["count"], f"{path} line 1: expected" in fields["first"]) == (2, True)


class Picky:
    """A decoder that refuses everything."""

    def feed(self, line: bytes, ts_s: float) -> Event | None:
        raise InputError("expected nothing, found something")

    def counts(self) -> Mapping[str, int]:
        return {"lines": 7}

    def dropped(self) -> int:
        return 3


def test_stats_join_tail_and_decoder(path: Path, open_tail: Callable[..., Tail]) -> None:
    source = TailSource("picky", open_tail(), Picky(), Clock())
    source.poll()
    append(path, b"a\nb\n")
    assert source.poll() == []
    stats = source.stats()
    assert (stats.errors, stats.dropped, stats.last_event_s) == (2, 3, None)
    assert dict(stats.detail) == {"rotations": 0, "cuts": 0, "unread_bytes": 0, "lines": 7}
    source.close()
