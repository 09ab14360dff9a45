"""Evidence of one service at one level: columns, a row a prefix, a fixed most.

Rows decay lazily: a row holds its weights as of `at_s`, and is brought up to date when touched or read.

Invariants:
    table-is-bounded: never more rows than the capacity, nor more than `group` rows that share a /64.
    least-weight-goes-first: what is dropped weighs least; good evidence counts four times, because losing a good
        neighbour costs more than losing one bad address among many.
    touched-rows-stay: a row touched in this batch is not dropped by it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROW = np.dtype(
    [
        ("hi", "<u8"),
        ("lo", "<u8"),
        ("bad", "<f8"),  # decayed weights, together at most `memory`
        ("good", "<f8"),
        ("bad_children", "<f8"),  # distinct children that lean so, decayed
        ("good_children", "<f8"),
        ("agree", "<f8"),  # distinct /56s below whose /64s were all bad, and those that were of two minds
        ("differ", "<f8"),
        ("cleared", "<f8"),  # blocks below whose trial ended well, and those that had to be set again
        ("relapsed", "<f8"),
        ("hourly", "<f8"),  # bad weight with a time constant of one hour: a steady rate reads as its number an hour
        ("at_s", "<f8"),
        ("made_s", "<f8"),
        ("last_s", "<f8"),  # last scored event; -inf before the first
        ("good_s", "<f8"),  # last event with good weight; -inf before the first
        ("counted_s", "<f8"),  # when its parent last counted it as `lean` and `unit` say
        ("events", "<u8"),  # scored events, never decayed
        ("lean", "i1"),  # LEAN_*: what its parent counts it as
        ("unit", "i1"),  # UNIT_*: of a /56, what the network above counts it as
    ]
)

LEAN_NONE, LEAN_BAD, LEAN_GOOD = 0, 1, 2
UNIT_NONE, UNIT_AGREES, UNIT_DIFFERS = 0, 1, 2

HOUR_S = 3600.0

_DECAYING = ("bad", "good", "bad_children", "good_children", "agree", "differ", "cleared", "relapsed")
_GOOD_COUNTS = 4.0
_FIRST_ROWS = 1024

Rows = NDArray[np.int64]


class Table:
    """Rows by key: the upper half of the address, or both halves as one number at /128."""

    def __init__(self, *, capacity: int, half_life_s: float, group: int = 0) -> None:
        self.capacity, self.half_life_s, self.group = capacity, half_life_s, group
        self.rows = np.zeros(min(capacity, _FIRST_ROWS), ROW)
        self.index: dict[int, int] = {}
        self.groups: dict[int, list[int]] = {}  # /64 -> rows, only when `group` is set
        self.dropped = 0
        self.refused = 0
        self._free = list(range(len(self.rows) - 1, -1, -1))
        self._order: tuple[Rows, NDArray[np.uint64]] | None = None  # live rows by `hi`; None after any came or went

    def __len__(self) -> int:
        return len(self.index)

    def find(self, key: int) -> int | None:
        """The row of a key."""
        return self.index.get(key)

    def inside(self, first: int, last: int) -> Rows:
        """The rows whose upper half lies in this closed range, in order of their upper halves.

        Rows are sorted once for all questions of a tick: judging many parents must not scan the table for each.
        """
        if self._order is None:
            live = np.fromiter(self.index.values(), np.int64, len(self.index))
            live = live[np.argsort(self.rows["hi"][live], kind="stable")]
            self._order = live, self.rows["hi"][live]
        order, his = self._order
        return order[np.searchsorted(his, np.uint64(first)) : np.searchsorted(his, np.uint64(last), "right")]

    def factor(self, rows: Rows, now_s: float) -> NDArray[np.float64]:
        """What the decaying weights of these rows have to be multiplied by to be those of now."""
        age = np.maximum(0.0, now_s - self.rows["at_s"][rows])
        return np.asarray(np.exp2(-age / self.half_life_s), dtype=np.float64)

    def touch(self, keys: list[int], now_s: float) -> Rows:
        """The rows of distinct keys, made where missing, their weights decayed to now; -1 where there was no room."""
        found = np.fromiter((self.index.get(key, -1) for key in keys), np.int64, len(keys))
        kept = {int(row) for row in found if row >= 0}
        full: set[int] = set()
        missing = np.flatnonzero(found < 0)
        for at in missing.tolist():
            row = self._make(keys[at], now_s, kept, full)
            found[at] = row
            if row >= 0:
                kept.add(row)
        made = found[missing]
        self._clear(made[made >= 0], [keys[at] for at in missing[made >= 0].tolist()], now_s)
        self.refused += int((found < 0).sum())
        self._decay(found[found >= 0], now_s)
        return found

    def _decay(self, rows: Rows, now_s: float) -> None:
        """Bring rows up to date; a clock that went back changes nothing."""
        factor = self.factor(rows, now_s)
        age = np.maximum(0.0, now_s - self.rows["at_s"][rows])
        for name in _DECAYING:
            self.rows[name][rows] *= factor
        self.rows["hourly"][rows] *= np.exp(-age / HOUR_S)
        self.rows["at_s"][rows] = np.maximum(self.rows["at_s"][rows], now_s)

    def _clear(self, rows: Rows, keys: list[int], now_s: float) -> None:
        """Make fresh rows of these, one a key."""
        self.rows[rows] = np.zeros((), ROW)
        shift = 64 if self.group else 0
        self.rows["hi"][rows] = np.array([key >> shift for key in keys], np.uint64)
        if self.group:
            self.rows["lo"][rows] = np.array([key & ((1 << 64) - 1) for key in keys], np.uint64)
        self.rows["at_s"][rows] = self.rows["made_s"][rows] = now_s
        self.rows["last_s"][rows] = self.rows["good_s"][rows] = -np.inf

    def _make(self, key: int, now_s: float, kept: set[int], full: set[int]) -> int:
        """Give a key a row, still to be cleared, or -1 when every candidate for dropping was touched in this batch."""
        hi = key >> 64 if self.group else key
        if self.group and not self._room_in_group(hi, now_s, kept, full):
            return -1
        if len(self.index) >= self.capacity:
            if len(kept) >= self.capacity:
                return -1
            self._drop_least(now_s, kept)
        if not self._free:
            self._grow()
        if not self._free:
            return -1
        row = self._free.pop()
        self.index[key] = row
        self._order = None
        if self.group:
            self.groups.setdefault(hi, []).append(row)
        return row

    def _room_in_group(self, hi: int, now_s: float, kept: set[int], full: set[int]) -> bool:
        members = self.groups.get(hi, [])
        if len(members) < self.group:
            return True
        if hi in full:
            return False
        loose = np.array([row for row in members if row not in kept], np.int64)
        if not len(loose):
            full.add(hi)
            return False
        self._drop(int(loose[np.argmin(self._weight(loose, now_s))]))
        return True

    def _weight(self, rows: Rows, now_s: float) -> NDArray[np.float64]:
        values = self.rows[rows]
        bad = values["bad"] + values["bad_children"]
        good = values["good"] + values["good_children"]
        return np.asarray((bad + _GOOD_COUNTS * good) * self.factor(rows, now_s), dtype=np.float64)

    def _drop_least(self, now_s: float, kept: set[int]) -> None:
        """Drop a sixteenth of the table, the lightest of what was not touched."""
        loose = np.array([row for row in self.index.values() if row not in kept], np.int64)
        count = min(len(loose), max(1, self.capacity // 16))
        if count:
            order = np.lexsort((loose, self._weight(loose, now_s)))
            for row in loose[order[:count]].tolist():
                self._drop(row)

    def _drop(self, row: int) -> None:
        hi, lo = int(self.rows["hi"][row]), int(self.rows["lo"][row])
        del self.index[hi << 64 | lo if self.group else hi]
        if self.group:
            self.groups[hi].remove(row)
            if not self.groups[hi]:
                del self.groups[hi]
        self._free.append(row)
        self._order = None
        self.dropped += 1

    def _grow(self) -> None:
        before = len(self.rows)
        after = min(self.capacity, 2 * before)
        if after > before:
            self.rows = np.concatenate([self.rows, np.zeros(after - before, ROW)])
            self._free = list(range(after - 1, before - 1, -1))
