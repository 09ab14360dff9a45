import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge.lab import network
from edge.lab.network import Network
from edge.lab.process import Child, kill_inside, wait_for

pytestmark = pytest.mark.root


@contextmanager
def owned() -> Iterator[tuple[Network, subprocess.Popen[bytes]]]:
    """A lab's names, and the living process they belong to (or another lab would take them for leftovers)."""
    owner = subprocess.Popen(["sleep", "300"])
    try:
        yield Network(pid=owner.pid), owner
    finally:
        owner.kill()
        owner.wait()


def traces(lab: Network) -> list[Path]:
    """What is left of a lab outside its namespaces."""
    return [path for path in (lab.server.path, lab.client.path, lab.bpf, lab.cgroup) if path.exists()]


@pytest.fixture
def lab() -> Iterator[Network]:
    with owned() as (made, _):
        try:
            made.make()
            yield made
        finally:
            assert made.remove() == []


def test_nothing_is_left() -> None:
    with owned() as (lab, _):
        try:
            lab.make()
            assert len(traces(lab)) == 4
            assert lab.bpf.is_mount()
        finally:
            problems = lab.remove()
        assert problems == []
        assert traces(lab) == []
        assert lab.remove() == []  # a second time there is nothing to do, and that is fine


def test_what_was_half_made_is_removed() -> None:
    with owned() as (lab, _):
        try:
            lab.cgroup.mkdir()
            lab.bpf.mkdir()
        finally:
            assert lab.remove() == []
        assert traces(lab) == []


def test_labs_do_not_meet(lab: Network) -> None:
    with owned() as (other, _):
        try:
            other.make()
            assert not set(traces(lab)) & set(traces(other))
        finally:
            assert other.remove() == []
        assert len(traces(lab)) == 4


def test_a_killed_lab_is_found_by_its_dead_process_and_a_living_one_is_not() -> None:
    with owned() as (lab, owner):
        lab.cgroup.mkdir()
        try:
            assert lab.pid not in [found.pid for found in network.leftovers()]
            owner.kill()
            owner.wait()
            assert (
                lab.pid in [found.pid for found in network.leftovers()] or traces(lab) == []
            )  # another lab was quicker
        finally:
            assert lab.remove() == []


def test_machine_is_untouched(lab: Network) -> None:
    for command in (["ip", "route"], ["ip", "-6", "route"], ["ip", "address"]):
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert network.SERVER_LINK not in shown
        assert "2001:db8::/32" not in shown


def test_sockets_made_inside_stay_inside_and_the_thread_comes_back(lab: Network) -> None:
    home = Path("/proc/thread-self/ns/net").readlink()
    with lab.server.entered():
        assert Path("/proc/thread-self/ns/net").readlink() != home
        listener = socket.create_server((network.SERVER_V6, 25), family=socket.AF_INET6)
    assert Path("/proc/thread-self/ns/net").readlink() == home
    with listener, lab.client.entered(), socket.socket(socket.AF_INET6) as client:
        client.settimeout(5)
        client.setsockopt(socket.IPPROTO_IPV6, 78, 1)  # IPV6_FREEBIND
        client.bind(("2001:db8:77::1", 0))
        client.connect((network.SERVER_V6, 25))
        accepted, peer = listener.accept()
        accepted.close()
    assert peer[0] == "2001:db8:77::1"


def test_only_ours_are_stopped(lab: Network, tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    outside = Child("outside", sleep, tmp_path / "log")
    inside = Child("inside", lab.server.command(sleep), tmp_path / "log")
    home = Path("/proc/self/ns/net").stat().st_ino
    try:
        wait_for(lambda: _netns(inside) not in (None, home), "the child in the namespace", seconds=20)
        assert kill_inside(lab.server.name) == 1
        wait_for(lambda: not inside.alive(), "its end", seconds=20)
        assert outside.alive()
    finally:
        outside.stop()
        inside.stop()


def _netns(child: Child) -> int | None:
    try:
        return Path("/proc", str(child.pid), "ns/net").stat().st_ino
    except OSError:
        return None
