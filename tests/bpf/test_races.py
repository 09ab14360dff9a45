"""Lost races, made to happen: a copy of the program in which another CPU charges a row just before ours does.

The program's own text is compiled, with one call put before its compare-and-swap. How often it interferes at which
level is in a map.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest

from edge.abi import LEVELS, Level, Reason, Service
from edge.core.prefix import LENGTHS, Prefix
from edge.kernel import program
from edge.kernel.libbpf import Fd, Map
from edge.kernel.program import U32
from tests import packets as p
from tests.bench.limiter import cut
from tests.bpf.harness import SECOND, START_S, Harness

pytestmark = pytest.mark.root

START = int(START_S * SECOND)
SOURCE = "2001:db8:1:2::3"
ATTEMPTS = 4
RATES = (Level.L64, Level.L56, Level.L48, Level.L32)
INTERVALS = dict(zip(RATES, (SECOND, SECOND // 3, SECOND // 7, SECOND // 11), strict=True))
LIMIT_REASON = {level: Reason(Reason.LIMIT_128 + level) for level in Level}

INTERFERE = """
BPF_F_TABLE("array", u32, u64, races, LEVELS, 0);

INLINE void interfere(u32 level, u64 *tat, u64 charge)
{
	u64 *left = races.lookup(&level);

	if (left && *left) {
		(*left)--;
		__sync_fetch_and_add(tat, charge);
	}
}

/* Charge every level asked"""
CALL = r"\1interfere(level, &line->tat_ns[way], places[level].limit->emission_interval_ns);\n\g<0>"


class Racing(Harness):
    """A harness whose rows change hands in the middle of a decision."""

    def __init__(self) -> None:
        super().__init__()
        fd = Fd(os.dup(self.compiled._bpf[b"races"].map_fd))
        self._races = Map(fd, U32, np.dtype("<u8"))

    def race(self, level: Level, times: int) -> None:
        """Another CPU comes first that many times at a level."""
        self._races.put(np.array([level], U32), np.array([times], "<u8"))

    def races_left(self) -> list[int]:
        values: list[int] = self._races.items()[1].ravel().tolist()
        return values

    def tats(self) -> dict[Level, int]:
        found = {level: self.tables.rows.tat_ns(at(level), Service.MX) for level in RATES}
        return {level: tat for level, tat in found.items() if tat is not None}


def at(level: Level) -> Prefix:
    return Prefix.of(0x20010DB8_00010002, 3, LENGTHS[level])


@pytest.fixture(scope="module")
def loaded_racing() -> Iterator[Racing]:
    text = cut(
        program.text(),
        [
            (r"^/\* Charge every level asked", INTERFERE),
            (r"^(\t\t)if \(__sync_val_compare_and_swap\(&line->tat_ns\[way\],", CALL),
        ],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "text", lambda: text)
        yield Racing()


@pytest.fixture
def racing(loaded_racing: Racing) -> Racing:
    """Every level has a limit of seven connections at once, one of which is spent."""
    loaded_racing.reset()
    for level in Level:
        loaded_racing.race(level, 0)
    loaded_racing.limit({level: (interval, 7) for level, interval in INTERVALS.items()})
    assert loaded_racing.judge_ns(p.syn(SOURCE), START).reason is Reason.CONFORMING
    assert loaded_racing.tats() == {level: START + interval for level, interval in INTERVALS.items()}
    return loaded_racing


@pytest.mark.parametrize("level", RATES)
@pytest.mark.parametrize("lost", range(1, ATTEMPTS))
def test_after_a_lost_race_charges_are_given_back_and_made_again(racing: Racing, level: Level, lost: int) -> None:
    racing.race(level, lost)
    before = racing.tats()
    assert racing.judge_ns(p.syn(SOURCE), START).reason is Reason.CONFORMING
    others = {one: lost * (one is level) for one in RATES}
    assert racing.tats() == {one: tat + (1 + others[one]) * INTERVALS[one] for one, tat in before.items()}
    assert racing.races_left() == [0] * LEVELS


@pytest.mark.parametrize("level", RATES)
def test_who_loses_every_race_is_refused_and_charges_nothing(racing: Racing, level: Level) -> None:
    racing.race(level, ATTEMPTS + 1)
    before = racing.tats()
    judged = racing.judge_ns(p.syn(SOURCE), START)
    assert (judged.reason, judged.dropped) == (Reason.RACE_LOST, True)
    assert racing.tats() == {**before, level: before[level] + ATTEMPTS * INTERVALS[level]}
    assert racing.races_left()[level] == 1
    assert racing.counters()[Reason.RACE_LOST] == (0, 1)


@pytest.mark.parametrize("level", RATES)
def test_who_loses_the_last_of_a_burst_is_refused_and_charges_nothing(racing: Racing, level: Level) -> None:
    racing.limit({one: (interval, 2 if one is level else 7) for one, interval in INTERVALS.items()})
    racing.race(level, 1)
    before = racing.tats()
    assert racing.judge_ns(p.syn(SOURCE), START).reason is LIMIT_REASON[level]
    assert racing.tats() == {**before, level: before[level] + INTERVALS[level]}


def test_random_races_agree_with_the_model(racing: Racing) -> None:
    """The plainest Python: try again from the start, four times."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    tats, now, seen = racing.tats(), START, set()
    for n in range(2003):
        now += rng.randrange(SECOND // 3)
        races = {level: rng.choice([0, 0, 0, 0, 1, 2, 5]) for level in RATES}
        for level in RATES:
            racing.race(level, races[level])
        expected = model(tats, races, now)
        judged = racing.judge_ns(p.syn(SOURCE), now)
        assert judged.reason is expected, f"packet {n}"
        assert racing.tats() == tats, f"packet {n}"
        assert racing.races_left()[1:] == [races[level] for level in RATES], f"packet {n}"
        seen.add(expected)
    assert {Reason.CONFORMING, Reason.RACE_LOST, Reason.LIMIT_64} <= seen, "the schedule must meet all outcomes"


def model(tats: dict[Level, int], races: dict[Level, int], now: int) -> Reason:
    for _ in range(ATTEMPTS):
        for level in reversed(RATES):
            if max(tats[level], now) > now + 6 * INTERVALS[level]:
                return LIMIT_REASON[level]
        charged = dict(tats)
        for level in reversed(RATES):
            if races[level]:
                races[level] -= 1
                tats[level] += INTERVALS[level]
                for given_back in reversed(RATES):
                    if given_back > level:
                        tats[given_back] = charged[given_back] - INTERVALS[given_back]
                break
            charged[level] = max(tats[level], now) + INTERVALS[level]
        else:
            tats.update(charged)
            return Reason.CONFORMING
    return Reason.RACE_LOST
