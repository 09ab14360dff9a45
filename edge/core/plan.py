"""What to change so that the installed entries become the desired ones: bounded, and safe at every step.

An entry refuses (BLOCK) or opens (every other standing: whoever matches it longest is not refused). Puts come before
drops; among the puts what opens comes first, longest prefix first, among the drops what refuses comes first. When there
are more changes than a tick may make, the operator's go first, and with each change go those it rests on.

Invariants:
    differences-only: an entry already installed as desired is not in the plan.
    every-step-is-safe: after no change of a plan, and after no plan of a series, is an address refused that was not
        refused before the first and is not refused after the last.
    plans-converge: applied tick after tick, the plans end with the desired entries installed.
    no-hole-expires-before-its-block: see `lengthen_holes`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Generic, TypeVar

import msgspec

from edge.abi import Origin, Service, Standing
from edge.core.model import Entry
from edge.core.prefix import IPV4_SHIFT, Prefix, is_ipv4, mask

V = TypeVar("V")

Entries = Mapping[Any, Entry]
"""Entries by their `Entry.key`; typed loosely because the ports key them more loosely than the core does."""

_MASKS = tuple(mask(length) for length in range(129))


class PlanParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much one tick may change."""

    max_changes: Annotated[
        int,
        msgspec.Meta(
            gt=0,
            le=1_000_000,
            description="Entries installed or removed in one tick at most; the rest follow in the next ticks, the "
            "operator's first. The default is what fits one nftables transaction, well under 100 ms.",
        ),
    ] = 5000


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Entries to install, then entries to remove, each in a safe order; `deferred` changes wait for the next tick."""

    put: tuple[Entry, ...]
    drop: tuple[Entry, ...]
    deferred: int = 0


class Nesting(Generic[V]):
    """Values by service and prefix, found by any prefix that lies inside: which blocks hold this address?"""

    __slots__ = ("_levels",)

    def __init__(self) -> None:
        # by service << 8 | length: a plain number hashes several times as fast as an enum does
        self._levels: dict[int, dict[tuple[int, int], V]] = defaultdict(dict)

    def add(self, service: Service, prefix: Prefix, value: V) -> None:
        """Keep the value for this prefix, in place of an earlier one."""
        self._levels[service << 8 | prefix.length][prefix.hi, prefix.lo] = value

    def remove(self, service: Service, prefix: Prefix) -> None:
        """Forget the prefix; nothing happens when it is not there."""
        at = service << 8 | prefix.length
        if at in self._levels:
            self._levels[at].pop((prefix.hi, prefix.lo), None)
            if not self._levels[at]:
                del self._levels[at]

    def holding(self, service: Service, prefix: Prefix) -> Iterator[V]:
        """The values of every shorter prefix that holds this one."""
        hi, lo = prefix.hi, prefix.lo
        # a prefix shorter than an IPv4 one can be is IPv6, and holds no IPv4
        first = service << 8 | (IPV4_SHIFT if is_ipv4(hi) else 0)
        last = service << 8 | prefix.length
        for at, level in self._levels.items():
            if first <= at < last:
                high, low = _MASKS[at & 0xFF]
                value = level.get((hi & high, lo & low))
                if value is not None:
                    yield value


def lengthen_holes(desired: Entries, now_s: float) -> dict[Any, Entry]:
    """The desired entries at `now_s` (seconds), every hole lasting as long as the blocks it pierces.

    A hole is an entry that does not refuse and lies inside one that does. If it went first, the block would refuse
    those it was made for. Expired blocks cover nothing; expired entries are left out.
    """
    return dict(_live(desired, now_s))


def plan(desired: Entries, installed: Entries, now_s: float, params: PlanParams) -> Plan:
    """The changes that turn `installed` into `desired` at `now_s` (seconds, the clock of `Entry.expires_s`).

    Both are keyed by `Entry.key`. An entry that differs in anything, so also a renewed one, is put again.
    """
    changes, stay = [], 0
    for key, entry in _live(desired, now_s):
        before = installed.get(key)
        stay += before is not None
        if before is not entry and before != entry:
            urgent = _urgent(entry) or (before is not None and _urgent(before))
            changes.append(_Change(entry=entry, put=True, urgent=urgent))
    if stay < len(installed):
        wanted = lengthen_holes(desired, now_s)
        gone = (entry for key, entry in installed.items() if key not in wanted)
        changes += [_Change(entry=entry, put=False, urgent=_urgent(entry)) for entry in gone]
    chosen = changes if len(changes) <= params.max_changes else _choose(changes, params.max_changes)
    chosen.sort(key=_Change.order)
    return Plan(
        put=tuple(change.entry for change in chosen if change.put),
        drop=tuple(change.entry for change in chosen if not change.put),
        deferred=len(changes) - len(chosen),
    )


def _live(desired: Entries, now_s: float) -> Iterator[tuple[Any, Entry]]:
    """What `lengthen_holes` returns, one by one."""
    blocks: Nesting[float] = Nesting()
    for entry in desired.values():
        if entry.standing is Standing.BLOCK and (entry.expires_s is None or entry.expires_s > now_s):
            blocks.add(entry.service, entry.prefix, math.inf if entry.expires_s is None else entry.expires_s)
    for key, entry in desired.items():
        expires_s = entry.expires_s
        if expires_s is not None and entry.standing is not Standing.BLOCK:
            latest = max(blocks.holding(entry.service, entry.prefix), default=0.0)
            if latest > expires_s:
                expires_s = None if math.isinf(latest) else latest
                entry = replace(entry, expires_s=expires_s)
        if expires_s is None or expires_s > now_s:
            yield key, entry


def _urgent(entry: Entry) -> bool:
    """Whether somebody waits for it: a command, or the daemon's own exemptions."""
    return entry.origin in (Origin.OPERATOR, Origin.EXEMPT)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Change:
    """One put or drop; compared by identity."""

    entry: Entry
    put: bool
    urgent: bool

    @property
    def blocks(self) -> bool:
        return self.entry.standing is Standing.BLOCK

    def order(self) -> tuple[bool, bool, int, Prefix, Service]:
        """The place in a plan: puts that open, puts that refuse, drops that refused, drops that opened."""
        prefix = self.entry.prefix
        return not self.put, self.blocks is self.put, -prefix.length, prefix, self.entry.service

    def priority(self) -> tuple[bool, int, int, Prefix, Service]:
        """Who goes first when not all can: the operator, then releases, holes, blocks, holes no longer needed.

        Releases come before new entries, which an attacker can cause without end.
        """
        turn = (1, 2) if self.put else (3, 0)
        prefix = self.entry.prefix
        return not self.urgent, turn[self.blocks], -prefix.length, prefix, self.entry.service


def _choose(changes: list[_Change], most: int) -> list[_Change]:
    """At most `most` of the changes, by priority, none without those it rests on."""
    rests_on = _dependencies(changes)
    chosen: dict[_Change, None] = {}

    def take(change: _Change) -> bool:
        if change in chosen:
            return True
        for earlier in rests_on.get(change, ()):  # at most three deep: see _dependencies
            if not take(earlier):
                return False
        if len(chosen) >= most:
            return False
        chosen[change] = None
        return True

    for change in sorted(changes, key=_Change.priority):
        if len(chosen) >= most:
            break
        take(change)
    return list(chosen)


def _dependencies(changes: Iterable[_Change]) -> dict[_Change, list[_Change]]:
    """For each change those that must come first, or somebody is refused for a tick whom neither end refuses.

    A block waits for the new holes inside it. The end of a hole waits for the end of the blocks around it, and for new
    holes around or inside it. The end of a block waits for a new block around it, so that escalation leaves no gap.
    """
    by_kind: dict[tuple[bool, bool], Nesting[_Change]] = defaultdict(Nesting)
    for change in changes:
        by_kind[change.put, change.blocks].add(change.entry.service, change.entry.prefix, change)
    new_holes, new_blocks = by_kind[True, False], by_kind[True, True]
    old_holes, old_blocks = by_kind[False, False], by_kind[False, True]
    rests_on: dict[_Change, list[_Change]] = defaultdict(list)
    for change in changes:
        at = change.entry.service, change.entry.prefix
        match change.put, change.blocks:
            case True, False:
                for later in (*new_blocks.holding(*at), *old_holes.holding(*at)):
                    rests_on[later].append(change)
            case False, False:
                rests_on[change] += (*old_blocks.holding(*at), *new_holes.holding(*at))
            case False, True:
                rests_on[change] += new_blocks.holding(*at)
    return rests_on
