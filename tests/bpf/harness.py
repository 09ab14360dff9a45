"""A private copy of the program, run on built packets with a clock of the test's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edge.abi import (
    CROWDED_LEVELS,
    LEVELS,
    LIMIT,
    STANDINGS,
    TALLIES_PER_SET,
    TALLY,
    Level,
    Mode,
    Reason,
    Service,
    Standing,
)
from edge.config import Config
from edge.core.model import Entry
from edge.core.prefix import Prefix
from edge.kernel.connections import HELD
from edge.kernel.program import CROWDED_SLOTS, U32, Sizes
from edge.kernel.recorded import Judged, Recorded
from edge.kernel.rows import mixed_key

SMALL = Sizes(rows=(4096, 4096, 4096, 4096, 4096), policy_entries=4096, policy_ranges=1024, connections=1024)
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
        self.tables.forged.write({})
        self.tables.flood_until_s = 0.0
        self.tables.corrections.write({})
        for name in ("connections", "crowded", "crowded_levels"):
            self.clear(name)
        self.configure(config or Config(mode="enforce"))

    def clear(self, name: str) -> None:
        """Put zeros where an array map holds something else."""
        table = self.compiled.maps[name]
        keys, values = table.items()
        for key in keys[values.view("u1").reshape(len(values), -1).any(axis=1)]:
            table.put(np.array([key], U32), np.zeros((), table.value))

    def tally(self, prefix: str, *, service: Service = Service.MX, opened: int = 0, completed: int = 1) -> None:
        """Write the row of a prefix at a level's length, as the sockops program would."""
        at = Prefix.parse(prefix)
        assert at.level is not None
        sets, mixed = self.sizes.sets(at.level), mixed_key(at, self.tables.rows._seed)
        row = np.zeros((), TALLY)
        row["tag"] = mixed & ~(sets - 1) & (1 << 64) - 1 | HELD | service
        row["open"], row["completed"] = opened, completed
        table = self.compiled.maps["connections"]
        first = (self.sizes.set_base(at.level) + mixed % sets) * TALLIES_PER_SET
        for index in range(first, first + TALLIES_PER_SET):
            found = table.get(np.array([index], U32))
            assert found is not None
            if found["tag"] in (0, row["tag"]):
                table.put(np.array([index], U32), row)
                break
        most = self._crowded_from(service, at.level)
        if most and opened >= most:
            self._mark(at.level, mixed)

    def _crowded_from(self, service: Service, level: Level) -> int:
        control = self.compiled.maps["control"].get(np.zeros(1, U32))
        assert control is not None
        return int(control["crowded_from"][service * LEVELS + level])

    def _mark(self, level: Level, mixed: int) -> None:
        """Count a crowded prefix, where bpf/regions.h has it counted."""
        table, levels = self.compiled.maps["crowded"], self.compiled.maps["crowded_levels"]
        table.put(np.array([level * CROWDED_SLOTS + (mixed >> 32 & CROWDED_SLOTS - 1)], U32), np.ones((), "<u4"))
        total = np.zeros((), CROWDED_LEVELS)
        total["prefixes"][level] = 1
        levels.put(np.zeros(1, U32), total)

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
                value = np.array((interval, interval * (burst - 1), 0), LIMIT)
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
