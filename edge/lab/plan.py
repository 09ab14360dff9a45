"""Who sends what in the lab: one table of senders and one of campaigns, as data.

The rates are chosen so that the share of abuse that reaches the MTA can be read as a reaction time. Nothing is known
of a campaign when it begins, so it gets through until its evidence is complete (about ten refusals, or about ten bad
/64s of a /48) and the next tick has installed the block: two to three seconds in all. Each campaign therefore begins
with a few seconds of probing, as real ones do, and then opens up. What passes is probing rate times reaction time;
the many attempts that follow meet the block.

All sources lie in documentation space (RFC 3849, RFC 5737), because private addresses are exempt from limits.

Invariants:
    honest-and-hostile-are-disjoint: no campaign uses an address of an honest sender.
    plan-is-repeatable: the same seed gives the same sources in the same order.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

DOMAIN = "mx.lab.example"
"""The domain the lab's MTA receives mail for (RFC 2606)."""

USERS = ("alice", "bob", "carol", "dave", "erin", "frank", "grace")
"""The only recipients that exist; everybody else is answered 550 5.1.1."""

LISTED_DOMAIN = "spam.example"
"""The sender domain that the MTA's access table rejects (554 5.7.1)."""

SPAM_HEADER = "X-Spam-Flag: YES"
"""The header that the MTA's content check rejects (550 5.7.1)."""

DEFAULT_SECONDS = 45
"""Length of the sending phase; with set-up and the last retries the whole run stays under a minute."""

MIN_SECONDS = 20
"""Shorter runs leave the campaigns no time after their blocks, so that the shares in the table say nothing."""

MAX_SECONDS = 600
"""Learned blocks live for minutes by default; a longer run would show them expire and return instead."""

Address = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Sender:
    """An honest mail server: every `interval_s` seconds it has `burst` messages to deliver, each in a connection."""

    name: str
    address: str
    interval_s: float
    burst: int = 1


SENDERS = (
    Sender(name="university", address="2001:db8:1001:10::25", interval_s=1.7),
    Sender(name="newsletter", address="2001:db8:1002:20::25", interval_s=2.9, burst=7),
    Sender(name="bank", address="2001:db8:1003:30::25", interval_s=2.3),
    Sender(name="hospital", address="2001:db8:1004:40::25", interval_s=3.1, burst=2),
    Sender(name="city", address="2001:db8:1005:50::25", interval_s=3.7),
    Sender(name="shop", address="2001:db8:1006:60::25", interval_s=4.3, burst=11),
    Sender(name="forum", address="2001:db8:1007:70::25", interval_s=2.9, burst=3),
    Sender(name="school", address="2001:db8:1008:80::25", interval_s=4.1),
    Sender(name="small-isp", address="2001:db8:1009:90::25", interval_s=1.9, burst=3),
    Sender(name="club", address="2001:db8:100a:a0::25", interval_s=5.3),
    Sender(name="forged-one", address="2001:db8:f0f0:7::25", interval_s=2.3),
    Sender(name="hoster-tenant", address="2001:db8:4057:1::a11:ce", interval_s=1.3),
    Sender(name="newspaper-v4", address="192.0.2.25", interval_s=2.3, burst=2),
    Sender(name="museum-v4", address="203.0.113.25", interval_s=3.1),
)
"""Fourteen prefixes, three of them busy. `hoster-tenant` shares its /64 with a spammer; `forged-one` is the sender in
whose name SYNs are forged."""


class Sources(enum.Enum):
    """How a campaign chooses its next source inside its prefix."""

    ONE = "one address"
    NEW_ADDRESS = "a new address of one /64 for each connection"
    NEW_64 = "one or two connections from each /64"


class Style(enum.Enum):
    """What a campaign tries to deliver; the MTA's own rules refuse all of it."""

    DICTIONARY = "unknown users"
    SPAM = "unknown users, a listed sender domain and marked content"
    GUESSING = "passwords where the server offers AUTH, else unknown users"


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """One attacker: from `start_s` on `probe_rate` connections a second for `probe_s`, then `rate` a second."""

    name: str
    prefix: str  # an address for Sources.ONE
    sources: Sources
    style: Style
    start_s: float
    probe_rate: float
    probe_s: float
    rate: float

    def due(self, elapsed_s: float) -> int:
        """Attempts that should have begun `elapsed_s` seconds into the run."""
        active = elapsed_s - self.start_s
        if active < 0:
            return 0
        probing = min(active, self.probe_s) * self.probe_rate
        return 1 + int(probing + max(0.0, active - self.probe_s) * self.rate)

    def addresses(self, seed: int) -> Iterator[str]:
        """The source of each attempt, without end; the same for the same seed."""
        if self.sources is Sources.ONE:
            while True:
                yield self.prefix
        rng = random.Random(f"{seed}/{self.name}")  # noqa: S311 - a schedule that can be repeated, not a secret
        base = int(ip_address(self.prefix.partition("/")[0]))
        if self.sources is Sources.NEW_ADDRESS:
            while True:
                yield str(IPv6Address(base | rng.getrandbits(64)))
        order = list(range(1 << 16))
        rng.shuffle(order)
        while True:
            for number in order:
                for _ in range(rng.choice((1, 2))):
                    yield str(IPv6Address(base | number << 64 | rng.getrandbits(64)))


CAMPAIGNS = (
    Campaign(
        name="flood",
        prefix="2001:db8:bad:f100::/64",
        sources=Sources.NEW_ADDRESS,
        style=Style.DICTIONARY,
        start_s=4.0,
        probe_rate=15,
        probe_s=4.0,
        rate=200,
    ),
    Campaign(
        name="snowshoe",
        prefix="2001:db8:5e0e::/48",
        sources=Sources.NEW_64,
        style=Style.SPAM,
        start_s=6.0,
        probe_rate=15,
        probe_s=4.0,
        rate=60,
    ),
    Campaign(
        name="hoster-spammer",
        prefix="2001:db8:4057:1::bad",
        sources=Sources.ONE,
        style=Style.SPAM,
        start_s=12.0,
        probe_rate=10,
        probe_s=4.0,
        rate=30,
    ),
    Campaign(
        name="v4-bot",
        prefix="198.51.100.66",
        sources=Sources.ONE,
        style=Style.GUESSING,
        start_s=8.0,
        probe_rate=10,
        probe_s=4.0,
        rate=30,
    ),
)
"""Four attackers. The probing rates give ten refusals within a second; the blocks fall while they still probe. The
spammer of the shared /64 comes last, when its neighbour has delivered some mail: before that nobody can know that the
/64 is shared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgery:
    """SYNs in an honest sender's name, from random addresses of its /64, never completed."""

    victim: str
    start_s: float
    rate: float


FORGERY = Forgery(victim="forged-one", start_s=10.0, rate=23)
"""More than the default limit of a /64 admits for long (10 a second), so that forging alone would fill it."""


def victim() -> Sender:
    """The honest sender in whose name SYNs are forged."""
    return next(sender for sender in SENDERS if sender.name == FORGERY.victim)
