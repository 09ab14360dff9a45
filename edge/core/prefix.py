"""Prefixes and the one key space that IPv6 and IPv4 share.

An address is keyed by two numbers, `hi` and `lo`, its upper and lower 64 bits. IPv4 a.b.c.d rides at
0:ffff:AABB:CCDD::/64, so IPv4 /32, /24 and /16 sit at the levels /64, /56 and /48 and one path serves both.
Addresses that carry an IPv4 address (mapped, NAT64, 6to4, Teredo) are keyed by it, or one IPv4 host could appear
as 2^16 prefixes. bpf/prefix.h does the same for packets; tests hold the two together.

Invariants:
    prefix-is-masked: no bit of a Prefix beyond its length is set.
    text-round-trips: Prefix.parse(str(p)) == p for every prefix.
    bogon-is-never-keyed: a real IPv6 source inside 0:ffff::/32 has no key.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from edge.abi import Level
from edge.errors import InputError

LENGTHS = (128, 64, 56, 48, 32)
"""Prefix length of each abi.Level, by its number."""

IPV4_SPACE = 0x0000FFFF
"""Upper 32 bits of every key that holds an IPv4 address."""

IPV4_SHIFT = 32
"""An IPv4 prefix of length n is keyed at length n + 32."""

_U64 = (1 << 64) - 1


def mask(length: int) -> tuple[int, int]:
    """The two 64-bit masks of a prefix length (0..128)."""
    whole = ((1 << length) - 1) << (128 - length)
    return whole >> 64, whole & _U64


def is_ipv4(hi: int) -> bool:
    """Whether a key's upper half holds an IPv4 address."""
    return hi >> 32 == IPV4_SPACE


def ipv4_key(address: int) -> int:
    """The upper half that keys an IPv4 address given as a 32-bit number."""
    return IPV4_SPACE << 32 | address


def key(address: IPv4Address | IPv6Address) -> tuple[int, int] | None:
    """Key an address: (hi, lo), or None for an IPv6 source inside 0:ffff::/32 (a bogon: never keyed).

    IPv4 inside IPv6, by the RFC that defines the form: mapped ::ffff:0:0/96 (4291 2.5.5.2), NAT64 64:ff9b::/96 (6052)
    and 64:ff9b:1::/48 (8215; the last 32 bits), 6to4 2002::/16 (3056; bits 16 to 47), Teredo 2001::/32 (4380; the
    last 32 bits, inverted).
    """
    if isinstance(address, IPv4Address):
        return ipv4_key(int(address)), 0
    hi, lo = int(address) >> 64, int(address) & _U64
    if hi == 0 and lo >> 32 == 0xFFFF:
        return ipv4_key(lo & 0xFFFFFFFF), 0
    if (hi == 0x0064FF9B << 32 and lo >> 32 == 0) or hi >> 16 == 0x0064FF9B0001:
        return ipv4_key(lo & 0xFFFFFFFF), 0
    if hi >> 48 == 0x2002:
        return ipv4_key(hi >> 16 & 0xFFFFFFFF), 0
    if hi >> 32 == 0x20010000:
        return ipv4_key(~lo & 0xFFFFFFFF), 0
    if is_ipv4(hi):
        return None
    return hi, lo


def key_text(text: str) -> tuple[int, int] | None:
    """Key an address written as text; InputError when it is not an address. A zone (%eth0) is refused."""
    try:
        if "%" in text:
            raise ValueError
        return key(ip_address(text))
    except ValueError:
        raise InputError(f"expected an IPv6 or IPv4 address, found {text[:64]!r}") from None


_CARRIERS = tuple(IPv6Network(text) for text in ("::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16"))
_CARRIERS += (IPv6Network("2001::/32"),)
_IPV4_PLACE = IPv6Network("0:ffff::/32")


def _refuse_unkeyed(network: IPv4Network | IPv6Network) -> None:
    """ValueError for a prefix that no key can lie in: an entry for it would never match."""
    if network.prefixlen == 0:
        raise ValueError("it holds everybody; name its two halves (/1) if that is meant")
    if isinstance(network, IPv4Network):
        return
    if network.subnet_of(_IPV4_PLACE):
        raise ValueError("IPv4 is kept there; an IPv6 source in it is a bogon and never keyed")
    if network.prefixlen < 128 and any(network.subnet_of(carrier) for carrier in _CARRIERS):
        raise ValueError("its addresses are keyed by the IPv4 address they carry: name that")


@dataclass(frozen=True, slots=True, order=True)
class Prefix:
    """A prefix in key space: two 64-bit halves and a length from 0 to 128."""

    hi: int
    lo: int
    length: int

    @classmethod
    def of(cls, hi: int, lo: int, length: int) -> Prefix:
        """The prefix of this length that holds the keyed address; an IPv4 key has no bits past 64."""
        if is_ipv4(hi):
            length = min(length, 64)
        high, low = mask(length)
        return cls(hi & high, lo & low, length)

    @classmethod
    def parse(cls, text: str) -> Prefix:
        """Read `2001:db8::/48`, `192.0.2.0/24` or a bare address; InputError names what is wrong with it."""
        try:
            if "%" in text:
                raise ValueError("a zone is not part of a prefix")
            network = ip_network(text.strip(), strict=True)
            _refuse_unkeyed(network)
        except ValueError as error:
            raise InputError(f"expected a prefix such as 2001:db8::/48, found {text[:64]!r}: {error}") from None
        return cls.of_network(network)

    @classmethod
    def of_network(cls, network: IPv4Network | IPv6Network) -> Prefix:
        """The prefix of an ipaddress network; a single host whose IPv6 form carries IPv4 is keyed by that."""
        if isinstance(network, IPv4Network):
            return cls(ipv4_key(int(network.network_address)), 0, network.prefixlen + IPV4_SHIFT)
        keyed = key(network.network_address)
        if network.prefixlen == 128 and keyed is not None and is_ipv4(keyed[0]):
            return cls(keyed[0], 0, 64)
        whole = int(network.network_address)
        return cls(whole >> 64, whole & _U64, network.prefixlen)

    @property
    def ipv4(self) -> bool:
        """Whether it is an IPv4 prefix."""
        return self.length >= IPV4_SHIFT and is_ipv4(self.hi)

    @property
    def level(self) -> Level | None:
        """The level of this length; None for a length between the levels."""
        return Level(LENGTHS.index(self.length)) if self.length in LENGTHS else None

    @property
    def network(self) -> IPv4Network | IPv6Network:
        """The same as an ipaddress network, IPv4 as IPv4."""
        if self.ipv4:
            return IPv4Network((self.hi & 0xFFFFFFFF, self.length - IPV4_SHIFT))
        return IPv6Network((self.hi << 64 | self.lo, self.length))

    def contains(self, other: Prefix) -> bool:
        """Whether the other is this prefix or lies inside it; no IPv6 prefix holds an IPv4 one."""
        high, low = mask(self.length)
        if self.ipv4 != other.ipv4:
            return False
        return other.length >= self.length and other.hi & high == self.hi and other.lo & low == self.lo

    def parent(self, length: int) -> Prefix:
        """The prefix of a shorter (or equal) length that holds this one."""
        return Prefix.of(self.hi, self.lo, length)

    def __str__(self) -> str:
        return str(self.network)
