"""Why a prefix stands as it does, level by level, and what would change it. Reads the state, changes nothing.

Invariants:
    explain-changes-nothing: asking does not alter what is decided next.
    explain-is-json: the result holds only what JSON can hold, no NaN and no infinity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge.abi import Service, Standing
from edge.core.belief import Belief, with_more_bad
from edge.core.match import matches
from edge.core.model import Entry
from edge.core.prefix import LENGTHS, Prefix
from edge.core.reputation import Reputation
from edge.core.rules import PolicyParams, has_few_bad, is_block_worthy, may_block, needed_children
from edge.core.step import CoreParams, State

_FORECAST_MOST = 256
"""Messages a forecast looks ahead; beyond that, saying so is enough."""


def explain(
    state: State,
    entries: Mapping[tuple[Service, Prefix], Entry],
    prefix: Prefix,
    service: Service,
    now_s: float,
    params: CoreParams,
) -> dict[str, Any]:
    """What is known of a prefix and the levels above it, longest first; `entries` are those in force, of any origin."""
    levels = [prefix.parent(n) for n in LENGTHS if n <= prefix.length and not (prefix.ipv4 and n < 48)]
    if prefix not in levels:
        levels.insert(0, prefix)
    covering = matches(entries, service, prefix)
    match = covering[0] if covering else None
    return {
        "prefix": str(prefix),
        "service": service.name.lower(),
        "standing": "new" if match is None else match.standing.name.lower(),
        "decided_by": None if match is None else str(match.prefix),
        "levels": [_level(state, entries, at, service, now_s, params) for at in levels],
        "other_entries": [_entry(entry, now_s) for entry in covering if entry.prefix not in levels],
    }


def _level(
    state: State,
    entries: Mapping[tuple[Service, Prefix], Entry],
    prefix: Prefix,
    service: Service,
    now_s: float,
    params: CoreParams,
) -> dict[str, Any]:
    belief = state.reputation.standing(service, prefix, now_s)
    entry = entries.get((service, prefix))
    relapses, lifetime = state.ledger.lifetime((service, prefix), state.reputation, now_s, params.ledger)
    return {
        "prefix": str(prefix),
        "length": prefix.length,
        "bad_weight": round(belief.bad, 3),
        "good_weight": round(belief.good, 3),
        "events": belief.events,
        "last_evidence_age_s": None if belief.last_s is None else round(max(0.0, now_s - belief.last_s), 3),
        "bad_children": round(belief.bad_children, 3),
        "good_children": round(belief.good_children, 3),
        "prior": {
            "mean": round(belief.prior_mean, 4),
            "weight": round(belief.prior_weight, 3),
            "bound": round(belief.prior_bound, 4),
            "from": belief.prior_from,
        },
        "posterior_mean": round(belief.mean, 4),
        "bad_bound": round(belief.bad_bound, 4),
        "good_bound": round(belief.good_bound, 4),
        "entry": None if entry is None else _entry(entry, now_s),
        "next_block": {"relapses": relapses, "lifetime_s": lifetime},
        "change": _forecast(state.reputation, belief, entry, prefix, service, now_s, params),
    }


def _entry(entry: Entry, now_s: float) -> dict[str, Any]:
    return {
        "prefix": str(entry.prefix),
        "standing": entry.standing.name.lower(),
        "origin": entry.origin.name.lower(),
        "reason": entry.reason,
        "expires_in_s": None if entry.expires_s is None else round(max(0.0, entry.expires_s - now_s), 3),
        "decision": entry.decision,
    }


def _forecast(
    reputation: Reputation,
    belief: Belief,
    entry: Entry | None,
    prefix: Prefix,
    service: Service,
    now_s: float,
    params: CoreParams,
) -> str:
    """A line of what would change the standing of this prefix."""
    if entry is not None and entry.standing is Standing.BLOCK:
        if entry.expires_s is None:
            return "stays blocked until the entry is removed"
        return f"released in {max(0.0, entry.expires_s - now_s):.0f} s, on trial after that"
    if entry is not None and entry.standing is Standing.ALLOW:
        return "stays allowed until the entry is removed"
    if prefix.level is None:
        return "no record is kept at this length"
    if prefix.length < 64:
        return _forecast_parent(reputation, belief, prefix, service, now_s, params.policy)
    if service is Service.SUBMISSION and not may_block(service, belief, now_s, params.policy):
        return "limited at most: on the submission ports only an attack without any login is blocked"
    more = _more_until_block(belief, prefix, params)
    whence = ""
    if prefix.length == 128:
        around = reputation.standing(service, prefix.parent(64), now_s)
        if around.good_children < 0.5:
            if around.bad_children >= 0.5 and not has_few_bad(prefix.parent(64), around, params.policy):
                return "judged by its /64: nobody in it is known to be good"
            more = max(more, _more_until_block(around, prefix.parent(64), params))
    elif not prefix.ipv4:
        whence = " from new addresses"
        more = max(more, round(params.policy.addresses_64 - belief.bad_children))
    size = f"/{prefix.network.prefixlen}"
    if more > _FORECAST_MOST:
        return f"more than {_FORECAST_MOST} rejected deliveries in a row would block this {size}"
    return (
        f"{more} more rejected {'delivery' if more == 1 else 'deliveries'}{whence} block{'s' * (more == 1)} this {size}"
    )


def _more_until_block(belief: Belief, prefix: Prefix, params: CoreParams) -> int:
    """Rejected deliveries in a row until a unit or address is bad enough; one more than the most that is looked at."""
    weight = params.policy.address_weight if prefix.length == 128 else params.policy.block_weight
    for more in range(1, _FORECAST_MOST + 1):
        if is_block_worthy(with_more_bad(belief, float(more), params.reputation.confidence_z), weight, params.policy):
            return more
    return _FORECAST_MOST + 1


def _forecast_parent(
    reputation: Reputation, belief: Belief, prefix: Prefix, service: Service, now_s: float, p: PolicyParams
) -> str:
    if (prefix.length < 48 and not p.allow_wide) or (prefix.ipv4 and prefix.length - 32 < p.floor_ipv4):
        return "never blocked automatically: shorter than the floor"
    needed, company = needed_children(reputation, service, prefix, now_s, p)
    if belief.prior_bound >= p.company_bound:
        needed = min(needed, company)
    short = max(1, round(needed - belief.bad_children))
    share = (belief.bad_children + short) / (belief.bad_children + short + belief.good_children)
    if share < p.bad_share:
        return f"held back by {belief.good_children:.0f} good children: {p.bad_share:.0%} of those seen must be bad"
    return f"{short} more bad {'child blocks' if short == 1 else 'children block'} this /{prefix.network.prefixlen}"
