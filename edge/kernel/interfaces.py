"""Network interfaces: which to attach to, and what is known of them."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Any

from pyroute2 import IPRoute

from edge.errors import UnavailableError

AUTO = "auto"


def resolve(names: Sequence[str]) -> dict[str, int]:
    """Interface indices by name; "auto" stands for every interface that carries a default route.

    UnavailableError names the interface that is not there, or says that no default route was found.
    """
    found: dict[str, int] = {}
    for name in names:
        if name == AUTO:
            found |= _default_routes()
            continue
        try:
            found[name] = socket.if_nametoindex(name)
        except OSError:
            present = ", ".join(other for _, other in socket.if_nameindex())
            raise UnavailableError(f"interface {name!r}: expected one of {present}; found no such interface") from None
    if not found:
        raise UnavailableError(
            "no interface carries a default route: name the ones that mail comes in by in [interfaces] names"
        )
    return found


def _default_routes() -> dict[str, int]:
    names = dict(socket.if_nameindex())
    found: dict[str, int] = {}
    with IPRoute() as route:
        for family in (socket.AF_INET6, socket.AF_INET):
            for row in route.get_default_routes(family=family):
                for index in _outgoing(row):
                    if names.get(index, "lo") != "lo":
                        found[names[index]] = index
    return found


def _outgoing(row: Mapping[str, Any]) -> list[int]:
    """Interface indices of one route, several for a multipath route."""
    attributes = dict(row["attrs"])
    indices = [attributes["RTA_OIF"]] if "RTA_OIF" in attributes else []
    return indices + [int(hop["oif"]) for hop in attributes.get("RTA_MULTIPATH", [])]
