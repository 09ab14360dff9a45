"""Random frames, well made and badly made, around TCP segments of every kind; and capture files to put them in."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random

from tests import packets as p

PORTS = (25, 25, 25, 465, 587, 2525, 40000, 1, 65535, 0)
SOURCES = (
    "2001:db8:1:2::3",
    "2a00:1450:4864:20::333",
    "2002:c633:6407::1",
    "64:ff9b::c633:6407",
    "64:ff9b:1::c633:6407",
    "2001:0:4136:e378:8000:63bf:39cc:9bf8",
    "::ffff:198.51.100.7",
    "0:ffff:c633:6407::1",
    "fe80::1",
    "::1",
)
SOURCES4 = ("198.51.100.7", "10.1.2.3", "127.0.0.1", "255.255.255.255")
UDP, ICMP, ICMP6, IPIP, IPV6_IN_IP, GRE, SCTP, IPCOMP, MOBILITY, HIP, SHIM6 = (
    17,
    1,
    58,
    4,
    41,
    47,
    132,
    108,
    135,
    139,
    140,
)
OTHER_TYPES = (0x0806, 0x9100, 0x8847, 0x8864, 0x88E5, 0x6558, 0x88CC, 60, 1500, 1501, 1536, 0x0801)
SECOND_US = 1_000_000


class Frames:
    """A stream of frames, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.r = Random(seed)

    def frame(self) -> bytes:
        """One Ethernet frame; about half of them are a SYN in one dress or another."""
        made = self._link(*self._network())
        if self._once(10):
            made += self.r.randbytes(self.r.randrange(1, 50))  # padding behind the packet
        if self._once(6):
            made = made[: self.r.randrange(len(made) + 1)]
        if self._once(8):
            made = self.mutated(made)
        return made

    def mutated(self, frame: bytes) -> bytes:
        """Up to three bytes replaced."""
        changed = bytearray(frame)
        for _ in range(self.r.randrange(1, 4) if changed else 0):
            changed[self.r.randrange(len(changed))] = self.r.choice((0, 0xFF, self.r.randrange(256)))
        return bytes(changed)

    def _once(self, in_: int) -> bool:
        return self.r.randrange(in_) == 0

    def _link(self, kind: int, packet: bytes) -> bytes:
        for _ in range(self.r.choice((0, 0, 0, 0, 1, 1, 2, 2, 3))):
            packet = p.vlan(packet, kind, self.r.choice((0, 0xE000, self.r.randrange(1 << 16))))
            kind = self.r.choice((0x8100, 0x88A8))
        if self._once(40):
            kind = self.r.choice(OTHER_TYPES)
        if self._once(60):  # 802.3 with SNAP
            packet = bytes.fromhex("aaaa03000000") + struct.pack("!H", kind) + packet
            kind = len(packet)
        return p.ethernet(packet, kind & 0xFFFF)

    def _network(self) -> tuple[int, bytes]:
        if self.r.randrange(3):
            return 0x86DD, self._ipv6()
        return 0x0800, self._ipv4()

    def _ipv6(self) -> bytes:
        following, payload = self._transport()
        for _ in range(self.r.choice((0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10))):
            following, payload = self._extension(following, payload)
        length = 0 if following == p.HOP_BY_HOP and self._once(15) else self._lie(len(payload))
        version = self.r.randrange(16) if self._once(40) else 6
        return p.ipv6(self.r.choice(SOURCES), payload, following=following, version=version, length=length & 0xFFFF)

    def _ipv4(self) -> bytes:
        protocol, payload = self._transport()
        if self._once(12):
            protocol, payload = self._extension(protocol, payload)
        options = self.r.choice(
            (b"", b"", b"", b"\x94\x04\0\0", b"\x01" * 8, b"\x07\x27\x04" + bytes(37), b"\x83\x03\x04\0")
        )
        length = self._lie(20 + len(options) + len(payload))
        field = self.r.choice((0x2000, 0x2001, 0x0001, 0x1FFF, 0x4000, 0x8000, 0x6000)) if self._once(5) else 0
        made = p.ipv4(
            self.r.choice(SOURCES4),
            payload,
            options=options,
            protocol=protocol,
            length=length & 0xFFFF,
            fragment=field,
            version=self.r.randrange(16) if self._once(40) else 4,
        )
        if self._once(40):
            made = bytes([made[0] & 0xF0 | self.r.randrange(16)]) + made[1:]
        return made

    def _lie(self, length: int) -> int:
        if self.r.randrange(8):
            return length
        return self.r.choice((0, 1, length - 1, length + 1, length - 4, length // 2, length + 1000, 0xFFFF, 20, 19))

    def _extension(self, following: int, payload: bytes) -> tuple[int, bytes]:
        kind = self.r.choice((p.HOP_BY_HOP, p.ROUTING, p.FRAGMENT, p.DESTINATION, p.AH))
        if kind == p.FRAGMENT:
            whole = not self._once(3)
            offset, more = (0, False) if whole else (self.r.choice((0, 0, 1, 5, 0x1FFF)), bool(self.r.randrange(2)))
            made = p.fragment(following, payload, offset=offset, more=more)
        elif kind == p.AH:
            words = self.r.choice((4, 4, 2, 5, 10, 1, 0))
            made = (
                p.authentication(following, payload, words=words)
                if words
                else bytes([following, 0]) + bytes(6) + payload
            )
        else:
            units = self.r.choice((0, 0, 0, 1, 2, 5, 31))
            made = p.extension(following, payload, units=units)
            made = made[:2] + self._options(kind, units) + made[8:]
        if self._once(25):
            made = made[:1] + bytes([self.r.choice((0, 1, 2, 3, 40, 255))]) + made[2:]
        return kind, made

    def _options(self, kind: int, units: int) -> bytes:
        """Bytes 2 to 7 of an extension header."""
        if kind == p.ROUTING:
            return bytes([self.r.choice((0, 0, 2, 3, 4, 5, 253)), self.r.choice((0, 0, 0, 1, 2, 255))]) + bytes(4)
        return self.r.choice(
            (
                bytes([1, 4, 0, 0, 0, 0]),  # PadN
                bytes([0xC2, 4]) + struct.pack("!I", self.r.choice((0, 60, 65536, 70000, 0xFFFFFFFF))),  # jumbo payload
                bytes([5, 2, 0, 0, 1, 0]),  # router alert
                bytes([0xC9, 16, 0, 0, 0, 0]),  # home address
                bytes([0x3E, 200, 0, 0, 0, 0]),  # an option longer than the header
                self.r.randbytes(6),
            )
        )

    def _transport(self) -> tuple[int, bytes]:
        if self.r.randrange(4):
            return p.TCP, self._tcp()
        return self.r.choice(
            (
                (p.NONE, b""),
                (p.NONE, self._tcp()),
                (UDP, struct.pack("!HHHH", 40000, 40001, 8, 0)),
                (UDP, struct.pack("!HHHH", 3544, 3544, 88, 0) + p.ipv6(SOURCES[0], self._tcp())),
                (UDP, struct.pack("!HHHHII", 4789, 4789, 88, 0, 0x08000000, 7 << 8) + p.syn(SOURCES[0])),
                (ICMP6, struct.pack("!BBHI", 1, 4, 0, 0) + p.ipv6(SOURCES[0], self._tcp())),
                (ICMP, struct.pack("!BBHI", 3, 3, 0, 0) + p.ipv4(SOURCES4[0], self._tcp())),
                (IPIP, p.ipv4(SOURCES4[0], self._tcp())),
                (IPV6_IN_IP, p.ipv6(SOURCES[0], self._tcp())),
                (GRE, struct.pack("!HH", 0, 0x86DD) + p.ipv6(SOURCES[0], self._tcp())),
                (p.ESP, struct.pack("!II", 7, 1) + self._tcp()),
                (SCTP, self._tcp()),
                (IPCOMP, struct.pack("!BBH", p.TCP, 0, 2) + self._tcp()),
                (MOBILITY, struct.pack("!BBBBHH", p.TCP, 0, 0, 0, 0, 0) + self._tcp()),
                (HIP, struct.pack("!BB", p.TCP, 4) + bytes(38) + self._tcp()),
                (SHIM6, struct.pack("!BBHI", p.TCP, 0, 0x8000, 0) + self._tcp()),
                (self.r.randrange(256), self._tcp()),
            )
        )

    def _tcp(self) -> bytes:
        flags = self.r.choice((p.SYN, p.SYN, p.SYN, p.SYN | 0xC0, p.SYN | p.ACK, p.ACK, self.r.randrange(256)))
        words = self.r.choice((5, 5, 5, 5, 6, 8, 10, 15, self.r.randrange(16)))
        header = p.tcp(self.r.choice(PORTS), flags=flags, sport=self.r.choice(PORTS), words=words)
        header = header[:12] + bytes([words << 4 | self.r.choice((0, 0, 0, 1, 0xE))]) + header[13:]
        options = self.r.choice((bytes(max(words - 5, 0) * 4), b"\x02\x04\x05\xb4" * max(words - 5, 0), b""))
        return header + options + bytes(self.r.choice((0, 0, 0, 1, 30)))


def pcap(path: Path, frames: Iterable[bytes], *, link: int = 1, snapped: Callable[[int], int] = lambda _: 0) -> None:
    """Write a capture, a packet every ms; `snapped` says how many bytes more the n-th had on the wire."""
    with path.open("wb") as file:
        file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, link))
        for n, frame in enumerate(frames):
            file.write(
                struct.pack("<IIII", 1_790_000_000 + n // 1000, n % 1000 * 1000, len(frame), len(frame) + snapped(n))
            )
            file.write(frame)
