"""The lines in which a packet finds policy entries: whatever was written last, and however full they are, they say what
the record says."""

from __future__ import annotations

import random
from ipaddress import IPv6Address
from itertools import pairwise

import numpy as np
import pytest

from edge.abi import POLICY_LINE, Reason, Standing
from edge.core.model import Entry
from edge.core.prefix import Prefix
from edge.kernel.program import U32
from edge.kernel.rows import mixed_key
from tests import packets as p
from tests.bpf.harness import START_S, Harness, entry
from tests.bpf.test_policy import restarted, seed

pytestmark = pytest.mark.root

EXPECTED = {
    None: Reason.CONFORMING,
    Standing.BLOCK: Reason.BLOCKED_LEARNED,
    Standing.ALLOW: Reason.ALLOWED,
    Standing.GOOD: Reason.CONFORMING_GOOD,
    Standing.SUSPECT: Reason.CONFORMING,
}


def source(number: int) -> str:
    return str(IPv6Address(0x20010DB8 << 96 | number << 64 | 3))


def verdict(xdp: Harness, number: int) -> Reason:
    return xdp.judge(p.syn(source(number))).reason


def of_64(number: int, standing: Standing, expires_s: float | None = None) -> Entry:
    return entry(str(Prefix(0x20010DB8 << 32 | number, 0, 64)), standing, expires_s=expires_s)


def in_one_line(xdp: Harness, count: int) -> list[int]:
    """Numbers of /64s whose entries share one line of the map policy_lines."""
    lines, found = xdp.sizes.policy_lines, dict[int, list[int]]()
    for number in range(1 << 20):
        line = found.setdefault(mixed_key(Prefix(0x20010DB8 << 32 | number, 0, 64), seed(xdp)) % lines, [])
        line.append(number)
        if len(line) == count:
            return line
    raise AssertionError(f"no {count} of a million prefixes share one of {lines} lines")


def test_nothing_is_overlooked(xdp: Harness) -> None:
    """Thrice as many entries as lines: many lines have more than they hold, and it changes all the time."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    xdp.limit({})
    xdp.limit({}, Standing.GOOD)
    standings = [Standing.BLOCK, Standing.ALLOW, Standing.GOOD]
    wanted: dict[int, Standing] = {}
    for _ in range(5):
        put = {number: rng.choice(standings) for number in rng.sample(range(5003), 1499)}
        gone = [number for number in wanted if number not in put and rng.random() < 0.3]
        xdp.install(*(of_64(number, standing) for number, standing in put.items()))
        xdp.tables.policy.apply((), [of_64(number, wanted.pop(number)) for number in gone])
        wanted |= put
        for number in rng.sample(range(5003), 997):
            assert verdict(xdp, number) is EXPECTED[wanted.get(number)], source(number)
    assert len(wanted) > 2 * xdp.sizes.policy_lines
    assert len(xdp.tables.policy._lines._left_out) > 50, "some entries must have found no room"
    xdp.tables.policy.apply((), [of_64(number, standing) for number, standing in wanted.items()])
    assert not xdp.compiled.maps["policy_lines"].items()[1]["tag"].any()


def test_entries_of_one_line_keep_their_own_expiry(xdp: Harness) -> None:
    xdp.limit({})
    numbers = in_one_line(xdp, 7)
    xdp.install(*(of_64(number, Standing.BLOCK, START_S + 10 + n) for n, number in enumerate(numbers)))
    for later in range(10, 18):
        for n, number in enumerate(numbers):
            blocked = xdp.judge(p.syn(source(number)), START_S + later).dropped
            assert blocked is (n + 10 > later), f"{source(number)} after {later} s"


class Killed(Exception):
    """Stands for the end of the daemon."""


class Dying:
    """The words of the map policy_lines, for a daemon that lives for so many stores more."""

    def __init__(self, words: memoryview, stores: int) -> None:
        self._words, self._left = words, stores

    def __getitem__(self, at: slice | int) -> memoryview | int:
        found: memoryview | int = self._words[at]
        return found

    def __setitem__(self, at: int, word: int) -> None:
        if not self._left:
            raise Killed
        self._left -= 1
        self._words[at] = word


@pytest.mark.parametrize("others", [0, 3, 4, 5], ids=lambda n: f"{n} others in the line")
@pytest.mark.parametrize("stores", range(4))
def test_never_a_wrong_entry(xdp: Harness, others: int, stores: int) -> None:
    """Whichever store the daemon is killed after, the prefix has its old entry, its new one or none; the others have
    theirs; and the next daemon puts it right."""
    xdp.limit({})
    number, *rest = in_one_line(xdp, 1 + others)
    block, expired, allow = (Standing.BLOCK, None), (Standing.BLOCK, START_S - 99), (Standing.ALLOW, START_S + 99)
    states = [None, block, allow, expired, allow, None]
    for before, after in pairwise(states):
        xdp.reset()
        xdp.limit({})
        xdp.install(*(of_64(n, Standing.ALLOW) for n in rest[:3]))
        if before:
            xdp.install(of_64(number, *before))
        xdp.install(*(of_64(n, Standing.ALLOW) for n in rest[3:]))
        lines = xdp.tables.policy._lines
        alive, lines._words = lines._words, Dying(lines._words, stores)  # type: ignore[assignment]  # stands in for it
        try:
            if after:
                xdp.install(of_64(number, *after))
            else:
                xdp.tables.policy.apply((), [of_64(number, Standing.BLOCK)])
        except Killed:
            pass
        assert verdict(xdp, number) in {now(before), now(after), Reason.CONFORMING}
        lines._words = alive
        xdp.tables.policy = restarted(xdp)
        recorded = xdp.tables.policy.installed().get(of_64(number, Standing.BLOCK).key)
        assert verdict(xdp, number) is now((recorded.standing, recorded.expires_s) if recorded else None)
        assert [verdict(xdp, n) for n in rest] == [Reason.ALLOWED] * others


def now(state: tuple[Standing, float | None] | None) -> Reason:
    """What a prefix with such an entry gets at START_S."""
    if state is None or (state[1] is not None and state[1] <= START_S):
        return Reason.CONFORMING
    return EXPECTED[state[0]]


def test_a_new_daemon_trusts_the_record_and_nothing_else(xdp: Harness) -> None:
    """Lines full of anything, also of true tags in the wrong place."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    xdp.limit({})
    xdp.limit({}, Standing.GOOD)
    wanted = {number: rng.choice([Standing.BLOCK, Standing.ALLOW, Standing.GOOD]) for number in range(0, 2003, 2)}
    xdp.install(*(of_64(number, standing) for number, standing in wanted.items()))
    table = xdp.compiled.maps["policy_lines"]
    lines = table.items()[1].reshape(-1)
    for index in range(len(lines)):
        if rng.random() < 0.5:
            line = lines[index].copy()
            for way in range(4):
                if rng.random() < 0.5:
                    line["tag"][way] = rng.choice([0, rng.getrandbits(64), lines[index]["tag"][rng.randrange(4)]])
                    line["expires_ns"][way] = rng.choice([0, 1, rng.getrandbits(62)])
            table.put(np.array([index], U32), np.array(line, POLICY_LINE))
    xdp.tables.policy = restarted(xdp)
    for number in range(2003):
        assert verdict(xdp, number) is EXPECTED[wanted.get(number)], source(number)
    xdp.tables.policy.apply((), tuple(xdp.tables.policy.installed().values()))
    assert not table.items()[1]["tag"].any()
