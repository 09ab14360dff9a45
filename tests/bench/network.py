"""Where live frames run: one namespace that sends, and one for each contender, each joined to it by a veth pair.

All contenders are set up at once and stay, so that every round measures all of them. Names carry the process id.

Invariants:
    nothing-is-left: namespaces, and with them links, tables and attached programs, are gone after the run, also after
        a failure or Ctrl-C; those of a run that was killed go at the start of the next.
    traffic-stays-inside: nothing is sent but from one of these namespaces into another.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edge.errors import UnavailableError
from edge.kernel import libbpf
from edge.lab.network import Namespace
from tests.bench import packets

NAME = re.compile(r"^edge-bench-(\d+)-")
RECEIVING = "rx0"
RX_MAC = "02:00:00:00:00:02"  # destination of tests.packets.ethernet
TX_MAC = "02:00:00:00:00:01"


def run(command: Sequence[str], text: str | None = None) -> str:
    """Run a program; its output, or UnavailableError with its own words."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UnavailableError(f"the program `{command[0]}` is missing: `make bench` installs it") from None
    if done.returncode:
        raise UnavailableError(f"{' '.join(command)[:200]}: {done.stderr.strip()[:400]}")
    return done.stdout


@dataclass(frozen=True, slots=True)
class Lane:
    """One contender's way: frames redirected to `sending` arrive at RECEIVING inside `receiver`."""

    sender: Namespace
    receiver: Namespace
    sending: str

    def inside(self, arguments: Sequence[str], text: str | None = None) -> str:
        """Run a program where the frames arrive."""
        return run(self.receiver.command(arguments), text)

    def index(self) -> int:
        """Index of the sending interface."""
        with self.sender.entered():
            return _index(self.sending)

    def attach(self, program: int) -> libbpf.Fd:
        """Attach an XDP program in native mode; it goes with the returned link."""
        with self.receiver.entered():
            return libbpf.attach_xdp(program, _index(RECEIVING), libbpf.XDP_NATIVE)

    def attach_nothing(self) -> None:
        """Without XDP, a veth takes redirected frames only with GRO."""
        self.inside(["ethtool", "-K", RECEIVING, "gro", "on"])

    def received(self) -> int:
        """Frames that have arrived."""
        with self.receiver.entered():
            for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
                name, _, numbers = line.partition(":")
                if name.strip() == RECEIVING:
                    return int(numbers.split()[1])
        raise UnavailableError(f"{self.receiver.name}: {RECEIVING} is gone")


def _index(name: str) -> int:
    """Index of an interface of this thread's namespace."""
    for line in run(["ip", "-o", "link", "show", name]).splitlines():
        return int(line.split(":")[0])
    raise UnavailableError(f"interface {name} is gone")


class Arena:
    """The sending namespace and its lanes."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.sender = Namespace(f"edge-bench-{pid}-tx")
        self._lanes = 0
        run(["ip", "netns", "add", self.sender.name])
        _settings(self.sender, "default")

    def lane(self) -> Lane:
        """A further receiving namespace and its link."""
        self._lanes += 1
        receiver = Namespace(f"edge-bench-{self._pid}-{self._lanes}")
        sending = f"tx{self._lanes}"
        run(["ip", "netns", "add", receiver.name])
        _settings(receiver, "default")
        ends = (
            f"{RECEIVING} address {RX_MAC} netns {receiver.name}",
            f"{sending} address {TX_MAC} netns {self.sender.name}",
        )
        run(["ip", "link", "add", *f"{ends[0]} type veth peer name {ends[1]}".split()])
        run(["ip", "-n", self.sender.name, "link", "set", sending, "up"])
        lines = (
            "link set lo up",
            f"link set {RECEIVING} up",
            f"address add {packets.RECEIVER}/64 dev {RECEIVING} nodad",
        )
        run(["ip", "-n", receiver.name, "-batch", "-"], "\n".join(lines) + "\n")
        return Lane(self.sender, receiver, sending)


def _settings(namespace: Namespace, interface: str) -> None:
    """No neighbour or router discovery: what is counted is what was sent."""
    with namespace.entered():
        for key, value in {
            "accept_dad": "0",
            "router_solicitations": "0",
            "mldv2_unsolicited_report_interval": "0",
        }.items():
            path = Path("/proc/sys/net/ipv6/conf", interface, key)
            if path.exists():
                path.write_text(value)


def remove(pid: int) -> None:
    """Remove all namespaces of a run."""
    for path in Path("/run/netns").glob(f"edge-bench-{pid}-*"):
        run(["ip", "netns", "delete", path.name])


def remove_leftovers() -> None:
    """Remove those of runs that were killed."""
    found = {int(match[1]) for path in Path("/run/netns").glob("edge-bench-*") if (match := NAME.match(path.name))}
    for pid in found:
        if not Path("/proc", str(pid)).exists():
            remove(pid)


@contextmanager
def arena(pid: int) -> Iterator[Arena]:
    """An arena that is removed in any case."""
    remove_leftovers()
    try:
        yield Arena(pid)
    finally:
        remove(pid)
