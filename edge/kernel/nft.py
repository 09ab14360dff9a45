"""The nftables sets: blocks that stay when XDP is not there, and that an operator can read with `nft list`.

An EntrySink. The entries become set elements (edge.kernel.nft_elements), the elements one transaction while they fit,
else a sequence: first what opens is added, then what refuses is changed, then what opened is removed. Other tables are
never touched. One thread owns the object: libnftables is not thread-safe.

Learned elements carry a lease, so they end with a dead daemon. All leases end together: an element put between two
renewals gets what is left. Allow leases are renewed before block leases, each a few at a time. An element is replaced
by add, delete and add in one transaction: re-adding alone does not refresh a timeout on older kernels, and deleting
alone fails when it has expired meanwhile.

Invariants:
    sets-mean-longest-match: the table refuses a new connection exactly when the longest match of its source is a block.
    differences-only: what is there as wanted is not written again.
    hole-outlives-block: no allow element ends before a block element around it, leased or not.
    adopting-leaves-no-gap: a table found in place goes on refusing while it is adopted or replaced.
    drift-is-repaired: after somebody changed the table, the next `drifted` brings it back, and says what was missing.
    other-tables-are-untouched: no command names another table.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from edge.abi import Mode, Origin, Service, Standing
from edge.core.model import Entry
from edge.core.ports import Clock
from edge.core.prefix import Prefix
from edge.errors import UnavailableError
from edge.kernel import nft_ruleset as ruleset
from edge.kernel.nft_elements import Holdings
from edge.kernel.nft_params import NftParams
from edge.kernel.nft_renewals import Renewals
from edge.kernel.nft_sets import Element, Lifetime, SetSpec, all_specs, prefixes
from edge.kernel.nft_steps import Delta, Deltas, steps
from edge.kernel.nft_table import NftTable

log = logging.getLogger(__name__)

_SLACK_S = 2.0  # timeouts are written in whole seconds: closer ends count as equal
_ALLOW_MARGIN_S = 5  # an allow element outlives a block element of the same end by more than the slack
_RENEW_AT = 1 / 2  # of the lease is left when the renewal begins
_ALLOW_SPAN, _BLOCK_SPAN = 1 / 8, 1 / 4  # of the lease it takes: then an eighth is left for ticks that come late
_RELOAD_AT = 8  # more deletes from an interval set cost more than refilling it: libnftables fetches the set for each


class NftSets:
    """The table of one network namespace. Call `adopt` first, then each tick `drifted`, `apply` and `renew`."""

    def __init__(
        self, *, clock: Clock, params: NftParams, ports: Mapping[Service, Sequence[int]], mode: Mode, lease_s: float
    ) -> None:
        """`clock` gives the time of `Entry.expires_s`; `ports` the destination ports of each service.

        `lease_s`: seconds a learned element outlives the last renewal, equal to the heartbeat's grace, so that XDP and
        nftables let go together.
        """
        self._clock = clock
        self._params = params
        self._lease_s = lease_s
        self._mode = mode
        self._layout = ruleset.Layout(table=params.table, priority=params.priority, ports=dict(ports))
        self._specs = all_specs()
        self._table = NftTable(params.table)
        self._holdings = Holdings(params.max_elements)
        self._present: dict[str, dict[Element, float]] = {name: {} for name in self._specs}  # when each ends
        self._shape = ""
        self._behind = False  # a write failed: the kernel may not hold what we want
        self._allow_until_s = self._block_until_s = clock.now_s() + lease_s
        self._renewals = Renewals()
        self._repairs = 0

    # -- EntrySink

    def installed(self) -> Mapping[tuple[Service, Prefix], Entry]:
        """The entries held, by `Entry.key`, as a view that follows.

        After `adopt` also those read from the table, with the reason "adopted".
        """
        return MappingProxyType(self._holdings.entries)

    @property
    def elements(self) -> int:
        """Elements our entries make, over all sets."""
        return sum(map(len, self._holdings.elements.values()))

    @property
    def repairs(self) -> int:
        """How often somebody had changed the table and it was put right."""
        return self._repairs

    def apply(self, put: Sequence[Entry], drop: Sequence[Entry]) -> None:
        """Install and remove. UnavailableError when nftables refuses; `drifted` tries again."""
        touched = self._holdings.update(put, drop)
        try:
            self._write(touched)
        except UnavailableError as error:
            log.warning(
                "transaction refused, comparing", extra={"fields": {"table": self._params.table, "error": error}}
            )
            self.resync()

    # -- life of the table

    def adopt(self) -> int:
        """Take over the table, or make it; returns the elements found. Nothing is let through meanwhile.

        Elements found are held as entries of reason "adopted" until a plan replaces or drops them. A table of another
        layout is replaced in one transaction, with those of its elements that have a set in ours.
        """
        outline = self._table.outline()
        ends = self._ends()[0] if outline else {}
        self._holdings.update(self._adopted(ends), ())
        found = sum(map(len, self._holdings.elements.values()))
        if outline is None or not self._ours(outline):
            self._rebuild()
        else:
            self._present = ends
            self.set_mode(self._mode)
            self._write(self._everything())
        log.info("table ready", extra={"fields": {"table": self._params.table, "adopted": found}})
        return found

    def set_mode(self, mode: Mode) -> None:
        """Switch between counting and dropping, in one transaction."""
        self._mode = mode
        try:
            self._commit(ruleset.switch(self._layout, mode))
        except UnavailableError:  # somebody took the table or the chain away
            self._rebuild()
        else:
            self._shape = self._shape_now()

    def remove(self) -> None:
        """Delete the table; nothing happens when it is not there."""
        if self._table.outline():
            self._commit(ruleset.destroy(self._params.table))
        self._present = {name: {} for name in self._specs}

    def close(self) -> None:
        """Let go of the kernel; the table stays."""
        self._table.watch.close()

    # -- upkeep

    def renew(self) -> int:
        """Renew a few leases when half of their time is gone; returns how many elements were looked at.

        So many a call that each phase takes its share of the lease, however many elements there are: one at least,
        and a batch at most.
        """
        now_s = self._clock.now_s()
        if not self._renewals.left:
            if self._block_until_s < self._allow_until_s:
                self._block_until_s = self._allow_until_s
                self._renewals = self._leases(now_s, allow=False)
            elif self._allow_until_s - now_s <= self._lease_s * _RENEW_AT:
                self._allow_until_s = now_s + self._lease_s
                self._renewals = self._leases(now_s, allow=True)
                self._write(self._holdings.retry(self._params.batch))
        due: dict[str, set[Element]] = {}
        looked_at = 0
        for name, element in self._renewals.take(now_s, self._params.batch):
            looked_at += 1
            life = self._holdings.elements[name].get(element)
            if life is not None and life.leased:
                due.setdefault(name, set()).add(element)
        self._write(due)
        return looked_at

    def drifted(self) -> bool:
        """Whether somebody else had changed the table; it is repaired. Costs nothing while nobody does."""
        if not self._table.watch.touched() and not self._behind:
            return False
        return self.resync()

    def resync(self) -> bool:
        """Compare the table with what it should hold, and repair the differences; returns whether there were any."""
        self._behind = True
        outline = self._table.outline()
        if outline is None or outline.shape != self._shape:
            self._rebuild()
            self._repaired("table gone" if outline is None else "chains, sets or rules changed")
            return True
        self._present, took_s = self._ends()
        self._settle(_SLACK_S + 1 + took_s)
        deltas = self._deltas(self._everything())
        self._run(deltas)
        self._behind = False
        if not deltas:
            return False
        self._repaired(
            "elements differ",
            written=sum(len(d.add) for d in deltas.values()),
            removed=sum(len(d.remove) for d in deltas.values()),
        )
        return True

    def describe(self) -> dict[str, Any]:
        """For `edge status`: table, mode, elements and refused or allowed packets by set, repairs (expected 0)."""
        outline = self._table.outline()
        return {
            "table": f"{ruleset.FAMILY} {self._params.table}",
            "layout": self._layout.id,
            "mode": self._mode.name.lower(),
            "present": outline is not None,
            "elements": {name: len(elements) for name, elements in self._holdings.elements.items() if elements},
            "packets": {k: v for k, v in (outline.packets if outline else {}).items() if v},
            "left_to_xdp": len(self._holdings.left_out),
            "transactions": self._table.transactions,
            "repairs": self._repairs,
            "notifications_lost": self._table.watch.lost,
        }

    # -- differences

    def _everything(self) -> dict[str, set[Element]]:
        return {name: wanted.keys() | self._present[name].keys() for name, wanted in self._holdings.elements.items()}

    def _leases(self, now_s: float, *, allow: bool) -> Renewals:
        """The elements of the level sets of one verdict, to be renewed from now on; some may have no lease."""
        sets = [
            (name, list(wanted))
            for name, wanted in self._holdings.elements.items()
            if wanted and self._specs[name].allow is allow and not self._specs[name].interval
        ]
        return Renewals(sets, now_s, self._lease_s * (_ALLOW_SPAN if allow else _BLOCK_SPAN))

    def _end(self, spec: SetSpec, life: Lifetime) -> float:
        """When an element of this lifetime is to end, on the clock of the entries."""
        if not life.leased:
            return life.expires_s
        return min(life.expires_s, self._allow_until_s if spec.allow else self._block_until_s)

    def _deltas(self, touched: Mapping[str, Iterable[Element]]) -> Deltas:
        """What must be written so that the touched elements are as wanted."""
        now_s = self._clock.now_s()
        deltas: Deltas = {}
        for name, elements in touched.items():
            spec, wanted, present = self._specs[name], self._holdings.elements[name], self._present[name]
            delta = Delta()
            for element in elements:
                life, there = wanted.get(element), present.get(element)
                end = self._end(spec, life) if life else -math.inf
                if end - now_s < (1 if not spec.allow else 0):  # unwanted, or a block about to end
                    if there is not None:
                        delta.remove.append(element)
                elif there is None or abs(there - end) > _SLACK_S:  # inf - inf is nan, and not greater
                    delta.add[element] = end
            if delta:
                deltas[name] = delta
        return deltas

    def _write(self, touched: Mapping[str, Iterable[Element]]) -> None:
        self._run(self._deltas(touched))

    def _run(self, deltas: Deltas) -> None:
        """Commit the differences in one transaction if they fit, else step by step."""
        if sum(map(len, deltas.values())) <= self._params.batch:
            if deltas:
                self._commit_elements(deltas)
            return
        for step in steps(deltas, self._params.batch, self._specs):
            self._commit_elements(step)

    # -- the kernel

    def _commit_elements(self, deltas: Deltas) -> None:
        commands: list[ruleset.Json] = []
        for name, delta in sorted(deltas.items(), key=lambda item: not self._specs[item[0]].allow):
            commands += self._set_commands(self._specs[name], delta)
        self._commit(commands)
        for name, delta in deltas.items():
            for element in delta.remove:
                self._present[name].pop(element, None)
            self._present[name].update(delta.add)

    def _set_commands(self, spec: SetSpec, delta: Delta) -> Iterator[ruleset.Json]:
        table, present = self._params.table, self._present[spec.name]
        if spec.interval:
            added: dict[Element, int | None] = dict.fromkeys(delta.add)
            if len(delta.remove) > _RELOAD_AT:
                yield ruleset.flush(table, spec)  # and filled again: the kernel shows the whole transaction at once
                removed = set(delta.remove)
                added |= dict.fromkeys(element for element in present if element not in removed)
            elif delta.remove:
                yield ruleset.delete(table, spec, delta.remove)
        else:
            added = self._timeouts(spec, delta.add)
            old = [*delta.remove, *(element for element in delta.add if element in present)]
            if old:
                yield ruleset.add(table, spec, dict.fromkeys(old))
                yield ruleset.delete(table, spec, old)
        if added:
            yield ruleset.add(table, spec, added)

    def _timeouts(self, spec: SetSpec, ends: Mapping[Element, float]) -> dict[Element, int | None]:
        """Whole seconds from now, up for allow and down for block; None where there is no end."""
        now_s = self._clock.now_s()
        if spec.allow:
            return {
                e: None if math.isinf(s) else math.ceil(max(0.0, s - now_s)) + _ALLOW_MARGIN_S for e, s in ends.items()
            }
        return {e: None if math.isinf(s) else max(1, int(s - now_s)) for e, s in ends.items()}

    def _rebuild(self) -> None:
        """Make the table anew with all that is wanted: in one transaction, or in steps if the kernel refuses that."""
        self._present = {name: {} for name in self._specs}
        fresh = [*ruleset.destroy(self._params.table), *ruleset.create(self._layout, self._mode)]
        deltas = self._deltas(self._holdings.elements)
        filled = [c for name, delta in deltas.items() for c in self._set_commands(self._specs[name], delta)]
        try:
            self._commit([*fresh, *filled])
        except UnavailableError:
            if not filled:
                raise
            self._commit(fresh)
            self._run(deltas)
        else:
            self._present |= {name: dict(delta.add) for name, delta in deltas.items()}
        self._shape = self._shape_now()
        self._behind = False

    def _commit(self, commands: list[ruleset.Json]) -> None:
        """One transaction; while one has failed, the kernel may not hold what we want."""
        try:
            self._table.commit(commands)
        except UnavailableError:
            self._behind = True
            raise

    def _shape_now(self) -> str:
        outline = self._table.outline()
        return outline.shape if outline else ""

    def _ours(self, outline: ruleset.Outline) -> bool:
        """Whether a table found in place has our layout, whole."""
        whole = [ruleset.expected_names(self._layout, mode) for mode in Mode]
        return outline.layout_id == self._layout.id and outline.names in whole

    def _ends(self) -> tuple[dict[str, dict[Element, float]], float]:
        """When each element in the kernel ends, at the earliest, and the seconds it may be later for the listing."""
        before_s = self._clock.now_s()
        listing = self._table.elements()
        ends = {
            name: {
                element: math.inf if left_s is None else before_s + left_s - (_ALLOW_MARGIN_S if spec.allow else 0)
                for element, left_s in listing.get(name, {}).items()
            }
            for name, spec in self._specs.items()
        }
        return ends, self._clock.now_s() - before_s

    def _settle(self, tolerance_s: float) -> None:
        """Take an end that was read as the one that was written, where it can be."""
        for name, present in self._present.items():
            spec, wanted = self._specs[name], self._holdings.elements[name]
            for element, there in present.items():
                life = wanted.get(element)
                if life and abs(self._end(spec, life) - there) <= tolerance_s:
                    present[element] = self._end(spec, life)

    def _adopted(self, ends: Mapping[str, Mapping[Element, float]]) -> Iterator[Entry]:
        """What the elements found can stand for; those that can stand for nothing are left for removal."""
        for name, found in ends.items():
            spec = self._specs[name]
            for element, end in found.items():
                for prefix in prefixes(spec, element, self._params.max_elements) or ():
                    yield Entry(
                        prefix=prefix,
                        service=spec.service,
                        standing=Standing.ALLOW if spec.allow else Standing.BLOCK,
                        origin=Origin.LIST if math.isinf(end) else Origin.LEARNED,
                        expires_s=None if math.isinf(end) else end,
                        reason="adopted",
                    )

    def _repaired(self, what: str, **fields: int) -> None:
        self._repairs += 1
        log.warning("sets drifted", extra={"fields": {"table": self._params.table, "found": what, **fields}})


def remove_table(name: str) -> bool:
    """Delete the table of a daemon that is gone; whether there was one. UnavailableError when nftables refuses."""
    table = NftTable(name)
    try:
        if table.outline() is None:
            return False
        table.commit(ruleset.destroy(name))
    finally:
        table.watch.close()
    return True
