"""Compile and verify the programs with bcc. The only module that imports bcc, and only inside a function.

bcc brings LLVM (a hundred megabytes), and LLVM ends the whole process on some errors: so this runs in the loader, in
tests and in `edge packets`, never in the daemon.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from edge.errors import EdgeError, UnavailableError
from edge.kernel import libbpf, program
from edge.kernel.libbpf import BpfError, Fd, Map
from edge.kernel.program import Sizes

XDP, SOCK_OPS = 6, 13  # enum bpf_prog_type: uapi/linux/bpf.h

VERIFIER_LOG_BYTES = 1 << 24
"""Asked for only after a refusal; a kernel before 6.4 gives up when its words do not fit."""


class LayoutError(EdgeError):
    """bcc's compiler laid a struct out differently from edge/abi.py: a defect, never to be run."""


class Compiled:
    """The loaded programs and their maps. Keep it while its file descriptors are in use."""

    def __init__(self, bpf: Any, entry_points: dict[str, int]) -> None:
        self._bpf = bpf
        self._loaded = {name: _load(kind, name, bpf.dump_func(name.encode())) for name, kind in entry_points.items()}
        self.programs = {name: fd.number for name, fd in self._loaded.items()}
        self.maps = {name: self._map(name) for name in program.MAPS}

    def _map(self, name: str) -> Map:
        key, value = program.MAPS[name]
        table = self._bpf[name.encode()]
        for what, expected, found in (("key", key, table.Key), ("value", value, getattr(table, "sLeaf", table.Leaf))):
            _compare_layout(f"{what} of map {name}", expected, found)
        return Map(Fd(os.dup(table.map_fd)), key, value)


def compile_programs(sizes: Sizes, *, pins: Path | None, recorded: bool = False) -> Compiled:
    """Compile, verify and load. `pins`: directory whose maps are adopted or created; None: private maps.

    `recorded` loads the entry point for recorded packets instead of the live ones. UnavailableError with the
    compiler's or the verifier's words when the kernel will not have it.
    """
    # bcc asks for a kernel source tree; ours holds the dozen lines it needs, so that none has to be installed
    os.environ["BCC_KERNEL_SOURCE"] = str(program.directory() / "headers")
    try:
        from bcc import BPF
    except ImportError:
        raise UnavailableError(
            "bcc was not found: install python3-bpfcc (Debian, Ubuntu) or python3-bcc (RHEL family),"
            " and let the virtual environment see system packages"
        ) from None
    # bcc's own headers define again what ours define; the values are the same
    options = ["-Wno-macro-redefined", *program.flags(sizes)]
    if recorded:
        options.append("-DEDGE_RECORDED")  # leaves the live program out: each takes a third of the time
    if pins is not None:
        options.append(f'-DEDGE_PINS="{pins}"')
    try:
        bpf = BPF(text=program.text().encode(), cflags=options)
    except Exception as error:  # bcc raises bare Exceptions; its own words went to standard error
        raise UnavailableError(f"the kernel programs do not compile: {error}") from error
    entry_points = {"edge_xdp_recorded": XDP} if recorded else {"edge_xdp": XDP, "edge_sockops": SOCK_OPS}
    try:
        return Compiled(bpf, entry_points)
    except BpfError as error:
        raise UnavailableError(f"the kernel refused a program (kernel 5.15 or later is needed): {error}") from error
    except EdgeError:
        raise
    except Exception as error:
        raise UnavailableError(f"bcc gave no program or map: {error}") from error


def _load(kind: int, name: str, instructions: bytes) -> Fd:
    """Load what bcc compiled; bcc's own call takes no flags.

    XDP programs say that they know frames in several pieces, where the kernel knows such programs (5.18): drivers then
    take them natively whatever the MTU is. Ours reads headers only, and these are in the first piece.
    """
    if kind == XDP:
        with contextlib.suppress(BpfError):  # an older kernel does not know the flag; any other trouble is met below
            return libbpf.load_program(kind, name, instructions, flags=libbpf.XDP_HAS_FRAGS)
    try:
        return libbpf.load_program(kind, name, instructions)
    except BpfError:
        return libbpf.load_program(kind, name, instructions, log_bytes=VERIFIER_LOG_BYTES)


def write_identity(maps: dict[str, Map], sizes: Sizes, now_ns: int, *, complete: bool = True) -> None:
    """Fill map `identity`: whose maps these are, and the secrets: the seed of the row index and the key of
    the challenge.

    The seed of adopted maps stays: rows are found by it. `complete` also names the build, which says that its programs
    are pinned and attached: to be written last.
    """
    table = maps["identity"]
    zero = np.zeros(1, program.U32)
    found = table.get(zero)
    record = np.zeros((), table.value) if found is None else found.copy()
    if not record["seed"]:
        record["seed"] = int.from_bytes(os.urandom(8), "little") | 1
        record["created_ns"] = now_ns
    if not record["cookie_key"].any():
        record["cookie_key"] = np.frombuffer(os.urandom(16), np.uint64)
    record["abi_id"] = program.layout_id(sizes)
    record["build_id"] = program.build_id(sizes) if complete else 0
    table.put(zero, record)


def _compare_layout(what: str, expected: np.dtype, found: Any) -> None:
    """bcc's ctypes against our dtype: names, offsets and sizes."""
    theirs = np.dtype(found)
    if expected.names is None:
        same = theirs.itemsize == expected.itemsize
    else:
        same = theirs.itemsize == expected.itemsize and _fields(theirs) == _fields(expected)
    if not same:
        raise LayoutError(f"{what}: expected {_fields(expected)}, found {_fields(theirs)}: run `make abi`")


def _fields(kind: np.dtype) -> list[tuple[str, int, int]]:
    if kind.names is None or kind.fields is None:
        return [("", 0, kind.itemsize)]
    return [(name, kind.fields[name][1], kind.fields[name][0].itemsize) for name in kind.names]
