"""Where the program goes: several interfaces, stacked ones, large frames, tags, modes; and what a restart leaves be."""

from __future__ import annotations

import json
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.abi import Reason
from edge.kernel import libbpf
from edge.kernel.pins import Pins
from edge.lab import network
from tests import packets as p
from tests.e2e.host import SMALL_TABLES, Host, host, wait
from tests.e2e.test_life_cycle import LIMITED

pytestmark = pytest.mark.root

SECOND, SECOND_PEER = "mx1", "world1"
SCHED_CLS, XDP = 3, 6  # enum bpf_prog_type: uapi/linux/bpf.h


@pytest.fixture
def mail_host(tmp_path: Path) -> Iterator[Host]:
    """A host with a second link beside the lab's own."""
    with host(tmp_path, LIMITED + SMALL_TABLES) as made:
        second_link(made)
        yield made


def second_link(h: Host) -> None:
    ends = f"{SECOND} netns {h.net.server.name} type veth peer name {SECOND_PEER} netns {h.net.client.name}"
    subprocess.run(["ip", "link", "add", *ends.split()], check=True)
    ip(h, "link", "set", SECOND, "up")
    subprocess.run(["ip", "-n", h.net.client.name, "link", "set", SECOND_PEER, "up"], check=True)


def ip(h: Host, *arguments: str) -> None:
    subprocess.run(["ip", "-n", h.net.server.name, *arguments], check=True)


def use(h: Host, *names: str, mode: str = "auto", settings: str = LIMITED + SMALL_TABLES) -> None:
    """Configure these interfaces."""
    h.configure(settings)
    text = h.config_path.read_text()
    wanted = f'names = {json.dumps(names)}\nxdp_mode = "{mode}"'
    h.config_path.write_text(text.replace(f'names = ["{network.SERVER_LINK}"]', wanted))


def index(h: Host, name: str) -> int:
    with h.net.server.entered():
        return socket.if_nametoindex(name)


def link_id(h: Host, name: str) -> int:
    with libbpf.get(Pins(h.net.pins).xdp_link(index(h, name))) as link:
        return libbpf.link_info(link.number).id


def mode_of(h: Host, name: str) -> str:
    with h.net.server.entered():
        number = socket.if_nametoindex(name)
        modes = {"native": libbpf.XDP_NATIVE, "generic": libbpf.XDP_GENERIC}
        return next((word for word, flags in modes.items() if libbpf.attached_program(number, flags)), "missing")


def send(h: Host, frames: list[bytes], *, link: str = network.CLIENT_LINK) -> None:
    with h.net.client.entered(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((link, 0))
        for frame in frames:
            raw.send(frame)


def judged(h: Host) -> int:
    """SYNs that met a limit, passed or not."""
    totals = h.tables.read(time.monotonic()).counters
    return int(totals[Reason.CONFORMING, 0] + totals[Reason.LIMIT_64].sum())


def syns(prefix: str, count: int) -> list[bytes]:
    return [p.syn(f"{prefix}::{n:x}") for n in range(1, count + 1)]


def test_two_interfaces_share_the_tables_and_one_may_vanish(mail_host: Host) -> None:
    h = mail_host
    use(h, network.SERVER_LINK, SECOND)
    h.start()
    first = link_id(h, network.SERVER_LINK)
    for n in range(31):
        send(h, [p.syn(f"2001:db8:bad:1::{n + 1:x}")])
        send(h, [p.syn(f"2001:db8:bad:1::{n + 1:x}:2")], link=SECOND_PEER)
    wait(lambda: judged(h) == 62, "62 SYNs over both links")
    totals = h.tables.read(time.monotonic()).counters
    assert totals[Reason.LIMIT_64, 1] > 0, "each link alone stays within burst, both together do not"

    def modes() -> dict[str, str]:
        return {row["name"]: row["xdp"] for row in h.ask("status")["interfaces"]}

    ip(h, "link", "del", SECOND)
    wait(lambda: modes() == {network.SERVER_LINK: "native", SECOND: "missing"}, f"a look\n{h.log.read_text()}")
    send(h, syns("2001:db8:bad:2", 7))
    wait(lambda: judged(h) == 69, "the other interface to go on")
    second_link(h)
    wait(lambda: modes() == {network.SERVER_LINK: "native", SECOND: "native"}, f"it back\n{h.log.read_text()}")
    assert link_id(h, network.SERVER_LINK) == first
    send(h, syns("2001:db8:bad:3", 11), link=SECOND_PEER)
    wait(lambda: judged(h) == 80, "the new interface to be judged")


def test_an_interface_that_is_not_there_is_said_and_attached_when_it_comes(mail_host: Host) -> None:
    h = mail_host
    use(h, network.SERVER_LINK, "mx7")
    h.start()
    assert "'mx7': expected one of" in h.log.read_text()
    ip(h, "link", "add", "mx7", "type", "veth", "peer", "name", "world7")
    wait(lambda: mode_of(h, "mx7") == "native", f"the program on it\n{h.log.read_text()}")


def test_never_reattached(mail_host: Host) -> None:
    """Whatever restarts: a daemon, a loader, a daemon that was killed."""
    h = mail_host
    h.start()
    made = link_id(h, network.SERVER_LINK)
    assert h.kill(signal.SIGTERM) == 0
    h.edge("load")
    h.start()
    h.kill(signal.SIGKILL)
    h.start()
    assert link_id(h, network.SERVER_LINK) == made
    assert h.log.read_text().count(": attaching") == 1


def test_said_first(mail_host: Host) -> None:
    h = mail_host
    h.start()
    log = h.log.read_text()
    assert log.index("may take its link down") < log.index(": attached")


def test_a_changed_mode_is_honoured_and_a_restart_without_change_does_nothing(mail_host: Host) -> None:
    h = mail_host
    h.start()
    links = {link_id(h, network.SERVER_LINK)}
    for mode, found in (("generic", "generic"), ("auto", "native"), ("native", "native"), ("generic", "generic")):
        assert h.kill(signal.SIGTERM) == 0
        use(h, network.SERVER_LINK, mode=mode)
        h.start()
        assert mode_of(h, network.SERVER_LINK) == found, mode
        links.add(link_id(h, network.SERVER_LINK))
    assert len(links) == 4, "native after auto is no change"
    log = h.log.read_text()
    assert log.count("attaching again in another mode") == 3
    assert h.ask("status")["interfaces"][0]["xdp"] == "generic"
    assert h.kill(signal.SIGTERM) == 0
    h.edge("detach")
    assert not h.net.pins.exists()


def test_native_that_is_refused_leaves_what_was_attached(mail_host: Host) -> None:
    """Native is demanded of a device without: refused, and what was attached goes on."""
    h = mail_host
    bridge(h)
    use(h, "br0", mode="generic")
    h.edge("load")
    use(h, "br0", mode="native")
    error = h.edge("load", expect=69)
    assert "br0: its driver has no native XDP" in error
    assert mode_of(h, "br0") == "generic"


def bridge(h: Host) -> None:
    """br0 with the second link as its port and an address of its own."""
    for command in (f"link add br0 address {network.SERVER_MAC} type bridge", f"link set {SECOND} master br0"):
        ip(h, *command.split())
    ip(h, "link", "set", "br0", "up")


def test_a_bridge_of_guests_only_is_judged_itself(mail_host: Host) -> None:
    h = mail_host
    bridge(h)
    use(h, "br0")
    h.start()
    assert mode_of(h, "br0") == "generic"
    assert mode_of(h, SECOND) == "missing"
    mac = bytes.fromhex(network.SERVER_MAC.replace(":", ""))
    send(h, [mac + frame[6:] for frame in syns("2001:db8:bad:1", 13)], link=SECOND_PEER)
    wait(lambda: judged(h) == 13, "13 SYNs for this host")


def test_a_macvlan_is_judged_at_the_device_it_stands_on(mail_host: Host) -> None:
    h = mail_host
    ip(h, *f"link add link {SECOND} name mac0 type macvlan".split())
    ip(h, "link", "set", "mac0", "up")
    use(h, "mac0")
    h.start()
    assert f"interface={SECOND} for=mac0" in h.log.read_text()
    assert (mode_of(h, SECOND), mode_of(h, "mac0")) == ("native", "missing")
    send(h, syns("2001:db8:bad:1", 13), link=SECOND_PEER)
    wait(lambda: judged(h) == 13, "13 SYNs")
    (row,) = h.ask("status")["interfaces"]
    assert (row["name"], row["for"]) == (SECOND, ["mac0"])
    assert f"{SECOND} (for mac0): XDP native" in h.edge("status")


def test_comes_back(mail_host: Host) -> None:
    """While the macvlan is away nothing says what it stood on: the device below keeps its attachment."""
    h = mail_host
    ip(h, *f"link add link {SECOND} name mac0 type macvlan".split())
    use(h, "mac0", network.SERVER_LINK)
    h.start()
    made = link_id(h, SECOND)
    ip(h, "link", "del", "mac0")
    wait(lambda: "mac0" in [row["name"] for row in h.ask("status")["interfaces"]], "the daemon to notice")
    assert h.kill(signal.SIGTERM) == 0
    h.edge("load")
    h.start()
    assert link_id(h, SECOND) == made
    ip(h, *f"link add link {SECOND} name mac0 type macvlan".split())
    wait(lambda: SECOND in [row["name"] for row in h.ask("status")["interfaces"]], "the daemon to notice again")
    assert link_id(h, SECOND) == made


def test_foreign_stays(mail_host: Host) -> None:
    """Somebody's program on the second of two: neither is touched."""
    h = mail_host
    use(h, network.SERVER_LINK, SECOND)
    code = struct.pack("<BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0)  # return XDP_PASS
    with (
        h.net.server.entered(),
        libbpf.load_program(XDP, "theirs", code) as program,
        libbpf.attach_xdp(program.number, index(h, SECOND), libbpf.XDP_NATIVE),
    ):
        error = h.edge("load", expect=69)
        assert f"interface {SECOND} already has an XDP program" in error
        assert "'theirs'" in error
        assert mode_of(h, network.SERVER_LINK) == "missing"
        assert mode_of(h, SECOND) == "native"
    h.edge("load")
    assert mode_of(h, network.SERVER_LINK) == mode_of(h, SECOND) == "native"


def test_an_attachment_above_gives_way_to_the_one_below(mail_host: Host) -> None:
    """What an earlier version had attached to the stacked device itself."""
    h = mail_host
    ip(h, *f"link add link {SECOND} name mac0 type macvlan".split())
    use(h, network.SERVER_LINK)
    h.edge("load")
    pins, above = Pins(h.net.pins), index(h, "mac0")
    with (
        h.net.server.entered(),
        libbpf.get(pins.program("xdp")) as program,
        libbpf.attach_xdp(program.number, above, libbpf.XDP_GENERIC) as link,
    ):
        libbpf.pin(link.number, pins.xdp_link(above))
    use(h, "mac0")
    h.edge("load")
    assert (mode_of(h, "mac0"), mode_of(h, SECOND), mode_of(h, network.SERVER_LINK)) == ("missing", "native", "missing")
    assert set(pins.xdp_links()) == {index(h, SECOND)}


def test_auto_keeps_what_is_attached_while_no_default_route_is_there(mail_host: Host) -> None:
    h = mail_host
    use(h, "auto")
    assert "no interface carries a default route" in h.edge("run", expect=69)
    ip(h, "-6", "route", "add", "default", "via", network.CLIENT_V6)
    h.start()
    made = link_id(h, network.SERVER_LINK)
    ip(h, "-6", "route", "del", "default", "via", network.CLIENT_V6)
    assert h.kill(signal.SIGTERM) == 0
    h.start()
    assert link_id(h, network.SERVER_LINK) == made
    assert h.ask("status")["interfaces"][0]["xdp"] == "native"


def test_large_frames_are_judged_natively(mail_host: Host) -> None:
    """MTU 9000: a program without frags support would be refused by the driver."""
    h = mail_host
    ip(h, "link", "set", network.SERVER_LINK, "mtu", "9000")
    subprocess.run(["ip", "-n", h.net.client.name, "link", "set", network.CLIENT_LINK, "mtu", "9000"], check=True)
    h.start()
    assert mode_of(h, network.SERVER_LINK) == "native"
    large = [p.ethernet(p.ipv6(f"2001:db8:bad:1::{n:x}", p.tcp() + bytes(8000))) for n in range(1, 14)]
    send(h, [*large, *syns("2001:db8:bad:2", 7)])
    wait(lambda: judged(h) == 20, "20 SYNs, 13 of them of 8 KB")


def test_tagged_frames_are_judged(mail_host: Host) -> None:
    """One tag and two, in the frame; and one that travels beside it, as a card strips it."""
    h = mail_host
    h.start()
    inside = [p.ipv6(f"2001:db8:bad:1::{n:x}", p.tcp()) for n in range(1, 8)]
    send(h, [p.ethernet(p.vlan(packet), 0x8100) for packet in inside])
    send(h, [p.ethernet(p.vlan(p.vlan(packet), 0x8100), 0x88A8) for packet in inside[:5]])
    wait(lambda: judged(h) == 12, "12 tagged SYNs")
    strip_tags(h)
    send(h, syns("2001:db8:bad:2", 11))
    wait(lambda: judged(h) == 23, "11 SYNs whose tag is beside the frame")


def strip_tags(h: Host) -> None:
    """From now on the client's frames carry a VLAN tag in the packet's metadata, where a card's offload puts it."""
    instructions = (
        (0xB7, 2, socket.htons(0x8100)),  # r2 = protocol; r1 is the packet
        (0xB7, 3, 25),  # r3 = tag
        (0x85, 0, 18),  # bpf_skb_vlan_push: uapi/linux/bpf.h
        (0xB7, 0, 0),  # r0 = TC_ACT_OK
        (0x95, 0, 0),
    )
    code = b"".join(struct.pack("<BBhi", operation, register, 0, value) for operation, register, value in instructions)
    pinned = h.net.bpf / "push"
    with libbpf.load_program(SCHED_CLS, "push", code) as program:
        libbpf.pin(program.number, pinned)
    try:
        for command in ("qdisc add dev {} clsact", f"filter add dev {{}} egress bpf direct-action pinned {pinned}"):
            tc = ["tc", *command.format(network.CLIENT_LINK).split()]
            subprocess.run(h.net.client.command(tc), check=True)
    finally:
        pinned.unlink()
