"""Takes Postfix's log lines apart: one line in, what it tells out. `postfix_log` joins the lines and gives events.

The client address is taken only from the field Postfix writes itself, at its fixed place from the start of the message.
HELO, sender, recipient and replies stand behind it and are never searched for one; a host name stands before it, and a
line whose name is no host name is refused. Two things are relied on: Postfix turns line breaks in what a client sends
into `?` (and syslog daemons into `#012`), and it logs `unknown` for a host name with characters beyond [A-Za-z0-9._-]
(valid_hostname), so that no name holds a whole `x[address]: ` of its own.

Invariants:
    free-text-names-nobody: names, HELO, sender, recipient and replies never choose the address of a line.
    temporary-is-no-evidence: a 4xx answer never gives a bad verdict.
    never-raises: whatever bytes a line holds.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from edge.core.model import Authentication, Verdict
from edge.evidence.syslog import split


class Kind(enum.IntEnum):
    """What a line tells."""

    CONNECT = 1  # a process has a client
    DISCONNECT = 2
    VERDICT = 3  # complete: address and verdict
    LOGIN_FAILED = 4
    LOGIN_ERROR = 5  # a login failed by our fault
    CLIENT = 6  # a queue id has a client
    ACCEPTED = 7  # a queue id is in the queue
    CONTENT = 8  # a queue id was refused; the line's own address, if any, stands behind free text
    PROXY = 9  # a before-queue filter has spoken, of the process's client
    DKIM = 10
    DKIM_DOMAIN = 11  # of its only signature
    SPF = 12
    RATE = 13  # anvil counted something
    NO_ADDRESS = 14  # a line that should name a client, and does not in the way Postfix writes it


class Parsed(NamedTuple):
    """One line that matters. `address` is as Postfix wrote it; `session` is host, program and process."""

    kind: Kind
    host: bytes
    tag: bytes
    pid: bytes
    queue: bytes = b""
    address: bytes = b""
    verdict: Verdict = Verdict.NONE
    rcpt: int = 0  # recipients: accepted with HAM, else refused
    ends: bool = False  # the message is gone with this line
    authenticated: bool = False
    result: Authentication = Authentication.NONE
    text: bytes = b""


# A PTR name is whatever its owner says; Postfix lets pass only what is a host name, and so do we.
_CLIENT = rb"[A-Za-z0-9._-]{1,255}\[(?:IPv6:)?([0-9A-Fa-f:.]{2,45})\](?::\d{1,5})?"
_QUEUE = rb"([0-9A-Za-z]{5,32})"
_STAGE = rb"[A-Z-]{2,20}(?: content)?"  # Postfix's word for where the session stood, not the client's

_CONNECT = re.compile(rb"connect from " + _CLIENT + rb"\Z")
_DISCONNECT = re.compile(rb"disconnect from " + _CLIENT + rb"((?: [a-z]{1,16}=\d{1,9}(?:/\d{1,9})?){0,64})\Z")
_AUTH_COUNT = re.compile(rb" auth=(\d{1,9})(?:/(\d{1,9}))?(?: |\Z)")
_REJECT = re.compile(
    _QUEUE
    + rb": (reject|milter-reject|milter-discard): ("
    + _STAGE
    + rb") from "
    + _CLIENT
    + rb": (?:([2-5])\d\d )?(?:([245])\.(\d{1,3})\.(\d{1,3}) )?"
)
_PROXY = re.compile(rb"(?:[0-9A-Za-z]{5,32}: )?proxy-(accept|reject): END-OF-MESSAGE: ([245])\d\d ")
_QUEUED = re.compile(_QUEUE + rb": client=" + _CLIENT + rb"(?:(, sasl_method=[^ ,]{0,64}, sasl_username=)|,|\Z)")
_WARNING = re.compile(rb"warning: (?:(non-SMTP command) from )?" + _CLIENT + rb": ")
_ABUSE = re.compile(
    rb"(?:improper command pipelining|too many errors) after "
    + _STAGE
    + rb"(?: \(\d{1,20} bytes\))? from "
    + _CLIENT
    + rb"(?::|\Z)"
)
_SCREEN = re.compile(
    rb"(?:PREGREET \d{1,9} after [\d.]{1,20} from|COMMAND PIPELINING from|NON-SMTP COMMAND from|BARE NEWLINE from"
    rb"|DNSBL rank \d{1,9} for|BLACKLISTED|DENYLISTED) \[([0-9A-Fa-f:.]{2,45})\]:\d{1,5}(?: |:|\Z)"
)
_CONTENT = re.compile(_QUEUE + rb": (?:reject|discard): (?:header|body) ")
_FROM = re.compile(_QUEUE + rb": from=<")
_NRCPT = re.compile(rb", nrcpt=(\d{1,9}) \(queue active\)\Z")
_DKIM = re.compile(_QUEUE + rb": (?:DKIM verification (successful)\Z|bad signature data\Z)")
# With LogResults, for a message with one signature only; `s=… d=… SSL` lines tell of failed signatures.
_DKIM_DOMAIN = re.compile(
    _QUEUE
    + rb": signature=[^ ]{1,32} domain=([A-Za-z0-9._-]{1,253}) selector=[A-Za-z0-9._-]{1,253}"
    + rb' result="no signature error"\Z'
)
_SPF = re.compile(_QUEUE + rb": SPF\(mailfrom\): (?:[^ ]{1,512} )?(pass|softfail|fail)\Z")

_LIMIT = re.compile(rb"warning: [A-Za-z ]{1,40} (?:rate|concurrency) limit exceeded: ")

_OUR_FAULT = (b"Connection lost to authentication server", b"generic failure", b"Temporary authentication failure")
"""Answers of Postfix's Dovecot and Cyrus clients when the authentication server is not there."""

_OUR_SUBJECTS = (b"2", b"3", b"4")
"""Second number of an enhanced status (RFC 3463): mailbox, mail system, network of the receiving side."""

_GONE_ADDRESSES = (b"0", b"1", b"6")
"""5.1.0 bad address, 5.1.1 no such mailbox, 5.1.6 mailbox has moved."""

_BARE_LF = b"bare <LF> received"
"""The one refusal Postfix logs without its status (smtpd_forbid_bare_newline); its default is 550."""

_NOWHERE = re.compile(rb"(?:<[^>]{0,1024}>: )?Recipient address rejected: (?:User unknown|undeliverable)")

_Maker = Callable[[bytes, bytes, bytes, bytes], Parsed | None]


def parse(line: bytes) -> Parsed | None:
    """Take one line apart, without its newline; None when it tells nothing. Never raises, never looks at the time."""
    head = split(line)
    if head is None:
        return None
    host, tag, pid, message = head
    # Postfix always writes syslog_name/program; a bare `smtpd` is another MTA.
    _, slash, program = tag.rpartition(b"/")
    make = (_POSTFIX if slash else _MILTERS).get(program)
    return None if make is None else make(host, tag, pid, message)


def _smtpd(host: bytes, tag: bytes, pid: bytes, message: bytes) -> Parsed | None:
    start = message[:8]
    if start == b"connect ":
        found = _CONNECT.match(message)
        if found is None:
            return _unnamed(host, tag, pid, message)
        return Parsed(Kind.CONNECT, host, tag, pid, address=found[1])
    if start == b"disconne":
        found = _DISCONNECT.match(message)
        if found is None:
            return _unnamed(host, tag, pid, message)
        return Parsed(Kind.DISCONNECT, host, tag, pid, address=found[1], text=found[2])
    if start == b"warning:":
        return _warning(host, tag, pid, message)
    if start in (b"improper", b"too many"):
        found = _ABUSE.match(message)
        if found is None:
            return _unnamed(host, tag, pid, message)
        return Parsed(Kind.VERDICT, host, tag, pid, address=found[1], verdict=Verdict.POLICY_REJECT)
    if b": client=" in message[:42]:
        return _client(host, tag, pid, message)
    if b"reject: " in message[:56] or b": milter-discard: " in message[:56] or b"proxy-accept: " in message[:56]:
        return _reject(host, tag, pid, message)
    return None


def _unnamed(host: bytes, tag: bytes, pid: bytes, message: bytes) -> Parsed | None:
    """A line whose client field is not as Postfix writes one. `unknown[unknown]` is: the client had gone already."""
    return None if b" from unknown[unknown]" in message[:96] else Parsed(Kind.NO_ADDRESS, host, tag, pid)


def _warning(host: bytes, tag: bytes, pid: bytes, message: bytes) -> Parsed | None:
    found = _WARNING.match(message)
    if found is None:
        return Parsed(Kind.RATE, host, tag, pid) if _LIMIT.match(message) else None
    if found[1] is not None:
        return Parsed(Kind.VERDICT, host, tag, pid, address=found[2], verdict=Verdict.POLICY_REJECT)
    text = message[found.end() :]
    if not text.startswith(b"SASL "):
        return None
    _, failed, why = text.partition(b" authentication failed: ")
    ours = not failed or why.startswith(_OUR_FAULT)  # without "failed" the client gave up: `authentication aborted`
    kind = Kind.LOGIN_ERROR if ours else Kind.LOGIN_FAILED
    return Parsed(kind, host, tag, pid, address=found[2], verdict=Verdict.AUTH_FAIL)


def _client(host: bytes, tag: bytes, pid: bytes, message: bytes) -> Parsed | None:
    found = _QUEUED.match(message)
    if found is None:
        return _unnamed(host, tag, pid, message)
    queue, address, login = found.groups()
    if queue == b"NOQUEUE":  # a before-queue filter will have the message; proxy-accept tells the rest
        return None
    return Parsed(Kind.CLIENT, host, tag, pid, queue=queue, address=address, authenticated=login is not None)


def _reject(host: bytes, tag: bytes, pid: bytes, message: bytes) -> Parsed | None:
    found = _REJECT.match(message)
    if found is None:
        proxy = _PROXY.match(message)
        if proxy is None:
            return _unnamed(host, tag, pid, message) if b": reject: " in message[:48] else None
        action, severity = proxy.groups()
        accepted = action == b"accept" and severity == b"2"
        refused = Verdict.SPAM if severity == b"5" else Verdict.NONE
        return Parsed(Kind.PROXY, host, tag, pid, verdict=Verdict.HAM if accepted else refused)
    queue, action, stage, address, code, severity, subject, detail = found.groups()
    text = message[found.end() :]
    permanent = (code or severity) == b"5" or action == b"milter-discard" or text.startswith(_BARE_LF)
    verdict = Verdict.NONE
    if permanent and action != b"reject" and stage == b"END-OF-MESSAGE":
        verdict = Verdict.SPAM
    elif permanent:
        verdict = _refusal(subject, detail, text)
    at_rcpt = stage == b"RCPT"
    return Parsed(
        Kind.VERDICT,
        host,
        tag,
        pid,
        queue=b"" if queue == b"NOQUEUE" else queue,
        address=address,
        verdict=verdict,
        rcpt=int(at_rcpt and permanent),
        ends=stage == b"END-OF-MESSAGE",
    )


def _refusal(subject: bytes | None, detail: bytes | None, text: bytes) -> Verdict:
    """What a permanent refusal says of the client. The text can only choose between the bad verdicts."""
    if subject in _OUR_SUBJECTS:
        return Verdict.NONE
    if subject == b"1" and b">: Sender address rejected: " in text[:1100]:
        return Verdict.POLICY_REJECT  # 5.1.0 and 5.1.1 are said of senders too
    if subject == b"1" and detail in _GONE_ADDRESSES:
        return Verdict.UNKNOWN_USER
    # Sites choose their own status for unknown users; 5.7.x is policy whatever the recipient's name contains.
    if subject != b"7" and _NOWHERE.match(text):
        return Verdict.UNKNOWN_USER
    return Verdict.POLICY_REJECT


def _postscreen(host: bytes, tag: bytes, pid: bytes, message: bytes) -> Parsed | None:
    found = _SCREEN.match(message)
    if found is None:
        return None
    return Parsed(Kind.VERDICT, host, tag, pid, address=found[1], verdict=Verdict.POLICY_REJECT)


def _cleanup(host: bytes, tag: bytes, pid: bytes, message: bytes) -> Parsed | None:
    if b": milter-" in message[:42]:
        return _reject(host, tag, pid, message)
    found = _CONTENT.match(message)
    if found is None:
        return None
    return Parsed(Kind.CONTENT, host, tag, pid, queue=found[1], verdict=Verdict.SPAM, ends=True)


def _qmgr(host: bytes, tag: bytes, pid: bytes, message: bytes) -> Parsed | None:
    if not message.endswith(b" (queue active)"):
        return None
    found, recipients = _FROM.match(message), _NRCPT.search(message, max(0, len(message) - 40))
    if found is None or recipients is None:
        return None
    return Parsed(
        Kind.ACCEPTED, host, tag, pid, queue=found[1], verdict=Verdict.HAM, rcpt=int(recipients[1]), ends=True
    )


def _opendkim(host: bytes, tag: bytes, pid: bytes, message: bytes) -> Parsed | None:
    found = _DKIM.match(message)
    if found is not None:
        result = Authentication.PASS if found[2] else Authentication.FAIL
        return Parsed(Kind.DKIM, host, tag, pid, queue=found[1], result=result)
    found = _DKIM_DOMAIN.match(message)
    if found is None:
        return None
    return Parsed(Kind.DKIM_DOMAIN, host, tag, pid, queue=found[1], text=found[2])


def _opendmarc(host: bytes, tag: bytes, pid: bytes, message: bytes) -> Parsed | None:
    found = _SPF.match(message)
    if found is None:
        return None
    return Parsed(Kind.SPF, host, tag, pid, queue=found[1], result=Authentication[found[2].decode().upper()])


def _anvil(host: bytes, tag: bytes, pid: bytes, message: bytes) -> Parsed | None:
    return Parsed(Kind.RATE, host, tag, pid) if message.startswith(b"statistics: max connection rate ") else None


_POSTFIX: Mapping[bytes, _Maker] = {
    b"smtpd": _smtpd,
    b"postscreen": _postscreen,
    b"cleanup": _cleanup,
    b"qmgr": _qmgr,
    b"anvil": _anvil,
}
_MILTERS: Mapping[bytes, _Maker] = {b"opendkim": _opendkim, b"opendmarc": _opendmarc}
