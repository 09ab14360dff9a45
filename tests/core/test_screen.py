"""What is screened out could not have come to anything."""

from __future__ import annotations

import random

import numpy as np
import pytest

from edge.abi import Level, Service
from edge.core import policy
from edge.core.belief import wilson
from edge.core.model import Event, Verdict
from edge.core.prefix import LENGTHS, Prefix
from edge.core.rules import PolicyParams
from edge.core.screen import can_matter, company, wilson_bounds
from edge.core.step import CoreParams
from tests.core.worlds import World, event

SEED = 20265
VERDICTS = (Verdict.HAM, Verdict.SPAM, Verdict.UNKNOWN_USER, Verdict.POLICY_REJECT)


def drawn(draw: random.Random, count: int) -> list[Event]:
    """Senders in a few networks, each network with a leaning of its own."""
    found = []
    for _ in range(count):
        network = draw.randrange(7)
        bad = draw.random() < network / 6
        source = f"2001:db8:{network:x}:{draw.randrange(9) << 8 | draw.randrange(5):x}::{draw.randrange(5):x}"
        if draw.random() < 0.3:
            source = f"192.0.{network}.{draw.randrange(23)}"
        verdict = draw.choice(VERDICTS[1:]) if bad else Verdict.HAM
        service = Service.SUBMISSION if draw.random() < 0.1 else Service.MX
        found.append(event(source, verdict, service=service, vouched=0 if bad else 7919))
    return found


@pytest.mark.parametrize("wide", [False, True])
def test_screen_loses_nothing(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A world whose rules judge every candidate decides the same."""

    def all_of_them(*args: object) -> np.ndarray:
        assert isinstance(args[3], np.ndarray)
        return np.ones(len(args[3]), bool)

    print("seed", SEED)
    params = CoreParams(policy=PolicyParams(allow_wide=wide))
    screened, whole, draw = World(params), World(params), random.Random(SEED)
    for _ in range(151):
        events, seconds = drawn(draw, draw.choice((1, 101, 307))), draw.choice((1.0, 61.0, 3607.0, 86413.0))
        screened.tick(events, seconds=seconds)
        with monkeypatch.context() as patch:
            patch.setattr(policy, "can_matter", all_of_them)
            whole.tick(events, seconds=seconds)
    assert len(screened.decisions) > 211
    assert screened.decisions == whole.decisions


def test_columns_agree_with_single_prefixes() -> None:
    print("seed", SEED)
    world, draw = World(), random.Random(SEED)
    for _ in range(53):
        world.tick(drawn(draw, 101), seconds=3607.0)
    reputation = world.state.reputation
    for (service, level), table in reputation.tables.items():
        rows = table.values(table.inside(0, (1 << 64) - 1))
        mean, weight = company(reputation, service, level, rows["hi"], rows["lo"], world.now_s)
        for at, row in enumerate(rows):
            prefix = Prefix.of(int(row["hi"]), int(row["lo"]), LENGTHS[level])
            assert reputation.prior(service, prefix, world.now_s)[:2] == pytest.approx((mean[at], weight[at]))


def test_bounds_in_columns_are_those_of_single_numbers() -> None:
    shares, weights = np.meshgrid(np.linspace(0, 1, 13), [0.0, 0.1, 1.0, 7.0, 1009.0])
    found = wilson_bounds(shares.ravel(), weights.ravel(), 1.2816)
    expected = [wilson(s, w, 1.2816) for s, w in zip(shares.ravel(), weights.ravel(), strict=True)]
    assert found == pytest.approx(expected, abs=1e-12)


def test_one_bad_message_of_a_stranger_is_screened_out() -> None:
    """Or ten thousand of them in a tick would all be judged one by one."""
    world = World()
    world.tick(event(f"2001:{n:x}::1", Verdict.SPAM) for n in range(0xD00, 0xDFF))
    for level in (Level.L128, Level.L64, Level.L56, Level.L48):
        table = world.state.reputation.tables[Service.MX, level]
        rows = table.values(table.inside(0, (1 << 64) - 1))
        assert len(rows) == 255
        assert not can_matter(world.state.reputation, Service.MX, level, rows, world.now_s, PolicyParams()).any()
