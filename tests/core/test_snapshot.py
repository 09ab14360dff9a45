"""Two readings of the kernel's counters, and what changed between them."""

from __future__ import annotations

import random

import numpy as np

from edge.abi import HANDSHAKE_KEY, HANDSHAKES, LEVELS, REASONS
from edge.core.snapshot import HANDSHAKE, Snapshot, delta

SEED = 20264


def reading(now_s: float, counters: int = 0, rows: dict[tuple[int, int], tuple[int, int]] | None = None) -> Snapshot:
    found = [(hi, service, 0, done, closed, 7) for (hi, service), (done, closed) in (rows or {}).items()]
    return Snapshot(
        now_s=now_s,
        counters=np.full((REASONS, 2), counters, np.uint64),
        handshakes=np.array(found, dtype=HANDSHAKE),
        rows_active=np.zeros(LEVELS, np.int64),
    )


def test_row_is_key_and_value_of_the_map() -> None:
    assert HANDSHAKE.itemsize == HANDSHAKE_KEY.itemsize + HANDSHAKES.itemsize


def test_first_reading_counts_nothing() -> None:
    first = delta(None, reading(101.0, 997, {(1, 0): (3, 1)}))
    assert (first.seconds, int(first.counters.sum()), len(first.handshakes)) == (0.0, 0, 0)


def test_difference_is_what_happened() -> None:
    found = delta(
        reading(101.0, 11, {(1, 0): (3, 1), (1, 1): (5, 0), (2, 0): (7, 7)}),
        reading(103.0, 24, {(3, 0): (2, 0), (2, 0): (7, 7), (1, 1): (5, 2), (1, 0): (10, 1)}),
    )
    assert found.seconds == 2.0
    assert set(found.counters.ravel().tolist()) == {13}
    got = {(r["hi"], r["service"]): (r["completed"], r["closed"]) for r in found.handshakes}
    assert got == {(1, 0): (7, 0), (1, 1): (0, 2), (3, 0): (2, 0)}


def test_delta_is_never_negative() -> None:
    print("seed", SEED)
    draw = random.Random(SEED)

    def rows() -> dict[tuple[int, int], tuple[int, int]]:
        return {(draw.randrange(31), draw.randrange(2)): (draw.randrange(97), draw.randrange(97)) for _ in range(53)}

    for _ in range(101):
        before, after = reading(2.0, draw.randrange(97), rows()), reading(1.0, draw.randrange(97), rows())
        found = delta(before, after)
        assert found.seconds == 0.0
        assert int(found.counters.max()) <= int(after.counters.max())
        limit = {(int(r["hi"]), int(r["service"])): r for r in after.handshakes}
        for row in found.handshakes:
            whole = limit[int(row["hi"]), int(row["service"])]
            assert row["completed"] <= whole["completed"]
            assert row["closed"] <= whole["closed"]


def test_counter_that_went_back_counts_from_zero() -> None:
    found = delta(reading(1.0, 997, {(1, 0): (997, 5)}), reading(2.0, 3, {(1, 0): (2, 6)}))
    assert set(found.counters.ravel().tolist()) == {3}
    assert [(int(r["completed"]), int(r["closed"])) for r in found.handshakes] == [(2, 1)]
