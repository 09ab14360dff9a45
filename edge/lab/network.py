"""Two network namespaces joined by a veth pair: `…-mx` holds the MTA and the daemon, `…-net` is the rest of the world.

The client side owns all of the documentation prefixes at once (a local route, "AnyIP"), so that it can send from any
address in them. The names carry the process id, so labs do not meet; the link itself uses private addresses, which are
exempt from limits.

Invariants:
    nothing-is-left: every namespace, link, cgroup, mount and pin of a lab is gone after it ended, however it ended.
    labs-do-not-meet: names hold the process id, and nothing is made outside the namespaces but what carries that name.
    machine-is-untouched: no address, route or setting of the machine's own namespace changes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge.errors import UnavailableError
from edge.lab.process import kill_inside, wait_for

NAME = re.compile(r"^edge-lab-(\d+)(-mx|-net)?$")

SERVER_V6, CLIENT_V6 = "fd25:1ab::1", "fd25:1ab::2"
SERVER_V4, CLIENT_V4 = "10.25.0.1", "10.25.0.2"
SERVER_MAC, CLIENT_MAC = "02:00:00:00:25:01", "02:00:00:00:25:02"
SERVER_LINK, CLIENT_LINK = "mx0", "world0"

WORLD = ("2001:db8::/32", "192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24")
"""Documentation prefixes (RFC 3849, RFC 5737): nobody's, and neither private nor exempt."""

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_RUN = Path("/run")


@dataclass(frozen=True, slots=True)
class Namespace:
    """A named network namespace, as `ip netns` keeps it."""

    name: str

    @property
    def path(self) -> Path:
        """Where it is mounted."""
        return Path("/run/netns", self.name)

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command that runs `arguments` inside; unlike `ip netns exec` it keeps /sys/fs/bpf."""
        return ["nsenter", f"--net={self.path}", *arguments]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, this thread's new sockets belong to the namespace; they stay there after the thread has left it."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _setns(there)
            finally:
                os.close(there)
            try:
                yield
            finally:
                _setns(home)
        finally:
            os.close(home)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What one lab made in the kernel, all of it named after one process id."""

    pid: int

    @property
    def name(self) -> str:
        """The name everything carries."""
        return f"edge-lab-{self.pid}"

    @property
    def server(self) -> Namespace:
        """Where the MTA and the daemon run."""
        return Namespace(f"{self.name}-mx")

    @property
    def client(self) -> Namespace:
        """Where all senders are."""
        return Namespace(f"{self.name}-net")

    @property
    def bpf(self) -> Path:
        """A BPF file system of the lab's own: /sys/fs/bpf need not be mounted, and is not touched when it is."""
        return _RUN / self.name

    @property
    def pins(self) -> Path:
        """Where the daemon pins its BPF objects."""
        return self.bpf / "edge"

    @property
    def cgroup(self) -> Path:
        """The cgroup (version 2) whose handshakes are counted."""
        return cgroup2_mount() / self.name

    def make(self) -> None:
        """Create all of it; UnavailableError names the step that failed."""
        self.cgroup.mkdir()
        self.bpf.mkdir(mode=0o700)
        _run(["mount", "-t", "bpf", self.name, str(self.bpf)])
        _ip("netns", "add", self.server.name)
        _ip("netns", "add", self.client.name)
        ends = [
            f"{SERVER_LINK} address {SERVER_MAC} netns {self.server.name}",
            f"{CLIENT_LINK} address {CLIENT_MAC} netns {self.client.name}",
        ]
        queues = "numrxqueues 2 numtxqueues 2"
        _ip("link", "add", *f"{ends[0]} {queues} type veth peer name {ends[1]} {queues}".split())
        self._configure()

    def _configure(self) -> None:
        """Addresses, permanent neighbours (nothing to resolve, so nothing to lose), routes and kernel settings."""
        for settings, namespace in ((_SERVER_SETTINGS, self.server), (_CLIENT_SETTINGS, self.client)):
            with namespace.entered():
                for key, value in settings.items():
                    Path("/proc/sys/net", key).write_text(value)
        _batch(
            self.server,
            f"link set lo up\nlink set {SERVER_LINK} up",
            f"address add {SERVER_V6}/64 dev {SERVER_LINK} nodad\naddress add {SERVER_V4}/30 dev {SERVER_LINK}",
            *(f"neigh add {peer} lladdr {CLIENT_MAC} dev {SERVER_LINK}" for peer in (CLIENT_V6, CLIENT_V4)),
            *(f"route add {prefix} via {CLIENT_V6 if ':' in prefix else CLIENT_V4}" for prefix in WORLD),
        )
        _batch(
            self.client,
            f"link set lo up\nlink set {CLIENT_LINK} up",
            f"address add {CLIENT_V6}/64 dev {CLIENT_LINK} nodad\naddress add {CLIENT_V4}/30 dev {CLIENT_LINK}",
            *(f"neigh add {peer} lladdr {SERVER_MAC} dev {CLIENT_LINK}" for peer in (SERVER_V6, SERVER_V4)),
            *(f"route add local {prefix} dev lo" for prefix in WORLD),
        )

    def remove(self) -> list[str]:
        """Remove all of it; what is not there is fine. Returns what could not be removed, in words."""
        problems: list[str] = []
        for step in (
            lambda: kill_inside(self.server.name),
            lambda: kill_inside(self.client.name),
            self._remove_bpf,
            lambda: _delete_namespace(self.server),
            lambda: _delete_namespace(self.client),
            self._remove_cgroup,
        ):
            try:
                step()
            except (OSError, UnavailableError) as error:
                problems.append(str(error))
        return problems

    def _remove_bpf(self) -> None:
        """Unmounting frees every pin; the programs go with their last link."""
        if self.bpf.is_mount():
            _run(["umount", str(self.bpf)])
        if self.bpf.exists():
            self.bpf.rmdir()

    def _remove_cgroup(self) -> None:
        """A cgroup lets itself be removed only once its last process has been reaped."""

        def gone() -> bool:
            with contextlib.suppress(OSError):
                self.cgroup.rmdir()
            return not self.cgroup.exists()

        wait_for(gone, f"removal of {self.cgroup}", seconds=5)


_SERVER_SETTINGS = {
    "core/somaxconn": "8192",
    "ipv4/tcp_max_syn_backlog": "8192",
}
_CLIENT_SETTINGS = {
    "ipv4/ip_local_port_range": "1024 65535",
    "ipv4/tcp_tw_reuse": "1",
}


def cgroup2_mount() -> Path:
    """Where the cgroup2 hierarchy is mounted (a hybrid host has it beside the old ones)."""
    for line in Path("/proc/mounts").read_text().splitlines():
        fields = line.split()
        if fields[2] == "cgroup2":
            return Path(fields[1])
    raise UnavailableError("no cgroup2 file system is mounted: mount -t cgroup2 none /sys/fs/cgroup")


def leftovers() -> list[Network]:
    """Labs that were killed before they could clean up: their names are there, their process is not."""
    pids = set()
    for directory in (_RUN / "netns", _RUN, cgroup2_mount()):
        if directory.is_dir():
            pids |= {int(match[1]) for entry in directory.iterdir() if (match := NAME.match(entry.name))}
    return [Network(pid=pid) for pid in sorted(pids) if not Path("/proc", str(pid)).exists()]


def _delete_namespace(namespace: Namespace) -> None:
    if namespace.path.exists():
        _ip("netns", "delete", namespace.name)


def _batch(namespace: Namespace, *lines: str) -> None:
    _ip("-n", namespace.name, "-batch", "-", text="\n".join(lines) + "\n")


def _ip(*arguments: str, text: str | None = None) -> None:
    _run(["ip", *arguments], text)


def _run(command: Sequence[str], text: str | None = None) -> None:
    """Run a program with `text` as its input; UnavailableError with its own words when it fails."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UnavailableError(f"the program `{command[0]}` is missing: install iproute2 and util-linux") from None
    if done.returncode:
        raise UnavailableError(f"{' '.join(command)}: {done.stderr.strip()}")


def _setns(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET):
        code = ctypes.get_errno()
        raise UnavailableError(f"cannot enter a network namespace: {os.strerror(code)}")
