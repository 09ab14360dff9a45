"""The parser under the host compiler's sanitizers: no byte is read that is not there, and it decides as in the kernel.

The sanitizers end the process at the first fault, so they run in a child; its message is the test's.
"""

from __future__ import annotations

import ctypes as c
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from edge.abi import Reason
from edge.config import Config
from edge.kernel.program import directory
from edge.packets import WITHOUT_PORT, configured
from tests.bpf.frames import Frames
from tests.bpf.harness import Harness
from tests.bpf.test_packets import WAYS

PARSED_SYN = len(Reason)
MUTATIONS = 3_000_017
SAMPLE = 5003
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize=alignment", "-fno-sanitize-recover=all")
"""Alignment is not asked: an IP header lies at an odd multiple of 2 behind Ethernet's 14 bytes. The kernel's verifier
checks it for the machines that mind."""

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


class _Parsed(c.Structure):
    _fields_ = (
        ("source_hi", c.c_uint64),
        ("source_lo", c.c_uint64),
        ("outcome", c.c_uint32),
        ("ipv4", c.c_uint32),
        ("port", c.c_uint32),
        ("pad", c.c_uint32),
    )


class Parsed(NamedTuple):
    outcome: int
    port: int


class Parser:
    """The compiled library."""

    def __init__(self, path: Path) -> None:
        self._library = c.CDLL(str(path))
        self._library.parse_one.argtypes = [c.c_char_p, c.c_size_t, c.POINTER(_Parsed)]
        self._library.hammer.argtypes = [c.c_char_p, c.c_void_p, c.c_size_t, c.c_uint64, c.c_uint64, c.c_void_p]

    def parse(self, frame: bytes) -> Parsed:
        result = _Parsed()
        self._library.parse_one(frame, len(frame), c.byref(result))
        return Parsed(result.outcome, result.port)

    def hammer(self, frames: list[bytes], seed: int, count: int) -> Counter[str]:
        """Outcomes of `count` mutations of these frames."""
        lengths = np.array([len(frame) for frame in frames], np.uintp)
        counts = np.zeros(PARSED_SYN + 1, np.uint64)
        self._library.hammer(b"".join(frames), lengths.ctypes.data, len(frames), seed, count, counts.ctypes.data)
        names = [*(reason.name for reason in Reason), "SYN"]
        return Counter({name: int(n) for name, n in zip(names, counts, strict=True) if n})


def compiled(path: Path, *flags: str) -> Path:
    """bpf/parse.h as a shared library; every warning of it is an error."""
    warnings = ("-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-Wno-sign-compare", "-Wno-unknown-pragmas")
    sources = (str(HERE / "parse_host.c"), f"-I{directory()}")
    subprocess.run(["gcc", "-O2", "-g", "-shared", "-fPIC", *warnings, *flags, "-o", str(path), *sources], check=True)
    return path


def frames(seed: int, count: int) -> list[bytes]:
    made = Frames(seed)
    return [*(frame for frame, _ in WAYS.values()), *(made.frame() for _ in range(count))]


def test_no_byte_is_read_that_is_not_there(tmp_path: Path) -> None:
    library = compiled(tmp_path / "parse.so", *SANITIZERS)
    runtime = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True
    ).stdout.strip()
    seed = int.from_bytes(os.urandom(4), "little")
    done = subprocess.run(
        [sys.executable, "-m", "tests.bpf.test_parse_host", str(library), str(seed)],
        # the interpreter itself leaks by design, and dies of CPython's own allocator under the strict settings
        env={**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
    )
    print(f"seed {seed}\n{done.stdout}")
    assert done.returncode == 0, done.stderr[-4000:]
    outcomes = {reason.name for reason in WITHOUT_PORT} | {"SYN"}
    assert {line.split()[0] for line in done.stdout.splitlines()} == outcomes


@pytest.mark.root
def test_the_kernel_decides_as_the_host_does(xdp: Harness, tmp_path: Path) -> None:
    parser = Parser(compiled(tmp_path / "parse.so"))
    xdp.configure(configured(Config(), "all"))
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    made = Frames(seed)
    outcomes: Counter[int] = Counter()
    for frame in frames(seed, SAMPLE):
        frame = made.mutated(frame)
        here, there = parser.parse(frame), xdp.judge(frame)
        outcomes[here.outcome] += 1
        if here.outcome == PARSED_SYN:
            assert (there.syn, there.dport) == (True, here.port), frame.hex()
        else:
            assert there.reason == here.outcome, frame.hex()
    assert set(outcomes) == WITHOUT_PORT | {PARSED_SYN}


if __name__ == "__main__":
    for name, count in (
        Parser(Path(sys.argv[1])).hammer(frames(int(sys.argv[2]), 1009), int(sys.argv[2]), MUTATIONS).items()
    ):
        print(name, count)
