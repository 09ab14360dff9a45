"""The program beside Linux's own TCP: whatever a listening socket answers was judged as a new connection."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections import Counter
from collections.abc import Iterator

import pytest

from edge.abi import Reason
from edge.config import Config
from edge.kernel.recorded import Judged
from edge.lab.forge import internet_checksum
from edge.packets import WITHOUT_PORT, configured
from tests import packets as p
from tests.bpf.frames import PORTS, Frames
from tests.bpf.harness import Harness
from tests.bpf.test_packets import WAYS
from tests.kernel.netns import NetNs, netns

pytestmark = pytest.mark.root

COUNT = 20011
SERVER_MAC, CLIENT_MAC = "02:00:00:00:00:02", "02:00:00:00:00:01"
SOL_PACKET, PACKET_VNET_HDR, ETH_P_ALL = 263, 15, 3  # linux/if_packet.h, linux/if_ether.h
NEEDS_CSUM = 1  # linux/virtio_net.h
SEQUENCE = struct.pack("!II", 1, 0)
"""Sequence and acknowledgement of every segment of tests.packets: by them a segment is found in its frame."""

COMMANDS = f"""
ip link add client type veth peer name server
ip link set client address {CLIENT_MAC} up
ip link set server address {SERVER_MAC} up
ip address add {p.MX}/64 dev server nodad
ip address add {p.MX4}/24 dev server
ip -6 neighbour add fe80::1 lladdr {CLIENT_MAC} dev server nud permanent
ip neighbour add 192.0.2.1 lladdr {CLIENT_MAC} dev server nud permanent
ip -6 route add default via fe80::1 dev server
ip route add default via 192.0.2.1
sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.server.rp_filter=0 net.ipv4.tcp_syncookies=2
"""
"""Cookies for every SYN: each is answered, none is remembered, and no answer is repeated."""


class LinuxTcp:
    """A server's TCP that listens on the generator's ports, and a wire to it."""

    def __init__(self, space: NetNs, closing: contextlib.ExitStack) -> None:
        for command in COMMANDS.strip().splitlines():
            space.run(*command.split())
        with space.entered():
            for port in sorted(set(PORTS) - {0}):
                listener = closing.enter_context(
                    socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
                )
                listener.listen(1024)
            self._wire = closing.enter_context(
                socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            )
            self._wire.bind(("client", 0))
        self._wire.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self._wire.settimeout(20)

    def answers(self, frame: bytes) -> bool:
        """Whether the frame is answered with a SYN-ACK. A SYN that always is goes behind it: what comes before that
        one's answer is the frame's."""
        self._send(frame)
        self._send(FENCE)
        seen = 0
        while True:
            reply = self._wire.recv(65536)[10:]
            if reply[6:12] == bytes.fromhex(SERVER_MAC.replace(":", "")) and _is_syn_ack(reply):
                seen += 1
                if reply.find(FENCE_SOURCE) >= 0:
                    return seen > 1

    def _send(self, frame: bytes) -> None:
        """With right checksums, so that damage anywhere else is what decides."""
        frame = _with_header_checksum(frame)
        at = frame.find(SEQUENCE) - 4
        header = bytes(10)
        if 14 <= at <= len(frame) - 2:
            header = struct.pack("=BBHHHH", NEEDS_CSUM, 0, 0, 0, at, 0)
        with contextlib.suppress(OSError):  # longer than the link takes: no connection
            self._wire.send(header + frame)


FENCE_SOURCE = socket.inet_pton(socket.AF_INET6, "2001:db8:fe:ce::1")
FENCE = p.syn("2001:db8:fe:ce::1")


def _with_header_checksum(frame: bytes) -> bytes:
    """IPv4 without tags or behind some: the header's checksum made right."""
    at = 14
    while frame[at - 2 : at] in (b"\x81\x00", b"\x88\xa8"):
        at += 4
    if frame[at - 2 : at] != b"\x08\x00" or len(frame) < at + 20:
        return frame
    length = (frame[at] & 0x0F) * 4
    header = bytearray(frame[at : at + length])
    if len(header) < max(length, 20):
        return frame
    header[10:12] = b"\0\0"
    header[10:12] = struct.pack("!H", internet_checksum(bytes(header)))
    return frame[:at] + bytes(header) + frame[at + len(header) :]


def _is_syn_ack(frame: bytes) -> bool:
    """The server's own packets have neither options nor extension headers."""
    protocol, at = {0x86DD: (20, 54), 0x0800: (23, 34)}.get(int.from_bytes(frame[12:14], "big"), (0, len(frame)))
    return len(frame) > at + 13 and frame[protocol] == p.TCP and frame[at + 13] & (p.SYN | p.ACK) == p.SYN | p.ACK


@pytest.fixture(scope="module")
def linux() -> Iterator[LinuxTcp]:
    with netns("tcp") as space, contextlib.ExitStack() as closing:
        yield LinuxTcp(space, closing)


@pytest.fixture
def every_port(xdp: Harness) -> Harness:
    xdp.configure(configured(Config(), "all"))
    return xdp


def overlooked(judged: Judged, frame: bytes) -> str:
    """Why a SYN that Linux accepts may pass unjudged, each counted under its own reason; "": it may not."""
    if judged.reason is Reason.TOO_MANY_HEADERS:
        return "beyond the bound of the walk"
    if judged.reason is Reason.NOT_IP and frame[12:14] in (b"\x81\x00", b"\x88\xa8"):
        return "third priority tag"
    return ""


@pytest.mark.parametrize("seed", [17, int.from_bytes(os.urandom(4), "little")])
def test_what_linux_accepts_is_judged(linux: LinuxTcp, every_port: Harness, seed: int) -> None:
    print(f"seed {seed}")
    made = Frames(seed)
    counts: Counter[str] = Counter()
    for n in range(COUNT):
        frame = made.frame()
        judged = every_port.judge(frame)
        if not linux.answers(frame):
            counts["judged only" if judged.syn else "neither"] += 1
            continue
        counts["both" if judged.syn else overlooked(judged, frame)] += 1
        assert not counts[""], f"frame {n}: Linux accepts, the program says {judged.reason.name}: {frame.hex()}"
    print(dict(counts))
    assert counts["both"] > COUNT // 100


@pytest.mark.parametrize("name", [name for name, (_, reason) in WAYS.items() if reason in WITHOUT_PORT])
def test_what_the_parser_turns_away_linux_does_not_accept(linux: LinuxTcp, name: str) -> None:
    """Alone, that is: a fragment's others may follow. The one exception is the named bound of the walk."""
    frame, reason = WAYS[name]
    assert linux.answers(frame) == (reason is Reason.TOO_MANY_HEADERS)


def test_linux_reads_past_a_payload_length_of_0_only_with_hop_by_hop(linux: LinuxTcp) -> None:
    """What the parser's rule rests on."""
    behind = p.ipv6("2001:db8:1:2::3", p.extension(p.TCP, p.tcp()), following=p.HOP_BY_HOP, length=0)
    assert linux.answers(p.ethernet(behind))
    assert not linux.answers(p.ethernet(p.ipv6("2001:db8:1:2::3", p.tcp(), length=0)))
