"""What one piece of evidence weighs, for and against the prefix it came from.

A bad verdict weighs by its kind, refused recipients by their share of all. A good one weighs by who vouches for it: SPF
and DKIM can be bought with a domain, so a domain lends its name only as far as its own record goes, and less when it is
seen all over the address space.

Invariants:
    forged-syn-scores-nothing: an event without a handshake weighs nothing, whatever else it says.
    no-verdict-scores-nothing: neither does one without a verdict and without a login.
    domains-are-bounded: the table of domains never grows past its parameter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.abi import Service
from edge.core.model import Authentication, Verdict

Floats = NDArray[np.float64]
Weight = Annotated[float, msgspec.Meta(ge=0.0, le=100.0)]


class ScoringParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights of evidence; 1 is one ordinary message."""

    spam: Annotated[
        float, msgspec.Meta(ge=0, le=10, description="bad weight of mail judged to be spam; one message, one unit")
    ] = 1.0
    unknown_user: Annotated[
        float, msgspec.Meta(ge=0, le=10, description="bad weight of a delivery to unknown recipients only; as spam")
    ] = 1.0
    auth_fail: Annotated[
        float,
        msgspec.Meta(
            ge=0, le=10, description="bad weight of a failed login; not more than spam: people mistype passwords"
        ),
    ] = 1.0
    policy_reject: Annotated[
        float,
        msgspec.Meta(
            ge=0,
            le=10,
            description="bad weight of a refusal by policy (block list, protocol abuse); above spam, because it does "
            "not rest on content",
        ),
    ] = 1.5
    ham: Annotated[
        float,
        msgspec.Meta(
            ge=0,
            le=10,
            description="good weight of accepted mail that nobody vouches for; little, because filters miss about "
            "one spam in ten",
        ),
    ] = 0.1
    ham_spf: Annotated[
        float, msgspec.Meta(ge=0, le=10, description="added to it when SPF passes; cheap to have, so little")
    ] = 0.2
    ham_dkim: Annotated[
        float, msgspec.Meta(ge=0, le=10, description="added to it when DKIM passes and the domain has a good record")
    ] = 0.7
    login: Annotated[
        float,
        msgspec.Meta(
            ge=0, le=100, description="good weight of a login, for submission only; one is enough for the good class"
        ),
    ] = 5.0
    ham_submission: Annotated[
        float,
        msgspec.Meta(
            ge=0, le=10, description="good weight of mail accepted on the submission ports: it needed a login"
        ),
    ] = 1.0
    domain_floor: Annotated[
        float, msgspec.Meta(ge=0, le=1, description="share of the DKIM weight that a domain without record lends")
    ] = 0.2
    domain_doubt: Annotated[
        float, msgspec.Meta(gt=0, le=100, description="good messages after which a domain lends half of the rest")
    ] = 2.0
    domain_bad_factor: Annotated[
        float, msgspec.Meta(ge=0, le=100, description="good messages that one bad message of the domain outweighs")
    ] = 3.0
    domain_spread: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            le=64,
            description="unrelated networks (IPv6 /32, IPv4 /16) a domain may send from before it lends less; large "
            "senders use a handful",
        ),
    ] = 8
    domain_half_life_s: Annotated[
        float, msgspec.Meta(gt=0, le=1e8, description="half-life of a domain's record, seconds; as that of a /48")
    ] = 14 * 86400.0
    domains: Annotated[
        int, msgspec.Meta(ge=16, le=1 << 22, description="domains remembered; the least known are forgotten first")
    ] = 65536


@dataclass(slots=True)
class Domain:
    """The record of one DKIM domain; weights as of `at_s`."""

    good: float = 0.0
    bad: float = 0.0
    at_s: float = 0.0
    first_s: float = 0.0
    networks: set[int] = field(default_factory=set)  # bounded by domain_spread * 2


class Domains:
    """Records of the DKIM domains that were seen, by hash."""

    def __init__(self, params: ScoringParams) -> None:
        self._params = params
        self._known: dict[int, Domain] = {}

    def __len__(self) -> int:
        return len(self._known)

    def lends(self, domain: int, now_s: float) -> float:
        """The share of the DKIM weight (0..1) this domain lends now."""
        p, record = self._params, self._known.get(domain)
        if record is None:
            return p.domain_floor
        fade = float(2.0 ** (-max(0.0, now_s - record.at_s) / p.domain_half_life_s))
        good, bad = record.good * fade, record.bad * fade
        proven = good / (good + p.domain_bad_factor * bad + p.domain_doubt)
        spread = min(1.0, p.domain_spread / max(1, len(record.networks)))
        return p.domain_floor + (1.0 - p.domain_floor) * proven * spread

    def learn(self, domain: int, network: int, good: float, bad: float, now_s: float) -> None:
        """Add what was seen of a domain, in messages, from one network (upper 32 or 48 bits of the key)."""
        p, record = self._params, self._known.get(domain)
        if record is None:
            if len(self._known) >= p.domains:
                self._forget()
            record = self._known[domain] = Domain(at_s=now_s, first_s=now_s)
        fade = 2.0 ** (-max(0.0, now_s - record.at_s) / p.domain_half_life_s)
        record.good, record.bad = record.good * fade + good, record.bad * fade + bad
        record.at_s = max(now_s, record.at_s)
        if len(record.networks) < 2 * p.domain_spread:
            record.networks.add(network)

    def _forget(self) -> None:
        """Drop the sixteenth with the thinnest record, so that the cost of choosing is paid rarely."""
        thinnest = sorted(self._known, key=lambda d: (self._known[d].good + self._known[d].bad, self._known[d].first_s))
        for domain in thinnest[: max(1, len(thinnest) // 16)]:
            del self._known[domain]


def score(events: np.ndarray, domains: Domains, now_s: float, p: ScoringParams) -> tuple[Floats, Floats]:
    """Bad and good weight of each event, and teach the domains.

    A domain lends what it had earned before this batch: a burst cannot vouch for itself.
    """
    verdict, shaken = events["verdict"], events["handshake"] == 1
    table = np.zeros(256)
    table[Verdict.SPAM], table[Verdict.UNKNOWN_USER] = p.spam, p.unknown_user
    table[Verdict.AUTH_FAIL], table[Verdict.POLICY_REJECT] = p.auth_fail, p.policy_reject
    refused = shaken & (table[verdict] > 0)
    table[Verdict.HAM] = p.unknown_user  # of accepted mail only its refused recipients count against it
    bad = np.where(shaken, table[verdict] * _refused_share(events), 0.0)

    submission = events["service"] == Service.SUBMISSION
    ham = shaken & (verdict == Verdict.HAM)
    signed = (events["dkim"] == Authentication.PASS) & (events["domain"] != 0) & shaken
    good = np.where(ham, p.ham + p.ham_spf * (events["spf"] == Authentication.PASS), 0.0)
    good[ham & submission] = p.ham_submission
    good[shaken & submission & (events["authenticated"] == 1) & ~refused] = p.login
    if signed.any():
        good[ham & signed & ~submission] += p.ham_dkim * _lent(events, ham & signed & ~submission, domains, now_s)
        _teach(events, signed, ham, np.minimum(bad, 1.0), domains, now_s)
    return bad, good


def _refused_share(events: np.ndarray) -> Floats:
    """The part of an event's bad weight that its recipients leave.

    A mailing list's message to forty has some that are gone; a harvester's has hardly anything else. Spam is spam for
    whomever it was, and a bad verdict that counts no recipients is taken as it is.
    """
    ok, bad = events["rcpt_ok"].astype(np.float64), events["rcpt_bad"].astype(np.float64)
    share: Floats = bad / np.maximum(ok + bad, 1.0)
    at_rcpt = (events["verdict"] == Verdict.UNKNOWN_USER) | (events["verdict"] == Verdict.POLICY_REJECT)
    return np.where((at_rcpt & (bad > 0)) | (events["verdict"] == Verdict.HAM), share, 1.0)


def _lent(events: np.ndarray, rows: NDArray[np.bool_], domains: Domains, now_s: float) -> Floats:
    """What the domain of each of these rows lends."""
    names, which = np.unique(events["domain"][rows], return_inverse=True)
    shares = np.array([domains.lends(int(name), now_s) for name in names], dtype=np.float64)
    return shares[which] if len(names) else np.empty(0)


def _teach(
    events: np.ndarray,
    signed: NDArray[np.bool_],
    ham: NDArray[np.bool_],
    bad: Floats,
    domains: Domains,
    now_s: float,
) -> None:
    """Add the batch to the domains' records, one call for each pair of domain and network."""
    rows = events[signed]
    ipv4 = rows["hi"] >> np.uint64(32) == 0xFFFF
    pairs = np.empty(len(rows), [("domain", "<u8"), ("network", "<u8")])
    pairs["domain"] = rows["domain"]
    pairs["network"] = np.where(ipv4, rows["hi"] >> np.uint64(16), rows["hi"] >> np.uint64(32))
    unique, which = np.unique(pairs, return_inverse=True)
    goods = np.bincount(which, weights=ham[signed], minlength=len(unique))
    bads = np.bincount(which, weights=bad[signed], minlength=len(unique))
    for pair, good, ill in zip(unique.tolist(), goods.tolist(), bads.tolist(), strict=True):
        if good or ill:
            domains.learn(pair[0], pair[1], good, ill, now_s)
