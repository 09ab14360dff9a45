"""The frames that are measured."""

from __future__ import annotations

import socket
import struct

from tests import packets as p

RECEIVER = "2001:db9::1"
FIRST = "2001:db8::ffff:ffff:dffe:f247"
"""The source that steer.h makes of 0; all others have the same checksum."""

OPTIONS = bytes([2, 4, 5, 0xA0, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7])
"""What Linux sends with a SYN: MSS, SACK permitted, timestamps, window scale."""


def syn(dport: int = 25, *, flags: int = p.SYN, source: str = FIRST) -> bytes:
    """A frame of 94 bytes with a right TCP checksum."""
    segment = bytearray(p.tcp(dport, flags=flags, words=10) + OPTIONS)
    ends = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, RECEIVER)
    total = sum(struct.unpack(f"!{len(segment) // 2 + 18}H", ends + struct.pack("!HH", 6, len(segment)) + segment))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    segment[16:18] = struct.pack("!H", ~total & 0xFFFF)
    return p.ethernet(p.ipv6(source, bytes(segment), to=RECEIVER))


SYN = syn()
NOT_OURS = {
    "ACK to port 25": syn(flags=p.ACK),
    "UDP": p.ethernet(p.ipv6("2001:db8::1", bytes(60), to=RECEIVER, following=17)),
    "ARP": p.ethernet(bytes(46), 0x0806),
    "SYN to another port": syn(26),
}
"""What a mail host sees besides new connections to it."""
