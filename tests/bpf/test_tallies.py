"""The daemon's reading of the tallies, its marks, and what the XDP program makes of both: proposed for tests/bpf."""

from __future__ import annotations

import numpy as np
import pytest

from edge.abi import TALLIES_PER_SET, TALLY, Level, Reason, Service
from edge.config import Config
from edge.core.prefix import Prefix
from edge.kernel.connections import HELD, Connections
from edge.kernel.marks import Marks
from edge.kernel.program import U32
from edge.kernel.rows import mixed_key
from edge.parameters import Challenge
from tests import packets as p
from tests.bpf.harness import SECOND, START_S, Harness

pytestmark = pytest.mark.root

NETWORK = Prefix.parse("2001:db8:1:2::/64")
OTHER = Prefix.parse("2001:db8:1:3::/64")
START = int(START_S * SECOND)
FUTURE = START + 600 * SECOND


class Reading:
    """Readings of one row, which the test writes."""

    def __init__(self, xdp: Harness) -> None:
        self.xdp, self.now_ns = xdp, START
        self.connections = Connections(xdp.compiled.maps["connections"], xdp.sizes, xdp.tables.rows._seed)

    def put(self, completed: int, newcomers: int = 0, *, of: int = 0, service: Service = Service.MX) -> None:
        """`of`: whose row it is, a neighbour in the same set or not."""
        sets, mixed = self.xdp.sizes.sets(Level.L64), mixed_key(NETWORK, self.xdp.tables.rows._seed)
        row = np.zeros((), TALLY)
        row["tag"] = (mixed & ~(sets - 1) ^ of << 40) & (1 << 64) - 1 | HELD | service
        row["completed"], row["newcomers"], row["last_ns"] = completed, newcomers, self.now_ns
        index = (self.xdp.sizes.set_base(Level.L64) + mixed % sets) * TALLIES_PER_SET
        self.xdp.compiled.maps["connections"].put(np.array([index], U32), row)

    def next(self) -> list[tuple[int, int]]:
        """Completed and newcomers since the reading before."""
        self.now_ns += SECOND
        return [(int(row["completed"]), int(row["newcomers"])) for row in self.connections.read(self.now_ns)]


def test_nothing_counted_twice(xdp: Harness) -> None:
    reading = Reading(xdp)
    reading.put(13, 7)
    assert reading.next() == []  # what was there before us
    reading.put(17, 11)
    assert reading.next() == [(4, 4)]
    reading.put(3, 1, of=5)
    assert reading.next() == [(3, 1)]
    assert reading.next() == []
    reading.now_ns -= SECOND // 2  # seen late: its CPU was paused
    reading.put(5, 1, of=5)
    reading.now_ns += SECOND // 2
    assert reading.next() == [(2, 0)]


def test_a_row_that_came_back_to_its_prefix_begins_again(xdp: Harness) -> None:
    reading = Reading(xdp)
    reading.put(13, 7)
    reading.next()
    reading.put(2, 1)
    assert reading.next() == [(2, 1)]


def test_written_as_wanted(xdp: Harness) -> None:
    table = xdp.compiled.maps["forged"]
    marks = Marks(table)
    wide = Prefix.parse("2001:db8:1::/48")
    marks.write({(Service.MX, NETWORK): 3, (Service.SUBMISSION, wide): 5})
    assert marks.levels == 1 << Level.L64 | 1 << Level.L48
    marks.write({(Service.SUBMISSION, wide): 7})
    assert Marks(table).held == {(Service.SUBMISSION, wide): 7}
    marks.write({})
    assert (Marks(table).held, marks.levels) == ({}, 0)


def test_the_shortest_crowded_level_refuses(xdp: Harness) -> None:
    xdp.tally(str(NETWORK), opened=50)
    xdp.tally("2001:db8:1::/48", opened=500)
    # the harness marks one level; the program asks each slot
    levels = xdp.compiled.maps["crowded_levels"]
    both = np.zeros((), levels.value)
    both["prefixes"][[Level.L64, Level.L48]] = 1
    levels.put(np.zeros(1, U32), both)
    assert xdp.judge(p.syn("2001:db8:1:2::25")).reason is Reason.OPEN_48


def forged(xdp: Harness, prefix: Prefix, until_ns: int = FUTURE) -> None:
    xdp.tables.forged.write({(Service.MX, prefix): until_ns})
    xdp.tables.heartbeat(xdp.now_s)


def spend(xdp: Harness, *, port: int = 25) -> None:
    xdp.limit({Level.L64: (SECOND, 1)})
    xdp.judge(p.syn("2001:db8:1:2::1", port))


@pytest.mark.parametrize(
    ("tally", "until_ns", "port"),
    [
        ("2001:db8:1:2::25/128", START - 1, 25),  # no longer forged
        ("2001:db8:1:2::/64", FUTURE, 25),  # its neighbours are known, it is not
        ("2001:db8:1:2::25/128", FUTURE, 587),  # the other service is forged
    ],
)
def test_who_is_not_spared(xdp: Harness, tally: str, until_ns: int, port: int) -> None:
    spend(xdp, port=port)
    xdp.tally(tally, service=Service.MX if port == 25 else Service.SUBMISSION)
    forged(xdp, NETWORK, until_ns)
    assert xdp.judge(p.syn("2001:db8:1:2::25", port)).reason is Reason.LIMIT_64


def test_only_the_forged_level_is_challenged(xdp: Harness) -> None:
    xdp.configure(Config(mode="enforce", challenge=Challenge(mode="auto")))
    spend(xdp)
    forged(xdp, Prefix.parse("2001:db8:1::/48"))
    xdp.limit({Level.L64: (SECOND, 1), Level.L48: (SECOND, 97)})
    assert xdp.judge(p.syn("2001:db8:1:2::25")).reason is Reason.LIMIT_64
