"""Prefixes whose SYNs are forged are told from those whose senders are just many."""

from __future__ import annotations

import numpy as np
import pytest

from edge.abi import REASONS, Level, Reason, Service, Standing
from edge.config import Config
from edge.core.forgery import Forgery, ForgeryParams, Saturated
from edge.core.model import batch
from edge.core.prefix import Prefix
from edge.core.snapshot import CONNECTIONS, Delta
from edge.core.step import Inputs, Outcome, step
from tests.core.worlds import World, ham

SPENT = Prefix.parse("2001:db8:1:2::/64")
WIDE = Prefix.parse("2001:db8:1::/48")
PARAMS = ForgeryParams()


def saturated(prefix: Prefix = SPENT) -> Saturated:
    return Saturated(service=Service.MX, prefix=prefix, admits_per_s=10.0)


def handshakes(completed: int, newcomers: int = 0, prefix: Prefix = SPENT) -> np.ndarray:
    rows = np.zeros(3, CONNECTIONS)
    rows["hi"], rows["level"] = prefix.hi, prefix.level
    rows["completed"], rows["newcomers"] = (completed, 997, 997), (newcomers, 997, 997)
    rows["service"][1] = Service.SUBMISSION  # another service and another level, which must not count
    rows["level"][2] = Level.L32
    return rows


class Watch:
    """Forgery with a clock of one second a tick."""

    def __init__(self) -> None:
        self.forgery, self.now_s = Forgery(), 100.0

    def tick(
        self, completed: int, newcomers: int = 0, *, prefix: Prefix = SPENT, spent: bool = True
    ) -> dict[tuple[Service, Prefix], float]:
        self.now_s += 1.0
        found = (saturated(prefix),) if spent else ()
        counted = handshakes(completed, newcomers, prefix)
        return self.forgery.observe(found, counted, 1.0, self.now_s, PARAMS)


def test_three_ticks_in_a_row() -> None:
    watch = Watch()
    marked = [bool(watch.tick(0, spent=spent)) for spent in (True, True, False, True, True, True)]
    assert marked == [False] * 5 + [True]


def test_every_level_is_watched() -> None:
    watch = Watch()
    assert [len(watch.tick(4, prefix=WIDE)) for _ in range(3)] == [0, 0, 1]


def test_a_flood_that_completes_its_handshakes_is_not_forged() -> None:
    watch = Watch()
    for _ in range(17):
        assert not watch.tick(5, newcomers=5)


def test_handshakes_of_verified_senders_do_not_end_it() -> None:
    """They are charged to a budget of their own, so they say nothing of what the first one admits."""
    watch = Watch()
    for _ in range(3):
        watch.tick(0)
    for _ in range(31):
        assert watch.tick(97, newcomers=4)


def test_handshakes_of_newcomers_end_it() -> None:
    watch = Watch()
    until = [watch.tick(0) for _ in range(3)][-1][Service.MX, SPENT]
    while watch.now_s + 1.0 < until:
        assert watch.tick(97, newcomers=5)
    assert not watch.tick(97, newcomers=5)


def test_it_ends_when_the_limit_is_no_longer_spent() -> None:
    watch = Watch()
    for _ in range(3):
        watch.tick(0)
    ticks = 1
    while watch.tick(0, spent=False):
        ticks += 1
    assert ticks == PARAMS.hold_s


def test_an_ipv4_address_has_no_newcomers() -> None:
    address = Prefix.parse("192.0.2.25")
    watch = Watch()
    for _ in range(3):
        watch.tick(0, prefix=address)
    for _ in range(11):
        assert bool(watch.tick(5, prefix=address)) == (watch.now_s < 103.0 + PARAMS.hold_s)


def flooded(forgery: Forgery, now_s: float, passed: int, challenged: int, completed: int) -> float:
    counters = np.zeros((REASONS, 2), np.uint64)
    counters[Reason.CONFORMING, 0], counters[Reason.CHALLENGED, 1] = passed, challenged
    counters[Reason.LIMIT_64, 1] = 1_000_003  # refused: a limit took care of it
    rows = np.zeros(2, CONNECTIONS)
    rows["level"], rows["completed"] = (Level.L64, Level.L48), (completed, 1_000_003)
    return forgery.observe_all(counters, rows, 1.0, now_s, PARAMS)


def test_a_flood_from_everywhere_is_noticed_and_ends() -> None:
    forgery = Forgery()
    found = [bool(flooded(forgery, now, 19_997, 7, 10_001)) for now in (1.0, 2.0, 3.0, 4.0)]
    assert found == [False, False, True, True]
    # what is challenged now does not pass; who answers completes
    assert flooded(forgery, 5.0, 101, 100_003, 101) == 5.0 + PARAMS.hold_s
    assert flooded(forgery, 14.0, 101, 0, 101) == 15.0
    assert flooded(forgery, 15.0, 101, 0, 101) == 0.0


def test_a_busy_hour_is_no_flood() -> None:
    forgery = Forgery()
    assert not any(flooded(forgery, float(now), 100_003, 0, 50_003) for now in range(17))
    assert not any(flooded(forgery, float(now), 19_997, 0, 0) for now in range(17, 31))  # too few to matter


def test_bounded() -> None:
    watch = Watch()
    for n in range(1009):
        watch.tick(0, prefix=Prefix(n << 16, 0, 48))
    assert len(watch.forgery._followed) == 1
    assert not watch.forgery._until_s


def test_forgery_scores_nothing() -> None:
    world = World()
    world.tick(ham("2001:db8:1:2::25", 11))
    before = world.state.reputation.standing(Service.MX, SPENT, world.now_s + 17)
    outcomes = [_step(world) for _ in range(17)]
    assert outcomes[-1].forged == {(Service.MX, SPENT): world.now_s + PARAMS.hold_s}
    assert world.state.reputation.standing(Service.MX, SPENT, world.now_s) == before
    assert not any(outcome.decisions for outcome in outcomes)


def _step(world: World) -> Outcome:
    world.now_s += 1.0
    counters = np.zeros((REASONS, 2), np.uint64)
    inputs = Inputs(
        events=batch([]),
        delta=Delta(seconds=1.0, counters=counters, connections=handshakes(1)),
        fixed=world.fixed,
        saturated=(saturated(),),
    )
    return step(world.state, inputs, world.now_s, world.params)


def test_a_late_tick_expects_as_many_more() -> None:
    """Ten seconds at ten a second: 40 handshakes are few, 60 are not."""
    for completed, expected in ((40, True), (60, False)):
        forgery, now_s = Forgery(), 100.0
        for _ in range(3):
            now_s += 10.0
            marked = forgery.observe((saturated(),), handshakes(completed), 10.0, now_s, PARAMS)
        assert bool(marked) == expected


def test_no_time_passed_says_nothing() -> None:
    forgery = Forgery()
    assert not any(forgery.observe((saturated(),), handshakes(0), 0.0, 100.0, PARAMS) for _ in range(5))


def test_one_more_tick_renews_it() -> None:
    """A forger who stops before the mark ends gets no free turn when it begins again."""
    watch = Watch()
    for _ in range(3):
        watch.tick(0)
    for _ in range(7):
        for _ in range(7):
            watch.tick(0, spent=False)
        assert watch.tick(0)[Service.MX, SPENT] == watch.now_s + PARAMS.hold_s


def test_a_flood_counts_what_no_row_counts() -> None:
    forgery = Forgery()
    counters = np.zeros((REASONS, 2), np.uint64)
    counters[Reason.UNTRACKED, 0] = 20_011
    none = np.zeros(0, CONNECTIONS)
    assert [bool(forgery.observe_all(counters, none, 1.0, now, PARAMS)) for now in (1.0, 2.0, 3.0)] == [
        False,
        False,
        True,
    ]


def test_a_flood_is_so_many_a_second() -> None:
    forgery = Forgery()
    counters = np.zeros((REASONS, 2), np.uint64)
    counters[Reason.CONFORMING, 0] = 9973  # in ten seconds
    none = np.zeros(0, CONNECTIONS)
    assert not any(forgery.observe_all(counters, none, 10.0, float(now), PARAMS) for now in range(10, 170, 10))


@pytest.mark.parametrize("standing", [Standing.SUSPECT, Standing.BAD])
def test_a_sender_at_its_slow_limit_is_not_forged(standing: Standing) -> None:
    """It completes every connection it is admitted for: one in six seconds, one in five minutes."""
    limit = Config().limits.of(Service.MX, standing, Level.L64)
    forgery, every = Forgery(), round(60 / limit.rate_per_min)
    one = Saturated(service=Service.MX, prefix=SPENT, admits_per_s=limit.rate_per_min / 60)
    for tick in range(1009):
        assert not forgery.observe((one,), handshakes(int(tick % every == 0)), 1.0, 100.0 + tick, PARAMS)
