"""The thresholds, and the small questions they answer. What is done with the answers is in policy.py."""

from __future__ import annotations

from typing import Annotated

import msgspec

from edge.abi import Service
from edge.core.belief import Belief
from edge.core.prefix import Prefix
from edge.core.reputation import Reputation


class PolicyParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Thresholds of the rules."""

    suspect_bound: Annotated[
        float,
        msgspec.Meta(gt=0, lt=1, description="a prefix that is bad with confidence at least this gets a small budget"),
    ] = 0.6
    block_bound: Annotated[
        float, msgspec.Meta(gt=0, lt=1, description="bad with confidence at least this: blocked for a while")
    ] = 0.8
    company_bound: Annotated[
        float,
        msgspec.Meta(
            gt=0,
            lt=1,
            description="where the other children around a prefix are bad with confidence at least this, its first bad "
            "message is enough: few honest newcomers start with one",
        ),
    ] = 0.8
    suspect_weight: Annotated[
        float, msgspec.Meta(gt=0, le=1000, description="bad weight before a prefix is suspect; five straight bad")
    ] = 5.0
    block_weight: Annotated[
        float,
        msgspec.Meta(
            gt=0,
            le=1000,
            description="bad weight before a /64 or IPv4 /32 is blocked, where its company says nothing; rspamd scores "
            "nothing below 10 messages, karma nothing below 5",
        ),
    ] = 8.0
    address_weight: Annotated[
        float, msgspec.Meta(gt=0, le=1000, description="the same for one address of a shared /64; karma's 5")
    ] = 5.0
    good_bound: Annotated[
        float, msgspec.Meta(gt=0, lt=1, description="good with confidence at least this: the good class")
    ] = 0.75
    good_weight: Annotated[
        float, msgspec.Meta(gt=0, le=1000, description="good weight before the good class; five vouched-for messages")
    ] = 5.0
    renew_s: Annotated[
        float,
        msgspec.Meta(gt=0, le=86400, description="the good class is renewed when less than this is left, seconds"),
    ] = 3600.0
    release_bound: Annotated[
        float,
        msgspec.Meta(
            gt=0,
            lt=1,
            description="an entry against a prefix ends early when its expected badness falls below this, one for it "
            "when its goodness bound does; well below the entry thresholds, so that nothing flaps",
        ),
    ] = 0.5
    addresses_64: Annotated[
        int,
        msgspec.Meta(
            ge=2,
            le=64,
            description="distinct bad addresses that blame a /64 in which nobody is known to be good; fewer are "
            "blocked one by one, since a hoster's customers may share it",
        ),
    ] = 3
    children_56: Annotated[
        int,
        msgspec.Meta(
            ge=2,
            le=256,
            description="distinct bad /64s that blame a /56, twice as many where a good one is known: worst real /48s "
            "hold 5 to 18",
        ),
    ] = 4
    children_48: Annotated[int, msgspec.Meta(ge=2, le=256, description="distinct bad /56s that blame a /48")] = 8
    children_32: Annotated[
        int, msgspec.Meta(ge=2, le=65536, description="distinct bad /48s that blame a /32, where that is allowed")
    ] = 16
    children_ipv4: Annotated[
        int, msgspec.Meta(ge=2, le=256, description="distinct bad addresses that blame an IPv4 /24, /24s a /16")
    ] = 8
    weight_ipv4: Annotated[
        float,
        msgspec.Meta(
            ge=0,
            le=50,
            description="bad weight before an IPv4 /24 is blamed: nearly two messages of each address, because one "
            "mistake of each of eight neighbours is no attack",
        ),
    ] = 15.0
    attack_hourly: Annotated[
        float,
        msgspec.Meta(
            gt=0,
            le=1e6,
            description="bad weight an hour on the submission ports from which on it is an attack and may be blocked. "
            "Below it is only limited: a phone with an old password tries once a minute",
        ),
    ] = 120.0
    login_memory_s: Annotated[
        float,
        msgspec.Meta(
            ge=3600,
            le=1e8,
            description="no prefix is blocked on the submission ports this long after a login from it, seconds: 90 "
            "days outlast the holidays of an office",
        ),
    ] = 90 * 86400.0
    children_in_company: Annotated[
        int,
        msgspec.Meta(
            ge=2, le=256, description="distinct bad children that are enough where the company says the rest (IPv6)"
        ),
    ] = 2
    rotation_children: Annotated[
        int, msgspec.Meta(ge=2, le=64, description="bad addresses of a shared /64 from which on it is taken to rotate")
    ] = 8
    bad_share: Annotated[
        float, msgspec.Meta(gt=0.5, le=1, description="share of observed children that must be bad to blame a parent")
    ] = 0.8
    good_share: Annotated[
        float, msgspec.Meta(ge=0, lt=0.5, description="most good weight, as a share, in a prefix that is blamed")
    ] = 0.1
    customer_agree: Annotated[
        int,
        msgspec.Meta(
            ge=4,
            le=1000,
            description="/56s of a network whose /64s were all bad, from which on one bad /64 stands for its /56 there",
        ),
    ] = 12
    customer_differ: Annotated[
        float, msgspec.Meta(ge=0, lt=0.5, description="most /56s of that network, as a share, that were of two minds")
    ] = 0.05
    allow_wide: Annotated[
        bool, msgspec.Meta(description="may block an IPv6 /32: usually a whole provider, so not by default")
    ] = False
    floor_ipv4: Annotated[
        int, msgspec.Meta(ge=16, le=32, description="shortest IPv4 prefix that is blocked automatically")
    ] = 24
    holes: Annotated[
        int, msgspec.Meta(ge=0, le=4096, description="most good children a block may go around; with more, no block")
    ] = 64
    candidates: Annotated[
        int, msgspec.Meta(ge=16, le=1 << 20, description="prefixes judged a tick, level and service; the worst first")
    ] = 2048


def is_block_worthy(belief: Belief, weight: float, p: PolicyParams) -> bool:
    """Bad by its own record; or, in bad company, by one message that nothing good of its own speaks against.

    The slack of a tenth is what evidence loses between the first message and the last.
    """
    if belief.bad < p.bad_share * (belief.bad + belief.good):
        return False
    alone = belief.bad_bound >= p.block_bound and belief.bad >= weight - 0.1
    return alone or (belief.bad >= 0.9 and belief.prior_bound >= p.company_bound)


def may_block(service: Service, belief: Belief, now_s: float, p: PolicyParams) -> bool:
    """Whether a prefix may be blocked for this service at all.

    On the submission ports behind one address may be an office, and refusing it hurts the operator's own users. So
    only an attack is blocked there: failures at the rate of one, and no login from the prefix as far as is known.
    """
    if service is not Service.SUBMISSION:
        return True
    known = belief.last_good_s is not None and now_s - belief.last_good_s <= p.login_memory_s
    return not known and belief.hourly >= p.attack_hourly


def has_few_bad(prefix: Prefix, belief: Belief, p: PolicyParams) -> bool:
    """Whether the bad addresses of a /64 are so few that they are blocked rather than the /64.

    None at all means that they are not kept: then the /64 has to answer for them.
    """
    return not prefix.ipv4 and 0.5 <= belief.bad_children < p.addresses_64 - 0.5


def rotates(belief: Belief, p: PolicyParams) -> bool:
    """Whether the bad addresses of a /64 are so many and so alone that blocking them one by one is pointless."""
    bad, good = belief.bad_children, belief.good_children
    return bad >= p.rotation_children - 0.5 and bad >= p.bad_share * (bad + good)


def needed_children(
    reputation: Reputation, service: Service, prefix: Prefix, now_s: float, p: PolicyParams
) -> tuple[int, int]:
    """Distinct bad children that blame a prefix: anywhere, and in bad company.

    A known good /64 shows a /56 to be of two minds: then its /64s are rather judged one by one.
    """
    if prefix.ipv4:
        return p.children_ipv4, p.children_ipv4
    needed = {56: p.children_56, 48: p.children_48}.get(prefix.length, p.children_32)
    if prefix.length == 56 and reputation.weights(service, prefix, now_s, "good_children")[0] >= 0.5:
        return 2 * needed, 2 * needed
    if prefix.length == 56 and is_customer_56(reputation, service, prefix, now_s, p):
        return needed, 1
    return needed, p.children_in_company


def is_customer_56(reputation: Reputation, service: Service, prefix: Prefix, now_s: float, p: PolicyParams) -> bool:
    """Whether the network around a /56 has shown that its /56s stand or fall together."""
    agree, differ = reputation.weights(service, prefix.parent(32), now_s, "agree", "differ")
    return agree >= p.customer_agree and differ <= p.customer_differ * (agree + differ)
