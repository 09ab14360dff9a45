"""Longest match in the loaded program: random nested entries against the Python reference, and each rule by itself."""

from __future__ import annotations

import random
from ipaddress import IPv4Address, IPv6Address

import numpy as np
import pytest

from edge.abi import Origin, Reason, Service, Standing
from edge.config import Config
from edge.core.match import longest
from edge.core.model import Entry
from edge.core.prefix import Prefix, key
from edge.kernel.maps import Policy
from edge.kernel.program import U32
from tests import packets as p
from tests.bpf.harness import START_S, Harness, entry

pytestmark = pytest.mark.root

BLOCKED = {Reason.BLOCKED_LEARNED, Reason.BLOCKED_LIST, Reason.BLOCKED_OPERATOR}


def random_entries(rng: random.Random, count: int) -> list[Entry]:
    """Nested entries of all lengths in a narrow space, so that most probes meet several."""
    found: dict[object, Entry] = {}
    for _ in range(count):
        if rng.random() < 0.3:
            length = rng.choice([8, 12, 16, 20, 24, 28, 32])
            address = int(IPv4Address("198.51.0.0")) | rng.getrandbits(10)
            text = f"{IPv4Address(address >> (32 - length) << (32 - length))}/{length}"
        else:
            length = rng.choice([20, 29, 32, 40, 44, 48, 52, 56, 60, 64, 80, 116, 128])
            address = int(IPv6Address("2001:db8::")) | rng.getrandbits(4) << 64 | rng.getrandbits(3)
            address |= rng.getrandbits(2) << 80
            text = f"{IPv6Address(address >> (128 - length) << (128 - length))}/{length}"
        between = Prefix.parse(text).level is None
        standing = rng.choice(
            [Standing.ALLOW, Standing.BLOCK]
            if between
            else [Standing.ALLOW, Standing.BLOCK, Standing.BLOCK, Standing.GOOD, Standing.SUSPECT, Standing.BAD]
        )
        made = entry(text, standing, service=rng.choice(list(Service)), origin=rng.choice([0, 1, 2]))
        found.setdefault(made.key, made)
    return list(found.values())


def random_source(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return str(IPv4Address(int(IPv4Address("198.51.0.0")) | rng.getrandbits(11)))
    low = rng.getrandbits(5) << 64 | rng.getrandbits(3) | rng.getrandbits(2) << 80
    return str(IPv6Address(int(IPv6Address("2001:db8::")) | low))


@pytest.mark.parametrize("round_", range(29))
def test_same_as_the_reference(xdp: Harness, round_: int) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    entries = random_entries(rng, 23)
    xdp.install(*entries)
    by_key = {e.key: e for e in entries}
    for _ in range(67):
        source = random_source(rng)
        service = rng.choice(list(Service))
        keyed = key(IPv6Address(source) if ":" in source else IPv4Address(source))
        assert keyed is not None
        expected = longest(by_key, service, Prefix.of(*keyed, 128))
        judged = xdp.judge(p.syn(source, 25 if service is Service.MX else 587))
        context = f"{source} {service.name} {expected}"
        if expected is None:
            assert judged.reason is Reason.CONFORMING, context
        elif expected.standing is Standing.BLOCK:
            assert judged.reason in BLOCKED, context
            assert judged.length == expected.prefix.length, context
        elif expected.standing is Standing.ALLOW:
            assert judged.reason is Reason.ALLOWED, context
            assert judged.length == expected.prefix.length, context
        else:
            assert judged.reason not in BLOCKED | {Reason.ALLOWED}, context


def restarted(xdp: Harness) -> Policy:
    """The policy maps as a new daemon opens them."""
    return Policy(xdp.compiled.maps, seed(xdp))


def seed(xdp: Harness) -> int:
    identity = xdp.compiled.maps["identity"].get(np.zeros(1, U32))
    assert identity is not None
    return int(identity["seed"])


def test_reason_names_the_origin(xdp: Harness) -> None:
    for origin, reason in (
        (Origin.LEARNED, Reason.BLOCKED_LEARNED),
        (Origin.LIST, Reason.BLOCKED_LIST),
        (Origin.OPERATOR, Reason.BLOCKED_OPERATOR),
    ):
        xdp.install(entry("2001:db8:1:2::/64", Standing.BLOCK, origin=origin))
        assert xdp.judge(p.syn("2001:db8:1:2::3")).reason is reason


def test_evidence_of_one_service_does_not_close_the_other(xdp: Harness) -> None:
    xdp.install(entry("2001:db8::/32", Standing.BLOCK, service=Service.MX))
    assert xdp.judge(p.syn("2001:db8::1", 25)).dropped
    assert not xdp.judge(p.syn("2001:db8::1", 587)).dropped


def test_expired_entry_does_not_count(xdp: Harness) -> None:
    xdp.install(entry("2001:db8:1:2::/64", Standing.BLOCK, expires_s=START_S + 5))
    assert xdp.judge(p.syn("2001:db8:1:2::3"), START_S + 4.9).dropped
    assert not xdp.judge(p.syn("2001:db8:1:2::3"), START_S + 5).dropped


def test_expired_range_does_not_hide_a_shorter_one(xdp: Harness) -> None:
    xdp.install(
        entry("2001:db8::/29", Standing.BLOCK, origin=Origin.OPERATOR),
        entry("2001:db8::/36", Standing.ALLOW, origin=Origin.OPERATOR, expires_s=START_S + 7),
        entry("2001:db8::/44", Standing.ALLOW, origin=Origin.OPERATOR, expires_s=START_S + 5),
    )
    assert xdp.judge(p.syn("2001:db8:1:2::3"), START_S + 4).reason is Reason.ALLOWED
    assert xdp.judge(p.syn("2001:db8:1:2::3"), START_S + 6).reason is Reason.ALLOWED
    assert xdp.judge(p.syn("2001:db8:1:2::3"), START_S + 8).reason is Reason.BLOCKED_OPERATOR


def test_expired_range_alone_does_not_count(xdp: Harness) -> None:
    xdp.install(entry("2001:db8::/44", Standing.BLOCK, origin=Origin.OPERATOR, expires_s=START_S + 5))
    assert not xdp.judge(p.syn("2001:db8:1:2::3"), START_S + 6).dropped


def test_ipv6_range_does_not_catch_ipv4(xdp: Harness) -> None:
    """IPv4 is keyed inside 0:ffff::/32, which ::/3 holds."""
    xdp.install(entry("::/3", Standing.BLOCK, origin=Origin.OPERATOR))
    assert xdp.judge(p.syn("1234::1")).dropped
    assert not xdp.judge(p.syn("198.51.100.7")).dropped


@pytest.mark.parametrize(
    ("dead", "origin", "dropped"),
    [
        ("keep_limits", Origin.LEARNED, False),
        ("keep_limits", Origin.OPERATOR, True),
        ("keep_blocks", Origin.LEARNED, True),
    ],
)
def test_dead_controller(xdp: Harness, dead: str, origin: Origin, dropped: bool) -> None:
    from edge.config import parse

    xdp.configure(parse(f'mode = "enforce"\n[heartbeat]\ngrace_s = 60\ndead = "{dead}"'.encode(), "test"))
    xdp.install(entry("2001:db8:1:2::/64", Standing.BLOCK, origin=origin))
    assert xdp.judge(p.syn("2001:db8:1:2::3"), START_S + 59).dropped
    assert xdp.judge(p.syn("2001:db8:1:2::3"), START_S + 61).dropped is dropped


def test_observe_counts_and_passes(xdp: Harness) -> None:
    xdp.configure(Config(mode="observe"))
    xdp.install(entry("2001:db8:1:2::/64", Standing.BLOCK))
    for _ in range(7):
        assert not xdp.judge(p.syn("2001:db8:1:2::3")).dropped
    assert xdp.counters()[Reason.BLOCKED_LEARNED] == (7, 0)
    xdp.configure(Config(mode="enforce"))
    for _ in range(5):
        assert xdp.judge(p.syn("2001:db8:1:2::3")).dropped
    assert xdp.counters()[Reason.BLOCKED_LEARNED] == (7, 5)


def test_restarted_daemon_finds_what_was_installed(xdp: Harness) -> None:
    entries = [
        entry("2001:db8:1:2::/64", Standing.BLOCK, expires_s=START_S + 100),
        entry("2001:db8::/44", Standing.ALLOW, origin=Origin.OPERATOR),
        entry("198.51.100.7", Standing.GOOD, service=Service.SUBMISSION),
        entry("2001:db8:1:2::9", Standing.SUSPECT),
    ]
    xdp.install(*entries)
    found = restarted(xdp)
    assert xdp.judge(p.syn("2001:db8:1:2::3")).dropped
    assert {key: (e.standing, e.origin, e.expires_s) for key, e in found.installed().items()} == {
        e.key: (e.standing, e.origin, e.expires_s) for e in entries
    }
    assert found.presence() == xdp.tables.policy.presence()
