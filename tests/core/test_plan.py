"""edge.core.plan: the invariants of its docstring, on hand-made cases and on random trees."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import replace

import pytest

from edge.abi import Origin, Service, Standing
from edge.core.guard import Guard
from edge.core.model import Entry
from edge.core.plan import Plan, PlanParams
from edge.core.plan import plan as plan_differences
from edge.core.prefix import Prefix, ipv4_key, is_ipv4
from edge.core.wanted import Wanted

NOW = 1009.0
MANY = PlanParams(max_changes=1_000_000)
Table = dict[tuple[Service, Prefix], Entry]


def entry(
    text: str,
    standing: Standing = Standing.BLOCK,
    *,
    origin: Origin = Origin.LEARNED,
    expires_s: float | None = NOW + 601,
    service: Service = Service.MX,
) -> Entry:
    return Entry(
        prefix=Prefix.parse(text), service=service, standing=standing, origin=origin, expires_s=expires_s, reason="test"
    )


def table(*entries: Entry) -> Table:
    return {e.key: e for e in entries}


def plan(desired: Table, installed: Table, params: PlanParams) -> Plan:
    """What turns one table into the other."""
    keys = [*desired, *(key for key in installed if key not in desired)]
    both = [(desired.get(key), installed.get(key)) for key in keys]
    return plan_differences([(wanted, present) for wanted, present in both if wanted != present], params)


def after(installed: Table, made: Plan) -> Table:
    """The table after a plan."""
    result = dict(installed)
    for e in made.put:
        result[e.key] = e
    for e in made.drop:
        del result[e.key]
    return result


def refuses(entries: Iterable[Entry], service: Service, address: Prefix) -> bool:
    """Whether the longest match is a block, by brute force."""
    matches = [e for e in entries if e.service is service and e.prefix.contains(address)]
    return bool(matches) and max(matches, key=lambda e: e.prefix.length).standing is Standing.BLOCK


def lengthened(desired: Table) -> Table:
    """The entries, each opening one lasting as long as the blocks around it; by brute force."""
    found = dict(desired)
    for key, hole in desired.items():
        around = [e for e in desired.values() if e.service is hole.service and e.prefix.contains(hole.prefix)]
        ends = [e.expires_s for e in around if e.standing is Standing.BLOCK]
        if hole.standing is not Standing.BLOCK and hole.expires_s is not None and ends:
            last = max(math.inf if end is None else end for end in (*ends, hole.expires_s))
            found[key] = replace(hole, expires_s=None if math.isinf(last) else last)
    return found


def random_table(rng: random.Random, size: int, depth: int = 24) -> Table:
    """Nested entries of both families in a corner of the space, so that many hold one another."""
    found = []
    for _ in range(size):
        if rng.random() < 0.5:
            hi, length = 0x20010DB8 << 32 | rng.getrandbits(5) << rng.choice((0, 8, 16)), rng.randint(64 - depth, 68)
        else:
            hi, length = ipv4_key(0xC6336400 | rng.getrandbits(5)), rng.randint(64 - depth, 64)
        found.append(
            Entry(
                prefix=Prefix.of(hi, rng.getrandbits(3) << 61, length),
                service=rng.choice(list(Service)),
                standing=rng.choice((Standing.BLOCK, Standing.BLOCK, Standing.GOOD, Standing.BAD, Standing.ALLOW)),
                origin=rng.choice(list(Origin)),
                expires_s=rng.choice((None, NOW + rng.randint(1, 601))),
                reason="random",
            )
        )
    return table(*found)


def random_addresses(rng: random.Random, tables: Iterable[Table]) -> list[Prefix]:
    """An address inside each entry, at its edges too."""
    found = []
    for e in (e for t in tables for e in t.values()):
        spread = 128 - e.prefix.length
        for low in (0, (1 << spread) - 1, rng.getrandbits(spread) if spread else 0):
            whole = (e.prefix.hi << 64 | e.prefix.lo) + low
            hi, lo = whole >> 64, whole & (1 << 64) - 1
            found.append(Prefix.of(hi, 0 if is_ipv4(hi) else lo, 128))
    return found


def test_what_differs_is_put_and_what_is_not_wanted_is_dropped() -> None:
    renewed, gone, new = entry("2001:db8:2::/48"), entry("2001:db8:3::/48"), entry("192.0.2.0/24")
    later = replace(renewed, expires_s=NOW + 1201)
    made = plan(table(later, new), table(renewed, gone), MANY)
    assert set(made.put) == {later, new}
    assert made.drop == (gone,)
    assert made.deferred == 0


def test_nothing_to_do_is_an_empty_plan() -> None:
    assert plan_differences([], MANY) == Plan(put=(), drop=())


def test_order_holes_before_blocks_longest_first_and_blocks_go_before_holes() -> None:
    desired = table(
        entry("2001:db8::/48"), entry("2001:db8:0:1::/64", Standing.GOOD), entry("2001:db8::1", Standing.BAD)
    )
    made = plan(desired, {}, MANY)
    assert [str(e.prefix) for e in made.put] == ["2001:db8::1/128", "2001:db8:0:1::/64", "2001:db8::/48"]
    made = plan({}, desired, MANY)
    assert [e.standing is Standing.BLOCK for e in made.drop] == [True, False, False]


def test_the_operator_goes_first_and_with_him_what_his_change_rests_on() -> None:
    learned = [entry(f"2001:db8:{i:x}::/48") for i in range(1, 14)]
    block = entry("2001:db8:ff00::/40", origin=Origin.OPERATOR)
    hole = entry("2001:db8:ff01::/48", Standing.GOOD)
    released = entry("198.51.100.0/24", origin=Origin.OPERATOR, expires_s=None)
    made = plan(table(*learned, block, hole), table(released), PlanParams(max_changes=5))
    assert made.put[0] == hole
    assert block in made.put
    assert made.drop == (released,)
    assert (len(made.put), made.deferred) == (4, 11)


def test_releases_are_not_starved_by_new_entries() -> None:
    new = [entry(f"2001:db8:{i:x}::/48") for i in range(1, 102)]
    old = entry("198.51.100.7")
    assert plan(table(*new), table(old), PlanParams(max_changes=7)).drop == (old,)


def test_escalation_leaves_no_gap_when_it_is_cut() -> None:
    children = [entry(f"2001:db8:0:{i:x}::/64") for i in range(1, 12)]
    parent = entry("2001:db8::/48")
    made = plan(table(parent), table(*children), PlanParams(max_changes=3))
    assert made.put == (parent,)
    assert len(made.drop) == 2


def test_a_block_with_more_holes_than_a_tick_holds_waits_for_all_of_them() -> None:
    holes = [entry(f"2001:db8:0:{i:x}::/64", Standing.GOOD) for i in range(1, 12)]
    block = entry("2001:db8::/48", origin=Origin.OPERATOR)
    desired, installed, ticks = table(block, *holes), Table(), 0
    while desired != installed:
        installed = after(installed, plan(desired, installed, PlanParams(max_changes=5)))
        ticks += 1
        assert block.key not in installed or len(installed) == 12
    assert ticks == 3


@pytest.mark.parametrize("max_changes", [1, 3, 7, 1000])
def test_every_step_is_safe_and_plans_converge(max_changes: int) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(53):
        first = random_table(rng, rng.randint(0, 17))
        desired = random_table(rng, rng.randint(0, 17))
        for key in [k for k in first if rng.random() < 0.3]:
            desired[key] = replace(first[key], standing=rng.choice(list(Standing)[1:]), expires_s=None)
        last = lengthened(desired)
        never = [
            (service, address)
            for service in Service
            for address in random_addresses(rng, (first, last))
            if not refuses(first.values(), service, address) and not refuses(last.values(), service, address)
        ]
        installed, wanted = first, Wanted({})
        wanted.update((), tuple(desired.values()), Guard(desired.values()))
        backlog = wanted.follow(installed)
        for _tick in range(len(first) + len(desired) + 101):
            made = backlog.plan(installed, PlanParams(max_changes=max_changes))
            assert len(made.put) + len(made.drop) <= max_changes
            if not backlog:
                break
            for step in [Plan(put=(e,), drop=()) for e in made.put] + [Plan(put=(), drop=(e,)) for e in made.drop]:
                installed = after(installed, step)
                wrong = [f"{s.name} {a}" for s, a in never if refuses(installed.values(), s, a)]
                assert not wrong, (step, wrong)
        assert installed == last
