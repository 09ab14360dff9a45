"""edge.core.wanted: what should be in force when operators, lists and the core disagree, kept up by differences."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest

from edge.abi import Origin, Service, Standing
from edge.core.guard import ALLOWING, Guard
from edge.core.model import Entry
from edge.core.nesting import Key
from edge.core.plan import Plan, PlanParams
from edge.core.prefix import Prefix, ipv4_key
from edge.core.wanted import AUDITED, Backlog, Wanted

NOW = 1009.0
MANY = PlanParams(max_changes=1_000_000)
Table = dict[Key, Entry]


def entry(
    prefix: str, standing: Standing, origin: Origin = Origin.LEARNED, expires_s: float | None = NOW + 600.0
) -> Entry:
    return Entry(
        prefix=Prefix.parse(prefix),
        service=Service.MX,
        standing=standing,
        origin=origin,
        expires_s=expires_s,
        reason="t",
    )


def wanted_of(learned: Iterable[Entry], *fixed: Entry) -> Wanted:
    table = {e.key: e for e in learned}
    wanted = Wanted(table)
    wanted.update(table, fixed, Guard(fixed))
    return wanted


def in_force(learned: list[Entry], *fixed: Entry) -> dict[str, tuple[Origin, Standing]]:
    return {str(prefix): (e.origin, e.standing) for (_, prefix), e in wanted_of(learned, *fixed).entries.items()}


def apply(installed: Table, made: Plan) -> None:
    for e in made.put:
        installed[e.key] = e
    for e in made.drop:
        del installed[e.key]


# -- who wins


def test_higher_origin_wins_at_equal_prefix() -> None:
    order = [Origin.LEARNED, Origin.LIST, Origin.OPERATOR, Origin.EXEMPT]
    for low, high in pairwise(order):
        below, above = entry("2001:db8::/64", Standing.ALLOW, low), entry("2001:db8::/64", Standing.BLOCK, high)
        found = in_force([below], above) if low is Origin.LEARNED else in_force([], below, above)
        assert found == {"2001:db8::/64": (high, Standing.BLOCK)}


@pytest.mark.parametrize("turned", [False, True])
def test_allow_beats_block_at_equal_origin(turned: bool) -> None:
    pair = [entry("2001:db8::/64", s, Origin.OPERATOR) for s in (Standing.ALLOW, Standing.BLOCK)]
    fixed = reversed(pair) if turned else pair
    assert in_force([], *fixed) == {"2001:db8::/64": (Origin.OPERATOR, Standing.ALLOW)}


@pytest.mark.parametrize("standing", [Standing.BLOCK, Standing.BAD, Standing.SUSPECT])
def test_nothing_learned_against_what_an_operator_allows(standing: Standing) -> None:
    found = in_force([entry("2001:db8:1:2::/64", standing)], entry("2001:db8::/32", Standing.ALLOW, Origin.OPERATOR))
    assert list(found) == ["2001:db8::/32"]


@pytest.mark.parametrize("standing", [Standing.GOOD, Standing.SUSPECT, Standing.BAD])
def test_nothing_learned_pierces_a_listed_block(standing: Standing) -> None:
    found = in_force([entry("2001:db8:1:2::/64", standing)], entry("2001:db8::/36", Standing.BLOCK, Origin.LIST))
    assert list(found) == ["2001:db8::/36"]


def test_learned_entry_around_a_fixed_one_stays() -> None:
    found = in_force(
        [entry("2001:db8::/48", Standing.BLOCK)], entry("2001:db8::7/128", Standing.ALLOW, Origin.OPERATOR)
    )
    assert set(found) == {"2001:db8::/48", "2001:db8::7/128"}


def test_services_do_not_bind_each_other() -> None:
    learned = entry("2001:db8:1::/48", Standing.BLOCK)
    other = replace(entry("2001:db8::/32", Standing.ALLOW, Origin.OPERATOR, None), service=Service.SUBMISSION)
    assert len(wanted_of([learned], other).entries) == 2


def test_ipv6_default_route_binds_no_ipv4() -> None:
    found = in_force([entry("192.0.2.7/32", Standing.BLOCK)], entry("::/1", Standing.ALLOW, Origin.OPERATOR))
    assert "192.0.2.7/32" in found


# -- holes


@pytest.mark.parametrize("block_s", [NOW + 601, None])
def test_no_hole_expires_before_its_block(block_s: float | None) -> None:
    hole = entry("2001:db8:0:1::/64", Standing.GOOD, expires_s=NOW + 7)
    elsewhere = replace(hole, service=Service.SUBMISSION)
    wanted = wanted_of([hole, elsewhere, entry("2001:db8::/48", Standing.BLOCK, expires_s=block_s)])
    assert wanted.target(hole.key) == replace(hole, expires_s=block_s)
    assert wanted.target(elsewhere.key) == elsewhere
    assert wanted.entries[hole.key] == hole


def test_a_hole_is_not_shortened_by_its_block() -> None:
    hole = entry("192.0.2.1", Standing.GOOD)
    assert wanted_of([hole, entry("192.0.0.0/16", Standing.BLOCK, expires_s=NOW + 7)]).target(hole.key) is hole


def test_the_holes_of_a_block_that_is_renewed_follow() -> None:
    hole, block = entry("192.0.2.1", Standing.GOOD), entry("192.0.0.0/16", Standing.BLOCK)
    learned = {e.key: e for e in (hole, block)}
    wanted, installed = Wanted(learned), Table()
    wanted.update(learned, (), Guard(()))
    backlog = wanted.follow(installed)
    apply(installed, backlog.plan(installed, MANY))
    learned[block.key] = replace(block, expires_s=NOW + 1201)
    wanted.update([block.key], (), Guard(()))
    made = backlog.plan(installed, MANY)
    assert made.put == (replace(hole, expires_s=NOW + 1201), learned[block.key])
    apply(installed, made)
    apply(installed, backlog.plan(installed, MANY))
    del learned[hole.key]
    wanted.update([hole.key], (), Guard(()))
    apply(installed, backlog.plan(installed, MANY))
    backlog.plan(installed, MANY)
    learned[block.key] = replace(block, expires_s=NOW + 1801)
    wanted.update([block.key], (), Guard(()))
    assert len(backlog) == 1


# -- against everything anew


def rank(e: Entry) -> tuple[object, ...]:
    return e.origin, e.standing in ALLOWING, e.expires_s or math.inf, e.decision, e.standing, e.reason


def from_scratch(learned: Table, fixed: Iterable[Entry]) -> Table:
    """The rules, by brute force."""
    found: Table = {}
    for e in fixed:
        found[e.key] = max(e, found.get(e.key, e), key=rank)
    around = list(fixed)
    for key, e in learned.items():
        over = [f for f in around if f.service is e.service and f.prefix.contains(e.prefix)]
        blocked = any(f.standing is Standing.BLOCK for f in over)
        allowed = any(
            f.standing in ALLOWING or (f.origin is Origin.EXEMPT and f.standing != Standing.BLOCK) for f in over
        )
        left_out = {Standing.BLOCK: allowed, Standing.GOOD: blocked, Standing.ALLOW: blocked}
        if key not in found and not left_out.get(e.standing, blocked or allowed):
            found[key] = e
    return found


def lengthened(entries: Table) -> Table:
    """Each opening entry lasting as long as the blocks around it."""
    found = dict(entries)
    blocks = [e for e in entries.values() if e.standing is Standing.BLOCK]
    for key, hole in entries.items():
        ends = [b.expires_s for b in blocks if b.service is hole.service and b.prefix.contains(hole.prefix)]
        if hole.standing is not Standing.BLOCK and hole.expires_s is not None and ends:
            last = max(math.inf if end is None else end for end in (*ends, hole.expires_s))
            found[key] = replace(hole, expires_s=None if math.isinf(last) else last)
    return found


def random_entry(rng: random.Random, now_s: float, origins: Iterable[Origin]) -> Entry:
    if rng.random() < 0.7:
        hi, length = 0x20010DB8 << 32 | rng.getrandbits(4) << rng.choice((0, 8, 16)), rng.randint(44, 68)
    else:
        hi, length = ipv4_key(0xC6336400 | rng.getrandbits(4)), rng.randint(54, 64)
    return Entry(
        prefix=Prefix.of(hi, rng.getrandbits(2) << 62, rng.choice((length, length, 64, 56, 1))),
        service=rng.choice(list(Service)),
        standing=rng.choice((Standing.BLOCK, Standing.BLOCK, *list(Standing)[1:])),
        origin=rng.choice(list(origins)),
        expires_s=rng.choice((None, now_s + rng.randint(1, 13), now_s + rng.randint(1, 101))),
        reason="random",
        decision=rng.randint(1, 5),
    )


@dataclass
class World:
    """Who owns entries: something that learns, and somebody who commands. Each reports what changed."""

    rng: random.Random
    now_s: float = NOW
    learned: Table = field(default_factory=dict)
    changed: set[Key] = field(default_factory=set)
    fixed: tuple[Entry, ...] = ()

    def live(self, wanted: Wanted) -> None:
        """A tick of random life."""
        rng = self.rng
        self.now_s += rng.choice((0, 1, 1, 5))
        for key in [k for k, e in self.learned.items() if e.expires_s is not None and e.expires_s <= self.now_s]:
            self.learn(key, None)
        for _ in range(rng.choice((0, 0, 1, 5))):
            made = random_entry(rng, self.now_s, [Origin.LEARNED])
            self.learn(made.key, made)
        for key in rng.sample(sorted(self.learned), min(len(self.learned), rng.choice((0, 0, 1, 3)))):
            later = replace(self.learned[key], expires_s=self.now_s + rng.randint(1, 101))
            self.learn(key, rng.choice((None, later, replace(later, standing=rng.choice(list(Standing)[1:])))))
        fixed = [e for e in self.fixed if e.expires_s is None or e.expires_s > self.now_s]
        if rng.random() < 0.3:
            fixed = [e for e in fixed if rng.random() < 0.8]
            fixed += [random_entry(rng, self.now_s, list(Origin)[1:]) for _ in range(rng.randint(0, 3))]
            fixed += [replace(e, decision=e.decision + 1) for e in fixed if rng.random() < 0.1]
            rng.shuffle(fixed)
        if fixed != list(self.fixed):
            self.fixed = tuple(fixed)
        wanted.update(self.changed, self.fixed, Guard(self.fixed))
        self.changed.clear()

    def learn(self, key: Key, made: Entry | None) -> None:
        """Learn an entry, or forget the one there is."""
        if made is None:
            self.learned.pop(key, None)
        else:
            self.learned[key] = made
        self.changed.add(key)


@dataclass
class Sink:
    """What is installed somewhere; may refuse, and be changed by others."""

    backlog: Backlog
    installed: Table
    params: PlanParams

    def tick(self, rng: random.Random, refuses: float = 0.0) -> None:
        made = self.backlog.plan(self.installed, self.params)
        assert len(made.put) + len(made.drop) <= self.params.max_changes
        if rng.random() >= refuses:
            put = tuple(e for e in made.put if rng.random() >= refuses / 3)
            apply(self.installed, replace(made, put=put))


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    return random.Random(seed)


def check(world: World, wanted: Wanted) -> Table:
    expected = from_scratch(world.learned, world.fixed)
    assert wanted.entries == expected
    assert +wanted.counts == Counter((e.standing, e.origin, e.service) for e in expected.values())
    return lengthened(expected)


def test_same_as_from_scratch(rng: random.Random) -> None:
    for _ in range(23):
        world = World(rng)
        wanted = Wanted(world.learned)
        installed = {e.key: e for e in (random_entry(rng, NOW, Origin) for _ in range(rng.choice((0, 17))))}
        world.live(wanted)
        sink = Sink(wanted.follow(installed), installed, MANY)
        for _ in range(101):
            expected = check(world, wanted)
            sink.tick(rng)
            assert sink.installed == expected
            world.live(wanted)
        assert wanted.healed == 0


@pytest.mark.parametrize("most", [1, 7, 53])
def test_backlog_covers_and_empties(rng: random.Random, most: int) -> None:
    """Whatever a sink refuses, defers or is robbed of: in the end it holds what is wanted, and no more is pending."""
    for _ in range(11):
        world, robbed = World(rng), False
        wanted = Wanted(world.learned)
        world.live(wanted)
        sinks = [Sink(wanted.follow(table), table, PlanParams(max_changes=most)) for table in (Table(), Table())]
        for _ in range(101):
            for sink in sinks:
                sink.tick(rng, refuses=0.3)
                if sink.installed and rng.random() < 0.05:
                    key = rng.choice(sorted(sink.installed))
                    sink.installed[key] = replace(sink.installed[key], reason="somebody else's")
                    robbed = True
                if sink.installed and rng.random() < 0.05:
                    del sink.installed[rng.choice(sorted(sink.installed))]
                    robbed = True
            world.live(wanted)
        expected = check(world, wanted)
        for _ in range(3 * (len(expected) + sum(len(sink.installed) for sink in sinks)) + 3):
            for sink in sinks:
                sink.tick(rng)
            wanted.update((), world.fixed, Guard(world.fixed))
        assert [sink.installed for sink in sinks] == [expected, expected]
        assert [len(sink.backlog) for sink in sinks] == [0, 0]
        assert robbed or wanted.healed == 0


def test_unreported_changes_heal_and_are_counted() -> None:
    learned = {e.key: e for e in (entry(f"2001:db8:{i:x}::/48", Standing.BLOCK) for i in range(1, 3 * AUDITED))}
    wanted, installed = Wanted(learned), Table()
    wanted.update(learned, (), Guard(()))
    backlog = wanted.follow(installed)
    apply(installed, backlog.plan(installed, MANY))
    first, second, *_ = learned.values()
    learned[first.key] = replace(first, standing=Standing.BAD)
    del learned[second.key]
    extra = entry("192.0.2.1", Standing.BLOCK)
    learned[extra.key] = extra
    wanted.update((), (), Guard(()))
    for _ in range(5):
        wanted.update((), (), Guard(()))
        apply(installed, backlog.plan(installed, MANY))
    assert installed == wanted.entries == learned
    assert wanted.healed == 3
    del learned[extra.key]
    wanted.update((), (), Guard(()))
    assert wanted.entries == learned
    assert wanted.healed == 4
    apply(installed, backlog.plan(installed, MANY))
    backlog.plan(installed, MANY)
    stray = entry("192.0.2.2", Standing.BLOCK)
    installed[stray.key] = stray
    apply(installed, backlog.plan(installed, MANY))
    assert installed == learned
    assert wanted.healed == 5


class Watched(Table):
    """Counts what is looked up."""

    asked = 0

    def get(self, key: Key, default: Entry | None = None) -> Entry | None:  # type: ignore[override]  # a count beside it
        self.asked += 1
        return super().get(key, default)


def test_an_update_costs_what_changed() -> None:
    """Counted in entries looked at: of ten thousand, what changed and what is audited."""
    learned = Watched({e.key: e for e in (entry(f"2001:db8:{i:x}::/48", Standing.BLOCK) for i in range(1, 10008))})
    wanted, installed = Wanted(learned), Watched()
    wanted.update(learned, (), Guard(()))
    backlog = wanted.follow(installed)
    while True:
        apply(installed, backlog.plan(installed, PlanParams()))
        if not backlog:
            break
    assert len(installed) == 10007
    for changed in (0, 0, 7):
        learned.asked = installed.asked = 0
        for key in [*learned][:changed]:
            learned[key] = replace(learned[key], expires_s=NOW + 7)
        wanted.update([*learned][:changed], (), Guard(()))
        made = backlog.plan(installed, PlanParams())
        apply(installed, made)
        assert len(made.put) == changed
        assert learned.asked <= AUDITED + changed
        assert installed.asked <= AUDITED + 3 * changed


def test_a_long_backlog_is_taken_by_windows_and_the_operator_goes_first() -> None:
    params = PlanParams(max_changes=7)
    lists = [entry(f"2001:db8:{i:x}::/48", Standing.BLOCK, Origin.LIST, None) for i in range(1, 1010)]
    wanted, installed = wanted_of([], *lists), Watched()
    backlog = wanted.follow(installed)
    command = entry("2001:db9::/48", Standing.BLOCK, Origin.OPERATOR)
    apply(installed, backlog.plan(installed, params))
    wanted.update((), (*lists, command), Guard((*lists, command)))
    installed.asked = 0
    made = backlog.plan(installed, params)
    apply(installed, made)
    assert command in made.put
    assert 1010 - 14 <= made.deferred <= 1010 - 7  # the first seven count until they are seen to be there
    assert installed.asked <= AUDITED + 3 * 14 + 3
    ticks = 2
    while backlog:
        apply(installed, backlog.plan(installed, params))
        ticks += 1
    assert installed == wanted.entries
    assert ticks < 1010 / 7 * 1.5


def test_a_window_that_begins_amid_relatives_takes_all_of_them() -> None:
    """The end of a hole waits for the end of its block, though the block comes before the window."""
    block = entry("2001:db8::/48", Standing.BLOCK)
    holes = [entry(f"2001:db8:0:{i}::/64", Standing.GOOD) for i in (1, 2)]
    later = entry("2001:db9::/48", Standing.GOOD)
    command = entry("2001:dba::/48", Standing.BLOCK, Origin.OPERATOR)
    installed = {e.key: e for e in (block, *holes, later)}
    backlog = wanted_of([], command).follow(installed)
    orders = []
    while backlog:
        made = backlog.plan(installed, PlanParams(max_changes=1))
        orders += [*made.put, *made.drop]
        apply(installed, made)
    assert orders[:2] == [command, block]
    assert len(orders) == 5


def test_nothing_waits_behind_what_a_sink_refuses() -> None:
    """A full table refuses new entries for ever; what is to be removed comes to its turn."""
    blocks = [entry(f"2001:db8:{i:x}::/48", Standing.BLOCK) for i in range(1, 104)]
    stray = entry("2001:db9::/48", Standing.BLOCK)
    wanted, installed = wanted_of(blocks), {stray.key: stray}
    backlog = wanted.follow(installed)
    for _ in range(101):
        apply(installed, replace(backlog.plan(installed, PlanParams(max_changes=7)), put=()))
    assert not installed
