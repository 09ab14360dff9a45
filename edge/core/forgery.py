"""Which prefixes are being forged: their limit is spent, and hardly any of what it admits becomes a connection.

A forger writes somebody's network into its SYNs and never sees the answers. It scores nothing, but it spends the budget
of the network it names. While that goes on the kernel charges those of its senders who completed a handshake before to
a budget of their own (bpf/edge_xdp.c, spare_verified), so that they are not refused for what somebody else spent. A
forger of just their addresses spends that budget too: only a challenge tells it from them.

A forger of everybody's addresses at once spends nobody's limit. That is no trouble of anyone's budget but of the
host's: where the challenge is wanted, everybody but verified senders is then asked before the kernel's TCP is.

While a prefix is forged the handshakes of verified senders say nothing of what the first budget admits, so that only
those count that newcomers complete.

Invariants:
    forgery-scores-nothing: no belief changes because of it.
    bounded: no more prefixes are followed than are reported saturated within `hold_s`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np

from edge.abi import Level, Reason, Service
from edge.core.prefix import Prefix
from edge.core.snapshot import handshakes


class ForgeryParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When the SYNs of a prefix count as forged."""

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
    flood_per_s: Annotated[
        float,
        msgspec.Meta(
            gt=0,
            description="SYNs a second, admitted or challenged, from which the whole host counts as flooded when "
            "hardly any becomes a connection. Below that the kernel's own SYN cookies cost little.",
        ),
    ] = 20_000.0
    hold_s: Annotated[
        float,
        msgspec.Meta(
            gt=0,
            le=3600,
            description="Seconds for which a prefix stays marked after the last tick in which it looked forged. Longer "
            "than the ticks it takes to notice, or a steady forger would get a free turn again and again.",
        ),
    ] = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Saturated:
    """A prefix at a level whose limit is spent, and how many connections a second it still admits."""

    service: Service
    prefix: Prefix
    admits_per_s: float


Key = tuple[Service, Prefix]

LEAST_ADMITTED = 8.0
"""Connections that a limit must have admitted before their share means anything: a slow one admits none in most
ticks."""


class Forgery:
    """Follows saturated prefixes from tick to tick."""

    def __init__(self) -> None:
        self._followed: dict[Key, tuple[int, float, int]] = {}  # ticks, connections admitted, completed
        self._until_s: dict[Key, float] = {}
        self._flood_ticks, self._flood_until_s = 0, 0.0

    def adopt(self, until_s: Mapping[Key, float]) -> None:
        """Go on with what an earlier daemon had marked."""
        self._until_s = dict(until_s)

    def observe(
        self,
        saturated: Iterable[Saturated],
        connections: np.ndarray,
        seconds: float,
        now_s: float,
        params: ForgeryParams,
    ) -> dict[Key, float]:
        """The prefixes that count as forged now, and until when; `connections` (CONNECTIONS rows) came in the last
        `seconds`."""
        followed: dict[Key, tuple[int, float, int]] = {}
        done = _Done(connections)
        kept = {key: until for key, until in self._until_s.items() if until > now_s}
        for one in saturated:
            key = one.service, one.prefix
            if seconds <= 0:
                continue
            ticks, admitted, completed = self._followed.get(key, (0, 0.0, 0))
            ticks, admitted = ticks + 1, admitted + one.admits_per_s * seconds
            completed += done.of(one, newcomers=key in kept)
            if admitted >= LEAST_ADMITTED:
                if completed >= params.completed_share * admitted:
                    continue
                if key in kept or ticks >= params.ticks:
                    kept[key] = now_s + params.hold_s
                    admitted, completed = 0.0, 0  # what follows is counted for itself
            followed[key] = ticks, admitted, completed
        self._followed, self._until_s = followed, kept
        return dict(kept)

    def observe_all(
        self, counters: np.ndarray, connections: np.ndarray, seconds: float, now_s: float, params: ForgeryParams
    ) -> float:
        """Until when the whole host counts as flooded by forged SYNs from everywhere, in seconds; 0.0: it is not.

        No limit is spent by such a flood, but nearly all it is admitted for stays without a handshake. `counters`
        (REASONS, 2) and `connections` (CONNECTIONS rows) came in the last `seconds`.
        """
        asked = int(counters[[Reason.CONFORMING, Reason.UNTRACKED, Reason.CHALLENGED]].sum())
        completed = int(handshakes(connections).sum())
        is_flood = asked > params.flood_per_s * seconds > 0 and completed < params.completed_share * asked
        self._flood_ticks = self._flood_ticks + 1 if is_flood else 0
        if self._flood_ticks >= params.ticks or (is_flood and self._flood_until_s > now_s):
            self._flood_until_s = now_s + params.hold_s
        return self._flood_until_s if self._flood_until_s > now_s else 0.0


class _Done:
    """The handshakes of one tick, by prefix; sorted when the first is asked for."""

    def __init__(self, connections: np.ndarray) -> None:
        self._rows = connections
        self._at: dict[tuple[int, ...], int] | None = None

    def of(self, one: Saturated, *, newcomers: bool) -> int:
        """Handshakes of one prefix; of its newcomers alone, where it has any children to be new."""
        if self._at is None:
            names = (self._rows[name].tolist() for name in ("service", "level", "hi"))
            self._at = {key: row for row, key in enumerate(zip(*names, strict=True))}
        level = one.prefix.level
        row = self._at.get((int(one.service), int(level), one.prefix.hi)) if level is not None else None
        if row is None:
            return 0
        children = not (one.prefix.ipv4 and level is Level.L64)
        return int(self._rows["newcomers" if newcomers and children else "completed"][row])
