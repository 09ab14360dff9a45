"""The sets of the nftables table: which prefix lengths each holds, and ranges that mean a longest match. Pure.

Each service has, for each family, a pair of sets (allow, block) per level, looked up by the masked source, and a pair
of interval sets per band of lengths between two levels. The rules ask them most specific first. Interval sets refuse
nested prefixes, so inside a band the entries are cut into disjoint ranges that mean the same.

Invariants:
    every-length-has-one-set: a prefix of any length has exactly one set for its service and verdict.
    cover-means-longest-match: an address is in an allow (block) range exactly when its longest match allows (blocks).
    cover-is-disjoint: no two ranges of a cover overlap, or touch with the same verdict.
    prefixes-give-back-the-range: the prefixes an element is read back as cover it exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from edge.abi import Service
from edge.core.prefix import IPV4_SHIFT, LENGTHS, Prefix, ipv4_key

Element = tuple[int, int]
"""First and last address as numbers of the family; equal in a level set, which holds the masked address alone."""


@dataclass(frozen=True, slots=True)
class Lifetime:
    """How long an element is wanted: until `expires_s` (inf: no timeout), and only while its lease is renewed."""

    expires_s: float
    leased: bool


FOREVER = Lifetime(math.inf, False)
Elements = dict[str, dict[Element, Lifetime]]
"""Wanted elements by set name."""


@dataclass(frozen=True)
class SetSpec:
    """One set: the service and verdict it stands for, and the prefix lengths (of the family) it holds."""

    service: Service
    allow: bool
    ipv4: bool
    shortest: int
    longest: int

    @cached_property
    def interval(self) -> bool:
        """Whether it holds ranges (a band) instead of masked addresses (a level)."""
        return (self.shortest, self.longest) not in _LEVELS[self.ipv4]

    @cached_property
    def name(self) -> str:
        """As in `mx_block_64`, `mx_block_57_63` and `submission_allow_v4_24`."""
        lengths = f"{self.shortest}_{self.longest}" if self.interval else f"{self.longest}"
        return f"{self.service.name.lower()}_{'allow' if self.allow else 'block'}_{'v4_' if self.ipv4 else ''}{lengths}"

    @property
    def bits(self) -> int:
        """Length of an address of the family."""
        return 32 if self.ipv4 else 128


_LEVELS: dict[bool, frozenset[Element]] = {
    False: frozenset((n, n) for n in LENGTHS),
    True: frozenset((n - IPV4_SHIFT, n - IPV4_SHIFT) for n in LENGTHS[1:4]),
}


def _bands(ipv4: bool) -> Iterator[tuple[int, int]]:
    """(shortest, longest) of each set pair of a family, most specific first; together they hold every length once."""
    above = 32 if ipv4 else 128
    for level, _ in sorted(_LEVELS[ipv4], reverse=True):
        if above > level:
            yield level + 1, above
        yield level, level
        above = level - 1
    yield 0, above


def specs(service: Service, ipv4: bool) -> list[SetSpec]:
    """The sets of a service and family in the order the rules ask them: most specific first, allow before block."""
    return [SetSpec(service, allow, ipv4, *lengths) for lengths in _bands(ipv4) for allow in (True, False)]


def all_specs() -> dict[str, SetSpec]:
    """Every set by name."""
    return {spec.name: spec for service in Service for ipv4 in (False, True) for spec in specs(service, ipv4)}


def cover(entries: Iterable[tuple[int, int, bool]]) -> tuple[list[Element], list[Element]]:
    """Allow and block ranges that are disjoint and mean the longest match among the entries (first, last, allow).

    Entries are prefixes, so any two are nested or apart. Each address goes to the innermost entry around it.
    """
    ranges: tuple[list[Element], list[Element]] = [], []
    around: list[tuple[int, bool]] = []  # last address and verdict of the entries that hold `at`, outermost first
    at = 0

    def emit(last: int, allow: bool) -> None:
        found = ranges[0] if allow else ranges[1]
        if at > last:
            return
        if found and found[-1][1] + 1 == at:
            found[-1] = found[-1][0], last
        else:
            found.append((at, last))

    def close() -> None:
        nonlocal at
        last, allow = around.pop()
        emit(last, allow)
        at = last + 1

    for first, last, allow in sorted(entries, key=lambda e: (e[0], -e[1])):
        while around and around[-1][0] < first:
            close()
        if around:
            emit(first - 1, around[-1][1])
        at = first
        around.append((last, allow))
    while around:
        close()
    return ranges


def bounds(prefix: Prefix) -> Element:
    """First and last address of a prefix as numbers of its family."""
    if prefix.ipv4:
        first = prefix.hi & 0xFFFFFFFF
        return first, first | (1 << 32 + IPV4_SHIFT - prefix.length) - 1
    first = prefix.hi << 64 | prefix.lo
    return first, first | (1 << 128 - prefix.length) - 1


def prefixes(spec: SetSpec, element: Element, most: int) -> list[Prefix] | None:
    """The entries an element found in a set can stand for; None when no plan of ours made it.

    A range may have been merged from several entries, so it comes back as prefixes of the set's lengths.
    """
    first, last = element
    if not spec.interval:
        element_prefix = _prefix(spec, first, spec.longest)
        return [element_prefix] if first == last and bounds(element_prefix)[0] == first else None
    longest_spread = spec.bits - spec.shortest
    if (last - first) >> longest_spread >= most:
        return None
    found = []
    while first <= last:
        spread = min(longest_spread, (first & -first).bit_length() - 1 if first else longest_spread)
        spread = min(spread, (last - first + 1).bit_length() - 1)
        if spread < spec.bits - spec.longest:
            return None
        found.append(_prefix(spec, first, spec.bits - spread))
        first += 1 << spread
    return found


def _prefix(spec: SetSpec, address: int, length: int) -> Prefix:
    if spec.ipv4:
        return Prefix.of(ipv4_key(address), 0, length + IPV4_SHIFT)
    return Prefix.of(address >> 64, address & (1 << 64) - 1, length)
