"""The tallies of connections, read through one memory mapping: what changed since the reading before.

bpf/tally.h says where a prefix's row is, bpf/edge_sockops.c what is counted in it. The cost of a reading is one pass
over the times of last change; everything else grows with the rows that changed.

Invariants:
    reading-writes-nothing: the mapping is read-only.
    nothing-counted-twice: a handshake is in one reading's difference only, also when its row changed hands meanwhile.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np

from edge.abi import LEVELS, SERVICES, SKETCH_WINDOW_S, TALLIES_PER_SET, TALLY, Level, Service
from edge.core.prefix import Prefix
from edge.core.reconcile import OPEN
from edge.core.sketch import distinct
from edge.core.snapshot import CONNECTIONS
from edge.kernel.libbpf import Map
from edge.kernel.program import Sizes
from edge.kernel.rows import mixed_key, unmix

HELD = 2
"""TALLY_HELD of bpf/tally.h: the tag is a prefix's."""

SLACK_NS = 1_000_000_000
"""A change is seen up to this long after the time written with it (a virtual CPU may be paused in between)."""

_U64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What one prefix's row holds."""

    open: int
    completed: int
    children: float  # estimate of the distinct children with a handshake in the last one to two windows
    last_s: float  # CLOCK_MONOTONIC of the last change


class Connections:
    """The map `connections`; keep it as long as the mapping is wanted."""

    def __init__(self, table: Map, sizes: Sizes, seed: int) -> None:
        self._sizes, self._seed = sizes, seed
        count = sizes.all_sets * TALLIES_PER_SET
        self._memory = mmap.mmap(table.fd.number, count * TALLY.itemsize, mmap.MAP_SHARED, mmap.PROT_READ)
        self._rows = np.frombuffer(self._memory, TALLY)
        self._levels = np.repeat(
            np.arange(LEVELS, dtype=np.uint8), [sizes.sets(level) * TALLIES_PER_SET for level in Level]
        )
        self._since_ns: int | None = None
        # as of the reading before: whose row it was, and how far it had counted
        self._tags = np.zeros(count, np.uint64)
        self._completed = np.zeros(count, np.uint64)
        self._newcomers = np.zeros(count, np.uint64)

    def read(self, now_ns: int) -> np.ndarray:
        """CONNECTIONS rows of all prefixes but /128s that changed since the last call; the first call finds none."""
        first = self._since_ns is None
        since_ns = self._since_ns or 0
        self._since_ns = now_ns
        at = np.flatnonzero(self._rows["last_ns"] > max(0, since_ns - SLACK_NS))
        rows = self._rows[at]
        held = rows["tag"] & np.uint64(HELD) != 0
        at, rows = at[held], rows[held]
        same = rows["tag"] == self._tags[at]
        completed = _more(rows["completed"], self._completed[at], same)
        newcomers = _more(rows["newcomers"], self._newcomers[at], same)
        self._tags[at], self._completed[at], self._newcomers[at] = rows["tag"], rows["completed"], rows["newcomers"]
        levels = self._levels[at]
        # within the slack most rows are as they were
        changed = (completed > 0) | (rows["last_ns"] > since_ns)
        wanted = changed & (levels != Level.L128) if not first else np.zeros(len(at), bool)
        found = np.empty(int(wanted.sum()), CONNECTIONS)
        found["level"] = levels[wanted]
        found["service"] = rows["tag"][wanted] & np.uint64(1)
        found["hi"] = self._keys(at[wanted], rows["tag"][wanted])
        found["completed"], found["newcomers"] = completed[wanted], newcomers[wanted]
        found["open"] = rows["open"][wanted].astype(np.int64)
        return found

    def of(self, prefix: Prefix, service: Service, now_s: float) -> Tally | None:
        """The row of one prefix at a level's length; None where there is none."""
        level = prefix.level
        if level is None:
            raise ValueError(f"{prefix} is not at a level")
        mask = self._sizes.sets(level) - 1
        mixed = mixed_key(prefix, self._seed)
        first = (self._sizes.set_base(level) + (mixed & mask)) * TALLIES_PER_SET
        rows = self._rows[first : first + TALLIES_PER_SET].copy()
        own = rows[rows["tag"] == np.uint64(mixed & ~mask & _U64 | HELD | service)]
        if not len(own):
            return None
        row = own[:1]
        seen = distinct(row["window"], row["recent"], row["before"], int(now_s / SKETCH_WINDOW_S))
        return Tally(
            open=int(row["open"][0]),
            completed=int(row["completed"][0]),
            children=float(seen[0]),
            last_s=int(row["last_ns"][0]) / 1e9,
        )

    def open(self, level: Level) -> np.ndarray:
        """OPEN rows of the prefixes of a level (not /128, whose key is not invertible) with open connections."""
        at, rows = self._open_rows(level)
        found = np.empty(len(at), OPEN)
        found["hi"], found["service"] = self._keys(at, rows["tag"]), rows["tag"] & np.uint64(1)
        found["count"] = rows["open"].astype(np.int64)
        return found

    def open_by_service(self) -> np.ndarray:
        """Open connections of each service, int64 (SERVICES,): those that a /64 (or IPv4 address) had room for."""
        _, rows = self._open_rows(Level.L64)
        services = (rows["tag"] & np.uint64(1)).astype(np.int64)
        return np.bincount(services, weights=rows["open"].astype(np.int64), minlength=SERVICES).astype(np.int64)

    def _open_rows(self, level: Level) -> tuple[np.ndarray, np.ndarray]:
        """The rows of a level with open connections: where they are, and a copy."""
        base = self._sizes.set_base(level) * TALLIES_PER_SET
        rows = self._rows[base : base + self._sizes.sets(level) * TALLIES_PER_SET]
        at = np.flatnonzero(rows["open"])
        return at + base, rows[at]

    def _keys(self, at: np.ndarray, tags: np.ndarray) -> np.ndarray:
        """Upper halves of the prefixes that rows `at` hold."""
        masks = np.array([self._sizes.sets(level) - 1 for level in Level], np.uint64)
        bases = np.array([self._sizes.set_base(level) for level in Level], np.uint64)
        levels = self._levels[at]
        sets = at.astype(np.uint64) // np.uint64(TALLIES_PER_SET) - bases[levels]
        return unmix(tags & ~masks[levels] | sets) ^ np.uint64(self._seed)


def _more(now: np.ndarray, before: np.ndarray, same: np.ndarray) -> np.ndarray:
    """What was counted since: all of it where the row is another prefix's, or was given away and came back."""
    return np.where(same & (now >= before), now - before, now)
