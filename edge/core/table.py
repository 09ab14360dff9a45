"""Evidence of one service at one level: columns, a row a prefix, a fixed most.

Rows decay lazily: a row holds its weights as of `at_s`, and is brought up to date when touched or read. A row takes 128
bytes, and 12 in the index. The weights are float64: a busy row is multiplied by 1 - 3e-7 every second, and float32
would round that away.

Invariants:
    table-is-bounded: never more rows than the capacity, nor more than `group` rows that share a /64.
    least-weight-goes-first: what is dropped weighs least; good evidence counts four times, because losing a good
        neighbour costs more than losing one bad address among many.
    touched-rows-stay: a row touched in this batch is not dropped by it.
    rows-are-found-again: a key has one row from when it is made until it is dropped.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge.core.index import Index, Keys, Rows

_WEIGHTS = (
    ("bad", "<f8"),  # decayed weights, together at most `memory`
    ("good", "<f8"),
    ("bad_children", "<f8"),  # distinct children that lean so, decayed
    ("good_children", "<f8"),
    ("agree", "<f8"),  # distinct /56s below whose /64s were all bad, and those that were of two minds
    ("differ", "<f8"),
    ("cleared", "<f8"),  # blocks below whose trial ended well, and those that had to be set again
    ("relapsed", "<f8"),
)

ROW = np.dtype(
    [
        *_WEIGHTS,
        ("hourly", "<f8"),  # bad weight with a time constant of one hour: a steady rate reads as its number an hour
        ("hi", "<u8"),
        ("lo", "<u8"),
        ("at_s", "<f8"),
        ("made_s", "<f8"),
        ("last_s", "<f8"),  # last scored event, when its parent counted it as `lean` and `unit` say; -inf before
        ("good_s", "<f8"),  # last event with good weight; -inf before the first
        ("events", "<u4"),  # scored events, never decayed; at most 2^32 - 1
        ("lean", "i1"),  # LEAN_*: what its parent counts it as
        ("unit", "i1"),  # UNIT_*: of a /56, what the network above counts it as
    ],
    align=True,
)

EVENTS_MOST = (1 << 32) - 1

LEAN_NONE, LEAN_BAD, LEAN_GOOD = 0, 1, 2
UNIT_NONE, UNIT_AGREES, UNIT_DIFFERS = 0, 1, 2

HOUR_S = 3600.0

_DECAYING = np.dtype(
    {"names": ["all"], "formats": [("<f8", (len(_WEIGHTS),))], "offsets": [0], "itemsize": ROW.itemsize}
)
"""The same rows, with the columns of _WEIGHTS as one."""

_WHOLE = np.dtype(("V", ROW.itemsize))
"""The same rows without columns: numpy copies those 15 times as fast."""

_GOOD_COUNTS = 4.0
_FIRST_ROWS = 256
_GROWTH = 8
"""How many times as large a full table becomes: a million rows are copied four times on their way, 19 MB in all."""


class Table:
    """Rows by key: the upper half of the address and, at /128, its lower half, which is 0 elsewhere."""

    def __init__(self, *, capacity: int, half_life_s: float, group: int = 0) -> None:
        self.capacity, self.half_life_s, self.group = capacity, half_life_s, group
        self.rows = np.zeros(min(capacity, _FIRST_ROWS), ROW)
        self.dropped = 0
        self.refused = 0
        self._index = Index()  # by upper half
        self._used = 0  # rows from here on were never given out
        self._free = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._index)

    def find(self, hi: int, lo: int = 0) -> int | None:
        """The row of a key."""
        for row in self._index.find(hi):
            if not self.group or int(self.rows["lo"][row]) == lo:
                return row
        return None

    def find_all(self, hi: Keys, lo: Keys | None = None) -> Rows:
        """The rows of these keys; -1 where there is none. Without `lo` it is 0."""
        found = np.full(len(hi), -1, np.int64)
        for keys, rows in self._index.runs:
            at = np.searchsorted(keys, hi)
            left = np.flatnonzero(at < len(keys))
            while len(left):  # once, or as often as there are rows in the fullest /64
                at_left = at[left]
                inside = keys[at_left] == hi[left]
                left, row = left[inside], rows[at_left[inside]]
                if not self.group or lo is None:
                    found[left] = row
                    break
                same = self.rows["lo"][row] == lo[left]
                found[left[same]] = row[same]
                left = left[~same]
                at[left] += 1
                left = left[at[left] < len(keys)]
        return found

    def values(self, rows: Rows) -> np.ndarray:
        """A copy of these rows. Numpy takes whole rows 25 times as fast as it looks them up by index."""
        return self.rows.take(rows)

    def inside(self, first: int, last: int) -> Rows:
        """The rows whose upper half lies in this closed range, in order of their upper halves."""
        return self._index.between(first, last)

    def factor(self, rows: Rows, now_s: float) -> NDArray[np.float64]:
        """What the decaying weights of these rows have to be multiplied by to be those of now."""
        return self._factor(np.maximum(0.0, now_s - self.rows["at_s"][rows]))

    def touch(self, hi: Keys, lo: Keys | None, now_s: float) -> Rows:
        """The rows of distinct keys in rising order, made where missing, their weights decayed to now; -1 where there
        was no room. `lo` is None where the upper half is the key."""
        found = self.find_all(hi, lo)
        known = found >= 0
        if known.any():
            self._decay(found[known], now_s)
        if not known.all():
            low = np.zeros(len(hi), np.uint64) if lo is None else lo
            found[~known] = self._make(hi[~known], low[~known], found[known], now_s)
            self.refused += int((found < 0).sum())
        return found

    def _factor(self, age_s: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.exp2(-age_s / self.half_life_s), dtype=np.float64)

    def _decay(self, rows: Rows, now_s: float) -> None:
        """Bring rows up to date; a clock that went back changes nothing."""
        at_s = self.rows["at_s"][rows]
        age_s = np.maximum(0.0, now_s - at_s)
        self.rows.view(_DECAYING)["all"][rows] *= self._factor(age_s)[:, np.newaxis]
        self.rows["hourly"][rows] *= np.exp(-age_s / HOUR_S)
        self.rows["at_s"][rows] = np.maximum(at_s, now_s)

    def _make(self, hi: Keys, lo: Keys, touched: Rows, now_s: float) -> Rows:
        """Fresh rows for keys that have none, or -1 when every candidate for dropping was touched in this batch."""
        made = np.full(len(hi), -1, np.int64)
        fresh = np.arange(len(hi))
        if self.group:
            fresh = self._replace_in_groups(hi, made, touched, now_s)
        room = self.capacity - len(self)
        if len(fresh) > room:
            room += self._drop_lightest(len(fresh) - room, np.concatenate([touched, made[made >= 0]]), now_s)
            fresh = fresh[:room]
        made[fresh] = self._take(len(fresh))
        self._index.add(hi[fresh], made[fresh])
        done = made >= 0
        self._clear(made[done], hi[done], lo[done], now_s)
        return made

    def _clear(self, rows: Rows, hi: Keys, lo: Keys, now_s: float) -> None:
        """Make fresh rows of these, one a key."""
        values = self.rows
        values.view(_WHOLE)[rows] = np.zeros(1, ROW).view(_WHOLE)
        values["hi"][rows], values["lo"][rows] = hi, lo
        values["at_s"][rows] = values["made_s"][rows] = now_s
        values["last_s"][rows] = values["good_s"][rows] = -np.inf

    def _replace_in_groups(self, hi: Keys, made: Rows, touched: Rows, now_s: float) -> Rows:
        """Give the keys of full /64s the lightest rows there, and say which keys of other /64s may have a new one.

        A row that changes hands within its /64 keeps its place in the index.
        """
        names, first, which, counts = np.unique(hi, return_index=True, return_inverse=True, return_counts=True)
        room = self.group - self._index.count(names)
        excess = np.arange(len(hi)) - (first + room)[which]  # from 0 on: the first, second, ... that has no room
        if (excess >= 0).any():
            loose, begin, end = self._loose_members(names, room < counts, touched, now_s)
            at = begin[which] + excess
            taken = np.flatnonzero((excess >= 0) & (at < end[which]))
            made[taken] = loose[at[taken]]
            self.dropped += len(taken)
        return np.flatnonzero(excess < 0)

    def _loose_members(
        self, names: Keys, crowded: NDArray[np.bool_], touched: Rows, now_s: float
    ) -> tuple[Rows, Rows, Rows]:
        """The rows that may be dropped in the crowded among these /64s, and where each /64 begins and ends in them:
        the lightest of each first."""
        rows, owner = self._index.members(names[crowded])
        owner = np.flatnonzero(crowded)[owner]
        stays = ~self._marked(touched)[rows]
        rows, owner = rows[stays], owner[stays]
        order = np.lexsort((rows, self.rows["made_s"][rows], self._weight(rows, now_s), owner))
        numbers = np.arange(len(names))
        return rows[order], np.searchsorted(owner[order], numbers), np.searchsorted(owner[order], numbers, "right")

    def _weight(self, rows: Rows, now_s: float) -> NDArray[np.float64]:
        bad = self.rows["bad"][rows] + self.rows["bad_children"][rows]  # of all rows: too many to copy whole
        good = self.rows["good"][rows] + self.rows["good_children"][rows]
        return np.asarray((bad + _GOOD_COUNTS * good) * self.factor(rows, now_s), dtype=np.float64)

    def _drop_lightest(self, lacking: int, touched: Rows, now_s: float) -> int:
        """Drop the lightest of what was not touched, the oldest of equals, by sixteenths of the table until as many as
        lack have gone; how many went."""
        loose = np.flatnonzero(self._marked(self._index.rows()) & ~self._marked(touched))
        step = max(1, self.capacity // 16)
        count = min(len(loose), -(-lacking // step) * step)
        if not count:
            return 0
        weight = self._weight(loose, now_s)
        most = np.partition(weight, count - 1)[count - 1]  # sorting them all would cost as much as a tick
        lighter, equal = loose[weight < most], loose[weight == most]
        oldest = np.argsort(self.rows["made_s"][equal], kind="stable")[: count - len(lighter)]
        gone = np.concatenate([lighter, equal[oldest]])
        self._index.discard(self._marked(gone))
        self._free = np.concatenate([self._free, gone])
        self.dropped += count
        return count

    def _marked(self, rows: Rows) -> NDArray[np.bool_]:
        """Which row numbers are among these."""
        marks = np.zeros(self._used, bool)
        marks[rows] = True
        return marks

    def _take(self, count: int) -> Rows:
        """Row numbers that are free; there must be as many."""
        kept = max(0, len(self._free) - count)
        again, self._free = self._free[kept:], self._free[:kept]
        more = count - len(again)
        self._grow(self._used + more)
        self._used += more
        return np.concatenate([again, np.arange(self._used - more, self._used)])

    def _grow(self, size: int) -> None:
        """Have this many rows at least. What is not used yet has no pages, so there can be much of it."""
        before = len(self.rows)
        if size > before:
            grown = np.empty(min(self.capacity, max(size, _GROWTH * before)), ROW)
            grown.view(_WHOLE)[:before] = self.rows.view(_WHOLE)
            self.rows = grown
