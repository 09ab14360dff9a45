"""The rules: from what is believed of a prefix to what should be done about it.

The unit is the IPv6 /64 and the IPv4 /32. A /64 that also holds somebody good, or hardly anybody bad, is judged address
by address. On the submission ports only attacks are blocked. A shorter prefix is blamed for distinct bad children,
never for one; the good among them become holes. Nothing here knows what is installed beyond the entries it is shown,
and nothing here changes state: `propose` says what should be, and the ledger decides how much of it happens in one
tick.

Invariants:
    good-neighbour-is-never-blocked: a block that covers a known good child carries a hole for it.
    one-bad-child-blames-no-parent: a /56 falls for a single bad /64 only in a network that has shown its /56s to be
        single customers; a /48, /32 or IPv4 /24 never does.
    same-few-blame-a-parent-once: after a block of a shorter prefix, those it was for do not bring it back alone,
        unless the company around it is bad too.
    floor-holds: nothing shorter than the floor is proposed for blocking.
    office-is-not-shut-out: no prefix from which somebody has logged in is blocked for submission.
    little-evidence-little-action: without bad evidence of its own nothing is proposed against a prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from edge.abi import Level, Service, Standing
from edge.core.belief import Belief
from edge.core.guard import Guard
from edge.core.model import Entry
from edge.core.prefix import LENGTHS, Prefix
from edge.core.reputation import Reputation, Touched
from edge.core.rules import PolicyParams, has_few_bad, is_block_worthy, may_block, needed_children, rotates
from edge.core.screen import can_matter

_SCREENED = 32
"""Candidates above which they are screened first: that costs 0.3 ms, and judging one some 30 us."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What a rule asks for; `standing` NEW asks to end the entry in force."""

    service: Service
    prefix: Prefix
    standing: Standing
    reason: str
    belief: Belief
    holes: tuple[tuple[Prefix, Standing], ...] = ()


@dataclass(slots=True)
class View:
    """What the rules look at: beliefs, entries in force, what binds them."""

    reputation: Reputation
    entry: Callable[[Service, Prefix], Entry | None]  # the learned entry at exactly this prefix
    over: Callable[[Service, Prefix], Entry | None]  # the longest learned entry of a shorter prefix
    blamed: Callable[[Service, Prefix], float]  # bad children of a prefix when it was last blocked, if not long ago
    guard: Guard
    now_s: float
    params: PolicyParams
    suppressed: dict[str, int] = field(default_factory=dict)

    def suppress(self, why: str, count: int = 1) -> None:
        """Count what a rule would have done."""
        self.suppressed[why] = self.suppressed.get(why, 0) + count


def propose(view: View, touched: Iterable[Touched]) -> list[Proposal]:
    """What this batch of evidence calls for, shortest prefixes first."""
    groups = sorted(touched, key=lambda group: (-group.level, group.service))
    proposals: list[Proposal] = []
    blocked: set[tuple[Service, Prefix]] = set()
    for group in groups:
        for prefix, bad_now in _candidates(view, group):
            if view.guard.allowed(group.service, prefix) or view.guard.blocked(group.service, prefix):
                continue
            if any((group.service, prefix.parent(n)) in blocked for n in LENGTHS if n < prefix.length):
                continue
            proposal = _judge(view, group.service, group.level, prefix, bad_now)
            if proposal is not None:
                proposals.append(proposal)
                if proposal.standing is Standing.BLOCK:
                    blocked.add((proposal.service, proposal.prefix))
    return proposals


def _candidates(view: View, group: Touched) -> list[tuple[Prefix, bool]]:
    """Prefixes worth a look, with whether bad evidence came in now: the worst first, no more than the most."""
    p, rows = view.params, view.reputation.tables[group.service, group.level].values(group.rows)
    bad, good = rows["bad"], rows["good"]
    ill = group.bad > 0
    if group.level is not Level.L64:
        worth = ill
    else:
        worth = (ill & (2 * bad >= bad + good)) | (good >= p.good_weight) | ((group.good > 0) & (bad >= 1))
    picks = np.flatnonzero(worth)
    order = np.lexsort((rows["lo"][picks], rows["hi"][picks], -bad[picks], ~ill[picks]))
    if len(order) > p.candidates:
        view.suppress("candidates", len(order) - p.candidates)
    picks = picks[order[: p.candidates]]
    rows, ill, length = rows.take(picks), ill[picks], LENGTHS[group.level]
    matter = np.ones(len(rows), bool)
    if len(rows) > _SCREENED:
        matter = can_matter(view.reputation, group.service, group.level, rows, view.now_s, p)
    found = []
    for hi, lo, bad_now, matters in zip(
        rows["hi"].tolist(), rows["lo"].tolist(), ill.tolist(), matter.tolist(), strict=True
    ):
        if matters or group.level is Level.L64:
            prefix = Prefix.of(hi, lo, length)
            if matters or view.entry(group.service, prefix) is not None:  # what is in force may have to end
                found.append((prefix, bad_now))
    return found


def _judge(view: View, service: Service, level: Level, prefix: Prefix, bad_now: bool) -> Proposal | None:
    own, over = view.entry(service, prefix), view.over(service, prefix)
    if own is None and over is not None and over.standing is Standing.BLOCK:
        return None  # refused already; what still comes in was on its way
    if level is Level.L128:
        return _judge_address(view, service, prefix)
    if level is Level.L64:
        proposal = _judge_unit(view, service, prefix, own, bad_now)
        pierces = over is not None and over.standing is Standing.BLOCK
        if proposal is not None and proposal.standing is Standing.NEW and pierces:
            return replace(proposal, standing=Standing.SUSPECT)  # a hole may narrow, or the block would fall shut on it
        return proposal
    return _judge_parent(view, service, level, prefix)


def _judge_unit(view: View, service: Service, prefix: Prefix, own: Entry | None, bad_now: bool) -> Proposal | None:
    """A /64, or an IPv4 address."""
    p = view.params
    standing = Standing.NEW if own is None else own.standing
    if (
        own is not None
        and standing is Standing.GOOD
        and not bad_now
        and (own.expires_s or 0.0) > view.now_s + p.renew_s
    ):
        return None  # the common case, and nothing to say
    belief = view.reputation.standing(service, prefix, view.now_s)
    if bad_now and is_block_worthy(belief, p.block_weight, p):
        if has_few_bad(prefix, belief, p):
            return None
        neighbours = [] if prefix.ipv4 else good_children(view, service, prefix, Level.L128)
        if not neighbours or rotates(belief, p):
            return _block(view, service, prefix, belief, _weight_reason(belief, prefix, p), neighbours)
        return None  # shared: its addresses are judged one by one
    if standing is Standing.BLOCK:
        return None
    if _is_shared(view, service, prefix, belief):
        # its addresses are judged one by one: a limit here would throttle the good neighbour too
        if standing in (Standing.SUSPECT, Standing.BAD):
            return _ask(service, prefix, Standing.NEW, belief, "shared", belief.bad_bound, p.suspect_bound)
        return None
    if bad_now and belief.bad_bound >= p.suspect_bound and belief.bad >= p.suspect_weight - 0.1:
        if standing is not Standing.BAD:
            return _ask(service, prefix, Standing.SUSPECT, belief, "suspect", belief.bad_bound, p.suspect_bound)
    elif belief.good >= p.good_weight and belief.good_bound >= p.good_bound:
        return _ask(service, prefix, Standing.GOOD, belief, "good", belief.good_bound, p.good_bound)
    elif standing in (Standing.SUSPECT, Standing.BAD) and belief.mean < p.release_bound:
        return _ask(service, prefix, Standing.NEW, belief, "released", belief.mean, p.release_bound)
    elif standing is Standing.GOOD and belief.good_bound < p.release_bound:
        return _ask(service, prefix, Standing.NEW, belief, "no longer good", belief.good_bound, p.release_bound)
    return None


def _is_shared(view: View, service: Service, prefix: Prefix, belief: Belief) -> bool:
    """Whether a /64 that looks bad holds somebody known to be good, and is not simply rotating its addresses."""
    if prefix.ipv4 or belief.bad_bound < view.params.suspect_bound or rotates(belief, view.params):
        return False
    return bool(good_children(view, service, prefix, Level.L128))


def _judge_address(view: View, service: Service, prefix: Prefix) -> Proposal | None:
    """One address: in a /64 where somebody else is good, or one of the few that make a /64 bad; else by its /64."""
    p, belief = view.params, view.reputation.standing(service, prefix, view.now_s)
    if not is_block_worthy(belief, p.address_weight, p):
        return None
    unit = prefix.parent(64)
    around = view.reputation.standing(service, unit, view.now_s)
    reason = _weight_reason(belief, prefix, p)
    if has_few_bad(unit, around, p) and is_block_worthy(around, p.block_weight, p):
        return _block(view, service, prefix, belief, reason + f", one of few bad in {unit}", [])
    if all(child == prefix for child, _ in good_children(view, service, unit, Level.L128)):
        return None
    return _block(view, service, prefix, belief, reason + ", shared /64", [])


def _judge_parent(view: View, service: Service, level: Level, prefix: Prefix) -> Proposal | None:
    """A prefix that holds units: by its distinct children."""
    p = view.params
    if level is Level.L32 and not p.allow_wide:
        return None
    belief = view.reputation.standing(service, prefix, view.now_s)
    bad, good = belief.bad_children, belief.good_children
    needed, company = needed_children(view.reputation, service, prefix, view.now_s, p)
    # half a child of slack: counts decay between the first child and the last
    if bad < needed - 0.5 and not (bad >= company - 0.5 and belief.prior_bound >= p.company_bound):
        return None
    share, weight = bad / (bad + good), belief.good / (belief.bad + belief.good)
    reason = (
        f"{bad:.0f} of {bad + good:.0f} children bad at {prefix}, bound {belief.bad_bound:.2f}, "
        f"good weight {100 * weight:.1f} %"
    )
    if share >= p.bad_share and weight <= p.good_share:
        if prefix.ipv4 and belief.bad < p.weight_ipv4:
            return None
        before = min(view.blamed(service, prefix), view.reputation.params.children_memory / 2)
        if before > 0 and bad < before + 0.5 and belief.prior_bound < p.company_bound:
            return None  # the same few again: they are judged one by one, or a newcomer beside them is never heard
        if prefix.ipv4 and prefix.length - 32 < p.floor_ipv4:
            view.suppress("floor")
            return None
        return _block(view, service, prefix, belief, reason, good_children(view, service, prefix, Level.L64))
    if share >= 0.5 and not prefix.ipv4 and view.entry(service, prefix) is None:
        return Proposal(
            service=service, prefix=prefix, standing=Standing.SUSPECT, reason="mixed: " + reason, belief=belief
        )
    return None


def _block(
    view: View,
    service: Service,
    prefix: Prefix,
    belief: Belief,
    reason: str,
    neighbours: list[tuple[Prefix, Standing]],
) -> Proposal | None:
    """Ask for a block with its holes, unless something fixed or too many good children forbid it.

    Where the service does not allow one, a unit is suspect instead; what is in force against it already stays.
    """
    if not may_block(service, belief, view.now_s, view.params):
        own = view.entry(service, prefix)
        if prefix.length < 64 or (own is not None and own.standing in (Standing.BLOCK, Standing.BAD)):
            return None
        return Proposal(service=service, prefix=prefix, standing=Standing.SUSPECT, reason=reason, belief=belief)
    if view.guard.protects(service, prefix):
        view.suppress("protected")
        return None
    if len(neighbours) > view.params.holes:
        view.suppress("holes")
        return None
    return Proposal(
        service=service,
        prefix=prefix,
        standing=Standing.BLOCK,
        reason=reason,
        belief=belief,
        holes=tuple(neighbours),
    )


def good_children(view: View, service: Service, prefix: Prefix, level: Level) -> list[tuple[Prefix, Standing]]:
    """Children that somebody vouches for more than they misbehave, with the standing their hole would have."""
    p, found = view.params, []
    for child, bad, good in view.reputation.children(service, prefix, level, view.now_s):
        if good >= view.reputation.params.known_good_weight and good > bad:
            belief = view.reputation.standing(service, child, view.now_s)
            strong = good >= p.good_weight and belief.good_bound >= p.good_bound
            found.append((child, Standing.GOOD if strong else Standing.SUSPECT))
    return found


def _weight_reason(belief: Belief, prefix: Prefix, p: PolicyParams) -> str:
    sign = f" >= {p.block_bound:.2f}" if belief.bad_bound >= p.block_bound else ""
    company = ""
    if belief.prior_bound >= p.company_bound:
        company = f", {100 * belief.prior_mean:.0f} % bad around it in {belief.prior_from}"
    return (
        f"{belief.bad:.1f} of {belief.bad + belief.good:.1f} weight bad at {prefix}, "
        f"bound {belief.bad_bound:.2f}{sign}{company}"
    )


def _ask(
    service: Service, prefix: Prefix, standing: Standing, belief: Belief, word: str, found: float, threshold: float
) -> Proposal:
    sign = ">=" if found >= threshold else "<"
    reason = (
        f"{word}: {belief.bad:.1f} bad and {belief.good:.1f} good at {prefix}, bound {found:.2f} {sign} {threshold:.2f}"
    )
    return Proposal(service=service, prefix=prefix, standing=standing, reason=reason, belief=belief)
