"""The evidence format is read strictly, and what is written reads back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.abi import Service
from edge.core.model import Authentication, Event, Verdict
from edge.core.prefix import key_text
from edge.errors import InputError
from edge.evidence.jsonl import JsonLines, decode_lines, domain_hash, encode

GOOD: dict[str, Any] = {
    "ts": 1790000000.123,
    "src": "2a0f:9400::1",
    "dport": 25,
    "handshake": True,
    "mta": {
        "verdict": "ham",
        "rcpt_ok": 3,
        "rcpt_bad": 7,
        "dkim": "pass",
        "dkim_domain": "example.org",
        "spf": "softfail",
    },
}


def text(**changes: Any) -> bytes:
    line = {**GOOD, **changes}
    return json.dumps({name: value for name, value in line.items() if value is not ...}).encode()


def test_the_promised_format() -> None:
    hi, lo = key_text("2a0f:9400::1") or (0, 0)
    assert JsonLines().feed(text(), None) == Event(
        ts_s=1790000000.123,
        hi=hi,
        lo=lo,
        service=Service.MX,
        verdict=Verdict.HAM,
        rcpt_ok=3,
        rcpt_bad=7,
        dkim=Authentication.PASS,
        dkim_domain=domain_hash("example.org"),
        spf=Authentication.SOFTFAIL,
    )


@pytest.mark.parametrize("verdict", ["ham", "spam", "unknown_user", "auth_fail", "policy_reject", "none"])
def test_every_verdict(verdict: str) -> None:
    event = JsonLines().feed(text(mta={"verdict": verdict}), None)
    assert event is not None
    assert event.verdict is Verdict[verdict.upper()]


def test_null_is_absent() -> None:
    """Writers say `null` of a message without signature."""
    nulls = dict.fromkeys(("rcpt_ok", "rcpt_bad", "dkim", "dkim_domain", "spf"))
    decoder = JsonLines()
    assert decoder.feed(text(mta={"verdict": "ham", **nulls}), None) == decoder.feed(text(mta={"verdict": "ham"}), None)
    assert decoder.counts()["unknown_keys"] == 0


@pytest.mark.parametrize("mta", [..., None])
@pytest.mark.parametrize("handshake", [True, False])
def test_a_connection_without_verdict(mta: object, handshake: bool) -> None:
    event = JsonLines().feed(text(mta=mta, handshake=handshake), None)
    assert event is not None
    assert (event.handshake, event.verdict) == (handshake, Verdict.NONE)


def test_live_events_have_their_arrival_time() -> None:
    event = JsonLines().feed(text(ts=0), 7.5)
    assert event is not None
    assert event.ts_s == 7.5


def test_unknown_keys_are_counted() -> None:
    decoder = JsonLines()
    mta = {"verdict": "spam", "score": 7, "virus": {"ts": "x"}}
    event = decoder.feed(text(mta=mta, helo="mta", extra=[1, {"src": 2}], x=None), None)
    assert event is not None
    assert event.verdict is Verdict.SPAM
    assert decoder.counts()["unknown_keys"] == 5
    decoder.feed(text(), None)
    assert decoder.counts()["unknown_keys"] == 5


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"", "truncated"),
        (b"{", "truncated"),
        (b"EHLO mail.example.org", "malformed"),
        (b"[1, 2]", "object"),
        (b"\xff\xfe\x00", "malformed"),
        (text() + b" {}", "trailing"),
        (b'{"x": ' + b"[" * 30_011, "nesting"),
        (text(ts=...), "`ts`"),
        (text(src=...), "`src`"),
        (text(dport=...), "`dport`"),
        (text(handshake=...), "`handshake`"),
        (text(ts=-1), "$.ts"),
        (text(ts="7"), "$.ts"),
        (text(ts=True), "$.ts"),
        (text().replace(b"1790000000.123", b"1e999"), "$.ts"),
        (text().replace(b"1790000000.123", b"NaN"), "malformed"),
        (text(src=7), "$.src"),
        (text(src="x" * 65), "$.src"),
        (text(src="fe80::1%eth0"), "address"),
        (text(src="2001:db8::/64"), "address"),
        (text(src="mail.example.org"), "address"),
        (text(dport=65536), "$.dport"),
        (text(dport=25.5), "$.dport"),
        (text(handshake=1), "$.handshake"),
        (text(mta=[]), "$.mta"),
        (text(mta={}), "verdict"),
        (text(mta={"verdict": "HAM"}), "$.mta.verdict"),
        (text(mta={"verdict": "ham", "rcpt_ok": -1}), "$.mta.rcpt_ok"),
        (text(mta={"verdict": "ham", "dkim": "softfail"}), "$.mta.dkim"),
        (text(mta={"verdict": "ham", "spf": "neutral"}), "$.mta.spf"),
        (text(mta={"verdict": "ham", "dkim_domain": "x" * 254}), "$.mta.dkim_domain"),
        (text(mta={"verdict": "ham", "dkim": "pass", "dkim_domain": "a..ü"}), "domain"),
        (text(ts="7", extra=1), "$.ts"),
    ],
)
def test_malformed_is_refused(line: bytes, what: str) -> None:
    decoder = JsonLines()
    with pytest.raises(InputError) as refusal:
        decoder.feed(line, None)
    assert "expected" in str(refusal.value).lower()
    assert what in str(refusal.value)
    assert len(str(refusal.value)) < 1000
    assert decoder.counts()["unknown_keys"] == 0


def test_half_open_has_no_verdict() -> None:
    with pytest.raises(InputError, match="handshake"):
        JsonLines().feed(text(handshake=False), None)


def test_refusals_name_source_and_line() -> None:
    refusals: list[InputError] = []
    lines = [text() + b"\n", b"junk\n", b"\n", text(ts="x"), text()]
    events = list(decode_lines(lines, "events.jsonl", JsonLines(), refusals.append))
    assert len(events) == 2
    assert [str(refusal).split(":")[0] for refusal in refusals] == ["events.jsonl line 2", "events.jsonl line 4"]


@pytest.mark.parametrize(
    ("source", "same"),
    [
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("64:ff9b::c000:207", "192.0.2.7"),
        ("2002:c000:207::1", "192.0.2.7"),
        ("2001:DB8::0:1", "2001:db8::1"),
    ],
)
def test_sources_are_keyed(source: str, same: str) -> None:
    event = JsonLines().feed(text(src=source), None)
    assert event is not None
    assert (event.hi, event.lo) == key_text(same)


def test_bogons_and_foreign_ports_are_counted() -> None:
    decoder = JsonLines(mx_ports=[25, 2525], submission_ports=[587])
    services = [
        event and event.service for event in (decoder.feed(text(dport=port), None) for port in (25, 2525, 587, 465))
    ]
    assert services == [Service.MX, Service.MX, Service.SUBMISSION, None]
    assert decoder.feed(text(src="0:ffff:1::1"), None) is None
    assert decoder.counts() == {"unknown_keys": 0, "bogons": 1, "foreign_ports": 1}
    assert decoder.dropped() == 2


def test_domain_hash_is_the_same_in_every_run() -> None:
    assert domain_hash("example.org") == 0x24DAB28D73E82DB5
    assert domain_hash("EXAMPLE.org.") == domain_hash("example.org")
    assert domain_hash("bücher.example") == domain_hash("xn--bcher-kva.EXAMPLE") != domain_hash("example.org")
    assert domain_hash("") == 0


@pytest.mark.parametrize("dkim", ["fail", "none"])
def test_unproven_domain_is_dropped(dkim: str) -> None:
    event = JsonLines().feed(text(mta={"verdict": "ham", "dkim": dkim, "dkim_domain": "gmail.example"}), None)
    assert event is not None
    assert event.dkim_domain == 0


@settings(deadline=None)
@given(
    source=st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str).map(key_text),
    ts_s=st.floats(min_value=0, allow_nan=False, allow_infinity=False),
    service=st.sampled_from(Service),
    verdict=st.sampled_from(Verdict),
    counts=st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF)),
    domain=st.integers(1, 2**64 - 1),
    spf=st.sampled_from(Authentication),
    handshake=st.booleans(),
)
def test_written_reads_back(
    source: tuple[int, int] | None,
    ts_s: float,
    service: Service,
    verdict: Verdict,
    counts: tuple[int, int],
    domain: int,
    spf: Authentication,
    handshake: bool,
) -> None:
    if source is None:
        return
    event = Event(ts_s=ts_s, hi=source[0], lo=source[1], service=service, handshake=False)
    if handshake:
        event = Event(
            ts_s=ts_s,
            hi=source[0],
            lo=source[1],
            service=service,
            verdict=verdict,
            rcpt_ok=counts[0],
            rcpt_bad=counts[1],
            dkim=Authentication.PASS,
            dkim_domain=domain,
            spf=spf,
        )
    line = encode(event)
    assert line.count(b"\n") == 1
    assert JsonLines().feed(line, None) == event


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=7,
)


@settings(deadline=None)
@given(
    st.one_of(st.binary(max_size=200), st.dictionaries(st.sampled_from(sorted(GOOD)), JSON).map(lambda d: text(**d)))
)
def test_nothing_but_input_errors(line: bytes) -> None:
    try:
        event = JsonLines().feed(line, None)
    except InputError:
        return
    assert event is None or event.ts_s >= 0
