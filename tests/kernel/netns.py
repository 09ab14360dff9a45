"""Network namespaces for tests: made with a name of their own, entered, and removed whatever happens."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

_CLONE_NEWNET = 0x40000000
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class NetNs:
    """A network namespace that exists."""

    name: str

    @property
    def path(self) -> str:
        return f"/run/netns/{self.name}"

    def run(self, *command: str, stdin: str | None = None) -> str:
        """Run a program in it (not by `ip netns exec`, which hides /sys/fs/bpf); its output."""
        done = subprocess.run(
            ["nsenter", f"--net={self.path}", *command], input=stdin, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """This thread is in it meanwhile; sockets it makes stay in it."""
        libc = ctypes.CDLL(None, use_errno=True)
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        inside = os.open(self.path, os.O_RDONLY)
        try:
            _enter(libc, inside)
            try:
                yield
            finally:
                _enter(libc, before)
        finally:
            os.close(before)
            os.close(inside)


def _enter(libc: ctypes.CDLL, fd: int) -> None:
    if libc.setns(fd, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


@contextlib.contextmanager
def netns(label: str = "t") -> Iterator[NetNs]:
    """A new network namespace with its loopback up, removed afterwards."""
    space = NetNs(f"edge-{label}-{os.getpid()}-{next(_numbers)}")
    subprocess.run(["ip", "netns", "add", space.name], check=True)
    try:
        space.run("ip", "link", "set", "lo", "up")
        yield space
    finally:
        subprocess.run(["ip", "netns", "del", space.name], check=True)
