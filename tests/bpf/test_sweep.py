"""Ten million SYNs from random /64s: known senders lose nothing, newcomers get in, and memory stays what it is."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edge.abi import Level, Reason, Service
from edge.config import Config
from edge.core.prefix import Prefix
from edge.kernel import libbpf, program
from edge.kernel.loader import sizes
from tests import packets as p
from tests.bench import packets
from tests.bench.limiter import RANDOM, Limiter

pytestmark = pytest.mark.root

SYNS = 10_000_019
TURNS = 23
KNOWN = [Prefix(0x2001_0DB8_0000_0001 | n << 16, 0x25, 128) for n in range(1, 102)]
CONNECTIONS = 5
"""Of each known sender a turn: its arrival time lies half a second ahead then, and its row is live."""

XDP_PASS = 2


def source(prefix: Prefix) -> str:
    return str(prefix.network.network_address)


def memory() -> dict[str, int]:
    """Bytes of every map this process holds, as the kernel accounts them."""
    found: dict[str, int] = {}
    for path in Path("/proc/self/fdinfo").iterdir():
        try:
            fields = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        except OSError:  # the directory's own descriptor is gone again
            continue
        if "map_id" in fields:
            found[fields["map_id"].strip()] = int(fields["memlock"])
    return found


def test_ten_million_syns_from_random_prefixes() -> None:
    config = Config(mode="enforce")
    limiter = Limiter(program.text(), sizes(config))
    judge = limiter.programs["edge_xdp"]
    limiter.steer(RANDOM, spread=True)
    before, newcomers = memory(), 0
    for turn in range(TURNS):
        for sender in KNOWN:
            for n in range(CONNECTIONS):
                frame = p.syn(source(sender), sport=1024 + n)
                assert libbpf.run_packet(judge, frame)[0] == XDP_PASS, f"turn {turn}: {sender} was refused"
        held = {sender: limiter.tables.rows.tat_ns(sender.parent(64), Service.MX) for sender in KNOWN}
        assert None not in held.values(), f"turn {turn}: a known sender had no row"
        libbpf.run_packet(limiter.programs["bench_limiter"], packets.SYN, repeat=SYNS // TURNS + 1)
        now_ns = time.monotonic_ns()
        for sender, tat_ns in held.items():
            assert tat_ns is not None
            if tat_ns > now_ns:  # it had no time to become free by itself
                assert limiter.tables.rows.tat_ns(sender.parent(64), Service.MX) == tat_ns
        for _ in range(11):
            newcomers += 1
            frame = p.syn(source(Prefix(0x2001_0DB9_0000_0000 | newcomers << 16, 1, 128)))
            assert libbpf.run_packet(judge, frame)[0] == XDP_PASS, f"turn {turn}: a newcomer was refused"
    counted = limiter.counts()
    assert sum(counted.values()) >= SYNS + TURNS * len(KNOWN) * CONNECTIONS + newcomers
    refused = {name for name in counted if Reason[name.upper()] >= Reason.BLOCKED_LEARNED}
    # 65,536 /32s share the sweep: what their own limit refuses is theirs
    assert refused <= {"limit_32", "limit_48", "limit_56", "limit_64"}
    assert memory() == before
    assert limiter.tables.rows.read(time.monotonic_ns())[0][Level.L64] <= config.tables.rows_64
