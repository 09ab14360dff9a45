"""A private copy of the program, run on built packets with a clock of the test's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edge.abi import LEVELS, LIMIT, STANDINGS, Level, Mode, Reason, Service, Standing
from edge.config import Config
from edge.core.model import Entry
from edge.core.prefix import Prefix
from edge.kernel.program import U32, Sizes
from edge.kernel.recorded import Judged, Recorded

SMALL = Sizes(rows=(4096, 4096, 4096, 4096, 4096), policy_entries=4096, policy_ranges=1024, handshakes=1024)
SECOND = 1_000_000_000
START_S = 1000.0


class Harness:
    """One loaded program; `reset` makes it as new, with the default configuration in mode enforce."""

    def __init__(self, sizes: Sizes = SMALL) -> None:
        self.sizes = sizes
        self.recorded = Recorded(sizes)
        self.compiled, self.tables = self.recorded.compiled, self.recorded.tables
        self.now_s = START_S

    def reset(self, config: Config | None = None) -> None:
        self.now_s = START_S
        maps = self.compiled.maps
        rows = maps["rows"]
        for index in self._used_lines():
            rows.put(np.array([index], U32), np.zeros((), rows.value))
        maps["untracked"].put(np.zeros(1, U32), np.zeros(1, "<u8"))
        for reason in Reason:
            counter = maps["counters"]
            counter.put(np.array([reason], U32), np.zeros(counter.copies, counter.value))
        self.tables.policy.apply((), tuple(self.tables.policy.installed().values()))
        for key in maps["handshakes"].items()[0]:
            maps["handshakes"].delete(key)
        self.configure(config or Config(mode="enforce"))

    def _used_lines(self) -> Sequence[int]:
        lines = self.tables.rows._lines
        used: list[int] = np.nonzero(lines["tat_ns"].any(axis=1) | lines["tag"].any(axis=1))[0].tolist()
        return used

    def configure(self, config: Config) -> None:
        self.tables.configure(config, self.now_s)

    def limit(self, limits: Mapping[Level, tuple[int, int]], standing: Standing = Standing.NEW) -> None:
        """Set (emission interval ns, burst) by level for every service; levels left out have no limit."""
        for service in Service:
            for level in Level:
                interval, burst = limits.get(level, (0, 1))
                index = (service * STANDINGS + standing) * LEVELS + level
                value = np.array((interval, interval * (burst - 1)), LIMIT)
                self.compiled.maps["limits"].put(np.array([index], U32), value)

    def install(self, *entries: Entry) -> None:
        self.tables.policy.announce(entries)
        self.tables.heartbeat(self.now_s)
        self.tables.policy.apply(entries, ())

    def judge(self, frame: bytes, now_s: float | None = None) -> Judged:
        """Run one frame at a time given in seconds (default: the harness's own)."""
        return self.recorded.judge(frame, int((self.now_s if now_s is None else now_s) * SECOND))

    def judge_ns(self, frame: bytes, now_ns: int) -> Judged:
        return self.recorded.judge(frame, now_ns)

    def counters(self) -> dict[Reason, tuple[int, int]]:
        totals = self.tables.read(self.now_s).counters
        return {reason: (int(totals[reason, 0]), int(totals[reason, 1])) for reason in Reason}

    def observe(self) -> None:
        self.configure(Config(mode=Mode.OBSERVE.name.lower()))  # type: ignore[arg-type]  # the word is one of the two


def entry(
    prefix: str,
    standing: Standing,
    *,
    service: Service = Service.MX,
    expires_s: float | None = None,
    origin: int = 0,
) -> Entry:
    from edge.abi import Origin

    return Entry(
        prefix=Prefix.parse(prefix),
        service=service,
        standing=standing,
        origin=Origin(origin),
        expires_s=expires_s,
        reason="test",
        decision=7,
    )
