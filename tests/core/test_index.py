"""Row numbers by key: nothing lost, all in order, merged rarely."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from edge.core.index import Index, Keys

SEED = 20263
HOSTILE = (0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def array(keys: list[int]) -> Keys:
    return np.array(keys, np.uint64)


def filled(pairs: list[tuple[int, int]], batch: int) -> Index:
    """An index of these pairs of key and row, added so many at a time."""
    index = Index()
    for at in range(0, len(pairs), batch):
        part = sorted(pairs[at : at + batch])
        index.add(array([key for key, _ in part]), np.array([row for _, row in part]))
    return index


def drawn(draw: random.Random, count: int) -> list[tuple[int, int]]:
    """Pairs of key and row; some keys come again and again, some lie at the ends."""
    return [(draw.choice((*HOSTILE, draw.getrandbits(64), draw.getrandbits(6))), row) for row in range(count)]


@pytest.mark.parametrize("batch", [1, 7, 997, 5003])
def test_index_holds_what_was_added(batch: int) -> None:
    print("seed", SEED)
    pairs = drawn(random.Random(SEED), 5003)
    index = filled(pairs, batch)
    counts = Counter(key for key, _ in pairs)
    keys = [*counts, 64, 65, 1 << 40]
    assert len(index) == 5003
    assert sorted(index.rows().tolist()) == list(range(5003))
    assert index.count(array(keys)).tolist() == [counts[key] for key in keys]
    for key in keys[:211]:
        assert sorted(index.find(key)) == [row for other, row in pairs if other == key]
    rows, owners = index.members(array(keys))
    assert sorted((keys[owner], row) for row, owner in zip(rows, owners, strict=True)) == sorted(pairs)


@pytest.mark.parametrize("batch", [1, 7, 997, 5003])
def test_index_is_in_order(batch: int) -> None:
    print("seed", SEED)
    draw = random.Random(SEED)
    pairs = drawn(draw, 5003)
    index, key_of = filled(pairs, batch), {row: key for key, row in pairs}
    for _ in range(101):
        first, last = sorted(draw.choice((*HOSTILE, draw.getrandbits(64), draw.getrandbits(6))) for _ in range(2))
        keys = [key_of[row] for row in index.between(first, last).tolist()]
        assert keys == sorted(key for key, _ in pairs if first <= key <= last)


def test_discarded_rows_are_gone_and_no_others() -> None:
    print("seed", SEED)
    draw = random.Random(SEED)
    pairs = drawn(draw, 1009)
    index = filled(pairs, 101)
    gone = np.array([draw.random() < 0.3 for _ in range(1009)])
    index.discard(gone)
    left = [(key, row) for key, row in pairs if not gone[row]]
    assert len(index) == len(left)
    assert sorted(index.rows().tolist()) == [row for _, row in left]
    keys = array(list(dict(pairs)))
    assert index.count(keys).sum() == len(left)


def test_merging_is_rare() -> None:
    """Twenty thousand additions of one key: were each to copy the whole, they would copy 200 million."""
    draw, index, merges = random.Random(SEED), Index(), 0
    for row in range(20011):
        large = index.runs[0]
        index.add(array([draw.getrandbits(64)]), np.array([row]))
        merges += index.runs[0] is not large
    assert merges <= 53


def test_empty_index_answers() -> None:
    index = Index()
    assert (len(index), index.find(7), len(index.between(0, (1 << 64) - 1))) == (0, [], 0)
    assert index.count(array([7])).tolist() == [0]
    assert [len(part) for part in index.members(array([7]))] == [0, 0]
    index.discard(np.empty(0, bool))
    assert len(index) == 0


def test_a_row_takes_12_bytes() -> None:
    index = filled(drawn(random.Random(SEED), 20011), 1009)
    assert sum(keys.nbytes + rows.nbytes for keys, rows in index.runs) == 12 * 20011
