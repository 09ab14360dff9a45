import io
import json
from collections import Counter
from ipaddress import ip_network

from rich.console import Console

from edge.core.model import Verdict
from edge.lab import plan, report
from edge.lab.mta import Arrivals
from edge.lab.report import Result, collect
from edge.lab.traffic import Attempt, Traffic
from edge.lab.watch import Block

FLOOD = ip_network("2001:db8:bad:f100::/64")


def attempt(number: int, connected_s: float | None) -> Attempt:
    refused_s = None if connected_s is None else connected_s + 0.1
    verdict = Verdict.NONE if connected_s is None else Verdict.UNKNOWN_USER
    return Attempt(f"2001:db8:bad:f100::{number:x}", 100.0 + number / 10, connected_s, verdict, refused_s)


def finished(*, connected: dict[int, float], logged: int = 0, blocks: list[Block] | None = None) -> Result:
    """A run of the flood alone: 101 attempts, of which some connected, and one honest sender."""
    traffic = Traffic(30, 1)
    flood = traffic.campaigns[0]
    flood.attempts = [attempt(n, connected.get(n)) for n in range(101)]
    sender = traffic.senders[0]
    sender.messages = ["<1>", "<2>", "<3>"]
    sender.accepted = {"<1>": 99.0, "<2>": 99.5, "<3>": 99.7}
    sender.retries = 2
    traffic.forged = 307
    connects = Counter({f"2001:db8:bad:f100::{n:x}": 1 for n in range(logged)})
    arrivals = Arrivals(connects=connects, delivered=frozenset({"<1>", "<2>", "<spam>"}))
    return collect(traffic, arrivals, blocks or [], {FLOOD: 101.0}, mta="postfix", tick_s=1.0)


def block(**more: float) -> Block:
    return Block(FLOOD, 64, "8.0 of 8.0 weight bad", more.pop("seen_s", 102.0), True, more.pop("released_s", None))


def test_delivery_is_the_mtas_word() -> None:
    result = finished(connected={})
    assert (result.attempted, result.delivered, result.lost) == (3, 2, ("<3>",))


def test_abuse_is_counted_by_the_worse_witness() -> None:
    assert finished(connected={1: 100.2, 2: 100.3}, logged=3).abuse_reached == 3
    assert finished(connected={1: 100.2, 2: 100.3}, logged=1).abuse_reached == 2


def test_what_comes_more_than_a_tick_after_the_block_is_late() -> None:
    connected = {1: 101.9, 2: 102.9, 3: 103.1, 4: 104.0}
    assert finished(connected=connected, blocks=[block()]).campaigns[0].reached_after_block == 2
    assert finished(connected=connected, blocks=[block(released_s=103.5)]).campaigns[0].reached_after_block == 1
    assert finished(connected=connected).campaigns[0].reached_after_block == 0


def test_the_reaction_is_measured_from_the_completing_verdict_or_else_from_the_first() -> None:
    assert finished(connected={1: 100.2}, blocks=[block()]).seconds_to_first_block == 1.0
    early = finished(connected={1: 100.2}, blocks=[block(seen_s=100.9)])  # before the moment that was worked out
    assert early.seconds_to_first_block is not None
    assert abs(early.seconds_to_first_block - 0.6) < 1e-9
    assert finished(connected={1: 100.2}).seconds_to_first_block is None


def test_a_block_that_meets_the_forged_sender_is_told() -> None:
    assert finished(connected={}).forged_blocks == ()
    victim = ip_network((plan.victim().address, 48), strict=False)
    result = finished(connected={}, blocks=[Block(victim, 48, "x", 101.0)])
    assert result.forged_blocks == (str(victim),)
    assert result.as_json()["forged_syns"]["blocks_caused"] == 1


def test_json_has_the_promised_keys() -> None:
    found = json.loads(json.dumps(finished(connected={1: 100.2, 2: 103.5}, blocks=[block()]).as_json()))
    assert found["legitimate"] == {"attempted": 3, "delivered": 2, "retries": 2}
    assert found["abuse"] == {"attempted": 101, "reached_mta": 2}
    first = found["campaigns"][0]
    assert (first["name"], first["attempted"], first["reached_mta"]) == ("flood", 101, 2)
    assert first["reached_mta_after_block"] == 1
    assert found["seconds_to_first_block"] == 1.0
    assert found["blocked"] == [
        {"prefix": str(FLOOD), "level": 64, "reason": "8.0 of 8.0 weight bad", "in_nftables": True}
    ]
    assert found["mta"] == "postfix"
    assert len(found["campaigns"]) == len(plan.CAMPAIGNS)


def test_the_table_names_who_what_and_after_how_long() -> None:
    out = io.StringIO()
    answer = {"query": "2001:db8:bad:f100::1", "service": "mx", "verdict": {"action": "block", "reason": "because"}}
    report.render(finished(connected={1: 100.2}, blocks=[block()]), answer, Console(file=out, width=160))
    text = out.getvalue()
    for expected in ("flood", "101", "1.0 %", f"block of {FLOOD}", "2.0 s", "because", "<3>", "no block came of them"):
        assert expected in text
