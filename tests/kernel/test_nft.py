"""edge.kernel.nft against the real kernel, in network namespaces of its own."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest

from edge.abi import Mode, Origin, Service, Standing
from edge.core.model import Entry
from edge.core.plan import Difference, PlanParams, plan
from edge.core.prefix import Prefix, ipv4_key
from edge.errors import UnavailableError
from edge.kernel.nft import NftSets, remove_table
from edge.kernel.nft_params import NftParams
from edge.kernel.nft_ruleset import Layout, Outline, add, create, delete, destroy
from edge.kernel.nft_sets import all_specs, bounds
from edge.kernel.nft_table import NftTable
from tests.kernel.netns import NetNs, netns

pytestmark = pytest.mark.root

PORTS = {Service.MX: [25], Service.SUBMISSION: [465, 587]}
PROBE = """
table inet probe {
    set seen4 { type ipv4_addr . inet_service; flags dynamic; }
    set seen6 { type ipv6_addr . inet_service; flags dynamic; }
    counter arrived { }
    chain before {
        type filter hook prerouting priority -350; policy accept;
        iifname "b0" tcp sport 4099 counter name arrived
    }
    chain after {
        type filter hook prerouting priority -250; policy accept;
        iifname "b0" meta nfproto ipv4 tcp sport 4099 update @seen4 { ip saddr . tcp dport }
        iifname "b0" meta nfproto ipv6 tcp sport 4099 update @seen6 { ip6 saddr . tcp dport }
    }
}
"""
Table = Mapping[tuple[Service, Prefix], Entry]
MACS = bytes.fromhex("02000000000b 02000000000a")
SYN, SYN_ACK, ACK = 0x02, 0x12, 0x10


@dataclass
class HandClock:
    """A clock that runs by itself and can be put forward."""

    ahead_s: float = 0.0

    def now_s(self) -> float:
        return time.monotonic() + self.ahead_s

    def wall_s(self) -> float:
        return time.time()


@dataclass
class Bench:
    """A namespace this thread is in, with a way to make sinks in it."""

    space: NetNs
    clock: HandClock
    stack: contextlib.ExitStack

    def sink(
        self,
        mode: Mode = Mode.ENFORCE,
        ports: dict[Service, list[int]] = PORTS,
        *,
        lease_s: float = 600,
        **params: int,
    ) -> NftSets:
        values = msgspec.convert(params, NftParams)
        made = NftSets(clock=self.clock, params=values, ports=ports, mode=mode, lease_s=lease_s)
        self.stack.callback(made.close)
        return made

    def ready(self, mode: Mode = Mode.ENFORCE, *, lease_s: float = 600, **params: int) -> NftSets:
        made = self.sink(mode, PORTS, lease_s=lease_s, **params)
        made.adopt()
        return made

    def nft(self, *words: str) -> str:
        return self.space.run("nft", *words)

    def elements(self, name: str, table: str = "edge") -> dict[str, int | None]:
        """Elements of a set as nft shows them, with the seconds left."""
        listing = json.loads(self.nft("-j", "list", "set", "inet", table, name))
        found: dict[str, int | None] = {}
        for item in listing["nftables"][1]["set"].get("elem", []):
            body = item.get("elem", {}) if isinstance(item, dict) else {}
            value = body.get("val", item)
            if isinstance(value, dict) and "prefix" in value:
                value = f"{value['prefix']['addr']}/{value['prefix']['len']}"
            if isinstance(value, dict) and "range" in value:
                value = "-".join(value["range"])
            found[value] = body.get("expires", 0) if "timeout" in body else None
        return found


@pytest.fixture
def bench() -> Iterator[Bench]:
    with contextlib.ExitStack() as stack:
        space = stack.enter_context(netns("nft"))
        stack.enter_context(space.entered())
        yield Bench(space, HandClock(), stack)


def entry(
    text: str,
    standing: Standing = Standing.BLOCK,
    origin: Origin = Origin.OPERATOR,
    expires_s: float | None = None,
    service: Service = Service.MX,
) -> Entry:
    return Entry(
        prefix=Prefix.parse(text), service=service, standing=standing, origin=origin, expires_s=expires_s, reason="test"
    )


def until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Wait for a condition with a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"


def differences(desired: Table, installed: Table) -> list[Difference]:
    """What a plan between two tables is made of."""
    keys = desired.keys() | installed.keys()
    return [(desired.get(key), installed.get(key)) for key in keys if desired.get(key) != installed.get(key)]


class Wire:
    """A veth pair inside the namespace: what is sent on one end meets the hooks on the other."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        run = bench.space.run
        run(
            "ip",
            "link",
            "add",
            "a0",
            "address",
            "02:00:00:00:00:0a",
            "type",
            "veth",
            "peer",
            "name",
            "b0",
            "address",
            "02:00:00:00:00:0b",
        )
        for name in ("a0", "b0"):
            run("ip", "link", "set", name, "up")
        run("nft", "-f", "-", stdin=PROBE)
        self._socket = bench.stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
        self._socket.bind(("a0", 0))
        self._sent = 0

    def passed(self, probes: Sequence[tuple[bool, int, int]], flags: int = SYN) -> set[tuple[bool, int, int]]:
        """Send a packet for each (ipv4, source, destination port); those that got past our chain."""
        for ipv4, source, port in probes:
            self._socket.send(_frame(ipv4, source, port, flags))
        self._sent += len(probes)
        until(lambda: self._arrived() == self._sent, "every packet sent arrives")
        seen = set()
        for ipv4 in (True, False):
            name = "seen4" if ipv4 else "seen6"
            listing = json.loads(self._bench.nft("-j", "list", "set", "inet", "probe", name))
            for item in listing["nftables"][1]["set"].get("elem", []):
                text, port = item["concat"]
                packed = socket.inet_pton(socket.AF_INET if ipv4 else socket.AF_INET6, text)
                seen.add((ipv4, int.from_bytes(packed, "big"), port))
        self._bench.nft("flush set inet probe seen4; flush set inet probe seen6")
        return seen

    def passes(self, text: str, port: int = 25, flags: int = SYN) -> bool:
        """Whether one packet gets past our chain."""
        prefix = Prefix.parse(text)
        return bool(self.passed([(prefix.ipv4, bounds(prefix)[0], port)], flags))

    def _arrived(self) -> int:
        listing = json.loads(self._bench.nft("-j", "list", "counter", "inet", "probe", "arrived"))
        return int(listing["nftables"][1]["counter"]["packets"])


def _frame(ipv4: bool, source: int, port: int, flags: int) -> bytes:
    """An Ethernet frame with a TCP header; the checksum of TCP is not looked at before the hooks."""
    tcp = struct.pack("!HHIIBBHHH", 4099, port, 7, 0, 5 << 4, flags, 1024, 0, 0)
    if not ipv4:
        ip = (
            struct.pack("!IHBB", 6 << 28, len(tcp), 6, 64)
            + source.to_bytes(16, "big")
            + Prefix.parse("2001:db8:ff::1").hi.to_bytes(8, "big")
            + bytes(8)
        )
        return MACS + b"\x86\xdd" + ip + tcp
    ip = struct.pack("!BBHHHBBHII", 0x45, 0, 20 + len(tcp), 1, 0, 64, 6, 0, source, 0xC6120001)
    total = sum(struct.unpack("!10H", ip))
    total = (total & 0xFFFF) + (total >> 16)
    return MACS + b"\x08\x00" + ip[:10] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + ip[12:] + tcp


# -- what is refused


def test_sets_mean_longest_match(bench: Bench) -> None:
    """Random nested trees, each put in place of the one before by differences; the kernel is asked by packets."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    wire, refused_in_all, asked_in_all = Wire(bench), 0, 0
    sinks = [bench.ready(), bench.sink(batch=7)]  # the second takes over the first one's table half way
    for round_ in range(307):
        sink = sinks[round_ // 154]
        if round_ == 154:
            sink.adopt()
        desired = _random_tree(rng)
        made = plan(differences(desired, sink.installed()), PlanParams())
        sink.apply(made.put, made.drop)
        assert sink.installed() == desired
        probes = {probe for e in desired.values() for probe in _probes(rng, e)}
        expected = {probe for probe in probes if not _refused(desired.values(), *probe)}
        assert wire.passed(sorted(probes)) == expected, f"round {round_}, seed {seed}: {sorted(map(str, desired))}"
        asked_in_all += len(probes)
        refused_in_all += len(probes) - len(expected)
    assert 0.2 < refused_in_all / asked_in_all < 0.8
    assert not sink.resync()
    assert sink.describe()["repairs"] == 0


def _random_tree(rng: random.Random) -> dict[tuple[Service, Prefix], Entry]:
    found = {}
    for _ in range(rng.randint(3, 23)):
        if rng.random() < 0.6:
            whole = 0x20010DB8 << 96 ^ rng.choice((0, 1, 3)) << rng.choice((60, 64, 72, 80, 95)) ^ rng.getrandbits(66)
            length = rng.choice((rng.randint(1, 128), rng.randint(55, 67), rng.choice((32, 48, 56, 64, 128))))
            prefix = Prefix.of(whole >> 64, whole & (1 << 64) - 1, length)
        else:
            address = 0xC6336400 ^ rng.choice((0, 1, 3)) << rng.choice((0, 7, 8, 15, 16))
            prefix = Prefix.of(ipv4_key(address), 0, rng.choice((rng.randint(33, 64), 64, 56, 48)))
        level = prefix.level is not None and prefix.level > 0
        made = Entry(
            prefix=prefix,
            service=rng.choice(list(Service)),
            standing=rng.choice((Standing.BLOCK, Standing.BLOCK, Standing.GOOD, Standing.SUSPECT, Standing.ALLOW)),
            origin=rng.choice((Origin.LEARNED, Origin.OPERATOR) if level else (Origin.LIST, Origin.OPERATOR)),
            expires_s=None,
            reason="random",
        )
        found[made.key] = made
    return found


def _probes(rng: random.Random, e: Entry) -> Iterator[tuple[bool, int, int]]:
    first, last = bounds(e.prefix)
    top = (1 << (32 if e.prefix.ipv4 else 128)) - 1
    for address in (first, last, rng.randint(first, last), max(0, first - 1), min(top, last + 1)):
        multicast = address >> 120 == 0xFF if not e.prefix.ipv4 else address >> 28 >= 0xE
        if not multicast and address > 1:  # the stack discards multicast and loopback sources before any hook
            yield e.prefix.ipv4, address, rng.choice(PORTS[e.service])


def _refused(entries: Iterable[Entry], ipv4: bool, address: int, port: int) -> bool:
    found = [
        e
        for e in entries
        if port in PORTS[e.service] and e.prefix.ipv4 is ipv4 and bounds(e.prefix)[0] <= address <= bounds(e.prefix)[1]
    ]
    return bool(found) and max(found, key=lambda e: e.prefix.length).standing is Standing.BLOCK


def test_only_first_syns_to_the_services_ports_are_refused(bench: Bench) -> None:
    wire, sink = Wire(bench), bench.ready()
    sink.apply([entry("2001:db8::/64"), entry("192.0.2.0/24", service=Service.SUBMISSION)], [])
    assert not wire.passes("2001:db8::7")
    assert wire.passes("2001:db8::7", flags=ACK)
    assert wire.passes("2001:db8::7", flags=SYN_ACK)
    assert wire.passes("2001:db8::7", port=80)
    assert wire.passes("2001:db8::7", port=587)
    assert wire.passes("192.0.2.7")
    assert not wire.passes("192.0.2.7", port=465)
    assert not wire.passes("192.0.2.7", port=587)
    packets = sink.describe()["packets"]
    assert (packets["mx_block_64"], packets["submission_block_v4_24"], packets["enforce"]) == (1, 2, 3)


def test_observe_counts_and_passes_and_the_mode_switches(bench: Bench) -> None:
    wire, sink = Wire(bench), bench.ready(Mode.OBSERVE)
    sink.apply([entry("2001:db8::/64")], [])
    assert wire.passes("2001:db8::7")
    assert sink.describe()["packets"]["mx_block_64"] == 1
    sink.set_mode(Mode.ENFORCE)
    assert not wire.passes("2001:db8::7")
    assert not sink.drifted()
    sink.set_mode(Mode.OBSERVE)
    assert wire.passes("2001:db8::7")
    bench.nft("flush", "ruleset")
    sink.set_mode(Mode.ENFORCE)
    bench.space.run("nft", "-f", "-", stdin=PROBE)
    assert set(bench.elements("mx_block_64")) == {"2001:db8::"}


# -- differences and leases


def test_differences_only(bench: Bench) -> None:
    sink = bench.ready()
    kept = entry("2001:db8::/64", origin=Origin.LEARNED, expires_s=bench.clock.now_s() + 5003)
    sink.apply([kept, entry("2001:db8::/44")], [])
    before = sink.describe()["transactions"]
    sink.apply([replace(kept, reason="again", expires_s=kept.expires_s + 7 if kept.expires_s else None)], [])
    sink.apply(
        [
            entry("2001:db8::/44"),
            entry("2001:db8::/45"),
            entry("2001:db8:9::/64", Standing.GOOD, service=Service.SUBMISSION),
        ],
        [],
    )
    assert sink.describe()["transactions"] == before
    assert sink.installed()[kept.key].reason == "again"


def test_timeouts(bench: Bench) -> None:
    sink, now_s = bench.ready(lease_s=101), bench.clock.now_s()
    sink.apply(
        [
            entry("2001:db8:0:1::/64", origin=Origin.LEARNED, expires_s=now_s + 5003),
            entry("2001:db8:0:2::/64", origin=Origin.LEARNED, expires_s=now_s + 53),
            entry("2001:db8:0:3::/64", expires_s=now_s + 5003),
            entry("2001:db8:0:4::/64"),
            entry("2001:db8:0:5::/64", origin=Origin.LIST),
            entry("2001:db8:0:6::/64", expires_s=now_s + 0.5),
        ],
        [],
    )
    left = bench.elements("mx_block_64")
    assert left.pop("2001:db8:0:4::") is None
    assert left.pop("2001:db8:0:5::") is None
    assert {k: round(v or 0, -1) for k, v in left.items()} == {
        "2001:db8:0:1::": 100,
        "2001:db8:0:2::": 50,
        "2001:db8:0:3::": 5000,
    }


def _hole_margin(bench: Bench) -> int:
    """Seconds by which the hole outlives the block; both are there."""
    (hole,), (block,) = bench.elements("mx_allow_64").values(), bench.elements("mx_block_48").values()
    assert hole is not None
    assert block is not None
    return hole - block


def test_hole_outlives_block(bench: Bench) -> None:
    """Also while leases are renewed, whatever is put in between."""
    sink = bench.ready(lease_s=101, batch=3)
    far = bench.clock.now_s() + 5003
    hole = entry("2001:db8:0:1::/64", Standing.GOOD, Origin.LEARNED, far)
    block = entry("2001:db8::/48", origin=Origin.LEARNED, expires_s=far)
    sink.apply([hole], [])
    bench.clock.ahead_s += 29
    sink.apply([block], [])
    assert _hole_margin(bench) >= 1
    bench.clock.ahead_s += 29
    others = [entry(f"2001:db8:{i}::/64", origin=Origin.LEARNED, expires_s=far) for i in range(1, 8)]
    sink.apply(others, [])
    while sink.renew() or sink.renew():
        sink.apply([], [others[0]] if others[0].key in sink.installed() else [])
        assert _hole_margin(bench) >= 1
    assert all((left or 0) > 95 for left in bench.elements("mx_block_64").values())
    assert len(bench.elements("mx_block_64")) == 6
    assert sink.renew() == 0


def test_a_lease_is_renewed_also_when_its_element_has_expired(bench: Bench) -> None:
    sink = bench.ready()
    sink.apply([entry("192.0.2.1", origin=Origin.LEARNED, expires_s=bench.clock.now_s() + 2.5)], [])
    until(lambda: not bench.elements("mx_block_v4_32"), "the element expires")
    sink.apply([entry("192.0.2.1", origin=Origin.LEARNED, expires_s=bench.clock.now_s() + 53)], [])
    assert (bench.elements("mx_block_v4_32")["192.0.2.1"] or 0) > 40
    bench.clock.ahead_s += 601
    sink.apply([entry("192.0.2.1", origin=Origin.LEARNED, expires_s=bench.clock.now_s() + 5003)], [])
    while sink.renew() or sink.renew():
        pass
    assert (bench.elements("mx_block_v4_32")["192.0.2.1"] or 0) > 590


def test_dropping_what_has_expired_is_no_error(bench: Bench) -> None:
    sink = bench.ready()
    gone = entry("192.0.2.1", origin=Origin.LEARNED, expires_s=bench.clock.now_s() + 1.5)
    sink.apply([gone, entry("192.0.2.2")], [])
    until(lambda: "192.0.2.1" not in bench.elements("mx_block_v4_32"), "the element expires")
    sink.apply([], [gone])
    assert set(bench.elements("mx_block_v4_32")) == {"192.0.2.2"}
    assert sink.describe()["repairs"] == 0


# -- taking over


def test_adopting_leaves_no_gap(bench: Bench) -> None:
    """Elements, counters and handles stay; the plan finds what is wanted already there."""
    wire, old = Wire(bench), bench.ready()
    now_s = bench.clock.now_s()
    kept = [
        entry("2001:db8::/64", origin=Origin.LEARNED, expires_s=now_s + 5003),
        entry("2001:db8:8000::/44"),
        entry("2001:db8:8001::/48", Standing.GOOD),
        entry("198.51.100.0/26", origin=Origin.LIST),
        entry("198.51.100.0/28", Standing.ALLOW),
        entry("198.51.100.64/26", origin=Origin.LIST),
    ]
    gone = [entry("2001:db8:2::/64"), entry("203.0.113.0/26")]
    old.apply([*kept, *gone], [])
    assert not wire.passes("2001:db8::1")
    handles = bench.nft("-a", "list", "chain", "inet", "edge", "mx_v6")
    new = bench.sink()
    assert new.adopt() == 7  # the adjacent /26 are one range
    assert bench.nft("-a", "list", "chain", "inet", "edge", "mx_v6") == handles
    assert {e.reason for e in new.installed().values()} == {"adopted"}
    desired = {e.key: e for e in kept}
    made = plan(differences(desired, new.installed()), PlanParams())
    before = new.describe()["transactions"]
    new.apply(made.put, ())
    assert new.describe()["transactions"] <= before + 1  # the lease of the learned one
    new.apply((), made.drop)
    assert new.installed() == desired
    assert set(bench.elements("mx_block_64")) == {"2001:db8::"}
    assert set(bench.elements("mx_block_v4_25_31")) == {"198.51.100.16-198.51.100.127"}
    assert not new.resync()
    assert new.describe()["packets"]["mx_block_64"] == 1


def test_a_table_of_another_layout_is_replaced_with_its_elements(bench: Bench) -> None:
    wire = Wire(bench)
    bench.ready().apply([entry("2001:db8::/64"), entry("198.51.100.0/26")], [])
    new = bench.sink(ports={Service.MX: [25, 2525], Service.SUBMISSION: [587]})
    assert new.adopt() == 2
    assert new.describe()["transactions"] == 1
    assert not wire.passes("2001:db8::1", port=2525)
    assert not wire.passes("198.51.100.1")
    assert not new.drifted()


@pytest.mark.parametrize(
    "command",
    [
        "table inet edge { set mx_block_64 { type ipv4_addr; elements = { 192.0.2.1 }; }; chain other { }; }",
        "table inet edge { }",
    ],
)
def test_a_strange_table_of_our_name_is_replaced(bench: Bench, command: str) -> None:
    bench.nft(command)
    sink = bench.sink()
    assert sink.adopt() == 0
    sink.apply([entry("2001:db8::/64")], [])
    assert set(bench.elements("mx_block_64")) == {"2001:db8::"}
    assert "other" not in bench.nft("list", "table", "inet", "edge")


def test_garbage_in_our_sets_is_removed_when_adopting(bench: Bench) -> None:
    bench.ready()
    bench.nft("add element inet edge mx_block_64 { 2001:db8::5 }")
    bench.nft("add element inet edge mx_block_57_63 { 2000::/3 }")
    sink = bench.sink()
    assert sink.adopt() == 0
    assert not bench.elements("mx_block_64")
    assert not bench.elements("mx_block_57_63")


def test_remove_is_idempotent(bench: Bench) -> None:
    sink = bench.ready()
    sink.apply([entry("2001:db8::/64")], [])
    bench.nft("add table inet other")
    sink.remove()
    sink.remove()
    assert bench.nft("list", "tables").split() == ["table", "inet", "other"]
    assert sink.describe()["present"] is False


def test_remove_table_needs_no_daemon(bench: Bench) -> None:
    bench.ready().apply([entry("2001:db8::/64")], [])
    bench.nft("add table inet other")
    assert remove_table("edge")
    assert not remove_table("edge")
    assert bench.nft("list", "tables").split() == ["table", "inet", "other"]


# -- drift


@pytest.mark.parametrize(
    "command",
    [
        "flush ruleset",
        "delete table inet edge",
        "flush set inet edge mx_block_64",
        "delete element inet edge mx_allow_v4_25_31 { 198.51.100.0/28 }",
        "add element inet edge mx_block_48 { 2001:db8:9:: }",
        "flush chain inet edge mx_v6",
        "add rule inet edge mx_v6 accept",
        "insert rule inet edge prerouting accept",
        "flush chain inet edge refuse",
        "add chain inet edge surprise",
    ],
)
def test_drift_is_repaired(bench: Bench, command: str, caplog: pytest.LogCaptureFixture) -> None:
    sink = bench.ready()
    far = bench.clock.now_s() + 5003
    sink.apply(
        [
            entry("2001:db8::/64", origin=Origin.LEARNED, expires_s=far),
            entry("198.51.100.0/26"),
            entry("198.51.100.0/28", Standing.ALLOW),
        ],
        [],
    )
    assert not sink.drifted()
    rules = [line for line in bench.nft("-s", "list", "table", "inet", "edge").splitlines() if "expires" not in line]
    bench.nft(command)
    with caplog.at_level(logging.WARNING):
        assert sink.drifted()
    assert any(record.message == "sets drifted" for record in caplog.records)
    assert not sink.drifted()
    assert [
        line for line in bench.nft("-s", "list", "table", "inet", "edge").splitlines() if "expires" not in line
    ] == rules
    assert (bench.elements("mx_block_64")["2001:db8::"] or 0) > 500
    assert sink.describe()["repairs"] == 1
    sink.apply([entry("2001:db8:7::/64")], [])
    assert len(bench.elements("mx_block_64")) == 2


def test_own_and_unrelated_changes_cost_no_listing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = bench.ready(batch=1009)
    far = bench.clock.now_s() + 5003
    sink.apply([entry(f"2001:db8:{i:x}::/64", origin=Origin.LEARNED, expires_s=far) for i in range(3001)], [])
    bench.nft("table inet other { set s { type ipv6_addr; elements = { 2001:db8::1 }; }; }")
    bench.nft("table ip edge { chain c { }; }")
    listed: list[str] = []
    original = NftTable.outline

    def counted(self: NftTable) -> Outline | None:
        listed.append(self.name)
        return original(self)

    monkeypatch.setattr(NftTable, "outline", counted)
    assert not sink.drifted()
    assert not listed
    bench.nft("add element inet edge mx_block_64 { 2001:db9:: }")
    assert sink.drifted()
    assert len(listed) == 1


def test_lost_messages_count_as_touched(bench: Bench) -> None:
    sink = bench.ready()
    sink.apply([entry("2001:db8::/64")], [])
    sink._table.watch._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    bench.nft("add table inet noise { set s { type ipv4_addr; }; }")
    for i in range(101):
        bench.nft(f"add element inet noise s {{ 192.0.2.{i} }}")
    bench.nft("flush set inet edge mx_block_64")
    assert sink.drifted()
    assert sink.describe()["notifications_lost"] == 1
    assert set(bench.elements("mx_block_64")) == {"2001:db8::"}


def test_apply_after_a_flush_repairs_at_once(bench: Bench) -> None:
    sink = bench.ready()
    sink.apply([entry("2001:db8::/64")], [])
    bench.nft("flush", "ruleset")
    sink.apply([entry("2001:db8:1::/64")], [])
    assert set(bench.elements("mx_block_64")) == {"2001:db8::", "2001:db8:1::"}


def test_other_tables_are_untouched(bench: Bench) -> None:
    bench.nft("table inet edge2 { set mx_block_64 { type ipv6_addr; flags timeout; elements = { 2001:db8::5 }; }; }")
    bench.nft("table ip edge { chain c { type filter hook input priority 0; }; }")
    before = bench.nft("list", "table", "inet", "edge2"), bench.nft("list", "table", "ip", "edge")
    sink = bench.ready()
    sink.apply([entry("2001:db8::/64")], [])
    bench.nft("flush", "table", "inet", "edge")
    sink.drifted()
    sink.remove()
    assert (bench.nft("list", "table", "inet", "edge2"), bench.nft("list", "table", "ip", "edge")) == before


def test_foreign_change_is_noticed_once_and_own_changes_are_not(bench: Bench) -> None:
    table = NftTable("edge")
    bench.stack.callback(table.watch.close)
    layout = Layout(table="edge", priority=-300, ports=PORTS)
    for _ in range(3):
        table.commit([*destroy("edge"), *create(layout, Mode.ENFORCE)])
        assert not table.watch.touched()
        bench.nft("add element inet edge mx_block_64 { 2001:db8:: }")
        assert table.watch.touched()
        assert not table.watch.touched()


def test_a_transaction_is_whole(bench: Bench) -> None:
    table = NftTable("edge")
    bench.stack.callback(table.watch.close)
    spec = all_specs()["mx_block_64"]
    table.commit(create(Layout(table="edge", priority=-300, ports=PORTS), Mode.ENFORCE))
    with pytest.raises(UnavailableError, match="expected 2 commands"):
        table.commit([add("edge", spec, {(1 << 64, 1 << 64): None}), delete("edge", spec, [(2 << 64, 2 << 64)])])
    assert table.elements()["mx_block_64"] == {}


def test_listing_gives_back_elements(bench: Bench) -> None:
    table, specs = NftTable("edge"), all_specs()
    bench.stack.callback(table.watch.close)
    table.commit(create(Layout(table="edge", priority=-300, ports=PORTS), Mode.ENFORCE))
    top = (1 << 128) - 1
    written: dict[str, dict[tuple[int, int], int | None]] = {
        "mx_block_128": {(0, 0): 101, (0xFFFF << 32 | 7, 0xFFFF << 32 | 7): None, (top, top): 103},
        "mx_allow_v4_32": {(0, 0): None, (0xFFFFFFFF, 0xFFFFFFFF): 101},
        "mx_block_0_31": {(0, top): None},
        "mx_block_v4_0_15": {(0, 0x00FFFFFF): None, (0x0A000001, 0xFFFFFFFF): None},
        "mx_block_65_127": {(2, 2): None, (4, 9): None},
    }
    table.commit([add("edge", specs[name], held) for name, held in written.items()])
    read = table.elements()
    for name, held in written.items():
        assert read[name].keys() == held.keys()
        assert all((left is None) == (held[e] is None) for e, left in read[name].items())
        assert all(0 <= (held[e] or 0) - (left or 0) <= 10 for e, left in read[name].items())


def test_layout_id_names_the_layout() -> None:
    layout = Layout(table="edge", priority=-300, ports=PORTS)
    assert layout.id == replace(layout, ports={Service.SUBMISSION: [587, 465], Service.MX: [25]}).id
    others = [
        replace(layout, table="edge2"),
        replace(layout, priority=-299),
        replace(layout, ports={Service.MX: [25], Service.SUBMISSION: [465]}),
    ]
    assert len({layout.id, *(other.id for other in others)}) == 4


# -- size


def test_a_big_change_goes_in_steps_and_comes_back_whole(bench: Bench) -> None:
    sink = bench.ready(batch=499)
    holes = [entry(f"2001:db8:{i:x}:1::/64", Standing.GOOD) for i in range(1, 1010)]
    blocks = [entry(f"2001:db8:{i:x}::/48") for i in range(1, 1010)]
    lists = [entry(f"10.{i >> 8}.{i & 255}.0/25", origin=Origin.LIST) for i in range(1009)]
    sink.apply([*holes, *blocks, *lists], [])
    assert sink.describe()["transactions"] >= 6
    assert not sink.resync()
    bench.nft("flush", "ruleset")
    assert sink.drifted()
    assert len(bench.elements("mx_block_v4_25_31")) == 1009
    sink.apply([], [*lists[:503], *blocks, *holes])
    assert not sink.resync()
    assert sink.describe()["elements"] == {"mx_block_v4_25_31": 506}


def test_an_unusable_kernel_is_said(bench: Bench) -> None:
    with pytest.raises(UnavailableError, match="nftables table inet edge: expected"):
        bench.sink(ports={Service.MX: [70000], Service.SUBMISSION: [587]}).adopt()


def test_the_namespace_is_removed() -> None:
    with netns("gone") as space:
        assert Path(space.path).exists()
        assert space.run("true") == ""
    assert not Path(space.path).exists()
    assert space.name not in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
