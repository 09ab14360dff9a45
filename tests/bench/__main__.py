"""Measure the limiter beside everything else that could do its job: `make bench`, or python -m tests.bench.

    --json          one JSON object instead of tables
    --rounds N      interleaved rounds (default 7)
    --parts a,b     frames, runs, phases, reading, size, starting, service (default: all)
    --only REGEX    contenders of the live frames whose name matches
    --record        write the sizes as the baseline that tests compare with

Needs root. Everything is made in namespaces of its own and removed in any case. With seven rounds it takes about nine
minutes on two virtual CPUs; quote ratios, not nanoseconds, for another machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge.errors import EdgeError
from edge.kernel import program
from tests.bench import cost, flood, measure, network, reading, report, service, size, starting
from tests.bench.report import Result

PARTS = ("frames", "runs", "phases", "reading", "size", "starting", "service")
ROUNDS = 7
TURN_S = 0.25
"""CPU time a contender gets a round: long against what starting and ending a turn costs."""

RUNS_A_TURN = 400_000
"""Of BPF_PROG_TEST_RUN: 0.01 to 0.4 s."""

LIVE = 1_000_000


def measure_all(
    *,
    parts: tuple[str, ...] = PARTS,
    rounds: int = ROUNDS,
    turn_s: float = TURN_S,
    runs_a_turn: int = RUNS_A_TURN,
    wanted: Callable[[str], bool] = lambda _: True,
    say: Callable[[str], None] = lambda _: None,
) -> Result:
    """Run the parts that are asked for."""
    text = program.text()  # once: a checkout may change meanwhile
    result = Result(machine=machine(), rounds=rounds)
    with measure.pinned() as cpu:
        if "frames" in parts:
            _frames(result, text, cpu, turn_s, wanted, say)
        if "runs" in parts:
            say("BPF_PROG_TEST_RUN: every case")
            result.runs = cost.measure(cost.runs(text), rounds, runs_a_turn)
        if "phases" in parts:
            say("BPF_PROG_TEST_RUN: with ever fewer steps")
            result.phases = cost.measure(cost.phases(text), rounds, runs_a_turn)
        if "reading" in parts:
            say("a tick's reading")
            result.readings = reading.measure(text, rounds, LIVE)
    if "size" in parts:
        result.size = size.measure()
        result.growth = size.growth(result.size, size.baseline()) if size.BASELINE.exists() else []
    if "starting" in parts:
        result.starting = starting.measure(rounds, say=say)
    if "service" in parts:
        result.service, left_out = service.measure(min(rounds, service.ROUNDS), say=say)
        result.left_out += left_out
    result.machine["load average at the end"] = os.getloadavg()[0]
    return result


def _frames(
    result: Result, text: str, cpu: int, turn_s: float, wanted: Callable[[str], bool], say: Callable[[str], None]
) -> None:
    with network.arena(os.getpid()) as arena:
        race = flood.Race(arena, text, measure.Softirq(cpu), wanted)
        race.prepare(turn_s, say)
        for number in range(result.rounds):
            say(f"live frames, round {number + 1} of {result.rounds}")
            race.round(number)
        race.finish()
    result.contenders, result.left_out = race.contenders, race.left_out


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "processor": f"{model[1] if model else platform.machine()}, {os.cpu_count()} CPUs",
        "kernel": platform.release(),
        "tools": "; ".join(filter(None, map(_version, ("nft", "ip6tables-legacy", "ipset")))),
        "load average at the start": os.getloadavg()[0],
    }


def _version(name: str) -> str:
    """What a tool says of itself; empty when it is not installed."""
    try:
        done = subprocess.run([name, "--version"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip().partition("\n")[0]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--parts", default=",".join(PARTS), help="of " + ",".join(PARTS))
    parser.add_argument("--only", default="", help="regular expression: contenders of the live frames")
    parser.add_argument("--record", action="store_true", help="only measure the sizes, and make them the baseline")
    return parser.parse_args()


def main() -> int:
    """Exit code 0 when it ran to its end, whatever it found; 69 when the kernel or a tool refused."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: everything is removed on the way out
    arguments = _arguments()
    parts = tuple(arguments.parts.split(","))
    if unknown := set(parts) - set(PARTS):
        print(f"--parts: expected some of {', '.join(PARTS)}, found {', '.join(sorted(unknown))}", file=sys.stderr)
        return 64
    if os.geteuid():
        print("the benchmark loads kernel programs and makes network namespaces: run it as root", file=sys.stderr)
        return 69
    began = time.monotonic()

    def say(what: str) -> None:
        print(f"[{time.monotonic() - began:5.1f} s] {what}", file=sys.stderr)

    try:
        if arguments.record:
            size.record(size.measure())
            return 0
        result = measure_all(
            parts=parts,
            rounds=max(1, arguments.rounds),
            wanted=lambda name: re.search(arguments.only, name) is not None,
            say=say,
        )
    except EdgeError as error:
        print(f"bench: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    print(json.dumps(report.as_json(result), indent=2) if arguments.json else report.as_text(result))
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
