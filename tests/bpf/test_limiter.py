"""GCRA in the loaded program: the bound, the chain, and what happens when a table is full."""

from __future__ import annotations

import os
import random
import threading
import time

import numpy as np
import pytest

from edge.abi import LEVELS, LIMIT, STANDINGS, Level, Reason, Service, Standing
from edge.config import Config
from edge.core.prefix import Prefix
from edge.kernel import libbpf
from edge.kernel.compile import compile_programs, write_identity
from edge.kernel.maps import Tables
from edge.kernel.program import U32
from edge.kernel.rows import mixed_key
from tests import packets as p
from tests.bpf.harness import SECOND, SMALL, START_S, Harness, entry
from tests.bpf.model import Model

pytestmark = pytest.mark.root

START = int(START_S * SECOND)
LIMIT_REASON = {level: Reason(Reason.LIMIT_128 + level) for level in Level}


def source(hi: int, lo: int) -> str:
    from ipaddress import IPv6Address

    return str(IPv6Address(hi << 64 | lo))


def test_burst_then_rate(xdp: Harness) -> None:
    xdp.limit({Level.L64: (SECOND, 7)})
    frame = p.syn("2001:db8:1:2::3")
    assert [xdp.judge_ns(frame, START).dropped for _ in range(11)] == [False] * 7 + [True] * 4
    assert xdp.judge_ns(frame, START + SECOND - 1).dropped
    assert not xdp.judge_ns(frame, START + SECOND).dropped
    assert xdp.judge_ns(frame, START + SECOND).dropped
    assert not xdp.judge_ns(p.syn("2001:db8:1:3::3"), START).dropped


def test_every_address_of_a_64_shares_its_limit(xdp: Harness) -> None:
    xdp.limit({Level.L64: (SECOND, 5)})
    admitted = sum(not xdp.judge_ns(p.syn(f"2001:db8:1:2::{n:x}"), START).dropped for n in range(1, 48))
    assert admitted == 5


@pytest.mark.parametrize("level", [Level.L64, Level.L56, Level.L48, Level.L32])
def test_limit_of_each_level_names_it(xdp: Harness, level: Level) -> None:
    xdp.limit({level: (SECOND, 3)})
    judged = [xdp.judge_ns(p.syn("2001:db8:1:2::3"), START) for _ in range(5)]
    assert [j.reason for j in judged] == [Reason.CONFORMING] * 3 + [LIMIT_REASON[level]] * 2
    assert judged[-1].length == (128, 64, 56, 48, 32)[level]


def test_ipv4_is_limited_at_its_own_three_levels(xdp: Harness) -> None:
    xdp.limit({Level.L48: (SECOND, 3), Level.L32: (SECOND, 1)})
    reasons = [xdp.judge_ns(p.syn(f"198.51.{n}.7"), START).reason for n in range(5)]
    assert reasons == [Reason.CONFORMING] * 3 + [Reason.LIMIT_48] * 2


def test_refused_at_one_level_charges_none(xdp: Harness) -> None:
    xdp.limit({Level.L64: (SECOND, 2), Level.L48: (SECOND, 5)})
    for _ in range(13):
        xdp.judge_ns(p.syn("2001:db8:1:2::3"), START)
    # the /48 was charged twice, not thirteen times: three are left for the neighbours
    admitted = sum(not xdp.judge_ns(p.syn(f"2001:db8:1:{n:x}::3"), START).dropped for n in range(16, 27))
    assert admitted == 3


def test_good_cuts_the_chain_and_charges_no_shorter_level(xdp: Harness) -> None:
    xdp.limit({Level.L64: (SECOND, 2), Level.L48: (SECOND, 3)})
    xdp.limit({Level.L64: (SECOND, 11)}, Standing.GOOD)
    xdp.install(entry("2001:db8:1:2::/64", Standing.GOOD))
    reasons = [xdp.judge_ns(p.syn("2001:db8:1:2::3"), START).reason for _ in range(13)]
    assert reasons == [Reason.CONFORMING_GOOD] * 11 + [Reason.LIMIT_64] * 2
    admitted = sum(not xdp.judge_ns(p.syn(f"2001:db8:1:{n:x}::3"), START).dropped for n in range(16, 23))
    assert admitted == 3


def test_suspect_and_bad_do_not_cut_the_chain(xdp: Harness) -> None:
    xdp.limit({Level.L48: (SECOND, 3)})
    xdp.limit({Level.L64: (SECOND, 5)}, Standing.SUSPECT)
    xdp.install(entry("2001:db8:1:2::/64", Standing.SUSPECT))
    reasons = [xdp.judge_ns(p.syn("2001:db8:1:2::3"), START).reason for _ in range(5)]
    assert reasons == [Reason.CONFORMING] * 3 + [Reason.LIMIT_48] * 2


def test_allow_above_a_suspect_cuts_the_chain_there(xdp: Harness) -> None:
    xdp.limit({Level.L48: (SECOND, 2), Level.L32: (SECOND, 2)})
    xdp.limit({Level.L64: (SECOND, 5)}, Standing.SUSPECT)
    xdp.install(entry("2001:db8:1:2::/64", Standing.SUSPECT), entry("2001:db8:1::/48", Standing.ALLOW))
    reasons = [xdp.judge_ns(p.syn("2001:db8:1:2::3"), START).reason for _ in range(7)]
    assert reasons == [Reason.CONFORMING_GOOD] * 5 + [Reason.LIMIT_64] * 2


def test_allow_has_no_limit_and_charges_nothing(xdp: Harness) -> None:
    xdp.limit({Level.L64: (SECOND, 2), Level.L32: (SECOND, 2)})
    xdp.install(entry("2001:db8:1:2::3", Standing.ALLOW))
    assert all(xdp.judge_ns(p.syn("2001:db8:1:2::3"), START).reason is Reason.ALLOWED for _ in range(17))
    assert not xdp.judge_ns(p.syn("2001:db8:1:2::4"), START).dropped


def test_address_limit_binds_only_named_addresses(xdp: Harness) -> None:
    xdp.limit({Level.L128: (SECOND, 3)}, Standing.BAD)
    xdp.install(entry("2001:db8:1:2::3", Standing.BAD))
    assert [xdp.judge_ns(p.syn("2001:db8:1:2::3"), START).reason for _ in range(5)] == [
        *[Reason.CONFORMING] * 3,
        *[Reason.LIMIT_128] * 2,
    ]
    assert not xdp.judge_ns(p.syn("2001:db8:1:2::4"), START).dropped


def test_released_prefix_does_not_serve_the_old_sentence(xdp: Harness) -> None:
    xdp.limit({Level.L64: (SECOND, 7)})
    xdp.limit({Level.L64: (300 * SECOND, 1)}, Standing.BAD)
    bad = entry("2001:db8:1:2::/64", Standing.BAD)
    xdp.install(bad)
    frame = p.syn("2001:db8:1:2::3")
    assert [xdp.judge_ns(frame, START).dropped for _ in range(3)] == [False, True, True]
    xdp.tables.policy.apply((), (bad,))
    # it starts with its burst spent, then at the rate; not 300 seconds later
    assert [xdp.judge_ns(frame, START).dropped for _ in range(3)] == [False, True, True]
    assert not xdp.judge_ns(frame, START + SECOND).dropped


@pytest.mark.parametrize("interval", [SECOND, SECOND // 1009])
def test_clocks_that_differ_between_cpus_admit_no_more(xdp: Harness, interval: int) -> None:
    """A CPU whose clock was read earlier meets a TAT further ahead than its own clock allows."""
    xdp.limit({Level.L64: (interval, 3)})
    frame = p.syn("2001:db8:1:2::3")
    assert sum(not xdp.judge_ns(frame, START).dropped for _ in range(5)) == 3
    for behind in (1, 9, 1009, 1_000_003, 10_000_019, 100_000_007):
        assert xdp.judge_ns(frame, START - behind).dropped, f"{behind} ns behind"


@pytest.mark.parametrize(("interval", "burst"), [(100_003, 31), (20_000_003, 3)])
def test_two_cpus_never_exceed_the_bound(interval: int, burst: int) -> None:
    """The live entry point, hammered on one prefix from every CPU at once, with the kernel's own clock; with the longer
    interval, the clock that is read once a tick is enough to refuse most."""
    compiled = compile_programs(SMALL, pins=None)
    write_identity(compiled.maps, SMALL, 1)
    tables = Tables(compiled.maps, SMALL)
    tables.configure(Config(mode="enforce"), time.monotonic())
    for level in Level:
        value = (interval, interval * (burst - 1)) if level is Level.L64 else (0, 0)
        index = (Service.MX * STANDINGS + Standing.NEW) * LEVELS + level
        compiled.maps["limits"].put(np.array([index], U32), np.array((*value, 0), LIMIT))
    cpus = sorted(os.sched_getaffinity(0))
    began = time.monotonic_ns()

    def hammer(cpu: int) -> None:
        os.sched_setaffinity(0, {cpu})  # of this thread
        for _ in range(7):
            libbpf.run_packet(compiled.programs["edge_xdp"], p.syn("2001:db8:1:2::3"), repeat=100_003)

    threads = [threading.Thread(target=hammer, args=(cpu,)) for cpu in cpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.monotonic_ns() - began
    counters = tables.read(time.monotonic()).counters
    sent, admitted = int(counters.sum()), int(counters[Reason.CONFORMING, 0])
    assert sent == 7 * 100_003 * len(cpus)
    assert admitted <= burst + elapsed / interval + len(cpus) - 1
    assert admitted > burst, "the rate must have admitted some more"


def test_random_schedules_agree_with_the_model(xdp: Harness) -> None:
    """Thousands of SYNs over nested prefixes, services and standings: the same decision each time, to the level."""
    agree_with_the_model(xdp)


def agree_with_the_model(xdp: Harness) -> None:
    """Run a random schedule through the program and the model."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    limits = {
        (standing, level): (rng.randrange(SECOND // 100, SECOND), rng.randrange(1, 13))
        for standing in (Standing.NEW, Standing.GOOD, Standing.SUSPECT, Standing.BAD)
        for level in Level
    }
    for standing in (Standing.NEW, Standing.GOOD, Standing.SUSPECT, Standing.BAD):
        xdp.limit({level: limits[standing, level] for level in Level}, standing)
    model = Model(limits)
    own = {
        "2001:db8:0:1::/64": Standing.GOOD,
        "2001:db8:0:2::/64": Standing.SUSPECT,
        "2001:db8:0:3::5/128": Standing.BAD,
        "2001:db8:1::/48": Standing.SUSPECT,
        "2001:db8:0:100::/56": Standing.GOOD,
    }
    entries = [entry(text, standing, service=service) for text, standing in own.items() for service in Service]
    xdp.install(*entries)
    by_key = {e.key: e for e in entries}
    now, refused = START, 0
    for n in range(4001):
        now += rng.randrange(SECOND // 20)
        hi = 0x20010DB8 << 32 | rng.choice([0, 1]) << 16 | rng.choice([1, 2, 3, 4, 0x101, 0x102])
        lo, service = rng.choice([5, 6]), rng.choice(list(Service))
        chosen: dict[Level, Standing] = {}
        cut = 5
        for level in Level:
            found = by_key.get((service, Prefix.of(hi, lo, (128, 64, 56, 48, 32)[level])))
            if found is not None:
                chosen[level] = found.standing
                if found.standing is Standing.GOOD:
                    cut = level + 1
                    break
        expected = model.judge(hi, lo, service, now, chosen, cut)
        judged = xdp.judge_ns(p.syn(source(hi, lo), 25 if service is Service.MX else 465), now)
        admitted = Reason.CONFORMING_GOOD if cut < 5 else Reason.CONFORMING
        wanted = admitted if expected is None else LIMIT_REASON[expected]
        assert judged.reason is wanted, f"packet {n} of {source(hi, lo)} {service.name}"
        refused += judged.dropped
    assert 400 < refused < 3600, "the schedule must meet limits and pass some"


def test_rows_are_read_back(xdp: Harness) -> None:
    xdp.limit(dict.fromkeys(Level, (10 * SECOND, 13)))
    for n in range(1, 12):
        xdp.judge_ns(p.syn(f"2001:db8:1:{n:x}::3"), START)
    rows = xdp.tables.rows
    assert rows.read(START)[0].tolist() == [0, 11, 1, 1, 1]
    assert rows.tat_ns(Prefix.parse("2001:db8:1:5::/64"), Service.MX) == START + 10 * SECOND
    assert rows.tat_ns(Prefix.parse("2001:db8:1:5::/64"), Service.SUBMISSION) is None
    rows.spent_ns[Level.L64] = 9 * SECOND
    limited = rows.read(START)[1]
    found = set(limited["hi"][limited["level"] == Level.L64].tolist())
    assert found == {0x20010DB8_00010000 | n for n in range(1, 12)}
    assert rows.read(START + 10 * SECOND)[0][Level.L64] == 0


def test_mix_is_undone() -> None:
    from edge.kernel.rows import mix, unmix

    rng = random.Random(11)
    numbers = [rng.getrandbits(64) for _ in range(1009)] + [0, (1 << 64) - 1]
    assert unmix(np.array([mix(x) for x in numbers], np.uint64)).tolist() == numbers


def test_every_row_of_a_line_is_found(xdp: Harness) -> None:
    """Four prefixes share a line, each with a row of its own; a fifth finds no room and is charged at the /48."""
    xdp.limit({Level.L64: (3600 * SECOND, 1), Level.L48: (SECOND // 1000, 10**6)})
    lines, identity = SMALL.lines(Level.L64), xdp.compiled.maps["identity"].get(np.zeros(1, U32))
    assert identity is not None
    numbers = (0x20010DB8_00000000 | n for n in range(1 << 20))
    sharing = (n for n in numbers if mixed_key(Prefix(n, 0, 64), int(identity["seed"])) % lines == 7)
    *four, fifth = (p.syn(source(next(sharing), 1)) for _ in range(5))
    assert [xdp.judge_ns(frame, START).reason for frame in four] == [Reason.CONFORMING] * 4
    assert [xdp.judge_ns(frame, START).reason for frame in four] == [Reason.LIMIT_64] * 4
    assert [xdp.judge_ns(fifth, START).reason for _ in range(3)] == [Reason.CONFORMING] * 3


def test_a_full_table_charges_the_shorter_prefix(xdp: Harness) -> None:
    """More live /64s than the level has rows: newcomers are admitted and counted at their shorter levels, and no live
    row loses its place."""
    xdp.limit({Level.L64: (3600 * SECOND, 1), Level.L48: (SECOND // 1000, 10**6), Level.L32: (SECOND // 1000, 10**6)})
    capacity = SMALL.rows[Level.L64]
    early = [p.syn(source(0x20010DB8_00000000 | n, 1)) for n in range(97)]
    for frame in early:
        assert xdp.judge_ns(frame, START).reason is Reason.CONFORMING
    for n in range(97, 3 * capacity):
        assert xdp.judge_ns(p.syn(source(0x20010DB8_00000000 | n, 1)), START).reason is Reason.CONFORMING
    active = xdp.tables.rows.read(START)[0]
    assert active[Level.L64] > capacity * 0.99
    assert all(xdp.judge_ns(frame, START).reason is Reason.LIMIT_64 for frame in early)
    # rows free themselves: an hour later the same newcomers have their own again
    assert xdp.tables.rows.read(START + 3600 * SECOND)[0][Level.L64] == 0


def test_no_room_anywhere_verified_pass_and_others_share_a_budget(xdp: Harness) -> None:
    xdp.limit({Level.L64: (3600 * SECOND, 1)})
    for n in range(6 * SMALL.rows[Level.L64]):
        xdp.judge_ns(p.syn(source(0x20010DB8_00000000 | n, 1)), START)
    counters = xdp.counters()
    burst = 1000  # limits.untracked
    assert counters[Reason.UNTRACKED] == (burst, 0)
    assert counters[Reason.LIMIT_UNTRACKED][1] > burst
    newcomer = 0x20010DB8_0F000000
    while xdp.judge_ns(p.syn(source(newcomer, 1)), START).reason is not Reason.LIMIT_UNTRACKED:
        newcomer += 1
    xdp.tally(str(Prefix(newcomer, 0, 64)))
    assert xdp.judge_ns(p.syn(source(newcomer, 1)), START).reason is Reason.VERIFIED


def test_without_limits_nothing_is_limited(xdp: Harness) -> None:
    xdp.limit({})
    for _ in range(101):
        assert xdp.judge_ns(p.syn("2001:db8:1:2::3"), START).reason is Reason.CONFORMING
    assert xdp.tables.rows.read(START)[0].sum() == 0
