"""Says which verdict completed the evidence for a block, so that the reaction time can be measured from it.

The core itself is asked: every verdict of the run is given to it in order, one step each, with default parameters. The
moment at which it decides is the moment the evidence was complete; the daemon could act on it from its next tick on.

Invariants:
    every-verdict-is-asked-about: the core decides after each single verdict, so the moment found is that of the verdict
        that made the difference, to the verdict.
"""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network

import numpy as np

from edge.abi import REASONS, Service, Standing
from edge.core.model import Event, Verdict, batch
from edge.core.prefix import key_text
from edge.core.snapshot import CONNECTIONS, Delta
from edge.core.step import CoreParams, Inputs, State, step
from edge.lab.traffic import Traffic

Net = IPv4Network | IPv6Network

_NOTHING = Delta(
    seconds=0.0, counters=np.zeros((REASONS, 2), dtype=np.uint64), connections=np.empty(0, dtype=CONNECTIONS)
)


def verdicts(traffic: Traffic) -> list[Event]:
    """Every verdict the MTA gave in the run, in order of time (CLOCK_MONOTONIC)."""
    events = [
        _event(at_s, run.sender.address, Verdict.HAM) for run in traffic.senders for at_s in run.accepted.values()
    ]
    for campaign in traffic.campaigns:
        for attempt in campaign.attempts:
            if attempt.refused_s is not None:
                events.append(_event(attempt.refused_s, attempt.source, attempt.verdict))
    return sorted((event for event in events if event is not None), key=lambda event: event.ts_s)


def completed(events: list[Event]) -> dict[Net, float]:
    """For each prefix the core would block: the time of the verdict that completed the evidence."""
    params = CoreParams()
    state = State(params.reputation)
    found: dict[Net, float] = {}
    for event in events:
        outcome = step(state, Inputs(events=batch([event]), delta=_NOTHING, fixed=()), event.ts_s, params)
        for decision in outcome.decisions:
            if decision.action == "open" and decision.entry.standing is Standing.BLOCK:
                found.setdefault(decision.entry.prefix.network, event.ts_s)
    return found


def _event(at_s: float, source: str, verdict: Verdict) -> Event:
    key = key_text(source)
    assert key is not None, source  # documentation addresses are never bogons
    good = verdict is Verdict.HAM
    return Event(
        ts_s=at_s,
        hi=key[0],
        lo=key[1],
        service=Service.MX,
        verdict=verdict,
        rcpt_ok=int(good),
        rcpt_bad=int(not good),
    )
