"""Packets through the loaded program: every way out, by its reason."""

from __future__ import annotations

import pytest

from edge.abi import Reason, Service
from edge.config import Config, parse
from tests import packets as p
from tests.bpf.harness import Harness

pytestmark = pytest.mark.root

A = "2001:db8:1:2::3"


def deep(count: int, inner: bytes) -> bytes:
    """`count` destination-options headers around a TCP segment, as an IPv6 payload."""
    for n in range(count):
        inner = p.extension(p.TCP if n == 0 else p.DESTINATION, inner)
    return inner


WAYS: dict[str, tuple[bytes, Reason]] = {
    "ipv6 syn": (p.syn(A), Reason.CONFORMING),
    "ipv4 syn": (p.syn("198.51.100.7"), Reason.CONFORMING),
    "submission": (p.syn(A, 587), Reason.CONFORMING),
    "syn with ece and cwr": (p.syn(A, flags=p.SYN | 0xC0), Reason.CONFORMING),
    "one vlan": (p.ethernet(p.vlan(p.ipv6(A, p.tcp())), 0x8100), Reason.CONFORMING),
    "qinq": (p.ethernet(p.vlan(p.vlan(p.ipv6(A, p.tcp())), 0x8100), 0x88A8), Reason.CONFORMING),
    "three vlans": (
        p.ethernet(p.vlan(p.vlan(p.vlan(p.ipv6(A, p.tcp())), 0x8100), 0x8100), 0x8100),
        Reason.NOT_IP,
    ),
    "arp": (p.ethernet(bytes(28), 0x0806), Reason.NOT_IP),
    "udp": (p.ethernet(p.ipv6(A, bytes(8), following=17)), Reason.NOT_TCP),
    "no next header": (p.ethernet(p.ipv6(A, b"", following=p.NONE)), Reason.NOT_TCP),
    "ipv4 udp": (p.ethernet(p.ipv4("198.51.100.7", bytes(8), protocol=17), 0x0800), Reason.NOT_TCP),
    "syn ack": (p.syn(A, flags=p.SYN | p.ACK), Reason.NOT_SYN),
    "ack": (p.syn(A, flags=p.ACK), Reason.NOT_SYN),
    "rst": (p.syn(A, flags=p.RST), Reason.NOT_SYN),
    "port 80": (p.syn(A, 80), Reason.OTHER_PORT),
    "source port 25": (p.syn(A, 40000, sport=25), Reason.OTHER_PORT),
    "ipv4 options": (
        p.ethernet(p.ipv4("198.51.100.7", p.tcp(), options=bytes(8)), 0x0800),
        Reason.CONFORMING,
    ),
    "ipv4 later fragment": (
        p.ethernet(p.ipv4("198.51.100.7", p.tcp(), fragment=5), 0x0800),
        Reason.FRAGMENT,
    ),
    "ipv4 first fragment with tcp": (
        p.ethernet(p.ipv4("198.51.100.7", p.tcp(), fragment=0x2000), 0x0800),
        Reason.CONFORMING,
    ),
    "ipv4 first fragment without tcp": (
        p.ethernet(p.ipv4("198.51.100.7", p.tcp()[:8], fragment=0x2000), 0x0800),
        Reason.FRAGMENT,
    ),
    "ipv4 behind ah": (
        p.ethernet(p.ipv4("198.51.100.7", p.authentication(p.TCP, p.tcp()), protocol=p.AH), 0x0800),
        Reason.CONFORMING,
    ),
    "ipv4 header too short": (
        p.ethernet(b"\x44" + p.ipv4("198.51.100.7", p.tcp())[1:], 0x0800),
        Reason.MALFORMED,
    ),
    "ipv4 total length below header": (
        p.ethernet(p.ipv4("198.51.100.7", p.tcp(), length=19), 0x0800),
        Reason.MALFORMED,
    ),
    "version 5": (p.ethernet(p.ipv6(A, p.tcp(), version=5)), Reason.MALFORMED),
    "tcp offset 4": (p.syn(A, words=4), Reason.MALFORMED),
    "hop by hop": (
        p.ethernet(p.ipv6(A, p.extension(p.TCP, p.tcp()), following=p.HOP_BY_HOP)),
        Reason.CONFORMING,
    ),
    "long destination options": (
        p.ethernet(p.ipv6(A, p.extension(p.TCP, p.tcp(), units=31), following=p.DESTINATION)),
        Reason.CONFORMING,
    ),
    "routing header": (
        p.ethernet(p.ipv6(A, p.extension(p.TCP, p.tcp(), units=2), following=p.ROUTING)),
        Reason.CONFORMING,
    ),
    "atomic fragment": (
        p.ethernet(p.ipv6(A, p.fragment(p.TCP, p.tcp()), following=p.FRAGMENT)),
        Reason.CONFORMING,
    ),
    "repeated atomic fragments": (
        p.ethernet(p.ipv6(A, p.fragment(p.FRAGMENT, p.fragment(p.TCP, p.tcp())), following=p.FRAGMENT)),
        Reason.CONFORMING,
    ),
    "first fragment with tcp": (
        p.ethernet(p.ipv6(A, p.fragment(p.TCP, p.tcp(), more=True), following=p.FRAGMENT)),
        Reason.CONFORMING,
    ),
    "first fragment of 16 bytes of tcp": (
        p.ethernet(p.ipv6(A, p.fragment(p.TCP, p.tcp()[:16], more=True), following=p.FRAGMENT)),
        Reason.CONFORMING,
    ),
    "first fragment without tcp": (
        p.ethernet(p.ipv6(A, p.fragment(p.TCP, p.tcp()[:8], more=True), following=p.FRAGMENT)),
        Reason.FRAGMENT,
    ),
    "later fragment": (
        p.ethernet(p.ipv6(A, p.fragment(p.TCP, p.tcp(), offset=3), following=p.FRAGMENT)),
        Reason.FRAGMENT,
    ),
    "ah": (
        p.ethernet(p.ipv6(A, p.authentication(p.TCP, p.tcp()), following=p.AH)),
        Reason.CONFORMING,
    ),
    "esp": (p.ethernet(p.ipv6(A, bytes(32), following=p.ESP)), Reason.ESP),
    "eight headers": (p.ethernet(p.ipv6(A, deep(8, p.tcp()), following=p.DESTINATION)), Reason.CONFORMING),
    "nine headers": (
        p.ethernet(p.ipv6(A, deep(9, p.tcp()), following=p.DESTINATION)),
        Reason.TOO_MANY_HEADERS,
    ),
    "header beyond the payload": (
        p.ethernet(p.ipv6(A, p.extension(p.TCP, b"", units=9)[:16], following=p.DESTINATION)),
        Reason.MALFORMED,
    ),
    "tcp beyond the payload length": (
        p.ethernet(p.ipv6(A, p.tcp(), length=12)),
        Reason.TRUNCATED,
    ),
    "payload length 0": (p.ethernet(p.ipv6(A, p.tcp(), length=0)), Reason.TRUNCATED),
    "payload length 0 and no syn": (p.ethernet(p.ipv6(A, p.tcp(flags=p.ACK), length=0)), Reason.NOT_SYN),
    "payload length 0 with hop by hop": (
        p.ethernet(p.ipv6(A, p.extension(p.TCP, p.tcp()), following=p.HOP_BY_HOP, length=0)),
        Reason.CONFORMING,
    ),
    "loopback source": (p.syn("::1"), Reason.EXEMPT),
    "link-local source": (p.syn("fe80::5"), Reason.EXEMPT),
    "ula source": (p.syn("fd00::5"), Reason.EXEMPT),
    "rfc 1918 source": (p.syn("172.31.255.9"), Reason.EXEMPT),
    "just outside rfc 1918": (p.syn("172.32.0.9"), Reason.CONFORMING),
    "bogon": (p.syn("0:ffff:c633:6407::1"), Reason.BOGON),
}


@pytest.mark.parametrize("name", WAYS)
def test_every_way_out_has_its_reason(xdp: Harness, name: str) -> None:
    frame, reason = WAYS[name]
    judged = xdp.judge(frame)
    assert judged.reason is reason
    assert not judged.dropped
    assert xdp.counters()[reason] == (1, 0)


def test_every_reason_of_the_parser_is_covered() -> None:
    assert {Reason(n) for n in range(Reason.BOGON + 1)} - {reason for _, reason in WAYS.values()} == {
        Reason.OTHER_DESTINATION,  # below: it needs a setting
    }


@pytest.mark.parametrize("name", ["ipv6 syn", "qinq", "ah", "ipv4 behind ah", "eight headers", "routing header"])
def test_truncation_at_every_byte_passes(xdp: Harness, name: str) -> None:
    """16 bytes of TCP show ports and flags, and are judged."""
    frame, _ = WAYS[name]
    for length in range(14, len(frame) - 4):
        judged = xdp.judge(frame[:length])
        assert not judged.dropped
        assert judged.reason in (Reason.TRUNCATED, Reason.NOT_IP), length


def test_strict_drops_what_cannot_be_judged(xdp: Harness) -> None:
    xdp.configure(parse(b'mode = "enforce"\n[strict]\ndrop_unjudged = true', "test"))
    for name in ("later fragment", "nine headers", "esp", "version 5", "tcp beyond the payload length"):
        assert xdp.judge(WAYS[name][0]).dropped, name
    for name in ("udp", "ack", "port 80", "ipv6 syn", "bogon"):
        assert not xdp.judge(WAYS[name][0]).dropped, name


def test_only_listed_destinations_are_protected(xdp: Harness) -> None:
    xdp.configure(parse(f'[protect]\naddresses = ["{p.MX}", "{p.MX4}"]'.encode(), "test"))
    assert xdp.judge(p.syn(A)).reason is Reason.CONFORMING
    assert xdp.judge(p.syn("198.51.100.7")).reason is Reason.CONFORMING
    elsewhere = p.ethernet(p.ipv6(A, p.tcp(), to="2001:db8:25::26"))
    assert xdp.judge(elsewhere).reason is Reason.OTHER_DESTINATION
    xdp.configure(Config())
    assert xdp.judge(elsewhere).reason is Reason.CONFORMING


@pytest.mark.parametrize(
    ("written", "keyed"),
    [
        ("2001:db8:1:2:3:4:5:6", (0x20010DB800010002, 0x0003000400050006)),
        ("198.51.100.7", (0x0000FFFFC6336407, 0)),
        ("::ffff:198.51.100.7", (0x0000FFFFC6336407, 0)),
        ("64:ff9b::198.51.100.7", (0x0000FFFFC6336407, 0)),
        ("64:ff9b:1:2::198.51.100.7", (0x0000FFFFC6336407, 0)),
        ("2002:c633:6407:9:8:7:6:5", (0x0000FFFFC6336407, 0)),
        ("2001:0:1:2:3:4:39cc:9bf8", (0x0000FFFFC6336407, 0)),
    ],
)
def test_sources_are_keyed_as_in_python(xdp: Harness, written: str, keyed: tuple[int, int]) -> None:
    from edge.core.prefix import key_text

    judged = xdp.judge(p.syn(written))
    assert (judged.hi, judged.lo) == keyed == key_text(written)


def test_an_embedded_private_address_is_not_exempt(xdp: Harness) -> None:
    """A forger could else exempt itself by writing 6to4 sources."""
    for source in ("2002:a00:1::1", "64:ff9b::10.0.0.1", "::ffff:10.0.0.1"):
        assert xdp.judge(p.syn(source)).reason is Reason.CONFORMING


def test_services_are_apart(xdp: Harness) -> None:
    assert xdp.judge(p.syn(A, 25)).service is Service.MX
    assert xdp.judge(p.syn(A, 465)).service is Service.SUBMISSION
    assert xdp.judge(p.syn(A, 587)).service is Service.SUBMISSION
