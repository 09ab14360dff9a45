"""Honest senders: complete SMTP transactions at a steady pace, whatever becomes of the ones before (an open loop).

Three crowds send at once. The known ones have sent before; each newcomer sends once, from a /64 nobody has seen; the
neighbours live in the /48 that one of the floods forges. None of them comes near a limit of its own, and all together
use a small part of one CPU.

Invariants:
    every-transaction-counts-once: what was begun is completed or lost, and nothing is tried again.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from edge.lab import plan
from edge.lab.smtp import Dialogue, NotServedError, dial

DEADLINE_S = 5.0
"""Of a whole transaction: Linux repeats a lost SYN after 1 and 3 s, and a sender waits longer than that."""

SITE = 0x2001_0DB8_F100
"""The /48 that is forged, and in which the neighbours live."""

KNOWN, NEIGHBOURS = 199, 13
"""Senders of each crowd."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """Senders that take turns; `routes` hold all of their addresses."""

    name: str
    a_second: float
    offset_s: float
    """Of its first transaction, so that no two crowds begin one at the same moment."""
    sources: Iterator[str]
    routes: tuple[str, ...]


def crowds() -> tuple[Crowd, ...]:
    """The three of them, from the beginning. 40 transactions a second in all: Postfix takes some 400 on one CPU."""
    neighbours = [f"{SITE >> 32:x}:{SITE >> 16 & 0xFFFF:x}:{SITE & 0xFFFF:x}:{991 * n:x}" for n in range(NEIGHBOURS)]
    return (
        Crowd(
            name="known",
            a_second=20.0,
            offset_s=0.0,
            sources=itertools.cycle([f"2001:db8:{0x1000 + n:x}:{n:x}::25" for n in range(KNOWN)]),
            routes=("2001:db8:1000::/36",),
        ),
        Crowd(
            name="newcomers",
            a_second=10.0,
            offset_s=0.025,
            sources=(f"2001:db8:{0x8000 + (n >> 4 & 0x3FFF):x}:{n & 15:x}::25" for n in itertools.count()),
            routes=("2001:db8:8000::/34",),
        ),
        Crowd(
            name="neighbours",
            a_second=10.0,
            offset_s=0.075,
            sources=itertools.cycle([f"{prefix}::25" for prefix in neighbours]),
            routes=tuple(f"{prefix}::/64" for prefix in neighbours),
        ),
    )


@dataclass(slots=True)
class Tally:
    """What became of the transactions of one crowd in one phase."""

    attempted: int = 0
    latency_s: list[float] = field(default_factory=list)
    """Of the completed ones, from the first SYN to the answer to QUIT."""
    lost: Counter[str] = field(default_factory=Counter)
    """The others, by the step at which they ended."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.attempted + other.attempted, self.latency_s + other.latency_s, self.lost + other.lost)

    @property
    def completed(self) -> int:
        return len(self.latency_s)

    @property
    def median_s(self) -> float:
        """Of the completed ones; the deadline where there is none."""
        return statistics.median(self.latency_s) if self.latency_s else DEADLINE_S


async def send(everyone: tuple[Crowd, ...], seconds: float) -> dict[str, Tally]:
    """All crowds for so long; returns when the last transaction has ended. Call inside the senders' namespace."""
    tallies = {crowd.name: Tally() for crowd in everyone}
    began_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for crowd in everyone:
            group.create_task(_keep_pace(crowd, began_s, seconds, tallies[crowd.name], group))
    return tallies


async def _keep_pace(crowd: Crowd, began_s: float, seconds: float, tally: Tally, group: asyncio.TaskGroup) -> None:
    """Begin a transaction whenever one is due."""
    for number in range(max(1, int(seconds * crowd.a_second))):
        await asyncio.sleep(max(0.0, began_s + crowd.offset_s + number / crowd.a_second - time.monotonic()))
        tally.attempted += 1
        identity = f"<{time.monotonic_ns()}.{crowd.name}@sender.example>"
        group.create_task(_transaction(next(crowd.sources), identity, tally))


async def _transaction(source: str, identity: str, tally: Tally) -> None:
    """One transaction, counted as completed or lost."""
    began_s = time.monotonic()
    steps = ["connection"]
    try:
        async with asyncio.timeout(DEADLINE_S), dial(source, timeout_s=DEADLINE_S) as (dialogue, _):
            await _deliver(dialogue, identity, steps)
    except (NotServedError, TimeoutError):
        tally.lost[steps[-1]] += 1
    else:
        tally.latency_s.append(time.monotonic() - began_s)


async def _deliver(dialogue: Dialogue, identity: str, steps: list[str]) -> None:
    """The dialogue after the greeting; NotServedError when an answer is not the expected one."""
    message = ("From: <post@sender.example>", f"Message-ID: {identity}", "Subject: as agreed", "", "Some text.", ".")
    for name, line, expected in (
        ("EHLO", "EHLO sender.example", 250),
        ("MAIL", "MAIL FROM:<post@sender.example>", 250),
        ("RCPT", f"RCPT TO:<{plan.USERS[0]}@{plan.DOMAIN}>", 250),
        ("DATA", "DATA", 354),
        ("message", "\r\n".join(message), 250),
        ("QUIT", "QUIT", 221),
    ):
        steps.append(name)
        if (code := await dialogue.say(line)) != expected:
            raise NotServedError(f"{name}: expected {expected}, found {code}")
