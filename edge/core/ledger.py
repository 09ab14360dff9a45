"""Learned entries in force, what became of earlier ones, and the brakes on change.

Invariants:
    hole-outlives-block: a hole never expires before the block it pierces.
    nothing-pierces-by-accident: when a block opens, lesser entries inside it that are not holes close.
    full-ledger-still-blocks: where there is no room, what is needed least gives way to a block, a hole never.
    lifetime-doubles-and-is-capped: each relapse doubles the lifetime of a block, up to its level's cap.
    changes-are-capped: never more than the ceiling of openings in one tick; every one held back is counted.
    ledger-is-bounded: entries, and the history of ended blocks, have a fixed most.
    every-change-is-reported: each key whose entry came, went or became another is in the next `take_changed`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated

import msgspec

from edge.abi import Origin, Service, Standing
from edge.core.model import Decision, Entry
from edge.core.policy import Proposal
from edge.core.prefix import LENGTHS, Prefix
from edge.core.reputation import Reputation

Key = tuple[Service, Prefix]


class LedgerParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Lifetimes and ceilings of what is learned."""

    block_s: Annotated[
        float, msgspec.Meta(ge=10, le=86400, description="first lifetime of a block, seconds; OpenSSH's penalty cap")
    ] = 600.0
    block_most_s: Annotated[
        float,
        msgspec.Meta(ge=60, le=2592000, description="longest block of a /64 or longer, seconds; blocklistd's day"),
    ] = 86400.0
    block_most_wide_s: Annotated[
        float, msgspec.Meta(ge=60, le=2592000, description="longest block of anything shorter, seconds; six hours")
    ] = 21600.0
    suspect_s: Annotated[
        float, msgspec.Meta(ge=10, le=86400, description="lifetime of the suspect class, seconds; renewed by evidence")
    ] = 3600.0
    good_s: Annotated[
        float, msgspec.Meta(ge=60, le=2592000, description="lifetime of the good class, seconds; renewed by evidence")
    ] = 86400.0
    relapse_s: Annotated[
        float,
        msgspec.Meta(
            ge=600, le=2592000, description="a block this long after the last one is a relapse; half-life of a /64"
        ),
    ] = 7 * 86400.0
    company_doublings: Annotated[
        int,
        msgspec.Meta(
            ge=0,
            le=8,
            description="doublings given in advance where nearly every released neighbour had to be blocked again; "
            "ten minutes become 160",
        ),
    ] = 4
    company_trials: Annotated[
        int, msgspec.Meta(ge=2, le=1000, description="trials after blocks in a /48 or /32 before that is said of it")
    ] = 8
    company_share: Annotated[
        float, msgspec.Meta(gt=0.5, le=1, description="share of them that must have ended in another block")
    ] = 0.75
    changes: Annotated[int, msgspec.Meta(ge=1, le=100000, description="most entries opened or renewed in a tick")] = 512
    good_covered: Annotated[
        float,
        msgspec.Meta(
            ge=0,
            le=1,
            description="most of the last day's good weight that blocks shorter than /64 (IPv4 /32) may cover, as a "
            "share",
        ),
    ] = 0.02
    good_covered_least: Annotated[
        float,
        msgspec.Meta(ge=0, le=1e6, description="good weight they may cover in any case, so that a quiet host can act"),
    ] = 10.0
    entries: Annotated[
        int,
        msgspec.Meta(
            ge=16,
            le=1 << 22,
            description="learned entries in force; beyond it a new block takes the place of what is needed least",
        ),
    ] = 65536
    history: Annotated[
        int, msgspec.Meta(ge=16, le=1 << 22, description="ended blocks remembered; the oldest are forgotten first")
    ] = 65536


@dataclass(frozen=True, slots=True)
class Past:
    """What became of the blocks of one prefix."""

    relapses: int
    lifetime_s: float
    ended_s: float | None
    children: float = 0.0  # distinct bad ones it was for


class Ledger:
    """Owned by `State`; changed by `step` and `adopt` only."""

    def __init__(self) -> None:
        self.learned: dict[Key, Entry] = {}
        self.past: dict[Key, Past] = {}
        self.next_id = 1
        self._changed: set[Key] = set()
        self._due: list[tuple[float, int, Key]] = []
        self._inside: dict[Key, set[Key]] = {}
        self._covered: dict[Key, float] = {}
        self._pushes = 0
        self._spare: list[Entry] = []  # candidates for making room, as of `_spare_at`, the next one last
        self._spare_at = float("-inf")

    def entry(self, service: Service, prefix: Prefix) -> Entry | None:
        """The learned entry at exactly this prefix."""
        return self.learned.get((service, prefix))

    def over(self, service: Service, prefix: Prefix) -> Entry | None:
        """The longest learned entry of a shorter prefix that holds this one."""
        for length in LENGTHS:
            if length < prefix.length:
                found = self.learned.get((service, prefix.parent(length)))
                if found is not None:
                    return found
        return None

    def take_changed(self) -> set[Key]:
        """The keys of entries that changed since this was asked last."""
        changed, self._changed = self._changed, set()
        return changed

    def expire(self, reputation: Reputation, now_s: float, p: LedgerParams) -> list[Decision]:
        """End what is due. A block goes over into the bad class for as long as it lasted, unless one is above it."""
        done: list[Decision] = []
        while self._due and self._due[0][0] <= now_s:
            _, _, key = heapq.heappop(self._due)
            entry = self.learned.get(key)
            if entry is None or entry.expires_s is None or entry.expires_s > now_s:
                continue  # renewed or replaced since it was queued
            done.append(self._close(entry, now_s, "expired"))
            past = self.past.get(key)
            if entry.standing is Standing.BAD:
                reputation.note(*key, "cleared", now_s)
            if entry.standing is not Standing.BLOCK or past is None:
                continue
            above = self.over(*key)
            if above is None or above.standing is not Standing.BLOCK:
                lifetime = min(max(past.lifetime_s, p.block_s), p.block_most_s)
                done.append(
                    self._put(key, Standing.BAD, now_s + lifetime, f"on trial after a block: {entry.reason}", now_s)
                )
        return done

    def apply(
        self, proposals: list[Proposal], reputation: Reputation, now_s: float, p: LedgerParams
    ) -> tuple[list[Decision], dict[str, int]]:
        """Carry out what was proposed as far as the ceilings allow: blocks first, the worst first, then the rest."""
        done: list[Decision] = []
        held: dict[str, int] = {}
        order = sorted(proposals, key=lambda a: (a.standing is not Standing.BLOCK, -a.belief.bad, a.service, a.prefix))
        opened = 0
        totals: dict[Service, float] = {}
        for (service, _), weight in self._covered.items():
            totals[service] = totals.get(service, 0.0) + weight
        for proposal in order:
            key = proposal.service, proposal.prefix
            if proposal.standing is Standing.NEW:
                if key in self.learned:
                    if self.learned[key].standing is Standing.BAD:
                        reputation.note(*key, "cleared", now_s)
                    done.append(self._close(self.learned[key], now_s, proposal.reason, proposal))
                continue
            if self._is_fresh(key, proposal.standing, now_s, p):
                continue
            hit = _good_hit(proposal, reputation, now_s) if proposal.standing is Standing.BLOCK else 0.0
            most = max(p.good_covered_least, p.good_covered * reputation.good_traffic(proposal.service, now_s))
            covered = totals.get(proposal.service, 0.0) - self._covered.get(key, 0.0) + hit
            why = self._held_back(proposal, opened, hit > 0 and covered > most, p)
            if why == "entries" and proposal.standing is Standing.BLOCK:
                done += self._make_room(key, proposal, now_s, p)
                why = self._held_back(proposal, opened, False, p)
            if why is not None:
                held[why] = held.get(why, 0) + 1
                continue
            if proposal.standing is Standing.BLOCK:
                totals[proposal.service] = covered
                if hit:
                    self._covered[key] = hit
                else:
                    self._covered.pop(key, None)
            opened += 1 + len(proposal.holes)
            done += self._open(proposal, reputation, now_s, p)
        return done, held

    def adopt(self, entries: Iterable[Entry], now_s: float) -> None:
        """Take over learned entries found installed; blocks count as history."""
        for entry in entries:
            if entry.origin is not Origin.LEARNED or (entry.expires_s is not None and entry.expires_s <= now_s):
                continue
            self._install(entry, now_s)
            self.next_id = max(self.next_id, entry.decision + 1)
            if entry.standing is Standing.BLOCK:
                left = 0.0 if entry.expires_s is None else entry.expires_s - now_s
                self.past[entry.key] = Past(0, left, None)

    def release(self, entry: Entry, now_s: float, why: str) -> Decision:
        """End an entry in force at somebody's word."""
        return self._close(entry, now_s, why)

    def blamed(self, key: Key, now_s: float, p: LedgerParams) -> float:
        """Distinct bad children of the last block of a prefix; 0 when there was none that counts as history."""
        past = self.past.get(key)
        if past is None or (past.ended_s is not None and now_s - past.ended_s > p.relapse_s):
            return 0.0
        return past.children

    def lifetime(self, key: Key, reputation: Reputation, now_s: float, p: LedgerParams) -> tuple[int, float]:
        """Relapses so far and the lifetime, in seconds, of a block that would open now."""
        past = self.past.get(key)
        relapses = 0
        if past is not None and (past.ended_s is None or now_s - past.ended_s <= p.relapse_s):
            relapses = past.relapses + 1
        doublings = min(relapses + self._in_company(key, reputation, now_s, p), 32)
        most = p.block_most_s if key[1].length >= 64 else p.block_most_wide_s
        return relapses, min(most, p.block_s * 2.0**doublings)

    def _in_company(self, key: Key, reputation: Reputation, now_s: float, p: LedgerParams) -> int:
        """Doublings in advance, where released neighbours nearly always relapse."""
        service, prefix = key
        for length in (48, 32):
            if length >= prefix.length:
                continue
            cleared, relapsed = reputation.weights(service, prefix.parent(length), now_s, "cleared", "relapsed")
            if cleared + relapsed >= p.company_trials:
                return p.company_doublings if relapsed >= p.company_share * (cleared + relapsed) else 0
        return 0

    def _is_fresh(self, key: Key, standing: Standing, now_s: float, p: LedgerParams) -> bool:
        """Whether the same entry is in force and not yet half over."""
        entry = self.learned.get(key)
        if entry is None or entry.standing is not standing or entry.expires_s is None:
            return False
        whole = {Standing.GOOD: p.good_s, Standing.SUSPECT: p.suspect_s}.get(standing)
        if whole is None:
            whole = self.past[key].lifetime_s
        return entry.expires_s - now_s > whole / 2

    def _held_back(self, proposal: Proposal, opened: int, covers_much: bool, p: LedgerParams) -> str | None:
        """The ceiling this change would break, if any."""
        if opened + 1 + len(proposal.holes) > p.changes:
            return "changes"
        if covers_much:
            return "good_covered"
        if self._lacks(proposal, p) > 0:
            return "entries"
        return None

    def _lacks(self, proposal: Proposal, p: LedgerParams) -> int:
        """Entries too many in force for this change."""
        keys = [(proposal.service, prefix) for prefix in (proposal.prefix, *(hole for hole, _ in proposal.holes))]
        return len(self.learned) + sum(key not in self.learned for key in keys) - p.entries

    def _make_room(self, key: Key, proposal: Proposal, now_s: float, p: LedgerParams) -> list[Decision]:
        """End what is needed least and is no hole, nearest its end first, so that a block has room.

        Limits and favours go before trials, these before blocks, first offences among them first, and wide ones last.
        """
        keep = {(proposal.service, hole) for hole, _ in proposal.holes} | {key}
        done: list[Decision] = []
        if self._spare_at != now_s:  # sorted once a tick, however many ask
            self._spare_at = now_s
            self._spare = sorted(self.learned.values(), key=_needed_least, reverse=True)
        while self._spare and self._lacks(proposal, p) > 0:
            entry = self._spare.pop()
            above = self.over(*entry.key)
            is_hole = above is not None and above.standing is Standing.BLOCK
            if self.learned.get(entry.key) is entry and not is_hole and entry.key not in keep:
                done.append(self._close(entry, now_s, "room for a block"))
        return done

    def _open(self, proposal: Proposal, reputation: Reputation, now_s: float, p: LedgerParams) -> list[Decision]:
        key = proposal.service, proposal.prefix
        if proposal.standing is not Standing.BLOCK:
            span = p.good_s if proposal.standing is Standing.GOOD else p.suspect_s
            expires = now_s + span
            above = self.over(*key)
            if above is not None and above.standing is Standing.BLOCK and above.expires_s is not None:
                expires = max(expires, above.expires_s)  # it is a hole
            return [self._put(key, proposal.standing, expires, proposal.reason, now_s, proposal)]
        present = self.learned.get(key)
        if present is not None and present.standing is Standing.BLOCK:
            past = self.past[key]
            lifetime = past.lifetime_s
        else:
            relapses, lifetime = self.lifetime(key, reputation, now_s, p)
            if relapses:
                reputation.note(*key, "relapsed", now_s)
            self._remember(key, Past(relapses, lifetime, None, proposal.belief.bad_children), p)
        expires = now_s + lifetime
        done = self._holes(proposal, expires, lifetime, now_s)
        done.append(self._put(key, Standing.BLOCK, expires, proposal.reason, now_s, proposal))
        return done

    def _holes(self, proposal: Proposal, until_s: float, trial_s: float, now_s: float) -> list[Decision]:
        """Open or extend the holes of a block, also over its trial, and close what would pierce it by accident."""
        done: list[Decision] = []
        expires = until_s + trial_s
        key = proposal.service, proposal.prefix
        wanted = {(proposal.service, child): standing for child, standing in proposal.holes}
        for child, standing in wanted.items():
            entry = self.learned.get(child)
            if entry is None or entry.standing not in (Standing.GOOD, Standing.BLOCK):
                done.append(self._put(child, standing, expires, f"good child of blocked {key[1]}", now_s))
        for child in sorted(self._inside.get(key, ())):
            entry = self.learned[child]
            if entry.standing is Standing.GOOD or child in wanted:
                if entry.expires_s is not None and entry.expires_s < expires:
                    self._install(replace(entry, expires_s=expires), now_s)
            elif entry.standing is not Standing.BLOCK or self._is_needless(entry, key, until_s):
                done.append(self._close(entry, now_s, f"inside blocked {key[1]}"))
        return done

    def _is_needless(self, entry: Entry, above: Key, until_s: float) -> bool:
        """Whether a block says nothing that the one above it does not say until then, nor lies in a hole of it."""
        over = self.over(*entry.key)
        in_hole = over is not None and over.key != above and over.standing is not Standing.BLOCK
        return not in_hole and entry.expires_s is not None and entry.expires_s <= until_s

    def _put(
        self, key: Key, standing: Standing, expires: float, reason: str, now_s: float, source: Proposal | None = None
    ) -> Decision:
        """Install an entry and say so."""
        present = self.learned.get(key)
        action = "renew" if present is not None and present.standing is standing else "open"
        entry = Entry(
            prefix=key[1],
            service=key[0],
            standing=standing,
            origin=Origin.LEARNED,
            expires_s=expires,
            reason=reason,
            decision=self.next_id,
        )
        self._install(entry, now_s)
        return self._decision(action, entry, now_s, source)

    def _install(self, entry: Entry, now_s: float) -> None:
        key = entry.key
        if key not in self.learned:
            for length in LENGTHS:
                if length < entry.prefix.length:
                    self._inside.setdefault((entry.service, entry.prefix.parent(length)), set()).add(key)
        self.learned[key] = entry
        self._changed.add(key)
        if entry.standing is not Standing.BLOCK:
            self._end(key, now_s)
        if entry.expires_s is not None:
            self._pushes += 1
            heapq.heappush(self._due, (entry.expires_s, self._pushes, key))

    def _close(self, entry: Entry, now_s: float, why: str, source: Proposal | None = None) -> Decision:
        key = entry.key
        del self.learned[key]
        self._changed.add(key)
        for length in LENGTHS:
            above = entry.service, entry.prefix.parent(length)
            if length < entry.prefix.length and above in self._inside:
                self._inside[above].discard(key)
                if not self._inside[above]:
                    del self._inside[above]
        self._end(key, now_s)
        return self._decision("close", replace(entry, reason=why), now_s, source)

    def _end(self, key: Key, now_s: float) -> None:
        """Note that whatever block there was here is over."""
        self._covered.pop(key, None)
        past = self.past.get(key)
        if past is not None and past.ended_s is None:
            self.past[key] = replace(past, ended_s=now_s)

    def _remember(self, key: Key, past: Past, p: LedgerParams) -> None:
        if key not in self.past and len(self.past) >= p.history:
            ended = [k for k, v in self.past.items() if v.ended_s is not None]
            for old in sorted(ended, key=lambda k: self.past[k].ended_s or 0.0)[: max(1, p.history // 16)]:
                del self.past[old]
        self.past[key] = past

    def _decision(self, action: str, entry: Entry, now_s: float, source: Proposal | None) -> Decision:
        belief = None if source is None else source.belief
        decision = Decision(
            id=self.next_id,
            at_s=now_s,
            action=action,
            entry=entry,
            bad=0.0 if belief is None else belief.bad,
            good=0.0 if belief is None else belief.good,
            bound=0.0 if belief is None else belief.bad_bound,
            children=0 if belief is None else round(belief.bad_children),
        )
        self.next_id += 1
        return decision


def _needed_least(entry: Entry) -> tuple[int, bool, float, Service, Prefix]:
    """The order in which entries make room for others."""
    rank = {Standing.BAD: 1, Standing.BLOCK: 2}.get(entry.standing, 0)
    return rank, entry.prefix.length < 64, entry.expires_s or 0.0, entry.service, entry.prefix


def _good_hit(proposal: Proposal, reputation: Reputation, now_s: float) -> float:
    """Good weight of bystanders a block would refuse: what is remembered of the prefix less that of its holes.

    What a unit itself sent is no bystander's: it stands in the belief the unit was judged by. Were it counted, a sender
    could buy itself out of being blocked; as he could below a /48 if it were remembered without a most.
    """
    if proposal.prefix.length >= 64:
        return 0.0
    holes = sum(reputation.weights(proposal.service, hole, now_s, "good")[0] for hole, _ in proposal.holes)
    return max(0.0, proposal.belief.good - holes)
