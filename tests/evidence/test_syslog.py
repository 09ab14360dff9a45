"""A syslog line is taken apart at its head, and its time read only when asked."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.evidence.syslog import log_time_s, split

SAID = b"connect from unknown[2001:db8::1]"


@pytest.mark.parametrize(
    "head",
    [
        b"Nov  2 08:03:43 mx1 postfix/smtpd[71]: ",
        b"Nov 12 08:03:43.001 mx1 postfix/smtpd[71]: ",
        b"Nov  2 2025 08:03:43 mx1 postfix/smtpd[71]: ",
        b"<22>Nov  2 08:03:43 mx1 postfix/smtpd[71]: ",
        b"2025-11-02T08:03:43.123456+01:00 mx1 postfix/smtpd[71]: ",
        b"2025-11-02T08:03:43+0100 mx1 postfix/smtpd[71]: ",
        b"<22>1 2025-11-02T08:03:43.123Z mx1 postfix/smtpd 71 - - ",
        b'<22>1 2025-11-02T08:03:43Z mx1 postfix/smtpd 71 ID7 [meta sequence="7"] ',
    ],
)
def test_every_usual_head(head: bytes) -> None:
    assert split(head + SAID) == (b"mx1", b"postfix/smtpd", b"71", SAID)


def test_a_line_without_process_number() -> None:
    assert split(b"Nov  2 08:03:43 mx1 postfix/smtpd: " + SAID) == (b"mx1", b"postfix/smtpd", b"", SAID)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"connect from unknown[2001:db8::1]",
        b"Nov  2 08:03:43",
        b" Nov  2 08:03:43 mx1 postfix/smtpd[71]: x",
        b"junk Nov  2 08:03:43 mx1 postfix/smtpd[71]: " + SAID,
        b"\xff\xfe\x00",
    ],
)
def test_head_is_anchored(line: bytes) -> None:
    assert split(line) is None


def test_head_is_anchored_before_free_text() -> None:
    inner = b"x Nov  2 08:03:43 mx1 postfix/smtpd[72]: " + SAID
    head = split(b"Nov  2 08:03:43 mx1 dovecot[71]: " + inner)
    assert head == (b"mx1", b"dovecot", b"71", inner)


def _s(*parts: int, ahead_h: float = 0) -> float:
    return datetime(*parts, tzinfo=timezone(timedelta(hours=ahead_h))).timestamp()  # type: ignore[misc,arg-type]  # parts are a date


@pytest.mark.parametrize(
    ("stamp", "expected_s"),
    [
        (b"2025-11-02T08:03:43Z", _s(2025, 11, 2, 8, 3, 43)),
        (b"2025-11-02T08:03:43.5+01:00", _s(2025, 11, 2, 7, 3, 43) + 0.5),
        (b"2025-11-02T08:03:43-0530", _s(2025, 11, 2, 13, 33, 43)),
        (b"2025-11-02 08:03:43,25", _s(2025, 11, 2, 8, 3, 43) + 0.25),
        (b"Nov  2 2019 08:03:43", _s(2019, 11, 2, 8, 3, 43)),
        (b"Nov  2 08:03:43", _s(2025, 11, 2, 8, 3, 43)),
        (b"Nov  4 08:03:43.5", _s(2025, 11, 4, 8, 3, 43) + 0.5),  # a clock a little ahead
        (b"Dec 31 23:59:59", _s(2024, 12, 31, 23, 59, 59)),  # last year: it cannot be next month
        (b"Feb 29 12:00:00", _s(2024, 2, 29, 12)),
        (b"<22>1 2016-12-31T23:59:60Z", _s(2016, 12, 31, 23, 59, 59)),
    ],
)
def test_times(stamp: bytes, expected_s: float) -> None:
    reference_s = _s(2025, 11, 3, 12)
    assert log_time_s(stamp + b" mx1 x: y", reference_s=reference_s, zone=UTC) == expected_s


def test_a_time_without_zone_is_in_the_given_one() -> None:
    zone = timezone(timedelta(hours=2))
    reference_s = _s(2025, 11, 3, 12)
    assert log_time_s(b"Nov  2 08:03:43 m x: y", reference_s=reference_s, zone=zone) == _s(2025, 11, 2, 6, 3, 43)


@pytest.mark.parametrize(
    "stamp", [b"Foo  2 08:03:43", b"Nov 31 08:03:43", b"Nov  2 25:03:43", b"0000-01-01T00:00:00Z", b""]
)
def test_time_is_optional(stamp: bytes) -> None:
    assert log_time_s(stamp + b" mx1 x: y", reference_s=1.7e9) is None


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_are_too_strange(line: bytes) -> None:
    split(line)
    log_time_s(line, reference_s=1.7e9)
    log_time_s(b"Nov  2 08:03:43 " + line, reference_s=1.7e9)
