"""One bit for each place where the policy map may have an entry: saves the kernel program most hash lookups.

Invariants:
    filter-covers: the bit of every entry in the map is set, at every moment, also while a restarted daemon takes over.
"""

from __future__ import annotations

import mmap

import numpy as np

from edge.abi import LEVELS, Service
from edge.core.prefix import Prefix
from edge.kernel.libbpf import Map
from edge.kernel.program import FILTER_BITS
from edge.kernel.rows import mixed_key


class PolicyFilter:
    """The map `policy_filter`, written through a mapping; counts how many entries stand behind each bit."""

    def __init__(self, table: Map, seed: int, entries: list[tuple[Service, Prefix]]) -> None:
        self._seed = seed
        size = LEVELS * FILTER_BITS // 8
        self._memory = mmap.mmap(table.fd.number, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._words = np.frombuffer(self._memory, "<u8")
        self._counts = np.zeros(LEVELS * FILTER_BITS, np.uint32)
        wanted = np.zeros(len(self._words), "<u8")
        for service, prefix in entries:
            bit = self._bit(service, prefix)
            self._counts[bit] += 1
            wanted[bit // 64] |= np.uint64(1 << bit % 64)
        # bits that stay set are written with the same value: no moment without them
        self._words[:] = wanted

    def add(self, service: Service, prefix: Prefix) -> None:
        """Count an entry that is about to be written."""
        bit = self._bit(service, prefix)
        self._counts[bit] += 1
        self._words[bit // 64] |= np.uint64(1 << bit % 64)

    def remove(self, service: Service, prefix: Prefix) -> None:
        """Count an entry out that has been deleted."""
        bit = self._bit(service, prefix)
        self._counts[bit] -= 1
        if not self._counts[bit]:
            self._words[bit // 64] &= ~np.uint64(1 << bit % 64)

    def _bit(self, service: Service, prefix: Prefix) -> int:
        """bpf/edge_xdp.c's may_have_entry()."""
        level = prefix.level
        if level is None:
            raise ValueError(f"{prefix} is not at a level")
        mixed = mixed_key(prefix, self._seed)
        return level * FILTER_BITS + ((mixed >> 32) + service & FILTER_BITS - 1)
