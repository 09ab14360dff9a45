"""The text of the kernel programs and the constants it is compiled with.

Nothing here needs bcc: the daemon computes the same build id as the loader and so knows, without compiling, whether
what is pinned is what it would load.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge import abi
from edge.abi import Level
from edge.core.prefix import LENGTHS

FILES = (
    *("base.h", "abi.h", "prefix.h", "gcra.h", "rows.h", "tally.h", "sketch.h", "parse.h", "challenge.h"),
    *("regions.h", "maps.h", "edge_challenge.c", "edge_xdp.c", "edge_sockops.c"),
)
"""In the order of the flow; bcc rewrites map accesses only in the main file, so they become one text."""

U32 = np.dtype("<u4")
TALLIES_SHARE = {Level.L128: 2, Level.L64: 1, Level.L56: 2, Level.L48: 4, Level.L32: 16}
"""What part of the tallies of /64s another level has: of the /64s that send mail few share a shorter prefix."""

FILTER_BITS = 1 << 18
"""Bits of the policy filter a level: 32 KiB, so that all five stay in the cache; 50,000 entries fill 17 %."""

CROWDED_SLOTS = 4096
"""Counters of crowded prefixes a level: 16 KiB; a hundred crowded prefixes make 2 % of the others look twice."""

MAPS: dict[str, tuple[np.dtype, np.dtype]] = {
    "identity": (U32, abi.IDENTITY),
    "control": (U32, abi.CONTROL),
    "limits": (U32, abi.LIMIT),
    "services": (U32, np.dtype("u1")),
    "destinations": (abi.ADDRESS, np.dtype("u1")),
    "policy": (abi.POLICY_KEY, abi.POLICY_ENTRY),
    "policy_lines": (U32, abi.POLICY_LINE),
    "policy_filter": (U32, np.dtype("<u8")),
    "policy_ranges": (abi.RANGE_KEY, abi.POLICY_ENTRY),
    "rows": (U32, abi.LINE),
    "untracked": (U32, np.dtype("<u8")),
    "counters": (U32, abi.COUNTER),
    "connections": (U32, abi.TALLY),
    "crowded_levels": (U32, abi.CROWDED_LEVELS),
    "crowded": (U32, np.dtype("<u4")),
    "corrections": (abi.POLICY_KEY, np.dtype("<i8")),
    "uncounted": (U32, np.dtype("<u8")),
    "forged": (abi.POLICY_KEY, np.dtype("<u8")),
    "verdicts": (U32, abi.VERDICT),
}
"""Key and value of every map user space opens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large the tables are. `rows` is by level, longest first, each a power of two of at least 4096; `connections`
    counts the tallies of /64s, a power of two of at least 1024, from which the other levels' follow."""

    rows: tuple[int, ...]
    policy_entries: int = 262_144
    policy_ranges: int = 65_536
    connections: int = 1 << 17

    def lines(self, level: Level) -> int:
        """Cache lines of a level."""
        return self.rows[level] // abi.ROWS_PER_LINE

    def base(self, level: Level) -> int:
        """First line of a level's region in the map `rows`."""
        return sum(self.lines(shorter) for shorter in Level if shorter < level)

    @property
    def all_lines(self) -> int:
        """Lines of all levels together."""
        return sum(self.rows) // abi.ROWS_PER_LINE

    @property
    def policy_lines(self) -> int:
        """Cache lines of policy entries, a power of two: with every entry there is, four in five find a place there."""
        return max(1 << abi.POLICY_TAG_BITS, 1 << (self.policy_entries - 1).bit_length() - 2)

    def sets(self, level: Level) -> int:
        """Sets of a level in the map `connections`."""
        return self.connections // TALLIES_SHARE[level] // abi.TALLIES_PER_SET

    def set_base(self, level: Level) -> int:
        """First set of a level's region in the map `connections`."""
        return sum(self.sets(shorter) for shorter in Level if shorter < level)

    @property
    def all_sets(self) -> int:
        """Sets of all levels together."""
        return sum(self.sets(level) for level in Level)


def directory() -> Path:
    """Where the sources are: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_bpf"
    return installed if installed.is_dir() else package.parent / "bpf"


def text() -> str:
    """The program as one text; compiler messages name the file and line they come from."""
    return "".join(_numbered(name) for name in FILES)


def _numbered(name: str) -> str:
    source = (directory() / name).read_text(encoding="utf-8")
    return f'#line 1 "{name}"\n' + re.sub(r'^#include ".*"$', "", source, flags=re.MULTILINE) + "\n"


def flags(sizes: Sizes) -> list[str]:
    """Compiler flags that carry the sizes."""
    return [f"-D{name}={value}" for name, value in _constants(sizes)]


def _constants(sizes: Sizes) -> Iterator[tuple[str, int]]:
    yield "EDGE_LINES", sizes.all_lines
    yield "EDGE_POLICY_ENTRIES", sizes.policy_entries
    yield "EDGE_POLICY_LINES", sizes.policy_lines
    yield "EDGE_POLICY_RANGES", sizes.policy_ranges
    yield "EDGE_SETS", sizes.all_sets
    yield "EDGE_FILTER_BITS", FILTER_BITS
    yield "CROWDED_SLOTS", CROWDED_SLOTS
    for level in Level:
        yield f"EDGE_LINES_{LENGTHS[level]}", sizes.lines(level)
        yield f"EDGE_BASE_{LENGTHS[level]}", sizes.base(level)
        yield f"EDGE_SETS_{LENGTHS[level]}", sizes.sets(level)
        yield f"EDGE_SET_BASE_{LENGTHS[level]}", sizes.set_base(level)


def layout_id(sizes: Sizes) -> int:
    """64-bit hash of what the maps look like: equal means that maps may be adopted."""
    return _hash(f"{abi.ABI_ID} {flags(sizes)} {(directory() / 'maps.h').read_text(encoding='utf-8')}")


def build_id(sizes: Sizes) -> int:
    """64-bit hash of program and sizes: equal means that the pinned programs are these."""
    return _hash(f"{abi.ABI_ID} {flags(sizes)} {text()}")


def _hash(what: str) -> int:
    return int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "little")
