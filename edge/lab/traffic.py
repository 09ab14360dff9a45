"""Sends the plan: honest senders that retry like mail servers do, campaigns that do not, and the forger.

Everything runs in one event loop inside the client namespace. Times are CLOCK_MONOTONIC seconds.

Invariants:
    every-message-is-tried-until-delivered: an honest sender gives a message up only on a permanent refusal or when the
        run is over.
    attempts-are-counted-once: each connection a campaign begins is one attempt, whatever becomes of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from dataclasses import dataclass, field

from edge.core.model import Verdict
from edge.lab import plan
from edge.lab.forge import Forger
from edge.lab.plan import Campaign, Sender, Style
from edge.lab.smtp import Dialogue, NotServedError, dial

HONEST_CONNECT_S = 4.0
"""Time an honest sender waits for a connection: long enough for the kernel to repeat a lost SYN after 1 and 3 s."""

ABUSE_CONNECT_S = 1.5
"""Time an attacker waits: bots do not. Long enough for one repeated SYN."""

BACKOFF_S = (1.0, 2.0, 3.0, 5.0)
"""Pauses between an honest sender's tries, the last for ever; minutes with a real MTA, shortened to fit the run."""

GRACE_S = 25.0
"""Time after the end of sending in which honest senders may still retry."""

MAX_OPEN = 1511
"""Open connections of one campaign: more than rate times connect time, so that it never slows the plan down."""

_PACE_S = 0.02


@dataclass(slots=True)
class SenderRun:
    """What became of an honest sender's messages."""

    sender: Sender
    messages: list[str] = field(default_factory=list)  # message ids, in the order they were begun
    accepted: dict[str, float] = field(default_factory=dict)  # when the final dot was answered 250
    refused: dict[str, str] = field(default_factory=dict)  # permanently, with the reply
    retries: int = 0


@dataclass(slots=True)
class Attempt:
    """One connection of a campaign."""

    source: str
    began_s: float
    connected_s: float | None = None  # reached the MTA: connected and greeted
    verdict: Verdict = Verdict.NONE  # the MTA's first refusal, and when it came
    refused_s: float | None = None


@dataclass(slots=True)
class CampaignRun:
    """What became of a campaign."""

    campaign: Campaign
    attempts: list[Attempt] = field(default_factory=list)
    accepted: int = 0  # messages the MTA took; the plan expects none

    @property
    def reached(self) -> list[Attempt]:
        """The attempts that reached the MTA."""
        return [attempt for attempt in self.attempts if attempt.connected_s is not None]


class Traffic:
    """One run of the plan; counts grow while it runs."""

    def __init__(self, seconds: float, seed: int) -> None:
        self.seconds = seconds
        self.senders = [SenderRun(sender) for sender in plan.SENDERS]
        self.campaigns = [CampaignRun(campaign) for campaign in plan.CAMPAIGNS]
        self.forged = 0
        self.began_s = 0.0
        self._seed = seed

    @property
    def elapsed_s(self) -> float:
        """Seconds since sending began."""
        return time.monotonic() - self.began_s

    def start(self) -> None:
        """Begin the clock."""
        self.began_s = time.monotonic()

    async def run(self) -> None:
        """Send everything; returns when the last honest message is delivered or given up."""
        self.start()
        async with asyncio.TaskGroup() as group:
            for sender in self.senders:
                group.create_task(self._send(sender))
            for campaign in self.campaigns:
                group.create_task(self._attack(campaign))
            group.create_task(self._forge())

    async def _send(self, run: SenderRun) -> None:
        """An honest sender: bursts at its interval, each message a task of its own."""
        rng = random.Random(f"{self._seed}/{run.sender.name}")  # noqa: S311 - a repeatable schedule, not a secret
        await asyncio.sleep(rng.uniform(0, min(run.sender.interval_s, 2.0)))
        numbers = itertools.count(1)
        async with asyncio.TaskGroup() as group:
            while self.elapsed_s < self.seconds:
                for _ in range(run.sender.burst):
                    identity = f"<{run.sender.name}.{next(numbers)}@{run.sender.name}.example>"
                    run.messages.append(identity)
                    group.create_task(deliver(self, run, identity))
                pause = run.sender.interval_s * rng.uniform(0.8, 1.2)
                await asyncio.sleep(min(pause, max(0.0, self.seconds - self.elapsed_s)))

    async def _attack(self, run: CampaignRun) -> None:
        """A campaign: as many attempts as the plan says are due, at most MAX_OPEN at once."""
        sources = run.campaign.addresses(self._seed)
        open_tasks: set[asyncio.Task[None]] = set()
        async with asyncio.TaskGroup() as group:
            while self.elapsed_s < self.seconds:
                due = run.campaign.due(self.elapsed_s)
                while len(run.attempts) < due and len(open_tasks) < MAX_OPEN:
                    fresh = Attempt(next(sources), time.monotonic())
                    run.attempts.append(fresh)
                    task = group.create_task(attempt(run, fresh, len(run.attempts)))
                    open_tasks.add(task)
                    task.add_done_callback(open_tasks.discard)
                await asyncio.sleep(_PACE_S)

    async def _forge(self) -> None:
        """The forger: an even stream."""
        forger = Forger(plan.victim().address, self._seed)
        try:
            while self.elapsed_s < self.seconds:
                due = (self.elapsed_s - plan.FORGERY.start_s) * plan.FORGERY.rate
                while self.forged < due:
                    forger.send()
                    self.forged += 1
                await asyncio.sleep(_PACE_S)
        finally:
            forger.close()


async def deliver(traffic: Traffic, run: SenderRun, identity: str) -> None:
    """Try one message until it is accepted, refused for good, or the run is over."""
    for pause in itertools.chain(BACKOFF_S, itertools.repeat(BACKOFF_S[-1])):
        try:
            code = await _honest_message(run.sender, identity)
        except NotServedError:
            code = 0
        if code == 250:
            run.accepted[identity] = time.monotonic()
            return
        if code >= 500:
            run.refused[identity] = str(code)
            return
        if traffic.elapsed_s + pause > traffic.seconds + GRACE_S:
            return
        run.retries += 1
        await asyncio.sleep(pause)


async def _honest_message(sender: Sender, identity: str) -> int:
    """Deliver one message; the code of the reply that decided. NotServedError when there was none."""
    async with dial(sender.address, timeout_s=HONEST_CONNECT_S) as (dialogue, _):
        envelope = (
            f"EHLO {sender.name}.example",
            f"MAIL FROM:<post@{sender.name}.example>",
            f"RCPT TO:<{plan.USERS[len(identity) % len(plan.USERS)]}@{plan.DOMAIN}>",
        )
        for line in envelope:
            code = await dialogue.say(line)
            if code != 250:
                return code
        code = await _message(dialogue, f"post@{sender.name}.example", identity, "Subject: as agreed")
        if code == 250:
            await _leave(dialogue)
        return code


async def attempt(run: CampaignRun, fresh: Attempt, number: int) -> None:
    """One connection of a campaign; `number` chooses what it tries."""
    try:
        async with dial(fresh.source, timeout_s=ABUSE_CONNECT_S) as (dialogue, connected_s):
            fresh.connected_s = connected_s
            if await _abuse(dialogue, run.campaign.style, number, fresh):
                run.accepted += 1
    except NotServedError:
        return


async def _abuse(dialogue: Dialogue, style: Style, number: int, attempt: Attempt) -> bool:
    """What an attacker does once it is connected; whether the MTA took a message."""
    _, offers = await dialogue.ask("EHLO bulk.example")
    if style is Style.GUESSING and any(offer.startswith("AUTH ") for offer in offers):
        _note(attempt, Verdict.AUTH_FAIL, await dialogue.say("AUTH PLAIN AGFsaWNlAHN1bW1lcg=="))
        await _leave(dialogue)
        return False
    refusal = (Verdict.UNKNOWN_USER, Verdict.POLICY_REJECT, Verdict.SPAM)[number % 3 if style is Style.SPAM else 0]
    sender = f"offer{number}@{plan.LISTED_DOMAIN if refusal is Verdict.POLICY_REJECT else 'bulk.example'}"
    recipient = f"{f'user{number}' if refusal is Verdict.UNKNOWN_USER else plan.USERS[0]}@{plan.DOMAIN}"
    await dialogue.say(f"MAIL FROM:<{sender}>")
    code = await dialogue.say(f"RCPT TO:<{recipient}>")
    if code == 250:
        code = await _message(dialogue, sender, f"<{number}@bulk.example>", plan.SPAM_HEADER)
    _note(attempt, refusal, code)
    await _leave(dialogue)
    return code == 250


def _note(attempt: Attempt, verdict: Verdict, code: int) -> None:
    """Remember what the MTA refused, and when."""
    if code >= 500:
        attempt.verdict, attempt.refused_s = verdict, time.monotonic()


async def _message(dialogue: Dialogue, sender: str, identity: str, header: str) -> int:
    """DATA and one small message; the code of the last reply."""
    code = await dialogue.say("DATA")
    if code != 354:
        return code
    fields = (f"From: <{sender}>", f"Message-ID: {identity}", header)
    return await dialogue.say("\r\n".join((*fields, "", "A few lines of text.", ".")))


async def _leave(dialogue: Dialogue) -> None:
    """Say QUIT; a server that is already gone is no failure."""
    with contextlib.suppress(NotServedError):
        await dialogue.say("QUIT")
