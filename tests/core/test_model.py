"""Events as columns lose nothing, and counts that do not fit saturate."""

from __future__ import annotations

import numpy as np

from edge.abi import Origin, Service, Standing
from edge.core.model import EVENT, Authentication, Entry, Event, Verdict, batch
from edge.core.prefix import Prefix

ONE = Event(
    ts_s=1009.5,
    hi=0x20010DB800010002,
    lo=(1 << 64) - 1,
    service=Service.SUBMISSION,
    verdict=Verdict.AUTH_FAIL,
    handshake=True,
    authenticated=True,
    rcpt_ok=3,
    rcpt_bad=70001,
    dkim=Authentication.PASS,
    dkim_domain=(1 << 64) - 59,
    spf=Authentication.SOFTFAIL,
)


def test_batch_keeps_every_field() -> None:
    (row,) = batch([ONE])
    assert (float(row["ts_s"]), int(row["hi"]), int(row["lo"])) == (1009.5, ONE.hi, ONE.lo)
    assert (int(row["service"]), int(row["verdict"])) == (Service.SUBMISSION, Verdict.AUTH_FAIL)
    assert (int(row["dkim"]), int(row["spf"])) == (Authentication.PASS, Authentication.SOFTFAIL)
    assert (int(row["handshake"]), int(row["authenticated"]), int(row["rcpt_ok"])) == (1, 1, 3)
    assert int(row["domain"]) == ONE.dkim_domain


def test_counts_saturate() -> None:
    assert int(batch([ONE])["rcpt_bad"][0]) == 65535


def test_batch_keeps_order_and_may_be_empty() -> None:
    assert batch([]).dtype == EVENT
    assert len(batch([])) == 0
    times = [Event(ts_s=float(n), hi=1, lo=1, service=Service.MX) for n in range(97)]
    assert np.array_equal(batch(times)["ts_s"], np.arange(97.0))


def test_verdict_words_are_those_of_the_format() -> None:
    words = [verdict.name.lower() for verdict in Verdict]
    assert words == ["none", "ham", "spam", "unknown_user", "auth_fail", "policy_reject"]


def test_entry_key_is_service_and_prefix() -> None:
    prefix = Prefix.parse("2001:db8::/48")
    entry = Entry(
        prefix=prefix, service=Service.MX, standing=Standing.BLOCK, origin=Origin.LEARNED, expires_s=None, reason="t"
    )
    assert entry.key == (Service.MX, prefix)
