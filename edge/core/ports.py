"""What the core's surroundings must offer, each as small as it can be.

Real adapters live in edge.kernel and edge.evidence; fakes live in the tests, and one contract suite runs against both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from edge.abi import Service
from edge.core.model import Entry, Event
from edge.core.prefix import Prefix
from edge.core.snapshot import Snapshot


class Clock(Protocol):
    """Time: monotonic for lifetimes, wall for people and files. Both in seconds."""

    def now_s(self) -> float:
        """CLOCK_MONOTONIC, the clock of the kernel programs."""

    def wall_s(self) -> float:
        """Seconds since the epoch."""


class CounterSource(Protocol):
    """Where the kernel's counters are read."""

    def read(self) -> Snapshot:
        """One consistent-enough reading; never blocks, never loops in Python over rows."""


class EntrySink(Protocol):
    """A place that holds entries: the BPF policy maps, or the nftables sets."""

    def installed(self) -> Mapping[tuple[Service, Prefix], Entry]:
        """What is there now, by (service, prefix), as far as this sink knows."""

    def apply(self, put: Sequence[Entry], drop: Sequence[Entry]) -> None:
        """Install and remove, in an order in which every step is safe; all or an error."""


class EvidenceSource(Protocol):
    """An adapter that has been collecting since it was last asked."""

    def poll(self) -> list[Event]:
        """Events since the last call, oldest first; bounded; never blocks."""
