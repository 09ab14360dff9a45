"""Loading, swapping and attaching through the kernel itself, below what `edge load` shows."""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.config import load
from edge.errors import UnavailableError
from edge.kernel import libbpf, loader
from edge.kernel.compile import SOCK_OPS, XDP, compile_programs
from edge.kernel.pins import Pins
from edge.lab import network
from tests.bpf.harness import SMALL
from tests.e2e.host import SMALL_TABLES, Host, host
from tests.e2e.test_life_cycle import LIMITED
from tests.kernel.netns import netns

pytestmark = pytest.mark.root

PASS = struct.pack("<BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0)  # return XDP_PASS
NONSENSE = struct.pack("<BBhi", 0x95, 0, 0, 0)  # exit without a result


@pytest.fixture
def mail_host(tmp_path: Path) -> Iterator[Host]:
    with host(tmp_path, LIMITED + SMALL_TABLES) as made:
        yield made


@contextlib.contextmanager
def older(h: Host) -> Iterator[int]:
    """Loaded, and the link then given a program without frags support, as an earlier version had; its link's id."""
    h.edge("load")
    pins = Pins(h.net.pins)
    with h.net.server.entered(), libbpf.load_program(XDP, "older", PASS) as program:
        number = socket.if_nametoindex(network.SERVER_LINK)
        with libbpf.get(pins.xdp_link(number)) as link:
            libbpf.update_link(link.number, program.number)
            made = libbpf.link_info(link.number).id
        yield made


def link_of(h: Host) -> libbpf.LinkInfo:
    with h.net.server.entered():
        number = socket.if_nametoindex(network.SERVER_LINK)
    with libbpf.get(Pins(h.net.pins).xdp_link(number)) as link:
        return libbpf.link_info(link.number)


def pinned(h: Host) -> int:
    with libbpf.get(Pins(h.net.pins).program("xdp")) as program:
        return libbpf.program_info(program.number).id


def test_no_gap(mail_host: Host) -> None:
    """A program without frags support is swapped for one with it in the living link."""
    with older(mail_host) as made:
        assert link_of(mail_host).program_id != pinned(mail_host)
        mail_host.edge("load")
        assert link_of(mail_host).id == made
        assert link_of(mail_host).program_id == pinned(mail_host)


def test_a_swap_the_driver_refuses_is_said_and_attached_again(
    mail_host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    """At MTU 9000 veth refuses a program without frags support in the place of ours."""
    h = mail_host
    h.edge("load")
    before = link_of(h)
    for space, name in ((h.net.server, network.SERVER_LINK), (h.net.client, network.CLIENT_LINK)):
        subprocess.run(["ip", "-n", space.name, "link", "set", name, "mtu", "9000"], check=True)
    pins = Pins(h.net.pins)
    with libbpf.load_program(XDP, "older", PASS) as xdp, libbpf.get(pins.program("sockops")) as sockops:
        loader._swap_in(pins, xdp.number, sockops.number)
    assert not pins.xdp_links()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "refused the new program" in caplog.messages[0]
    h.edge("load")
    assert link_of(h).id != before.id
    assert link_of(h).program_id == pinned(h)


def test_every_packet_program_knows_frags() -> None:
    """veth with MTU 9000 takes ours natively, and refuses one that does not say so."""
    compiled = compile_programs(SMALL, pins=None)
    with netns("frags") as space, space.entered():
        for command in ("link add ve0 type veth peer name ve1", "link set ve0 mtu 9000", "link set ve1 mtu 9000"):
            space.run("ip", *command.split())
        number = socket.if_nametoindex("ve0")
        with libbpf.load_program(XDP, "older", PASS) as program, pytest.raises(libbpf.BpfError):
            libbpf.attach_xdp(program.number, number, libbpf.XDP_NATIVE)
        libbpf.attach_xdp(compiled.programs["edge_xdp"], number, libbpf.XDP_NATIVE).close()


def test_a_refusal_has_the_verifiers_words() -> None:
    with pytest.raises(libbpf.BpfError, match="R0 !read_ok"):
        libbpf.load_program(SOCK_OPS, "bad", NONSENSE, log_bytes=1 << 16)


def test_is_current_knows_the_mode(mail_host: Host) -> None:
    h = mail_host
    h.edge("load")
    with h.net.server.entered():
        assert loader.is_current(load(h.config_path))
        text = h.config_path.read_text()
        for mode, current in (("native", True), ("generic", False), ("auto", True)):
            h.config_path.write_text(text.replace("[interfaces]", f'[interfaces]\nxdp_mode = "{mode}"'))
            assert loader.is_current(load(h.config_path)) is current, mode
        h.config_path.write_text(text.replace(f'"{network.SERVER_LINK}"', '"mx7"'))
        with pytest.raises(UnavailableError, match="mx7"):
            loader.is_current(load(h.config_path))
