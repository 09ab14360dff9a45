"""What should be in force, and what each sink still lacks of it: kept up by differences.

    what changed ── Wanted ── entries ──┬─ Backlog ── plan ── policy maps
    (learned, fixed)                    └─ Backlog ── plan ── nftables sets

Time is no input. Whoever owns an entry reports when it ends, as one change among others: the ledger what was learned,
the caller what is fixed. So a tick costs what changed in it, and an audit of `AUDITED` keys.

Fixed entries are those of operators, lists and configuration. At one prefix the higher origin wins, allow before block
at the same origin. What was learned is left out inside fixed entries of the opposite verdict. So is a learned limit
inside a fixed block: being the longer match, it would open the block.

Invariants:
    same-as-from-scratch: after every update the entries are what the rules say of all that is learned and fixed.
    backlog-covers: a prefix at which a sink differs from what is wanted is in its backlog.
    backlog-empties: a prefix leaves the backlog when the sink is seen to hold what is wanted, and not before.
    no-hole-expires-before-its-block: the end of an open entry that is wanted in a sink is never before that of a block
        around it. If it went first, the block would refuse those it was made for.
    unreported-changes-heal: what changed without a report is found by the audit, and counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain, islice

from edge.abi import Origin, Service, Standing
from edge.core.guard import ALLOWING, Guard
from edge.core.model import Entry
from edge.core.nesting import Key, Nesting, Ordered
from edge.core.plan import Difference, Plan, PlanParams, is_urgent, plan

AUDITED = 256
"""Keys looked at anew in an update though nobody reported a change; 150,000 take ten minutes of ticks, 2 ms each."""

WINDOW = 2
"""Prefixes of a backlog looked at in a tick, in `max_changes`: enough to let releases go before new blocks."""


class Wanted:
    """The entries in force, by `Entry.key`, and how many there are of each kind."""

    def __init__(self, learned: Mapping[Key, Entry]) -> None:
        """`learned` is read whenever a change is reported; None of it is known before the first update."""
        self.entries: dict[Key, Entry] = {}
        self.counts: Counter[tuple[Standing, Origin, Service]] = Counter()
        self.healed = 0  # changes that nobody had reported, here or in a sink; expected to stay 0
        self.audited: list[Key] = []  # in the last update
        self._backlogs: list[Backlog] = []
        self._learned = learned
        self._known = Ordered()  # keys of what is learned
        self._fixed: tuple[Entry, ...] = ()
        self._claims: dict[Key, tuple[Entry, ...]] = {}  # fixed entries, mostly one at a prefix
        self._guard = Guard(())
        self._blocks: Nesting[float] = Nesting()  # when each block in force ends
        self._ending = Ordered()  # keys of open entries in force that end
        self._unaudited: list[Key] = []

    def update(self, changed: Iterable[Key], fixed: tuple[Entry, ...], guard: Guard) -> None:
        """Take in what changed: the keys of learned entries, and other fixed entries if it is another tuple.

        None of them may have expired. `guard` is of the same fixed entries. A fixed entry that stays should stay the
        same object: comparing 300,000 by value takes a second.
        """
        touched = dict.fromkeys(changed)
        if fixed is not self._fixed:
            self._guard = guard
            for key in self._replace_fixed(fixed):
                touched[key] = None
                touched |= dict.fromkeys(self._known.inside(*key))
        for key in touched:
            self._look(key)
        self._audit()

    def target(self, key: Key) -> Entry | None:
        """What a sink should hold at a prefix: the entry in force, lasting as long as the blocks it pierces."""
        entry = self.entries.get(key)
        if entry is None or entry.expires_s is None or entry.standing is Standing.BLOCK:
            return entry
        latest = max(self._blocks.holding(*key), default=0.0)
        if latest <= entry.expires_s:
            return entry
        return replace(entry, expires_s=None if math.isinf(latest) else latest)

    def follow(self, installed: Mapping[Key, Entry]) -> Backlog:
        """The backlog of a sink that holds these entries."""
        self._backlogs.append(Backlog(self, installed))
        return self._backlogs[-1]

    def _replace_fixed(self, fixed: tuple[Entry, ...]) -> list[Key]:
        """Take these for the ones before; the keys of those that came or went."""
        before, now = {id(e): e for e in self._fixed}, {id(e): e for e in fixed}
        gone = [e for name, e in before.items() if name not in now]
        came = [e for name, e in now.items() if name not in before]
        self._fixed = fixed
        for entry in gone:
            left = tuple(e for e in self._claims.pop(entry.key) if e is not entry)
            if left:
                self._claims[entry.key] = left
        for entry in came:
            self._claims[entry.key] = (*self._claims.get(entry.key, ()), entry)
        return [entry.key for entry in chain(gone, came)]

    def _decide(self, key: Key) -> Entry | None:
        """The entry that should be in force at a prefix."""
        claims = self._claims.get(key)
        if claims is not None:
            return max(claims, key=_rank)
        entry = self._learned.get(key)
        if entry is None:
            return None
        if entry.standing not in ALLOWING and self._guard.allowed(*key):
            return None
        if entry.standing is not Standing.BLOCK and self._guard.blocked(*key):
            return None
        return entry

    def _look(self, key: Key) -> bool:
        """Bring one prefix up to date; whether it was not."""
        before, after = self.entries.get(key), self._decide(key)
        (self._known.add if key in self._learned else self._known.discard)(key)
        if before is after or before == after:
            return False
        if before is not None:
            self.counts[before.standing, before.origin, before.service] -= 1
        if after is None:
            del self.entries[key]
        else:
            self.entries[key] = after
            self.counts[after.standing, after.origin, after.service] += 1
        if _opens_for_a_while(after):
            self._ending.add(key)
        elif _opens_for_a_while(before):
            self._ending.discard(key)
        moved = [key]
        if _block_end(before) != _block_end(after):
            moved += self._move_block(key, _block_end(after))
        for backlog in self._backlogs:
            backlog.add(moved, urgent=is_urgent(before) or is_urgent(after))
        return True

    def _move_block(self, key: Key, end_s: float | None) -> list[Key]:
        """Note when a block ends, None for no block; the keys whose own end may follow from it."""
        if end_s is None:
            self._blocks.remove(*key)
        else:
            self._blocks.add(*key, end_s)
        return self._ending.inside(*key)

    def _audit(self) -> None:
        """Look at a few prefixes of which nothing was reported, in turn all."""
        if len(self._known) != len(self._learned):
            self.healed += sum(map(self._look, {*self._known, *self._learned}))
        if not self._unaudited:
            self._unaudited = [*self._learned, *self._claims]
        self.audited = self._unaudited[-AUDITED:]
        del self._unaudited[-AUDITED:]
        self.healed += sum(map(self._look, self.audited))


class Backlog:
    """The prefixes at which one sink may differ from what is wanted."""

    def __init__(self, wanted: Wanted, installed: Mapping[Key, Entry]) -> None:
        self._wanted = wanted
        self._pending = Ordered()
        self._urgent: dict[Key, None] = {}
        self._last: Key | None = None  # looked at in the last tick, where there was more than a window
        self._compare(installed)

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, keys: Iterable[Key], *, urgent: bool) -> None:
        """These may differ now. Urgent ones go first: somebody waits for them."""
        for key in keys:
            self._pending.add(key)
            if urgent:
                self._urgent[key] = None

    def plan(self, installed: Mapping[Key, Entry], params: PlanParams) -> Plan:
        """What to change in the sink, which holds these entries now."""
        self._audit(installed)
        window = self._window(WINDOW * params.max_changes)
        left = len(self._pending) - len(window)
        differences: list[Difference] = []
        for key in window:
            if self._differs(key, installed):
                differences.append((self._wanted.target(key), installed.get(key)))
            else:
                self._pending.discard(key)
                self._urgent.pop(key, None)
        made = plan(differences, params)
        return replace(made, deferred=made.deferred + left)

    def _differs(self, key: Key, installed: Mapping[Key, Entry]) -> bool:
        wanted, present = self._wanted.target(key), installed.get(key)
        return wanted is not present and wanted != present

    def _compare(self, installed: Mapping[Key, Entry]) -> None:
        """Look at everything once."""
        entries = self._wanted.entries
        keys = chain(entries, (key for key in installed if key not in entries))
        differing = [key for key in keys if self._differs(key, installed)]
        self._pending = Ordered(differing)
        self._urgent = {key: None for key in differing if is_urgent(entries.get(key)) or is_urgent(installed.get(key))}

    def _audit(self, installed: Mapping[Key, Entry]) -> None:
        if not self._pending and len(installed) != len(self._wanted.entries):
            self._compare(installed)
            self._wanted.healed += len(self._pending)
        for key in self._wanted.audited:
            if key not in self._pending and self._differs(key, installed):
                self._pending.add(key)
                self._wanted.healed += 1

    def _window(self, most: int) -> list[Key]:
        """About so many of the pending prefixes, and with each all that hold it or lie inside it.

        The changes that one change rests on are among those, so what is left out cannot be missed. Each tick goes on
        where the last one ended, so that nothing waits for ever behind what a sink refuses.
        """
        if len(self._pending) <= most:
            return list(self._pending)
        run = self._pending.after(self._last, most) or self._pending.after(None, most)
        self._last = run[-1]
        # whatever holds or lies inside a prefix amid the run, but is not in it, does so with its first or last one
        rest = (key for end in (run[0], run[-1], *islice(self._urgent, most)) for key in self._relatives(end))
        return list(dict.fromkeys(chain(run, rest)))

    def _relatives(self, key: Key) -> list[Key]:
        """The shortest pending prefix that holds this one, and all that lie inside it."""
        service, prefix = key
        holding = ((service, prefix.parent(length)) for length in range(prefix.length + 1))
        top = next((key for key in holding if key in self._pending), key)
        return [top, *self._pending.inside(*top)]


def _rank(entry: Entry) -> tuple[Origin, bool, float, int, Standing, str]:
    """Who wins at one prefix. Between equals the one that lasts, then the later one, so that order decides nothing."""
    ends_s = math.inf if entry.expires_s is None else entry.expires_s
    return entry.origin, entry.standing in ALLOWING, ends_s, entry.decision, entry.standing, entry.reason


def _block_end(entry: Entry | None) -> float | None:
    """When a block ends; None for no block."""
    if entry is None or entry.standing is not Standing.BLOCK:
        return None
    return math.inf if entry.expires_s is None else entry.expires_s


def _opens_for_a_while(entry: Entry | None) -> bool:
    return entry is not None and entry.standing is not Standing.BLOCK and entry.expires_s is not None
