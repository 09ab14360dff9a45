"""Two readings of the kernel's counters, and what changed between them."""

from __future__ import annotations

import random

import numpy as np

from edge.abi import LEVELS, REASONS, SERVICES
from edge.core.snapshot import CONNECTIONS, LIMITED, Snapshot, delta

SEED = 20264


def reading(now_s: float, counters: int = 0, changed: int = 0) -> Snapshot:
    return Snapshot(
        now_s=now_s,
        counters=np.full((REASONS, 2), counters, np.uint64),
        connections=np.zeros(changed, CONNECTIONS),
        open=np.zeros(SERVICES, np.int64),
        uncounted=np.zeros(LEVELS, np.int64),
        rows_active=np.zeros(LEVELS, np.int64),
        limited=np.zeros(0, LIMITED),
    )


def test_first_reading_counts_nothing() -> None:
    first = delta(None, reading(101.0, 997, 7))
    assert (first.seconds, int(first.counters.sum()), len(first.connections)) == (0.0, 0, 0)


def test_difference_is_what_happened() -> None:
    found = delta(reading(101.0, 11), reading(103.0, 24, 3))
    assert found.seconds == 2.0
    assert set(found.counters.ravel().tolist()) == {13}
    assert len(found.connections) == 3


def test_delta_is_never_negative() -> None:
    print("seed", SEED)
    draw = random.Random(SEED)
    for _ in range(101):
        before, after = reading(2.0, draw.randrange(97)), reading(1.0, draw.randrange(97))
        found = delta(before, after)
        assert found.seconds == 0.0
        assert int(found.counters.max()) <= int(after.counters.max())


def test_counter_that_went_back_counts_from_zero() -> None:
    found = delta(reading(1.0, 997), reading(2.0, 3))
    assert set(found.counters.ravel().tolist()) == {3}
