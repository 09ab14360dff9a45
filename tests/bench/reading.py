"""What a tick's reading costs with a million live prefixes, beside bcc's own way to read a hash map.

The reading is Tables.read() and delta(): counters, and one pass over the mapped rows and tallies each. 1 % of the
million completes a handshake between two readings, once with no other sender known and once with the table nearly full.
"""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge.abi import TALLIES_PER_SET, TALLY, Level
from edge.core.snapshot import delta
from edge.kernel import program
from edge.kernel.connections import HELD
from tests.bench.limiter import Limiter

CHANGED_SHARE = 0.01
"""Of the live prefixes, between two readings."""

SENDERS = 118_000
"""Known in the second reading: nine of ten rows that the default table has for /64s."""

BCC_ENTRIES = 50_000
"""items() takes time in proportion to the entries; a million would take half the benchmark."""

BCC_TEXT = """
struct key { u64 hi; u32 service; u32 pad; };
struct value { u64 completed, closed, last_ns; };
BPF_HASH(table, struct key, struct value, 65536);
"""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """CPU milliseconds, one value a round."""

    live: int
    senders: int
    changed: int
    read_ms: list[float]
    delta_ms: list[float]
    bcc_entries: int
    bcc_items_ms: list[float]

    @property
    def total_ms(self) -> list[float]:
        """The whole reading."""
        return [a + b for a, b in zip(self.read_ms, self.delta_ms, strict=True)]

    @property
    def bcc_scaled_ms(self) -> list[float]:
        """items() for as many entries as there are live rows, by proportion."""
        return [ms * self.live / self.bcc_entries for ms in self.bcc_items_ms]


def measure(
    text: str, rounds: int, live: int, *, senders: int = SENDERS, bcc_entries: int = BCC_ENTRIES
) -> list[Reading]:
    """Fill the tables, then read them round by round: with few senders known, then with many."""
    limiter, table = Limiter(text), _bcc_table(bcc_entries)
    limiter.fill(live)
    changing = max(1, int(live * CHANGED_SHARE))
    few = _read(limiter, table, rounds, changing, changing)
    _shake(limiter, senders, 1)
    return [few, _read(limiter, table, rounds, changing, senders)]


def _read(limiter: Limiter, table: Any, rounds: int, changing: int, senders: int) -> Reading:
    """One Reading; a warm-up round is thrown away."""
    spent: list[tuple[float, float, float]] = []
    _shake(limiter, changing, 2)
    found = limiter.tables.read(time.monotonic())
    for number in range(rounds + 1):
        _shake(limiter, changing, number + 3)
        times = [time.thread_time_ns()]
        before, found = found, limiter.tables.read(time.monotonic())
        times.append(time.thread_time_ns())
        difference = delta(before, found)
        times.append(time.thread_time_ns())
        items = table.items()
        times.append(time.thread_time_ns())
        read, compared, bcc = (float(ns) / 1e6 for ns in np.diff(times))
        spent.append((read, compared, bcc))
    return Reading(
        live=int(found.rows_active[Level.L64]),
        senders=senders,
        changed=len(difference.connections),
        read_ms=[read for read, _, _ in spent[1:]],
        delta_ms=[compared for _, compared, _ in spent[1:]],
        bcc_entries=len(items),
        bcc_items_ms=[bcc for _, _, bcc in spent[1:]],
    )


def _shake(limiter: Limiter, count: int, completed: int) -> None:
    """So many /64s have completed so many handshakes, a moment ago."""
    sizes = limiter.tables.sizes
    whole = sizes.all_sets * TALLIES_PER_SET
    with mmap.mmap(limiter.maps["connections"].fd.number, whole * TALLY.itemsize) as memory:
        rows = np.frombuffer(memory, TALLY)
        first = sizes.set_base(Level.L64) * TALLIES_PER_SET
        changed = rows[first : first + count]
        changed["tag"] = np.arange(count, dtype=np.uint64) << np.uint64(32) | np.uint64(HELD)
        changed["completed"], changed["last_ns"] = completed, time.monotonic_ns()
        del rows, changed  # a mapping with views of it cannot be closed


def _bcc_table(entries: int) -> Any:
    """A hash map of bcc's with entries of the same shape."""
    os.environ["BCC_KERNEL_SOURCE"] = str(program.directory() / "headers")
    from bcc import BPF

    table = BPF(text=BCC_TEXT.encode())[b"table"]
    for number in range(entries):
        table[table.Key(number, 0, 0)] = table.Leaf(1, 1, 1)
    return table
