"""What was decided elsewhere and binds what may be learned: entries of operators, lists and configuration.

Invariants:
    fixed-allow-is-never-blocked: no learned block covers, equals or lies inside a fixed allow or exemption.
    fixed-block-is-not-pierced: no learned entry of another standing lies inside a fixed block.
"""

from __future__ import annotations

from collections.abc import Iterable

from edge.abi import Origin, Service, Standing
from edge.core.model import Entry
from edge.core.nesting import Nesting
from edge.core.prefix import LENGTHS, Prefix

ALLOWING = frozenset({Standing.ALLOW, Standing.GOOD})


class Guard:
    """Fixed entries by length, for questions about one prefix; built once for each set of entries."""

    def __init__(self, fixed: Iterable[Entry]) -> None:
        self._allowed: Nesting[bool] = Nesting()
        self._blocked: Nesting[bool] = Nesting()
        self._holds_allowed: set[tuple[Service, Prefix]] = set()
        for entry in fixed:
            if entry.standing is Standing.BLOCK:
                self._blocked.add(entry.service, entry.prefix, True)
            elif entry.standing in ALLOWING or entry.origin is Origin.EXEMPT:
                self._allowed.add(entry.service, entry.prefix, True)
                for length in LENGTHS:
                    if length < entry.prefix.length:
                        self._holds_allowed.add((entry.service, entry.prefix.parent(length)))

    def allowed(self, service: Service, prefix: Prefix) -> bool:
        """Whether a fixed allow is this prefix or holds it."""
        return self._allowed.holds(service, prefix)

    def blocked(self, service: Service, prefix: Prefix) -> bool:
        """Whether a fixed block is this prefix or holds it."""
        return self._blocked.holds(service, prefix)

    def protects(self, service: Service, prefix: Prefix) -> bool:
        """Whether blocking this prefix would touch a fixed allow: around, at, or inside it."""
        return (service, prefix) in self._holds_allowed or self.allowed(service, prefix)
