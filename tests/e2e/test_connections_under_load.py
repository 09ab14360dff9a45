"""Counts of connections under load: rows change hands on both CPUs at once, and not one connection is miscounted.

Small tables, thousands of /64s: nearly every connection takes over a row that another prefix had a moment ago, and the
clients on both CPUs go through the same /64s at the same time.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from edge.abi import TALLIES_PER_SET, Level, Service
from edge.core.prefix import LENGTHS, Prefix
from edge.kernel.connections import HELD, Connections
from edge.kernel.rows import mixed_key
from edge.kernel.sockets import open_connections, per_prefix
from edge.lab import network
from edge.lab.network import Network
from tests.e2e.host import Host, wait

pytestmark = pytest.mark.root

LIMIT = 7
CLIENTS, CONNECTIONS, HELD_EACH = 4, 5003, 61
CPUS = sorted(os.sched_getaffinity(0))
STANDINGS = ("new", "good", "suspect", "bad")
NETWORKS = 4001
V4 = ("192.0.2", "198.51.100", "203.0.113")
CHURNED = (Level.L128, Level.L64)
"""Levels with more prefixes than rows: what a row counted before it was given away is forgotten, as it should be."""

SETTINGS = 'mode = "observe"\n[tables]\nconnections = 1024\n' + "".join(
    f"[limits.mx.{standing}]\n" + "".join(f"{length} = {{ open = {LIMIT} }}\n" for length in (128, 64, 56, 48, 32))
    for standing in STANDINGS
)

SERVER = r"""
import os, select, socket, sys
open(sys.argv[1] + '/cgroup.procs', 'w').write(str(os.getpid()))
s = socket.create_server(('::', 25), family=socket.AF_INET6, dualstack_ipv6=True, backlog=8192)
s.setblocking(False)
os.fork()
os.write(1, b'ready\n')
ep, peers = select.epoll(), {}
ep.register(s, select.EPOLLIN | select.EPOLLEXCLUSIVE)
while True:
    for fd, event in ep.poll():
        if fd == s.fileno():
            try:
                c = s.accept()[0]
            except OSError:
                continue
            peers[c.fileno()] = c
            ep.register(c, select.EPOLLIN)
            continue
        c = peers.pop(fd)
        ep.unregister(fd)
        c.close()
"""

CLIENT = """
import collections, os, random, socket, struct, sys
cpu, order, own, count, held = map(int, sys.argv[1:6])
servers = dict(zip((socket.AF_INET6, socket.AF_INET), sys.argv[6:8]))
nets = open(sys.argv[8]).read().split()
os.sched_setaffinity(0, {cpu})
order, own = random.Random(order), random.Random(own)
made = collections.Counter()

def connect(busy):
    if order.random() < 0.2:
        family, source = socket.AF_INET, f'{order.choice(sys.argv[9:])}.{order.randrange(1, 255)}'
    else:
        # a few /64s with many connections among thousands with one
        net = order.choice(nets[:3] if order.random() < 0.2 else nets[3:])
        family, source = socket.AF_INET6, f'{net}::{order.randrange(5) if busy else own.randrange(5):x}'
    s = socket.socket(family, socket.SOCK_STREAM)
    s.settimeout(60)
    s.setsockopt(*((socket.IPPROTO_IPV6, 78, 1) if family == socket.AF_INET6 else (socket.IPPROTO_IP, 15, 1)))
    s.setsockopt(socket.IPPROTO_IP, 24, 1)
    s.bind((source, 0))
    s.connect((servers[family], 25))
    made[family] += 1
    return s

def end(s):
    how = own.randrange(3)
    if how == 1:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    elif how == 2:
        s.shutdown(socket.SHUT_WR)
        s.recv(1)
    s.close()

def told(word, held):
    print(word, made[socket.AF_INET6], made[socket.AF_INET], flush=True)
    return sys.stdin.readline().strip()

live = []
told('ready', 0)
for n in range(count):
    live.append(connect(True))
    while len(live) > own.randrange(1, 31):
        end(live.pop(own.randrange(len(live))))
while live:
    end(live.pop())
told('churned', 0)
live = [connect(False) for _ in range(held)]
told('holding', held)
while live:
    end(live.pop())
told('closed', 0)
"""


@contextmanager
def process(net_command: list[str]) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        net_command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield child
    finally:
        os.killpg(child.pid, signal.SIGKILL)  # the server is two
        child.wait(20)
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()


class Client:
    """A process that connects from all over; `word` waits until it has come so far."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self.child = child

    def word(self, expected: str) -> np.ndarray:
        """Connections it made so far: IPv6, IPv4."""
        assert self.child.stdout is not None
        found = self.child.stdout.readline().split()
        assert found[:1] == [expected], found
        return np.array(found[1:], np.int64)

    def go(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write("go\n")
        self.child.stdin.flush()


@pytest.fixture
def mail_host(tmp_path: Path) -> Iterator[Host]:
    net = Network(pid=os.getpid())
    made = Host(net, tmp_path, SETTINGS)
    try:
        net.make()
        command = net.server.command([sys.executable, "-c", SERVER, str(net.cgroup)])
        with process(command) as server:
            assert server.stdout is not None
            assert [server.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
            yield made
            made.stop()
    finally:
        made.stop()
        problems = net.remove()
        assert not problems, problems


def networks(h: Host, seed: int) -> list[str]:
    """/64s, many in each /56 and few /56s and /48s in any set: at those levels no row is given away."""
    tables, draw = h.tables, random.Random(seed)
    in_set: dict[tuple[Level, int], set[Prefix]] = {}

    def has_room(address: str) -> bool:
        places = []
        for level in (Level.L56, Level.L48):
            prefix = Prefix.parse(address).parent(LENGTHS[level])
            number = mixed_key(prefix, tables.rows._seed) % tables.sizes.sets(level)
            places.append((in_set.setdefault((level, number), set()), prefix))
        if any(len(there | {prefix}) > TALLIES_PER_SET for there, prefix in places):
            return False
        for there, prefix in places:
            there.add(prefix)
        return True

    for address in V4:
        assert has_room(f"{address}.1")
    wide = [f"2001:db8:{draw.randrange(1 << 16):x}:{draw.randrange(1 << 8):x}" for _ in range(NETWORKS // 101)]
    narrow = [f"{one}{draw.randrange(1 << 8):02x}" for one in wide for _ in range(101) if has_room(f"{one}00::")]
    assert len(narrow) > NETWORKS / 2
    return narrow


def client(h: Host, cpu: int, order: int, own: int, count: int, held: int) -> list[str]:
    numbers = [str(number) for number in (cpu, order, own, count, held)]
    servers = [network.SERVER_V6, network.SERVER_V4]
    return h.net.client.command([sys.executable, "-c", CLIENT, *numbers, *servers, str(h.directory / "networks"), *V4])


def accepted(h: Host) -> int:
    """Connections whose handshake the server's TCP completed (RFC 4022, tcpPassiveOpens)."""
    with h.net.server.entered():
        names, values = (
            line.split()
            for line in Path("/proc/thread-self/net/snmp").read_text().splitlines()
            if line.startswith("Tcp:")
        )
    return int(values[names.index("PassiveOpens")])


def uncounted(h: Host) -> np.ndarray:
    return h.tables.maps["uncounted"].items()[1].astype(np.int64)


def rows(counts: Connections, level: Level) -> np.ndarray:
    first = counts._sizes.set_base(level) * TALLIES_PER_SET
    return counts._rows[first : first + counts._sizes.sets(level) * TALLIES_PER_SET].copy()


def assert_sound(h: Host) -> None:
    """No row is left in between, and no prefix has two rows of a set; the marks are what the counters say."""
    tables = h.tables
    marks = np.zeros(len(Level), np.int64)
    for level in Level:
        found = rows(tables.connections, level)
        tags = found["tag"].reshape(-1, TALLIES_PER_SET)
        assert not (tags == 1).any()
        for one in tags:
            assert len(set(one[one != 0].tolist())) == np.count_nonzero(one), f"{level.name}: a prefix has two rows"
        assert not found["open"][found["tag"] & HELD == 0].any()
        assert (found["open"].astype(np.int64) >= 0).all()
        marks[level] = found["crowded"].sum()
    assert np.array_equal(tables.maps["crowded_levels"].items()[1]["prefixes"][0], marks)
    by_slot = tables.maps["crowded"].items()[1].astype("<i4").reshape(len(Level), -1)
    assert np.array_equal(by_slot.sum(axis=1), marks)
    assert (by_slot >= 0).all()


def assert_all_closed(h: Host) -> None:
    """No connection is counted any more. A mark may stay only where the daemon's correction alone is the limit."""
    wait(lambda: not h.tables.connections._rows["open"].any(), "all closed")
    assert_sound(h)
    tables = h.tables
    corrected = {key: by for key, by in tables.corrections.held.items() if by >= LIMIT}
    print("corrections that are the limit", {f"{prefix}": by for (_, prefix), by in corrected.items()})
    for level in Level:
        marked = int(rows(tables.connections, level)["crowded"].sum())
        assert marked <= sum(prefix.length == LENGTHS[level] for _, prefix in corrected), level.name


def assert_completed(h: Host, made: np.ndarray) -> None:
    """Every connection is in a row, or counted as one for which there was none."""
    tables, missed = h.tables, uncounted(h)
    for level in set(Level) - set(CHURNED):
        expected = made[0] + (made[1] if level is not Level.L32 else 0)
        completed = int(rows(tables.connections, level)["completed"].sum())
        assert completed + missed[level] == expected, level.name


def assert_open_as_the_kernel_says(h: Host, missed: np.ndarray) -> None:
    """`missed`: of the connections open now, those for which a level had no room."""
    with h.net.server.entered():
        actual = open_connections({25: Service.MX})
    for level in set(Level) - {Level.L128}:
        counted = per_prefix(actual, level)
        table = {(int(row["hi"]), int(row["service"])): int(row["count"]) for row in counted}
        known = {(int(row["hi"]), int(row["service"])): int(row["count"]) for row in h.tables.connections.open(level)}
        assert all(count <= table.get(key, 0) for key, count in known.items()), level.name
        assert sum(table.values()) - sum(known.values()) == missed[level], level.name


def test_not_one_connection_is_miscounted(mail_host: Host) -> None:
    h = mail_host
    h.start()
    seed = random.randrange(1 << 32)
    print("seed", seed)
    (h.directory / "networks").write_text("\n".join(networks(h, seed)))
    with ExitStack() as stack:
        commands = [
            client(h, CPUS[n % len(CPUS)], seed + n // len(CPUS), seed + 97 + n, CONNECTIONS, HELD_EACH)
            for n in range(CLIENTS)
        ]
        clients = [Client(stack.enter_context(process(command))) for command in commands]
        doomed = Client(stack.enter_context(process(client(h, CPUS[0], seed + 89, seed + 83, 0, 31))))
        for one in clients:
            one.word("ready")
        for one in clients:
            one.go()
        # meanwhile: the daemon dies, another version of the program takes over, a client is killed
        h.kill()
        h.start()
        for expected in ("ready", "churned"):
            doomed.word(expected)
            doomed.go()
        killed = doomed.word("holding")
        h.kill()
        h.another_build()
        doomed.child.kill()
        h.start()
        assert "programs loaded" in h.log.read_text()
        made = killed + sum(one.word("churned") for one in clients)
        assert accepted(h) == made.sum()
        assert_all_closed(h)
        assert_completed(h, made)
        print("uncounted", uncounted(h))

        before = uncounted(h)
        for one in clients:
            one.go()
        made = killed + sum(one.word("holding") for one in clients)
        wait(lambda: accepted(h) == made.sum(), "all accepted")
        assert_sound(h)
        assert_open_as_the_kernel_says(h, uncounted(h) - before)
        for one in clients:
            one.go()
            one.word("closed")
        assert_all_closed(h)
        assert_completed(h, made)
