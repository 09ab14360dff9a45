"""What the limiter promises, in the plainest Python: one arrival time for each prefix and level, no table, no races."""

from __future__ import annotations

from collections.abc import Mapping

from edge.abi import Level, Service, Standing
from edge.core.prefix import Prefix, is_ipv4

LEVEL_LENGTHS = (128, 64, 56, 48, 32)


class Model:
    """Limits are (emission interval ns, burst) by standing and level."""

    def __init__(self, limits: Mapping[tuple[Standing, Level], tuple[int, int]]) -> None:
        self.limits = limits
        self.tat: dict[tuple[Level, Service, Prefix], int] = {}

    def judge(
        self, hi: int, lo: int, service: Service, now: int, standing: Mapping[Level, Standing], cut: int = 5
    ) -> Level | None:
        """The level that refuses, shortest first, or None: admitted and charged at every level asked."""
        charges: list[tuple[tuple[Level, Service, Prefix], int]] = []
        for level in reversed(Level):
            own = standing.get(level, Standing.NEW)
            if level >= cut or (is_ipv4(hi) and level in (Level.L128, Level.L32)):
                continue
            if level is Level.L128 and own is Standing.NEW:
                continue
            interval, burst = self.limits.get((own, level), (0, 1))
            if not interval:
                continue
            where = level, service, Prefix.of(hi, lo, LEVEL_LENGTHS[level])
            tolerance = interval * (burst - 1)
            base = max(self.tat.get(where, 0), now)
            if base > now + tolerance + interval + 10**9:  # further than any clock can lie
                base = now + tolerance
            if base > now + tolerance:
                return level
            charges.append((where, base + interval))
        for where, tat in charges:
            self.tat[where] = tat
        return None
