"""How a cost is measured: CPU time of one thread pinned to one CPU, in interleaved rounds.

CPU time leaves out the time other processes had the CPU. Packets that are redirected into a veth are processed by the
same thread's softirq, or by ksoftirqd of that CPU when it is busy: its time is added.

Invariants:
    ratios-are-of-one-round: two costs are compared round by round, never minimum with median.
"""

from __future__ import annotations

import ctypes as c
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from edge.kernel import libbpf

LIVE_FRAMES = 1 << 1  # BPF_F_TEST_XDP_LIVE_FRAMES: uapi/linux/bpf.h
BATCH = 64  # frames the kernel sends at once: its own default, and a NAPI poll's budget


@dataclass(frozen=True)
class Summary:
    """Of one value a round."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        return cls(min(values), statistics.median(values), max(values))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Summary:
    """ours / theirs, round by round."""
    return Summary.of([a / b for a, b in zip(ours, theirs, strict=True)])


@dataclass
class Cost:
    """Nanoseconds a packet, one value a round."""

    name: str
    ns: list[float] = field(default_factory=list)

    @property
    def summary(self) -> Summary:
        return Summary.of(self.ns)


@contextmanager
def pinned() -> Iterator[int]:
    """Keep this thread on the last CPU it may use; yields its number."""
    before = os.sched_getaffinity(0)
    cpu = max(before)
    os.sched_setaffinity(0, {cpu})
    try:
        yield cpu
    finally:
        os.sched_setaffinity(0, before)


def repeat(program: int, packet: bytes, count: int) -> float:
    """CPU nanoseconds a run of a program on one packet."""
    began = time.thread_time_ns()
    libbpf.run_packet(program, packet, repeat=count)
    return (time.thread_time_ns() - began) / count


class Softirq:
    """ksoftirqd of one CPU."""

    def __init__(self, cpu: int) -> None:
        name = f"ksoftirqd/{cpu}"
        found = [path.parent for path in Path("/proc").glob("[0-9]*/comm") if _read(path).strip() == name]
        self._schedstat = found[0] / "schedstat" if found else None

    def ns(self) -> int:
        """CPU time it has used; 0 where the kernel does not say."""
        text = _read(self._schedstat) if self._schedstat else ""
        return int(text.split()[0]) if text else 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # a process that ended meanwhile


def live(generator: int, frame: bytes, count: int, softirq: Softirq) -> float:
    """Send frames by a generator program; CPU nanoseconds a frame, receiver included. Call inside its namespace."""
    data = c.create_string_buffer(frame, len(frame))
    opts = libbpf._TestRunOpts(sz=c.sizeof(libbpf._TestRunOpts), data_size_in=len(frame), repeat=count)
    opts.data_in = c.cast(data, c.c_void_p)
    opts.flags, opts.batch_size = LIVE_FRAMES, BATCH
    others, began = softirq.ns(), time.thread_time_ns()
    libbpf._call("send live frames", "bpf_prog_test_run_opts", generator, c.byref(opts))
    return (time.thread_time_ns() - began + softirq.ns() - others) / count
