"""The whole thing, as people start it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edge.errors import UnavailableError, UsageError
from edge.lab import mta
from edge.lab.main import run
from edge.lab.network import Network
from edge.lab.process import wait_for

LAB = [sys.executable, "-m", "edge.cli", "lab"]


def traces(pid: int) -> list[Path]:
    """Everything a lab leaves while it runs."""
    lab = Network(pid=pid)
    places = [lab.server.path, lab.client.path, lab.bpf, lab.cgroup]
    return [path for path in places if path.exists()] + list(Path(tempfile.gettempdir()).glob(f"{lab.name}-*"))


def test_a_length_out_of_bounds_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="expected 20 to 600, found 3"):
        run(seconds=3)


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UnavailableError, match="run it as root"):
        run()


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="`ip` is missing: install iproute2"):
        run()


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_after_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen([*LAB, "--mta", "embedded"], stderr=out, stdout=out)
    try:
        wait_for(lambda: " s of " in log.read_text() or process.poll() is not None, "traffic", seconds=90)
        assert process.poll() is None, log.read_text()
        assert len(traces(process.pid)) == 5
        process.send_signal(number)
        assert process.wait(60) == 128 + number, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert traces(process.pid) == []
    assert "everything the lab made is removed" in log.read_text()


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_a_killed_lab_left_is_removed_by_the_next(tmp_path: Path) -> None:
    def started() -> subprocess.Popen[bytes]:
        with log.open("wb") as out:
            lab = subprocess.Popen([*LAB, "--mta", "embedded"], stderr=out, stdout=out)
        wait_for(lambda: " s of " in log.read_text() or lab.poll() is not None, "traffic", seconds=90)
        assert lab.poll() is None, log.read_text()
        return lab

    log = tmp_path / "log"
    killed = started()
    killed.kill()
    killed.wait()
    assert len(traces(killed.pid)) == 5
    following = started()
    try:
        assert f"removing what process {killed.pid} left behind" in log.read_text()
        assert traces(killed.pid) == []
    finally:
        following.terminate()
        following.wait(60)
    assert traces(following.pid) == []


@dataclass(frozen=True)
class Shown:
    """What a lab printed."""

    pid: int
    status: int
    out: str
    err: str

    @property
    def found(self) -> dict[str, Any]:
        """The object on standard output."""
        found: dict[str, Any] = json.loads(self.out)
        return found


@pytest.fixture(scope="module")
def shown() -> dict[str, Shown]:
    """Both servers' labs, run at the same time."""
    servers = ["embedded"] if mta.postfix_program() is None else ["postfix", "embedded"]
    labs = {
        server: subprocess.Popen(
            [*LAB, "--mta", server, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for server in servers
    }
    try:
        outputs = {server: lab.communicate(timeout=240) for server, lab in labs.items()}
    finally:
        for lab in labs.values():
            if lab.poll() is None:
                lab.terminate()
                lab.wait(60)
    return {server: Shown(lab.pid, lab.returncode, *outputs[server]) for server, lab in labs.items()}


@pytest.fixture(params=["postfix", "embedded"])
def one(request: pytest.FixtureRequest, shown: dict[str, Shown]) -> Shown:
    """One of them."""
    if request.param not in shown:
        pytest.skip("no Postfix here")
    lab = shown[request.param]
    assert lab.status == 0, lab.err
    return lab


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(300)
class TestWholeRun:
    def test_one_object_on_stdout(self, one: Shown) -> None:
        assert json.loads(one.out)["mta"] in one.err.splitlines()[0]

    def test_every_honest_message_is_delivered(self, one: Shown) -> None:
        honest = one.found["legitimate"]
        assert honest["delivered"] == honest["attempted"] > 100, one.err

    def test_at_most_a_fiftieth_of_the_abuse_reaches_the_mta(self, one: Shown) -> None:
        abuse = one.found["abuse"]
        assert 0 < abuse["reached_mta"] <= 0.02 * abuse["attempted"], one.out

    def test_at_most_a_tenth_of_any_campaign_does_and_nothing_after_its_block(self, one: Shown) -> None:
        assert len(one.found["campaigns"]) == 4
        for campaign in one.found["campaigns"]:
            assert 0 < campaign["reached_mta"] <= 0.1 * campaign["attempted"], one.out
            assert campaign["reached_mta_after_block"] == 0, one.out
            assert campaign["blocked_by"] is not None, one.out

    def test_the_first_block_comes_within_two_seconds_of_the_verdict(self, one: Shown) -> None:
        assert one.found["seconds_to_first_block"] <= 2, one.out

    def test_every_block_is_in_nftables(self, one: Shown) -> None:
        assert len(one.found["blocked"]) >= 4
        assert all(block["in_nftables"] for block in one.found["blocked"]), one.out

    def test_forged_syns_block_nobody(self, one: Shown) -> None:
        forged = one.found["forged_syns"]
        assert forged["sent"] > 100
        assert (forged["reached_mta"], forged["blocks_caused"]) == (0, 0), one.out

    def test_nothing_is_left(self, one: Shown) -> None:
        assert traces(one.pid) == []
