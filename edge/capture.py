"""Packet captures: what libpcap can read, each packet as the Ethernet frame the kernel program would have seen.

libpcap, through its C functions, because it is what tcpdump reads captures with: pcap and pcapng in either byte
order, several sections and interfaces, times to the nanosecond, every length in the file checked before it is used.
(Of the Python libraries, dpkt 1.9 reads a pcapng's first interface only and hands out the stump of a truncated
packet without a word; python-pcapng does not read pcap.) libpcap refuses a pcapng whose interfaces differ in link type.

Invariants:
    everything-readable-comes-first: a damaged file yields all packets before the damage, then InputError naming it.
    network-header-is-kept: what stands behind the made-up Ethernet header is the captured network packet, unchanged.
"""

from __future__ import annotations

import ctypes as c
import functools
import os
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from edge.errors import InputError, UnavailableError

SONAMES = ("libpcap.so.1", "libpcap.so.0.8")
"""The library's own name, and Debian's for the same."""

ERROR_BYTES = 256  # PCAP_ERRBUF_SIZE: pcap/pcap.h
NANOSECONDS = 1  # PCAP_TSTAMP_PRECISION_NANO
SECOND_NS = 1_000_000_000
LONGEST_NS = (1 << 63) - 1
END = -2  # PCAP_ERROR_BREAK: pcap_next_ex at the end of the file

ADDRESSES = bytes.fromhex("020000000002020000000001")
"""Destination and source of made-up Ethernet headers: locally administered, as no real card's."""

IPV4, IPV6, NEITHER = 0x0800, 0x86DD, 0
FAMILIES = {2: IPV4, 10: IPV6, 24: IPV6, 28: IPV6, 30: IPV6}
"""AF_INET, and AF_INET6 of Linux, NetBSD and OpenBSD, FreeBSD, Darwin: link types 0 and 108 carry the writer's."""

NO_PROTOCOL = frozenset({770, 803, 824})
"""ARPHRD types whose cooked header holds no EtherType: frame relay, radiotap, netlink (LINKTYPE_LINUX_SLL)."""


class Captured(NamedTuple):
    """One packet: its time in ns since the epoch, and its frame. Fewer than 14 bytes: it ended before it began."""

    at_ns: int
    frame: bytes


class _Timeval(c.Structure):
    _fields_ = (("seconds", c.c_long), ("fraction", c.c_long))


class _Header(c.Structure):
    _fields_ = (("time", _Timeval), ("captured_bytes", c.c_uint32), ("bytes", c.c_uint32))


@functools.cache
def _library() -> c.CDLL:
    """libpcap with its functions' types; loaded once, at the first call."""
    for name in SONAMES:
        try:
            library = c.CDLL(name)
        except OSError:
            continue
        handle = c.c_void_p
        library.pcap_open_offline_with_tstamp_precision.argtypes = [c.c_char_p, c.c_uint, c.c_char_p]
        library.pcap_open_offline_with_tstamp_precision.restype = handle
        library.pcap_next_ex.argtypes = [handle, c.POINTER(c.POINTER(_Header)), c.POINTER(c.c_void_p)]
        library.pcap_datalink.argtypes = library.pcap_close.argtypes = library.pcap_geterr.argtypes = [handle]
        library.pcap_geterr.restype = library.pcap_datalink_val_to_description.restype = c.c_char_p
        library.pcap_datalink_val_to_description.argtypes = [c.c_int]
        return library
    raise UnavailableError("libpcap was not found: install libpcap0.8 (Debian, Ubuntu) or libpcap (RHEL family)")


class Capture:
    """An open capture; iterate over it once."""

    def __init__(self, path: str) -> None:
        """Open a file, or standard input for "-". InputError: not a capture, or of a link type without Ethernet or
        IP packets."""
        self._path = path
        words = c.create_string_buffer(ERROR_BYTES)
        opened = _library().pcap_open_offline_with_tstamp_precision(os.fsencode(path), NANOSECONDS, words)
        if not opened:
            found = words.value.decode(errors="replace").removeprefix(f"{path}: ")
            raise InputError(f"{path}: expected a pcap or pcapng capture, found: {found}")
        self._handle: int | None = opened
        link = _library().pcap_datalink(opened)
        if link not in LINKS:
            self.close()
            raise InputError(
                f"{path}: expected packets of Ethernet, IP, Linux cooked or BSD loopback, found link type {link}"
                f" ({_described(link)})"
            )
        self._to_ethernet = LINKS[link]

    def close(self) -> None:
        """Close it; a second call does nothing."""
        if self._handle is not None:
            _library().pcap_close(self._handle)
            self._handle = None

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Captured]:
        """Packets in the file's order; InputError at the first place that cannot be read."""
        header, data = c.POINTER(_Header)(), c.c_void_p()
        read = 0
        while self._handle is not None:
            outcome = _library().pcap_next_ex(self._handle, c.byref(header), c.byref(data))
            if outcome == END:
                return
            if outcome != 1 or data.value is None:
                found = _library().pcap_geterr(self._handle).decode(errors="replace")
                raise InputError(f"{self._path}: expected packet {read + 1} or the end, found: {found}")
            read += 1
            time = header.contents.time
            at_ns = time.seconds * SECOND_NS + time.fraction
            packet = c.string_at(data.value, header.contents.captured_bytes)
            yield Captured(min(max(at_ns, 0), LONGEST_NS), self._to_ethernet(packet))


def _described(link: int) -> str:
    words: bytes | None = _library().pcap_datalink_val_to_description(link)
    return "not known to libpcap" if words is None else words.decode(errors="replace")


def _ethernet(kind: int, packet: bytes) -> bytes:
    return ADDRESSES + struct.pack("!H", kind) + packet


def _from_raw(packet: bytes) -> bytes:
    """LINKTYPE_RAW: the version says which."""
    return _ethernet(IPV6 if packet[0] >> 4 == 6 else IPV4, packet) if packet else b""


def _from_ip(kind: int) -> Callable[[bytes], bytes]:
    """LINKTYPE_IPV4 and LINKTYPE_IPV6."""
    return functools.partial(_ethernet, kind)


def _from_cooked(packet: bytes) -> bytes:
    """LINKTYPE_LINUX_SLL: 16 bytes, the ARPHRD type third, the protocol last."""
    if len(packet) < 16:
        return b""
    hardware, protocol = struct.unpack_from("!2xH10xH", packet)
    return _ethernet(NEITHER if hardware in NO_PROTOCOL else protocol, packet[16:])


def _from_cooked2(packet: bytes) -> bytes:
    """LINKTYPE_LINUX_SLL2: 20 bytes, the protocol first, the ARPHRD type after the interface."""
    if len(packet) < 20:
        return b""
    protocol, hardware = struct.unpack_from("!H6xH", packet)
    return _ethernet(NEITHER if hardware in NO_PROTOCOL else protocol, packet[20:])


def _from_loopback(packet: bytes) -> bytes:
    """LINKTYPE_NULL and LINKTYPE_LOOP: an address family of 4 bytes, in whichever order makes it a small number."""
    if len(packet) < 4:
        return b""
    family = min(int.from_bytes(packet[:4], "big"), int.from_bytes(packet[:4], "little"))
    return _ethernet(FAMILIES.get(family, NEITHER), packet[4:])


LINKS: dict[int, Callable[[bytes], bytes]] = {
    0: _from_loopback,
    1: bytes,
    12: _from_raw,  # libpcap's number on Linux for the file's 101
    14: _from_raw,  # and on OpenBSD
    101: _from_raw,
    108: _from_loopback,
    113: _from_cooked,
    228: _from_ip(IPV4),
    229: _from_ip(IPV6),
    276: _from_cooked2,
}
"""How a packet of each link type becomes a frame: https://www.tcpdump.org/linktypes.html."""
