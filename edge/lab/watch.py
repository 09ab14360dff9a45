"""Watches the daemon while the traffic runs: which blocks it holds, since when, and whether nftables holds them too.

Invariants:
    a-block-is-dated-once: the time kept for a block is that of its first sighting, not of a renewal.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any

from edge.control import call
from edge.errors import UnavailableError
from edge.lab.network import Namespace

POLL_S = 0.2
"""Pause between two looks at the daemon: a fifth of its tick."""

NFT_TRIES = 5
"""Looks at nftables for one new block, POLL_S apart, before it counts as missing: both layers are written in one tick,
one after the other."""

Net = IPv4Network | IPv6Network


@dataclass(slots=True)
class Block:
    """One learned block, from its first sighting on."""

    net: Net
    level: int  # of the key space: an IPv4 /32 is at 64
    reason: str
    seen_s: float  # CLOCK_MONOTONIC; at most POLL_S after it was installed
    in_nftables: bool = False
    released_s: float | None = None

    def covers(self, address: str) -> bool:
        """Whether it blocks an address."""
        return ip_address(address) in self.net


class Watch:
    """Polls the control socket and nftables."""

    def __init__(self, socket: Path, server: Namespace, table: str, check: Callable[[], None]) -> None:
        self._socket = socket
        self._server = server
        self._table = table
        self._check = check
        self._missing: dict[Net, int] = {}  # looks left at nftables
        self.blocks: dict[Net, Block] = {}

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.to_thread(self.look)
            await asyncio.sleep(POLL_S)

    def look(self) -> None:
        """One look; UnavailableError when the daemon or the MTA is gone."""
        self._check()
        entries = call(self._socket, "list")["entries"]
        now = time.monotonic()
        current = set()
        for entry in entries:
            if (entry["standing"], entry["service"]) != ("block", "mx"):
                continue
            net = ip_network(entry["prefix"])
            current.add(net)
            if net not in self.blocks:
                level = net.prefixlen + (32 if net.version == 4 else 0)
                self.blocks[net] = Block(net, level, entry["reason"], now)
                self._missing[net] = NFT_TRIES
        for net in self.blocks.keys() - current:
            block = self.blocks[net]
            block.released_s = block.released_s or now
        if self._missing:
            self._look_at_nftables()

    def _look_at_nftables(self) -> None:
        elements = nft_blocks(nft_table(self._server, self._table))
        for net in list(self._missing):
            if net in elements:
                self.blocks[net].in_nftables = True
                del self._missing[net]
            elif self._missing[net] == 1:
                del self._missing[net]
            else:
                self._missing[net] -= 1


def nft_table(server: Namespace, table: str) -> dict[str, Any]:
    """`nft -j list table`, as it stands in the server namespace."""
    try:
        done = subprocess.run(
            server.command(["nft", "-j", "list", "table", "inet", table]), capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise UnavailableError("the program `nsenter` is missing: install util-linux") from None
    if done.returncode:
        raise UnavailableError(f"nft -j list table inet {table}: {done.stderr.strip()}")
    listing: dict[str, Any] = json.loads(done.stdout)
    return listing


_LEVEL_SET = re.compile(r"^mx_block_(?:v4_)?(\d+)$")
"""A set of blocks at one prefix length, to which its addresses are masked (edge.kernel.nft_sets)."""


def nft_blocks(listing: dict[str, Any]) -> set[Net]:
    """The prefixes blocked on port 25 in a listing. Learned blocks lie at the levels, so only those sets are read."""
    found: set[Net] = set()
    for item in listing["nftables"]:
        match = _LEVEL_SET.match(item["set"]["name"]) if "set" in item else None
        if match is None:
            continue
        for element in item["set"].get("elem", []):
            address = element if isinstance(element, str) else element["elem"]["val"]
            found.add(ip_network(f"{address}/{match[1]}"))
    return found
