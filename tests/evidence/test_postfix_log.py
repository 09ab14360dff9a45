"""Lines of one message or session become the right events, once."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.abi import Service
from edge.core.model import Authentication, Event, Verdict
from edge.core.prefix import key_text
from edge.evidence.jsonl import domain_hash
from edge.evidence.postfix_log import PostfixLog, PostfixParams

CLIENT = "2001:db8:a::1"
WHO = f"mail.example.org[{CLIENT}]"
ENVELOPE = "from=<a@example.org> to=<b@example.net> proto=ESMTP helo=<mail.example.org>"


def said(program: str, message: str, pid: int = 71, host: str = "mx1") -> bytes:
    return f"2025-11-02T08:03:43.123456+00:00 {host} {program}[{pid}]: {message}".encode("latin-1", "replace")


def events(lines: list[bytes], log: PostfixLog | None = None, at_s: float = 7.0) -> list[Event]:
    log = log or PostfixLog(PostfixParams())
    return [event for event in (log.feed(line, at_s) for line in lines) if event is not None]


def received(queue: str = "4104E3D", who: str = WHO, service: str = "postfix/smtpd", login: str = "") -> list[bytes]:
    return [
        said(service, f"connect from {who}"),
        said(service, f"{queue}: client={who}{login}"),
        said("postfix/cleanup", f"{queue}: message-id=<7@example.org>"),
    ]


def accepted(queue: str = "4104E3D", recipients: int = 3) -> bytes:
    return said("postfix/qmgr", f"{queue}: from=<a@example.org>, size=7001, nrcpt={recipients} (queue active)")


def test_accepted_mail_is_ham() -> None:
    (event,) = events([*received(), accepted()])
    assert (event.hi, event.lo) == key_text(CLIENT)
    assert (event.verdict, event.service, event.rcpt_ok, event.rcpt_bad) == (Verdict.HAM, Service.MX, 3, 0)
    assert (event.handshake, event.authenticated, event.ts_s) == (True, False, 7.0)


def test_one_acceptance_a_message() -> None:
    """A deferred message is active again and again; content that was refused never is."""
    assert len(events([*received(), accepted(), accepted(), accepted()])) == 1
    refused = said("postfix/cleanup", f"4104E3D: milter-reject: END-OF-MESSAGE from {WHO}: 5.7.1 spam; {ENVELOPE}")
    assert [e.verdict for e in events([*received(), refused, accepted()])] == [Verdict.SPAM]
    header = said("postfix/cleanup", f"4104E3D: reject: header Subject: x from {WHO}; {ENVELOPE}: 5.7.1 no")
    assert [e.verdict for e in events([*received(), header, accepted()])] == [Verdict.SPAM]


def test_mail_that_did_not_come_by_smtp_is_nobodys() -> None:
    header = said("postfix/cleanup", f"4104E3D: reject: header Subject: x from {WHO}; {ENVELOPE}: 5.7.1 no")
    assert events([said("postfix/pickup", "4104E3D: uid=7 from=<root>"), header, accepted()]) == []


def test_refused_header_names_the_queue_ids_client() -> None:
    header = "4104E3D: reject: header Subject: from evil[2001:db8:e::7]: 5.7.1 from local; from=<x>: 5.7.1 no"
    (event,) = events([*received(), said("postfix/cleanup", header)])
    assert (event.hi, event.lo) == key_text(CLIENT)


def test_one_bad_recipient_among_good_ones() -> None:
    bad = said("postfix/smtpd", f"4104E3D: reject: RCPT from {WHO}: 550 5.1.1 <x>: User unknown; {ENVELOPE}")
    for ends in ([], [said("postfix/smtpd", f"disconnect from {WHO} rcpt=3/5 commands=7/9")]):
        found = events([*received(), bad, bad, accepted(), *ends])
        assert [(e.verdict, e.rcpt_ok, e.rcpt_bad) for e in found] == [(Verdict.HAM, 3, 2)]
    ends = [said("postfix/smtpd", f"disconnect from {WHO} ehlo=1 rcpt=3/5 commands=7/9")]
    found = events([*received(), bad, bad, *ends, accepted()])
    told = [(e.verdict, e.rcpt_ok, e.rcpt_bad) for e in found]
    assert told == [(Verdict.UNKNOWN_USER, 3, 2), (Verdict.HAM, 3, 0)], "the queue manager may log late"


def refusal(answer: str = "550 5.1.1 <x>: User unknown", stage: str = "RCPT", queue: str = "NOQUEUE") -> str:
    return f"{queue}: reject: {stage} from {WHO}: {answer}; {ENVELOPE}"


def test_one_event_for_refused_recipients() -> None:
    (event,) = session(*[refusal()] * 19, f"too many errors after RCPT from {WHO}", count="rcpt=1/20 commands=3/22")
    assert (event.verdict, event.rcpt_ok, event.rcpt_bad) == (Verdict.UNKNOWN_USER, 1, 19)
    (event,) = session(*[refusal("554 5.7.1 listed")] * 7, refusal(), count="rcpt=0/8 commands=2/10")
    assert (event.verdict, event.rcpt_ok, event.rcpt_bad) == (Verdict.POLICY_REJECT, 0, 8)
    (event,) = session(*[refusal("554 5.7.1 no", stage="HELO")] * 7, count="helo=0/7 commands=0/7")
    assert (event.verdict, event.rcpt_bad) == (Verdict.POLICY_REJECT, 0)


def test_each_message_has_its_own_refused_recipients() -> None:
    """What was accepted for the first message does not excuse the second."""
    bad = said("postfix/smtpd", refusal())
    ends = said("postfix/smtpd", f"disconnect from {WHO} ehlo=1 mail=2 rcpt=3/6 data=1 commands=8/11")
    found = events([*received(), bad, accepted(), bad, bad, ends])
    assert [(e.verdict, e.rcpt_ok, e.rcpt_bad) for e in found] == [(Verdict.HAM, 3, 1), (Verdict.UNKNOWN_USER, 0, 2)]


def test_session_whose_end_was_not_logged_is_told_at_the_next() -> None:
    other = "connect from x[2001:db8:b::1]"
    found = events([said("postfix/smtpd", m) for m in (f"connect from {WHO}", refusal(), refusal(), other)])
    assert [((e.hi, e.lo), e.rcpt_bad) for e in found] == [(key_text(CLIENT), 2)]


def test_forgotten_sessions_with_evidence_are_counted() -> None:
    log = PostfixLog(PostfixParams(sessions=7))
    for pid in range(13):
        events([said("postfix/smtpd", m, pid=pid) for m in (f"connect from {WHO}", refusal())], log)
    assert log.counts()["sessions_forgotten"] == log.dropped() == 13 - 7


def test_failed_login_and_refused_recipients_are_one_event() -> None:
    (event,) = session(refusal(), refusal(), count="ehlo=1 auth=0/3 rcpt=0/2 commands=1/6")
    assert (event.verdict, event.rcpt_bad) == (Verdict.AUTH_FAIL, 2)


@pytest.mark.parametrize("who", ["localhost[127.0.0.1]", "localhost[::1]", "localhost[::ffff:127.0.0.1]"])
def test_local_mail_is_nobodys(who: str) -> None:
    log = PostfixLog(PostfixParams())
    bad = said("postfix/smtpd", f"NOQUEUE: reject: RCPT from {who}: 550 5.1.1 <x>: User unknown; {ENVELOPE}")
    assert events([*received(who=who), bad, accepted()], log) == []
    assert (log.counts()["local"], log.dropped()) == (1, 0)


def test_bogons_and_hostile_names_are_counted() -> None:
    log = PostfixLog(PostfixParams())
    for who in ("x[0:ffff::1]", "evil[2001:db8:e::7][2001:db8::1]", "e vil[2001:db8::1]", "x[999.1.1.1]"):
        assert events([said("postfix/smtpd", f"NOQUEUE: reject: RCPT from {who}: 550 5.7.1 no; {ENVELOPE}")], log) == []
    assert (log.counts()["bogons"], log.counts()["no_address"], log.dropped()) == (1, 3, 4)


@pytest.mark.parametrize(
    ("program", "login", "service"),
    [
        ("postfix/smtpd", "", Service.MX),
        ("postfix/submission/smtpd", "", Service.SUBMISSION),
        ("postfix/smtps/smtpd", "", Service.SUBMISSION),
        ("postfix-submissions/smtpd", "", Service.SUBMISSION),
        ("postfix/smtpd", ", sasl_method=PLAIN, sasl_username=u", Service.SUBMISSION),
    ],
)
def test_service(program: str, login: str, service: Service) -> None:
    (event,) = events([*received(service=program, login=login), accepted()])
    assert (event.service, event.authenticated) == (service, bool(login))


def test_names_of_submission_are_configurable() -> None:
    log = PostfixLog(PostfixParams(submission_names=("msa",)))
    assert events([*received(service="postfix/msa/smtpd"), accepted()], log)[0].service is Service.SUBMISSION
    assert events([*received(service="postfix/submission/smtpd"), accepted()], log)[0].service is Service.MX


def session(*messages: str, program: str = "postfix/smtpd", count: str = "ehlo=1 auth=0/3 commands=1/4") -> list[Event]:
    ends = f"disconnect from {WHO} {count}"
    return events([said(program, m) for m in (f"connect from {WHO}", *messages, ends)])


def test_a_failed_login_counts_once() -> None:
    failed = f"warning: {WHO}: SASL LOGIN authentication failed: UGFzc3dvcmQ6"
    assert [e.verdict for e in session(failed, failed)] == [Verdict.AUTH_FAIL] * 2
    assert [e.verdict for e in session()] == [Verdict.AUTH_FAIL]
    assert session(count="ehlo=1 auth=2 mail=1 commands=4") == []
    assert session(program="postfix/submission/smtpd") == []


def test_our_own_authentication_trouble_gives_nothing() -> None:
    ours = f"warning: {WHO}: SASL LOGIN authentication failed: Connection lost to authentication server"
    assert session(ours) == []


def test_before_queue_filter() -> None:
    good = session(
        f"NOQUEUE: client={WHO}", f"proxy-accept: END-OF-MESSAGE: 250 2.0.0 Ok: queued as 7; {ENVELOPE}", count=""
    )
    assert [e.verdict for e in good] == [Verdict.HAM]
    bad = session(f"proxy-reject: END-OF-MESSAGE: 554 5.7.1 spam; {ENVELOPE}", count="")
    assert [e.verdict for e in bad] == [Verdict.SPAM]
    assert bad[0].lo == 1


def test_a_process_without_session_names_nobody() -> None:
    assert events([said("postfix/smtpd", f"proxy-reject: END-OF-MESSAGE: 554 5.7.1 spam; {ENVELOPE}")]) == []


def test_hosts_and_processes_are_kept_apart() -> None:
    """A log that many hosts write: the same queue id and process number of another host is another message."""
    lines = [
        said("postfix/smtpd", f"4104E3D: client={WHO}", host="mx1"),
        said("postfix/smtpd", "4104E3D: client=x[2001:db8:b::1]", host="mx2"),
        said("postfix/qmgr", "4104E3D: from=<>, size=7, nrcpt=1 (queue active)", host="mx2"),
        said("postfix/qmgr", "4104E3D: from=<>, size=7, nrcpt=2 (queue active)", host="mx1"),
    ]
    assert [((e.hi, e.lo), e.rcpt_ok) for e in events(lines)] == [
        (key_text("2001:db8:b::1"), 1),
        (key_text(CLIENT), 2),
    ]


def test_dkim_and_spf_by_queue_id() -> None:
    checks = [
        said("opendkim", '4104E3D: signature=7ZBD1tsl domain=Example.ORG selector=s1 result="no signature error"'),
        said("opendkim", "4104E3D: DKIM verification successful"),
        said("opendmarc", "4104E3D: SPF(mailfrom): a@example.org pass"),
    ]
    (event,) = events([*received(), *checks, accepted()])
    assert (event.dkim, event.spf) == (Authentication.PASS, Authentication.PASS)
    assert event.dkim_domain == domain_hash("example.org")
    (event,) = events([*received(), checks[0], said("opendkim", "4104E3D: bad signature data"), accepted()])
    assert (event.dkim, event.dkim_domain, event.spf) == (Authentication.FAIL, 0, Authentication.NONE)


@pytest.mark.parametrize(
    "check",
    [
        '4104E3D: signature=7 domain=good.example selector=s result="bad"; signature=8 domain=x.example selector=s '
        'result="no signature error"',
        '4104E3D: signature=7 domain=good.example selector=a b result="no signature error"',
        "4104E3D: s=x d=good.example SSL error:04091068:rsa routines",
    ],
)
def test_a_domain_that_is_not_sure_is_none(check: str) -> None:
    lines = [
        *received(),
        said("opendkim", check),
        said("opendkim", "4104E3D: DKIM verification successful"),
        accepted(),
    ]
    assert events(lines)[0].dkim_domain == 0


def test_tables_are_bounded() -> None:
    log = PostfixLog(PostfixParams(queue_ids=101, sessions=53, queue_age_s=100))
    for n in range(1009):
        log.feed(said("postfix/smtpd", f"connect from {WHO}", pid=n), 7.0)
        log.feed(said("postfix/smtpd", f"{n:07X}: client={WHO}", pid=n), 7.0)
    counts = log.counts()
    assert (counts["queue_ids"], counts["sessions"], counts["queue_ids_forgotten"]) == (101, 53, 1009 - 101)
    assert events([accepted(f"{1008:07X}")], log)
    assert events([accepted(f"{7:07X}")], log) == []
    assert events([accepted(f"{1007:07X}")], log, at_s=108.0) == []  # too old


def test_rate_notices_are_counted_only() -> None:
    log = PostfixLog(PostfixParams())
    lines = [
        said("postfix/anvil", f"statistics: max connection rate 7/60s for (smtpd:{CLIENT}) at Nov  2 08:03:43"),
        said("postfix/smtpd", f"warning: Connection rate limit exceeded: 61 from {WHO} for service smtp"),
    ]
    assert events(lines, log) == []
    assert log.counts()["rate_notices"] == 2


HOSTILE = st.one_of(
    st.sampled_from(
        [
            "x[2001:db8:e::7]",
            "<a@b> from evil[2001:db8:e::7]: 550 5.1.1 <x>: User unknown",
            "NOQUEUE: reject: RCPT from evil[2001:db8:e::7]: 550 5.1.1",
            "?2025-11-02T08:03:43Z mx1 postfix/smtpd[71]: connect from evil[2001:db8:e::7]",
            "4104E3D: client=evil[2001:db8:e::7]",
            ", sasl_method=PLAIN, sasl_username=x",
            ", nrcpt=7 (queue active)",
            "x" * 9001,
        ]
    ),
    st.text(alphabet=st.characters(max_codepoint=255, exclude_characters="\n"), max_size=60),
)


@settings(deadline=None)
@given(st.lists(HOSTILE, min_size=7, max_size=7), st.randoms(use_true_random=False))
def test_free_text_names_nobody_through_the_joins(text: list[str], shuffle: random.Random) -> None:
    """Whole sessions full of hostile text, their lines in any order: every event is the client's."""
    lines = [
        said("postfix/smtpd", f"connect from {WHO}"),
        said("postfix/smtpd", f"connect from {text[0]}[{CLIENT}]", pid=73),
        said("postfix/smtpd", f"NOQUEUE: reject: RCPT from {WHO}: 550 5.1.1 <{text[1]}>: no; helo=<{text[2]}>"),
        said("postfix/smtpd", f"4104E3D: client={WHO}"),
        said("postfix/smtpd", f"4104E3D: client={WHO}, orig_client={text[4]}"),
        said("postfix/cleanup", f"4104E3D: reject: header Subject: {text[3]} from {WHO}; from=<{text[4]}>: 5.7.1 no"),
        said("postfix/cleanup", f"4104E3D: message-id=<{text[3]}>"),
        said("opendkim", f"4104E3D: {text[5]}"),
        said("postfix/smtpd", f"proxy-reject: END-OF-MESSAGE: 554 5.7.1 {text[6]}; from=<{text[4]}>"),
        said("postfix/qmgr", f"4104E3D: from=<{text[4]}>, size=7, nrcpt=1 (queue active)"),
        said("postfix/smtpd", f"warning: {WHO}: SASL {text[5]} authentication failed: {text[6]}"),
        said("postfix/smtpd", f"disconnect from {WHO} ehlo=1 auth=0/3 commands=1/4"),
    ]
    shuffle.shuffle(lines)
    assert all((e.hi, e.lo) == key_text(CLIENT) and not e.authenticated for e in events(lines))
