"""How the renewal of many leases is spread over time. Pure.

Invariants:
    renewals-keep-pace: at any moment at least the share of elements has been taken that the time passed is of the span.
    each-is-taken-once: every element given is taken, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

from edge.kernel.nft_sets import Element


class Renewals:
    """Elements to renew one after the other, by set name; none where nothing is given."""

    def __init__(
        self, sets: Sequence[tuple[str, list[Element]]] = (), began_s: float = 0.0, span_s: float = 1.0
    ) -> None:
        """All are to be taken within `span_s` seconds from `began_s` on. The lists are used up."""
        self._sets = list(sets)
        self._began_s, self._span_s = began_s, span_s
        self._total = self.left = sum(len(elements) for _, elements in sets)

    def take(self, now_s: float, most: int) -> Iterator[tuple[str, Element]]:
        """The next ones: as many as time asks for, at least one while there are any, at most `most`."""
        share = min(1.0, (now_s - self._began_s) / self._span_s)
        due = ceil(self._total * share) - (self._total - self.left)
        for _ in range(min(max(due, 1), most, self.left)):
            while not self._sets[-1][1]:
                self._sets.pop()
            name, elements = self._sets[-1]
            self.left -= 1
            yield name, elements.pop()
