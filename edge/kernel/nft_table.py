"""One nftables table through libnftables: transactions and listings, with a watch for what others do to it.

Invariants:
    a-transaction-is-whole: a commit that fails has changed nothing, and raises UnavailableError.
    other-tables-are-untouched: no command names another table.
"""

from __future__ import annotations

import nftables

from edge.errors import UnavailableError
from edge.kernel import nft_ruleset as ruleset
from edge.kernel.nft_sets import Element
from edge.kernel.nft_watch import Watch


class NftTable:
    """Works in the network namespace it is made in, on one thread: libnftables is not thread-safe."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.transactions = 0
        self.watch = Watch(name)
        self._nft = nftables.Nftables()

    def commit(self, commands: list[ruleset.Json]) -> None:
        """One transaction: all or UnavailableError."""
        self.watch.before_commit()
        code, _, error = self._nft.json_cmd({"nftables": commands})
        self.watch.after_commit()
        if code != 0:
            raise UnavailableError(
                f"nftables table {ruleset.FAMILY} {self.name}: expected {len(commands)} commands to be accepted, "
                f"found: {error.strip()[:300] or code}"
            )
        self.transactions += 1

    def outline(self) -> ruleset.Outline | None:
        """What the table holds but for its elements; None when it is not there. Takes milliseconds.

        The family's ruleset in terse form is the one listing for which nft 1.0.6 does not fetch every element.
        """
        return ruleset.outline(self._list({"ruleset": {"family": ruleset.FAMILY}}, terse=True), self.name)

    def elements(self) -> dict[str, dict[Element, int | None]]:
        """The elements by set, with the seconds left of those with a timeout. 100,000 take one to two seconds."""
        return ruleset.elements(self._list({"table": {"family": ruleset.FAMILY, "name": self.name}}, terse=False))

    def _list(self, what: ruleset.Json, *, terse: bool) -> list[ruleset.Json]:
        """List with a context of its own: one that is kept serves old timeouts, and never gives its memory back."""
        nft = nftables.Nftables()
        nft.set_terse_output(terse)
        code, output, error = nft.json_cmd({"nftables": [{"list": what}]})
        if code != 0:
            raise UnavailableError(f"nftables: expected a listing of {what}, found: {error.strip()[:300] or code}")
        listing: list[ruleset.Json] = output["nftables"] if output else []
        return listing
