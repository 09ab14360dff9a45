"""Which /64s are being forged: their limit is spent, and hardly any of what it admits becomes a connection.

A forger writes somebody's network into its SYNs and never sees the answers. It scores nothing, but it spends the budget
of the network it names. While that goes on, the senders of the network that are known to be good get a budget of their
own, an entry at /128 that cuts the chain, so that they are not asked for what somebody else spent. A forger of just
their addresses spends that budget too: only a challenge tells it from them.

Invariants:
    forgery-scores-nothing: no belief changes because of it.
    bounded: no more /64s are followed than are reported saturated in one tick.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np

from edge.abi import Level, Service, Standing
from edge.core.policy import Proposal, View, good_children
from edge.core.prefix import Prefix


class ForgeryParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When the SYNs of a /64 count as forged."""

    completed_share: Annotated[
        float,
        msgspec.Meta(
            gt=0,
            lt=1,
            description="Completed handshakes as a share of what the spent limit admits, below which the SYNs are "
            "taken for forged. A client's own floods complete nearly all; packet loss leaves more than half.",
        ),
    ] = 0.5
    ticks: Annotated[
        int,
        msgspec.Meta(
            ge=1, le=3600, description="Ticks in a row; three keep a burst of slow handshakes from being taken for it."
        ),
    ] = 3
    senders: Annotated[
        int, msgspec.Meta(ge=1, le=4096, description="Good senders of one forged /64 that get a budget, best first.")
    ] = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Saturated:
    """A /64 (an IPv4 address) whose limit is spent, and how many connections a second it still admits."""

    service: Service
    prefix: Prefix
    admits_per_s: float


class Forgery:
    """Follows saturated prefixes from tick to tick."""

    def __init__(self) -> None:
        self._ticks: dict[tuple[Service, Prefix], int] = {}

    def observe(
        self, saturated: Iterable[Saturated], handshakes: np.ndarray, seconds: float, params: ForgeryParams
    ) -> list[tuple[Service, Prefix]]:
        """The prefixes that are being forged now; `handshakes` (HANDSHAKE rows) completed in the last `seconds`."""
        completed = {(int(row["service"]), int(row["hi"])): int(row["completed"]) for row in handshakes}
        followed: dict[tuple[Service, Prefix], int] = {}
        for one in saturated:
            done = completed.get((one.service, one.prefix.hi), 0)
            if seconds > 0 and done < params.completed_share * one.admits_per_s * seconds:
                key = one.service, one.prefix
                followed[key] = self._ticks.get(key, 0) + 1
        self._ticks = followed
        return [key for key, ticks in followed.items() if ticks >= params.ticks]


def own_budgets(view: View, forged: Iterable[tuple[Service, Prefix]], params: ForgeryParams) -> list[Proposal]:
    """An own budget for each known good sender of the forged /64s. IPv4 addresses are senders themselves."""
    proposals = []
    for service, prefix in forged:
        over = view.entry(service, prefix) or view.over(service, prefix)
        if prefix.ipv4 or view.guard.blocked(service, prefix) or (over and over.standing is Standing.BLOCK):
            continue
        for sender, _ in good_children(view, service, prefix, Level.L128)[: params.senders]:
            proposals.append(
                Proposal(
                    service=service,
                    prefix=sender,
                    standing=Standing.GOOD,
                    reason=f"own budget: SYNs in the name of {prefix} are mostly forged",
                    belief=view.reputation.standing(service, sender, view.now_s),
                )
            )
    return proposals
