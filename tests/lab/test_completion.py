from ipaddress import ip_network

from edge.core.model import Verdict
from edge.lab.completion import completed, verdicts
from edge.lab.plan import CAMPAIGNS, SENDERS
from edge.lab.traffic import Attempt, Traffic


def traffic() -> Traffic:
    """A run in which the IPv4 bot was refused every tenth of a second, and honest mail was taken."""
    run = Traffic(30, 1)
    bot = next(campaign for campaign in run.campaigns if campaign.campaign.name == "v4-bot")
    for n in range(23):
        at_s = 100 + n / 10
        attempt = Attempt(bot.campaign.prefix, at_s, at_s, Verdict.UNKNOWN_USER, at_s + 0.01)
        bot.attempts.append(attempt)
    bot.attempts.append(Attempt(bot.campaign.prefix, 103.0))  # never connected: no verdict
    run.senders[0].accepted = {"<1>": 99.0, "<2>": 100.5}
    return run


def test_every_verdict_is_asked_about() -> None:
    events = verdicts(traffic())
    assert len(events) == 23 + 2
    assert [event.ts_s for event in events] == sorted(event.ts_s for event in events)
    found = completed(events)
    assert set(found) == {ip_network("198.51.100.66/32")}
    moment = found[ip_network("198.51.100.66/32")]
    refusals = [event.ts_s for event in events if event.verdict is Verdict.UNKNOWN_USER]
    count = refusals.index(moment) + 1
    assert 5 <= count <= 13
    assert completed([event for event in events if event.ts_s < moment]) == {}


def test_honest_mail_alone_completes_nothing() -> None:
    run = Traffic(30, 1)
    for sender in run.senders:
        sender.accepted = {f"<{n}>": 100.0 + n for n in range(31)}
    assert len(verdicts(run)) == 31 * len(SENDERS)
    assert completed(verdicts(run)) == {}
    assert len(run.campaigns) == len(CAMPAIGNS)
