"""What completed handshakes change for a SYN: a limit on open connections, and a budget that no forger spends."""

from __future__ import annotations

import pytest

from edge.abi import Level, Reason, Service, Standing
from edge.config import Config
from edge.core.prefix import LENGTHS, Prefix
from edge.parameters import Limits, MxLimits
from tests import packets as p
from tests.bpf.harness import SECOND, START_S, Harness, entry

pytestmark = pytest.mark.root

START = int(START_S * SECOND)
SENDER = "2001:db8:1:2::25"
DEFAULT = Config(mode="enforce").limits


def parent(level: Level, address: str = SENDER) -> str:
    return str(Prefix.parse(address).parent(LENGTHS[level]))


@pytest.mark.parametrize("level", [Level.L64, Level.L56, Level.L48, Level.L32])
def test_as_many_open_connections_as_a_level_allows(xdp: Harness, level: Level) -> None:
    most = DEFAULT.of(Service.MX, Standing.NEW, level).open
    xdp.tally(parent(level), opened=most - 1)
    assert xdp.judge(p.syn(SENDER)).reason is Reason.CONFORMING
    xdp.tally(parent(level), opened=most)
    judged = xdp.judge(p.syn(SENDER))
    assert (judged.reason, judged.length) == (Reason(Reason.OPEN_128 + level), LENGTHS[level])
    assert judged.dropped
    assert xdp.judge(p.syn("2001:db9:1:2::25")).reason is Reason.CONFORMING


def test_ipv4_has_its_own_levels(xdp: Harness) -> None:
    xdp.tally("192.0.2.0/24", opened=DEFAULT.of(Service.MX, Standing.NEW, Level.L56).open)
    judged = xdp.judge(p.syn("192.0.2.7"))
    assert (judged.reason, judged.length) == (Reason.OPEN_56, 56)


def test_a_refused_connection_charges_nothing(xdp: Harness) -> None:
    xdp.tally(parent(Level.L64), opened=50)
    for _ in range(17):
        xdp.judge(p.syn(SENDER))
    assert xdp.tables.rows.read(START)[0].sum() == 0


def test_services_are_counted_apart(xdp: Harness) -> None:
    xdp.tally(parent(Level.L64), opened=50, service=Service.SUBMISSION)
    assert xdp.judge(p.syn(SENDER, 25)).reason is Reason.CONFORMING
    assert xdp.judge(p.syn(SENDER, 587)).reason is Reason.OPEN_64


def test_standing_chooses_how_many_may_be_open(xdp: Harness) -> None:
    xdp.install(entry(parent(Level.L64), Standing.SUSPECT))
    xdp.tally(parent(Level.L64), opened=10)
    assert xdp.judge(p.syn(SENDER)).reason is Reason.OPEN_64
    xdp.install(entry(parent(Level.L64), Standing.GOOD))
    xdp.tally(parent(Level.L64), opened=199)
    assert xdp.judge(p.syn(SENDER)).reason is Reason.CONFORMING_GOOD
    xdp.tally(parent(Level.L64), opened=200)
    assert xdp.judge(p.syn(SENDER)).reason is Reason.OPEN_64
    xdp.install(entry(parent(Level.L64), Standing.ALLOW))
    assert xdp.judge(p.syn(SENDER)).reason is Reason.ALLOWED


def test_a_good_sender_is_not_asked_for_its_neighbours(xdp: Harness) -> None:
    xdp.tally(parent(Level.L48), opened=500)
    assert xdp.judge(p.syn(SENDER)).reason is Reason.OPEN_48
    xdp.install(entry(parent(Level.L64), Standing.GOOD))
    assert xdp.judge(p.syn(SENDER)).reason is Reason.CONFORMING_GOOD


def test_corrections_count(xdp: Harness) -> None:
    key = (Service.MX, Prefix.parse(parent(Level.L64)))
    xdp.tally(parent(Level.L64), opened=50)
    xdp.tables.corrections.write({key: -1})
    assert xdp.judge(p.syn(SENDER)).reason is Reason.CONFORMING
    xdp.tables.corrections.write({key: -51})
    assert xdp.judge(p.syn(SENDER)).reason is Reason.CONFORMING
    xdp.tables.corrections.write({key: 3})
    assert xdp.judge(p.syn(SENDER)).reason is Reason.OPEN_64
    xdp.tables.corrections.write({})
    assert xdp.judge(p.syn(SENDER)).reason is Reason.OPEN_64


def test_a_limit_on_open_connections_alone(xdp: Harness) -> None:
    """Without a rate the level keeps no row, and still counts what is open."""
    base = DEFAULT.mx.new
    alone = type(base)(l64=type(base.l64)(open=3))
    xdp.configure(Config(mode="enforce", limits=Limits(mx=MxLimits(new=alone))))
    xdp.tally(parent(Level.L64), opened=2)
    assert xdp.judge(p.syn(SENDER)).reason is Reason.CONFORMING
    xdp.tally(parent(Level.L64), opened=3)
    assert xdp.judge(p.syn(SENDER)).reason is Reason.OPEN_64


def spend(xdp: Harness, level: Level, reason: Reason) -> int:
    """Connect from ever new addresses (or /64s) below SENDER's prefix until they are refused; how many got in."""
    base = Prefix.parse(parent(level))
    for n in range(1, 100_000):
        hi, lo = (base.hi, n << 32) if level is Level.L64 else (base.hi | 0xFFFF - n % 1024, n)
        judged = xdp.judge(p.syn(str(Prefix(hi, lo, 128).network.network_address)))
        if judged.dropped:
            assert judged.reason is reason
            return n - 1
    raise AssertionError("never refused")


def forged(xdp: Harness, level: Level, *, until_s: float = START_S + 10) -> None:
    xdp.tables.forged.write({(Service.MX, Prefix.parse(parent(level))): int(until_s * SECOND)})
    xdp.tables.heartbeat(xdp.now_s)


@pytest.mark.parametrize("level", [Level.L64, Level.L48])
def test_verified_senders_of_a_forged_prefix_have_a_budget_of_their_own(xdp: Harness, level: Level) -> None:
    limits = {Level.L64: (SECOND // 10, 7)} if level is Level.L64 else {Level.L48: (SECOND // 10, 7)}
    xdp.limit(limits)
    refused = Reason(Reason.LIMIT_128 + level)
    assert spend(xdp, level, refused) == 7
    xdp.tally(parent(Level.L128 if level is Level.L64 else Level.L64))
    assert xdp.judge(p.syn(SENDER)).reason is refused  # nobody says that it is forged
    forged(xdp, level)
    passed = [xdp.judge(p.syn(SENDER)).reason for _ in range(8)]
    assert passed == [Reason.CONFORMING] * 7 + [refused]  # the same limit, once more
    assert xdp.judge(p.syn("2001:db8:1:ff::1" if level is Level.L48 else "2001:db8:1:2::bad")).reason is refused
    forged(xdp, level, until_s=START_S - 1)
    assert xdp.judge(p.syn(SENDER)).reason is refused


def test_verified_row_is_not_taken_for_the_forged_one(xdp: Harness) -> None:
    xdp.limit({Level.L64: (SECOND, 3)})
    xdp.tally(parent(Level.L128))
    forged(xdp, Level.L64)
    for _ in range(3):
        xdp.judge(p.syn(SENDER))
    assert len(xdp.tables.rows.read(START)[1]) == 0
    assert xdp.tables.rows.tat_ns(Prefix.parse(parent(Level.L64)), Service.MX) is None


def test_a_forged_ipv4_address_has_no_verified_part(xdp: Harness) -> None:
    """One address is one sender: only a challenge tells a forger of it from its owner."""
    xdp.limit({Level.L64: (SECOND, 3)})
    xdp.tally("192.0.2.25")
    xdp.tables.forged.write({(Service.MX, Prefix.parse("192.0.2.25")): int((START_S + 10) * SECOND)})
    xdp.tables.heartbeat(xdp.now_s)
    reasons = [xdp.judge(p.syn("192.0.2.25")).reason for _ in range(4)]
    assert reasons == [Reason.CONFORMING] * 3 + [Reason.LIMIT_64]
