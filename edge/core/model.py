"""The values that flow through the core: evidence in, entries and decisions out.

Evidence comes as `Event`s from the adapters and goes through the core as columns (`EVENT` rows); what the core
wants refused or favoured leaves as `Entry`s, each made by a `Decision` that says why.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from edge.abi import Origin, Service, Standing
from edge.core.prefix import Prefix


class Verdict(enum.IntEnum):
    """What the MTA said of one connection or message; the words of the evidence format, in lower case."""

    NONE = 0  # a connection without a verdict: nothing was tried, or nothing is known
    HAM = 1
    SPAM = 2
    UNKNOWN_USER = 3
    AUTH_FAIL = 4
    POLICY_REJECT = 5


class Authentication(enum.IntEnum):
    """The result of a DKIM or SPF check."""

    NONE = 0
    PASS = 1
    SOFTFAIL = 2  # SPF only
    FAIL = 3


EVENT = np.dtype(
    [
        ("ts_s", "<f8"),  # seconds, the clock of whoever calls the core
        ("hi", "<u8"),  # the source as keyed (edge.core.prefix)
        ("lo", "<u8"),
        ("domain", "<u8"),  # hash of the DKIM domain, 0 = none
        ("rcpt_ok", "<u2"),
        ("rcpt_bad", "<u2"),
        ("service", "u1"),  # abi.Service
        ("verdict", "u1"),  # Verdict
        ("dkim", "u1"),  # Authentication
        ("spf", "u1"),
        ("handshake", "u1"),  # 0: a SYN that was never completed; scores nothing
        ("authenticated", "u1"),  # 1: the client logged in (SASL); opens its /64 for submission
    ]
)
"""One row of evidence; a batch is a one-dimensional array of these, in order of time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One piece of evidence from an adapter: who, when, what.

    `hi`, `lo` are the keyed source, `ts_s` is wall time in seconds for a log line and is replaced by the arrival
    time for a live one.
    """

    ts_s: float
    hi: int
    lo: int
    service: Service
    verdict: Verdict = Verdict.NONE
    handshake: bool = True
    authenticated: bool = False
    rcpt_ok: int = 0
    rcpt_bad: int = 0
    dkim: Authentication = Authentication.NONE
    dkim_domain: int = 0
    spf: Authentication = Authentication.NONE


def batch(events: Iterable[Event]) -> np.ndarray:
    """Events as columns: array of EVENT rows; counts above 65535 saturate."""
    rows = [
        (
            e.ts_s,
            e.hi,
            e.lo,
            e.dkim_domain,
            min(e.rcpt_ok, 0xFFFF),
            min(e.rcpt_bad, 0xFFFF),
            e.service,
            e.verdict,
            e.dkim,
            e.spf,
            e.handshake,
            e.authenticated,
        )
        for e in events
    ]
    return np.array(rows, dtype=EVENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What is to be installed for one prefix and service, in the policy maps and the nftables sets.

    `expires_s` is on the clock the core was given (monotonic in the daemon); None never expires.
    `decision` is the id of the decision or operator command behind it, for the journal and `edge explain`.
    """

    prefix: Prefix
    service: Service
    standing: Standing
    origin: Origin
    expires_s: float | None
    reason: str
    decision: int = 0

    @property
    def key(self) -> tuple[Service, Prefix]:
        """One entry at most is in force for this pair."""
        return self.service, self.prefix


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One change of mind, as the journal keeps it: an entry opened or closed, with its evidence.

    `action` is "open", "renew" or "close". `bad` and `good` are decayed weights at the prefix, `bound` the confidence
    bound that was compared, `children` the distinct bad children behind an escalation.
    """

    id: int
    at_s: float
    action: str
    entry: Entry
    bad: float = 0.0
    good: float = 0.0
    bound: float = 0.0
    children: int = 0
