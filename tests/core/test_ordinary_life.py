"""Ordinary situations in a closed loop: what honest senders live through, in numbers.

Each world plays days of plausible life against the core, which learns only from what it admits.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import pytest

from edge.abi import Service, Standing
from edge.core.model import Authentication, Event, Verdict
from edge.evidence.postfix_log import PostfixLog, PostfixParams
from tests.core.worlds import World, bad, event, ham

SEED = 20263
HOUR_S, DAY_S = 3600.0, 86400.0

Timed = tuple[float, str, Event]
"""When (seconds from the start), who, and what."""


def live(world: World, timed: Iterable[Timed]) -> Counter[str]:
    """Play events in order of time; counts who was refused, and everything as `all:who`."""
    found: Counter[str] = Counter()
    base = world.now_s
    for at_s, who, e in sorted(timed, key=lambda t: (t[0], t[1])):
        world.now_s = base + at_s
        found["all:" + who] += 1
        found[who] += not world.attempt([e])[0]
    return found


def spf(source: str, verdict: Verdict = Verdict.HAM) -> Event:
    """A message with SPF and no signature."""
    return replace(event(source, verdict), spf=Authentication.PASS)


def failed(source: str) -> Event:
    return event(source, Verdict.AUTH_FAIL, service=Service.SUBMISSION)


def login(source: str) -> Event:
    return event(source, Verdict.HAM, service=Service.SUBMISSION, authenticated=True)


def log_of_a_list_message(pid: int, gone: int, there: int) -> list[bytes]:
    """What Postfix logs of one message to a mailing list's members, some of whom are gone."""
    who = "lists.example.org[192.0.2.9]"
    refusal = (
        f"NOQUEUE: reject: RCPT from {who}: 550 5.1.1 <u@example.net>: Recipient address rejected: "
        f"User unknown in virtual mailbox table; from=<l@example.org> to=<u@example.net> proto=ESMTP helo=<lists>"
    )
    smtpd = [f"connect from {who}", *[refusal] * gone, f"4XyZ{pid:05d}: client={who}"]
    counts = f"ehlo=1 mail=1 rcpt={there}/{gone + there} data=1 quit=1 commands={there + 4}/{gone + there + 4}"
    lines = [f"Nov  2 08:03:43 mx postfix/smtpd[{pid}]: {message}" for message in smtpd]
    lines.append(f"Nov  2 08:03:44 mx postfix/qmgr[9]: 4XyZ{pid:05d}: from=<l@e>, size=7, nrcpt={there} (queue active)")
    lines.append(f"Nov  2 08:03:44 mx postfix/smtpd[{pid}]: disconnect from {who} {counts}")
    return [line.encode() for line in lines]


@pytest.mark.parametrize(("gone", "there"), [(8, 32), (10, 40), (20, 80), (13, 7)])
def test_mailing_list_with_stale_members_is_not_blocked(gone: int, there: int) -> None:
    """Fifty messages to a list of whose members a fifth (or two thirds) are gone; nobody vouches for them."""
    world, log, seen = World(), PostfixLog(PostfixParams()), 0
    for pid in range(53):
        for line in log_of_a_list_message(pid, gone, there):
            told = log.feed(line, 0.0)
            if told is not None:
                seen += 1
                assert (told.verdict, told.rcpt_ok, told.rcpt_bad) == (Verdict.HAM, there, gone)
                assert world.attempt([told]) == [True]
    assert seen == 53, "one event a message"


@pytest.mark.parametrize("period_s", [30.0, 60.0, 300.0])
def test_office_with_an_old_password_goes_on_sending(period_s: float) -> None:
    """Two days; thirty people send a hundred mails a day, one device tries an old password day and night."""
    print("seed", SEED)
    draw, world = random.Random(SEED), World()
    timed = [(n * period_s, "device", failed("192.0.2.9")) for n in range(int(2 * DAY_S / period_s))]
    for day in range(2):
        timed += [(day * DAY_S + draw.uniform(8, 18) * HOUR_S, "staff", login("192.0.2.9")) for _ in range(101)]
    found = live(world, timed)
    assert (found["all:staff"], found["staff"]) == (202, 0)
    assert world.standing("192.0.2.9/32", Service.SUBMISSION) in (Standing.SUSPECT, Standing.GOOD, Standing.NEW)


def test_office_comes_back_from_holidays_to_an_open_door() -> None:
    """Nobody logs in for three weeks while the device goes on, once a second."""
    world = World()
    world.attempt([login("192.0.2.9")])
    for _ in range(21):
        world.tick([failed("192.0.2.9")] * 997, seconds=DAY_S)
    assert world.attempt([login("192.0.2.9")]) == [True]


def test_wrong_sender_address_of_a_user_blocks_no_office() -> None:
    """Postfix's `553 5.7.1 Sender address rejected: not owned by user`, again and again."""
    world = World()
    for _ in range(31):
        world.attempt([event("192.0.2.10", Verdict.POLICY_REJECT, service=Service.SUBMISSION, authenticated=True)])
    assert world.attempt([login("192.0.2.10")]) == [True]


def test_mobile_network_of_mistyped_passwords_is_not_blocked() -> None:
    """One failure from each of many /64s before anybody has logged in."""
    world = World()
    for n in range(1, 98):
        world.attempt([failed(f"2001:db8:5:{n << 8 | 1:x}::1")])
        world.attempt([failed(f"203.0.113.{n}")])
    assert world.blocks() == set()


def test_password_guessing_is_blocked_where_nobody_ever_logged_in() -> None:
    world, tried = World(), 0
    while world.attempt([failed("192.0.2.9")]) == [True]:
        tried += 1
        assert tried <= 131
    assert world.blocks() == {"192.0.2.9/32"}


@pytest.mark.parametrize("period_s", [20.0, 120.0])
@pytest.mark.parametrize("late_s", [0.0, HOUR_S])
def test_customers_of_a_shared_64_outlive_a_rogue_that_was_first(period_s: float, late_s: float) -> None:
    print("seed", SEED)
    draw, world = random.Random(SEED), World()
    timed = [(n * period_s, "rogue", spf("2001:db8:1:1::bad", Verdict.SPAM)) for n in range(int(DAY_S / period_s))]
    for customer in range(16, 26):
        first_s, source = late_s + draw.uniform(0, HOUR_S), f"2001:db8:1:1::{customer:x}"
        timed += [(first_s + n * HOUR_S, "customer", ham(source, domain=customer)[0]) for n in range(22)]
    found = live(world, timed)
    assert (found["all:customer"], found["customer"]) == (220, 0)
    assert found["all:rogue"] - found["rogue"] <= 41
    assert world.blocks() == {"2001:db8:1:1::bad/128"}


def test_mistake_of_a_newcomer_does_not_blame_a_shared_64() -> None:
    """A rogue is blocked; the first message of an unknown customer goes to nobody."""
    world = World()
    for _ in range(13):
        world.attempt(bad("2001:db8:1:1::bad"))
    world.attempt(bad("2001:db8:1:1::16"))
    assert world.blocks() == {"2001:db8:1:1::bad/128"}
    assert world.attempt(ham("2001:db8:1:1::17")) == [True]


def test_mail_server_in_a_residential_64_outlives_a_bot() -> None:
    """Seven days; the bot sends forty mails a day, the server beside it four."""
    print("seed", SEED)
    draw, world = random.Random(SEED), World()
    timed: list[Timed] = []
    for day in range(7):
        for who, count, e in (
            ("bot", 41, bad("2001:db8:77:100::b")[0]),
            ("server", 4, ham("2001:db8:77:100::25")[0]),
        ):
            timed += [((day + draw.random()) * DAY_S, who, e) for _ in range(count)]
    found = live(world, timed)
    assert (found["all:server"], found["server"]) == (28, 0)
    assert found["all:bot"] - found["bot"] <= 41


def test_mail_server_beside_bots_in_its_56_is_refused_at_first_only() -> None:
    """Four /64s of the /56 hold bots. Until the server has been heard nobody can know it; then it stays open."""
    refused = []
    for seed in range(SEED, SEED + 5):
        print("seed", seed)
        draw, world = random.Random(seed), World()
        timed: list[Timed] = []
        for day in range(7):
            timed += [
                ((day + draw.random()) * DAY_S, "bot", bad(f"2001:db8:77:1{draw.randrange(1, 5):02x}::b")[0])
                for _ in range(41)
            ]
            timed += [((day + draw.random()) * DAY_S, "server", ham("2001:db8:77:100::25")[0]) for _ in range(4)]
        refused.append(live(world, timed)["server"])
    print("refused of 28:", refused)
    assert sum(refused) <= 5 * 6


@pytest.mark.parametrize("days", [1, 89])
def test_old_network_protects_its_members_like_a_young_one(days: int) -> None:
    """Eighty servers of a /48 send daily; then eight are compromised and a new one mistypes an address."""
    world = World()
    members = [f"2001:db8:5:{n % 16:02x}{n:02x}::25" for n in range(80)]
    for _ in range(days):
        world.tick(*(ham(source, 2, domain=9) for source in members), seconds=DAY_S)
    for n in range(8):
        world.attempt(bad(f"2001:db8:5:{0x40 + n:02x}01::1"))
    world.attempt(bad("2001:db8:5:9901::1"))
    assert world.blocks() == set()
    assert all(world.attempt(ham(source)) == [True] for source in members)


@pytest.mark.parametrize("share", [0.03, 0.1])
@pytest.mark.parametrize("vouched", [0, 7919])
def test_newsletter_with_stale_addresses_is_not_blocked(share: float, vouched: int) -> None:
    """A message a recipient: what goes to nobody has no signature that anybody could have checked."""
    print("seed", SEED)
    for seed in range(SEED, SEED + 5):
        draw, world = random.Random(seed), World()
        for _ in range(307):
            gone = draw.random() < share
            e = event("192.0.2.9") if gone else event("192.0.2.9", Verdict.HAM, vouched=vouched)
            assert world.attempt([e]) == [True]


@pytest.mark.parametrize("source", ["192.0.2.7", "2001:db8:1:2::25"])
def test_host_of_little_traffic_is_forgiven_its_mistakes(source: str) -> None:
    """Three mails a week without authentication, one in five to somebody who is gone, for half a year."""
    print("seed", SEED)
    draw, world = random.Random(SEED), World()
    timed = [
        (n * 7 / 3 * DAY_S, "host", event(source, Verdict.UNKNOWN_USER if draw.random() < 0.2 else Verdict.HAM))
        for n in range(79)
    ]
    assert live(world, timed)["host"] == 0


def test_one_mistake_of_each_of_eight_neighbours_blocks_no_ipv4_24() -> None:
    world = World()
    for n in range(8):
        world.tick(bad(f"203.0.113.{10 + n}"), seconds=3 * HOUR_S)
    assert "203.0.113.0/24" not in world.blocks()
    assert world.attempt(ham("203.0.113.200")) == [True]
    for n in range(8):
        world.tick(bad(f"203.0.113.{30 + n}"), seconds=3 * HOUR_S)
    assert "203.0.113.0/24" in world.blocks(), "sixteen are no mistake"
