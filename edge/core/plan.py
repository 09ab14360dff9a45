"""In what order to change installed entries into wanted ones: bounded, and safe at every step.

An entry refuses (BLOCK) or opens (every other standing: whoever matches it longest is not refused). Puts come before
drops; among the puts what opens comes first, longest prefix first, among the drops what refuses comes first. When there
are more changes than a tick may make, the operator's go first, and with each change go those it rests on.

Invariants:
    every-step-is-safe: after no change of a plan, and after no plan of a series, is an address refused that was not
        refused before the first and is not refused after the last.
    plans-converge: applied tick after tick, the plans end with the wanted entries installed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import msgspec

from edge.abi import Origin, Service, Standing
from edge.core.model import Entry
from edge.core.nesting import Nesting
from edge.core.prefix import Prefix

Difference = tuple[Entry | None, Entry | None]
"""The entry wanted at a prefix, and the one installed there; None for no entry."""


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
    """Entries to install, then entries to remove, each in a safe order; at most `deferred` changes wait for later."""

    put: tuple[Entry, ...]
    drop: tuple[Entry, ...]
    deferred: int = 0


def plan(differences: Iterable[Difference], params: PlanParams) -> Plan:
    """The changes that end these differences.

    With a difference must come all others of prefixes that hold its prefix or lie inside it: see `_dependencies`.
    """
    changes = []
    for wanted, present in differences:
        entry = wanted or present
        if entry is not None:
            urgent = is_urgent(wanted) or is_urgent(present)
            changes.append(_Change(entry=entry, put=wanted is not None, urgent=urgent))
    chosen = changes if len(changes) <= params.max_changes else _choose(changes, params.max_changes)
    chosen.sort(key=_Change.order)
    return Plan(
        put=tuple(change.entry for change in chosen if change.put),
        drop=tuple(change.entry for change in chosen if not change.put),
        deferred=len(changes) - len(chosen),
    )


def is_urgent(entry: Entry | None) -> bool:
    """Whether somebody waits for it: a command, or the daemon's own exemptions."""
    return entry is not None and entry.origin in (Origin.OPERATOR, Origin.EXEMPT)


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
