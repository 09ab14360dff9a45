"""What the measurements have to show, each said with its bound and whether it holds here.

A claim about two costs is about their ratio inside one round; it holds when the median of the rounds is within the
bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.bench import cost
from tests.bench.cost import Run
from tests.bench.flood import FEW, LISTED, MANY, NEW, Contender
from tests.bench.measure import Summary, ratios
from tests.bench.packets import NOT_OURS
from tests.bench.reading import Reading
from tests.bench.service import HONEST, Served
from tests.bench.starting import Starting

NOT_OURS_BOUND = 1.3
FEW_BOUNDS = {"nft meter, input": 0.35, "hashlimit, raw": 0.6}
MANY_BOUNDS = {"nft meter, input": 0.5, "hashlimit, raw": 0.7}
BLOCKED_BOUND = 0.35
SWEEP_BOUND = 1.3
READING_BOUND_MS = 50.0
START_BOUND_S, RESTART_BOUND_S = 2.0, 0.5
LOST_BOUND_PERCENT = 1.0
SLOWDOWN_BOUND = 2.0


@dataclass(frozen=True)
class Claim:
    """One bound and what was found."""

    text: str
    bound: float
    found: Summary
    unit: str = ""

    @property
    def holds(self) -> bool:
        return self.found.median <= self.bound


def of_runs(runs: Sequence[Run]) -> Iterator[Claim]:
    """Traffic that is not ours, in BPF_PROG_TEST_RUN."""
    by_name = {(run.program, run.case): run.ns for run in runs}
    for case in NOT_OURS:
        ours, parse = by_name.get((cost.EDGE, case)), by_name.get((cost.PARSE, case))
        if ours and parse:
            yield Claim(f"{case}: / parse only, test run", NOT_OURS_BOUND, ratios(ours, parse))


def of_frames(contenders: Sequence[Contender]) -> Iterator[Claim]:
    """Live frames; pairs of which one was left out are left out."""
    by_name = {(one.name, one.sources): one.ns for one in contenders}

    def claim(ours: tuple[str, int], theirs: tuple[str, int], bound: float) -> Iterator[Claim]:
        if by_name.get(ours) and by_name.get(theirs):
            text = f"{label(*ours)} / {label(*theirs)}"
            yield Claim(text, bound, ratios(by_name[ours], by_name[theirs]))

    yield from claim(("edge: not ours", MANY), ("parse only", MANY), NOT_OURS_BOUND)
    for sources, bounds in ((FEW, FEW_BOUNDS), (MANY, MANY_BOUNDS)):
        for ours in ("edge: admitted", "edge: limited"):
            for theirs, bound in bounds.items():
                yield from claim((ours, sources), (theirs, sources), bound)
    for sources in (FEW, LISTED):
        yield from claim(("edge: blocked", sources), ("nft five block sets", sources), BLOCKED_BOUND)
    yield from claim(("edge: sweep, a million live", NEW), ("edge: admitted", MANY), SWEEP_BOUND)
    yield from claim(("edge: sweep, many /32", NEW), ("edge: admitted, many /32", MANY), SWEEP_BOUND)


def of_readings(readings: Sequence[Reading]) -> Iterator[Claim]:
    """The tick's reading."""
    for one in readings:
        text = f"reading {one.live:,} live rows, {one.senders:,} senders known, {one.changed:,} changed"
        yield Claim(text, READING_BOUND_MS, Summary.of(one.total_ms), " ms")


def of_starting(found: Starting | None) -> Iterator[Claim]:
    """From `edge run` to the first tick."""
    if found is not None:
        yield Claim("first start until it ticks", START_BOUND_S, Summary.of(found.start_s), " s")
        yield Claim("restart with an unchanged program", RESTART_BOUND_S, Summary.of(found.restart_s), " s")


def of_service(served: Sequence[Served]) -> Iterator[Claim]:
    """Honest mail through edge under a flood. What was lost is lost: of all rounds together, not their median."""
    for one in served:
        if one.contender == "edge":
            lost = 100 * one.lost_share(*HONEST)
            text = f"edge, flood {one.flood}: honest transactions"
            yield Claim(f"{text} not completed, all rounds", LOST_BOUND_PERCENT, Summary(lost, lost, lost), " %")
            yield Claim(f"{text}, median latency / undisturbed", SLOWDOWN_BOUND, one.slowdown(*HONEST))


def label(name: str, sources: int) -> str:
    """A contender as a reader calls it."""
    return name if sources == NEW else f"{name} ({sources:,})"
