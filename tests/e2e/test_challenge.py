"""The challenge against real clients: Linux gets in while its network is forged, and so does who cannot answer."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge.abi import Reason, Service
from edge.core.prefix import Prefix
from edge.kernel import libbpf, program
from edge.lab import network
from tests.e2e.host import SMALL_TABLES, Host, Reader, host, wait

pytestmark = pytest.mark.root

SETTINGS = """mode = "enforce"
[challenge]
mode = "auto"
[limits.mx.new]
64 = { rate_per_min = 60, burst = 7 }
"""
NETWORK = Prefix.parse("2001:db8:cafe:1::/64")


@contextmanager
def taking_answers(h: Host) -> Iterator[None]:
    """A veth takes what the program at its other end sends back only if it has a program too."""
    os.environ["BCC_KERNEL_SOURCE"] = str(program.directory() / "headers")
    from bcc import BPF

    built = BPF(text=b"int pass(struct xdp_md *ctx) { return XDP_PASS; }").load_func(b"pass", BPF.XDP)
    with h.net.client.entered():
        index = {name: number for number, name in _interfaces()}[network.CLIENT_LINK]
        link = libbpf.attach_xdp(int(built.fd), index, libbpf.XDP_NATIVE)
    with link:
        yield


def _interfaces() -> list[tuple[int, str]]:
    import socket

    return socket.if_nameindex()


@pytest.fixture
def mail_host(tmp_path: Path) -> Iterator[Host]:
    with host(tmp_path, SETTINGS + SMALL_TABLES + "connections = 4096\n") as made, taking_answers(made):
        made.start()
        yield made


def swallow(h: Host, name: str, what: str) -> None:
    """The clients' side of the network never sees such packets."""
    chain = f"chain in {{ type filter hook prerouting priority raw; {what} counter drop; }}"
    subprocess.run(h.net.client.command(["nft", f"table ip6 {name} {{ {chain}; }}"]), check=True)


@contextmanager
def forged(h: Host) -> Iterator[None]:
    """SYNs from all over the network, for as long as it lasts; inside, the daemon has noticed."""
    swallow(h, "elsewhere", "ip6 daddr 2001:db8:cafe:1::1000/116")  # a forger does not receive there
    flood = Reader(lambda: h.forge([f"2001:db8:cafe:1::{n:x}" for n in range(0x1000, 0x1000 + 101)]))
    flood.start()
    try:
        wait(lambda: (Service.MX, NETWORK) in h.tables.forged.held, "noticed")
        yield
    finally:
        flood.end()


def counters(h: Host) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = h.ask("status")["counters"]
    return found


def test_linux_clients_nobody_knows_get_in_while_their_network_is_forged(mail_host: Host) -> None:
    h = mail_host
    with forged(h):
        # seven: the budget of those who answered, which no forger spends
        served = sum(h.connect(f"2001:db8:cafe:1::{n:x}", timeout_s=5) for n in range(1, 8))
    assert served == 7
    # the ordinary budget may have had one or two
    wait(lambda: counters(h)[Reason.PROVED.name.lower()]["passed"] >= 5, "five answers")
    assert counters(h)[Reason.CHALLENGED.name.lower()]["dropped"] > 101
    assert not h.ask("list", "--standing", "block")["entries"]


def test_a_client_whose_firewall_swallows_the_challenge_gets_in_later(mail_host: Host) -> None:
    """It sees no SYN-ACK that it did not ask for, so it never answers; its SYN comes again after 1, 3, 7 seconds."""
    h = mail_host
    swallow(h, "firewall", "tcp flags & (syn | ack) == syn | ack tcp window 0")
    with forged(h):
        proved = counters(h)[Reason.PROVED.name.lower()]["passed"]
        assert h.connect("2001:db8:cafe:1::1", timeout_s=20)
    wait(lambda: counters(h)[Reason.UNTRACKED.name.lower()]["passed"] > 0, "the shared budget was used")
    assert counters(h)[Reason.PROVED.name.lower()]["passed"] == proved
    dropped = subprocess.run(
        h.net.client.command(["nft", "list", "table", "ip6", "firewall"]), capture_output=True, text=True, check=True
    )
    assert "packets 0" not in dropped.stdout
