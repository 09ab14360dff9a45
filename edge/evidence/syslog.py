"""Takes a line of a syslog file apart: when, which host, which program, what it said.

Understands what rsyslog, syslog-ng, journalctl and Postfix's own postlogd write: the traditional head (RFC 3164,
`Nov  2 08:03:43 mx postfix/smtpd[7]: `, with or without a year), the same with an ISO 8601 time, and RFC 5424. Lines
are bytes and stay bytes: what is not ASCII can be nothing but free text, so nothing is decoded and nothing can fail to.

Invariants:
    head-is-anchored: host, program and process come from the start of the line, never from text further on.
    time-is-optional: taking a line apart never looks at its time; `log_time_s` does that for those who ask.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, tzinfo

_TIME = (
    rb"(?:[A-Z][a-z]{2} [ \d]\d (?:\d{4} )?\d\d:\d\d:\d\d(?:\.\d{1,9})?"
    rb"|\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?:Z|[+-]\d\d:?\d\d)?)"
)

_HEAD = re.compile(
    rb"(?:<\d{1,3}>(?:1 )?)?" + _TIME + rb" ([^ ]{1,255}) ([^ \[\]:]{1,128})"
    rb"(?:(?:\[(\d{1,10})\])?: | (\d{1,10}|-) [^ ]{1,64} (?:-|\[[^\]]{0,512}\]) )"
)

_STAMP = re.compile(
    rb"(?:<\d{1,3}>(?:1 )?)?(?:"
    rb"([A-Z][a-z]{2}) ([ \d]\d) (?:(\d{4}) )?(\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?"
    rb"|(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(?:[.,](\d{1,9}))?(Z|[+-]\d\d:?\d\d)?) "
)

_MONTHS = (b"Jan", b"Feb", b"Mar", b"Apr", b"May", b"Jun", b"Jul", b"Aug", b"Sep", b"Oct", b"Nov", b"Dec")

_AHEAD = timedelta(days=1)
"""How far a line without a year may lie after the reference: clocks and zones differ by less than a day."""

_LEAP_YEARS_APART = 8
"""29 February is at most this many years back (1896 to 1904, 2096 to 2104)."""


def split(line: bytes) -> tuple[bytes, bytes, bytes, bytes] | None:
    """(host, tag, process number, message) of one line, None when it has no syslog head.

    The process number is empty where the writer gave none.
    """
    match = _HEAD.match(line)
    if match is None:
        return None
    host, tag, pid, pid_5424 = match.groups()
    return host, tag, pid or pid_5424 or b"", line[match.end() :]


def log_time_s(line: bytes, *, reference_s: float, zone: tzinfo = UTC) -> float | None:
    """When the line says it was written, in seconds since the epoch; None when it does not say.

    A time without zone is in `zone`. A time without year is in the latest year that puts it no more than a day after
    `reference_s` (the file's modification time, or now).
    """
    match = _STAMP.match(line)
    if match is None:
        return None
    month, day, year, hour, minute, second, fraction, *iso = match.groups()
    try:
        if month is None:
            return _iso_s(iso, zone)
        clock = (_MONTHS.index(month) + 1, int(day), int(hour), int(minute), int(second))
        if year is not None:
            return _at(int(year), clock, zone).timestamp() + _fraction_s(fraction)
        return _recent(clock, reference_s, zone).timestamp() + _fraction_s(fraction)
    except (ValueError, OverflowError):
        return None  # 31 November, hour 25: looks like a time and is none


def _fraction_s(digits: bytes | None) -> float:
    return int(digits) / 10 ** len(digits) if digits else 0.0


def _at(year: int, clock: tuple[int, int, int, int, int], zone: tzinfo) -> datetime:
    month, day, hour, minute, second = clock
    return datetime(year, month, day, hour, minute, min(second, 59), tzinfo=zone)  # a leap second is 59 once more


def _recent(clock: tuple[int, int, int, int, int], reference_s: float, zone: tzinfo) -> datetime:
    latest = datetime.fromtimestamp(reference_s, zone) + _AHEAD
    for year in range(latest.year, latest.year - _LEAP_YEARS_APART - 1, -1):
        if clock[:2] == (2, 29) and (year % 4 or (year % 100 == 0 and year % 400)):
            continue
        moment = _at(year, clock, zone)
        if moment <= latest:
            return moment
    raise ValueError("no such day")


def _iso_s(parts: list[bytes | None], zone: tzinfo) -> float:
    year, month, day, hour, minute, second = (int(part or 0) for part in parts[:6])
    fraction, offset = parts[6:]
    moment = _at(year, (month, day, hour, minute, second), UTC if offset else zone)
    ahead_s = 0
    if offset and offset != b"Z":
        digits = offset[1:].replace(b":", b"")
        ahead_s = (int(digits[:2]) * 60 + int(digits[2:])) * 60 * (-1 if offset[:1] == b"-" else 1)
    return moment.timestamp() + _fraction_s(fraction) - ahead_s
