import asyncio
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge.lab import mta, plan
from edge.lab.mta import Mta
from edge.lab.network import Network
from edge.lab.process import wait_for
from edge.lab.traffic import Attempt, CampaignRun, Traffic, attempt, deliver

pytestmark = pytest.mark.root

HAS_POSTFIX = mta.postfix_program() is not None
MTAS = ("embedded", pytest.param("postfix", marks=pytest.mark.skipif(not HAS_POSTFIX, reason="no Postfix here")))


@contextmanager
def network() -> Iterator[Network]:
    """A lab's network; a living process owns it, or another lab would take it for a leftover."""
    owner = subprocess.Popen(["sleep", "300"])
    lab = Network(pid=owner.pid)
    try:
        lab.make()
        yield lab
    finally:
        problems = lab.remove()
        owner.kill()
        owner.wait()
    assert problems == []


@pytest.fixture(scope="module", params=MTAS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Network, Mta]]:
    """A lab with a mail server and no daemon."""
    directory = tmp_path_factory.mktemp("lab")
    for parent in [directory, *directory.parents]:
        if parent.stat().st_uid == os.getuid() and parent.name.startswith(("lab", "pytest-")):
            parent.chmod(0o755)  # Postfix's own user must pass through it
    with network() as lab:
        server, _ = mta.choose(request.param, lab, directory, directory / "events.sock")
        try:
            server.start()
            yield lab, server
        finally:
            server.stop()


def abuse(lab: Network, name: str, count: int) -> CampaignRun:
    """Some attempts of one campaign."""
    run = CampaignRun(next(campaign for campaign in plan.CAMPAIGNS if campaign.name == name))
    sources = run.campaign.addresses(random.randrange(1000))

    async def send() -> None:
        for number in range(count):
            run.attempts.append(Attempt(next(sources), 0.0))
            await attempt(run, run.attempts[-1], number)

    with lab.client.entered():
        asyncio.run(send())
    return run


@pytest.mark.parametrize("name", [campaign.name for campaign in plan.CAMPAIGNS])
def test_the_mta_refuses_every_campaign_and_logs_every_connection(served: tuple[Network, Mta], name: str) -> None:
    lab, server = served
    before = server.arrivals()
    run = abuse(lab, name, 7)
    assert [a.connected_s is not None for a in run.attempts] == [True] * 7
    assert [a.refused_s is not None for a in run.attempts] == [True] * 7
    assert run.accepted == 0
    wait_for(lambda: (server.arrivals().connects - before.connects).total() == 7, "seven connections", seconds=20)
    assert server.arrivals().delivered == before.delivered


def test_honest_messages_are_delivered_once_each(served: tuple[Network, Mta]) -> None:
    lab, server = served
    traffic = Traffic(20, 1)

    async def send() -> None:
        await asyncio.gather(*(deliver(traffic, run, f"<{run.sender.name}@test>") for run in traffic.senders))

    with lab.client.entered():
        traffic.start()
        asyncio.run(send())
    wanted = {f"<{sender.name}@test>" for sender in plan.SENDERS}
    assert {identity for run in traffic.senders for identity in run.accepted} == wanted
    wait_for(lambda: wanted <= server.arrivals().delivered, "the deliveries in the log", seconds=20)


def test_every_message_is_tried_until_delivered(tmp_path: Path) -> None:
    """The server comes up only after the first tries were refused."""
    with network() as lab:
        server, _ = mta.choose("embedded", lab, tmp_path, tmp_path / "events.sock")
        traffic = Traffic(20, 1)
        run = traffic.senders[0]

        async def send() -> None:
            message = asyncio.create_task(deliver(traffic, run, "<late@test>"))
            while run.retries < 2:
                await asyncio.sleep(0.05)
            await asyncio.to_thread(server.start)
            await message

        try:
            with lab.client.entered():
                traffic.start()
                asyncio.run(send())
            assert list(run.accepted) == ["<late@test>"]
            assert server.arrivals().delivered == {"<late@test>"}
        finally:
            server.stop()


def test_attempts_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody serves, so every attempt is refused, and counted all the same."""
    flood = plan.Campaign(
        name="flood",
        prefix="2001:db8:bad::/64",
        sources=plan.Sources.NEW_ADDRESS,
        style=plan.Style.DICTIONARY,
        start_s=0.1,
        probe_rate=31,
        probe_s=0.5,
        rate=101,
    )
    monkeypatch.setattr(plan, "SENDERS", ())
    monkeypatch.setattr(plan, "CAMPAIGNS", (flood,))
    monkeypatch.setattr(plan, "victim", lambda: plan.Sender(name="x", address="2001:db8::1", interval_s=1.0))
    with network() as lab:
        traffic = Traffic(1.5, 1)
        with lab.client.entered():
            asyncio.run(traffic.run())
    attempts = traffic.campaigns[0].attempts
    assert flood.due(1.3) <= len(attempts) <= flood.due(1.5)
    assert len({found.source for found in attempts}) == len(attempts)
    assert traffic.campaigns[0].reached == []
