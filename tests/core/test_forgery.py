"""Own budgets for the good senders of a network that is being forged, and for nobody else."""

from __future__ import annotations

import numpy as np

from edge.abi import REASONS, Service, Standing
from edge.core.forgery import Saturated
from edge.core.model import batch
from edge.core.prefix import Prefix
from edge.core.snapshot import HANDSHAKE, Delta
from edge.core.step import Inputs, Outcome, step
from tests.core.worlds import World, bad, ham

SPENT = Prefix.parse("2001:db8:1:2::/64")


def tick(world: World, completed: int, *, spent: bool = True) -> Outcome:
    """One second in which the /64 completed some handshakes while its limit of 10 a second was spent."""
    handshakes = np.zeros(1, HANDSHAKE)
    handshakes["hi"], handshakes["completed"] = SPENT.hi, completed
    counters = np.zeros((REASONS, 2), np.uint64)
    world.now_s += 1.0
    saturated = (Saturated(service=Service.MX, prefix=SPENT, admits_per_s=10.0),) if spent else ()
    inputs = Inputs(
        events=batch([]),
        delta=Delta(seconds=1.0, counters=counters, handshakes=handshakes),
        fixed=world.fixed,
        saturated=saturated,
    )
    return step(world.state, inputs, world.now_s, world.params)


def test_good_sender_of_a_forged_64_gets_its_own_budget() -> None:
    world = World()
    world.tick(ham("2001:db8:1:2::25", 11), bad("2001:db8:1:2::bad", 2))
    assert [tick(world, 1).counts.forged for _ in range(3)] == [0, 0, 1]
    assert world.standing("2001:db8:1:2::25/128") is Standing.GOOD
    assert world.standing("2001:db8:1:2::bad/128") is Standing.NEW


def test_forgery_scores_nothing() -> None:
    world = World()
    world.tick(ham("2001:db8:1:2::25", 11))
    before = world.state.reputation.standing(Service.MX, SPENT, world.now_s + 17)
    for _ in range(17):
        tick(world, 0)
    assert world.state.reputation.standing(Service.MX, SPENT, world.now_s) == before
    assert not world.blocks()


def test_a_flood_that_completes_its_handshakes_is_not_forged() -> None:
    world = World()
    world.tick(ham("2001:db8:1:2::25", 11))
    for _ in range(17):
        assert tick(world, 7).counts.forged == 0
    assert world.standing("2001:db8:1:2::25/128") is Standing.NEW


def test_three_ticks_in_a_row() -> None:
    world = World()
    world.tick(ham("2001:db8:1:2::25", 11))
    assert [tick(world, 0, spent=spent).counts.forged for spent in (True, True, False, True, True, True)] == [
        0, 0, 0, 0, 0, 1,
    ]  # fmt: skip


def test_no_hole_is_made_in_a_block() -> None:
    world = World()
    for n in range(200):
        world.tick(bad(f"2001:db8:1:2:1::{n:x}"))
    assert world.standing(str(SPENT)) is Standing.BLOCK
    learned = dict(world.state.ledger.learned)
    for _ in range(7):
        tick(world, 0)
    assert dict(world.state.ledger.learned) == learned
