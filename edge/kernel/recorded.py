"""Recorded packets through a private copy of the program and its maps, by the recording's clock.

Nothing here opens a pin: what runs on the host's interfaces is neither asked nor changed.

Invariants:
    live-maps-stay-untouched: the copy's maps are its own.
    clock-is-given: the time of a decision is the caller's, never the kernel's.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge.abi import VERDICT, Reason, Service
from edge.errors import EdgeError, UnavailableError
from edge.kernel import libbpf
from edge.kernel.compile import Compiled, compile_programs, write_identity
from edge.kernel.maps import ZERO, Tables
from edge.kernel.program import Sizes

XDP_DROP, XDP_PASS = 1, 2  # uapi/linux/bpf.h

SHORTEST = 14
"""Bytes of an Ethernet header: BPF_PROG_TEST_RUN refuses a shorter frame (net/bpf/test_run.c)."""

LONGEST = mmap.PAGESIZE - 1024
"""Bytes run of one frame. The kernel puts a frame into one page, with 256 bytes of headroom before it and a struct
skb_shared_info (320 bytes, more with larger cache lines) behind it."""

UNTOUCHED = 0xFFFFFFFF
"""Stands as the reason in the per-CPU verdicts of the CPUs that did not run the packet."""

SYS_ADMIN, NET_ADMIN, PERFMON, BPF = 1 << 21, 1 << 12, 1 << 38, 1 << 39  # uapi/linux/capability.h


@dataclass(frozen=True, slots=True)
class Judged:
    """What the program decided of one packet. Without a SYN all but `dropped` and `reason` is 0."""

    dropped: bool
    reason: Reason
    length: int
    hi: int
    lo: int
    service: Service
    syn: bool
    dport: int


class Recorded:
    """One loaded private copy; its tables are empty and have no settings until they are configured."""

    def __init__(self, sizes: Sizes) -> None:
        """Compile and load. UnavailableError without root's rights, bcc, or a kernel that takes the program."""
        _check_rights()
        self.compiled: Compiled = compile_programs(sizes, pins=None, recorded=True)
        write_identity(self.compiled.maps, sizes, 1)
        self.tables = Tables(self.compiled.maps, sizes)
        self._program = self.compiled.programs["edge_xdp_recorded"]
        self._verdicts = self.compiled.maps["verdicts"]
        self._given = np.zeros(self._verdicts.copies, VERDICT)
        self._given["reason"] = UNTOUCHED

    def judge(self, frame: bytes, now_ns: int) -> Judged:
        """Run one frame at a time in ns (0 to 2^63 - 1) and say what became of it.

        Of a frame of more than LONGEST bytes the first are run: headers decide, and they come first. One of fewer than
        SHORTEST bytes cannot be run; it passes as truncated, as it would.
        """
        if len(frame) < SHORTEST:
            return Judged(False, Reason.TRUNCATED, 0, 0, 0, Service.MX, False, 0)
        self._given["now_ns"] = now_ns
        self._verdicts.put(ZERO, self._given)
        action, _ = libbpf.run_packet(self._program, frame[:LONGEST])
        row = self._row()
        if action != (XDP_DROP if row["drop"] else XDP_PASS):
            raise EdgeError(f"a recorded packet: expected the action of verdict {row}, found action {action}")
        return Judged(
            dropped=bool(row["drop"]),
            reason=Reason(int(row["reason"])),
            length=int(row["length"]),
            hi=int(row["hi"]),
            lo=int(row["lo"]),
            service=Service(int(row["service"])),
            syn=bool(row["syn"]),
            dport=int(row["dport"]),
        )

    def _row(self) -> np.ndarray:
        """The verdict of the CPU that ran the packet: the one that changed."""
        found = self._verdicts.get(ZERO)
        if found is None:
            raise EdgeError("map verdicts: expected its one row, found none")
        rows = found.reshape(-1)
        changed = np.flatnonzero(rows["reason"] != UNTOUCHED)
        if len(changed) != 1:
            raise EdgeError(f"a recorded packet: expected the verdict of one CPU, found {len(changed)}")
        row: np.ndarray = rows[changed[0]]
        return row


def _check_rights() -> None:
    """UnavailableError unless this process may load programs; the kernel's own words would not say why."""
    status = Path("/proc/self/status").read_text()
    effective = int(status.partition("CapEff:")[2].split(maxsplit=1)[0], 16)
    needed = BPF | NET_ADMIN | PERFMON
    if not effective & SYS_ADMIN and effective & needed != needed:
        raise UnavailableError(
            "loading a copy of the kernel program needs root, or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
        )
