"""The limiter's rows, read through one memory mapping: no system call, no loop over rows.

bpf/rows.h says how a row is found: a keyed, invertible mix of the prefix chooses the line, and what the index does not
hold is the tag. Here the mix is done the same way for one prefix, and undone for many.

Invariants:
    mix-is-undone: unmix(mix(x)) == x for every 64-bit x.
    reading-writes-nothing: the mapping is read-only.
"""

from __future__ import annotations

import mmap

import numpy as np

from edge.abi import LEVELS, LINE, ROWS_PER_LINE, Level, Service
from edge.core.prefix import Prefix
from edge.core.snapshot import LIMITED
from edge.kernel.libbpf import Map
from edge.kernel.program import Sizes

CHUNK = 1 << 14
"""Lines read at once: 512 KiB of arrival times, so that they are still in the second-level cache when asked again."""

MOST_LIMITED = 512
"""Prefixes of a level that a reading names: to forge more at once takes 5,000 SYNs a second at /64, ten each."""

MOST_SPENT = 65_536
"""Of more spent limits a level every second, third, ... is looked at: each takes ten connections a second to stay so,
and a reading stays as quick as it is."""

NOBODY_NS = 1 << 62
"""So far ahead lies no arrival time: 146 years."""

OF_OTHERS = 2 | 4
"""ROW_OF_VERIFIED and ROW_OF_PROVED of bpf/rows.h: the other rows of a forged prefix."""

_U64 = (1 << 64) - 1
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""Multipliers of splitmix64's finalizer, as in bpf/rows.h."""


def mix(x: int) -> int:
    """bpf/rows.h's mix(): a bijection of 64-bit numbers."""
    x = (x ^ x >> 30) * _FIRST & _U64
    x = (x ^ x >> 27) * _SECOND & _U64
    return x ^ x >> 31


def mixed_key(prefix: Prefix, seed: int) -> int:
    """bpf/rows.h's mixed_key() of a prefix at a level's length."""
    mixed = mix(prefix.hi ^ seed)
    return mix(mixed ^ prefix.lo) if prefix.lo else mixed


def unmix(x: np.ndarray) -> np.ndarray:
    """The inverse of mix(), for an array of uint64."""
    x = _unshift(x, 31) * np.uint64(pow(_SECOND, -1, 1 << 64))
    x = _unshift(x, 27) * np.uint64(pow(_FIRST, -1, 1 << 64))
    return _unshift(x, 30)


def _unshift(x: np.ndarray, by: int) -> np.ndarray:
    """Undo x ^= x >> by."""
    result = x.copy()
    for _ in range(64 // by):
        result = x ^ result >> np.uint64(by)
    return result


class Rows:
    """All levels' rows; keep it as long as the mapping is wanted."""

    def __init__(self, table: Map, sizes: Sizes, seed: int) -> None:
        self._sizes, self._seed = sizes, seed
        self._memory = mmap.mmap(table.fd.number, sizes.all_lines * LINE.itemsize, mmap.MAP_SHARED, mmap.PROT_READ)
        self._lines = np.frombuffer(self._memory, LINE)
        self.spent_ns = [NOBODY_NS] * LEVELS
        """How far ahead of now a row lies whose limit counts as spent, by level."""

    def level(self, level: Level) -> np.ndarray:
        """The lines of one level, as they change."""
        base = self._sizes.base(level)
        return self._lines[base : base + self._sizes.lines(level)]

    def read(self, now_ns: int) -> tuple[np.ndarray, np.ndarray]:
        """How many rows of each level are live, int64 (LEVELS,), and LIMITED rows of the prefixes that have spent their
        limit: of each level but /128 those least far ahead, which are unknown senders' before suspects'. One pass over
        the mapping."""
        active = np.zeros(LEVELS, np.int64)
        found = []
        for level in Level:
            tat_ns = self.level(level)["tat_ns"]
            spent = []
            for first in range(0, len(tat_ns), CHUNK):
                # once from memory; both questions are then asked of the cache
                chunk = tat_ns[first : first + CHUNK].ravel()
                active[level] += np.count_nonzero(chunk > now_ns)
                beyond = np.flatnonzero(chunk > now_ns + self.spent_ns[level])
                spent.append(beyond + first * ROWS_PER_LINE)
            if level is not Level.L128:
                at = np.concatenate(spent)
                found.append(self._limited(level, at[:: len(at) // MOST_SPENT + 1], now_ns))
        return active, np.concatenate(found)

    def _limited(self, level: Level, at: np.ndarray, now_ns: int) -> np.ndarray:
        """LIMITED rows of some rows of a level; those of verified and proved senders are left out."""
        lines = self.level(level)
        index, way = at // ROWS_PER_LINE, at % ROWS_PER_LINE
        tags, ahead_ns = lines["tag"][index, way], lines["tat_ns"][index, way].astype(np.int64) - now_ns
        ordinary = np.flatnonzero(tags & np.uint64(OF_OTHERS) == 0)
        if len(ordinary) > MOST_LIMITED:  # not a sort: of a million rows it takes 80 ms
            ordinary = ordinary[np.argpartition(ahead_ns[ordinary], MOST_LIMITED)[:MOST_LIMITED]]
        ordinary = ordinary[np.argsort(ahead_ns[ordinary], kind="stable")]
        mask = np.uint64(self._sizes.lines(level) - 1)
        rows = np.empty(len(ordinary), LIMITED)
        rows["hi"] = unmix(tags[ordinary] & ~mask | index[ordinary].astype(np.uint64)) ^ np.uint64(self._seed)
        rows["level"], rows["service"] = level, tags[ordinary] & np.uint64(1)
        rows["ahead_s"] = ahead_ns[ordinary] / 1e9
        return rows

    def tat_ns(self, prefix: Prefix, service: Service) -> int | None:
        """Theoretical arrival time of one prefix at a level's length; None when no row holds it."""
        level = prefix.level
        if level is None:
            raise ValueError(f"{prefix} is not at a level")
        lines = self._sizes.lines(level)
        mixed = mixed_key(prefix, self._seed)
        line = self.level(level)[mixed & (lines - 1)]
        tag = mixed & ~(lines - 1) & _U64 | service
        held = (line["tag"] ^ np.uint64(tag)) & np.uint64(~(lines - 1) & _U64 | OF_OTHERS | 1) == 0
        return int(line["tat_ns"][held][0]) if held.any() else None
