"""Rows of a fixed most: found again, dropped by weight, never in the batch that touched them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from edge.core.index import Keys
from edge.core.reputation import DAY_S
from edge.core.table import ROW, Table

SEED = 20264
NOW = 1009.0
Key = tuple[int, int]


def array(keys: list[int]) -> Keys:
    return np.array(keys, np.uint64)


def halves(keys: list[Key]) -> tuple[Keys, Keys]:
    return array([hi for hi, _ in keys]), array([lo for _, lo in keys])


def touch(table: Table, keys: list[Key], now_s: float = NOW) -> list[int]:
    """The rows of distinct keys, in order of the keys."""
    return [int(row) for row in table.touch(*halves(sorted(keys)), now_s)]


def weigh(table: Table, key: Key, bad: float = 0.0, good: float = 0.0) -> None:
    row = table.find(*key)
    assert row is not None
    table.rows["bad"][row], table.rows["good"][row] = bad, good


@pytest.mark.parametrize("group", [0, 5])
def test_rows_are_found_again(group: int) -> None:
    """Whatever comes and goes, a key's row is its own, and says so; what is not there is not found."""
    print("seed", SEED)
    draw = random.Random(SEED)
    table = Table(capacity=307, half_life_s=DAY_S, group=group)
    made, known = 0, set[Key]()
    for turn in range(211):
        drawn = {(draw.getrandbits(7), draw.getrandbits(4) if group else 0) for _ in range(draw.choice((1, 13, 101)))}
        before = {key: table.find(*key) for key in known}
        keys, rows = sorted(drawn), touch(table, list(drawn), NOW + turn)
        known |= drawn
        present = {key: row for key in known if (row := table.find(*key)) is not None}
        assert len(present) == len(set(present.values())) == len(table) <= 307
        assert all((table.rows["hi"][row], table.rows["lo"][row]) == key for key, row in present.items())
        assert [present.get(key, -1) for key in keys] == rows
        assert table.find_all(*halves(keys)).tolist() == rows
        assert all(before.get(key) in (None, row) for key, row in present.items() if key not in drawn)
        made += sum(before.get(key) is None and row >= 0 for key, row in zip(keys, rows, strict=True))
        assert len(table) == made - table.dropped
        assert len(table.inside(0, 127)) == len(table)


def test_upper_half_alone_is_the_key_without_groups() -> None:
    table = Table(capacity=16, half_life_s=DAY_S)
    first = table.touch(array([7, 11]), None, NOW)
    assert table.find_all(array([5, 7, 11])).tolist() == [-1, *first]
    assert table.touch(array([7]), None, NOW).tolist() == [table.find(7)]


def test_table_is_bounded_and_least_weight_goes_first() -> None:
    table = Table(capacity=16, half_life_s=DAY_S)
    heavy = table.touch(array([1, 2, 3]), None, NOW)
    table.rows["bad"][heavy] = 11.0
    for key in range(100, 1109):
        assert table.touch(array([key]), None, NOW)[0] >= 0
        assert len(table) <= 16
    assert [table.find(key) is not None for key in (1, 2, 3)] == [True, True, True]


def test_least_weight_goes_first_of_many() -> None:
    """A sixteenth goes at a time, and of what stays nothing weighs less; good counts four times."""
    print("seed", SEED)
    draw = random.Random(SEED)
    table = Table(capacity=1600, half_life_s=DAY_S)
    table.touch(array(list(range(1600))), None, NOW)
    for key in range(1600):
        weigh(table, (key, 0), bad=draw.choice((1.0, 2.0, draw.random())), good=draw.choice((0.0, 0.1)))
    weight = {key: float(4 * table.rows["good"][row] + table.rows["bad"][row]) for key, row in enumerate(range(1600))}
    table.touch(array(list(range(2000, 2101))), None, NOW + DAY_S)
    stayed = [key for key in range(1600) if table.find(key) is not None]
    assert len(stayed) == 1400
    assert table.dropped == 200
    lost = [weight[key] for key in range(1600) if key not in set(stayed)]
    assert max(lost) <= min(weight[key] for key in stayed)


def test_least_weight_goes_first_in_a_full_64() -> None:
    table = Table(capacity=4096, half_life_s=DAY_S, group=7)
    touch(table, [(5, n) for n in range(7)] + [(9, n) for n in range(7)])
    for hi in (5, 9):
        for n in range(7):
            weigh(table, (hi, n), bad=float(n))
    weigh(table, (5, 0), good=2.0)
    touch(table, [(5, 100), (5, 101), (5, 3), (11, 1)])
    assert [n for n in range(7) if table.find(5, n) is not None] == [0, 3, 4, 5, 6], "the lightest untouched: 1 and 2"
    assert all(table.find(9, n) is not None for n in range(7)), "another /64 loses nothing"
    assert (table.dropped, table.refused, len(table)) == (2, 0, 15)
    row = table.values(table.find_all(*halves([(5, 100)])))[0]
    assert [float(row[name]) for name in ("hi", "lo", "bad", "made_s")] == [5, 100, 0.0, NOW]


def test_touched_rows_stay() -> None:
    table = Table(capacity=16, half_life_s=DAY_S)
    rows = table.touch(array(list(range(97))), None, NOW)
    assert (rows >= 0).sum() == 16
    assert table.refused == 97 - 16
    assert len(set(rows[rows >= 0].tolist())) == 16


def test_touched_rows_stay_in_a_full_64() -> None:
    table = Table(capacity=4096, half_life_s=DAY_S, group=7)
    touch(table, [(5, n) for n in range(7)])
    rows = touch(table, [(5, n) for n in range(13)])
    assert [row >= 0 for row in rows] == [True] * 7 + [False] * 6
    assert (table.dropped, table.refused) == (0, 6)


def test_touched_rows_stay_where_both_bounds_are_met() -> None:
    """Rows taken over within a full /64 are not dropped again for the table's sake."""
    table = Table(capacity=16, half_life_s=DAY_S, group=4)
    touch(table, [(hi, n) for hi in range(4) for n in range(4)])
    rows = touch(table, [(0, 10), (0, 11), (7, 1), (8, 1), (9, 1)])
    assert all(row >= 0 for row in rows)
    assert len(set(rows)) == 5
    assert len(table) == 16


def test_flood_of_one_64_in_one_batch_takes_its_group_only() -> None:
    table = Table(capacity=4096, half_life_s=DAY_S, group=64)
    rows = touch(table, [(7, n) for n in range(10007)])
    assert sum(row >= 0 for row in rows) == 64
    assert len(table) == 64


def test_decay_is_that_of_the_half_life_however_often_a_row_is_touched() -> None:
    """A network heard every second for a day: its decay must not be rounded away."""
    table = Table(capacity=16, half_life_s=30 * DAY_S)
    row = table.touch(array([7]), None, NOW)
    table.rows["bad"][row] = 1.0
    for second in range(1, 86401, 7):
        table.touch(array([7]), None, NOW + second)
    table.touch(array([7]), None, NOW + DAY_S)
    assert table.rows["bad"][row][0] == pytest.approx(2 ** (-1 / 30), rel=1e-9)


def test_growing_keeps_every_row() -> None:
    table = Table(capacity=70001, half_life_s=DAY_S)
    for first in range(0, 70001, 1009):
        keys = array(list(range(first, min(70001, first + 1009))))
        rows = table.touch(keys, None, NOW)
        table.rows["bad"][rows] = keys.astype(np.float64)
    rows = table.find_all(array(list(range(70001))))
    assert (table.rows["bad"][rows] == np.arange(70001)).all()
    assert len(table.rows) == 70001, "the most it may ever hold"


def test_a_row_takes_128_bytes() -> None:
    assert ROW.itemsize == 128
    assert ROW.isalignedstruct
