"""Small synthetic worlds for the core, and a closed loop in which it learns only from what it admits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from edge.abi import REASONS, Service, Standing
from edge.core.model import Authentication, Decision, Entry, Event, Verdict, batch
from edge.core.prefix import LENGTHS, Prefix, key_text
from edge.core.snapshot import CONNECTIONS, Delta
from edge.core.step import CoreParams, Inputs, Outcome, State, step

QUIET = Delta(seconds=1.0, counters=np.zeros((REASONS, 2), np.uint64), connections=np.empty(0, CONNECTIONS))


def event(
    source: str,
    verdict: Verdict = Verdict.UNKNOWN_USER,
    *,
    service: Service = Service.MX,
    handshake: bool = True,
    authenticated: bool = False,
    vouched: int = 0,
) -> Event:
    """One event; `vouched` is the DKIM domain of a message that passes DKIM and SPF, 0 for none."""
    keyed = key_text(source)
    assert keyed is not None
    result = Authentication.PASS if vouched else Authentication.NONE
    return Event(
        ts_s=0.0,
        hi=keyed[0],
        lo=keyed[1],
        service=service,
        verdict=verdict,
        handshake=handshake,
        authenticated=authenticated,
        dkim=result,
        dkim_domain=vouched,
        spf=result,
    )


def bad(source: str, count: int = 1, service: Service = Service.MX) -> list[Event]:
    """Deliveries to nobody."""
    return [event(source, service=service)] * count


def ham(source: str, count: int = 1, domain: int = 7919) -> list[Event]:
    """Messages that are wanted and vouched for."""
    return [event(source, Verdict.HAM, vouched=domain)] * count


@dataclass(slots=True)
class World:
    """A core and its clock."""

    params: CoreParams = field(default_factory=CoreParams)
    fixed: tuple[Entry, ...] = ()
    now_s: float = 1009.0
    decisions: list[Decision] = field(default_factory=list)
    state: State = field(init=False)

    def __post_init__(self) -> None:
        self.state = State(self.params.reputation)

    def tick(self, *groups: Iterable[Event], seconds: float = 1.0) -> Outcome:
        """Everything given arrives in one tick, whatever is in force."""
        self.now_s += seconds
        events = batch(e for group in groups for e in group)
        outcome = step(self.state, Inputs(events=events, delta=QUIET, fixed=self.fixed), self.now_s, self.params)
        self.decisions += outcome.decisions
        return outcome

    def attempt(self, events: Sequence[Event]) -> list[bool]:
        """The same in a closed loop: only what no block refuses reaches the core. Says what was admitted."""
        admitted = [not self.is_blocked(e) for e in events]
        self.tick([e for e, let in zip(events, admitted, strict=True) if let])
        return admitted

    def is_blocked(self, e: Event) -> bool:
        """Longest match over the learned entries."""
        for length in LENGTHS:
            entry = self.state.ledger.learned.get((e.service, Prefix.of(e.hi, e.lo, length)))
            if entry is not None:
                return entry.standing is Standing.BLOCK
        return False

    def standing(self, prefix: str, service: Service = Service.MX) -> Standing:
        """The learned standing of exactly this prefix."""
        entry = self.state.ledger.learned.get((service, Prefix.parse(prefix)))
        return Standing.NEW if entry is None else entry.standing

    def blocks(self) -> set[str]:
        """Every prefix blocked now."""
        return {str(p) for (_, p), e in self.state.ledger.learned.items() if e.standing is Standing.BLOCK}
