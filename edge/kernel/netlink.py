"""What the kernel's routing netlink says of links, addresses and default routes, asked through pyroute2.

The answers are those of the network namespace the calling thread is in. Not to be called on a thread whose asyncio loop
runs: pyroute2 runs a loop of its own meanwhile.

Invariants:
    answers-are-whole: an answer during which the configuration changed is asked for again, never used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from socket import AF_INET, AF_INET6
from typing import Any, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink import NLM_F_DUMP_INTR
from pyroute2.netlink.exceptions import NetlinkDecodeError, NetlinkDumpInterrupted, NetlinkError

from edge.errors import UnavailableError

T = TypeVar("T")

ETHERNET = 1  # ARPHRD_ETHER: linux/if_arp.h
MAIN_TABLE, UNICAST = 254, 1  # RT_TABLE_MAIN, RTN_UNICAST: linux/rtnetlink.h

ATTEMPTS = 5
"""Dumps of a configuration that goes on changing; the daemon asks again two seconds later anyway."""


class NoAnswerError(UnavailableError):
    """The kernel gave no whole answer this time; the next time may be better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One network device of this namespace. `kind` is rtnetlink's word for it ("vlan", "bond", ...), empty for a
    device that only has a driver; `lower` the index of the device it stands on, `master` of the one it is part of
    (0: none, or in another namespace); `mtu` in bytes; `ethernet`: whether its frames begin with an Ethernet header.
    """

    index: int
    name: str
    kind: str = ""
    lower: int = 0
    master: int = 0
    mtu: int = 1500
    ethernet: bool = True


def links() -> list[Link]:
    """Every device; NoAnswerError when the kernel does not answer, here and below."""
    return ask("links", lambda kernel: [_link(one) for one in whole(kernel.get_links())])


def addresses() -> list[tuple[int, IPv4Interface | IPv6Interface]]:
    """(interface index, network it is connected to) for every address; on a point-to-point link the peer's."""

    def question(kernel: IPRoute) -> list[tuple[int, IPv4Interface | IPv6Interface]]:
        # IFA_ADDRESS is the peer on a point-to-point link, and the address itself everywhere else
        return [
            (one["index"], ip_interface(f"{one.get_attr('IFA_ADDRESS')}/{one['prefixlen']}"))
            for one in whole(kernel.get_addr())
            if one["family"] in (AF_INET, AF_INET6) and one.get_attr("IFA_ADDRESS")
        ]

    return ask("addresses", question)


def default_routes() -> set[int]:
    """Indices of the interfaces that carry a default route of the main table, IPv6 or IPv4, several for multipath.

    Every route of the host is read for it, some 0.1 ms each (pyroute2's own get_default_routes() of 0.9.7 ends at the
    first part of an answer that holds none).
    """

    def question(kernel: IPRoute) -> set[int]:
        return {
            index
            for family in (AF_INET6, AF_INET)
            for one in whole(kernel.get_routes(family=family))
            if (one["dst_len"], one["table"], one["type"]) == (0, MAIN_TABLE, UNICAST)
            for index in _outgoing(one)
        }

    return ask("routes", question)


def whole(messages: Iterable[Any]) -> Iterator[Any]:
    """The messages of a dump; NetlinkDumpInterrupted once the kernel says that something changed meanwhile.

    pyroute2 0.7 raises it by itself, 0.9 does not look.
    """
    for message in messages:
        if message["header"]["flags"] & NLM_F_DUMP_INTR:
            raise NetlinkDumpInterrupted
        yield message


def ask(what: str, question: Callable[[IPRoute], T]) -> T:
    """The answer to a question; asked again when it raises NetlinkDumpInterrupted, ATTEMPTS times at most."""
    for _ in range(ATTEMPTS):
        try:
            with IPRoute() as kernel:
                return question(kernel)
        except NetlinkDumpInterrupted:
            continue
        except (NetlinkError, NetlinkDecodeError, OSError) as error:
            raise NoAnswerError(f"the kernel's list of {what}: expected an answer, found {error}") from error
    raise NoAnswerError(f"the kernel's list of {what}: it changed {ATTEMPTS} times while it was read")


def _link(message: Any) -> Link:
    elsewhere = message.get_attr("IFLA_LINK_NETNSID") is not None
    return Link(
        index=message["index"],
        name=os.fsdecode(message.get_attr("IFLA_IFNAME")),  # pyroute2 gives bytes where it is no UTF-8
        kind=message.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") or "",
        lower=0 if elsewhere else message.get_attr("IFLA_LINK") or 0,
        master=message.get_attr("IFLA_MASTER") or 0,
        mtu=message.get_attr("IFLA_MTU"),
        ethernet=message["ifi_type"] == ETHERNET,
    )


def _outgoing(route: Any) -> Iterator[int]:
    """Interface indices of one route."""
    if index := route.get_attr("RTA_OIF"):
        yield index
    for hop in route.get_attr("RTA_MULTIPATH") or ():
        yield hop["oif"]
