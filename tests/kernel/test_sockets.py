"""The socket table against real sockets, the kernel's own callbacks, and ss."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.abi import Level, Service
from edge.core.prefix import LENGTHS, Prefix, key, key_text
from edge.errors import UnavailableError
from edge.kernel import libbpf, program, sockets
from edge.kernel.sockets import OPEN_SOCKET, OpenConnections, decode, open_connections, per_prefix
from edge.lab.network import cgroup2_mount
from tests.kernel.netns import NetNs, netns

root = pytest.mark.root

PORTS = {25: Service.MX, 465: Service.SUBMISSION, 587: Service.SUBMISSION}
ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING = 1, 4, 5, 8, 9, 11
SO_COOKIE = 57  # asm-generic/socket.h
NAMES = {1: "ESTAB", 4: "FIN-WAIT-1", 5: "FIN-WAIT-2", 8: "CLOSE-WAIT", 9: "LAST-ACK", 11: "CLOSING"}
SERVER_V6, SERVER_V4 = "fd25::1", "10.25.0.1"
SERVER_MAC, CLIENT_MAC = "02:00:00:00:25:01", "02:00:00:00:25:02"
WORLD_V6 = ("2001:db8::/32", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")
WORLD_V4 = ("192.0.2.0/24", "198.51.100.0/24")


class World:
    """A mail server and, behind a veth pair, everybody else."""

    def __init__(self, server: NetNs, client: NetNs, open_files: contextlib.ExitStack) -> None:
        self.server, self.client, self.open_files = server, client, open_files
        link = f"link add mx0 address {SERVER_MAC} netns {server.name} type veth"
        subprocess.run(
            ["ip", *link.split(), "peer", "name", "net0", "address", CLIENT_MAC, "netns", client.name], check=True
        )
        for here, device, v6, v4, peers in (
            (server, "mx0", SERVER_V6, SERVER_V4, ("fd25::2", "10.25.0.2")),
            (client, "net0", "fd25::2", "10.25.0.2", (SERVER_V6, SERVER_V4)),
        ):
            lines = [f"address add {v6}/64 dev {device} nodad", f"address add {v4}/30 dev {device}"]
            lines += [f"link set {device} up"]
            mac = CLIENT_MAC if here is server else SERVER_MAC
            lines += [f"neigh replace {peer} lladdr {mac} dev {device} nud permanent" for peer in peers]
            for prefix in WORLD_V6 + WORLD_V4:
                via = peers[0] if ":" in prefix else peers[1]
                lines.append(f"route add {prefix} via {via}" if here is server else f"route add local {prefix} dev lo")
            here.run("ip", "-batch", "-", stdin="\n".join(lines) + "\n")

    def listen(self, port: int, address: str = "::") -> socket.socket:
        """A listener of the server; on "::" for both families."""
        with self.server.entered():
            return self.open_files.enter_context(listener(port, address))

    def connect(self, source: str, port: int = 25, *, wait: bool = True) -> socket.socket:
        """A connection to the server from any address of the world."""
        with self.client.entered():
            return self.open_files.enter_context(
                connection(source, SERVER_V6 if ":" in source else SERVER_V4, port, wait)
            )

    def pairs(self, listening: socket.socket, count: int) -> list[tuple[socket.socket, socket.socket]]:
        """New connections from as many /64s, both ends: client, server."""
        clients = {}
        for number in range(count):
            client = self.connect(f"2001:db8:{number:x}:{number % 5:x}::{number + 1:x}")
            clients[client.getsockname()[:2]] = client
        made = []
        for _ in range(count):
            server, peer = listening.accept()
            made.append((clients[peer[:2]], self.open_files.enter_context(server)))
        return made

    def mute(self) -> None:
        """From now on nothing arrives at the clients."""
        self.client.run(
            "nft", "-f", "-", stdin="table inet t { chain c { type filter hook prerouting priority 0; policy drop; }; }"
        )

    def read(self, ports: Mapping[int, Service] = PORTS) -> OpenConnections:
        with self.server.entered():
            return open_connections(ports)

    def states(self) -> Counter[int]:
        return Counter(self.read().sockets["state"].tolist())


@pytest.fixture
def world() -> Iterator[World]:
    with netns("mx") as server, netns("net") as client, contextlib.ExitStack() as open_files:
        yield World(server, client, open_files)


def listener(port: int, address: str = "::") -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((address, port))
    sock.listen(1009)
    return sock


def connection(source: str, destination: str, port: int, wait: bool = True, source_port: int = 0) -> socket.socket:
    is_v6 = ":" in source
    sock = socket.socket(socket.AF_INET6 if is_v6 else socket.AF_INET)
    if is_v6:
        sock.setsockopt(socket.IPPROTO_IPV6, 78, 1)  # IPV6_FREEBIND: linux/in6.h
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((source, source_port))
    sock.settimeout(10 if wait else 0)
    with contextlib.suppress(BlockingIOError):
        sock.connect((destination, port))
    return sock


def until(probe: Callable[[], object], expected: object) -> None:
    """The probe gives this within the deadline."""
    deadline = time.monotonic() + 20
    while (found := probe()) != expected:
        assert time.monotonic() < deadline, f"expected {expected}, found {found}"
        time.sleep(0.01)


def keyed(found: OpenConnections) -> Counter[tuple[int, int, int]]:
    rows = found.sockets
    return Counter(zip(rows["hi"].tolist(), rows["lo"].tolist(), rows["service"].tolist(), strict=True))


def keyed_text(text: str) -> tuple[int, int]:
    pair = key_text(text)
    assert pair is not None
    return pair


def second_opinion(space: NetNs) -> Counter[tuple[tuple[int, int], str]]:
    """What ss says is open to the protected ports: by peer's key and state."""
    found: Counter[tuple[tuple[int, int], str]] = Counter()
    for line in space.run("ss", "-Htnao").splitlines():
        state, _, _, local, peer, *rest = line.split()
        is_rest = any("timewait" in word for word in rest)
        if state in NAMES.values() and int(local.rpartition(":")[2]) in PORTS and not is_rest:
            found[keyed_text(peer.rpartition(":")[0].strip("[]")), state] += 1
    return found


def as_ss(found: OpenConnections) -> Counter[tuple[tuple[int, int], str]]:
    return Counter(((int(row["hi"]), int(row["lo"])), NAMES[int(row["state"])]) for row in found.sockets)


COUNTER_PROGRAM = b"""
#include <linux/bpf.h>
BPF_ARRAY(open_now, u64, 1);
int count(struct bpf_sock_ops *ops)
{
	u32 zero = 0;
	u64 *now = open_now.lookup(&zero);

	if (!now)
		return 1;
	if (ops->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB) {
		bpf_sock_ops_cb_flags_set(ops, BPF_SOCK_OPS_STATE_CB_FLAG);
		__sync_fetch_and_add(now, 1);
	} else if (ops->op == BPF_SOCK_OPS_STATE_CB && ops->args[1] == 7) {
		__sync_fetch_and_add(now, -1);
	}
	return 1;
}
"""


@contextlib.contextmanager
def open_by_sockops() -> Iterator[Callable[[], int]]:
    """Counts, by a sockops program, the open connections of every listener made by this process meanwhile."""
    os.environ["BCC_KERNEL_SOURCE"] = str(program.directory() / "headers")
    from bcc import BPF

    bpf: Any = BPF(text=COUNTER_PROGRAM)
    home = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))[4:]
    group = cgroup2_mount() / f"edge-sockets-{os.getpid()}"
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        with libbpf.attach_sockops(bpf.load_func(b"count", BPF.SOCK_OPS).fd, group):
            yield lambda: int(bpf[b"open_now"][0].value)
    finally:
        (cgroup2_mount() / home / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()
        bpf.cleanup()


@root
def test_counts_what_sockops_counts(world: World) -> None:
    """Every state a connection can be in: the table, the callbacks and ss agree on which are open."""
    with open_by_sockops() as open_now:
        listening = world.listen(25)
        waiting = iter(world.pairs(listening, 13 + 7 + 5 + 3 + 2 + 11 + 17 + 19 + 23))

        def take(count: int) -> list[tuple[socket.socket, socket.socket]]:
            return list(itertools.islice(waiting, count))

        take(13)
        for number in range(29):  # never accepted
            world.connect(f"198.51.100.{number + 1}")
        close_wait, fin_wait2, fin_wait1, last_ack, closing = take(7), take(5), take(3), take(2), take(11)
        orphaned, time_wait, closed = take(17), take(19), take(23)
        for client, _ in close_wait + last_ack:
            client.close()
        for _, server in fin_wait2:
            server.shutdown(socket.SHUT_WR)
        for _, server in orphaned:
            server.close()
        for client, server in time_wait:
            server.close()
            assert client.recv(1) == b""
            client.close()
        for client, server in closed:
            client.close()
            assert server.recv(1) == b""
            server.close()
        expected = Counter({ESTABLISHED: 13 + 3 + 11 + 29, CLOSE_WAIT: 7 + 2, FIN_WAIT2: 5})
        until(world.states, expected)
        world.mute()
        for _, server in fin_wait1 + closing + last_ack:
            server.shutdown(socket.SHUT_WR)
        for client, _ in closing:
            client.close()
        for number in range(31):  # half open: the answer is lost
            world.connect(f"2001:db8:5::{number + 1:x}", wait=False)
        expected = Counter({ESTABLISHED: 13 + 29, CLOSE_WAIT: 7, FIN_WAIT2: 5, FIN_WAIT1: 3, LAST_ACK: 2, CLOSING: 11})
        until(world.states, expected)
        until(lambda: world.server.run("ss", "-Htn", "state", "syn-recv").count("\n"), 31)
        assert world.states() == expected
        assert open_now() == expected.total()
        assert as_ss(world.read()) == second_opinion(world.server)


@root
def test_time_wait_is_closed(world: World) -> None:
    """A closed connection whose peer keeps its end open shows as FIN_WAIT2 for a minute, and is not open."""
    for _, server in world.pairs(world.listen(25), 7):
        server.close()
    until(lambda: world.server.run("ss", "-Htno", "state", "fin-wait-2").count("timewait"), 7)
    assert len(world.read().sockets) == 0


@root
def test_only_the_servers_end() -> None:
    """Loopback shows both ends, and a program may connect from port 25: neither counts but as the server's end."""
    with netns("lo") as space, space.entered(), contextlib.ExitStack() as open_files:
        for port, address in ((25, "127.0.0.1"), (587, "::1"), (465, "::1")):
            open_files.enter_context(listener(port, address))
        for _ in range(7):
            open_files.enter_context(connection("127.0.0.1", "127.0.0.1", 25))
        for number in range(5):
            open_files.enter_context(connection(f"127.0.0.{2 + number}", "127.0.0.1", 25, source_port=25))
        for _ in range(3):
            open_files.enter_context(connection("::1", "::1", 587))
        assert Counter(open_connections(PORTS).sockets["service"].tolist()) == {
            Service.MX: 7 + 5,
            Service.SUBMISSION: 3,
        }


@root
def test_connections_outlive_their_listener(world: World) -> None:
    """A server that is stopped keeps its connections: they count, and it is said that nobody listens."""
    listening, other = world.listen(587), world.listen(143)
    clients = [world.connect(f"192.0.2.{number + 1}", 587) for number in range(7)]
    clients += [world.connect("192.0.2.1", 143)]
    accepted = [world.open_files.enter_context(listening.accept()[0]) for _ in range(7)]
    assert world.read().listening == {Service.SUBMISSION}
    listening.close()
    other.close()
    found = world.read()
    assert found.listening == frozenset()
    cookies = {struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))[0] for sock in accepted}
    assert set(found.sockets["cookie"].tolist()) == cookies
    assert len(found.sockets) == len(cookies) == 7


@root
def test_keys_as_prefix(world: World) -> None:
    """Both families, to a listener of both and to one of IPv4 only, and every form that carries an IPv4 address."""
    world.listen(25)
    world.listen(465, "0.0.0.0")  # noqa: S104 - in a namespace of its own
    expected: Counter[tuple[int, int, int]] = Counter()
    sources = {"2001:db8:1:2::3": 5, "2001:db8:1:2::4": 3, "2001:db8:9::1": 7, "192.0.2.1": 11, "198.51.100.7": 2}
    sources |= {
        "64:ff9b::c000:201": 3,
        "64:ff9b:1:77::c000:201": 5,
        "2002:c000:201:1::9": 7,
        "2001:0:1:2:3:4:3fff:fdfe": 2,
    }
    for source, count in sources.items():
        for port in (25, 465) if "." in source else (25,):
            for _ in range(count):
                world.connect(source, port)
            expected[(*keyed_text(source), PORTS[port])] += count
    assert expected[(*keyed_text("192.0.2.1"), Service.MX)] == 11 + 3 + 5 + 7 + 2
    until(lambda: keyed(world.read()), expected)
    rows = world.read().sockets
    assert np.array_equal(rows["ipv4"], rows["hi"] >> np.uint64(32) == 0xFFFF)
    assert as_ss(world.read()) == second_opinion(world.server)


@root
def test_many_ports(world: World) -> None:
    """Each of many ports is found, and nothing else: with and without the kernel's filter."""
    ports = {1000 + 2 * number: Service(number % 2) for number in range(61)}
    for port in ports:
        for sport in (port, port + 1):
            world.listen(sport)
            world.connect("2001:db8::1", sport)
    found = world.read(ports)
    assert Counter(found.sockets["service"].tolist()) == Counter(ports.values())
    assert all(len(world.read({port: Service.MX}).sockets) == 1 for port in ports)
    assert found.listening == set(Service)
    assert len(world.read(dict.fromkeys(range(1, 5003), Service.MX)).sockets) == 2 * 61
    assert len(world.read({}).sockets) == 0


@root
def test_needs_no_privilege(world: World) -> None:
    """An unprivileged user reads the same, in a network namespace that is not its own."""
    world.listen(25)
    for number in range(7):
        world.connect(f"2001:db8::{number + 1}")
    script = (
        "import os; from edge.abi import Service; from edge.kernel.sockets import open_connections\n"
        "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "assert 'CapEff:\\t0000000000000000' in open('/proc/self/status').read()\n"
        "print(len(open_connections({25: Service.MX}).sockets))"
    )
    assert world.server.run(sys.executable, "-c", script).strip() == "7"


@root
def test_reading_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too slow or too many is an error that says so, never a part of the table."""
    world.listen(25)
    for number in range(13):
        world.connect(f"2001:db8::{number + 1}")
    with world.server.entered():
        with pytest.raises(UnavailableError, match="within the time allowed"):
            open_connections(PORTS, timeout_s=0)
        monkeypatch.setattr(sockets, "MOST_SOCKETS", 11)
        with pytest.raises(UnavailableError, match="at most 11 sockets"):
            open_connections(PORTS)


@root
def test_incomplete_dump_is_read_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read before the kernel said so is thrown away; when it goes on saying so, that is an error."""
    world.listen(25)
    for number in range(7):
        world.connect(f"2001:db8::{number + 1}")
    real, failures = sockets._dump, itertools.count(1)
    most = 2

    def incomplete(messages: bytearray, request: bytes, deadline_s: float) -> None:
        real(messages, request, deadline_s)
        if next(failures) <= most:
            raise sockets._TryAgain

    monkeypatch.setattr(sockets, "_dump", incomplete)
    messages = bytearray()
    with world.server.entered():
        sockets._append_table(messages, socket.AF_INET6, PORTS, time.monotonic() + 5)
    assert len(messages) == 72 * (7 + 1)  # and the listener
    most = 1000
    with pytest.raises(UnavailableError, match="incomplete in each of 3"):
        world.read()


@root
def test_refusal_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own refusals: of a family it cannot list, and of a netlink protocol it does not have."""
    with pytest.raises(UnavailableError, match="modprobe tcp_diag"):
        sockets._append_table(bytearray(), socket.AF_APPLETALK, PORTS, time.monotonic() + 5)
    monkeypatch.setattr(sockets, "_NETLINK_SOCK_DIAG", 31)
    with pytest.raises(UnavailableError, match="no sock_diag"):
        open_connections(PORTS)


Address = IPv4Address | IPv6Address


def message(peer: Address, cookie: int, *, state: int = ESTABLISHED, port: int = 25, timer: int = 0) -> bytes:
    """One inet_diag_msg."""
    family = socket.AF_INET if isinstance(peer, IPv4Address) else socket.AF_INET6
    head = struct.pack("=BBBB", family, state, timer, 0) + struct.pack("!HH16x16s", port, 1024, peer.packed)
    return head + struct.pack("=IQ20x", 0, cookie)


def netlink(kind: int, body: bytes, *, flags: int = 2) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body


def any_address(rng: random.Random) -> Address:
    """An address of any form that is keyed in a way of its own, or one beside it."""
    tail = rng.getrandbits(128)
    if rng.random() < 0.2:
        return IPv4Address(tail & 0xFFFFFFFF)
    start = rng.choice(
        ["::ffff:0:0", "::", "64:ff9b::", "64:ff9b:1::", "2002::", "2001::", "0:ffff::", "2001:db8::", "1::ffff:0:0"]
    )
    length = rng.choice([16, 32, 48, 64, 96, 127])
    return IPv6Address(int(IPv6Address(start)) | tail & (1 << 128 - length) - 1)


def test_keys_of_random_addresses_as_prefix() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    peers = [any_address(rng) for _ in range(10007)]
    found = decode(b"".join(message(peer, cookie) for cookie, peer in enumerate(peers)), PORTS)
    keys = [key(peer) for peer in peers]
    rows = found.sockets
    assert list(zip(rows["hi"].tolist(), rows["lo"].tolist(), strict=True)) == [pair for pair in keys if pair]
    assert found.bogons == keys.count(None)
    assert found.bogons > 0


def test_each_socket_once() -> None:
    """Rows move in the kernel's table while it is read; a socket has one cookie."""
    peer = ip_address("2001:db8::1")
    twice = b"".join(message(peer, cookie % 7) for cookie in range(7 + 3))
    assert len(decode(twice, PORTS).sockets) == 7


def test_other_states_are_not_open() -> None:
    peer = ip_address("2001:db8::1")
    every = b"".join(
        message(peer, 100 * state + timer, state=state, timer=timer) for state in range(256) for timer in range(5)
    )
    found = decode(every, PORTS)
    states = (ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING)
    assert Counter(found.sockets["state"].tolist()) == Counter(dict.fromkeys(states, 4))


@pytest.mark.parametrize("level", Level)
def test_per_prefix_counts_each_once(level: Level) -> None:
    """The columns say what counting one by one says; IPv4 has no row at /128 and /32."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    parts = (0, 0x20010DB800000000), (0, 1, 0x10000), (0, 1, 0x300), (0, 1)
    sockets_found = np.zeros(10007, OPEN_SOCKET)
    expected: Counter[tuple[int, Prefix]] = Counter()
    for row in sockets_found:
        if rng.random() < 0.3:
            row["ipv4"], row["hi"] = True, 0xFFFF << 32 | rng.choice([0, 0x100, 0xC0000200])
        else:
            row["hi"], row["lo"] = sum(map(rng.choice, parts)), rng.choice([0, 1, 1 << 63])
        row["service"] = rng.randrange(2)
        if not (row["ipv4"] and level in (Level.L128, Level.L32)):
            prefix = Prefix.of(int(row["hi"]), int(row["lo"]), LENGTHS[level])
            expected[int(row["service"]), prefix] += 1
    rows = per_prefix(OpenConnections(sockets=sockets_found, listening=frozenset(), bogons=0), level)
    counted = [((service, Prefix(hi, lo, LENGTHS[level])), count) for hi, lo, service, count in rows.tolist()]
    assert counted == sorted(expected.items())


def test_per_prefix_of_nothing() -> None:
    nothing = decode(b"", PORTS)
    assert nothing.listening == frozenset()
    assert all(len(per_prefix(nothing, level)) == 0 for level in Level)


def test_datagram_is_taken_whole_or_refused() -> None:
    """Cut at every byte and with every length: what is not whole is never taken for a socket."""
    rows = [message(ip_address("2001:db8::1"), cookie) for cookie in range(3)]
    attributes = b"\x05\x00\x08\x00\x00\x00\x00\x00"
    datagram = b"".join(netlink(20, row + attributes) for row in rows)
    for size in range(len(datagram) + 1):
        taken = bytearray()
        with contextlib.suppress(UnavailableError):
            assert not sockets.append_messages(taken, memoryview(datagram[:size]))
        assert taken == b"".join(rows)[: size // 96 * 72]
    for length in (0, 15, 16, 87, 97, 0xFFFFFFFF):
        with pytest.raises(UnavailableError, match="length"):
            sockets.append_messages(bytearray(), memoryview(struct.pack("=I", length) + datagram[4:96]))


def test_random_bytes_are_refused_or_bounded() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(2003):
        junk = bytearray(rng.randbytes(rng.randrange(400)))
        if len(junk) > 20:
            junk[:6] = struct.pack("=IH", rng.randrange(len(junk) + 9), rng.choice([1, 2, 3, 20]))
        taken = bytearray()
        with contextlib.suppress(UnavailableError, OSError, sockets._TryAgain):
            sockets.append_messages(taken, memoryview(junk))
        assert len(taken) <= len(junk)
        decode(taken, PORTS)


def test_end_and_error() -> None:
    append = sockets.append_messages
    assert append(bytearray(), memoryview(netlink(3, struct.pack("=i", 0))))
    assert append(bytearray(), memoryview(netlink(3, b"")))
    for kind in (2, 3):
        with pytest.raises(OSError, match="Invalid argument") as caught:
            append(bytearray(), memoryview(netlink(kind, struct.pack("=i", -errno.EINVAL) + bytes(16))))
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(sockets._TryAgain):
        append(bytearray(), memoryview(netlink(3, struct.pack("=i", 0), flags=0x12)))
