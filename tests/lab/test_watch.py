import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from edge.control import ControlServer, Handlers
from edge.errors import UnavailableError
from edge.lab import watch
from edge.lab.network import Namespace
from edge.lab.watch import Watch, nft_blocks

LISTING: dict[str, Any] = {
    "nftables": [
        {"metainfo": {"version": "1.0.6"}},
        {"table": {"family": "inet", "name": "edge", "handle": 1}},
        {
            "set": {
                "name": "mx_block_64",
                "elem": [{"elem": {"val": "2001:db8:bad:f100::", "timeout": 600, "expires": 599}}, "2001:db8:1::"],
            }
        },
        {"set": {"name": "mx_block_v4_32", "elem": [{"elem": {"val": "198.51.100.66", "timeout": 6, "expires": 5}}]}},
        {"set": {"name": "mx_block_128", "elem": ["2001:db8:4057:1::bad"]}},
        {"set": {"name": "mx_block_57_63", "elem": [{"range": ["2001:db8:2::", "2001:db8:2::1"]}]}},
        {"set": {"name": "mx_block_48"}},
        {"set": {"name": "mx_allow_64", "elem": ["2001:db8:9::"]}},
        {"set": {"name": "submission_block_64", "elem": ["2001:db8:8::"]}},
        {"rule": {"chain": "mx_v6", "comment": "mx_block_64"}},
    ]
}


def entry(prefix: str, **more: str) -> dict[str, str]:
    return {"prefix": prefix, "standing": "block", "service": "mx", "reason": "many", **more}


@contextmanager
def daemon(path: Path, handlers: Handlers) -> Iterator[None]:
    """A control socket served by a thread."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(ControlServer.start(path, handlers))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        loop.close()


def test_block_sets_of_port_25_are_read_with_the_length_in_their_name() -> None:
    assert nft_blocks(LISTING) == {
        ip_network("2001:db8:bad:f100::/64"),
        ip_network("2001:db8:1::/64"),
        ip_network("198.51.100.66/32"),
        ip_network("2001:db8:4057:1::bad/128"),
    }


def test_a_block_is_dated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "nft_table", lambda *_: LISTING)
    entries = [
        entry("2001:db8:bad:f100::/64"),
        entry("198.51.100.66/32"),
        entry("2001:db8:77::/64"),
        entry("2001:db8:55::/64", standing="suspect"),
        entry("2001:db8:66::/64", service="submission"),
    ]
    seen = Watch(tmp_path / "control.sock", Namespace("none"), "edge", lambda: None)
    with daemon(tmp_path / "control.sock", {"list": lambda _: {"entries": entries}}):
        seen.look()
        dates = {net: block.seen_s for net, block in seen.blocks.items()}
        entries[0]["reason"] = "renewed"
        del entries[1]
        seen.look()
    assert dates == {net: block.seen_s for net, block in seen.blocks.items()}
    flood, bot, missing = seen.blocks.values()
    assert (flood.level, flood.reason, flood.in_nftables, flood.released_s) == (64, "many", True, None)
    assert (bot.level, bot.in_nftables) == (64, True)  # an IPv4 /32 rides at /64
    assert bot.released_s is not None
    assert missing.in_nftables is False


def test_a_dead_daemon_ends_the_watch(tmp_path: Path) -> None:
    def check() -> None:
        raise UnavailableError("the daemon ended with status 1")

    with pytest.raises(UnavailableError, match="ended with status 1"):
        Watch(tmp_path / "control.sock", Namespace("none"), "edge", check).look()
