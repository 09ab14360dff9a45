"""One reading of the kernel's counters, and what changed between two of them.

Invariants:
    delta-is-never-negative: a counter that went back (program replaced, row evicted) counts from zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HANDSHAKE = np.dtype(
    [
        ("hi", "<u8"),  # the /64, keyed
        ("service", "<u4"),
        ("pad", "<u4"),
        ("completed", "<u8"),
        ("closed", "<u8"),
        ("last_ns", "<u8"),
    ]
)
"""One /64 and service as the sockops program counts it: abi.HANDSHAKE_KEY followed by abi.HANDSHAKES."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A reading of the kernel's tables at `now_s` (CLOCK_MONOTONIC, seconds)."""

    now_s: float
    counters: np.ndarray  # uint64 (REASONS, 2): passed, dropped; summed over CPUs
    handshakes: np.ndarray  # HANDSHAKE rows
    rows_active: np.ndarray  # int64 (LEVELS,): rows whose arrival time lies ahead


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What changed between two snapshots."""

    seconds: float
    counters: np.ndarray  # uint64 (REASONS, 2)
    handshakes: np.ndarray  # HANDSHAKE rows that completed or closed some, with the differences


def delta(before: Snapshot | None, after: Snapshot) -> Delta:
    """after minus before; everything in `after` counts as new when there is no `before`."""
    if before is None:
        zeros = np.zeros_like(after.counters)
        return Delta(seconds=0.0, counters=zeros, handshakes=np.empty(0, HANDSHAKE))
    counters = np.where(after.counters >= before.counters, after.counters - before.counters, after.counters)
    return Delta(
        seconds=max(0.0, after.now_s - before.now_s),
        counters=counters,
        handshakes=_handshakes(before.handshakes, after.handshakes),
    )


def _handshakes(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Rows of `after` minus their row in `before`; unchanged rows are left out."""
    changed = after.copy()
    for service in np.unique(after["service"]):
        mine = np.flatnonzero(after["service"] == service)
        old = before[before["service"] == service]
        old = old[np.argsort(old["hi"])]
        at = np.searchsorted(old["hi"], after["hi"][mine])
        known = at < len(old)
        known[known] = old["hi"][at[known]] == after["hi"][mine[known]]
        rows, previous = mine[known], old[at[known]]
        for name in ("completed", "closed"):
            now, then = after[name][rows], previous[name]
            changed[name][rows] = np.where(now >= then, now - then, now)
    return changed[(changed["completed"] > 0) | (changed["closed"] > 0)]
