"""BPF_PROG_TEST_RUN: what a run of the program costs without any network around it, and where the time goes.

One packet again and again is always in the cache; for many prefixes the program is run through an entry point that
gives each run another source, and beside it a parser behind the same entry point. The frame that the kernel puts
around each run (an empty program) is included everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tests.bench.flood import FEW, MANY, NEW, known, listed, sweeping
from tests.bench.limiter import EVERY_SOURCE, FIXED, NEXT, PLAIN, RANDOM, Limiter, blocks, cut
from tests.bench.measure import repeat
from tests.bench.packets import NOT_OURS, SYN

EMPTY, PARSE, EDGE = "empty", "parse only", "edge"
MX = "SYN to port 25"


@dataclass
class Run:
    """One program on one packet, or on the sources of `limiter`."""

    program: str
    case: str
    sources: int
    descriptor: int
    packet: bytes
    limiter: Limiter | None = None
    ns: list[float] = field(default_factory=list)

    def turn(self, count: int) -> None:
        """One turn of a round."""
        if self.limiter:
            order = RANDOM if self.sources else NEXT
            self.limiter.steer(FIXED if self.sources == 1 else order, self.sources or EVERY_SOURCE, start=self._start)
        self._start += count
        self.ns.append(repeat(self.descriptor, self.packet, count))

    _start: int = MANY


def runs(text: str) -> Iterator[Run]:
    """Every case: the program itself on one packet, then through the steering entry point."""
    plain = Limiter(text, names=("edge_xdp", *PLAIN))
    plain.limits({}, {})
    for case, packet in NOT_OURS.items():
        yield Run(EMPTY, case, 1, plain.programs["bench_empty"], packet)
        yield Run(PARSE, case, 1, plain.programs["bench_parse"], packet)
        yield Run(EDGE, case, 1, plain.programs["edge_xdp"], packet)
    yield Run(EMPTY, MX, 1, plain.programs["bench_empty"], SYN)
    yield Run(PARSE, MX, 1, plain.programs["bench_parse"], SYN)
    for sources in (1, FEW, MANY, NEW):
        yield Run(PARSE, "steered", sources, plain.programs["bench_parse_steered"], SYN, plain)
    states = {
        "admitted": ((1, FEW, MANY), [known(MANY)]),
        "limited": ((1, FEW, MANY), [known(MANY), Limiter.limit_at_64]),
        "blocked": ((1, FEW), [lambda limiter: limiter.install(blocks(FEW))]),
        "admitted, 100k entries": ((1, FEW), [known(FEW), listed]),
        "sweep": ((NEW,), [known(MANY), sweeping]),
    }
    for case, (counts, steps) in states.items():
        limiter = Limiter(text)
        for step in steps:
            step(limiter)
        for sources in counts:
            yield Run(EDGE, case, sources, limiter.programs["bench_limiter"], SYN, limiter)


CUTS = (
    ("charge", r"if \(charge\(.*\)\)$", "if (1)"),
    ("ask", r"refused = ask\(.*\);$", "refused = LEVELS; working->found.asked = 0;"),
    ("rows", r"refused = find_rows\(.*\);$", "refused = LEVELS;"),
    ("prepare", r"out->reason = limit_rate\(.*\);$", "out->reason = REASON_CONFORMING;"),
    ("policy", r"^\tmatch_policy\(.*\);$", ""),
    ("judge", r"parsed == PARSED_SYN \? judge\(.*\) : parsed;$", "parsed == PARSED_SYN ? REASON_CONFORMING : parsed;"),
)
"""Steps from the last to the first, and how each is taken out of the text of bpf/edge_xdp.c."""


def phases(text: str) -> Iterator[Run]:
    """The program with ever fewer of its steps, each on one source, a few and many: the difference between two lines
    is what the step costs."""
    for left in range(len(CUTS) + 1):
        shorter = cut(text, ((pattern, replacement) for _, pattern, replacement in CUTS[:left]))
        limiter = Limiter(shorter)
        known(MANY)(limiter)
        name = "whole" if not left else f"without {', '.join(name for name, _, _ in CUTS[:left][::-1])}"
        for sources in (1, FEW, MANY):
            yield Run(EDGE, name, sources, limiter.programs["bench_limiter"], SYN, limiter)


def measure(found: Iterable[Run], rounds: int, count: int) -> list[Run]:
    """Interleaved rounds; a warm-up round is thrown away."""
    chosen = list(found)
    for number in range(rounds + 1):
        for one in chosen[number % len(chosen) :] + chosen[: number % len(chosen)]:
            one.turn(count)
    for one in chosen:
        del one.ns[0]
    return chosen
