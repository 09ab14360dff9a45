"""The daemon as an administrator meets it: start, kill, restart, upgrade, refuse, detach. Real kernel, real nft."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.abi import Reason
from edge.kernel import libbpf
from edge.kernel.pins import Pins
from edge.lab import network
from tests.e2e.host import SMALL_TABLES, Host, Reader, host, wait

pytestmark = pytest.mark.root

LIMITED = """mode = "enforce"
[limits.mx.new]
64 = { rate_per_min = 600, burst = 30 }
"""


@pytest.fixture
def mail_host(tmp_path: Path) -> Iterator[Host]:
    with host(tmp_path, LIMITED + SMALL_TABLES) as made:
        yield made


def counted(h: Host) -> dict[Reason, tuple[int, int]]:
    totals = h.tables.read(time.monotonic()).counters
    return {reason: (int(totals[reason, 0]), int(totals[reason, 1])) for reason in Reason}


def test_kill_under_load_lets_nothing_past_the_limits(mail_host: Host) -> None:
    """kill -9 while a /64 floods: its limit goes on, every SYN is accounted for, and the next daemon adopts it all."""
    h = mail_host
    h.start()
    maps = h.ask("status")["maps"]
    began_s, sent = time.monotonic(), [0]

    def flood() -> None:
        h.forge([f"2001:db8:bad:1::{n:x}" for n in range(1, 102)])
        sent[0] += 101
        time.sleep(0.01)

    load = Reader(flood)
    load.start()
    wait(lambda: counted(h)[Reason.LIMIT_64][1] > 500, "the flood to meet its limit")
    h.kill(signal.SIGKILL)
    at_kill = counted(h)
    wait(lambda: counted(h)[Reason.LIMIT_64][1] > at_kill[Reason.LIMIT_64][1] + 1000, "refusals without a daemon")
    h.start()
    wait(lambda: counted(h)[Reason.LIMIT_64][1] > at_kill[Reason.LIMIT_64][1] + 2000, "refusals after the restart")
    load.end()
    after = counted(h)
    elapsed_s = time.monotonic() - began_s
    assert h.ask("status")["maps"] == maps
    assert all(after[reason] >= at_kill[reason] for reason in Reason), "counters went back"
    admitted = after[Reason.CONFORMING][0]
    assert admitted <= 30 + 10 * elapsed_s + 2, "burst + rate * time, and one for each further CPU at creation"
    assert admitted + after[Reason.LIMIT_64][1] == sent[0], "a SYN went past the program"


def test_bad_configuration_touches_nothing(mail_host: Host) -> None:
    h = mail_host
    h.configure(LIMITED.replace("burst = 30", 'burst = "many"'))
    error = h.edge("run", expect=78)
    assert "limits.mx.new.64.burst" in error
    assert "many" in error
    assert str(h.config_path) in error
    assert not h.net.pins.exists()
    assert "edge" not in h.nft("list", "tables")
    assert not (h.directory / "state").exists()


def test_second_daemon_is_refused_by_name(mail_host: Host) -> None:
    h = mail_host
    h.start()
    assert h.daemon is not None
    error = h.edge("run", expect=69)
    assert f"process {h.daemon.pid}" in error
    assert str(h.net.pins) in error
    assert h.ask("status")["pid"] == h.daemon.pid


def test_flushed_ruleset_is_back_within_two_ticks(mail_host: Host) -> None:
    h = mail_host
    h.start()
    h.edge("block", "2001:db8:bad::/48")
    assert "2001:db8:bad::" in h.nft("list", "set", "inet", "edge", "mx_block_48")
    ticks = h.ask("status")["tick"]["count"]
    h.nft("flush", "ruleset")
    wait(lambda: "table inet edge" in h.nft("list", "tables"), "the table")
    assert h.ask("status")["tick"]["count"] <= ticks + 2
    assert "2001:db8:bad::" in h.nft("list", "set", "inet", "edge", "mx_block_48")
    assert "drifted" in h.log.read_text()
    assert h.ask("status")["nftables"]["repairs"] == 1


def test_operator_entries_survive_kill_and_lost_pins(mail_host: Host) -> None:
    h = mail_host
    h.start()
    h.edge("block", "2001:db8:bad::/48", "--for", "2h", "--reason", "a test")
    h.edge("allow", "2001:db8:bad:7::/64")
    assert not h.connect("2001:db8:bad:1::1")
    assert h.connect("2001:db8:bad:7::1")
    h.kill(signal.SIGKILL)
    assert not h.connect("2001:db8:bad:1::1")
    h.edge("detach")
    assert h.connect("2001:db8:bad:1::1")
    h.start()
    assert not h.connect("2001:db8:bad:1::1")
    assert h.connect("2001:db8:bad:7::1")
    h.edge("unblock", "2001:db8:bad::/48")
    assert h.connect("2001:db8:bad:1::1")


def test_learned_block_is_adopted(mail_host: Host) -> None:
    h = mail_host
    h.start()
    for n in range(1, 41):
        h.reject_lines(f"2001:db8:bad:1::{n:x}", 1)

    def blocks() -> list[dict[str, object]]:
        found: list[dict[str, object]] = h.ask("list", "--standing", "block")["entries"]
        return [entry for entry in found if entry["level"] == 64]

    first = wait(blocks, "a block")[0]
    assert first["prefix"] == "2001:db8:bad:1::/64"
    assert first["in_nftables"]
    h.kill(signal.SIGKILL)
    h.start()
    again = blocks()[0]
    for name in ("prefix", "standing", "origin", "reason", "decision"):
        assert again[name] == first[name]
    assert "weight bad" in str(again["reason"])
    assert not h.connect("2001:db8:bad:1::1")
    h.edge("unblock", "2001:db8:bad:1::/64")
    assert h.connect("2001:db8:bad:1::1")


def test_detach_leaves_nothing(mail_host: Host) -> None:
    h = mail_host
    h.start()
    error = h.edge("detach", expect=69)
    assert "in use" in error
    assert h.kill(signal.SIGTERM) == 0
    with h.net.server.entered():
        index = socket.if_nametoindex(network.SERVER_LINK)
        assert libbpf.attached_program(index)
        h.edge("detach")
        assert not libbpf.attached_program(index)
    assert not h.net.pins.exists()
    assert "inet edge" not in h.nft("list", "tables")
    assert "nothing" in h.edge("detach")


def test_foreign_program_is_left_alone_unless_told(mail_host: Host) -> None:
    from edge.kernel.compile import compile_programs
    from tests.bpf.harness import SMALL

    h = mail_host
    foreign = compile_programs(SMALL, pins=None)
    with h.net.server.entered():
        index = socket.if_nametoindex(network.SERVER_LINK)
        libbpf._call("attach", "bpf_xdp_attach", index, foreign.programs["edge_xdp"], libbpf.XDP_NATIVE, None)
        theirs = libbpf.attached_program(index)
        error = h.edge("load", expect=69)
        assert f"id {theirs}" in error
        assert "--replace" in error
        assert libbpf.attached_program(index) == theirs
        h.edge("load", "--replace")
        assert libbpf.attached_program(index) not in (0, theirs)


def test_upgrade_swaps_the_program_and_keeps_the_state(mail_host: Host) -> None:
    h = mail_host
    h.start()
    h.forge([f"2001:db8:cafe:2::{n:x}" for n in range(1, 14)])
    before, maps = counted(h), h.ask("status")["maps"]
    assert h.kill(signal.SIGTERM) == 0
    pins = Pins(h.net.pins)
    h.another_build()
    program = pins_program(pins)
    h.start()
    assert pins_program(pins) != program
    assert h.ask("status")["maps"] == maps
    assert counted(h)[Reason.CONFORMING] >= before[Reason.CONFORMING]


def test_new_sizes_make_new_tables_and_keep_the_entries(mail_host: Host) -> None:
    h = mail_host
    h.start()
    h.edge("block", "2001:db8:bad::/48")
    maps = h.ask("status")["maps"]
    assert h.kill(signal.SIGTERM) == 0
    h.configure(LIMITED + SMALL_TABLES.replace("65536", "131072"))
    h.edge("load")
    assert not h.connect("2001:db8:bad:1::1"), "a gap before the daemon is back"
    h.start()
    assert h.ask("status")["rows"]["64"]["capacity"] == 131072
    assert h.ask("status")["maps"] != maps
    assert not h.connect("2001:db8:bad:1::1")


def test_upgrade_killed_before_the_swap_is_done_by_the_next_load(mail_host: Host) -> None:
    h = mail_host
    h.edge("load")
    pins = Pins(h.net.pins)
    h.another_build()
    before = attached(h)
    killed = (
        "import os, pathlib, edge.config\n"
        "from edge.kernel import loader\n"
        "loader._swap_in = lambda *_: os._exit(9)\n"
        f"loader.load(edge.config.load(pathlib.Path({str(h.config_path)!r})))\n"
    )
    done = subprocess.run(h.net.server.command([sys.executable, "-c", killed]), check=False, timeout=60)
    assert done.returncode == 9
    assert attached(h) == before
    h.edge("load")
    assert attached(h) == pins_program(pins) != before


def test_tables_killed_between_the_renames_are_found_again(mail_host: Host) -> None:
    h = mail_host
    h.start()
    h.edge("block", "2001:db8:bad::/48")
    maps = h.ask("status")["maps"]
    h.kill(signal.SIGKILL)
    # as a load that makes new tables leaves it when it is killed after the first rename
    h.net.pins.joinpath("maps").rename(h.net.pins / "maps_new")
    h.net.pins.joinpath("maps_old").mkdir()
    h.start()
    assert h.ask("status")["maps"] == maps
    assert not h.connect("2001:db8:bad:1::1")


def test_daemon_killed_while_loading_leaves_no_lock(mail_host: Host) -> None:
    h = mail_host
    with h.log.open("ab") as log:
        daemon = subprocess.Popen(h.command("run"), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children")
        wait(lambda: children.read_text().strip(), "the loader's process")
    finally:
        daemon.kill()
        daemon.wait(20)
    wait(lambda: subprocess.run(h.command("load"), check=False, capture_output=True).returncode == 0, "a free lock")


def test_interface_that_comes_back_is_attached_again(mail_host: Host) -> None:
    h = mail_host
    h.start()
    subprocess.run(["ip", "-n", h.net.server.name, "link", "del", network.SERVER_LINK], check=True)
    wait(lambda: h.ask("status")["interfaces"][0]["xdp"] == "missing", f"the daemon to notice\n{h.log.read_text()}")
    wait(lambda: "edge_interface_attached{" not in scrape(h), "the metric to go")
    subprocess.run(
        ["ip", "-n", h.net.server.name, "link", "add", network.SERVER_LINK, "type", "veth", "peer", "name", "other"],
        check=True,
    )
    wait(lambda: h.ask("status")["interfaces"][0]["xdp"] == "native", "the program on the new interface")
    assert attached(h) == pins_program(Pins(h.net.pins))


def test_load_mends_a_link_that_was_detached(mail_host: Host) -> None:
    h = mail_host
    h.edge("load")
    pins = Pins(h.net.pins)
    with libbpf.get(pins.sockops_link) as link:
        libbpf.detach_link(link.number)
        assert libbpf.link_info(link.number).target == 0
    h.edge("load")
    with libbpf.get(pins.sockops_link) as link:
        assert libbpf.link_info(link.number).target == h.net.cgroup.stat().st_ino


def test_pins_of_another_user_are_not_used(mail_host: Host) -> None:
    h = mail_host
    h.net.pins.mkdir()
    os.chown(h.net.pins, 65534, 65534)
    assert "owned by 65534" in h.edge("load", expect=69)


def test_unprivileged_daemon_is_given_files_and_no_directory(mail_host: Host) -> None:
    h = mail_host
    h.edge("load")
    h.net.pins.joinpath("link").symlink_to(h.config_path)
    h.edge("load", "--user", "nobody")
    for path in [h.net.pins, *h.net.pins.rglob("*")]:
        status = path.lstat()
        assert status.st_uid == (0 if path.is_dir() else 65534), path
        assert not path.is_dir() or status.st_mode & 0o777 == 0o750, path
    assert h.config_path.stat().st_uid == 0


def attached(h: Host) -> int:
    """Id of the program on the mail interface."""
    with h.net.server.entered():
        return libbpf.attached_program(socket.if_nametoindex(network.SERVER_LINK))


def scrape(h: Host) -> str:
    fetch = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9843/metrics').read().decode())"
    done = subprocess.run(
        h.net.server.command([sys.executable, "-c", fetch]), capture_output=True, text=True, timeout=30, check=True
    )
    return done.stdout


def pins_program(pins: Pins) -> int:
    with libbpf.get(pins.program("xdp")) as program:
        return libbpf.program_info(program.number).id


def test_prometheus_scrapes_it(mail_host: Host) -> None:
    """promtool accepts /metrics, and a real Prometheus has our samples."""
    h = mail_host
    h.start()
    inside = h.net.server.command
    metrics = scrape(h)
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=metrics, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "2001:db8" not in metrics
    settings = h.directory / "prometheus.yml"
    settings.write_text(
        "global: {scrape_interval: 1s}\n"
        "scrape_configs: [{job_name: edge, static_configs: [{targets: ['127.0.0.1:9843']}]}]\n"
    )
    with (h.directory / "prometheus.log").open("wb") as log:
        prometheus = subprocess.Popen(
            inside(
                [
                    "prometheus",
                    f"--config.file={settings}",
                    f"--storage.tsdb.path={h.directory}/tsdb",
                    "--web.listen-address=127.0.0.1:9090",
                ]
            ),
            stdout=log,
            stderr=log,
        )
    try:

        def query(expression: str) -> str:
            done = subprocess.run(
                inside(["promtool", "query", "instant", "http://127.0.0.1:9090", expression]),
                capture_output=True, text=True, timeout=30, check=False,
            )  # fmt: skip
            return done.stdout

        wait(lambda: "=> 1 @" in query('up{job="edge"}'), "a scrape", 40)
        wait(lambda: "native" in query("edge_interface_attached"), "our samples", 40)
        assert "edge_packets_total" in query("edge_packets_total")
    finally:
        prometheus.terminate()
        prometheus.wait(20)
