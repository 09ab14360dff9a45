"""Builds frames for the packet tests: each layer is a function that takes what it carries."""

from __future__ import annotations

import socket
import struct

MX = "2001:db8:25::25"
MX4 = "192.0.2.25"
MAC = bytes.fromhex("020000000002020000000001")
SYN, ACK, RST, FIN = 0x02, 0x10, 0x04, 0x01
TCP, ESP, AH, HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION, NONE = 6, 50, 51, 0, 43, 44, 60, 59


def ethernet(payload: bytes, kind: int = 0x86DD) -> bytes:
    return MAC + struct.pack("!H", kind) + payload


def vlan(payload: bytes, kind: int = 0x86DD, tag: int = 7) -> bytes:
    """What an Ethernet header of type 0x8100 or 0x88a8 carries."""
    return struct.pack("!HH", tag, kind) + payload


def ipv6(
    source: str, payload: bytes, *, to: str = MX, following: int = TCP, version: int = 6, length: int | None = None
) -> bytes:
    length = len(payload) if length is None else length
    head = struct.pack("!IHBB", version << 28, length, following, 64)
    return head + socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, to) + payload


def ipv4(
    source: str,
    payload: bytes,
    *,
    to: str = MX4,
    options: bytes = b"",
    protocol: int = TCP,
    fragment: int = 0,
    version: int = 4,
    length: int | None = None,
) -> bytes:
    words = 5 + len(options) // 4
    total = words * 4 + len(payload) if length is None else length
    head = struct.pack("!BBHHHBBH", version << 4 | words, 0, total, 1, fragment, 64, protocol, 0)
    return head + socket.inet_aton(source) + socket.inet_aton(to) + options + payload


def tcp(dport: int = 25, *, flags: int = SYN, sport: int = 40000, words: int = 5) -> bytes:
    return struct.pack("!HHIIBBHHH", sport, dport, 1, 0, words << 4, flags, 65535, 0, 0)


def extension(following: int, payload: bytes, *, units: int = 0) -> bytes:
    """Hop-by-hop, destination options or routing header of 8 * (units + 1) bytes, padded."""
    return struct.pack("!BB", following, units) + bytes(6 + 8 * units) + payload


def fragment(following: int, payload: bytes, *, offset: int = 0, more: bool = False) -> bytes:
    """Offset in units of 8 bytes."""
    return struct.pack("!BBHI", following, 0, offset << 3 | more, 99) + payload


def authentication(following: int, payload: bytes, *, words: int = 4) -> bytes:
    """AH: length in 4-byte words minus 2 (RFC 4302)."""
    return struct.pack("!BBHII", following, words, 0, 1, 1) + bytes((words + 2) * 4 - 12) + payload


def syn(source: str, dport: int = 25, **kwargs: int) -> bytes:
    """A whole SYN frame from an IPv6 or IPv4 source."""
    if ":" in source:
        return ethernet(ipv6(source, tcp(dport, **kwargs)))
    return ethernet(ipv4(source, tcp(dport, **kwargs)), 0x0800)
