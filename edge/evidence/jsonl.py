"""Evidence as JSON lines, one object a line: the format every adapter can produce and every reader takes.

    {"ts": 1790000000.123, "src": "2a0f:9400::1", "dport": 25, "handshake": true,
     "mta": {"verdict": "ham|spam|unknown_user|auth_fail|policy_reject|none", "rcpt_ok": 1, "rcpt_bad": 0,
             "dkim": "pass|fail|none", "dkim_domain": "example.org", "spf": "pass|softfail|fail|none"}}

`ts`, `src`, `dport` and `handshake` must be there; `mta` may be absent or null, and of its fields only `verdict` must
be there; the others may be null, which says the same as leaving them out. Two things do not survive writing. A domain
is kept as its hash, so it is written as `<16 hex digits>.hash.invalid`, which reads back as the same hash. And the
format has no word for a client that logged in (`authenticated`).

Invariants:
    unknown-keys-are-counted: a key the format does not know never refuses a line and never reaches the event.
    malformed-is-refused: a line that breaks the format raises InputError saying what was expected and found.
    half-open-has-no-verdict: a SYN that was never completed carries no `mta`.
    unproven-domain-is-dropped: a domain counts only with `"dkim": "pass"`; otherwise it is what anybody may write.
    null-is-absent: a null field of `mta` reads as if it were left out.
    written-reads-back: decode(encode(e)) == e but for `authenticated`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import Annotated, Literal

import msgspec

from edge.abi import Service
from edge.core.model import Authentication, Event, Verdict
from edge.core.prefix import is_ipv4, key_text
from edge.errors import InputError

MX_PORTS = (25,)
"""Ports of mail exchange (RFC 5321)."""

SUBMISSION_PORTS = (465, 587)
"""Ports of mail submission (RFC 8314, RFC 6409)."""

SHOWN_BYTES = 96
"""How much of a refused line its error shows."""

CACHED_SOURCES = 65536
"""Source addresses whose key is remembered: parsing one costs as much as the rest of the line; about 10 MiB."""

_HASHED = re.compile(
    r"([0-9a-f]{16})\.hash\.invalid"
)  # `.invalid` is nobody's (RFC 2606), so it cannot be forged by DKIM

_Count = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]


class _Mta(msgspec.Struct):
    verdict: Literal["ham", "spam", "unknown_user", "auth_fail", "policy_reject", "none"]
    rcpt_ok: _Count | None = None
    rcpt_bad: _Count | None = None
    dkim: Literal["pass", "fail", "none"] | None = None
    dkim_domain: Annotated[str, msgspec.Meta(max_length=253)] | None = None
    spf: Literal["pass", "softfail", "fail", "none"] | None = None


class _Line(msgspec.Struct):
    ts: Annotated[float, msgspec.Meta(ge=0)]
    src: Annotated[str, msgspec.Meta(max_length=64)]
    dport: _Count
    handshake: bool
    mta: _Mta | None = None


class _StrictMta(_Mta, forbid_unknown_fields=True):
    pass


class _StrictLine(_Line, forbid_unknown_fields=True):
    mta: _StrictMta | None = None


def domain_hash(domain: str) -> int:
    """The 64-bit identity of a DKIM domain, the same in every run; 0 for no domain. InputError when it is no domain.

    BLAKE2b of the IDNA form in lower case without a final dot, so `Bücher.example` and `xn--bcher-kva.example` are one.
    """
    name = domain.rstrip(".").lower()
    if not name:
        return 0
    hashed = _HASHED.fullmatch(name)
    if hashed is not None:
        return int(hashed[1], 16)
    try:
        ascii_name = name.encode("ascii") if name.isascii() else name.encode("idna").lower()
    except UnicodeError:
        raise InputError(f"expected a domain name, found {domain[:SHOWN_BYTES]!r}") from None
    return int.from_bytes(hashlib.blake2b(ascii_name, digest_size=8).digest(), "big") or 1


class JsonLines:
    """Decodes lines; one for each source, or shared. Counts what it leaves out.

    `unknown_keys`, `bogons` (sources that have no key) and `foreign_ports` (ports of neither service) are totals.
    """

    def __init__(
        self, *, mx_ports: Collection[int] = MX_PORTS, submission_ports: Collection[int] = SUBMISSION_PORTS
    ) -> None:
        self._services = dict.fromkeys(mx_ports, Service.MX) | dict.fromkeys(submission_ports, Service.SUBMISSION)
        self._strict = msgspec.json.Decoder(_StrictLine)
        self._lenient = msgspec.json.Decoder(_Line)
        self._key = lru_cache(maxsize=CACHED_SOURCES)(key_text)
        self.unknown_keys = 0
        self.bogons = 0
        self.foreign_ports = 0

    def counts(self) -> Mapping[str, int]:
        """The totals by name."""
        return {"unknown_keys": self.unknown_keys, "bogons": self.bogons, "foreign_ports": self.foreign_ports}

    def dropped(self) -> int:
        """Well-formed lines that gave no event."""
        return self.bogons + self.foreign_ports

    def feed(self, line: bytes, ts_s: float | None) -> Event | None:
        """One line as an event; `ts_s` replaces the line's own time (live), None keeps it (replay).

        None for a source that has no key and for a port of neither service. InputError for a line that breaks the
        format; it says what, the caller knows where (`decode_lines`).
        """
        parsed = self._parse(line)
        service = self._services.get(parsed.dport)
        if service is None:
            self.foreign_ports += 1
            return None
        mta = parsed.mta
        if mta is not None and not parsed.handshake:
            raise InputError('expected no "mta" where "handshake" is false, found one')
        keyed = self._key(parsed.src)
        if keyed is None:
            self.bogons += 1
            return None
        at_s = parsed.ts if ts_s is None else ts_s
        if mta is None:
            return Event(ts_s=at_s, hi=keyed[0], lo=keyed[1], service=service, handshake=parsed.handshake)
        dkim = _AUTHENTICATION[mta.dkim or "none"]
        return Event(
            ts_s=at_s,
            hi=keyed[0],
            lo=keyed[1],
            service=service,
            verdict=_VERDICT[mta.verdict],
            rcpt_ok=mta.rcpt_ok or 0,
            rcpt_bad=mta.rcpt_bad or 0,
            dkim=dkim,
            dkim_domain=domain_hash(mta.dkim_domain or "") if dkim is Authentication.PASS else 0,
            spf=_AUTHENTICATION[mta.spf or "none"],
        )

    def _parse(self, line: bytes) -> _Line:
        """Decode, first without tolerance: that is the common case, and the cheap way to notice unknown keys."""
        try:
            return self._strict.decode(line)
        except (msgspec.ValidationError, RecursionError):
            pass
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _malformed(line, error) from None
        try:
            parsed = self._lenient.decode(line)
            whole = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
            inner = msgspec.json.decode(whole["mta"], type=dict[str, msgspec.Raw]) if parsed.mta else {}
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _malformed(line, error) from None
        known = sum(key in _Line.__struct_fields__ for key in whole)
        known_inner = sum(key in _Mta.__struct_fields__ for key in inner)
        self.unknown_keys += len(whole) - known + len(inner) - known_inner
        return parsed


def decode_lines(
    lines: Iterable[bytes], source: str, decoder: JsonLines, refused: Callable[[InputError], None]
) -> Iterator[Event]:
    """The events of a file, with their own times; each refused line goes to `refused` with source and line number."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            event = decoder.feed(line, None)
        except InputError as error:
            refused(at_line(source, number, error))
            continue
        if event is not None:
            yield event


def at_line(source: str, number: int, error: InputError) -> InputError:
    """The same error, saying where: `events.jsonl line 7: …`."""
    return InputError(f"{source} line {number}: {error}")


def encode(event: Event, *, dport: int | None = None) -> bytes:
    """One event as a line, newline included; `dport` defaults to the service's first usual port."""
    if is_ipv4(event.hi):
        source = str(IPv4Address(event.hi & 0xFFFFFFFF))
    else:
        source = str(IPv6Address(event.hi << 64 | event.lo))
    usual = MX_PORTS[0] if event.service is Service.MX else SUBMISSION_PORTS[0]
    line: dict[str, object] = {
        "ts": event.ts_s,
        "src": source,
        "dport": usual if dport is None else dport,
        "handshake": event.handshake,
    }
    if event.handshake:
        line["mta"] = {
            "verdict": event.verdict.name.lower(),
            "rcpt_ok": min(event.rcpt_ok, 0xFFFF),
            "rcpt_bad": min(event.rcpt_bad, 0xFFFF),
            "dkim": event.dkim.name.lower(),
            "dkim_domain": f"{event.dkim_domain:016x}.hash.invalid" if event.dkim_domain else "",
            "spf": event.spf.name.lower(),
        }
    return msgspec.json.encode(line) + b"\n"


def _malformed(line: bytes, error: Exception) -> InputError:
    shown = line[:SHOWN_BYTES].decode("utf-8", "backslashreplace")
    what = "nesting too deep" if isinstance(error, RecursionError) else str(error)
    return InputError(f"expected one JSON object of evidence, found {shown!r}: {what}")


_VERDICT = {verdict.name.lower(): verdict for verdict in Verdict}
_AUTHENTICATION = {result.name.lower(): result for result in Authentication}
