"""The challenge in the loaded program: who is asked, how the answer is taken, and the way around it."""

from __future__ import annotations

import struct
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
from edge.parameters import Challenge
from tests import packets as p
from tests.bpf.harness import SECOND, SMALL, START_S, Harness, entry

pytestmark = pytest.mark.root

SENDER = "2001:db8:1:2::25"
SPENT = Prefix.parse("2001:db8:1:2::/64")
AUTO = Config(mode="enforce", challenge=Challenge(mode="auto"))
XDP_DROP, XDP_PASS, XDP_TX = 1, 2, 3  # uapi/linux/bpf.h
START = int(START_S * SECOND)


def spent(xdp: Harness, *, config: Config = AUTO, forged: bool = True) -> None:
    """One connection an hour for the /64, spent, and marked as forged."""
    xdp.configure(config)
    xdp.limit({Level.L64: (3600 * SECOND, 1)})
    if forged:
        xdp.tables.forged.write({(Service.MX, SPENT): START + 600 * SECOND})
    xdp.tables.heartbeat(xdp.now_s)
    assert xdp.judge(p.syn("2001:db8:1:2::1")).reason is Reason.CONFORMING


def test_only_where_wanted_and_only_where_forged(xdp: Harness) -> None:
    spent(xdp)
    judged = xdp.judge(p.syn(SENDER))
    assert (judged.reason, judged.dropped, judged.length) == (Reason.CHALLENGED, True, 64)
    xdp.reset()
    spent(xdp, config=Config(mode="enforce"))
    assert xdp.judge(p.syn(SENDER)).reason is Reason.LIMIT_64
    xdp.reset()
    spent(xdp, forged=False)
    assert xdp.judge(p.syn(SENDER)).reason is Reason.LIMIT_64


def test_before_the_limit_is_spent_nobody_is_asked(xdp: Harness) -> None:
    xdp.configure(AUTO)
    xdp.tables.forged.write({(Service.MX, SPENT): START + 600 * SECOND})
    xdp.tables.heartbeat(xdp.now_s)
    assert xdp.judge(p.syn(SENDER)).reason is Reason.CONFORMING


def test_what_has_no_plain_header_is_judged_by_the_limit(xdp: Harness) -> None:
    spent(xdp)
    hidden = p.ethernet(p.ipv6(SENDER, p.extension(p.TCP, p.tcp()), following=p.DESTINATION))
    assert xdp.judge(hidden).reason is Reason.LIMIT_64


def test_observe_counts_and_passes(xdp: Harness) -> None:
    spent(xdp, config=Config(mode="observe", challenge=Challenge(mode="auto")))
    judged = xdp.judge(p.syn(SENDER))
    assert (judged.reason, judged.dropped) == (Reason.CHALLENGED, False)


def test_a_late_retransmission_meets_the_shared_budget(xdp: Harness) -> None:
    """Seen in an earlier window of two seconds, by address, ports and sequence number."""
    spent(xdp)
    base = START_S + 100.0  # where a window begins
    frame = p.syn(SENDER)
    reasons = [xdp.judge(frame, base + after).reason for after in (0.1, 1.1, 3.1, 7.1)]
    assert reasons == [Reason.CHALLENGED, Reason.CHALLENGED, Reason.UNTRACKED, Reason.UNTRACKED]
    assert xdp.judge(p.syn(SENDER, sport=40001), base + 7.2).reason is Reason.CHALLENGED
    assert xdp.judge(frame, base + 17.1).reason is Reason.CHALLENGED  # forgotten


def test_when_the_shared_budget_is_spent_they_are_asked_again(xdp: Harness) -> None:
    spent(xdp)
    base = START_S + 100.0
    frames = [p.syn(SENDER, sport=1024 + n) for n in range(1009)]
    for frame in frames:
        assert xdp.judge(frame, base + 0.1).reason is Reason.CHALLENGED
    reasons = [xdp.judge(frame, base + 2.1).reason for frame in frames]
    assert reasons.count(Reason.UNTRACKED) == 1000  # limits.untracked: burst
    assert reasons.count(Reason.CHALLENGED) == 9


@pytest.mark.parametrize("address", [SENDER, "192.0.2.25"])
def test_in_a_flood_from_everywhere_strangers_are_asked_first(xdp: Harness, address: str) -> None:
    xdp.configure(AUTO)
    xdp.tables.flood_until_s = START_S + 10.0
    xdp.tables.heartbeat(xdp.now_s)
    assert xdp.judge(p.syn(address)).reason is Reason.CHALLENGED
    assert xdp.tables.rows.read(START)[0].sum() == 0  # and charged for nothing
    assert xdp.judge(p.syn(address), START_S + 11).reason is Reason.CONFORMING
    unit = str(Prefix.parse(address).parent(64))
    xdp.install(entry(unit, Standing.GOOD))
    assert xdp.judge(p.syn(address)).reason is Reason.CONFORMING_GOOD
    xdp.tables.policy.apply((), tuple(xdp.tables.policy.installed().values()))
    xdp.tally(unit)
    assert xdp.judge(p.syn(address)).reason is Reason.CONFORMING


def test_a_flood_changes_nothing_where_no_challenge_is_wanted(xdp: Harness) -> None:
    xdp.configure(Config(mode="enforce"))
    xdp.tables.flood_until_s = START_S + 10.0
    xdp.tables.heartbeat(xdp.now_s)
    assert xdp.judge(p.syn(SENDER)).reason is Reason.CONFORMING


class Live:
    """The live program on the kernel's clock, with private maps: what it sends back can be seen."""

    def __init__(self) -> None:
        self.compiled = compile_programs(SMALL, pins=None)
        write_identity(self.compiled.maps, SMALL, 1)
        self.tables = Tables(self.compiled.maps, SMALL)
        self.tables.configure(AUTO, time.monotonic())
        for level in Level:
            index = (Service.MX * STANDINGS + Standing.NEW) * LEVELS + level
            value = np.array((600 * SECOND if level is Level.L64 else 0, 0, 0), LIMIT)
            self.compiled.maps["limits"].put(np.array([index], U32), value)
        self.tables.forged.write({(Service.MX, SPENT): time.monotonic_ns() + 600 * SECOND})
        self.tables.heartbeat(time.monotonic())

    def run(self, frame: bytes) -> tuple[int, bytes]:
        return libbpf.run_frame(self.compiled.programs["edge_xdp"], frame)

    def counted(self, reason: Reason) -> int:
        return int(self.tables.read(time.monotonic()).counters[reason].sum())


@pytest.fixture(scope="module")
def live() -> Live:
    return Live()


def reset_of(answer: bytes) -> bytes:
    """What a client that asked for something else sends back: RST, its sequence number the acknowledgement."""
    acknowledged = struct.unpack("!I", answer[14 + 40 + 8 : 14 + 40 + 12])[0]
    sport = struct.unpack("!H", answer[14 + 40 + 2 : 14 + 40 + 4])[0]
    to = answer[14 + 24 : 14 + 40]
    tcp = struct.pack("!HHIIBBHHH", sport, 25, acknowledged, 0, 5 << 4, p.RST, 0, 0, 0)
    return answer[:12] + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, 20, 6, 64) + to + answer[14 + 8 : 14 + 24] + tcp


def test_a_client_that_answers_gets_in_and_no_other(live: Live) -> None:
    assert live.run(p.syn("2001:db8:1:2::1"))[0] == XDP_PASS  # spends the one connection there is
    # options: more than an answer needs
    whole = p.ethernet(p.ipv6(SENDER, p.tcp(words=10) + bytes(20)))
    action, answer = live.run(whole)
    assert (action, len(answer)) == (XDP_TX, 14 + 40 + 20)
    assert live.run(reset_of(answer)) == (XDP_PASS, reset_of(answer))
    assert live.counted(Reason.PROVED) == 1
    assert live.run(whole)[0] == XDP_PASS  # its budget: one connection, in a row of its own
    assert live.run(whole)[0] == XDP_DROP
    assert live.run(p.syn(SENDER, sport=40001))[0] == XDP_TX
    assert live.run(p.syn("2001:db8:1:2::26"))[0] == XDP_TX
    assert live.counted(Reason.LIMIT_64) == 1


def test_a_wrong_cookie_proves_nothing(live: Live) -> None:
    other = p.syn("2001:db8:1:2::99")
    action, answer = live.run(other)
    assert action == XDP_TX
    proved = live.counted(Reason.PROVED)
    right = reset_of(answer)
    for at, what in ((14 + 40 + 7, "cookie"), (14 + 40 + 1, "port"), (14 + 8 + 15, "address")):
        wrong = bytearray(right)
        wrong[at] ^= 1
        assert live.run(bytes(wrong))[0] == XDP_PASS, what
    acknowledging = bytearray(right)
    acknowledging[14 + 40 + 13] = p.RST | p.ACK
    assert live.run(bytes(acknowledging))[0] == XDP_PASS
    assert live.counted(Reason.PROVED) == proved
    assert live.run(other)[0] == XDP_TX
