"""How much mail a real Postfix still takes from honest senders while SYNs are forged as fast as the machine can.

The flood has the last CPU, Postfix, the senders and the daemon have the others. What a forged SYN costs (filter, TCP,
the answer) is paid on the flood's CPU in every case: it takes the place of further SYNs, and honest packets wait for it
in the queue. Each contender has its turn in every round: no flood, then each flood, with the same senders.

Invariants:
    ratios-are-of-one-round: latencies are compared with those of the same turn.
    completed-is-the-mta's-word: not more is counted as completed than Postfix's log says was delivered.
    attempts-are-completed-or-lost: what was begun in a phase has ended, one way or the other, before the phase does.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import which
from typing import Any

from edge.errors import UnavailableError
from edge.lab.mta import postfix_program
from edge.lab.process import wait_for
from tests.bench import honest, mailhost
from tests.bench.forged import CUTS as FLOODS
from tests.bench.forged import ONE_SITE, Generator, flooding
from tests.bench.honest import Crowd, Tally
from tests.bench.mailhost import Seen, Site
from tests.bench.measure import Summary, ratios

METHOD = (
    "Postfix and its senders run on all CPUs but the last, in real time; the flood and all receiving on the last."
    " All packets come through one queue, so what a contender spends on a SYN slows the flood and delays the honest"
    " packets behind it. A transaction is a whole SMTP dialogue from its first SYN to the answer to QUIT, tried once,"
    f" lost after {honest.DEADLINE_S:g} s. Newcomers send from /64s never seen before. All limit a /64 as edge does one"
    " without a record. A sweep spreads over 65,536 /32s: below every limit, so TCP sees it and answers with cookies."
    " Counts and latencies are of all rounds (three at most), ratios of one round each."
)

ROUNDS = 3
PHASE_S = 5.0
"""In which transactions are begun; a phase ends with the last of them."""

QUIET_S = 4.0
"""Time the machine gets for what the contender before left it to do, such as freeing a million entries."""

LOG_S = 10.0
"""Time Postfix gets to log its last deliveries."""

MOMENT_S = 0.25
CALM_SHARE = 0.1
"""Of all CPU time, below which the machine counts as idle."""

HONEST = ("known", "newcomers")
NEIGHBOURS = ("neighbours",)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One run of the senders, and what the host saw meanwhile."""

    tallies: dict[str, Tally]
    seen: Seen
    seconds: float
    sent: int = 0
    """Forged SYNs in `flood_s` seconds."""
    flood_s: float = 0.0

    def tally(self, *crowds: str) -> Tally:
        """Some crowds together."""
        return sum((self.tallies[name] for name in crowds), Tally())

    @property
    def completed(self) -> int:
        """Transactions of everybody."""
        return self.tally(*self.tallies).completed


def of_all(phases: Sequence[Phase], *crowds: str) -> Tally:
    """Some crowds in all rounds together."""
    return sum((phase.tally(*crowds) for phase in phases), Tally())


@dataclass(kw_only=True)
class Served:
    """One contender and one flood, with one phase a round each."""

    contender: str
    flood: str
    quiet: list[Phase] = field(default_factory=list)
    flooded: list[Phase] = field(default_factory=list)

    def slowdown(self, *crowds: str) -> Summary:
        """Median latency under flood / undisturbed."""
        flooded, quiet = ([phase.tally(*crowds).median_s for phase in phases] for phases in (self.flooded, self.quiet))
        return ratios(flooded, quiet)

    def lost_share(self, *crowds: str) -> float:
        """Transactions of all rounds that were not completed under flood."""
        total = of_all(self.flooded, *crowds)
        return 1 - total.completed / total.attempted


class Contest:
    """All contenders in front of one Postfix."""

    def __init__(self, site: Site, crowds: tuple[Crowd, ...], cpu: int, *, seconds: float, quiet_s: float) -> None:
        self._site, self._crowds, self._cpu = site, crowds, cpu
        self._seconds, self._quiet_s = seconds, quiet_s
        self._generators = {flood: Generator(flood, site.net.client) for flood in FLOODS}
        self._limiters = mailhost.limiters()
        chosen = [name for name, (_, needs) in self._limiters.items() if not needs or which(needs)]
        self.left_out = [
            f"{name}: {needs} is missing" for name, (_, needs) in self._limiters.items() if name not in chosen
        ]
        self.served = [Served(contender=name, flood=flood) for name in chosen for flood in FLOODS]

    def round(self, number: int, say: Callable[[str], None]) -> int:
        """One turn for each contender, beginning with another one each time; how many transactions were completed."""
        completed = 0
        names = list(dict.fromkeys(one.contender for one in self.served))
        first = number % len(names)
        for name in names[first:] + names[:first]:
            _wait_until_quiet(self._quiet_s)
            with self._limiters[name][0](self._site):
                say(f"mail through {name}, round {number + 1}: no flood")
                quiet = self.phase()
                completed += quiet.completed
                for one in self.served:
                    if one.contender == name:
                        say(f"mail through {name}, round {number + 1}: {one.flood}")
                        one.quiet.append(quiet)
                        one.flooded.append(self.phase(one.flood))
                        completed += one.flooded[-1].completed
            self._site.postfix.check()
        return completed

    def phase(self, flood: str | None = None) -> Phase:
        """The senders, with or without a flood from before their first transaction until after their last."""
        if not flood:
            return self._send()
        with flooding(self._generators[flood], self._site.net.client, self._cpu) as attack:
            phase = self._send()
        return replace(phase, sent=attack.sent, flood_s=attack.seconds)

    def _send(self) -> Phase:
        before, began_s = self._site.seen(), time.monotonic()
        with self._site.senders.entered():
            tallies = asyncio.run(honest.send(self._crowds, self._seconds))
        return Phase(tallies=tallies, seen=self._site.seen() - before, seconds=time.monotonic() - began_s)


def measure(
    rounds: int, *, seconds: float = PHASE_S, quiet_s: float = QUIET_S, say: Callable[[str], None] = lambda _: None
) -> tuple[list[Served], list[str]]:
    """All of it: what was found, and what was left out and why. Call outside of `measure.pinned`."""
    if not postfix_program():
        return [], ["service: Postfix is not installed"]
    crowds = honest.crowds()
    with _apart() as cpu, mailhost.site([route for crowd in crowds for route in crowd.routes], cpu) as site:
        contest = Contest(site, crowds, cpu, seconds=seconds, quiet_s=quiet_s)
        completed = contest.phase().completed  # Postfix starts its processes
        for number in range(rounds):
            completed += contest.round(number, say)
        wait_for(
            lambda: len(site.postfix.arrivals().delivered) >= completed,
            f"{completed} messages in Postfix's log",
            seconds=LOG_S,
        )
    return contest.served, contest.left_out


@contextmanager
def _apart() -> Iterator[int]:
    """This thread, and what it starts, leaves one CPU to the flood (yields its number; with one CPU all share it) and
    goes before whatever else runs on its own: a flood drives that there too, and its latency is not what is asked."""
    before, cpu = os.sched_getaffinity(0), max(os.sched_getaffinity(0))
    policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    os.sched_setaffinity(0, before - {cpu} or before)
    try:
        _in_real_time()
        yield cpu
    finally:
        os.sched_setscheduler(0, policy, parameter)
        os.sched_setaffinity(0, before)


def _in_real_time() -> None:
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(os.sched_get_priority_min(os.SCHED_RR)))
    except PermissionError as error:
        raise UnavailableError(f"real-time scheduling for Postfix and its senders: {error.strerror}") from error


def _wait_until_quiet(seconds: float) -> None:
    """Until the CPUs have been idle for a moment; a machine that never is gets so many seconds."""
    deadline_s, calm = time.monotonic() + seconds, 0
    while calm < 2 and time.monotonic() < deadline_s:
        busy, total = _cpu_ticks()
        time.sleep(MOMENT_S)
        now_busy, now_total = _cpu_ticks()
        calm = calm + 1 if now_busy - busy < CALM_SHARE * (now_total - total) else 0


def _cpu_ticks() -> tuple[int, int]:
    """Of all CPUs together: busy, and all."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # idle, iowait: proc(5)


def as_json(one: Served) -> dict[str, Any]:
    """Plain values, one a round; latencies in milliseconds."""
    return {
        "contender": one.contender,
        "flood": one.flood,
        "undisturbed": [_phase(phase) for phase in one.quiet],
        "under_flood": [_phase(phase) for phase in one.flooded],
    }


def _phase(phase: Phase) -> dict[str, Any]:
    return {
        "seconds": phase.seconds,
        "forged_sent": phase.sent,
        "forged_seconds": phase.flood_s,
        "frames_arrived": phase.seen.frames,
        "tcp_segments": phase.seen.segments,
        "syn_cookies": phase.seen.cookies,
        "senders": {
            name: {
                "attempted": tally.attempted,
                "completed": tally.completed,
                "lost_at": dict(tally.lost),
                "latency_ms": [round(latency * 1e3, 3) for latency in tally.latency_s],
            }
            for name, tally in phase.tallies.items()
        },
    }


def table(served: Sequence[Served]) -> Iterator[str]:
    """One line for each contender, flood and kind of sender."""
    yield (
        "| contender | flood | senders | completed: undisturbed | under flood | of newcomers"
        " | ms a transaction: undisturbed | under flood | ratio of medians | SYNs sent / to TCP, thousand/s |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for one in served:
        yield _row(one, "honest", HONEST)
        if one.flood == ONE_SITE:
            yield _row(one, "honest, in that /48", NEIGHBOURS)


def _row(one: Served, who: str, crowds: tuple[str, ...]) -> str:
    quiet, flooded = of_all(one.quiet, *crowds), of_all(one.flooded, *crowds)
    ratio = one.slowdown(*crowds)
    newcomers = of_all(one.flooded, "newcomers")
    cells = (
        one.contender,
        one.flood,
        who,
        _share(quiet),
        f"**{_share(flooded)}**",
        _share(newcomers) if crowds == HONEST else "",
        _latency(quiet),
        _latency(flooded),
        f"{ratio.low:.2f} / **{ratio.median:.2f}** / {ratio.high:.2f}",
        f"{_rate(sum(x.sent for x in one.flooded), sum(x.flood_s for x in one.flooded))} / "
        f"{_rate(sum(x.seen.segments for x in one.flooded), sum(x.seconds for x in one.flooded))}",
    )
    return f"| {' | '.join(cells)} |"


def _share(tally: Tally) -> str:
    return f"{tally.completed} of {tally.attempted} ({tally.completed / tally.attempted:.1%})"


def _latency(tally: Tally) -> str:
    if not tally.latency_s:
        return "none"
    found = Summary.of([latency * 1e3 for latency in tally.latency_s])
    return f"{found.low:.1f} / {found.median:.1f} / {found.high:.1f}"


def _rate(count: int, seconds: float) -> str:
    return f"{count / seconds / 1e3:.0f}"
