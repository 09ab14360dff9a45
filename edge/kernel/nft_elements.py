"""Which set elements a collection of entries amounts to. Pure; nothing here talks to the kernel.

A block has an element in a block set. Anything else opens: it has an element in an allow set where it is an ALLOW, or
lies inside a block and so is a hole in it. A learned entry between two levels has none: interval elements have no
timeout, so it would outlive a dead daemon. Beyond `max_elements`, learned blocks have none either. Both are left to
XDP, and counted in `left_out`.

Invariants:
    elements-mean-longest-match: an address meets an allow element before a block element, most specific set first,
        exactly when the longest match among the entries says so.
    only-holes-and-allows-open: an entry that is neither BLOCK nor ALLOW has an element only inside a block.
    updates-are-differences: after any series of updates the elements are those of the entries held.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from itertools import islice

from edge.abi import Origin, Service, Standing
from edge.core.model import Entry
from edge.core.nesting import Key, Nesting, Ordered
from edge.core.prefix import IPV4_SHIFT, Prefix
from edge.kernel.nft_sets import FOREVER, Element, Elements, Lifetime, SetSpec, all_specs, bounds, cover


class Holdings:
    """The entries a sink holds, and the elements they amount to, kept up by differences."""

    def __init__(self, max_elements: int) -> None:
        self.entries: dict[Key, Entry] = {}
        self.elements: Elements = {name: {} for name in all_specs()}
        self.left_out: set[Key] = set()
        self._max_elements = max_elements
        self._count = 0
        self._specs = {
            (s.service, s.ipv4, n, s.allow): s for s in all_specs().values() for n in range(s.shortest, s.longest + 1)
        }
        self._placed: dict[Key, SetSpec] = {}
        self._bands: dict[tuple[Service, bool, int], dict[Prefix, bool]] = defaultdict(dict)
        self._blocks: Nesting[Entry] = Nesting()
        self._openings = Ordered()  # keys of what opens only inside a block

    def update(self, put: Iterable[Entry], drop: Iterable[Entry]) -> dict[str, set[Element]]:
        """Hold and let go; returns the elements that may have changed, by set."""
        affected: dict[Key, None] = {}
        moved: list[Entry] = []  # blocks that came or went: what lies inside may have become a hole, or none
        for entry, stays in [(e, True) for e in put] + [(e, False) for e in drop]:
            key = entry.key
            affected[key] = None
            before = self.entries.pop(key, None)
            if before is not None and (not stays or before.standing is not entry.standing):
                self._unindex(before, moved)
            if stays:
                self.entries[key] = entry
                if before is None or before.standing is not entry.standing:
                    self._index(entry, moved)
        for block in moved:
            affected.update(dict.fromkeys(self._openings.inside(*block.key)))
        return self._replace(affected)

    def retry(self, most: int) -> dict[str, set[Element]]:
        """Place what was left out where there is room now; returns the elements that may have changed.

        At most so many. What lies between two levels waits for no room, and is not tried.
        """
        if self._count >= self._max_elements:
            return {}
        return self._replace(list(islice((key for key in self.left_out if key[1].level is not None), most)))

    def _index(self, entry: Entry, moved: list[Entry]) -> None:
        if entry.standing is Standing.BLOCK:
            self._blocks.add(entry.service, entry.prefix, entry)
            moved.append(entry)
        elif entry.standing is not Standing.ALLOW:
            self._openings.add(entry.key)

    def _unindex(self, entry: Entry, moved: list[Entry]) -> None:
        if entry.standing is Standing.BLOCK:
            self._blocks.remove(entry.service, entry.prefix)
            moved.append(entry)
        elif entry.standing is not Standing.ALLOW:
            self._openings.discard(entry.key)

    def _spec_for(self, key: Key) -> SetSpec | None:
        """The set the entry of this key belongs into, if any."""
        entry = self.entries.get(key)
        if entry is None:
            return None
        allow = entry.standing is not Standing.BLOCK
        if (
            allow
            and entry.standing is not Standing.ALLOW
            and not any(self._blocks.holding(entry.service, entry.prefix))
        ):
            return None
        ipv4 = entry.prefix.ipv4
        spec = self._specs[entry.service, ipv4, entry.prefix.length - IPV4_SHIFT * ipv4, allow]
        full = not allow and self._count >= self._max_elements and key not in self._placed
        if entry.origin is Origin.LEARNED and (spec.interval or full):
            self.left_out.add(key)
            return None
        return spec

    def _replace(self, keys: Iterable[Key]) -> dict[str, set[Element]]:
        """Bring the elements of these keys up to date."""
        touched: dict[str, set[Element]] = defaultdict(set)
        dirty: set[SetSpec] = set()
        for key in keys:
            self.left_out.discard(key)
            spec, before = self._spec_for(key), self._placed.pop(key, None)
            if before is not None:
                self._count -= 1
                self._take(before, key[1], touched, dirty)
            if spec is not None:
                self._count += 1
                self._placed[key] = spec
                self._give(spec, key, touched, dirty)
        for spec in dirty:
            self._cut(spec, touched)
        return touched

    def _take(self, spec: SetSpec, prefix: Prefix, touched: dict[str, set[Element]], dirty: set[SetSpec]) -> None:
        if spec.interval:
            self._bands[_band(spec)].pop(prefix, None)
            dirty.add(SetSpec(spec.service, True, spec.ipv4, spec.shortest, spec.longest))
        else:
            first = bounds(prefix)[0]
            self.elements[spec.name].pop((first, first), None)
            touched[spec.name].add((first, first))

    def _give(self, spec: SetSpec, key: Key, touched: dict[str, set[Element]], dirty: set[SetSpec]) -> None:
        if spec.interval:
            self._bands[_band(spec)][key[1]] = spec.allow
            dirty.add(SetSpec(spec.service, True, spec.ipv4, spec.shortest, spec.longest))
        else:
            entry, first = self.entries[key], bounds(key[1])[0]
            expires_s = math.inf if entry.expires_s is None else entry.expires_s
            self.elements[spec.name][first, first] = Lifetime(expires_s, entry.origin is Origin.LEARNED)
            touched[spec.name].add((first, first))

    def _cut(self, spec: SetSpec, touched: dict[str, set[Element]]) -> None:
        """Make the ranges of a band anew; 20,000 entries take about 50 ms."""
        cut = cover((*bounds(prefix), allow) for prefix, allow in self._bands[_band(spec)].items())
        for allow, ranges in zip((True, False), cut, strict=True):
            name = SetSpec(spec.service, allow, spec.ipv4, spec.shortest, spec.longest).name
            new = dict.fromkeys(ranges, FOREVER)
            touched[name] |= new.keys() ^ self.elements[name].keys()
            self.elements[name] = new


def _band(spec: SetSpec) -> tuple[Service, bool, int]:
    return spec.service, spec.ipv4, spec.shortest
