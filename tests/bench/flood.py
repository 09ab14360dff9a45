"""Live frames over veth: our program and the alternatives on the same packets, each in a lane of its own.

A generator program writes every frame anew and redirects it into the lane; the receiving side runs in the same
thread's softirq. The cost is that of sending, of the veth and of the contender together: the ratio to an empty XDP
program in the same round says what the contender adds, and nothing is subtracted.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from shutil import which

import numpy as np

from edge.abi import Standing
from edge.core.prefix import Prefix
from edge.kernel import libbpf
from tests.bench import peers
from tests.bench.limiter import (
    BRIEF_NS,
    EVERY_SOURCE,
    HERE,
    NEXT,
    RANDOM,
    SIZES,
    STEERING,
    ZERO,
    Limiter,
    blocks,
    entry,
    load,
    source_hi,
    source_lo,
    steering_map,
)
from tests.bench.measure import Softirq, live
from tests.bench.network import Arena, Lane
from tests.bench.packets import SYN, syn

FEW, MANY, LISTED, NEW = 1_000, 1_000_000, 100_000, 0
REFERENCE = "empty XDP program"
LEAST_FRAMES, MOST_FRAMES = 20_000, 1_000_000
"""Of one turn."""

WARM = 20_000
"""Frames before each timed turn, so that it begins with caches of its own."""


Setup = Callable[[Lane], peers.Counts]
"""Puts a contender into its lane; returns what asks it for its decisions."""


@dataclass
class Contender:
    """One line of the table. `sources`: how many prefixes send at random; 0: each frame comes from a new one."""

    name: str
    sources: int
    setup: Setup
    spread: bool = False
    dport: int = 25
    fill: int = 0
    """Sources that are sent once before the first round, so that all are known."""
    needs: tuple[str, ...] = ()

    """Programs without which it is left out."""

    lane: Lane | None = None
    counts: peers.Counts = dict
    frames: int = 0
    sent: int = 0
    arrived: int = 0
    decided: dict[str, int] = field(default_factory=dict)
    ns: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    """Cost of the reference just before, by round."""


class Generator:
    """The sending program."""

    def __init__(self) -> None:
        text = "#include <uapi/linux/bpf.h>\n" + "".join(
            (HERE / name).read_text() + "\n" for name in ("steer.h", "generator.c")
        )
        self._bpf, self.programs = load(text, [], ("generate", "drop"))
        self._steering = steering_map(self._bpf)
        self._next = 0

    def send(self, lane: Lane, contender: Contender, count: int, softirq: Softirq, *, all_once: bool = False) -> float:
        """CPU nanoseconds a frame."""
        record = np.zeros((), STEERING)
        frame = SYN if contender.dport == 25 else syn(contender.dport)
        record["frame"][: len(frame)] = np.frombuffer(frame, np.uint8)
        record["sources"] = contender.sources or EVERY_SOURCE
        record["spread"] = contender.spread
        if all_once:
            record["order"] = NEXT
        elif contender.sources:
            record["order"] = RANDOM
        else:
            record["order"], record["next"] = NEXT, MANY + self._next
            self._next += count
        record["ifindex"] = lane.index()
        self._steering.put(ZERO, record)
        with lane.sender.entered():
            return live(self.programs["generate"], frame, count, softirq)


class Ours:
    """Our program in the states that are measured. Holds the links: what it attached goes with it."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._links: list[libbpf.Fd] = []

    def attached(self, program: int) -> Setup:
        """Any XDP program."""

        def setup(lane: Lane) -> peers.Counts:
            self._links.append(lane.attach(program))
            return dict

        return setup

    def limiter(self, *steps: Callable[[Limiter], None]) -> Setup:
        """An instance of the limiter that has been through these steps."""

        def setup(lane: Lane) -> peers.Counts:
            limiter = Limiter(self._text, SIZES)
            for step in steps:
                step(limiter)
            self._links.append(lane.attach(limiter.programs["bench_drop"]))
            before = Counter(limiter.counts())
            return lambda: dict(Counter(limiter.counts()) - before)

        return setup


def known(count: int, *, spread: bool = False) -> Callable[[Limiter], None]:
    """So many prefixes have live rows at every level; all are admitted."""
    return lambda limiter: limiter.fill(count, spread=spread)


def sweeping(limiter: Limiter) -> None:
    """New rows live as long as the default makes them; what is live stays."""
    limiter.admit_all(BRIEF_NS)


def listed(limiter: Limiter) -> None:
    """Entries at every level, met by no source."""
    limiter.install([entry(Prefix(source_hi(n) ^ 1 << 63, 0, 64), Standing.BLOCK) for n in range(LISTED)] + blocks(0))


def suspected(limiter: Limiter) -> None:
    """An entry at /128 for each of a few sources, so that all five levels have a row."""
    limiter.install([entry(Prefix(source_hi(n), source_lo(n), 128), Standing.SUSPECT) for n in range(FEW)])


def our_contenders(ours: Ours) -> Iterator[Contender]:
    """The lines of our own program."""

    def blocking(count: int) -> Setup:
        return ours.limiter(lambda limiter: limiter.install(blocks(count)))

    few, many, spread = known(FEW), known(MANY), known(MANY, spread=True)
    yield Contender("edge: not ours", MANY, ours.limiter(few), dport=26)
    yield Contender("edge: admitted", FEW, ours.limiter(few))
    yield Contender("edge: admitted, /128 entries", FEW, ours.limiter(suspected, few))
    yield Contender("edge: admitted, 100k entries", FEW, ours.limiter(few, listed))
    yield Contender("edge: admitted", MANY, ours.limiter(many))
    yield Contender("edge: admitted, many /32", MANY, ours.limiter(spread), spread=True)
    yield Contender("edge: limited", FEW, ours.limiter(few, Limiter.limit_at_64))
    yield Contender("edge: limited", MANY, ours.limiter(many, Limiter.limit_at_64))
    yield Contender("edge: blocked", FEW, blocking(FEW))
    yield Contender("edge: blocked", LISTED, blocking(LISTED))
    yield Contender("edge: sweep, none live", NEW, ours.limiter(sweeping))
    yield Contender("edge: sweep, a million live", NEW, ours.limiter(many, sweeping))
    yield Contender("edge: sweep, many /32", NEW, ours.limiter(spread, sweeping), spread=True)


def other_contenders() -> Iterator[Contender]:
    """What else there is, as far as it is installed."""
    for hook in ("ingress", "input"):
        for sources in (FEW, MANY, NEW):
            setup = functools.partial(peers.nft_meter, hook=hook)
            yield Contender(f"nft meter, {hook}", sources, setup, fill=sources, needs=("nft", "ethtool"))
    for sources in (FEW, LISTED):
        for name, make in (("nft five block sets", peers.nft_block_sets), ("nft table of edge", peers.nft_own_table)):
            yield Contender(name, sources, functools.partial(make, count=sources), needs=("nft", "ethtool"))
    for sources in (FEW, MANY, NEW):
        yield Contender("hashlimit, raw", sources, peers.hashlimit, fill=sources, needs=("ip6tables", "ethtool"))
    needs = ("ip6tables", "ipset", "ethtool")
    yield Contender("ipset, raw", LISTED, functools.partial(peers.ipset, count=LISTED), needs=needs)
    yield Contender("xdp-filter", FEW, functools.partial(peers.xdp_filter, count=FEW), needs=("xdp-filter",))


class Race:
    """All contenders in one arena."""

    def __init__(self, arena: Arena, text: str, softirq: Softirq, wanted: Callable[[str], bool]) -> None:
        self._softirq = softirq
        self._generator = Generator()
        self._ours = Ours(text)
        self._plain = Limiter(text, names=("bench_parse_drop",))
        self._reference = Contender(
            REFERENCE, MANY, self._ours.attached(self._generator.programs["drop"]), lane=arena.lane()
        )
        parse = Contender("parse only", MANY, self._ours.attached(self._plain.programs["bench_parse_drop"]))
        everyone = [parse, *our_contenders(self._ours), *other_contenders()]
        chosen = [one for one in everyone if wanted(one.name)]
        self.left_out = sorted({f"{c.name}: {n} is not installed" for c in chosen for n in c.needs if not which(n)})
        self.contenders = [one for one in chosen if all(which(name) for name in one.needs)]
        self._arena = arena

    def prepare(self, turn_s: float, say: Callable[[str], None]) -> None:
        """Set all up, make their prefixes known, and find how many frames fill a turn."""
        assert self._reference.lane is not None
        self._reference.setup(self._reference.lane)
        self._reference.frames = WARM
        for one in self.contenders:
            say(f"setting up {one.name} ({one.sources or 'new'})")
            one.lane = one.lane or self._arena.lane()
            one.counts = one.setup(one.lane)
            if one.fill:
                self._send(one, one.fill, all_once=True)
            ns = self._send(one, WARM)
            one.frames = min(MOST_FRAMES, max(LEAST_FRAMES, int(turn_s * 1e9 / ns)))

    def round(self, number: int) -> None:
        """One turn for each, beginning with another one each time; the reference runs before each."""
        order = self.contenders[number % len(self.contenders) :] + self.contenders[: number % len(self.contenders)]
        for one in order:
            one.reference.append(self._send(self._reference, self._reference_frames(one)))
            self._send(one, WARM)
            one.ns.append(self._send(one, one.frames))

    def finish(self) -> None:
        """Read what arrived and what was decided."""
        for one in self.contenders:
            assert one.lane is not None
            one.arrived, one.decided = one.lane.received(), one.counts()

    def _reference_frames(self, one: Contender) -> int:
        return min(one.frames, 10 * WARM)

    def _send(self, one: Contender, count: int, *, all_once: bool = False) -> float:
        assert one.lane is not None
        one.sent += count
        return self._generator.send(one.lane, one, count, self._softirq, all_once=all_once)
