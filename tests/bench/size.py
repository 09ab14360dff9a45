"""How heavy the programs are: instructions, verified instructions, stack, map memory, and the recorded baseline.

These numbers do not depend on load: the same text gives the same numbers with the same compiler and kernel.
"""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path

import msgspec
import numpy as np

from edge.config import Config
from edge.kernel import libbpf
from edge.kernel.compile import Compiled, compile_programs
from edge.kernel.libbpf import Map
from edge.kernel.loader import sizes

BASELINE = Path(__file__).with_name("baseline.json")
GROWTH = 1.10
"""By how much a watched number may exceed its recorded one."""

WATCHED = ("verified_instructions", "xlated_bytes")

INSTRUCTION = np.dtype([("code", "u1"), ("registers", "u1"), ("offset", "<i2"), ("immediate", "<i4")])
"""struct bpf_insn."""

FRAME_POINTER = 10
MOVE, ADD = 0xBF, 0x07  # BPF_ALU64 | BPF_MOV | BPF_X, BPF_ALU64 | BPF_ADD | BPF_K
LOAD, STORE_IMMEDIATE, STORE = 1, 2, 3  # BPF_LDX, BPF_ST, BPF_STX


class ProgramSize(msgspec.Struct, frozen=True, kw_only=True):
    """One program as the kernel holds it."""

    verified_instructions: int  # walked by the verifier on all ways together; its limit is a million
    xlated_bytes: int
    jited_bytes: int
    stack_bytes: int  # of 512; 0 where the kernel does not show the instructions


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """All of it, with the default table sizes."""

    kernel: str
    bcc: str
    machine: str
    programs: dict[str, ProgramSize]
    map_bytes: dict[str, int]


def measure() -> Size:
    """Compile the programs as the loader does and ask the kernel about them."""
    import bcc

    loaded: Compiled = compile_programs(sizes(Config()), pins=None)
    return Size(
        kernel=platform.release(),
        bcc=str(bcc.__version__),
        machine=platform.machine(),
        programs={name: _program(fd) for name, fd in loaded.programs.items()},
        map_bytes={name: _memory(table) for name, table in sorted(loaded.maps.items())},
    )


def baseline() -> Size:
    """What was recorded."""
    return msgspec.json.decode(BASELINE.read_bytes(), type=Size)


def record(size: Size) -> None:
    """Make this the baseline."""
    BASELINE.write_text(json.dumps(msgspec.to_builtins(size), indent=2) + "\n")


def growth(found: Size, recorded: Size) -> list[str]:
    """What has grown too much, in words."""
    problems = []
    for name, before in recorded.programs.items():
        now = found.programs.get(name)
        if now is None:
            problems.append(f"{name}: recorded, but not loaded")
            continue
        for what in WATCHED:
            old, new = int(getattr(before, what)), int(getattr(now, what))
            if new > old * GROWTH:
                problems.append(
                    f"{name}: {what} grew from {old} (recorded with kernel {recorded.kernel}, bcc {recorded.bcc})"
                    f" to {new} (kernel {found.kernel}, bcc {found.bcc}), more than {GROWTH - 1:.0%}:"
                    " if it is worth it, record it with `make bench ARGS=--record`"
                )
    return problems


def _program(fd: int) -> ProgramSize:
    info = libbpf._ProgInfo()
    libbpf._info("a program", fd, info)
    return ProgramSize(
        verified_instructions=info.verified_insns,
        xlated_bytes=info.xlated_len,
        jited_bytes=info.jited_len,
        stack_bytes=_stack(fd, info.xlated_len),
    )


def _stack(fd: int, length: int) -> int:
    """The deepest byte below the frame pointer that an instruction names: the programs have no calls of their own."""
    code = np.zeros(length // INSTRUCTION.itemsize, INSTRUCTION)
    info = libbpf._ProgInfo()
    info.xlated_len = length
    info.pointers[1] = code.ctypes.data  # jited_prog_insns, xlated_prog_insns
    libbpf._info("a program", fd, info)
    destination, source = code["registers"] & 15, code["registers"] >> 4
    kind = code["code"] & 7
    based = ((kind == LOAD) & (source == FRAME_POINTER)) | (
        ((kind == STORE) | (kind == STORE_IMMEDIATE)) & (destination == FRAME_POINTER)
    )
    copied = (code["code"][:-1] == MOVE) & (source[:-1] == FRAME_POINTER)
    moved = copied & (code["code"][1:] == ADD) & (destination[1:] == destination[:-1])
    return -min(
        int(code["offset"][based].min(initial=0)),
        int(code["immediate"][1:][moved].min(initial=0)),
    )


def _memory(table: Map) -> int:
    """Bytes of kernel memory, as the kernel accounts for them."""
    text = Path(f"/proc/self/fdinfo/{table.fd.number}").read_text()
    found = re.search(r"^memlock:\s*(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0
