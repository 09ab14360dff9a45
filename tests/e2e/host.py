"""A mail host of the test's own: two namespaces, a listener on port 25, and the daemon as an administrator runs it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from edge.config import load
from edge.kernel.loader import sizes
from edge.kernel.maps import Tables
from edge.kernel.program import U32
from edge.lab import network
from edge.lab.forge import syn_frame
from edge.lab.network import Network

T = TypeVar("T")

EDGE = Path(sys.executable).with_name("edge")

SMALL_TABLES = """
[tables]
rows_128 = 4096
rows_64 = 65536
rows_56 = 32768
rows_48 = 16384
rows_32 = 4096
"""


def wait(probe: Callable[[], T], what: str, seconds: float = 20.0) -> T:
    """The probe's first true answer; fails after the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        found = probe()
        if found:
            return found
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)


class Host:
    """One host; `directory` holds its configuration, sockets, state and log."""

    def __init__(self, net: Network, directory: Path, settings: str) -> None:
        self.net, self.directory = net, directory
        self.config_path = directory / "edge.toml"
        self.log = directory / "daemon.log"
        self.mail_log = directory / "mail.log"
        self.mail_log.touch()
        self.daemon: subprocess.Popen[bytes] | None = None
        self.configure(settings)

    def configure(self, settings: str) -> None:
        """Write the configuration: the paths, and what the test adds (top-level keys first)."""
        self.config_path.write_text(
            f"""{settings}
[interfaces]
names = ["{network.SERVER_LINK}"]
[paths]
pins = "{self.net.pins}"
state = "{self.directory}/state"
cgroup = "{self.net.cgroup}"
[control]
socket = "{self.directory}/control.sock"
[evidence.socket]
path = "{self.directory}/events.sock"
[evidence.postfix]
logs = ["{self.mail_log}"]
"""
        )

    @property
    def tables(self) -> Tables:
        """The pinned maps, opened from here."""
        config = load(self.config_path)
        return Tables.open(self.net.pins, sizes(config))

    def command(self, *arguments: str) -> list[str]:
        return self.net.server.command([str(EDGE), "--config", str(self.config_path), *arguments])

    def edge(self, *arguments: str, expect: int = 0) -> str:
        """Run one verb to its end; its output (and its errors, when it is to fail)."""
        done = subprocess.run(self.command(*arguments), capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == expect, f"edge {arguments}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout if expect == 0 else done.stderr

    def ask(self, *arguments: str) -> Any:
        return json.loads(self.edge(*arguments, "--json"))

    def start(self) -> None:
        """Start the daemon and wait until it ticks."""
        with self.log.open("ab") as log:
            self.daemon = subprocess.Popen(self.command("run"), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        before = self.log.read_text().count("daemon: ready")

        def ready() -> bool:
            assert self.daemon is not None
            assert self.daemon.poll() is None, f"the daemon ended:\n{self.log.read_text()}"
            return self.log.read_text().count("daemon: ready") > before

        wait(ready, f"daemon ready\n{self.log.read_text()}", 40)

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send a signal to the daemon and wait for its end."""
        assert self.daemon is not None
        self.daemon.send_signal(number)
        code = self.daemon.wait(20)
        self.daemon = None
        return code

    def another_build(self) -> None:
        """Make the pinned programs those of an earlier version with the same layout."""
        identity = self.tables.maps["identity"]
        made = identity.get(np.zeros(1, U32))
        assert made is not None
        older = made.copy()
        older["build_id"] += 1
        identity.put(np.zeros(1, U32), older)

    def stop(self) -> None:
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon.wait(20)

    def nft(self, *arguments: str) -> str:
        done = subprocess.run(
            self.net.server.command(["nft", *arguments]), capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def forge(self, sources: Sequence[str], *, port: int = 25) -> None:
        """One forged SYN from each source, in order."""
        with self.net.client.entered(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind((network.CLIENT_LINK, 0))
            for number, source in enumerate(sources):
                raw.send(
                    syn_frame(
                        IPv6Address(source),
                        IPv6Address(network.SERVER_V6),
                        source_port=1024 + number % 60000,
                        port=port,
                        sequence=number,
                    )
                )

    def connect(self, source: str, *, port: int = 25, timeout_s: float = 1.0) -> bool:
        """Whether a TCP connection from `source` is accepted."""
        client = self.connected(source, port=port, timeout_s=timeout_s)
        if client is not None:
            client.close()
        return client is not None

    def connected(self, source: str, *, port: int = 25, timeout_s: float = 1.0) -> socket.socket | None:
        """A connection from `source`, for the caller to close; None if it is not accepted in time."""
        with self.net.client.entered():
            client = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        client.settimeout(timeout_s)
        client.setsockopt(socket.IPPROTO_IPV6, 78, 1)  # IPV6_FREEBIND: linux/in6.h
        client.bind((source, 0))
        try:
            client.connect((network.SERVER_V6, port))
        except TimeoutError:
            client.close()
            return None
        return client

    def reject_lines(self, source: str, count: int) -> None:
        """Append what Postfix writes when it refuses unknown recipients."""
        with self.mail_log.open("a") as log:
            for _ in range(count):
                log.write(
                    f"Nov 22 08:50:00 mx postfix/smtpd[12]: NOQUEUE: reject: RCPT from unknown[{source}]: 550 5.1.1"
                    " <nobody@example.org>: Recipient address rejected: User unknown in virtual mailbox table;"
                    " from=<a@b.example> to=<nobody@example.org> proto=ESMTP helo=<x>\n"
                )


@contextmanager
def listener(net: Network) -> Iterator[None]:
    """Accepts on port 25, inside the counted cgroup, in a process of its own; closes when the client has."""
    code = (
        "import os,socket,threading\n"
        f"open('{net.cgroup}/cgroup.procs','w').write(str(os.getpid()))\n"
        "s=socket.create_server(('::',25),family=socket.AF_INET6,dualstack_ipv6=True,backlog=4096)\n"
        "print('ready',flush=True)\n"
        "def serve(c):\n"
        " with c:\n"
        "  try: c.recv(1)\n"
        "  except OSError: pass\n"
        "while True: threading.Thread(target=serve,args=(s.accept()[0],)).start()\n"
    )
    child = subprocess.Popen(net.server.command([sys.executable, "-c", code]), stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        yield
    finally:
        child.kill()
        child.wait(20)
        if child.stdout is not None:
            child.stdout.close()


class Reader(threading.Thread):
    """Runs a function again and again until told to stop; raises what it raised at `end`."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._over = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        while not self._over.is_set():
            try:
                self._work()
            except BaseException as error:
                self._error = error
                return

    def end(self) -> None:
        self._over.set()
        self.join(30)
        assert not self.is_alive()
        if self._error is not None:
            raise self._error


@contextmanager
def host(directory: Path, settings: str = 'mode = "enforce"') -> Iterator[Host]:
    """A host with everything but the daemon running; removed whatever happens."""
    net = Network(pid=os.getpid())
    made = Host(net, directory, settings)
    try:
        net.make()
        with listener(net):
            yield made
            made.stop()
    finally:
        made.stop()
        problems = net.remove()
        assert not problems, problems
