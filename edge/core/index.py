"""Row numbers by key, in order of the keys: plain columns, about 12 bytes a row.

Two sorted runs: a large one, and the few that came since it was last merged. Looking up is a binary search, so no
choice of keys makes it slow: addresses are chosen by whoever sends, and a hash table would have to hide its seed. The
same order answers what lies inside a prefix.

Invariants:
    index-holds-what-was-added: a key's rows are found until they are discarded, in whichever run they are.
    index-is-in-order: what lies between two keys comes back in order of the keys.
    merging-is-rare: the second run grows to a sixteenth of the first before they are merged.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
Keys = NDArray[np.uint64]
Run = tuple[Keys, NDArray[np.int32]]

_SHARE = 16
"""Adding copies the second run and merging copies the first: at a sixteenth both cost a tick about the same."""

_LEAST = 256
"""Below this size of the second run, merging never pays: both runs are in the cache."""


class Index:
    """Rows by key; several may have the same. `runs` are the large and the new one: keys in order, and the row of
    each; to be read only, and only until the next change."""

    __slots__ = ("_views", "runs")

    def __init__(self) -> None:
        self._set(_empty(), _empty())

    def __len__(self) -> int:
        return sum(len(keys) for keys, _ in self.runs)

    def rows(self) -> Rows:
        """All rows, in no order."""
        return np.concatenate([rows for _, rows in self.runs]).astype(np.int64)

    def find(self, key: int) -> list[int]:
        """The rows of one key; for a single one, twice as fast as asking numpy."""
        found = []
        for keys, rows in self._views:
            at = bisect_left(keys, key)
            while at < len(keys) and keys[at] == key:
                found.append(rows[at])
                at += 1
        return found

    def count(self, keys: Keys) -> Rows:
        """How many rows each key has."""
        total = np.zeros(len(keys), np.int64)
        for known, _ in self.runs:
            total += np.searchsorted(known, keys, "right") - np.searchsorted(known, keys)
        return total

    def members(self, keys: Keys) -> tuple[Rows, Rows]:
        """The rows of all these keys, and for each of them which key it has."""
        rows, owners = [], []
        for known, numbers in self.runs:
            first = np.searchsorted(known, keys)
            counts = np.searchsorted(known, keys, "right") - first
            before = np.cumsum(counts) - counts  # places taken by earlier keys
            rows.append(numbers[np.repeat(first - before, counts) + np.arange(counts.sum())])
            owners.append(np.repeat(np.arange(len(keys)), counts))
        return np.concatenate(rows).astype(np.int64), np.concatenate(owners)

    def between(self, first: int, last: int) -> Rows:
        """The rows whose key lies in this closed range, in order of their keys."""
        low, high = np.uint64(first), np.uint64(last)
        keys, rows = [], []
        for known, numbers in self.runs:
            part = slice(int(known.searchsorted(low)), int(known.searchsorted(high, "right")))
            keys.append(known[part])
            rows.append(numbers[part])
        found = np.concatenate(rows).astype(np.int64)
        if len(keys[0]) and len(keys[1]):
            found = found[np.argsort(np.concatenate(keys), kind="stable")]
        return found

    def add(self, keys: Keys, rows: Rows) -> None:
        """Add rows under keys, which are in rising order."""
        large, new = self.runs
        new = _merge(*new, keys, rows.astype(np.int32))
        if len(new[0]) > max(_LEAST, len(large[0]) // _SHARE):
            large, new = _merge(*large, *new), _empty()
        self._set(large, new)

    def discard(self, gone: NDArray[np.bool_]) -> None:
        """Forget the rows that this says are gone, a value for each row number."""
        large, new = ((keys[~gone[rows]], rows[~gone[rows]]) for keys, rows in self.runs)
        self._set(large, new)

    def _set(self, large: Run, new: Run) -> None:
        self.runs = large, new
        self._views = tuple((keys.data, rows.data) for keys, rows in self.runs)


def _empty() -> Run:
    return np.empty(0, np.uint64), np.empty(0, np.int32)


def _merge(keys: Keys, rows: NDArray[np.int32], more: Keys, numbers: NDArray[np.int32]) -> Run:
    """One run of two; at the same key the first run's rows come first."""
    size = len(keys) + len(more)
    at = np.searchsorted(keys, more, "right") + np.arange(len(more))
    old = np.ones(size, bool)
    old[at] = False
    merged_keys, merged_rows = np.empty(size, np.uint64), np.empty(size, np.int32)
    merged_keys[at], merged_keys[old] = more, keys
    merged_rows[at], merged_rows[old] = numbers, rows
    return merged_keys, merged_rows
