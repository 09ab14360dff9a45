"""Joins Postfix's log lines into events.

What counts, and where it is taken from, so that nothing counts twice:

* Refused recipients and commands: the `reject:` line of smtpd. Permanent ones only are evidence; a temporary one (grey
  listing, no reverse name, our own trouble) gives an event without verdict. So does a permanent one that tells of our
  side: mailbox full or disabled, message too big (RFC 3463 subjects 2, 3 and 4).
* Refused recipients are counted and told once: with the message that was accepted for the others, else when the session
  ends, with how many its `disconnect` line says were accepted. A mailing list's message to forty of whom eight are gone
  is one message, not eight attempts. Of other refusals by policy the first of a session is told: after it the same
  client only goes on, and `too many errors` says no more than what led to it.
* Refused content: `milter-reject:`, `milter-discard:`, `proxy-reject:`, and the header and body checks of cleanup.
* Failed logins: the `SASL … authentication failed` warning, unless our authentication server was at fault. A bot that
  tries to log in where port 25 offers none leaves no warning: the `auth=0/3` of its `disconnect` line gives one event,
  only for MX and only when the session had no warning.
* postscreen: its own tests (PREGREET, DNSBL rank, …). Its `reject:` lines only repeat them and are left out.
* Mail accepted: when the queue manager first takes the message (`queue active`), not at `removed` or `status=sent`:
  cleanup, milters and checks have passed then, and a bounce or a deferral days later is no fault of the client. With a
  before-queue filter it is `proxy-accept:`. What an after-queue filter thinks of it comes later and is not waited for.
* DKIM: opendkim by queue id; the domain from its LogResults line, when there was one signature. SPF: OpenDMARC's
  `SPF(mailfrom)` by queue id. policyd-spf names no queue id and is left out.

Invariants:
    one-acceptance-a-message: a queue id gives ham at most once, and never after its content was refused.
    local-mail-is-nobody's: loopback clients give no event.
    one-event-for-refused-recipients: a session's refused recipients are told once, however many lines told of them.
    tables-are-bounded: queue ids and sessions are limited in number, queue ids in age too.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import msgspec

from edge.abi import Service
from edge.core.model import Authentication, Event, Verdict
from edge.core.prefix import is_ipv4, key_text
from edge.errors import InputError
from edge.evidence.jsonl import CACHED_SOURCES, domain_hash
from edge.evidence.postfix import Kind, Parsed, parse

_AUTH_COUNT = re.compile(rb" auth=(\d{1,9})(?:/(\d{1,9}))?(?: |\Z)")
_RCPT_COUNT = re.compile(rb" rcpt=(\d{1,9})(?:/\d{1,9})?(?: |\Z)")

_CACHED_TAGS = 1024
"""Syslog tags whose service is remembered; a host has a dozen."""

_Key = tuple[int, int]


class PostfixParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How Postfix's log is read."""

    submission_names: Annotated[
        tuple[str, ...],
        msgspec.Meta(
            description="Words in a service's syslog_name that make it submission rather than MX: those of the "
            "master.cf that Postfix ships."
        ),
    ] = ("submission", "smtps", "submissions")
    queue_ids: Annotated[
        int,
        msgspec.Meta(
            gt=0,
            le=1_000_000,
            description="Messages being received that are remembered between their first line and their acceptance; "
            "the oldest goes first. About 400 bytes each; Postfix runs 100 smtpd processes by default.",
        ),
    ] = 65_536
    queue_age_s: Annotated[
        float,
        msgspec.Meta(
            gt=0,
            le=86_400,
            description="Seconds after which a message that was never accepted is forgotten. One hour: Postfix waits "
            "300 s for each read (smtpd_timeout), a big message takes many.",
        ),
    ] = 3600.0
    sessions: Annotated[
        int,
        msgspec.Meta(
            gt=0,
            le=1_000_000,
            description="smtpd processes whose current client is remembered; the oldest goes first.",
        ),
    ] = 16_384


@dataclass(slots=True)
class _Session:
    """The client an smtpd process serves now."""

    address: bytes
    warned: bool = False  # a login of its client has been reported
    rejected: bool = False  # and a refusal by policy
    unknown: int = 0  # recipients refused since the last message: unknown ones
    unwanted: int = 0  # those refused by policy
    accepted: int = 0  # recipients of the messages accepted so far
    message: _Message | None = None  # the one whose recipients were refused, for its service and login

    def take(self) -> int:
        """The refused recipients, which are then told."""
        refused, self.unknown, self.unwanted, self.message = self.unknown + self.unwanted, 0, 0, None
        return refused


@dataclass(slots=True)
class _Message:
    """A queue id on its way into the queue."""

    key: _Key
    service: Service
    authenticated: bool
    at_s: float
    session: _Session | None
    dkim: Authentication = Authentication.NONE
    domain: bytes = b""
    spf: Authentication = Authentication.NONE


class PostfixLog:
    """Turns lines into events, one at most for each line; remembers messages and sessions between lines."""

    def __init__(self, params: PostfixParams) -> None:
        self._params = params
        self._messages: OrderedDict[tuple[bytes, bytes], _Message] = OrderedDict()
        self._sessions: OrderedDict[tuple[bytes, bytes, bytes], _Session] = OrderedDict()
        self._words = tuple(name.encode() for name in params.submission_names)
        self._key = lru_cache(maxsize=CACHED_SOURCES)(_client_key)
        self._service = lru_cache(maxsize=_CACHED_TAGS)(self._service_of)
        self._counts = dict.fromkeys(
            ("local", "bogons", "no_address", "rate_notices", "queue_ids_forgotten", "sessions_forgotten"), 0
        )

    def counts(self) -> Mapping[str, int]:
        """Totals: `no_address` lines should have named a client and did not in Postfix's way; 0 on a healthy system.

        `local` clients and `bogons` gave no event, `rate_notices` are anvil's, `queue_ids_forgotten` and
        `sessions_forgotten` were dropped with their evidence for want of room.
        """
        return self._counts | {"queue_ids": len(self._messages), "sessions": len(self._sessions)}

    def dropped(self) -> int:
        """Evidence that could not be used."""
        names = ("bogons", "no_address", "queue_ids_forgotten", "sessions_forgotten")
        return sum(self._counts[name] for name in names)

    def feed(self, line: bytes, ts_s: float) -> Event | None:
        """One line; `ts_s` is the arrival time, or the line's own time in a replay. Never raises."""
        parsed = parse(line)
        if parsed is None:
            return None
        match parsed.kind:
            case Kind.VERDICT:
                return self._verdict(parsed, ts_s)
            case Kind.CONNECT:
                return self._connected(parsed, ts_s)
            case Kind.DISCONNECT:
                return self._disconnected(parsed, ts_s)
            case Kind.CLIENT:
                self._queued(parsed, ts_s)
            case Kind.ACCEPTED | Kind.CONTENT:
                return self._settled(parsed, ts_s)
            case Kind.LOGIN_FAILED | Kind.LOGIN_ERROR:
                return self._login(parsed, ts_s)
            case Kind.PROXY:
                session = self._session(parsed)
                if session is None:
                    return None
                return self._event(parsed, session.address, ts_s, rcpt_bad=session.take())
            case Kind.DKIM | Kind.DKIM_DOMAIN | Kind.SPF:
                self._authenticated(parsed)
            case Kind.RATE:
                self._counts["rate_notices"] += 1
            case Kind.NO_ADDRESS:
                self._counts["no_address"] += 1
        return None

    def _verdict(self, parsed: Parsed, ts_s: float) -> Event | None:
        message = self._messages.get((parsed.host, parsed.queue)) if parsed.queue else None
        if message is not None and parsed.ends:
            del self._messages[parsed.host, parsed.queue]
        session = self._session(parsed)
        if session is not None and session.address == parsed.address:
            if parsed.rcpt and parsed.verdict is not Verdict.NONE:
                session.unknown += parsed.verdict is Verdict.UNKNOWN_USER
                session.unwanted += parsed.verdict is not Verdict.UNKNOWN_USER
                session.message = message
                return None
            if parsed.verdict is Verdict.POLICY_REJECT:
                if session.rejected or session.unknown or session.unwanted:
                    return None
                session.rejected = True
        return self._event(parsed, parsed.address, ts_s, message)

    def _settled(self, parsed: Parsed, ts_s: float) -> Event | None:
        """A queue id was accepted or its content refused. One that did not come by smtpd is not known here."""
        message = self._messages.pop((parsed.host, parsed.queue), None)
        if message is None or ts_s - message.at_s > self._params.queue_age_s:
            return None
        good = parsed.verdict is Verdict.HAM
        proven = message.domain if message.dkim is Authentication.PASS else b""
        refused = 0
        if message.session is not None:
            refused = message.session.take()
            message.session.accepted += parsed.rcpt if good else 0
        return Event(
            ts_s=ts_s,
            hi=message.key[0],
            lo=message.key[1],
            service=message.service,
            verdict=parsed.verdict,
            authenticated=message.authenticated,
            rcpt_ok=parsed.rcpt if good else 0,
            rcpt_bad=refused,
            dkim=message.dkim,
            dkim_domain=domain_hash(proven.decode("ascii")),
            spf=message.spf,
        )

    def _login(self, parsed: Parsed, ts_s: float) -> Event | None:
        session = self._session(parsed)
        if session is not None:
            session.warned = True
        return self._event(parsed, parsed.address, ts_s) if parsed.kind is Kind.LOGIN_FAILED else None

    def _session(self, parsed: Parsed) -> _Session | None:
        return self._sessions.get((parsed.host, parsed.tag, parsed.pid))

    def _connected(self, parsed: Parsed, ts_s: float) -> Event | None:
        if not parsed.pid.isdigit():
            return None  # without a process number two sessions could not be told apart
        key = (parsed.host, parsed.tag, parsed.pid)
        before = self._sessions.pop(key, None)
        self._sessions[key] = _Session(parsed.address)
        if len(self._sessions) > self._params.sessions:
            _, oldest = self._sessions.popitem(last=False)
            self._counts["sessions_forgotten"] += oldest.take() > 0
        return None if before is None else self._refused(parsed, before, 0, ts_s)  # its end was not logged

    def _disconnected(self, parsed: Parsed, ts_s: float) -> Event | None:
        session = self._sessions.pop((parsed.host, parsed.tag, parsed.pid), None)
        if session is None or session.address != parsed.address:
            return None
        tries, accepted = _AUTH_COUNT.search(parsed.text), _RCPT_COUNT.search(parsed.text)
        guessed = tries is not None and tries[2] is not None and not session.warned
        if guessed and self._service(parsed.tag) is Service.MX:
            return self._event(
                parsed._replace(verdict=Verdict.AUTH_FAIL), parsed.address, ts_s, rcpt_bad=session.take()
            )
        return self._refused(parsed, session, 0 if accepted is None else int(accepted[1]), ts_s)

    def _refused(self, parsed: Parsed, session: _Session, accepted: int, ts_s: float) -> Event | None:
        """What a session that ends has refused recipients for; `accepted` are those of all its messages."""
        verdict = Verdict.UNKNOWN_USER if session.unknown > session.unwanted else Verdict.POLICY_REJECT
        message, refused = session.message, session.take()
        if not refused:
            return None
        of_none = max(0, accepted - session.accepted)
        line = parsed._replace(verdict=verdict)
        return self._event(line, session.address, ts_s, message, rcpt_ok=of_none, rcpt_bad=refused)

    def _queued(self, parsed: Parsed, ts_s: float) -> None:
        key = self._keyed(parsed.address)
        slot = (parsed.host, parsed.queue)
        self._messages.pop(slot, None)
        if key is None:
            return
        service = Service.SUBMISSION if parsed.authenticated else self._service(parsed.tag)
        self._messages[slot] = _Message(key, service, parsed.authenticated, ts_s, self._session(parsed))
        if len(self._messages) > self._params.queue_ids:
            self._messages.popitem(last=False)
            self._counts["queue_ids_forgotten"] += 1
        oldest = next(iter(self._messages))
        if ts_s - self._messages[oldest].at_s > self._params.queue_age_s:
            del self._messages[oldest]  # one in, one out: enough to keep the table as young as its newest

    def _authenticated(self, parsed: Parsed) -> None:
        message = self._messages.get((parsed.host, parsed.queue))
        if message is None:
            return
        if parsed.kind is Kind.SPF:
            message.spf = parsed.result
        elif parsed.kind is Kind.DKIM:
            message.dkim = parsed.result
        else:
            message.domain = parsed.text

    def _event(
        self,
        parsed: Parsed,
        address: bytes,
        ts_s: float,
        message: _Message | None = None,
        *,
        rcpt_ok: int = 0,
        rcpt_bad: int = 0,
    ) -> Event | None:
        key = self._keyed(address)
        if key is None:
            return None
        good = parsed.verdict is Verdict.HAM
        return Event(
            ts_s=ts_s,
            hi=key[0],
            lo=key[1],
            service=self._service(parsed.tag) if message is None else message.service,
            verdict=parsed.verdict,
            authenticated=message is not None and message.authenticated,
            rcpt_ok=parsed.rcpt if good else rcpt_ok,
            rcpt_bad=rcpt_bad or (0 if good else parsed.rcpt),
        )

    def _keyed(self, address: bytes) -> _Key | None:
        key = self._key(address)
        if isinstance(key, str):
            self._counts[key] += 1
            return None
        return key

    def _service_of(self, tag: bytes) -> Service:
        name = tag.rpartition(b"/")[0]
        return Service.SUBMISSION if any(word in name for word in self._words) else Service.MX


def _client_key(address: bytes) -> _Key | str:
    """The key of a client address as Postfix writes it, or the name of the counter it belongs to."""
    try:
        key = key_text(address.decode("ascii"))
    except InputError:
        return "no_address"
    if key is None:
        return "bogons"
    hi, lo = key
    loopback = (hi == 0 and lo == 1) or (is_ipv4(hi) and hi >> 24 & 0xFF == 127)
    return "local" if loopback else key
