"""The kernel's answers through pyroute2: complete, of the right namespace, and errors that say so."""

from __future__ import annotations

import asyncio
import subprocess
import threading

import pytest
from pyroute2 import IPRoute
from pyroute2.netlink import NLM_F_DUMP_INTR, NLM_F_MULTI
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted

from edge.kernel import netlink
from edge.kernel.netlink import ATTEMPTS, NoAnswerError
from tests.kernel.netns import netns


class Interrupted:
    """A question whose answers are interrupted so many times, each after one message of a real dump."""

    def __init__(self, times: int) -> None:
        self.times, self.asked = times, 0

    def __call__(self, kernel: IPRoute) -> list[str]:
        self.asked += 1
        found = []
        for message in netlink.whole(kernel.get_links()):
            found.append(message.get_attr("IFLA_IFNAME"))
            if self.asked <= self.times:
                message["header"]["flags"] |= NLM_F_DUMP_INTR
                list(netlink.whole([message]))
        return found


def test_a_message_that_says_interrupted_ends_the_answer() -> None:
    whole, cut = ({"header": {"flags": flags}} for flags in (NLM_F_MULTI, NLM_F_MULTI | NLM_F_DUMP_INTR))
    assert list(netlink.whole([whole, whole, whole])) == [whole] * 3
    with pytest.raises(NetlinkDumpInterrupted):
        list(netlink.whole([whole, cut, whole]))


def test_an_interrupted_answer_is_asked_for_again() -> None:
    question = Interrupted(ATTEMPTS - 1)
    assert netlink.ask("links", question).count("lo") == 1
    assert question.asked == ATTEMPTS


def test_asking_again_has_an_end() -> None:
    question = Interrupted(ATTEMPTS + 7)
    with pytest.raises(NoAnswerError, match=f"list of links: it changed {ATTEMPTS} times"):
        netlink.ask("links", question)
    assert question.asked == ATTEMPTS


def test_what_the_kernel_refuses_is_no_answer() -> None:
    with pytest.raises(NoAnswerError, match=r"list of links: expected an answer, found .*No such device"):
        netlink.ask("links", lambda kernel: list(kernel.get_links(2**31 - 1)))


def test_a_socket_that_is_refused_is_no_answer() -> None:
    def refused(kernel: IPRoute) -> None:
        raise OSError(97, "Address family not supported by protocol")

    with pytest.raises(NoAnswerError, match=r"expected an answer, found .*97"):
        netlink.ask("routes", refused)


def test_it_is_asked_in_a_thread_beside_a_running_loop() -> None:
    async def ask() -> list[str]:
        return [link.name for link in await asyncio.to_thread(netlink.links)]

    assert "lo" in asyncio.run(ask())


@pytest.mark.root
def test_answers_are_of_the_threads_namespace() -> None:
    """The thread is in another namespace than the process."""
    found: list[set[str]] = []
    with netns("thread") as space:
        space.run("ip", "link", "add", "only-there", "type", "ifb")

        def look() -> None:
            with space.entered():
                found.append({link.name for link in netlink.links()})

        thread = threading.Thread(target=look)
        thread.start()
        thread.join(30)
    assert found == [{"lo", "only-there"}]
    assert "only-there" not in {link.name for link in netlink.links()}


@pytest.mark.root
def test_a_name_that_is_no_text_is_taken() -> None:
    with netns("name") as space, space.entered():
        subprocess.run(["ip", "link", "add", b"x\xff\xfe", "type", "ifb"], check=True)
        assert {link.name for link in netlink.links()} == {"lo", "x\udcff\udcfe"}


@pytest.mark.root
def test_a_parent_in_another_namespace_is_none() -> None:
    """Its index says nothing here: another device may have the same."""
    with netns("parent") as parent, netns("child") as child:
        parent.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
        parent.run("ip", "link", "add", "link", "eth0", "name", "mac0", "type", "macvlan")
        parent.run("ip", "link", "set", "mac0", "netns", child.name)
        with child.entered():
            (found,) = [link for link in netlink.links() if link.name == "mac0"]
    assert (found.kind, found.lower) == ("macvlan", 0)


@pytest.mark.root
def test_a_default_route_is_found_among_many() -> None:
    """More than one part of an answer holds, in both families."""
    with netns("full") as space, space.entered():
        for command in ("add ve0 type veth peer name ve1", "set ve0 up", "set ve1 up"):
            space.run("ip", "link", *command.split())
        for family, pattern, device in (("-6", "2001:db8:{:x}::/48", "ve0"), ("-4", "10.7.{}.0/24", "ve1")):
            others = "".join(f"route add {pattern.format(n)} dev {device}\n" for n in range(251))
            space.run("ip", family, "-batch", "-", stdin=others + f"route add default dev {device}\n")
        indices = {link.index for link in netlink.links() if link.name in ("ve0", "ve1")}
        assert netlink.default_routes() == indices
