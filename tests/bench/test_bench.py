"""The benchmark runs, and its result has the promised shape. Never a time: those are for a quiet machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge.errors import UnavailableError
from edge.kernel import program
from tests.bench import claims, cost, limiter, network, reading, report
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
def test_nothing_is_left_after_a_signal() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.bench", "--parts", "frames", "--only", "^parse only$", "--rounds", "100000"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as bench:
        assert bench.stderr is not None
        while "round" not in (line := bench.stderr.readline()):
            assert line, "it ended before its first round"
        assert namespaces(bench.pid)
        bench.send_signal(signal.SIGINT)
        assert bench.wait(timeout=30) == 130
    assert not namespaces(bench.pid)


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
