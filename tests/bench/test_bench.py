"""The benchmark runs, and its result has the promised shape. Never a time: those are for a quiet machine."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge.errors import UnavailableError
from edge.kernel import program
from edge.lab.forge import internet_checksum
from edge.lab.mta import postfix_program
from edge.lab.network import Network, cgroup2_mount
from edge.lab.process import wait_for
from tests.bench import claims, cost, forged, limiter, mailhost, network, reading, report, service
from tests.bench.__main__ import measure_all
from tests.bench.measure import Summary, ratios

ROOT = Path(__file__).resolve().parents[2]


def namespaces(pid: int) -> list[Path]:
    return list(Path("/run/netns").glob(f"edge-bench-{pid}-*"))


@pytest.mark.root
def test_a_tiny_run_has_the_promised_shape() -> None:
    result = measure_all(
        parts=("frames", "runs"),
        rounds=2,
        turn_s=0.001,
        runs_a_turn=997,
        wanted=lambda name: (
            re.fullmatch(r"parse only|edge: not ours|edge: blocked|nft five block sets", name) is not None
        ),
    )
    assert not namespaces(os.getpid())
    found = json.loads(json.dumps(report.as_json(result)))
    frames = {(one["name"], one["prefixes"]): one for one in found["live_frames"]}
    assert ("edge: blocked", 1000) in frames
    for one in frames.values():
        assert len(one["ns"]) == len(one["reference_ns"]) == 2
        assert one["arrived"] >= one["sent"]
    blocked = frames["edge: blocked", 1000]
    assert blocked["decided"] == {"blocked_operator": blocked["sent"]}
    assert {one["program"] for one in found["test_run"]} == {cost.EMPTY, cost.PARSE, cost.EDGE}
    assert all(len(one["ns"]) == 2 for one in found["test_run"])
    assert any("parse only" in one["claim"] for one in found["claims"])
    assert "| edge: blocked | 1,000 |" in report.as_text(result)


@pytest.mark.root
def test_a_tiny_reading_sees_what_changed() -> None:
    found = reading.measure(program.text(), 2, 9973, senders=997, bcc_entries=101)
    assert [one.changed for one in found] == [99, 99]
    assert [one.senders for one in found] == [99, 997]
    assert all(len(one.total_ms) == 2 and one.live > 9000 and one.bcc_entries == 101 for one in found)


@pytest.mark.root
@pytest.mark.slow
def test_starting_is_timed() -> None:
    result = measure_all(parts=("starting",), rounds=1)
    assert not left_behind(os.getpid())
    found = json.loads(json.dumps(report.as_json(result)))
    assert {name: len(values) for name, values in found["starting"].items()} == {"start_s": 1, "restart_s": 1}
    assert [one["bound"] for one in found["claims"]] == [claims.START_BOUND_S, claims.RESTART_BOUND_S]
    assert "| again, unchanged program |" in report.as_text(result)


@contextmanager
def running(*arguments: str, until: str) -> Iterator[subprocess.Popen[str]]:
    """The benchmark as a child, from when it says `until` on."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.bench", *arguments],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as bench:
        assert bench.stderr is not None
        while until not in (line := bench.stderr.readline()):
            assert line, f"it ended before it said {until!r}"
        yield bench


@pytest.mark.root
def test_nothing_is_left_after_a_signal() -> None:
    endless = ("--parts", "frames", "--only", "^parse only$", "--rounds", "100000")
    with running(*endless, until="round") as bench:
        assert namespaces(bench.pid)
        bench.send_signal(signal.SIGINT)
        assert bench.wait(timeout=30) == 130
    assert not namespaces(bench.pid)


def left_behind(pid: int) -> list[Path]:
    """What of a run with Postfix is still there."""
    places = (Path("/run/netns"), Path("/run"), cgroup2_mount(), Path(tempfile.gettempdir()))
    return [path for place in places for name in ("lab", "bench") for path in place.glob(f"edge-{name}-{pid}*")]


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.skipif(postfix_program() is None, reason="needs Postfix")
def test_mail_under_a_flood_is_counted() -> None:
    """Completed is what Postfix's log confirms: otherwise the measurement itself fails."""
    before = os.sched_getaffinity(0), os.sched_getscheduler(0)
    served, left_out = service.measure(1, seconds=0.35, quiet_s=0)
    assert not left_behind(os.getpid())
    assert not multiprocessing.active_children()
    assert (os.sched_getaffinity(0), os.sched_getscheduler(0)) == before
    result = report.Result(machine={}, rounds=1, service=served, left_out=left_out)
    found = json.loads(json.dumps(report.as_json(result)))["service"]
    assert {one["contender"] for one in found} >= {"nothing", "nft meter, input", "edge"}
    assert len(found) == 2 * len({one["contender"] for one in found})
    for one in found:
        (quiet,), (flooded,) = one["undisturbed"], one["under_flood"]
        assert quiet["forged_sent"] == 0
        assert flooded["forged_sent"] >= 10_000
        assert flooded["frames_arrived"] > quiet["frames_arrived"]
        for phase in (quiet, flooded):
            assert {name: tally["attempted"] for name, tally in phase["senders"].items()} == {
                "known": 7,
                "newcomers": 3,
                "neighbours": 3,
            }
            for tally in phase["senders"].values():
                assert tally["completed"] == len(tally["latency_ms"])
                assert tally["attempted"] == tally["completed"] + sum(tally["lost_at"].values())
        assert all(tally["completed"] == tally["attempted"] for tally in quiet["senders"].values())
    edge_alone = next(one for one in found if (one["contender"], one["flood"]) == ("edge", "one /48"))
    assert edge_alone["under_flood"][0]["tcp_segments"] < edge_alone["under_flood"][0]["frames_arrived"]
    assert {claim.text.partition(":")[0] for claim in result.claims()} == {
        "edge, flood sweep",
        "edge, flood one /48",
    }
    assert "| edge | one /48 | honest, in that /48 |" in report.as_text(result)


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.skipif(postfix_program() is None, reason="needs Postfix")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_flood_ends_with_us(number: signal.Signals) -> None:
    with running("--parts", "service", until=": sweep") as bench:
        outside = ["ip", "netns", "pids", Network(pid=bench.pid).client.name]
        wait_for(lambda: subprocess.check_output(outside), "the flood", seconds=20)
        bench.send_signal(number)
        code = bench.wait(timeout=30)
    if number == signal.SIGKILL:
        wait_for(lambda: not subprocess.check_output(outside), "the end of the flood", seconds=20)
        assert left_behind(bench.pid)
        mailhost.remove_leftovers()
    else:
        assert code == 128 + number
    assert not left_behind(bench.pid)


def test_every_frame_of_a_flood_has_a_right_checksum() -> None:
    for source in forged.FIRST_SOURCE.values():
        packet = forged.frame(source)[14:]
        segment = packet[40:]
        assert internet_checksum(packet[8:40] + len(segment).to_bytes(4) + (6).to_bytes(4) + segment) == 0


def test_every_step_can_be_cut_out() -> None:
    text = program.text()
    for name, pattern, replacement in cost.CUTS:
        assert limiter.cut(text, [(pattern, replacement)]) != text, name


def test_a_step_that_is_written_otherwise_is_named() -> None:
    with pytest.raises(UnavailableError, match="to cut out, found 0"):
        limiter.cut("int x;", [("no such line", "")])


def test_ratios_are_of_one_round() -> None:
    assert ratios([1.0, 30.0], [2.0, 10.0]) == Summary(0.5, 1.75, 3.0)


def test_a_claim_holds_by_its_median() -> None:
    assert claims.Claim("", 1.0, Summary(0.5, 1.0, 9.0)).holds
    assert not claims.Claim("", 1.0, Summary(0.5, 1.1, 1.2)).holds


def test_names_of_other_runs_are_not_taken() -> None:
    assert network.NAME.match("edge-bench-12-tx")
    assert not network.NAME.match("edge-lab-12-mx")
