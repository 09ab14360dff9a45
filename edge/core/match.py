"""Longest match over entries, as the kernel does it: for answers to people and for the replay.

Invariants:
    same-as-kernel: for the same entries, bpf/edge_xdp.c's match_policy decides the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge.abi import Service, Standing
from edge.core.guard import Guard
from edge.core.model import Entry
from edge.core.prefix import IPV4_SHIFT, Prefix, is_ipv4

Entries = Mapping[tuple[Service, Prefix], Entry]

IPV4_PRIVATE = tuple(Prefix.parse(text) for text in ("0.0.0.0/8", "10.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16"))
IPV4_PRIVATE += tuple(Prefix.parse(text) for text in ("172.16.0.0/12", "192.168.0.0/16"))
IPV6_PRIVATE = tuple(Prefix.parse(text) for text in ("::/127", "fe80::/10", "fc00::/7"))
"""Who is never limited or scored with `exempt.private`; bpf/prefix.h has the same. RFC 1122, 1918, 3927, 4193, 4291."""


def is_private(prefix: Prefix) -> bool:
    """Whether the prefix lies inside a private or local range."""
    return any(range_.contains(prefix) for range_ in (IPV4_PRIVATE if prefix.ipv4 else IPV6_PRIVATE))


def matches(entries: Entries, service: Service, prefix: Prefix) -> list[Entry]:
    """The entries that hold this prefix, longest first."""
    shortest = IPV4_SHIFT if is_ipv4(prefix.hi) else 0
    found = (entries.get((service, prefix.parent(length))) for length in range(prefix.length, shortest - 1, -1))
    return [entry for entry in found if entry is not None]


def longest(entries: Entries, service: Service, prefix: Prefix) -> Entry | None:
    """The entry that decides about this prefix; None: only the static limits do."""
    return next(iter(matches(entries, service, prefix)), None)


def refuses(entry: Entry | None) -> bool:
    """Whether this longest match refuses."""
    return entry is not None and entry.standing is Standing.BLOCK


def scorable(events: np.ndarray, guard: Guard, *, exempt_private: bool) -> np.ndarray:
    """The EVENT rows whose source may be scored: neither private (when exempt) nor inside a fixed allow.

    An exempt client counts towards nothing, so its neighbours do not inherit its volume.
    """
    keep = np.ones(len(events), bool)
    for row, event in enumerate(events):
        source = Prefix.of(int(event["hi"]), int(event["lo"]), 128)
        exempt = exempt_private and is_private(source)
        keep[row] = not exempt and not guard.allowed(Service(int(event["service"])), source)
    return events[keep]
