"""Small maps with one number for a prefix: until when it counts as forged, by how much its open connections are wrong.

Invariants:
    written-as-wanted: after write() the map holds what was given and nothing else, as far as there is room.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from edge.abi import POLICY_KEY, Service
from edge.core.prefix import Prefix
from edge.kernel.libbpf import BpfError, Map

log = logging.getLogger(__name__)

Key = tuple[Service, Prefix]


class Marks:
    """One such map, written by differences; what an earlier daemon left in it is taken over."""

    def __init__(self, table: Map) -> None:
        self._table = table
        keys, values = table.items()
        self._held = {_key(key): int(value) for key, value in zip(keys, values, strict=True)}
        self.no_room = 0

    @property
    def held(self) -> Mapping[Key, int]:
        """What the map holds."""
        return self._held

    @property
    def levels(self) -> int:
        """Bit mask of the levels at which it holds something (control.forged_levels)."""
        return sum({1 << prefix.level for _, prefix in self._held if prefix.level is not None})

    def write(self, wanted: Mapping[Key, int]) -> None:
        """Make the map hold this. What finds no room is counted and logged; the others are written."""
        for key in [key for key in self._held if key not in wanted]:
            self._table.delete(_record(key))
            del self._held[key]
        refused: list[BpfError] = []
        for key, value in wanted.items():
            if self._held.get(key) == value:
                continue
            try:
                self._table.put(_record(key), np.array(value, self._table.value))
            except BpfError as error:
                refused.append(error)
                continue
            self._held[key] = value
        if refused:
            self.no_room += len(refused)
            log.error("no room for marks", extra={"fields": {"count": len(refused), "first": str(refused[0])}})


def _record(key: Key) -> np.ndarray:
    service, prefix = key
    return np.array((prefix.hi, prefix.lo, prefix.length, service), POLICY_KEY)


def _key(record: np.ndarray) -> Key:
    return Service(int(record["service"])), Prefix(int(record["hi"]), int(record["lo"]), int(record["length"]))
