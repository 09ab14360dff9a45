"""Where the count of open connections is wrong, found by comparing it with the kernel's table of sockets.

The sockops program counts connections it saw begin. It knows nothing of those that were open before it was attached,
and would count for ever one whose end it did not see. Both tables are read a moment apart, and connections come and go
meanwhile; so only a difference that stays is taken for one.

Invariants:
    only-what-stays: a difference counts as far as it was there in each of the last readings.
    doubt-lowers-nothing: a count is lowered only where the socket table is the one the connections are in: the program
        counts a cgroup, whose containers have tables of their own.
    bounded: at most `MOST` corrections a level, the largest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from edge.abi import Service
from edge.core.prefix import Prefix

READINGS_TO_RAISE, READINGS_TO_LOWER = 2, 3
"""Readings in which a difference has to stay: a connection missed is one too many let in, one counted too often may
refuse somebody, but lowering by mistake lifts a limit for as long as it stands."""

MOST = 2048
"""Of each level; the map holds 16,384."""

OPEN = np.dtype([("hi", "<u8"), ("service", "<u4"), ("count", "<i8")])
"""Open connections of one prefix."""

Key = tuple[Service, Prefix]


def differences(known: np.ndarray, actual: np.ndarray, length: int, lower: Collection[Service]) -> dict[Key, int]:
    """What is actually open less what is known to be, by prefix; zeros are left out.

    Both have the fields of OPEN, of one level. Where less is open than is known, only for services in `lower`.
    """
    both = np.concatenate([_columns(known), _columns(actual)])
    signs = np.repeat([-1, 1], [len(known), len(actual)])
    order = np.lexsort((both["hi"], both["service"]))
    both, signs = both[order], signs[order]
    first = np.ones(len(both), bool)
    first[1:] = (both["hi"][1:] != both["hi"][:-1]) | (both["service"][1:] != both["service"][:-1])
    starts = np.flatnonzero(first)
    if not len(starts):
        return {}
    sums = np.add.reduceat(both["count"] * signs, starts)
    rows = both[starts]
    wanted = (sums > 0) | ((sums < 0) & np.isin(rows["service"], [int(service) for service in lower]))
    sums, rows = sums[wanted], rows[wanted]
    largest = np.argsort(-np.abs(sums), kind="stable")[:MOST]
    return {
        (Service(int(row["service"])), Prefix(int(row["hi"]), 0, length)): int(by)
        for row, by in zip(rows[largest], sums[largest], strict=True)
    }


def _columns(rows: np.ndarray) -> np.ndarray:
    found = np.empty(len(rows), OPEN)
    for name in OPEN.names or ():
        found[name] = rows[name]
    return found


def agreed(one: Mapping[Key, int], other: Mapping[Key, int]) -> dict[Key, int]:
    """What two comparisons say alike, one with the counts before the socket table was read, one with those after."""
    return {
        key: by if abs(by) < abs(other[key]) else other[key] for key, by in one.items() if by * other.get(key, 0) > 0
    }


def present(known: np.ndarray, actual: np.ndarray, listening: Collection[Service]) -> frozenset[Service]:
    """The services whose connections are in this socket table: somebody listens, and it has half of them at least.

    A proxy of containers listens here for connections that end elsewhere.
    """
    totals = {
        service: (
            known["count"][known["service"] == service].sum(),
            actual["count"][actual["service"] == service].sum(),
        )
        for service in listening
    }
    return frozenset(service for service, (counted, found) in totals.items() if 2 * found >= counted)


class Reconciler:
    """Remembers the last differences; `lasting` is what remains of them."""

    def __init__(self) -> None:
        self._last: list[dict[Key, int]] = []

    def observe(self, found: dict[Key, int]) -> dict[Key, int]:
        """Take the differences of one reading; the corrections that follow from the last ones.

        The first reading counts alone where more is open than is known: that is what was there before us.
        """
        self._last = [*self._last[-(READINGS_TO_LOWER - 1) :], found]
        raised = self._last[-READINGS_TO_RAISE:]
        lasting: dict[Key, int] = {}
        for key, by in found.items():
            if by > 0:
                lasting[key] = min(one.get(key, 0) for one in raised)
            elif len(self._last) == READINGS_TO_LOWER:
                lasting[key] = max(one.get(key, 0) for one in self._last)
        return {key: by for key, by in lasting.items() if by * found[key] > 0}
