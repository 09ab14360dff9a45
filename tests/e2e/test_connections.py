"""Connections as the kernel's TCP completes and closes them: counted, limited, and worth a budget of their own."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from edge.abi import Reason, Service
from edge.core.prefix import Prefix
from tests.e2e.host import SMALL_TABLES, Host, Reader, host, wait

pytestmark = pytest.mark.root

SETTINGS = """mode = "enforce"
[limits.mx.new]
64 = { rate_per_min = 600, burst = 30, open = 7 }
"""
SENDER = "2001:db8:cafe:1"


@pytest.fixture
def mail_host(tmp_path: Path) -> Iterator[Host]:
    with host(tmp_path, SETTINGS + SMALL_TABLES + "connections = 4096\n") as made:
        yield made


def counted(h: Host, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = h.ask("explain", prefix)["levels"][0]["connections"]
    return found


def dropped(h: Host, reason: Reason) -> int:
    found: int = h.ask("status")["counters"][reason.name.lower()]["dropped"]
    return found


@contextmanager
def held(h: Host, count: int, first: int = 1) -> Iterator[list[socket.socket]]:
    """So many connections from different addresses of the sender's /64, open until the end."""
    with ExitStack() as stack:
        found = [h.connected(f"{SENDER}::{n}") for n in range(first, first + count)]
        for client in found:
            assert client is not None
            stack.enter_context(client)
        yield [client for client in found if client is not None]


def test_completed_open_and_distinct_are_counted_and_forged_syns_are_not(mail_host: Host) -> None:
    h = mail_host
    h.start()
    for n in (1, 2, 3, 1, 2, 3, 1):
        assert h.connect(f"{SENDER}::{n}")
    h.forge([f"2001:db8:cafe:2::{n:x}" for n in range(1, 14)])
    wait(lambda: counted(h, f"{SENDER}::/64")["open"] == 0, "all closed")
    with held(h, 5):
        found = wait(lambda: (row := counted(h, f"{SENDER}::/64"))["open"] == 5 and row, "five open")
    assert found["completed"] == 12
    assert 3 <= found["distinct"] <= 7  # two of five share a bit in one run of 14
    assert counted(h, f"{SENDER}::1/128")["completed"] == 4
    above = counted(h, "2001:db8:cafe::/48")
    assert (above["completed"], round(above["distinct"])) == (12, 1)
    assert counted(h, "2001:db8:cafe:2::/64")["completed"] == 0


def test_open_connections_are_limited_and_survive_the_daemon(mail_host: Host) -> None:
    h = mail_host
    h.start()
    with held(h, 7) as clients:
        assert not h.connect(f"{SENDER}::8")
        assert h.connect("2001:db8:cafe:2::8")
        assert "7 connections open" in h.ask("explain", f"{SENDER}::8")["verdict"]["reason"]
        refused = dropped(h, Reason.OPEN_64)
        assert refused > 0
        h.kill()
        assert not h.connect(f"{SENDER}::8")
        h.start()
        assert not h.connect(f"{SENDER}::8")
        assert dropped(h, Reason.OPEN_64) > refused
        for client in clients[:2]:
            client.close()
        wait(lambda: counted(h, f"{SENDER}::/64")["open"] == 5, "two closed")
        assert h.connect(f"{SENDER}::8")
    wait(lambda: counted(h, f"{SENDER}::/64")["open"] == 0, "all closed")


def test_connections_that_were_open_before_the_start_count(mail_host: Host) -> None:
    h = mail_host
    with held(h, 6):
        h.start()
        wait(lambda: counted(h, f"{SENDER}::/64")["open"] == 6, "the socket table was read")
        with held(h, 1, first=7):
            assert not h.connect(f"{SENDER}::8")
            assert counted(h, f"{SENDER}::/64")["open"] == 7


def test_connections_outlive_an_upgrade_of_the_program(mail_host: Host) -> None:
    """The end of a connection is counted where its beginning was, by whichever program runs then."""
    h = mail_host
    h.start()
    with held(h, 3):
        wait(lambda: counted(h, f"{SENDER}::/64")["open"] == 3, "three open")
        h.kill()
        h.another_build()
        h.start()
        assert "programs loaded" in h.log.read_text()
        assert counted(h, f"{SENDER}::/64")["open"] == 3
    wait(lambda: counted(h, f"{SENDER}::/64")["open"] == 0, "their ends were counted")


def test_verified_senders_are_served_while_their_network_is_forged(mail_host: Host) -> None:
    """Forged SYNs spend the /64's budget; who completed a handshake before has another, and nothing is scored."""
    h = mail_host
    h.start()
    assert h.connect(f"{SENDER}::25")

    assert not h.ask("explain", f"{SENDER}::25")["levels"][1]["forged"]
    forged = Service.MX, Prefix.parse(f"{SENDER}::/64")
    flood = Reader(lambda: h.forge([f"{SENDER}::{n:x}" for n in range(0x1000, 0x1000 + 61)]))
    flood.start()
    wait(lambda: forged in h.tables.forged.held, "noticed")
    assert all(h.connect(f"{SENDER}::25") for _ in range(5))
    strangers = sum(h.connect(f"{SENDER}::666", timeout_s=0.2) for _ in range(5))
    flood.end()
    assert strangers < 5  # one gets in where it comes between two of the flood
    answer = h.ask("explain", f"{SENDER}::25")
    assert answer["levels"][1]["forged"]
    assert all(level["bad"] == 0 and level["entry"] is None for level in answer["levels"])
    assert "forged" in h.log.read_text()
