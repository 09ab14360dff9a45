"""edge.kernel.nft_renewals: renewals spread over time."""

from __future__ import annotations

import random

import pytest

from edge.kernel.nft_renewals import Renewals


def test_none_where_nothing_is_given() -> None:
    assert list(Renewals().take(1009.0, 7)) == []
    assert list(Renewals([("mx_block_64", [])], 1009.0, 7.0).take(1013.0, 7)) == []


@pytest.mark.parametrize("tick_s", [0.5, 1.0, 7.0])
def test_renewals_keep_pace(tick_s: float) -> None:
    renewals = Renewals([("a", [(i, i) for i in range(101)]), ("b", [(i, i) for i in range(503)])], 1009.0, 75.0)
    now_s, taken, most = 1009.0, 0, 0
    while renewals.left:
        found = len(list(renewals.take(now_s, 5003)))
        taken, most = taken + found, max(most, found)
        assert taken >= 604 * min(1.0, (now_s - 1009.0) / 75.0)
        now_s += tick_s
    assert taken == 604
    assert most <= 604 * tick_s / 75.0 + 1
    assert now_s - tick_s <= 1009.0 + 75.0 + tick_s


def test_each_is_taken_once() -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(101):
        sets = [(name, [(i, i) for i in range(rng.choice((0, 1, 53)))]) for name in "abc"]
        expected = sorted((name, element) for name, elements in sets for element in elements)
        renewals, now_s, found = Renewals(sets, 1009.0, 13.0), 1009.0, []
        while renewals.left:
            batch = list(renewals.take(now_s, 7))
            assert 1 <= len(batch) <= 7
            found += batch
            now_s += rng.choice((0.0, 0.1, 3.0))
        assert sorted(found) == expected
