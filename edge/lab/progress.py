"""What the lab says on standard error while it runs: one moving line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import asyncio
import sys
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console
from rich.status import Status

from edge.lab.traffic import GRACE_S, Traffic
from edge.lab.watch import Watch

LINE_S = 5.0
"""Seconds between two lines where no terminal is watching."""

MOVE_S = 0.25
"""Seconds between two changes of the line on a terminal."""


class Progress:
    """Standard error, as the one place for everything that is not the result."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False, soft_wrap=True, markup=False)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text)

    async def follow(self, traffic: Traffic, watch: Watch) -> None:
        """Show how far the traffic is, until cancelled."""
        status = self._console.status("sending") if self._console.is_terminal else None
        shown: AbstractContextManager[Status | None] = status if status is not None else nullcontext()
        announced = 0
        with shown:
            while True:
                blocks = sorted(watch.blocks.values(), key=lambda block: block.seen_s)
                for block in blocks[announced:]:
                    self.say(f"  {block.seen_s - traffic.began_s:5.1f} s  blocked {block.net}: {block.reason}")
                announced = len(blocks)
                if status is not None:
                    status.update(_line(traffic, len(blocks)))
                    await asyncio.sleep(MOVE_S)
                else:
                    self.say("  " + _line(traffic, len(blocks)))
                    await asyncio.sleep(LINE_S)


def _line(traffic: Traffic, blocks: int) -> str:
    """The state of the run in one line."""
    honest = sum(len(run.messages) for run in traffic.senders)
    accepted = sum(len(run.accepted) for run in traffic.senders)
    tried = sum(len(run.attempts) for run in traffic.campaigns)
    reached = sum(len(run.reached) for run in traffic.campaigns)
    late = traffic.elapsed_s > traffic.seconds
    phase = f"waiting for the last retries, {GRACE_S:.0f} s at most" if late else f"of {traffic.seconds:.0f} s"
    return (
        f"{traffic.elapsed_s:5.1f} s {phase}: honest {accepted} of {honest} accepted, "
        f"abuse {reached} of {tried} reached the MTA, {traffic.forged} SYNs forged, {blocks} blocks"
    )
