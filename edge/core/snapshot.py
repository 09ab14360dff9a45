"""One reading of the kernel's counters, and what changed between two of them.

Invariants:
    delta-is-never-negative: a counter that went back (program replaced) counts from zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge.abi import SERVICES, Level

CONNECTIONS = np.dtype(
    [
        ("hi", "<u8"),  # the prefix, keyed
        ("level", "u1"),  # abi.Level; /128 is not read
        ("service", "u1"),  # abi.Service
        ("completed", "<u8"),  # handshakes since the reading before
        ("newcomers", "<u8"),  # of those, from a child (address of a /64, /64 of a shorter prefix) unknown before
        ("open", "<i8"),  # connections open now
    ]
)
"""What happened at one prefix between two readings, as the sockops program counts completed handshakes."""

LIMITED = np.dtype(
    [
        ("hi", "<u8"),  # the prefix, keyed
        ("level", "u1"),  # abi.Level
        ("service", "u1"),  # abi.Service
        ("ahead_s", "<f8"),  # its arrival time lies so many seconds ahead
    ]
)
"""A prefix that has spent its limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A reading of the kernel's tables at `now_s` (CLOCK_MONOTONIC, seconds)."""

    now_s: float
    counters: np.ndarray  # uint64 (REASONS, 2): passed, dropped; summed over CPUs
    connections: np.ndarray  # CONNECTIONS rows of the prefixes at which something changed since the reading before
    open: np.ndarray  # int64 (SERVICES,): connections open now
    uncounted: np.ndarray  # int64 (LEVELS,): connections for which a level had no room, ever
    rows_active: np.ndarray  # int64 (LEVELS,): rows whose arrival time lies ahead
    limited: np.ndarray  # LIMITED rows, of each level those least far ahead


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What changed between two snapshots."""

    seconds: float
    counters: np.ndarray  # uint64 (REASONS, 2)
    connections: np.ndarray  # CONNECTIONS rows


def handshakes(connections: np.ndarray) -> np.ndarray:
    """Completed handshakes by service, int64 (SERVICES,), in CONNECTIONS rows: each is in one row of each level."""
    own = connections[connections["level"] == Level.L64]
    return np.bincount(own["service"], weights=own["completed"], minlength=SERVICES).astype(np.int64)


def delta(before: Snapshot | None, after: Snapshot) -> Delta:
    """after minus before; where there is no `before`, nothing has changed yet."""
    if before is None:
        zeros = np.zeros_like(after.counters)
        return Delta(seconds=0.0, counters=zeros, connections=np.empty(0, CONNECTIONS))
    counters = np.where(after.counters >= before.counters, after.counters - before.counters, after.counters)
    return Delta(
        seconds=max(0.0, after.now_s - before.now_s),
        counters=counters,
        connections=after.connections,
    )
