"""What a lab run showed: counted from the traffic, the MTA's log and the daemon's blocks; as a table and as JSON.

Invariants:
    abuse-is-counted-by-the-worse-witness: an attempt reached the MTA when the client was greeted or the MTA logged it,
        whichever counts more.
    delivery-is-the-mta's-word: a message counts as delivered when the MTA's log says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from edge.lab import plan
from edge.lab.mta import Arrivals
from edge.lab.traffic import Attempt, CampaignRun, Traffic
from edge.lab.watch import Block, Net
from edge.log import printable
from edge.render import explain

SHOWN_LOST = 10
"""Undelivered messages named under the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignResult:
    """One campaign's row."""

    name: str
    prefix: str
    what: str
    attempted: int
    reached: int
    reached_after_block: int
    block: Block | None  # the one that met most of its attempts
    first_attempt_to_block_s: float | None
    verdict_to_block_s: float | None  # from the verdict that completed the evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Everything a run showed."""

    mta: str
    attempted: int
    delivered: int
    retries: int
    lost: tuple[str, ...]  # message ids never delivered
    campaigns: tuple[CampaignResult, ...]
    blocks: tuple[Block, ...]
    forged: int
    forged_reached: int  # connections from the victim's /64 that are not its own
    forged_blocks: tuple[str, ...]  # blocks that meet the victim

    @property
    def abuse_attempted(self) -> int:
        """Connections of all campaigns; forged SYNs are not among them."""
        return sum(campaign.attempted for campaign in self.campaigns)

    @property
    def abuse_reached(self) -> int:
        """Those that reached the MTA."""
        return sum(campaign.reached for campaign in self.campaigns)

    @property
    def seconds_to_first_block(self) -> float | None:
        """From the verdict that completed the evidence to the first block; None when nothing was blocked."""
        dated = [c for c in self.campaigns if c.block is not None and c.verdict_to_block_s is not None]
        first = min(dated, key=lambda c: c.block.seen_s if c.block else 0.0, default=None)
        return None if first is None else first.verdict_to_block_s

    def as_json(self) -> dict[str, Any]:
        """The one object of `--json`."""
        return {
            "legitimate": {"attempted": self.attempted, "delivered": self.delivered, "retries": self.retries},
            "abuse": {"attempted": self.abuse_attempted, "reached_mta": self.abuse_reached},
            "campaigns": [_campaign_json(campaign) for campaign in self.campaigns],
            "seconds_to_first_block": _rounded(self.seconds_to_first_block),
            "blocked": [
                {
                    "prefix": str(block.net),
                    "level": block.level,
                    "reason": block.reason,
                    "in_nftables": block.in_nftables,
                }
                for block in self.blocks
            ],
            "mta": self.mta,
            "forged_syns": {
                "victim": plan.victim().address,
                "sent": self.forged,
                "reached_mta": self.forged_reached,
                "blocks_caused": len(self.forged_blocks),
            },
        }


def collect(
    traffic: Traffic, arrivals: Arrivals, blocks: list[Block], completed: dict[Net, float], *, mta: str, tick_s: float
) -> Result:
    """Count a finished run. `completed` says when the evidence for a block was complete (edge.lab.completion)."""
    messages = [identity for run in traffic.senders for identity in run.messages]
    delivered = arrivals.delivered.intersection(messages)
    victim = ip_network((plan.victim().address, 64), strict=False)
    return Result(
        mta=mta,
        attempted=len(messages),
        delivered=len(delivered),
        retries=sum(run.retries for run in traffic.senders),
        lost=tuple(identity for identity in messages if identity not in delivered),
        campaigns=tuple(_campaign(run, arrivals.connects, blocks, completed, tick_s) for run in traffic.campaigns),
        blocks=tuple(blocks),
        forged=traffic.forged,
        forged_reached=sum(
            count
            for source, count in arrivals.connects.items()
            if ip_address(source) in victim and source != plan.victim().address
        ),
        forged_blocks=tuple(str(block.net) for block in blocks if block.net.overlaps(victim)),
    )


def _campaign(
    run: CampaignRun, connects: Counter[str], blocks: list[Block], completed: dict[Net, float], tick_s: float
) -> CampaignResult:
    sources = {attempt.source for attempt in run.attempts}
    logged = sum(count for source, count in connects.items() if source in sources)
    mine = [block for block in blocks if any(block.covers(source) for source in sources)]
    main = max(mine, key=lambda block: (sum(block.covers(source) for source in sources), -block.seen_s), default=None)
    first = run.attempts[0].began_s if run.attempts else 0.0
    return CampaignResult(
        name=run.campaign.name,
        prefix=run.campaign.prefix,
        what=run.campaign.sources.value,
        attempted=len(run.attempts),
        reached=max(len(run.reached), logged),
        reached_after_block=sum(_late(attempt, mine, tick_s) for attempt in run.reached),
        block=main,
        first_attempt_to_block_s=None if main is None else main.seen_s - first,
        verdict_to_block_s=None if main is None else _reaction(run, main, completed.get(main.net)),
    )


def _reaction(run: CampaignRun, block: Block, completed_s: float | None) -> float | None:
    """Seconds from the verdict that completed the evidence; from the first verdict when that is not known."""
    if completed_s is not None and completed_s <= block.seen_s:
        return block.seen_s - completed_s
    first = min((attempt.refused_s for attempt in run.attempts if attempt.refused_s is not None), default=None)
    return None if first is None else block.seen_s - first


def _late(attempt: Attempt, blocks: list[Block], tick_s: float) -> bool:
    """Whether it connected from a prefix that had been blocked for more than a tick, and still was."""
    connected = attempt.connected_s
    if connected is None:
        return False
    return any(
        connected > block.seen_s + tick_s
        and (block.released_s is None or connected < block.released_s)
        and block.covers(attempt.source)
        for block in blocks
    )


def _campaign_json(campaign: CampaignResult) -> dict[str, Any]:
    return {
        "name": campaign.name,
        "attempted": campaign.attempted,
        "reached_mta": campaign.reached,
        "reached_mta_after_block": campaign.reached_after_block,
        "blocked_by": None if campaign.block is None else str(campaign.block.net),
        "seconds_to_block": _rounded(campaign.first_attempt_to_block_s),
        "seconds_from_verdict_to_block": _rounded(campaign.verdict_to_block_s),
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def render(result: Result, explanation: Mapping[str, Any], console: Console) -> None:
    """Print the tables: who tried, who got through, what stopped the rest and after how long."""
    console.print(_plain(f"What reached the MTA ({result.mta})\n"))
    console.print(_senders(result))
    console.print()
    console.print(_legend(result))
    if result.lost:
        more = " ..." if len(result.lost) > SHOWN_LOST else ""
        console.print(_plain(f"\nnot delivered: {', '.join(result.lost[:SHOWN_LOST])}{more}"))
    if result.blocks:
        console.print()
        console.print(_blocks(result))
    first = result.seconds_to_first_block
    if first is not None:
        console.print(_plain(f"\nFrom the verdict that completed the evidence to the first block: {first:.2f} s"))
    console.print(_plain("\nedge explain, for the last address of the flood:\n"))
    explain(console, explanation)


def _senders(result: Result) -> Table:
    table = _columns("who", "tried", "got through", "", "what stopped the rest", "after")
    table.add_row(
        "honest senders",
        str(result.attempted),
        str(result.delivered),
        _share(result.delivered, result.attempted),
        f"{len(result.lost)} not delivered" if result.lost else f"nothing; {result.retries} retries on the way",
    )
    for campaign in result.campaigns:
        stopped = "nothing" if campaign.block is None else f"block of {campaign.block.net}"
        if campaign.reached_after_block:
            stopped += f"; {campaign.reached_after_block} came through after it"
        share = _share(campaign.reached, campaign.attempted)
        after = _after(campaign.first_attempt_to_block_s)
        table.add_row(campaign.name, str(campaign.attempted), str(campaign.reached), share, stopped, after)
    caused = f"caused blocks of {', '.join(result.forged_blocks)}" if result.forged_blocks else "no block came of them"
    share = _share(result.forged_reached, result.forged)
    table.add_row("forged SYNs", str(result.forged), str(result.forged_reached), share, caused)
    return table


def _legend(result: Result) -> Table:
    """Who the names stand for."""
    table = _columns("", "", "")
    table.add_row("honest senders", f"{len(plan.SENDERS)} prefixes", "one shares a /64 with hoster-spammer")
    for campaign in result.campaigns:
        table.add_row(campaign.name, campaign.prefix, campaign.what)
    table.add_row("forged SYNs", plan.victim().address, "in this honest sender's name, all over its /64")
    table.show_header = False
    return table


def _blocks(result: Result) -> Table:
    table = _columns("blocked", "in nftables", "reason")
    for block in result.blocks:
        table.add_row(str(block.net), "yes" if block.in_nftables else "NO", _plain(block.reason))
    return table


def _columns(*titles: str) -> Table:
    """A table in the manner of the other verbs: no lines, the last column takes what is left."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in titles:
        numbers = title in ("tried", "got through", "after", "")
        table.add_column(title, justify="right" if numbers and len(titles) > 3 else "left", overflow="fold")
    return table


def _plain(text: str) -> Text:
    """Text from the daemon, never read as markup or terminal control."""
    return Text("\n".join(printable(line) for line in text.split("\n")))


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _after(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f} s"
