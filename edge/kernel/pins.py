"""Where the kernel objects are pinned, and whether what is there may be adopted.

    <pins>/maps/<name>          every map of bpf/maps.h
    <pins>/xdp, <pins>/sockops  the programs
    <pins>/xdp_link_<ifindex>   the attachment to one interface (names may hold dots, which bpffs refuses)
    <pins>/sockops_link         the attachment to the cgroup

Invariants:
    one-daemon: a directory of pins has at most one daemon; the lock goes with the process, however it ends.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge.errors import UnavailableError
from edge.kernel import libbpf, program
from edge.kernel.libbpf import BpfError, Fd, Map
from edge.kernel.program import Sizes


@dataclass(frozen=True, slots=True)
class Pins:
    """One directory of pins."""

    root: Path

    @property
    def maps(self) -> Path:
        """Directory of the maps."""
        return self.root / "maps"

    def program(self, name: str) -> Path:
        """Pin of a program: "xdp" or "sockops"."""
        return self.root / name

    def xdp_link(self, ifindex: int) -> Path:
        """Pin of the attachment to an interface."""
        return self.root / f"xdp_link_{ifindex}"

    @property
    def sockops_link(self) -> Path:
        """Pin of the attachment to the cgroup."""
        return self.root / "sockops_link"

    def xdp_links(self) -> dict[int, Path]:
        """Pinned attachments by interface index."""
        return {int(path.name.rpartition("_")[2]): path for path in self.root.glob("xdp_link_*[0-9]")}

    def open_map(self, name: str) -> Map:
        """Open one pinned map; UnavailableError when it is not there or has another shape."""
        key, value = program.MAPS[name]
        return Map(libbpf.get(self.maps / name), key, value)

    def identity(self) -> np.ndarray | None:
        """abi.IDENTITY of what is pinned; None when nothing usable is."""
        try:
            return self.open_map("identity").get(np.zeros(1, program.U32))
        except (BpfError, UnavailableError):
            return None

    def layout_matches(self, sizes: Sizes) -> bool:
        """Whether the pinned maps are those of this version and these sizes.

        The kernel does not check what it adopts: a map of another value size would be taken silently.
        """
        made = self.identity()
        return made is not None and int(made["abi_id"]) == program.layout_id(sizes)

    def build_matches(self, sizes: Sizes) -> bool:
        """Whether the pinned programs are the ones this version would load."""
        made = self.identity()
        return (
            self.layout_matches(sizes)
            and made is not None
            and int(made["build_id"]) == program.build_id(sizes)
            and all(self.program(name).exists() for name in ("xdp", "sockops"))
        )

    def lock(self) -> Fd:
        """Hold these pins as the one daemon until the descriptor is closed; UnavailableError names the other."""
        try:
            directory = Fd(os.open(self.root, os.O_RDONLY | os.O_DIRECTORY))
        except OSError as error:
            raise UnavailableError(
                f"{self.root}: expected pins this user may open, found: {error.strerror}: run `edge load` as"
                " root first, with --user when the daemon is to run as another user"
            ) from error
        try:
            fcntl.flock(directory.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _lock_holder(os.fstat(directory.number))
            raise UnavailableError(
                f"{self.root} is in use by another daemon ({holder}): stop that one first, or give this one its own"
                " [paths] pins"
            ) from None
        return directory


def _lock_holder(directory: os.stat_result) -> str:
    """Who holds the lock on a directory, from /proc/locks: "process 123: edge run"."""
    wanted = f"{os.major(directory.st_dev):02x}:{os.minor(directory.st_dev):02x}:{directory.st_ino}"
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5] == wanted:
            return _process(fields[4])
    return "its process cannot be seen from here"


def _process(pid: str) -> str:
    try:
        command = Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return f"process {pid}"
    return f"process {pid}: {command[:120]}"
