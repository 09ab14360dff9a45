"""What the daemon's memory grows with: the prefixes it tracks, and nothing else."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest

from tests.e2e.host import Host, host, wait

pytestmark = pytest.mark.root

MEGABYTE = 1 << 20
AT_REST_BYTES = 60 * MEGABYTE
BYTES_A_PREFIX = 200
SENDERS = 40_009


def anonymous_bytes(h: Host) -> int:
    """Memory that is the daemon's own; tables it maps are the kernel's, whoever looks at them."""
    assert h.daemon is not None
    # the process started is nsenter, which became the daemon
    status = Path(f"/proc/{h.daemon.pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split(maxsplit=1)[0]) * 1024


def tracked(h: Host) -> int:
    return sum(h.ask("status")["tracked"].values())


def test_memory_is_bounded_by_what_is_tracked(tmp_path: Path) -> None:
    with host(tmp_path) as h:
        h.start()
        at_rest = anonymous_bytes(h)
        assert at_rest < AT_REST_BYTES
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as events:
            events.connect(str(tmp_path / "events.sock"))
            for n in range(SENDERS):
                # each in a /48 of its own: every level but /32 has a row for it
                line = {
                    "ts": time.time(),
                    "src": f"2001:db8:{n & 0xFFFF:x}:{n % 7:x}::{n:x}",
                    "dport": 25,
                    "handshake": True,
                    "mta": {"verdict": "ham", "rcpt_ok": 1, "rcpt_bad": 0},
                }
                events.sendall(json.dumps(line).encode() + b"\n")
            wait(lambda: tracked(h) >= 4 * SENDERS, "all tracked", 60)
        grown = anonymous_bytes(h)
        print("at rest", at_rest // MEGABYTE, "MB, then", grown // MEGABYTE, "MB with", tracked(h), "prefixes")
        assert grown < AT_REST_BYTES + BYTES_A_PREFIX * tracked(h)
