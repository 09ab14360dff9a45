"""The limiter's rows, read through one memory mapping: no system call, no loop over rows.

bpf/rows.h says how a row is found: a keyed, invertible mix of the prefix chooses the line, and what the index does not
hold is the tag. Here the mix is done the same way for one prefix, and undone for many.

Invariants:
    mix-is-undone: unmix(mix(x)) == x for every 64-bit x.
    reading-writes-nothing: the mapping is read-only.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np

from edge.abi import LEVELS, LINE, Level, Service
from edge.core.prefix import Prefix
from edge.kernel.libbpf import Map
from edge.kernel.program import Sizes

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


@dataclass(frozen=True, slots=True)
class Limited:
    """A prefix whose row is live: how far its arrival time lies ahead of now, in seconds."""

    hi: int
    service: Service
    ahead_s: float


class Rows:
    """All levels' rows; keep it as long as the mapping is wanted."""

    def __init__(self, table: Map, sizes: Sizes, seed: int) -> None:
        self._sizes, self._seed = sizes, seed
        self._memory = mmap.mmap(table.fd.number, sizes.all_lines * LINE.itemsize, mmap.MAP_SHARED, mmap.PROT_READ)
        self._lines = np.frombuffer(self._memory, LINE)

    def level(self, level: Level) -> np.ndarray:
        """The lines of one level, as they change."""
        base = self._sizes.base(level)
        return self._lines[base : base + self._sizes.lines(level)]

    def active(self, now_ns: int) -> np.ndarray:
        """How many rows of each level are live: int64 (LEVELS,). One pass over the mapping."""
        return np.fromiter(
            (np.count_nonzero(self.level(level)["tat_ns"] > now_ns) for level in Level), np.int64, LEVELS
        )

    def tat_ns(self, prefix: Prefix, service: Service) -> int | None:
        """Theoretical arrival time of one prefix at a level's length; None when no row holds it."""
        level = prefix.level
        if level is None:
            raise ValueError(f"{prefix} is not at a level")
        lines = self._sizes.lines(level)
        mixed = mixed_key(prefix, self._seed)
        line = self.level(level)[mixed & (lines - 1)]
        tag = mixed & ~(lines - 1) & _U64 | service
        held = (line["tag"] ^ np.uint64(tag)) & np.uint64(~(lines - 1) & _U64 | 1) == 0
        return int(line["tat_ns"][held][0]) if held.any() else None

    def furthest(self, level: Level, now_ns: int, most: int) -> list[Limited]:
        """The live rows of a level (not /128, whose key is not invertible) with the most used of their burst."""
        if level is Level.L128:
            raise ValueError("rows at /128 do not hold their address")
        lines = self.level(level)
        index, way = np.nonzero(lines["tat_ns"] > now_ns)
        ahead = lines["tat_ns"][index, way] - np.uint64(now_ns)
        if len(ahead) > most:  # a partition first: sorting a million live rows costs 80 ms
            chosen = np.argpartition(ahead, -most)[-most:]
            index, way, ahead = index[chosen], way[chosen], ahead[chosen]
        top = np.argsort(ahead)[::-1]
        mask = np.uint64(self._sizes.lines(level) - 1)
        tags = lines["tag"][index[top], way[top]]
        keys = unmix(tags & ~mask | index[top].astype(np.uint64)) ^ np.uint64(self._seed)
        return [
            Limited(int(hi), Service(int(tag) & 1), float(far) / 1e9)
            for hi, tag, far in zip(keys, tags, ahead[top], strict=True)
        ]
