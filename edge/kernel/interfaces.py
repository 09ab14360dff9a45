"""Network interfaces: which devices the program belongs on for the interfaces that are configured.

A frame meets XDP once, in the driver of the device it arrives at. So a program for a device that stands on others goes
to those below it, which works in every mode and on every kernel, and natively:

* VLAN, macvlan, macvtap, ipvlan, ipvtap: the device they stand on. The kernel has no native XDP for them. A parent in
  another namespace is out of reach: the device itself, generically.
* Bond, team, VRF: their members. A bond can carry a program itself from kernel 5.15 on, in four of its modes and only
  when every member can redirect; it then refuses members that cannot, or that have a program of their own. A bond
  without a program takes members with one. So the members get it and the bond itself never; a member added later
  is seen by the next look, and one without native XDP gets the generic kind.
* Bridge: those ports that are its way out: devices with nothing but a driver, and bonds or VLANs over such. Ports of
  guests (veth, tap and the like) are left alone and named in the log: what a guest sends to this host is judged only
  where its port is configured by name. A bridge without a way out (inside a container every port is a veth) gets the
  program itself, generically: it then sees what comes for this host.

A VLAN tag in the frame is parsed. One that the network card strips (rx-vlan-offload) travels beside the frame, which
looks untagged to the program and is judged the same: the key is the source address, the VLAN no part of it. On PASS the
kernel still finds the tag; only a frame the program itself sends back would lack it.

Invariants:
    never-on-a-bond: no program goes on a bond, team or VRF itself, whatever its members are.
    never-blind: every configured interface that is there is served by a device, or named with the reason it is not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from edge.errors import UnavailableError
from edge.kernel import netlink
from edge.kernel.netlink import Link

AUTO = "auto"
ON_ONE = frozenset({"vlan", "macvlan", "macvtap", "ipvlan", "ipvtap"})
OF_MEMBERS = frozenset({"bond", "team", "vrf"})
BRIDGE = "bridge"
OWN_DRIVER = ""

DEEPEST = 8
"""Devices on top of each other: the kernel allows as many (MAX_NEST_DEV, linux/netdevice.h)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A device to attach to. `serves`: the configured interfaces it is there for, its own name among them when it is
    configured itself; `above`: the devices between it and those, these included."""

    link: Link
    serves: tuple[str, ...]
    above: frozenset[Link] = frozenset()

    @property
    def stacked(self) -> str:
        """The interfaces it serves when they are others, as text; empty when it only serves itself."""
        others = [name for name in self.serves if name != self.link.name]
        return ",".join(others)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Where the program belongs. `absent`: configured interfaces that nothing serves, with the reason;
    `passed_over`: ports of a bridge that are left alone, by bridge."""

    targets: tuple[Target, ...]
    absent: Mapping[str, str]
    passed_over: Mapping[str, tuple[str, ...]]

    def indices(self) -> set[int]:
        """Interface indices of the targets."""
        return {target.link.index for target in self.targets}

    def above(self) -> set[Link]:
        """The devices that stand on a target and are not one."""
        wanted = self.indices()
        return {link for target in self.targets for link in target.above if link.index not in wanted}

    def require(self) -> Chosen:
        """Itself; UnavailableError with every reason when there is nothing to attach to."""
        if not self.targets:
            raise UnavailableError("; ".join(self.absent.values()))
        return self


def resolve(names: Sequence[str], attached: Collection[int] = ()) -> Chosen:
    """Where the program belongs now; "auto" stands for every interface that carries a default route.

    `attached`: indices that have it already. While no default route is there, "auto" stands for those.
    """
    routes = netlink.default_routes() if AUTO in names else set()
    return choose(names, netlink.links(), routes, attached)


def choose(names: Sequence[str], links: Iterable[Link], routes: Collection[int], attached: Collection[int]) -> Chosen:
    """resolve() for the given devices, default routes (interface indices) and attachments."""
    devices = {link.index: link for link in links}
    absent: dict[str, str] = {}
    serves: dict[int, list[str]] = {}
    above: dict[int, set[Link]] = {}
    passed_over: dict[str, tuple[str, ...]] = {}
    for link in _configured(names, devices, routes, attached, absent):
        found = list(_below(link, devices, frozenset(), passed_over))
        if not found:
            absent[link.name] = f"interface {link.name!r}: expected members to attach to, found a {link.kind} without"
        for device, over in found:
            serves.setdefault(device.index, []).append(link.name)
            above.setdefault(device.index, set()).update(over)
    targets = [
        Target(link=devices[index], serves=tuple(dict.fromkeys(whom)), above=frozenset(above[index]))
        for index, whom in serves.items()
    ]
    return Chosen(targets=tuple(targets), absent=absent, passed_over=passed_over)


def _configured(
    names: Sequence[str],
    devices: Mapping[int, Link],
    routes: Collection[int],
    attached: Collection[int],
    absent: dict[str, str],
) -> Iterator[Link]:
    """The devices of the configured names; those that are not there go to `absent`."""
    by_name = {link.name: link for link in devices.values()}
    for name in names:
        if name == AUTO:
            indices = [index for index in sorted(routes) if index in devices and devices[index].name != "lo"]
            indices = indices or [index for index in sorted(attached) if index in devices]
            if not indices:
                absent[AUTO] = (
                    "no interface carries a default route: name the ones that mail comes in by in [interfaces] names"
                )
            yield from (devices[index] for index in indices)
        elif name in by_name:
            yield by_name[name]
        else:
            absent[name] = f"interface {name!r}: expected one of {', '.join(by_name)}; found no such interface"


def _below(
    link: Link, devices: Mapping[int, Link], over: frozenset[Link], passed_over: dict[str, tuple[str, ...]]
) -> Iterator[tuple[Link, frozenset[Link]]]:
    """The devices at the bottom of a device, each with those passed on the way down."""
    lower = _next(link, devices, passed_over) if len(over) < DEEPEST else [link]
    for device in lower:
        if device is link:
            yield link, over
        elif device not in over:
            yield from _below(device, devices, over | {link}, passed_over)


def _next(link: Link, devices: Mapping[int, Link], passed_over: dict[str, tuple[str, ...]]) -> list[Link]:
    """One layer down; the device itself where it is the bottom, nothing for a bond without members."""
    if link.kind in ON_ONE:
        return [devices.get(link.lower, link)]
    members = [device for device in devices.values() if device.master == link.index]
    if link.kind in OF_MEMBERS:
        return members
    if link.kind != BRIDGE:
        return [link]
    out = [port for port in members if _leads_out(port, devices, DEEPEST)]
    left = tuple(port.name for port in members if port not in out)
    if out and left:
        passed_over[link.name] = left
    return out or [link]


def _leads_out(port: Link, devices: Mapping[int, Link], depth: int) -> bool:
    """Whether a bridge port is, or stands on, a device of its own driver."""
    if port.kind == OWN_DRIVER:
        return True
    if depth == 0:
        return False
    below: list[Link] = []
    if port.kind in ON_ONE and port.lower in devices:
        below = [devices[port.lower]]
    elif port.kind in OF_MEMBERS:
        below = [device for device in devices.values() if device.master == port.index]
    return any(_leads_out(device, devices, depth - 1) for device in below)
