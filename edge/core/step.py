"""One tick of the core: evidence in, entries in force out.

    expire what is due -> learn -> propose -> apply within the ceilings

The live daemon and the replay call the same function with the same kind of arguments; time is one of them.

Invariants:
    same-inputs-same-outcome: two states fed the same inputs decide the same, to the id and the reason.
    forged-syn-changes-nothing: events without a handshake open, renew and score nothing.
    every-suppressed-change-is-counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from types import MappingProxyType

import msgspec
import numpy as np

from edge.abi import Level, Service
from edge.core.forgery import Forgery, ForgeryParams, Saturated
from edge.core.guard import Guard
from edge.core.ledger import Ledger, LedgerParams
from edge.core.model import Decision, Entry, Verdict
from edge.core.policy import View, propose
from edge.core.prefix import Prefix
from edge.core.reputation import Reputation, ReputationParams
from edge.core.rules import PolicyParams
from edge.core.snapshot import Delta


class CoreParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that can be tuned in the core."""

    reputation: ReputationParams = ReputationParams()
    policy: PolicyParams = PolicyParams()
    ledger: LedgerParams = LedgerParams()
    forgery: ForgeryParams = ForgeryParams()


class State:
    """What the core remembers between ticks; owned by `step`, read by `explain`."""

    def __init__(self, params: ReputationParams) -> None:
        self.reputation = Reputation(params)
        self.ledger = Ledger()
        self.forgery = Forgery()
        self._fixed: tuple[Entry, ...] = ()
        self._guard = Guard(())

    def guard(self, fixed: tuple[Entry, ...]) -> Guard:
        """The guard of these entries; rebuilt only when they are not the same tuple as last time."""
        if fixed is not self._fixed:
            self._fixed, self._guard = fixed, Guard(fixed)
        return self._guard


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What one tick is given: EVENT rows oldest first, the kernel's delta, and the fixed entries in force."""

    events: np.ndarray
    delta: Delta
    fixed: tuple[Entry, ...]
    saturated: tuple[Saturated, ...] = ()  # prefixes whose limit is spent


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """For metrics; the totals since the state was made are marked so."""

    rows: Mapping[Level, int]  # now, over all services
    dropped_rows: int  # total: rows dropped for lack of room
    refused_rows: int  # total: new rows for which there was none
    events_unverified: int  # this tick: without a handshake
    events_without_verdict: int  # this tick
    suppressed: Mapping[str, int]  # this tick, by reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one tick decided. `learned` is a view of everything in force: it stays valid until the next step. `forged`:
    prefixes most of whose SYNs are forged, and until when they count as such, in seconds. `changed`: keys of
    learned entries that came, went or became others since the last step."""

    decisions: tuple[Decision, ...]
    learned: Mapping[tuple[Service, Prefix], Entry]
    changed: Set[tuple[Service, Prefix]]
    forged: Mapping[tuple[Service, Prefix], float]
    flood_until_s: float  # until then the whole host is flooded by forged SYNs from everywhere; 0.0: it is not
    counts: Counts


def step(state: State, inputs: Inputs, now_s: float, params: CoreParams) -> Outcome:
    """Advance the state to `now_s` (seconds, non-decreasing) and say what changed."""
    decisions = state.ledger.expire(state.reputation, now_s, params.ledger)
    touched = state.reputation.learn(inputs.events, now_s)
    view = View(
        reputation=state.reputation,
        entry=state.ledger.entry,
        over=state.ledger.over,
        blamed=lambda service, prefix: state.ledger.blamed((service, prefix), now_s, params.ledger),
        guard=state.guard(inputs.fixed),
        now_s=now_s,
        params=params.policy,
    )
    delta = inputs.delta
    forged = state.forgery.observe(inputs.saturated, delta.connections, delta.seconds, now_s, params.forgery)
    flood_until_s = state.forgery.observe_all(delta.counters, delta.connections, delta.seconds, now_s, params.forgery)
    applied, held = state.ledger.apply(propose(view, touched), state.reputation, now_s, params.ledger)
    suppressed = {why: view.suppressed.get(why, 0) + held.get(why, 0) for why in sorted({*view.suppressed, *held})}
    return Outcome(
        decisions=(*decisions, *applied),
        learned=MappingProxyType(state.ledger.learned),
        changed=state.ledger.take_changed(),
        forged=forged,
        flood_until_s=flood_until_s,
        counts=_count(state.reputation, inputs, suppressed),
    )


def adopt(state: State, entries: Iterable[Entry], now_s: float) -> None:
    """Keep learned entries found in the kernel after a restart until they expire; a block counts as a first offence."""
    state.ledger.adopt(entries, now_s)


def _count(reputation: Reputation, inputs: Inputs, suppressed: dict[str, int]) -> Counts:
    events, tables = inputs.events, reputation.tables
    shaken = events["handshake"] == 1
    return Counts(
        rows={level: sum(len(tables[service, level]) for service in Service) for level in Level},
        dropped_rows=sum(table.dropped for table in tables.values()),
        refused_rows=sum(table.refused for table in tables.values()),
        events_unverified=int((~shaken).sum()),
        events_without_verdict=int((shaken & (events["verdict"] == Verdict.NONE)).sum()),
        suppressed=suppressed,
    )
