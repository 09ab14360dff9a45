"""A mail host to be flooded: a real Postfix in a namespace of its own, and before it one limiter after the other.

Behind one end of a veth are Postfix and the limiter, behind the other is everybody else; all come in through the same
queue. Only the prefixes of honest senders exist outside: answers to other addresses are discarded there.

Invariants:
    nothing-is-left: namespaces, processes, pins and files are gone after the run, also after a failure or Ctrl-C; those
        of a run that was killed go at the start of the next.
    same-limit-for-all: every limiter grants a /64 what edge grants one without a record, or more.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from edge.config import Config
from edge.control import call
from edge.errors import UnavailableError
from edge.lab import network
from edge.lab.mta import PostfixServer, postfix_program
from edge.lab.network import Namespace, Network
from edge.lab.process import Child, wait_for
from tests.bench import network as lanes
from tests.bench import peers
from tests.bench.network import run

NEAR, FAR = "fd25:1ac::1", "fd25:1ac::2"
NEAR_MAC, FAR_MAC = "02:00:00:00:25:03", "02:00:00:00:25:04"
"""Of the link between honest senders and the namespace in which the flood is made."""

KEEP_S = 60
"""Timeout of the other limiters' entries: twice the time in which a burst is forgotten."""

DAEMON_S = 60.0
"""Time the daemon gets to answer; it compiles its programs first."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Counts at the host, or their growth."""

    frames: int
    """That arrived, whatever became of them."""
    segments: int
    """That TCP got to see; honest ones too, some fifteen a transaction."""
    cookies: int
    """SYN-ACKs without a state behind them, sent since the queue of half-open connections is full."""

    def __sub__(self, before: Seen) -> Seen:
        return Seen(
            frames=self.frames - before.frames,
            segments=self.segments - before.segments,
            cookies=self.cookies - before.cookies,
        )


@dataclass(frozen=True)
class Site:
    """The host and the world outside."""

    net: Network
    directory: Path
    postfix: PostfixServer

    @property
    def senders(self) -> Namespace:
        """Where the honest senders are; the flood begins one hop nearer, in `net.client`."""
        return Namespace(f"edge-bench-{self.net.pid}-senders")

    def inside(self, *arguments: str, text: str | None = None) -> str:
        """Run a program beside Postfix."""
        return run(self.net.server.command(arguments), text)

    def seen(self) -> Seen:
        """The host's counters."""
        with self.net.server.entered():
            devices = Path("/proc/thread-self/net/dev").read_text()
            segments, cookies = _counter("snmp", "Tcp", "InSegs"), _counter("netstat", "TcpExt", "SyncookiesSent")
        frames = int(devices.split(f"{network.SERVER_LINK}:")[1].split()[1])
        return Seen(frames=frames, segments=segments, cookies=cookies)


def _counter(name: str, group: str, counter: str) -> int:
    """Of /proc/net/snmp or netstat: each group is a line of names and a line of numbers."""
    lines = Path("/proc/thread-self/net", name).read_text().splitlines()
    names, numbers = (line.split() for line in lines if line.startswith(f"{group}:"))
    return int(numbers[names.index(counter)])


@contextmanager
def site(routes: Sequence[str], cpu: int) -> Iterator[Site]:
    """A host with Postfix that receives on one CPU, and outside the prefixes of honest senders; removed in any
    case."""
    remove_leftovers()
    net = Network(pid=os.getpid())
    try:
        directory = Path(tempfile.mkdtemp(prefix=f"{net.name}-"))
        directory.chmod(0o755)  # Postfix's own user must pass through it
        net.make()
        made = Site(net, directory, PostfixServer(net, directory, postfix_program() or "postfix"))
        _wire(made, routes, cpu)
        try:
            made.postfix.start()
            yield made
        finally:
            made.postfix.stop()
    finally:
        _remove(net)


def _wire(made: Site, routes: Sequence[str], cpu: int) -> None:
    """One queue for everybody, which takes redirected frames whatever limiter there is, and is served by the flood's
    CPU. The serving CPU of a veth is the sending one, so honest packets change over to it before the last hop:
    otherwise they would now and then drag the whole flood to the CPU of Postfix."""
    server, net, senders = made.net.server, made.net.client, made.senders
    for name, namespace in ((network.SERVER_LINK, server), (network.CLIENT_LINK, net)):
        run(namespace.command(["ethtool", "-L", name, "rx", "1", "tx", "1"]))
    # With it, frames of a real TCP go around the queue as long as no XDP program is attached.
    run(net.command(["ethtool", "-K", network.CLIENT_LINK, "tso", "off"]))
    made.inside("ethtool", "-K", network.SERVER_LINK, "gro", "on")
    made.inside("ip", "route", "add", "default", "via", network.CLIENT_V6)
    run(["ip", "netns", "add", senders.name])
    queues = "numrxqueues 1 numtxqueues 1"
    ends = (f"near address {NEAR_MAC} netns {net.name}", f"far address {FAR_MAC} netns {senders.name}")
    run(["ip", "link", "add", *f"{ends[0]} {queues} type veth peer name {ends[1]} {queues}".split()])
    _in_batch(
        net,
        "link set near up",
        f"address add {NEAR}/64 dev near nodad",
        f"neigh add {FAR} lladdr {FAR_MAC} dev near",
        "route del local 2001:db8::/32 dev lo",
        "route add blackhole default",
        *(f"route add {prefix} via {FAR} dev near" for prefix in routes),
    )
    _in_batch(
        senders,
        "link set lo up",
        "link set far up",
        f"address add {FAR}/64 dev far nodad",
        f"neigh add {NEAR} lladdr {NEAR_MAC} dev far",
        f"route add default via {NEAR} dev far",
        *(f"route add local {prefix} dev lo" for prefix in routes),
    )
    with net.entered():
        Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")
    steering = "mount -t sysfs sysfs /sys && echo $0 > /sys/class/net/near/queues/rx-0/rps_cpus"
    run(net.command(["unshare", "--mount", "--propagation", "private", "sh", "-c", steering, _mask(cpu)]))


def _mask(cpu: int) -> str:
    """One CPU as the kernel reads a bit mask: groups of 32."""
    return ",".join([f"{1 << cpu % 32:x}", *["00000000"] * (cpu // 32)])


def _in_batch(namespace: Namespace, *lines: str) -> None:
    run(["ip", "-6", "-n", namespace.name, "-batch", "-"], "\n".join(lines) + "\n")


def remove_leftovers() -> None:
    """Remove what killed runs left behind."""
    for old in network.leftovers():
        _remove(old)
    lanes.remove_leftovers()


def _remove(net: Network) -> None:
    lanes.remove(net.pid)
    problems = net.remove()
    for directory in Path(tempfile.gettempdir()).glob(f"{net.name}-*"):
        shutil.rmtree(directory, ignore_errors=True)
    if problems:
        raise UnavailableError(f"could not remove everything: {'; '.join(problems)}")


Limiter = Callable[[Site], AbstractContextManager[object]]
"""Puts itself before Postfix, and goes."""


def limiters() -> dict[str, tuple[Limiter, str | None]]:
    """Every contender, and the program it needs."""
    return {
        "nothing": (lambda _: nullcontext(), None),
        "nft meter, input": (nft_meter, "nft"),
        "hashlimit, raw": (hashlimit, "ip6tables-legacy"),
        "edge": (edge, None),
    }


def _rate() -> tuple[int, int]:
    """Connections a minute and burst that edge grants a /64 without a record: the others grant the same."""
    limit = Config().limits.mx.new.l64
    return round(limit.rate_per_min), limit.burst


@contextmanager
def nft_meter(where: Site) -> Iterator[None]:
    """A limit per /64 in the input hook, as the nftables wiki writes it."""
    rate, burst = _rate()
    rule = f"limit rate over {rate}/minute burst {burst} packets"
    where.inside(
        "nft",
        "-f",
        "-",
        text=f"""table inet bench {{
            set seen {{ type ipv6_addr; flags dynamic,timeout; size {peers.ROOM}; timeout {KEEP_S}s; }}
            chain c {{ {peers.HOOKS["input"][1]}; policy accept;
                meta nfproto ipv6 {peers.SYN_ONLY} add @seen {{ ip6 saddr & ffff:ffff:ffff:ffff:: {rule} }} drop
            }}
        }}""",
    )
    try:
        yield
    finally:
        where.inside("nft", "delete", "table", "inet", "bench")


@contextmanager
def hashlimit(where: Site) -> Iterator[None]:
    """ip6tables hashlimit per /64 in the raw table, with as many entries as it takes."""
    rate, burst = _rate()
    match = "-p tcp --dport 25 --syn -m hashlimit --hashlimit-mode srcip --hashlimit-srcmask 64 --hashlimit-name bench"
    limit = f"--hashlimit-above {rate}/minute --hashlimit-burst {burst}"
    room = f"--hashlimit-htable-size {peers.HASHLIMIT_ROOM} --hashlimit-htable-max {peers.HASHLIMIT_ROOM}"
    keep = f"--hashlimit-htable-expire {KEEP_S * 1000}"
    chain = ("ip6tables-legacy", "-w", "-t", "raw")
    where.inside(*chain, "-A", "PREROUTING", *f"{match} {limit} {room} {keep} -j DROP".split())
    try:
        yield
    finally:
        where.inside(*chain, "-F", "PREROUTING")


@contextmanager
def edge(where: Site) -> Iterator[None]:
    """`edge run` with default limits in mode enforce, without anything learned before; it reads Postfix's log."""
    directory = Path(tempfile.mkdtemp(dir=where.directory))
    config, control = directory / "edge.toml", directory / "control.sock"
    config.write_text(_settings(where, directory, control))
    program = [sys.executable, "-m", "edge.cli", "--config", str(config)]
    daemon = Child("the daemon", where.net.server.command([*program, "run"]), directory / "daemon.log")

    def answers() -> bool:
        daemon.check()
        try:
            call(control, "status")
        except UnavailableError:
            return False  # not yet
        return True

    try:
        wait_for(answers, "the daemon's control socket", seconds=DAEMON_S)
        yield
        daemon.check()
    finally:
        daemon.stop()
        where.inside(*program, "detach")


def _settings(where: Site, directory: Path, control: Path) -> str:
    """The mode and where things are; everything else keeps its default. A TOML string is written as JSON's."""
    sections: dict[str, dict[str, object]] = {
        "interfaces": {"names": [network.SERVER_LINK]},
        "paths": {
            "pins": str(where.net.pins),
            "state": str(directory / "state"),
            "cgroup": str(where.net.cgroup),
        },
        "control": {"socket": str(control)},
        "evidence.postfix": {"logs": [str(path) for path in where.postfix.logs]},
        "evidence.socket": {"path": str(directory / "events.sock")},
    }
    lines = ['mode = "enforce"']
    for name, values in sections.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"
