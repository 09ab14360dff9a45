"""Prefixes and keys: what is masked, what round-trips, what is never keyed."""

from __future__ import annotations

import random
from ipaddress import ip_address

import pytest

from edge.abi import Level
from edge.core.prefix import LENGTHS, Prefix, ipv4_key, is_ipv4, key, key_text, mask
from edge.errors import InputError

SEED = 20263
V4 = ipv4_key(0xC0000207)  # 192.0.2.7


def some_prefixes(count: int = 997) -> list[Prefix]:
    print("seed", SEED)
    draw = random.Random(SEED)
    return [
        Prefix.of(draw.getrandbits(64), draw.getrandbits(64), draw.randrange(1, 129))
        if draw.random() < 0.7
        else Prefix.of(ipv4_key(draw.getrandbits(32)), 0, draw.randrange(33, 65))
        for _ in range(count)
    ]


def test_prefix_is_masked() -> None:
    for prefix in some_prefixes():
        high, low = mask(prefix.length)
        assert (prefix.hi & ~high, prefix.lo & ~low) == (0, 0)


def test_text_round_trips() -> None:
    for prefix in some_prefixes():
        assert Prefix.parse(str(prefix)) == prefix


def test_bogon_is_never_keyed() -> None:
    draw = random.Random(SEED)
    for _ in range(101):
        inside = 0xFFFF << 96 | draw.getrandbits(96)
        assert key(ip_address(inside.to_bytes(16, "big"))) is None


@pytest.mark.parametrize(
    "text",
    [
        "192.0.2.7",
        "::ffff:192.0.2.7",
        "64:ff9b::192.0.2.7",
        "64:ff9b:1::c000:207",
        "64:ff9b:1:fffe::c000:207",
        "2002:c000:207::1",
        "2002:c000:207:ffff::99",
        "2001:0:cb00:7101::3fff:fdf8",
    ],
)
def test_every_form_of_an_ipv4_address_has_one_key(text: str) -> None:
    keyed = key_text(text)
    assert keyed == (V4, 0)


@pytest.mark.parametrize("text", ["64:ff9b::1:c000:207", "2001:1::7", "::fffe:c000:207", "fe80::1"])
def test_neighbours_of_those_forms_are_ipv6(text: str) -> None:
    keyed = key_text(text)
    assert keyed is not None
    assert not is_ipv4(keyed[0])


@pytest.mark.parametrize("text", ["", "fe80::1%eth0", "192.0.2.256", "2001:db8::/64", "x" * 997, "1.2.3", "::1\n"])
def test_what_is_no_address_is_refused_by_name(text: str) -> None:
    with pytest.raises(InputError, match="expected an IPv6 or IPv4 address"):
        key_text(text)


@pytest.mark.parametrize("text", ["2001:db8::1/64", "192.0.2.7/24", "2001:db8::/129", "fe80::%1/64", "", "y" * 997])
def test_what_is_no_prefix_is_refused_by_name(text: str) -> None:
    with pytest.raises(InputError, match="expected a prefix"):
        Prefix.parse(text)


def test_contains_agrees_with_ipaddress() -> None:
    prefixes = [*some_prefixes(101), Prefix.parse("::/1"), Prefix.parse("0.0.0.0/1")]
    for outer in prefixes:
        for inner in prefixes:
            a, b = outer.network, inner.network
            expected = a.version == b.version and b.prefixlen >= a.prefixlen and b.network_address in a
            assert outer.contains(inner) is expected, (str(outer), str(inner))


def test_parent_holds_its_child() -> None:
    for prefix in some_prefixes(211):
        for length in LENGTHS:
            if length <= prefix.length and not (prefix.ipv4 and length < 32):
                assert prefix.parent(length).contains(prefix)


def test_levels_have_their_lengths() -> None:
    assert [Prefix.of(1 << 63, 0, n).level for n in (128, 64, 56, 48, 32)] == list(Level)
    assert Prefix.parse("2001:db8::/44").level is None
    assert [Prefix.parse(f"192.0.{t}").level for t in ("2.7/32", "2.0/24", "0.0/16")] == [
        Level.L64,
        Level.L56,
        Level.L48,
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("::/0", "everybody"),
        ("0.0.0.0/0", "everybody"),
        ("0:ffff::/32", "bogon"),
        ("0:ffff:c633:6407::1", "bogon"),
        ("2002:c633:6407::/48", "IPv4 address they carry"),
        ("2001::/32", "IPv4 address they carry"),
        ("64:ff9b::/96", "IPv4 address they carry"),
        ("::ffff:198.51.100.0/120", "IPv4 address they carry"),
    ],
)
def test_prefix_that_could_never_match_is_refused(text: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        Prefix.parse(text)
