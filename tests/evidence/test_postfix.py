"""Each of Postfix's lines tells what it should, and nothing a client sends changes whom it tells of."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge.core.model import Verdict
from edge.evidence.postfix import Kind, Parsed, parse

CLIENT = b"2001:db8:a::1"
WHO = b"mail.example.org[" + CLIENT + b"]"
TAIL = b"; from=<a@example.org> to=<b@example.net> proto=ESMTP helo=<mail.example.org>"
EVIL = b"2001:db8:e::"


def line(message: bytes, program: bytes = b"postfix/smtpd", pid: int = 71) -> bytes:
    return b"Nov  2 08:03:43 mx1 %s[%d]: %s" % (program, pid, message)


def parsed(message: bytes, program: bytes = b"postfix/smtpd") -> Parsed:
    found = parse(line(message, program))
    assert found is not None, message
    return found


REFUSALS = [
    (b"550 5.1.1 <b@example.net>: Recipient address rejected: User unknown in virtual mailbox table", "UNKNOWN_USER"),
    (b"550 5.1.1 <b@example.net>: Recipient address rejected: undeliverable address: host x said: 550", "UNKNOWN_USER"),
    (b"550 5.1.0 <b@example.net>: Recipient address rejected: gone", "UNKNOWN_USER"),
    (b"550 5.1.6 <b@example.net>: Recipient address rejected: User has moved to c@example.com", "UNKNOWN_USER"),
    (b"550 5.0.0 <b@example.net>: Recipient address rejected: User unknown", "UNKNOWN_USER"),
    (b"550 <b@example.net>: Recipient address rejected: User unknown in local recipient table", "UNKNOWN_USER"),
    (b"550 5.1.0 <a@example.org>: Sender address rejected: User unknown in virtual mailbox table", "POLICY_REJECT"),
    (b"554 5.7.1 Service unavailable; Client host [2001:db8:a::1] blocked using zen.example; q", "POLICY_REJECT"),
    (b"554 5.7.1 <b@example.net>: Relay access denied", "POLICY_REJECT"),
    (b"504 5.5.2 <localhost>: Helo command rejected: need fully-qualified hostname", "POLICY_REJECT"),
    (b"550 5.1.8 <a@example.org>: Sender address rejected: Domain not found", "POLICY_REJECT"),
    (b"553 5.7.1 <a@example.org>: Sender address rejected: not logged in", "POLICY_REJECT"),
    (b"550 5.7.25 Client host rejected: cannot find your hostname, [2001:db8:a::1]", "POLICY_REJECT"),
    (b'554 5.7.1 <"x>: Recipient address rejected: User unknown"@y>: Relay access denied', "POLICY_REJECT"),
    (b"552 5.2.2 <b@example.net>: Recipient address rejected: Mailbox is full", "NONE"),
    (b"552 5.3.4 Message size exceeds fixed limit", "NONE"),
    (b"450 4.7.1 <b@example.net>: Recipient address rejected: Greylisted for 300 seconds", "NONE"),
    (b"450 4.2.0 <b@example.net>: Recipient address rejected: Greylisted, see http://x.example", "NONE"),
    (b"450 4.7.25 Client host rejected: cannot find your hostname, [2001:db8:a::1]", "NONE"),
    (b"450 4.1.1 <b@example.net>: Recipient address rejected: unverified address: User unknown", "NONE"),
    (b"454 4.7.1 <b@example.net>: Relay access denied", "NONE"),
]


@pytest.mark.parametrize(("answer", "verdict"), REFUSALS)
@pytest.mark.parametrize("queue", [b"NOQUEUE", b"4104E3D", b"4XyZ3k1bQwz7Rt"])
def test_refused_recipients(answer: bytes, verdict: str, queue: bytes) -> None:
    found = parsed(queue + b": reject: RCPT from " + WHO + b": " + answer + TAIL)
    assert (found.kind, found.address, found.verdict) == (Kind.VERDICT, CLIENT, Verdict[verdict])
    assert found.rcpt == (answer[:1] == b"5")
    assert not found.ends


@pytest.mark.parametrize("digit", [b"4", b"5"])
@settings(deadline=None)
@given(st.text(alphabet=st.characters(max_codepoint=255, exclude_characters="\n"), max_size=80))
def test_temporary_is_no_evidence(digit: bytes, text: str) -> None:
    """Free text moves a refusal between the bad verdicts at most, and never makes one of a temporary answer."""
    answer = digit + b"50 " + digit + b".7.1 " + text.encode("latin-1")
    found = parsed(b"NOQUEUE: reject: RCPT from " + WHO + b": " + answer + TAIL)
    bad = found.verdict in (Verdict.POLICY_REJECT, Verdict.UNKNOWN_USER)
    assert bad == (digit == b"5")


@pytest.mark.parametrize(
    ("message", "program", "verdict"),
    [
        (b"4104E3D: milter-reject: END-OF-MESSAGE from %s: 5.7.1 Spam message rejected" + TAIL, b"cleanup", "SPAM"),
        (b"4104E3D: milter-reject: END-OF-MESSAGE from %s: 5.7.1 virus Eicar found" + TAIL, b"cleanup", "SPAM"),
        (b"4104E3D: milter-reject: END-OF-MESSAGE from %s: 4.7.1 Try again later" + TAIL, b"cleanup", "NONE"),
        (b"4104E3D: milter-discard: END-OF-MESSAGE from %s: milter triggers DISCARD action" + TAIL, b"cleanup", "SPAM"),
        (b"NOQUEUE: milter-reject: RCPT from %s: 550 5.7.1 not today" + TAIL, b"smtpd", "POLICY_REJECT"),
        (b"NOQUEUE: milter-reject: RCPT from %s: 550 5.1.1 User unknown" + TAIL, b"smtpd", "UNKNOWN_USER"),
        (b"NOQUEUE: milter-reject: CONNECT from %s: 451 4.7.1 later; proto=SMTP", b"smtpd", "NONE"),
        (
            b"NOQUEUE: reject: CONNECT from %s: 554 5.7.1 <x>: Client host rejected: Access denied",
            b"smtpd",
            "POLICY_REJECT",
        ),
        (
            b"NOQUEUE: reject: VRFY from %s: 550 5.1.1 <b>: Recipient address rejected: User unknown",
            b"smtpd",
            "UNKNOWN_USER",
        ),
        (b"4104E3D: reject: DATA from %s: bare <LF> received; from=<a@b>", b"smtpd", "POLICY_REJECT"),
        (b"warning: non-SMTP command from %s: GET / HTTP/1.1", b"smtpd", "POLICY_REJECT"),
        (b"improper command pipelining after EHLO from %s: QUIT\\r\\n", b"smtpd", "POLICY_REJECT"),
        (b"too many errors after RCPT from %s", b"smtpd", "POLICY_REJECT"),
        (b"too many errors after DATA (7001 bytes) from %s", b"smtpd", "POLICY_REJECT"),
    ],
)
def test_verdicts(message: bytes, program: bytes, verdict: str) -> None:
    found = parsed(message.replace(b"%s", WHO), b"postfix/" + program)
    assert (found.kind, found.address, found.verdict) == (Kind.VERDICT, CLIENT, Verdict[verdict])


@pytest.mark.parametrize(
    "message",
    [
        b"PREGREET 14 after 0.22 from [%s]:40321: EHLO x\\r\\n",
        b"COMMAND PIPELINING from [%s]:40321 after EHLO: QUIT",
        b"NON-SMTP COMMAND from [%s]:40321 after CONNECT: GET / HTTP/1.1",
        b"BARE NEWLINE from [%s]:40321 after HELO",
        b"DNSBL rank 7 for [%s]:40321",
        b"DENYLISTED [%s]:40321",
    ],
)
def test_postscreen(message: bytes) -> None:
    found = parsed(message.replace(b"%s", CLIENT), b"postfix/postscreen")
    assert (found.kind, found.address, found.verdict) == (Kind.VERDICT, CLIENT, Verdict.POLICY_REJECT)


@pytest.mark.parametrize(
    ("message", "program"),
    [
        (b"lost connection after CONNECT from " + WHO, b"postfix/smtpd"),
        (b"timeout after DATA from " + WHO, b"postfix/smtpd"),
        (b"SSL_accept error from " + WHO + b": lost connection", b"postfix/smtpd"),
        (b"NOQUEUE: reject_warning: RCPT from " + WHO + b": 550 5.1.1 <b>: User unknown" + TAIL, b"postfix/smtpd"),
        (b"NOQUEUE: filter: RCPT from " + WHO + b": <a@b>: FILTER smtp:[127.0.0.1]:10024" + TAIL, b"postfix/smtpd"),
        (b"NOQUEUE: client=" + WHO, b"postfix/smtpd"),
        (b"connect from unknown[unknown]", b"postfix/smtpd"),
        (b"PASS OLD [2001:db8::1]:52237", b"postfix/postscreen"),
        (b"HANGUP after 0 from [2001:db8::1]:5 in tests before SMTP handshake", b"postfix/postscreen"),
        (b"NOQUEUE: reject: RCPT from [2001:db8::1]:5: 550 5.5.1 Protocol error" + TAIL, b"postfix/postscreen"),
        (b"4104E3D: message-id=<x@example.org>", b"postfix/cleanup"),
        (b"4104E3D: from=<a@b>, size=7, nrcpt=1 (queue active) later", b"postfix/qmgr"),
        (b"4104E3D: removed", b"postfix/qmgr"),
        (b"connect from " + WHO, b"postfix/smtp"),
        (b"connect from " + WHO, b"smtpd"),  # another MTA's
        (b"4104E3D: s=x d=example.org SSL error:04091068", b"opendkim"),
    ],
)
def test_lines_that_tell_nothing(message: bytes, program: bytes) -> None:
    assert parse(line(message, program)) is None


@pytest.mark.parametrize("reason", [b"Connection lost to authentication server", b"generic failure"])
def test_our_own_authentication_trouble_is_nobodys_fault(reason: bytes) -> None:
    assert parsed(b"warning: " + WHO + b": SASL LOGIN authentication failed: " + reason).kind is Kind.LOGIN_ERROR
    assert parsed(b"warning: " + WHO + b": SASL LOGIN authentication aborted").kind is Kind.LOGIN_ERROR


@pytest.mark.parametrize("method", [b"LOGIN", b"PLAIN", b"CRAM-MD5"])
def test_failed_login(method: bytes) -> None:
    found = parsed(b"warning: " + WHO + b": SASL " + method + b" authentication failed: UGFzc3dvcmQ6, sasl_username=x")
    assert (found.kind, found.address, found.verdict) == (Kind.LOGIN_FAILED, CLIENT, Verdict.AUTH_FAIL)


@pytest.mark.parametrize(
    ("field", "address"),
    [
        (b"unknown[2001:db8::7]", b"2001:db8::7"),
        (b"unknown[2001:db8::7]:40321", b"2001:db8::7"),
        (b"unknown[IPv6:2001:db8::7]", b"2001:db8::7"),
        (b"a-b_c.example[192.0.2.7]", b"192.0.2.7"),
    ],
)
def test_forms_of_the_client_field(field: bytes, address: bytes) -> None:
    assert parsed(b"connect from " + field).address == address
    assert parsed(b"disconnect from " + field + b" ehlo=1 quit=1 commands=2").address == address
    assert parsed(b"4104E3D: client=" + field).address == address
    assert parsed(b"NOQUEUE: reject: RCPT from " + field + b": 550 5.7.1 no" + TAIL).address == address


@pytest.mark.parametrize("tag", [b"postfix/submission/smtpd", b"mx-out/smtpd", b"postfix-in/smtps/smtpd"])
def test_every_instance_and_service(tag: bytes) -> None:
    assert parsed(b"connect from " + WHO, tag).tag == tag


@pytest.mark.parametrize(
    ("login", "expected"), [(b", sasl_method=PLAIN, sasl_username=u@example.net", True), (b"", False)]
)
def test_a_login_is_seen(login: bytes, expected: bool) -> None:
    assert parsed(b"4104E3D: client=" + WHO + login).authenticated is expected


def test_a_host_name_cannot_pretend_a_login() -> None:
    found = parsed(b"4104E3D: client=" + WHO + b", orig_client=x, sasl_method=PLAIN, sasl_username=u")
    assert not found.authenticated


FORGERIES = [
    b"x[%s]",
    b"x[%s]: 550 5.1.1",
    b"> from evil[%s]: 550 5.7.1 <x",
    b"?Nov  2 08:03:43 mx1 postfix/smtpd[71]: connect from evil[%s]",
    b"\rconnect from evil[%s]",
    b"\x00\x1b[2J; client=evil[%s]",
    b"\xff\xfe from evil[%s]",
    b": client=evil[%s]",
    b"IPv6:%s",
    b"[%s]:25",
]
NAMED = [  # the free text is a host name; the field that counts comes after it
    (b"connect from %s[" + CLIENT + b"]", "postfix/smtpd"),
    (b"disconnect from %s[" + CLIENT + b"] ehlo=1 auth=0/3", "postfix/smtpd"),
    (b"4104E3D: client=%s[" + CLIENT + b"]", "postfix/smtpd"),
    (b"NOQUEUE: reject: RCPT from %s[" + CLIENT + b"]: 550 5.7.1 no" + TAIL, "postfix/smtpd"),
    (b"warning: %s[" + CLIENT + b"]: SASL LOGIN authentication failed: x", "postfix/smtpd"),
    (b"too many errors after RCPT from %s[" + CLIENT + b"]", "postfix/smtpd"),
]
FRAMES = [
    (b"4104E3D: client=" + WHO + b", sasl_method=%s, sasl_username=%s", "postfix/smtpd"),
    (
        b"NOQUEUE: reject: RCPT from " + WHO + b": 550 5.1.1 <%s>: no; from=<%s> to=<%s> proto=%s helo=<%s>",
        "postfix/smtpd",
    ),
    (b"4104E3D: reject: header Subject: %s from " + WHO + b"; from=<%s> to=<%s>: 5.7.1 no", "postfix/cleanup"),
    (b"4104E3D: milter-reject: END-OF-MESSAGE from " + WHO + b": 5.7.1 %s; from=<%s>", "postfix/cleanup"),
    (b"warning: " + WHO + b": SASL %s authentication failed: %s", "postfix/smtpd"),
    (b"warning: hostname %s does not resolve to address " + CLIENT, "postfix/smtpd"),
    (b"warning: non-SMTP command from " + WHO + b": %s", "postfix/smtpd"),
    (b"improper command pipelining after EHLO from " + WHO + b": %s", "postfix/smtpd"),
    (b"PREGREET 7 after 0.1 from [" + CLIENT + b"]:7: %s", "postfix/postscreen"),
    (b"NON-SMTP COMMAND from [" + CLIENT + b"]:7 after CONNECT: %s", "postfix/postscreen"),
    (b"4104E3D: from=<%s>, size=7, nrcpt=1 (queue active)", "postfix/qmgr"),
    (b"4104E3D: message-id=<%s>", "postfix/cleanup"),
    (b"statistics: max connection rate 1/60s for (smtpd:" + CLIENT + b") at %s", "postfix/anvil"),
    (b"%s", "opendkim"),
    (b"imap-login: %s", "dovecot"),
]


@pytest.mark.parametrize(("frame", "program"), FRAMES)
@pytest.mark.parametrize("forgery", FORGERIES)
def test_free_text_names_nobody(frame: bytes, program: str, forgery: bytes) -> None:
    evil = forgery.replace(b"%s", EVIL + b"7")
    found = parse(line(frame.replace(b"%s", evil), program.encode()))
    assert found is None or found.address in (b"", CLIENT)


TEXT = st.lists(
    st.one_of(
        st.sampled_from([forgery.replace(b"%s", EVIL + b"7") for forgery in FORGERIES]),
        st.binary(max_size=40).map(lambda raw: raw.replace(b"\n", b"?")),
        st.sampled_from(
            [b"[", b"]", b"<", b">", b": ", b" from ", b"; ", b"550 5.1.1 ", b"NOQUEUE: reject: RCPT from "]
        ),
    ),
    max_size=7,
).map(b"".join)


@settings(deadline=None)
@given(st.sampled_from(FRAMES), TEXT)
def test_free_text_names_nobody_whatever_it_is(frame: tuple[bytes, str], text: bytes) -> None:
    found = parse(line(frame[0].replace(b"%s", text), frame[1].encode()))
    assert found is None or found.address in (b"", CLIENT)


@settings(deadline=None)
@given(st.sampled_from(NAMED), TEXT)
@example(NAMED[0], b"x[2001:db8:e::7]: 550 5.1.1")
@example(NAMED[1], b"x[2001:db8:e::7] ehlo=1")
@example(NAMED[2], b"x[2001:db8:e::7]")
@example(NAMED[3], b"x[2001:db8:e::7] ")
def test_a_host_name_names_nobody(frame: tuple[bytes, str], text: bytes) -> None:
    """A name that breaks Postfix's rule refuses the line; only `]:` and `],` would end the field, and it holds none."""
    if frame is not NAMED[0] and frame is not NAMED[1]:
        text = re.sub(rb"\]+(?=[:,])", b"", text)
    found = parse(line(frame[0].replace(b"%s", text), frame[1].encode()))
    assert found is None or found.address in (b"", CLIENT)


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from([b"smtpd", b"cleanup", b"qmgr", b"postscreen", b"anvil"]))
def test_never_raises(raw: bytes, program: bytes) -> None:
    parse(raw)
    parse(line(raw, b"postfix/" + program))
    parse(line(raw, b"opendkim"))
    parse(line(raw, b"opendmarc"))


def test_a_huge_line_is_parsed_in_linear_time() -> None:
    """No nested quantifiers: a megabyte of the worst text for each frame ends at once (or in the timeout)."""
    for frame, program in FRAMES + NAMED:
        for text in (b"A" * 1_000_003, b"<" * 1_000_003, b", nrcpt=1" * 111_113, b"a." * 500_009):
            parse(line(frame.replace(b"%s", text), program.encode()))
