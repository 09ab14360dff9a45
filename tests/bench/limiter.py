"""Our program with tables of its own, in a state that a measurement needs.

Invariants:
    rows-stay-live: a prefix that was charged for a measurement with live prefixes stays live until it is over.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from edge.abi import LEVELS, LIMIT, STANDINGS, Level, Origin, Reason, Service, Standing
from edge.config import Config
from edge.core.model import Entry
from edge.core.prefix import LENGTHS, Prefix
from edge.errors import UnavailableError
from edge.kernel import libbpf, program
from edge.kernel.compile import Compiled, write_identity
from edge.kernel.maps import Tables
from edge.kernel.program import Sizes
from edge.kernel.rows import NOBODY_NS
from tests.bench import packets

HERE = Path(__file__).parent
SIZES = Sizes(rows=(1 << 19, 1 << 21, 1 << 21, 1 << 21, 1 << 17))
"""Twice the default at /64, and as much at the shorter levels, so that a million live prefixes fit at each. Larger
tables cost more cache misses, not fewer."""

SECOND_NS = 1_000_000_000
LIVE_NS = 600 * SECOND_NS
"""Emission interval where rows are to stay live: longer than any run."""

BRIEF_NS = SECOND_NS // 10
"""Emission interval of a sweep: the default at /64, 600 a minute. Rows free themselves."""

WIDE_NS = 1 << 60
"""A burst tolerance that nothing here reaches (36 years)."""

PROVIDER_NS = 1_000
"""Emission interval at /32, which is charged for every packet: 10^6 a second, and WIDE_NS is 10^15 of them."""

STEERING = np.dtype(
    [
        ("next", "<u8"),
        ("sources", "<u4"),
        ("order", "<u4"),
        ("spread", "<u4"),
        ("ifindex", "<u4"),
        ("frame", "u1", (96,)),
    ]
)
"""struct steering of steer.h."""

DECOYS = 0x2600_0000_0000_0000
"""Where no source of steer.h is."""

FIXED, RANDOM, NEXT = range(3)
ZERO = np.zeros(1, program.U32)
EVERY_SOURCE = (1 << 32) - 1


def load(text: str, flags: list[str], names: Iterable[str]) -> tuple[Any, dict[str, int]]:
    """Compile XDP programs with the project's own minimal headers; the object to keep, and their descriptors."""
    os.environ["BCC_KERNEL_SOURCE"] = str(program.directory() / "headers")
    from bcc import BPF

    bpf = BPF(text=text.encode(), cflags=["-Wno-macro-redefined", *flags])
    return bpf, {name: int(bpf.load_func(name.encode(), BPF.XDP).fd) for name in names}


def steering_map(bpf: Any) -> libbpf.Map:
    """The map `steering` of a loaded text."""
    return libbpf.Map(libbpf.Fd(os.dup(bpf[b"steering"].map_fd)), program.U32, STEERING)


def source_hi(number: int, *, spread: bool = False) -> int:
    """Upper half of the source that steer.h makes of a number."""
    low = number * 0x9E3779B1 & 0xFFFFFFFF
    top = 0x2A000000 | (low * 0x85EBCA6B & 0xFFFFFFFF) >> 16 << 4 if spread else 0x20010DB8
    return top << 32 | low


def source_lo(number: int, *, spread: bool = False) -> int:
    """Its lower half: the complement, halves swapped."""
    hi = source_hi(number, spread=spread)
    return ~(hi << 32 | hi >> 32) & (1 << 64) - 1


def cut(text: str, cuts: Iterable[tuple[str, str]]) -> str:
    """The program without some of its steps; UnavailableError when a step is no longer written as it was."""
    for pattern, replacement in cuts:
        text, found = re.subn(pattern, replacement, text, flags=re.MULTILINE)
        if found != 1:
            raise UnavailableError(f"bpf/edge_xdp.c: expected one `{pattern}` to cut out, found {found}")
    return text


ENTRIES = ("bench_limiter", "bench_drop")
PLAIN = ("bench_parse", "bench_parse_drop", "bench_parse_steered", "bench_empty")


class Limiter:
    """One compiled instance in mode enforce, with nothing limited yet."""

    def __init__(self, text: str, sizes: Sizes = SIZES, names: tuple[str, ...] = ("edge_xdp", *ENTRIES)) -> None:
        whole = text + "".join(_numbered(name) for name in ("steer.h", "entries.c"))
        bpf, self.programs = load(whole, program.flags(sizes), names)
        compiled = Compiled(bpf, {})
        self.maps, self._compiled = compiled.maps, compiled
        write_identity(self.maps, sizes, 1)
        self.steering = steering_map(bpf)
        self.tables = Tables(self.maps, sizes)
        self.tables.configure(Config(mode="enforce"), time.monotonic() + 86400)  # its heartbeat outlives the run

    def limits(self, emission_ns: dict[Level, int], tolerance_ns: dict[Level, int]) -> None:
        """Limits of every service and standing; a level left out has no limit."""
        for service in Service:
            for standing in Standing:
                for level in Level:
                    index = (service * STANDINGS + standing) * LEVELS + level
                    value = np.array((emission_ns.get(level, 0), tolerance_ns.get(level, 0), 0), LIMIT)
                    self.maps["limits"].put(np.array([index], program.U32), value)
        # which limits a reading takes for spent follows from them, as it does in Tables.configure()
        self.tables.rows.spent_ns = [
            max(0, tolerance_ns.get(level, 0) - 2 * emission_ns[level]) if emission_ns.get(level) else NOBODY_NS
            for level in Level
        ]

    def admit_all(self, emission_ns: int = LIVE_NS) -> None:
        """Every level asked and charged, none refusing."""
        wide = dict.fromkeys(Level, WIDE_NS)
        self.limits({**dict.fromkeys(Level, emission_ns), Level.L32: PROVIDER_NS}, wide)

    def limit_at_64(self) -> None:
        """Every level asked; /64, the last, refuses all but the first connection."""
        self.limits(
            {**dict.fromkeys(Level, LIVE_NS), Level.L32: PROVIDER_NS}, {**dict.fromkeys(Level, WIDE_NS), Level.L64: 0}
        )

    def steer(self, order: int, sources: int = EVERY_SOURCE, *, spread: bool = False, start: int = 0) -> None:
        """Which sources `bench_limiter` sees."""
        record = np.zeros((), STEERING)
        record["next"], record["sources"], record["order"], record["spread"] = start, sources, order, spread
        self.steering.put(ZERO, record)

    def fill(self, count: int, *, spread: bool = False) -> None:
        """Charge each of the first `count` sources once: from then on their rows are live."""
        self.admit_all()
        self.steer(NEXT, spread=spread)
        libbpf.run_packet(self.programs["bench_limiter"], packets.SYN, repeat=count)

    def install(self, entries: list[Entry]) -> None:
        """Write policy entries as the daemon does."""
        self.tables.policy.announce(entries)
        self.tables.heartbeat(time.monotonic() + 86400)
        self.tables.policy.apply(entries, ())

    def counts(self) -> dict[str, int]:
        """Packets by reason so far."""
        totals = self.tables.read(0.0).counters.sum(axis=1)
        return {reason.name.lower(): int(totals[reason]) for reason in Reason if totals[reason]}


def _numbered(name: str) -> str:
    return f'#line 1 "{name}"\n' + (HERE / name).read_text(encoding="utf-8") + "\n"


def entry(prefix: Prefix, standing: Standing) -> Entry:
    """An operator's entry for port 25."""
    return Entry(
        prefix=prefix,
        service=Service.MX,
        standing=standing,
        origin=Origin.OPERATOR,
        expires_s=None,
        reason="benchmark",
    )


def blocks(count: int, decoys: int = 100) -> list[Entry]:
    """A block for the /64 of each of the first sources, and some at every other level that meet none of them, so that
    every level has to be looked at."""
    found = [entry(Prefix(source_hi(number), 0, 64), Standing.BLOCK) for number in range(count)]
    for level in (Level.L128, Level.L56, Level.L48, Level.L32):
        length = LENGTHS[level]
        found += [
            entry(Prefix(DECOYS + (number << 32), int(length == 128), length), Standing.BLOCK)
            for number in range(decoys)
        ]
    return found
