"""Which devices the program belongs on: on tables of devices that no test machine has, and on a real namespace."""

from __future__ import annotations

import socket

import pytest

from edge.errors import UnavailableError
from edge.kernel import netlink
from edge.kernel.interfaces import Chosen, choose, resolve
from edge.kernel.netlink import Link
from tests.kernel.netns import netns

LO = Link(index=1, name="lo", ethernet=False)
ETH0, ETH1, ETH2 = (Link(index=2 + n, name=f"eth{n}") for n in range(3))


def named(*links: Link, names: tuple[str, ...], routes: tuple[int, ...] = (), attached: tuple[int, ...] = ()) -> Chosen:
    return choose(names, (LO, *links), routes, attached)


def served(chosen: Chosen) -> dict[str, tuple[str, ...]]:
    return {target.link.name: target.serves for target in chosen.targets}


def member(link: Link, master: int) -> Link:
    return Link(index=link.index, name=link.name, kind=link.kind, lower=link.lower, master=master)


def test_a_plain_interface_is_its_own_device() -> None:
    chosen = named(ETH0, ETH1, names=("eth1",))
    assert served(chosen) == {"eth1": ("eth1",)}
    assert chosen.targets[0].stacked == ""
    assert not chosen.above()


@pytest.mark.parametrize("kind", ["vlan", "macvlan", "macvtap", "ipvlan", "ipvtap"])
def test_what_stands_on_one_device_is_judged_there(kind: str) -> None:
    chosen = named(ETH0, Link(index=9, name="up0", kind=kind, lower=2), names=("up0",))
    assert served(chosen) == {"eth0": ("up0",)}
    assert chosen.targets[0].stacked == "up0"
    assert {link.name for link in chosen.above()} == {"up0"}


def test_a_parent_in_another_namespace_is_out_of_reach() -> None:
    assert served(named(ETH1, Link(index=9, name="up0", kind="macvlan"), names=("up0",))) == {"up0": ("up0",)}


def test_a_veth_does_not_stand_on_its_peer() -> None:
    pair = Link(index=7, name="ve0", kind="veth", lower=8), Link(index=8, name="ve1", kind="veth", lower=7)
    assert served(named(*pair, names=("ve0",))) == {"ve0": ("ve0",)}


def test_a_tunnel_is_judged_itself() -> None:
    """Below it the packets are wrapped: nothing could be read there."""
    tunnel = Link(index=9, name="vx0", kind="vxlan", lower=2)
    assert served(named(ETH0, tunnel, names=("vx0",))) == {"vx0": ("vx0",)}


def test_vlan_on_a_bridge_on_a_bond() -> None:
    """The usual stack of a virtual machine host, several layers deep; guests' ports are left alone and named."""
    devices = (
        member(ETH0, 10),
        member(ETH1, 10),
        Link(index=10, name="bond0", kind="bond", master=12),
        Link(index=12, name="br0", kind="bridge"),
        Link(index=13, name="vnet0", kind="tun", master=12),
        Link(index=14, name="veth7", kind="veth", lower=15, master=12),
        Link(index=16, name="br0.25", kind="vlan", lower=12),
    )
    chosen = named(*devices, names=("br0.25",))
    assert served(chosen) == {"eth0": ("br0.25",), "eth1": ("br0.25",)}
    assert {link.name for link in chosen.above()} == {"bond0", "br0", "br0.25"}
    assert chosen.passed_over == {"br0": ("vnet0", "veth7")}


def test_a_bridge_port_that_is_a_vlan_leads_out() -> None:
    devices = (
        ETH0,
        Link(index=9, name="eth0.7", kind="vlan", lower=2, master=12),
        Link(index=12, name="br7", kind="bridge"),
    )
    assert served(named(*devices, names=("br7",))) == {"eth0": ("br7",)}


def test_a_bridge_without_a_way_out_is_judged_itself() -> None:
    devices = Link(index=12, name="br0", kind="bridge"), Link(index=13, name="vnet0", kind="tun", master=12)
    chosen = named(*devices, names=("br0",))
    assert served(chosen) == {"br0": ("br0",)}
    assert not chosen.passed_over


def test_a_guests_port_named_by_hand_is_judged() -> None:
    devices = (
        member(ETH0, 12),
        Link(index=12, name="br0", kind="bridge"),
        Link(index=13, name="vnet0", kind="tun", master=12),
    )
    assert served(named(*devices, names=("br0", "vnet0"))) == {"eth0": ("br0",), "vnet0": ("vnet0",)}


def test_a_member_added_later_is_seen() -> None:
    bond = Link(index=10, name="bond0", kind="bond")
    assert served(named(member(ETH0, 10), ETH1, bond, names=("bond0",))) == {"eth0": ("bond0",)}
    both = named(member(ETH0, 10), member(ETH1, 10), bond, names=("bond0",))
    assert served(both) == {"eth0": ("bond0",), "eth1": ("bond0",)}


@pytest.mark.parametrize("kind", ["bond", "team", "vrf"])
def test_never_on_a_bond(kind: str) -> None:
    """Not even while it is empty: with a program of its own it would refuse members."""
    chosen = named(ETH0, Link(index=10, name="bond0", kind=kind), names=("bond0", "eth0"))
    assert served(chosen) == {"eth0": ("eth0",)}
    assert chosen.absent == {"bond0": f"interface 'bond0': expected members to attach to, found a {kind} without"}


def test_never_blind() -> None:
    """Each configured name is served or absent with a reason, whatever is stacked on what."""
    tall = [Link(index=20 + n, name=f"v{n}", kind="vlan", lower=19 + n) for n in range(1, 14)]
    ring = [
        Link(index=40, name="ring0", kind="vlan", lower=41),
        Link(index=41, name="ring1", kind="bond", master=0),
        Link(index=42, name="ring2", kind="vlan", lower=40, master=41),
    ]
    devices = [Link(index=20, name="v0"), *tall, *ring]
    names = (*(link.name for link in devices), "eth7")
    chosen = choose(names, devices, (), ())
    covered = {name for target in chosen.targets for name in target.serves}
    assert covered | set(chosen.absent) == set(names)


def test_auto_stands_for_the_default_routes() -> None:
    vlan = Link(index=9, name="eth1.7", kind="vlan", lower=3)
    chosen = named(ETH0, ETH1, ETH2, vlan, names=("auto",), routes=(1, 2, 9, 99), attached=(4,))
    assert served(chosen) == {"eth0": ("eth0",), "eth1": ("eth1.7",)}


def test_auto_without_a_route_keeps_what_is_attached() -> None:
    assert served(named(ETH0, ETH1, names=("auto",), attached=(3, 99))) == {"eth1": ("eth1",)}
    none = named(ETH0, names=("auto",))
    with pytest.raises(UnavailableError, match="no interface carries a default route"):
        none.require()


def test_what_is_missing_is_named_beside_what_is_there() -> None:
    chosen = named(ETH0, names=("eth7", "eth0"))
    assert served(chosen) == {"eth0": ("eth0",)}
    assert chosen.absent == {"eth7": "interface 'eth7': expected one of lo, eth0; found no such interface"}
    assert chosen.require() is chosen
    with pytest.raises(UnavailableError, match="'eth7': expected one of lo"):
        named(names=("eth7",)).require()


@pytest.mark.root
def test_the_kernels_own_devices() -> None:
    with netns("links") as space, space.entered():
        for command in (
            "link add ve0 mtu 9000 type veth peer name ve1",
            "link add link ve0 name mac0 type macvlan",
            "link add br0 type bridge",
            "link set ve1 master br0",
            "link set ve0 up",
            "link set ve1 up",
            "address add 2001:db8::7/64 dev ve0 nodad",
            "address add 192.0.2.1 peer 192.0.2.2/32 dev ve0",
            "route add 198.51.100.0/24 dev ve0",
            "route add default dev ve0",
            "-6 route add 2001:db8:7::/48 via 2001:db8::1",
            "-6 route add default nexthop via 2001:db8::1 dev ve0 nexthop via 2001:db8::2 dev ve0",
        ):
            space.run("ip", *command.split())
        found = {link.name: link for link in netlink.links()}
        indices = {name: socket.if_nametoindex(name) for name in ("ve0", "ve1", "mac0", "br0")}
        assert {name: found[name].index for name in indices} == indices
        assert (found["ve0"].kind, found["ve0"].mtu, found["ve0"].ethernet) == ("veth", 9000, True)
        assert (found["mac0"].kind, found["mac0"].lower) == ("macvlan", indices["ve0"])
        assert (found["ve1"].master, found["br0"].kind) == (indices["br0"], "bridge")
        assert not found["lo"].ethernet
        assert netlink.default_routes() == {indices["ve0"]}
        networks = {(index, str(address.network)) for index, address in netlink.addresses()}
        assert {(indices["ve0"], "2001:db8::/64"), (indices["ve0"], "192.0.2.2/32")} <= networks
        assert served(resolve(["auto"])) == {"ve0": ("ve0",)}
        assert served(resolve(["mac0", "br0"])) == {"ve0": ("mac0",), "br0": ("br0",)}


@pytest.mark.root
def test_a_default_route_of_another_table_does_not_count() -> None:
    with netns("routes") as space, space.entered():
        for command in (
            "link add ve0 type veth peer name ve1",
            "link set ve0 up",
            "route add default dev ve0 table 7",
            "route add unreachable default",
        ):
            space.run("ip", *command.split())
        assert netlink.default_routes() == set()


@pytest.mark.root
def test_answers_are_whole() -> None:
    """A thousand devices, more than one part of an answer holds, while others come and go."""
    with netns("many") as space, space.entered():
        made = [f"many{n}" for n in range(499)]
        space.run("ip", "-batch", "-", stdin="".join(f"link add {name} type ifb\n" for name in made))
        wanted = {name for _, name in socket.if_nameindex()}
        for n in range(7):
            space.run("ip", "link", "add", f"come{n}", "type", "bridge")
            names = [link.name for link in netlink.links()]
            assert len(names) == len(set(names))
            assert set(names) >= wanted
            space.run("ip", "link", "del", f"come{n}")
