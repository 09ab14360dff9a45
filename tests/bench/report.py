"""The result as tables for a reader (Markdown, as in the README) and as one JSON object."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec

from tests.bench import claims, service
from tests.bench.claims import Claim
from tests.bench.cost import Run
from tests.bench.flood import NEW, REFERENCE, Contender
from tests.bench.measure import Summary, ratios
from tests.bench.reading import Reading
from tests.bench.service import Served
from tests.bench.size import Size
from tests.bench.starting import Starting

METHOD = (
    "CPU time of one pinned thread, interleaved rounds, min / median / max over the rounds; ratios are taken inside a"
    " round. Live frames: 94-byte SYNs written and redirected into a veth by an XDP generator; sending, veth and"
    " contender are one cost, nothing is subtracted; whatever admits ends in a drop. A round's reference is an empty"
    " XDP program that drops. Sources are /64s inside one /32 unless a line says otherwise."
)


@dataclass(kw_only=True)
class Result:
    """Everything one run of the benchmark found; parts that were not asked for are empty."""

    machine: dict[str, Any]
    rounds: int
    runs: list[Run] = field(default_factory=list)
    phases: list[Run] = field(default_factory=list)
    contenders: list[Contender] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    service: list[Served] = field(default_factory=list)
    starting: Starting | None = None
    size: Size | None = None
    growth: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def claims(self) -> list[Claim]:
        """Each bound that can be judged from what was measured."""
        return [
            *claims.of_runs(self.runs),
            *claims.of_frames(self.contenders),
            *claims.of_readings(self.readings),
            *claims.of_starting(self.starting),
            *claims.of_service(self.service),
        ]


def as_json(result: Result) -> dict[str, Any]:
    """Plain values; costs in nanoseconds, one a round."""
    return {
        "machine": result.machine,
        "method": METHOD,
        "rounds": result.rounds,
        "test_run": [_run(one) for one in result.runs],
        "phases": [_run(one) for one in result.phases],
        "live_frames": [_contender(one) for one in result.contenders],
        "reading": [{**asdict(one), "bcc_scaled_ms": one.bcc_scaled_ms} for one in result.readings],
        "starting": asdict(result.starting) if result.starting else None,
        "service": [service.as_json(one) for one in result.service],
        "size": msgspec.to_builtins(result.size) if result.size else None,
        "growth": result.growth,
        "left_out": result.left_out,
        "claims": [
            {"claim": one.text, "bound": one.bound, "holds": one.holds, "found": asdict(one.found)}
            for one in result.claims()
        ],
    }


def _run(one: Run) -> dict[str, Any]:
    return {"program": one.program, "case": one.case, "prefixes": one.sources, "ns": one.ns}


def _contender(one: Contender) -> dict[str, Any]:
    return {
        "name": one.name,
        "prefixes": one.sources,
        "ns": one.ns,
        "reference_ns": one.reference,
        "ratio": asdict(ratios(one.ns, one.reference)),
        "frames_a_turn": one.frames,
        "sent": one.sent,
        "arrived": one.arrived,
        "decided": one.decided,
    }


def as_text(result: Result) -> str:
    """The tables."""
    return "\n".join(_text(result))


def _text(result: Result) -> Iterator[str]:
    yield from (f"{name}: {value}" for name, value in result.machine.items())
    yield f"method: {METHOD} {result.rounds} rounds."
    yield from (f"left out: {what}" for what in result.left_out)
    if result.contenders:
        yield "\n## Live frames over veth\n"
        yield from _frames(result.contenders)
    if result.runs:
        yield "\n## BPF_PROG_TEST_RUN\n"
        yield from _runs(result.runs)
    if result.phases:
        yield "\n## Where the time goes (BPF_PROG_TEST_RUN, source written each run)\n"
        yield from _runs(result.phases)
    if result.readings:
        yield "\n## A tick's reading\n"
        yield from _readings(result.readings)
    if result.starting:
        yield "\n## Until it ticks\n"
        yield from _starting(result.starting)
    if result.service:
        yield "\n## Mail that is still served under a flood\n"
        yield service.METHOD + "\n"
        yield from service.table(result.service)
    if result.size:
        yield "\n## Size\n"
        yield from _size(result.size)
        yield from (f"GROWN: {problem}" for problem in result.growth)
    found = result.claims()
    if found:
        yield "\n## Bounds\n"
        yield "| claim | bound | found: min / median / max | |"
        yield "|---|---|---|---|"
        for one in found:
            values = f"{one.found.low:.2f} / **{one.found.median:.2f}** / {one.found.high:.2f}{one.unit}"
            verdict = "holds" if one.holds else "**does not hold**"
            yield f"| {one.text} | {one.bound:g}{one.unit} | {values} | {verdict} |"


def _ns(values: Sequence[float]) -> str:
    found = Summary.of(values)
    return f"{found.low:.0f} / {found.median:.0f} / {found.high:.0f}"


def _prefixes(sources: int) -> str:
    return "each new" if sources == NEW else f"{sources:,}"


def _frames(contenders: Sequence[Contender]) -> Iterator[str]:
    yield f"| contender | prefixes | ns a frame: min / median / max | ratio to {REFERENCE} | arrived | decided |"
    yield "|---|---|---|---|---|---|"
    for one in contenders:
        ratio = ratios(one.ns, one.reference)
        decided = ", ".join(_shares(one))
        yield (
            f"| {one.name} | {_prefixes(one.sources)} | {_ns(one.ns)} |"
            f" {ratio.low:.2f} / {ratio.median:.2f} / {ratio.high:.2f} | {one.arrived / one.sent:.1%} | {decided} |"
        )
    everything = [ns for one in contenders for ns in one.reference]
    yield f"| {REFERENCE}, before each turn | | {_ns(everything)} | 1 | | |"


def _shares(one: Contender) -> Iterator[str]:
    """What became of the frames, by the contender's own counters, where it has some."""
    counted = dict(one.decided)
    if counted:
        counted["dropped for want of room"] = max(0, one.arrived - sum(counted.values()))
    for word, count in counted.items():
        if count > one.arrived / 1000:
            yield f"{word} {count / one.arrived:.1%}"


def _runs(runs: Sequence[Run]) -> Iterator[str]:
    yield "| program | case | prefixes | ns a run: min / median / max |"
    yield "|---|---|---|---|"
    for one in runs:
        yield f"| {one.program} | {one.case} | {_prefixes(one.sources)} | {_ns(one.ns)} |"


def _readings(readings: Sequence[Reading]) -> Iterator[str]:
    yield "| live /64 rows | senders known | changed | read, ms | delta, ms | bcc items(), ms, scaled to the rows |"
    yield "|---|---|---|---|---|---|"
    for one in readings:
        parts = [one.read_ms, one.delta_ms, one.bcc_scaled_ms]
        cells = [f"{s.low:.1f} / {s.median:.1f} / {s.high:.1f}" for s in map(Summary.of, parts)]
        counts = f"{one.live:,} | {one.senders:,} | {one.changed:,}"
        yield f"| {counts} | {' | '.join(cells)} (from {one.bcc_entries:,}) |"


def _starting(starting: Starting) -> Iterator[str]:
    yield "| start | s: min / median / max |"
    yield "|---|---|"
    for name, values in (("first, compiles", starting.start_s), ("again, unchanged program", starting.restart_s)):
        found = Summary.of(values)
        yield f"| {name} | {found.low:.2f} / {found.median:.2f} / {found.high:.2f} |"


def _size(size: Size) -> Iterator[str]:
    yield "| program | verified instructions | bytes: xlated / jited / stack |"
    yield "|---|---|---|"
    for name, one in size.programs.items():
        yield f"| {name} | {one.verified_instructions:,} | {one.xlated_bytes} / {one.jited_bytes} / {one.stack_bytes} |"
    most = sorted(size.map_bytes.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name} {count / 2**20:.1f}" for name, count in most)
    yield f"\nMap memory with default sizes: {sum(size.map_bytes.values()) / 2**20:.1f} MiB ({parts})."
