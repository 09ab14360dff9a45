"""What the program decides of every packet of a capture: `edge packets`.

The packets run through a private copy of the program, with the given configuration in mode enforce, so that limits
and blocks of the configuration show. What a running daemon has learned is not in the copy. Its clock is the
capture's: the time since the first packet, which never goes back, as the kernel's never does.

Invariants:
    one-line-a-packet: every packet that can be read has its line, in order, also before an error.
    source-is-as-written: `src` is the address in the outermost IP header, whatever it is keyed by.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TextIO

import msgspec

from edge.abi import Level, Reason
from edge.capture import Capture, Captured
from edge.config import Config
from edge.errors import UsageError
from edge.exemptions import entries as exempt_entries
from edge.kernel.maps import SECOND_NS
from edge.kernel.program import Sizes
from edge.kernel.recorded import Judged, Recorded
from edge.parameters import Services

START_S = 1000
"""The copy's clock at the first packet: like a machine that has been up for a while, so that 0 is long past."""

ALL_PORTS = tuple(range(1 << 16))

WITHOUT_PORT = frozenset(
    {
        *(Reason.NOT_IP, Reason.NOT_TCP, Reason.NOT_SYN, Reason.TRUNCATED),
        *(Reason.MALFORMED, Reason.TOO_MANY_HEADERS, Reason.FRAGMENT, Reason.ESP),
    }
)
"""Ways out that lie before the program has read a SYN's port."""

IPV4, IPV6 = b"\x08\x00", b"\x86\xdd"
VLAN_TAGS = frozenset({b"\x81\x00", b"\x88\xa8"})
MOST_VLAN_TAGS = 2  # MAX_VLAN_TAGS: bpf/parse.h


class Line(msgspec.Struct, frozen=True):
    """One packet's decision, as `--json` prints it. `dport` is that of a SYN, else null."""

    n: int
    verdict: str
    reason: str
    syn: bool
    src: str | None
    dport: int | None


def run(config: Config, capture: str, ports: str | None, *, as_json: bool, out: TextIO, err: TextIO) -> None:
    """Judge the capture at this path ("-": standard input); lines go to `out`, the summary to `err`.

    UsageError for ports that are none, InputError for a capture that cannot be read to its end (what can be is judged
    first), UnavailableError where no program can be loaded.
    """
    wanted = configured(config, ports)
    totals: Counter[tuple[str, str]] = Counter()
    syns = 0
    with Capture(capture) as packets:
        copy = private_copy(wanted)
        try:
            if not as_json:
                out.write(_columns("packet", "verdict", "reason", "new", "source", "port"))
            for line in judge(copy, packets):
                out.write(_json(line) if as_json else readable(line))
                totals[line.reason, line.verdict] += 1
                syns += line.syn
        finally:
            out.flush()
            err.write(_summary(totals, syns))


def judge(copy: Recorded, packets: Iterable[Captured]) -> Iterator[Line]:
    """Run packets in order; times are ns of any epoch."""
    start_ns: int | None = None
    now_ns = 0
    for n, (at_ns, frame) in enumerate(packets, 1):
        start_ns = at_ns if start_ns is None else start_ns
        now_ns = max(now_ns, at_ns - start_ns)
        yield _line(n, frame, copy.judge(frame, min(START_S * SECOND_NS + now_ns, (1 << 63) - 1)))


def source(frame: bytes) -> str | None:
    """The source in the outermost IP header of an Ethernet frame, as text; None where there is none, or half of one."""
    at = 12
    for _ in range(MOST_VLAN_TAGS):
        if frame[at : at + 2] in VLAN_TAGS:
            at += 4
    kind, ip = frame[at : at + 2], frame[at + 2 : at + 42]
    version = ip[0] >> 4 if ip else 0
    if kind == IPV4 and version == 4 and len(ip) >= 16:
        return socket.inet_ntop(socket.AF_INET, ip[12:16])
    if kind == IPV6 and version == 6 and len(ip) >= 24:
        return socket.inet_ntop(socket.AF_INET6, ip[8:24])
    return None


def private_copy(config: Config) -> Recorded:
    """A private copy of the program with tables as large as the real ones, set up for this configuration."""
    copy = Recorded(Sizes(rows=tuple(config.tables.rows(level) for level in Level)))
    allowed = exempt_entries(config, ())
    copy.tables.policy.announce(allowed)
    copy.tables.configure(config, START_S)
    copy.tables.policy.apply(allowed, ())
    return copy


def configured(config: Config, ports: str | None) -> Config:
    """The configuration of the copy: enforcing, with these ports, and nothing taken from this host."""
    replace = msgspec.structs.replace
    services = config.services if ports is None else _services(config.services, ports)
    exempt = replace(config.exempt, postfix_mynetworks=False, connected=False)
    return replace(config, mode="enforce", services=services, exempt=exempt)


def _services(configured: Services, ports: str) -> Services:
    """`ports` instead of the mx ports: "25,2525" or "all"; a port named here leaves submission, "all" names none."""
    if ports == "all":
        mx = tuple(port for port in ALL_PORTS if port not in configured.submission)
        return Services(mx=mx, submission=configured.submission)
    mx = tuple(sorted({_port(text) for text in ports.split(",")}))
    return Services(mx=mx, submission=tuple(port for port in configured.submission if port not in mx))


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 5 and int(text) in ALL_PORTS):
        raise UsageError(f"--ports: expected numbers from 0 to 65535 with commas between, or all; found {text[:64]!r}")
    return int(text)


def _line(n: int, frame: bytes, judged: Judged) -> Line:
    return Line(
        n=n,
        verdict="drop" if judged.dropped else "pass",
        reason=judged.reason.name.lower(),
        syn=judged.syn,
        src=source(frame),
        dport=None if judged.reason in WITHOUT_PORT else judged.dport,
    )


def _json(line: Line) -> str:
    return msgspec.json.encode(line).decode() + "\n"


def readable(line: Line) -> str:
    """One packet's decision as a row of the table that people get."""
    port = "-" if line.dport is None else str(line.dport)
    return _columns(str(line.n), line.verdict, line.reason, "yes" if line.syn else "-", line.src or "-", port)


def _columns(n: str, verdict: str, reason: str, new: str, src: str, port: str) -> str:
    return f"{n:>8}  {verdict:7}  {reason:17}  {new:3}  {src:39}  {port:>5}\n"


def _summary(totals: Counter[tuple[str, str]], syns: int) -> str:
    """How many left each way, the most frequent first."""
    packets = totals.total()
    head = f"{packets} packet{'' if packets == 1 else 's'}, {syns} of them new connections to protected ports\n"
    rows = sorted(totals.items(), key=lambda item: (-item[1], item[0]))
    return head + "".join(f"{count:>8}  {verdict:4}  {reason}\n" for (reason, verdict), count in rows)
