"""Parameters of the nftables sets; apart from them, so that reading the configuration needs no nftables library."""

from __future__ import annotations

from typing import Annotated

import msgspec


class NftParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The nftables table."""

    table: Annotated[
        str,
        msgspec.Meta(
            pattern="^[a-z][a-z0-9_]{0,30}$",
            description="Name of the table, in the family inet. It is the daemon's: what others put in is removed.",
        ),
    ] = "edge"
    priority: Annotated[
        int,
        msgspec.Meta(
            ge=-400,
            le=400,
            description="Priority of the chain at the hook prerouting. The default, raw, comes before connection "
            "tracking, so a refused connection costs no tracking entry, and covers containers and forwarded hosts.",
        ),
    ] = -300
    batch: Annotated[
        int,
        msgspec.Meta(
            gt=0,
            le=100_000,
            description="Elements in one transaction at most. The default takes about 60 ms and keeps the netlink "
            "message small enough for containers.",
        ),
    ] = 5000
    max_elements: Annotated[
        int,
        msgspec.Meta(
            gt=0,
            le=10_000_000,
            description="Elements in the table at which no further learned blocks are added; XDP still has them. "
            "An element takes up to 200 bytes of kernel memory.",
        ),
    ] = 500_000
