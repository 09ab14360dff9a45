"""What an operator is told, and that asking changes nothing."""

from __future__ import annotations

import json
from typing import Any

from edge.abi import Origin, Service, Standing
from edge.core.explain import explain
from edge.core.model import Entry
from edge.core.prefix import Prefix
from tests.core.worlds import World, bad, ham


def ask(world: World, prefix: str, *fixed: Entry) -> dict[str, Any]:
    entries = dict(world.state.ledger.learned) | {e.key: e for e in fixed}
    told = explain(world.state, entries, Prefix.parse(prefix), Service.MX, world.now_s, world.params)
    json.dumps(told, allow_nan=False)
    return told


def test_unknown_prefix_has_every_level_and_no_evidence() -> None:
    told = ask(World(), "2001:db8:1:2::7")
    assert told["standing"] == "new"
    assert [level["length"] for level in told["levels"]] == [128, 64, 56, 48, 32]
    assert all(level["events"] == 0 and level["last_evidence_age_s"] is None for level in told["levels"])


def test_forecast_comes_true() -> None:
    world = World()
    world.tick(bad("2001:db8:1:2::7", 5))
    change = ask(world, "2001:db8:1:2::7")["levels"][1]["change"]
    assert change == "3 more rejected deliveries from new addresses block this /64"
    world.tick(bad("2001:db8:1:2::8", 1), bad("2001:db8:1:2::9", 1))
    assert world.blocks() == set()
    world.tick(bad("2001:db8:1:2::a", 1))
    assert world.blocks() == {"2001:db8:1:2::/64"}


def test_forecast_of_the_only_bad_address_comes_true() -> None:
    world = World()
    world.tick(bad("2001:db8:1:2::7", 5))
    assert ask(world, "2001:db8:1:2::7")["levels"][0]["change"] == "3 more rejected deliveries block this /128"
    world.tick(bad("2001:db8:1:2::7", 2))
    assert world.blocks() == set()
    world.tick(bad("2001:db8:1:2::7", 1))
    assert world.blocks() == {"2001:db8:1:2::7/128"}


def test_forecast_where_a_block_is_not_allowed() -> None:
    world = World()
    world.tick(bad("192.0.2.7", 11, Service.SUBMISSION))
    told = explain(world.state, {}, Prefix.parse("192.0.2.7"), Service.SUBMISSION, world.now_s, world.params)
    assert told["levels"][0]["change"].startswith("limited at most")


def test_block_is_told_with_reason_and_time_left() -> None:
    world = World()
    world.tick(*(bad(f"2001:db8:1:2::{n:x}") for n in range(1, 12)))
    world.tick(seconds=101.0)
    told = ask(world, "2001:db8:1:2::9")
    assert (told["standing"], told["decided_by"]) == ("block", "2001:db8:1:2::/64")
    level = told["levels"][1]
    assert level["entry"]["expires_in_s"] == 499.0
    assert level["entry"]["origin"] == "learned"
    assert level["last_evidence_age_s"] == 101.0
    assert level["change"] == "released in 499 s, on trial after that"
    assert level["next_block"] == {"relapses": 1, "lifetime_s": 1200.0}


def test_parent_tells_how_many_children_are_missing() -> None:
    world = World()
    for n in (1, 2, 3):
        world.tick(bad(f"2001:db8:5:{n << 8:x}::1"))
    level = ask(world, "2001:db8:5::/48")["levels"][0]
    assert level["change"] == "5 more bad children block this /48"
    assert round(level["bad_children"]) == 3


def test_good_children_hold_a_parent_back() -> None:
    world = World()
    for n in range(1, 12):
        world.tick(ham(f"2001:db8:5:{n << 8:x}::1", 3))
    assert ask(world, "2001:db8:5::/48")["levels"][0]["change"].startswith("held back by 11 good children")


def test_ipv4_has_its_levels_and_its_floor() -> None:
    world = World()
    world.tick(bad("192.0.2.7", 3))
    told = ask(world, "192.0.2.7")
    assert [level["prefix"] for level in told["levels"]] == ["192.0.2.7/32", "192.0.2.0/24", "192.0.0.0/16"]
    assert told["levels"][0]["change"] == "5 more rejected deliveries block this /32"
    assert told["levels"][2]["change"] == "never blocked automatically: shorter than the floor"


def test_entry_between_the_levels_is_told() -> None:
    listed = Entry(
        prefix=Prefix.parse("2001:db8::/36"),
        service=Service.MX,
        standing=Standing.BLOCK,
        origin=Origin.LIST,
        expires_s=None,
        reason="listed",
    )
    told = ask(World(), "2001:db8:1:2::7", listed)
    assert (told["standing"], told["decided_by"]) == ("block", "2001:db8::/36")
    assert told["other_entries"][0]["expires_in_s"] is None


def test_explain_changes_nothing() -> None:
    asked, silent = World(), World()
    for _ in range(13):
        for world in (asked, silent):
            world.tick(bad("2001:db8:1:2::7"), seconds=3600.0)
        ask(asked, "2001:db8:1:2::7")
    assert asked.decisions == silent.decisions
