"""edge.core.nesting, on hand-made cases and against a plain sorted list."""

from __future__ import annotations

import random

import pytest

from edge.abi import Service
from edge.core import nesting
from edge.core.nesting import Key, Nesting, Ordered
from edge.core.prefix import Prefix, ipv4_key


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    return random.Random(seed)


def random_key(rng: random.Random) -> Key:
    """A prefix of any length in a corner of the space, so that many hold one another."""
    hi = rng.choice((0, 0x20010DB8 << 32, ipv4_key(0xC6336400))) | rng.getrandbits(5) << rng.choice((0, 8, 59))
    return rng.choice(list(Service)), Prefix.of(hi, rng.getrandbits(3) << rng.choice((0, 61)), rng.randint(0, 128))


def test_no_ipv6_prefix_holds_an_ipv4_one() -> None:
    found: Nesting[str] = Nesting()
    for text in ("::/1", "::/16", "128.0.0.0/1", "192.0.2.0/24", "192.0.2.1"):
        found.add(Service.MX, Prefix.parse(text), text)
    assert set(found.holding(Service.MX, Prefix.parse("192.0.2.1"))) == {"128.0.0.0/1", "192.0.2.0/24"}
    assert not set(found.holding(Service.SUBMISSION, Prefix.parse("192.0.2.1")))
    found.remove(Service.MX, Prefix.parse("192.0.2.0/24"))
    found.remove(Service.MX, Prefix.parse("198.51.100.0/24"))
    assert set(found.holding(Service.MX, Prefix.parse("192.0.2.1"))) == {"128.0.0.0/1"}


def test_a_prefix_holds_itself_and_only_that_is_not_holding_it() -> None:
    found: Nesting[str] = Nesting()
    found.add(Service.MX, Prefix.parse("2001:db8::/48"), "x")
    assert found.holds(Service.MX, Prefix.parse("2001:db8::/48"))
    assert found.holds(Service.MX, Prefix.parse("2001:db8::7"))
    assert not found.holds(Service.MX, Prefix.parse("2001:db8::/47"))
    assert not found.holds(Service.SUBMISSION, Prefix.parse("2001:db8::/48"))
    assert not list(found.holding(Service.MX, Prefix.parse("2001:db8::/48")))


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_ordered_is_a_sorted_set(rng: random.Random, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(nesting, "_CHUNK", chunk)
    expected = {random_key(rng) for _ in range(rng.randint(0, 53))}
    found = Ordered(expected)
    for _ in range(2003):
        key = random_key(rng)
        if rng.random() < 0.5:
            found.add(key)
            expected.add(key)
        else:
            gone = rng.choice(sorted(expected)) if expected and rng.random() < 0.7 else key
            found.discard(gone)
            expected.discard(gone)
        assert len(found) == len(expected)
        assert (key in found) is (key in expected)
        last, most = rng.choice((None, key)), rng.choice((0, 1, 7, 10007))
        assert found.after(last, most) == [k for k in sorted(expected) if last is None or k > last][:most]
    assert list(found) == sorted(expected)


@pytest.mark.parametrize("chunk", [2, 512])
def test_inside_is_one_run(rng: random.Random, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(nesting, "_CHUNK", chunk)
    for _ in range(101):
        keys = {random_key(rng) for _ in range(53)}
        found = Ordered(keys)
        for service, prefix in keys:
            inside = found.inside(service, prefix)
            assert inside == sorted(inside)
            held = {(s, p) for s, p in keys if s is service and p.length > prefix.length and prefix.contains(p)}
            assert held <= set(inside)
            assert all(p.ipv4 and not prefix.ipv4 for _, p in set(inside) - held)
