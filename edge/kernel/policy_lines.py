"""The level entries of the policy map, laid out so that a packet finds one with one cache line.

bpf/abi.h describes a line and its tags, bpf/rows.h looks a prefix up. The map `policy` stays the record; this is its
index, and whatever an earlier daemon left here is made to agree with the record at the start.

Invariants:
    never-a-wrong-entry: whichever store was the last, a packet meets its prefix's entry as it was, as it will be, or
        none; so this process may be killed at any moment.
    nothing-is-overlooked: an entry that finds no room in its line is looked up in the record: the line says so.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np

from edge.abi import (
    POLICY_LEVEL_SHIFT,
    POLICY_LINE,
    POLICY_MORE_SHIFT,
    POLICY_ORIGIN_SHIFT,
    POLICY_STANDING_SHIFT,
    POLICY_TAG_BITS,
    POLICY_WAYS,
)
from edge.core.model import Entry
from edge.kernel.libbpf import Map
from edge.kernel.rows import mixed_key

_MORE = 1 << POLICY_MORE_SHIFT
_SAYS = (1 << POLICY_TAG_BITS) - (1 << POLICY_STANDING_SHIFT)
"""Bits of a tag that say something about its prefix, or about the line; the others and the index are the prefix."""

_STANDING = (1 << POLICY_ORIGIN_SHIFT) - (1 << POLICY_STANDING_SHIFT)
_WORDS = POLICY_LINE.itemsize // 8
_U64 = (1 << 64) - 1
_SECOND_NS = 1_000_000_000


def expires_ns(entry: Entry) -> int:
    """struct policy_entry.expires_ns: 0 stands for never."""
    return 0 if entry.expires_s is None else max(1, int(entry.expires_s * _SECOND_NS))


class PolicyLines:
    """The map `policy_lines`, written through a mapping: each store of a word is one instruction."""

    def __init__(self, table: Map, seed: int, entries: Sequence[Entry]) -> None:
        """`entries`: what the record holds at the levels' lengths."""
        lines = table.info.max_entries
        self._seed, self._mask = seed, lines - 1
        size = lines * POLICY_LINE.itemsize
        self._memory = mmap.mmap(table.fd.number, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._words = memoryview(self._memory).cast("Q")  # of a line first the tags, then the expiries
        self._left_out: dict[int, set[int]] = {}
        """Entries without room: their keys, by their line's first word."""
        self._agree(entries)

    def put(self, entry: Entry) -> None:
        """Write an entry that is in the record already."""
        words, (line, key) = self._words, self._place(entry)
        tags = words[line : line + POLICY_WAYS].tolist()
        way, expires = _way(tags, key), expires_ns(entry)
        known = way is not None
        if way is None:
            way = next((way for way, tag in enumerate(tags) if not tag & _STANDING), None)
        if way is None:
            self._left_out.setdefault(line, set()).add(key)
            words[line] = tags[0] | _MORE
            return
        says = entry.standing << POLICY_STANDING_SHIFT | entry.origin << POLICY_ORIGIN_SHIFT
        stores = [(line + way, key | says | _more(tags, way)), (line + POLICY_WAYS + way, expires)]
        # in between, the old or the new entry is there with the expiry that comes first
        if not known or _is_sooner(expires, words[line + POLICY_WAYS + way]):
            stores.reverse()
        for at, word in stores:
            words[at] = word
        self._let_in(line, key)

    def remove(self, entry: Entry) -> None:
        """Take an entry out, before or after it leaves the record."""
        words, (line, key) = self._words, self._place(entry)
        tags = words[line : line + POLICY_WAYS].tolist()
        way = _way(tags, key)
        if way is not None:
            words[line + way] = _more(tags, way)
        self._let_in(line, key)

    def _let_in(self, line: int, key: int) -> None:
        """This entry is not left out, or no longer."""
        left_out = self._left_out.get(line)
        if left_out is not None:
            left_out.discard(key)
            if not left_out:
                del self._left_out[line]
                self._words[line] &= ~_MORE

    def _agree(self, entries: Sequence[Entry]) -> None:
        """Remove what is no entry, then put every one."""
        tags = np.frombuffer(self._memory, POLICY_LINE)["tag"]
        wanted = {self._place(entry) for entry in entries}
        lines, ways = np.nonzero(tags)
        for line, way, tag in zip((lines * _WORDS).tolist(), ways.tolist(), tags[lines, ways].tolist(), strict=True):
            if (line, tag & ~_SAYS) in wanted and tag & _STANDING:
                wanted.discard((line, tag & ~_SAYS))
            else:
                self._words[line + way] = _more([tag], way)
        for entry in entries:
            self.put(entry)
        for line in (np.flatnonzero(tags[:, 0] & np.uint64(_MORE)) * _WORDS).tolist():
            if line not in self._left_out:
                self._words[line] &= ~_MORE

    def _place(self, entry: Entry) -> tuple[int, int]:
        """First word of an entry's line, and its tag without what it says: policy_tag() of bpf/rows.h."""
        level = entry.prefix.level
        if level is None:
            raise ValueError(f"{entry.prefix} is not at a level")
        mixed = mixed_key(entry.prefix, self._seed)
        return (mixed & self._mask) * _WORDS, mixed & ~self._mask & _U64 | level << POLICY_LEVEL_SHIFT | entry.service


def _way(tags: list[int], key: int) -> int | None:
    """The way that holds an entry."""
    for way, tag in enumerate(tags):
        if tag & ~_SAYS == key and tag & _STANDING:
            return way
    return None


def _is_sooner(one_ns: int, other_ns: int) -> bool:
    """Whether one entry expires before another; 0 is never."""
    return one_ns != 0 and (other_ns == 0 or one_ns < other_ns)


def _more(tags: list[int], way: int) -> int:
    """What the tag of a way says of the line: only the first does."""
    return 0 if way else tags[0] & _MORE
