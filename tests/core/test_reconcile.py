"""Counts of open connections against the socket table: only a difference that stays is corrected."""

from __future__ import annotations

import random

import numpy as np

from edge.abi import Service
from edge.core.prefix import Prefix
from edge.core.reconcile import MOST, OPEN, Reconciler, agreed, differences, present

SEED = 20265
HERE = (Service.MX, Service.SUBMISSION)
A, B = Prefix.parse("2001:db8:1:2::/64"), Prefix.parse("192.0.2.25")


def rows(*found: tuple[Prefix, Service, int]) -> np.ndarray:
    return np.array([(prefix.hi, service, count) for prefix, service, count in found], OPEN)


def test_differences_of_two_tables() -> None:
    known = rows((A, Service.MX, 7), (B, Service.MX, 3), (A, Service.SUBMISSION, 2))
    actual = rows((A, Service.SUBMISSION, 5), (B, Service.MX, 3), (B, Service.SUBMISSION, 1))
    assert differences(known, actual, 64, HERE) == {
        (Service.MX, A): -7,
        (Service.SUBMISSION, A): 3,
        (Service.SUBMISSION, B): 1,
    }
    assert differences(rows(), rows(), 64, HERE) == {}


def test_doubt_lowers_nothing() -> None:
    """No listener here: the connections may be a container's, whose table this is not."""
    known = rows((A, Service.MX, 7), (A, Service.SUBMISSION, 2))
    assert differences(known, rows(), 64, ()) == {}
    assert differences(known, rows(), 64, {Service.SUBMISSION}) == {(Service.SUBMISSION, A): -2}


def test_bounded() -> None:
    known = rows()
    actual = rows(*((Prefix(n, 0, 64), Service.MX, 1 + n % 5) for n in range(3 * MOST)))
    found = differences(known, actual, 64, HERE)
    assert len(found) == MOST
    assert min(found.values()) == 4


def test_differences_agree_with_counting_by_hand() -> None:
    print("seed", SEED)
    draw = random.Random(SEED)
    for _ in range(53):
        tables = [
            {(draw.randrange(11), draw.choice(HERE)): draw.randrange(1, 7) for _ in range(draw.randrange(17))}
            for _ in range(2)
        ]
        known, actual = (rows(*((Prefix(hi, 0, 64), s, n) for (hi, s), n in table.items())) for table in tables)
        expected = {
            (service, Prefix(hi, 0, 64)): by
            for hi, service in tables[0] | tables[1]
            if (by := tables[1].get((hi, service), 0) - tables[0].get((hi, service), 0))
        }
        assert differences(known, actual, 64, HERE) == expected


KEY = (Service.MX, A)


def test_what_was_open_before_us_counts_at_once() -> None:
    assert Reconciler().observe({KEY: 5}) == {KEY: 5}


def test_only_what_stays() -> None:
    reconciler = Reconciler()
    steps = [{KEY: 5}, {KEY: 3}, {KEY: 7}, {}, {KEY: 2}, {KEY: 2}]
    assert [reconciler.observe(step).get(KEY, 0) for step in steps] == [5, 3, 3, 0, 0, 2]


def test_a_count_is_lowered_after_three_readings() -> None:
    reconciler = Reconciler()
    steps = [{KEY: -5}, {KEY: -4}, {KEY: -6}, {KEY: 1}, {KEY: -6}, {KEY: -6}, {KEY: -6}]
    assert [reconciler.observe(step).get(KEY, 0) for step in steps] == [0, 0, -4, 0, 0, 0, -6]


def test_a_correction_ends_with_what_it_corrects() -> None:
    """Connections that were there before us end one by one; what is closed is not counted once more."""
    reconciler = Reconciler()
    assert [reconciler.observe({KEY: left} if left else {}) for left in (5, 3, 0, 0)] == [{KEY: 5}, {KEY: 3}, {}, {}]


def test_nothing_is_raised_after_the_first_reading_without_a_second() -> None:
    reconciler = Reconciler()
    assert reconciler.observe({}) == {}
    assert reconciler.observe({KEY: 5}) == {}
    assert reconciler.observe({KEY: 7}) == {KEY: 5}


def test_a_sign_that_changes_corrects_nothing() -> None:
    reconciler = Reconciler()
    for by in (-5, 5, -5, 5, -5, -5):
        assert reconciler.observe({KEY: by}) in ({}, {KEY: 5})
    assert reconciler.observe({KEY: -3}) == {KEY: -3}


def test_services_are_bounded_together_and_the_largest_stay() -> None:
    """Somebody with many small differences pushes no large one out."""
    many = rows(*((Prefix(n, 0, 64), Service.SUBMISSION, 1) for n in range(2 * MOST)))
    found = differences(rows((A, Service.MX, 97)), np.concatenate([many, rows((B, Service.MX, 89))]), 64, HERE)
    assert found[Service.MX, A] == -97
    assert found[Service.MX, B] == 89
    assert len(found) == MOST


def test_what_changed_while_the_table_was_read_is_no_difference() -> None:
    """Counted before and after: what only one of the two comparisons sees came or went meanwhile."""
    other = (Service.MX, B)
    assert agreed({KEY: 5, other: -3}, {KEY: 3, other: -4}) == {KEY: 3, other: -3}
    assert agreed({KEY: 5, other: 2}, {KEY: -1}) == {}


def test_a_proxys_listener_lowers_nothing() -> None:
    known = rows((A, Service.MX, 7), (A, Service.SUBMISSION, 7))
    actual = rows((A, Service.MX, 3), (B, Service.SUBMISSION, 4))
    assert present(known, actual, HERE) == {Service.SUBMISSION}
    assert present(rows(), rows(), (Service.MX,)) == {Service.MX}
