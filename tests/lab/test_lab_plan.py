from ipaddress import ip_address, ip_network
from itertools import islice

import pytest

from edge.core.prefix import key_text
from edge.lab import network, plan
from edge.lab.plan import CAMPAIGNS, SENDERS, Campaign, Sources

REACTION_S = 2.5
"""Evidence complete within a second, a tick, and half a second of slack."""


def whole(campaign: Campaign) -> int:
    return campaign.due(plan.DEFAULT_SECONDS)


def test_honest_and_hostile_are_disjoint() -> None:
    honest = {sender.address for sender in SENDERS}
    for campaign in CAMPAIGNS:
        assert honest.isdisjoint(islice(campaign.addresses(1), 1009))


def test_plan_is_repeatable() -> None:
    for campaign in CAMPAIGNS:
        first = list(islice(campaign.addresses(7), 211))
        assert first == list(islice(campaign.addresses(7), 211))
        if campaign.sources is not Sources.ONE:
            assert first != list(islice(campaign.addresses(8), 211))


def test_every_source_lies_in_its_prefix_and_in_the_world() -> None:
    world = [ip_network(prefix) for prefix in network.WORLD]
    for campaign in CAMPAIGNS:
        for source in islice(campaign.addresses(3), 499):
            assert ip_address(source) in ip_network(campaign.prefix)
            assert any(ip_address(source) in net for net in world if net.version == ip_address(source).version)
            assert key_text(source) is not None


def test_honest_senders_come_from_a_dozen_prefixes_and_one_shares_a_spammers_64() -> None:
    units = {str(ip_network((s.address, 64 if ":" in s.address else 32), strict=False)) for s in SENDERS}
    assert len(units) == len(SENDERS) >= 12
    spammer = next(c for c in CAMPAIGNS if c.name == "hoster-spammer")
    assert str(ip_network((spammer.prefix, 64), strict=False)) in units


def test_snowshoe_sends_one_or_two_from_each_64_of_a_48() -> None:
    snowshoe = next(c for c in CAMPAIGNS if c.sources is Sources.NEW_64)
    sources = list(islice(snowshoe.addresses(5), whole(snowshoe)))
    counts: dict[int, int] = {}
    for source in sources:
        counts[int(ip_address(source)) >> 64] = counts.get(int(ip_address(source)) >> 64, 0) + 1
    assert set(counts.values()) == {1, 2}


def test_flood_takes_a_new_address_for_each_connection() -> None:
    flood = next(c for c in CAMPAIGNS if c.sources is Sources.NEW_ADDRESS)
    sources = list(islice(flood.addresses(5), whole(flood)))
    assert len(set(sources)) == len(sources) > 1000


@pytest.mark.parametrize("campaign", CAMPAIGNS, ids=lambda campaign: campaign.name)
def test_a_reaction_of_two_ticks_stays_below_a_tenth_of_each_campaign(campaign: Campaign) -> None:
    assert campaign.due(campaign.start_s + REACTION_S) < 0.1 * whole(campaign)


def test_a_reaction_of_two_ticks_stays_below_a_fiftieth_of_all_abuse() -> None:
    passed = sum(campaign.due(campaign.start_s + REACTION_S) for campaign in CAMPAIGNS)
    assert passed < 0.02 * sum(whole(campaign) for campaign in CAMPAIGNS)


def test_attempts_become_due_at_the_probing_rate_and_then_at_the_full_rate() -> None:
    campaign = CAMPAIGNS[0]
    assert campaign.due(campaign.start_s - 0.01) == 0
    assert campaign.due(campaign.start_s) == 1
    assert campaign.due(campaign.start_s + campaign.probe_s) == 1 + campaign.probe_rate * campaign.probe_s
    later = campaign.due(campaign.start_s + campaign.probe_s + 3)
    assert later == 1 + campaign.probe_rate * campaign.probe_s + 3 * campaign.rate


def test_victim_is_an_honest_ipv6_sender() -> None:
    assert plan.victim() in SENDERS
    assert ip_address(plan.victim().address).version == 6
