"""Evidence up, priors down, and tables that stay what they are given."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from edge.abi import Level, Service
from edge.core.belief import wilson, with_more_bad
from edge.core.model import Authentication, Event, Verdict, batch
from edge.core.prefix import Prefix
from edge.core.reputation import DAY_S, Reputation, ReputationParams
from edge.core.scoring import Domains, ScoringParams, score
from tests.core.worlds import bad, event, ham

SEED = 20262
NOW = 1009.0


def learned(*groups: list[Event], params: ReputationParams | None = None) -> Reputation:
    reputation = Reputation(params or ReputationParams())
    for at, group in enumerate(groups):
        reputation.learn(batch(group), NOW + at)
    return reputation


def weights(reputation: Reputation, prefix: str, now_s: float = NOW) -> tuple[float, ...]:
    return reputation.weights(Service.MX, Prefix.parse(prefix), now_s, "bad", "good")


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("2001:db8:1:2::7/128", 3),
        ("2001:db8:1:2::/64", 5),
        ("2001:db8:1::/56", 5),
        ("2001:db8:1::/48", 5),
        ("2001:db8::/32", 5),
    ],
)
def test_evidence_goes_up(prefix: str, expected: float) -> None:
    reputation = learned(bad("2001:db8:1:2::7", 3) + bad("2001:db8:1:2::8", 2))
    assert weights(reputation, prefix)[0] == expected


def test_ipv4_has_three_levels() -> None:
    reputation = learned(bad("192.0.2.7", 3))
    assert [weights(reputation, f"192.0.{p}")[0] for p in ("2.7/32", "2.0/24", "0.0/16")] == [3, 3, 3]
    assert len(reputation.tables[Service.MX, Level.L128]) == 0
    assert len(reputation.tables[Service.MX, Level.L32]) == 0


def test_forged_syn_scores_nothing() -> None:
    reputation = learned([event("2001:db8::1", v, handshake=False, vouched=7, authenticated=True) for v in Verdict])
    assert all(len(table) == 0 for table in reputation.tables.values())
    assert len(reputation.domains) == 0


def test_no_verdict_scores_nothing() -> None:
    reputation = learned([event("2001:db8::1", Verdict.NONE, vouched=7)] * 11)
    assert all(len(table) == 0 for table in reputation.tables.values())


def test_half_life_grows_as_the_prefix_shortens() -> None:
    reputation = learned(bad("2001:db8:1:2::7", 8))
    for prefix, days in (("2001:db8:1:2::7/128", 3), ("2001:db8:1:2::/64", 7), ("2001:db8::/32", 30)):
        assert weights(reputation, prefix, NOW + days * DAY_S)[0] == pytest.approx(4.0)


def test_memory_is_bounded_and_keeps_the_share() -> None:
    reputation = learned(bad("2001:db8:1:2::7", 997) + ham("2001:db8:1:2::7", 997))
    ill, well = weights(reputation, "2001:db8:1:2::/64")
    assert ill + well == pytest.approx(50.0)
    assert 0.5 < ill / (ill + well) < 0.75, "a domain without record lends little"


def test_children_are_counted_once_however_much_they_send() -> None:
    reputation = learned(bad("2001:db8:1:2::7", 31), bad("2001:db8:1:2::7", 31), bad("2001:db8:1:3::7", 1))
    found = reputation.weights(Service.MX, Prefix.parse("2001:db8:1::/56"), NOW, "bad_children", "good_children")
    assert found == pytest.approx((2.0, 0.0), abs=0.01)


def test_child_that_turns_is_moved_not_added() -> None:
    reputation = learned(bad("2001:db8:1:2::7", 1), ham("2001:db8:1:2::7", 11))
    found = reputation.weights(Service.MX, Prefix.parse("2001:db8:1::/56"), NOW, "bad_children", "good_children")
    assert found == pytest.approx((0.0, 1.0), abs=0.01)


def test_active_children_do_not_fade() -> None:
    """A network that has sent well for half a year counts like one that did so for a day."""
    reputation = Reputation(ReputationParams())
    for day in range(181):
        senders = (ham(f"2001:db8:1:{n << 8 | n:x}::25") for n in range(1, 12))
        reputation.learn(batch(e for group in senders for e in group * 2), NOW + day * DAY_S)
    (good,) = reputation.weights(Service.MX, Prefix.parse("2001:db8:1::/48"), NOW + 180 * DAY_S, "good_children")
    assert good == pytest.approx(11.0, abs=0.5)
    (good,) = reputation.weights(Service.MX, Prefix.parse("2001:db8:1::/48"), NOW + 194 * DAY_S, "good_children")
    assert good == pytest.approx(5.5, abs=0.3)


def test_child_is_counted_again_by_a_parent_that_was_dropped() -> None:
    reputation = learned(bad("2001:db8:1:2::7", 3), params=ReputationParams(rows_56=16))
    reputation.learn(batch(e for n in range(101) for e in bad(f"2001:db8:{n + 9:x}:2::7", 5)), NOW + 11)
    assert reputation.find(Service.MX, Prefix.parse("2001:db8:1::/56")) is None
    reputation.learn(batch(bad("2001:db8:1:2::7")), NOW + 13)
    found = reputation.weights(Service.MX, Prefix.parse("2001:db8:1::/56"), NOW + 13, "bad_children")
    assert found == pytest.approx((1.0,), abs=0.01)


def test_refused_recipients_weigh_by_their_share() -> None:
    params = ScoringParams()

    def weigh(verdict: Verdict, ok: int, ill: int) -> tuple[float, float]:
        row = replace(event("2001:db8::1", verdict), rcpt_ok=ok, rcpt_bad=ill)
        bads, goods = score(batch([row]), Domains(params), NOW, params)
        return float(bads[0]), float(goods[0])

    assert weigh(Verdict.UNKNOWN_USER, 0, 7) == (1.0, 0.0)
    assert weigh(Verdict.UNKNOWN_USER, 0, 0) == (1.0, 0.0)
    assert weigh(Verdict.UNKNOWN_USER, 30, 10) == (0.25, 0.0)
    assert weigh(Verdict.POLICY_REJECT, 10, 10) == (0.75, 0.0)
    assert weigh(Verdict.HAM, 30, 10) == (0.25, 0.1)
    assert weigh(Verdict.HAM, 3, 0) == (0.0, 0.1)
    assert weigh(Verdict.SPAM, 3, 1) == (1.0, 0.0)


def test_steady_rate_reads_as_its_number_an_hour() -> None:
    reputation = Reputation(ReputationParams())
    for minute in range(601):
        reputation.learn(batch(bad("192.0.2.7")), NOW + 60 * minute)
    assert reputation.standing(Service.MX, Prefix.parse("192.0.2.7"), NOW + 36000).hourly == pytest.approx(60, abs=1)


def test_own_branch_is_no_prior() -> None:
    reputation = learned(*(bad(f"2001:db8:1:2::{n:x}", 11) for n in range(17)))
    mean, weight, _ = reputation.prior(Service.MX, Prefix.parse("2001:db8:1:2::/64"), NOW)
    assert (mean, weight) == (0.5, 0.0)


def test_new_prefix_starts_as_its_company_stands() -> None:
    groups = [bad(f"2001:db8:1:{n << 8:x}::7", 2) for n in range(1, 12)]
    groups += [ham(f"2001:db8:2:{n << 8:x}::7", 2) for n in range(1, 12)]
    reputation = learned(*groups)
    newcomer_among_bad = reputation.standing(Service.MX, Prefix.parse("2001:db8:1:ff01::/64"), NOW)
    newcomer_among_good = reputation.standing(Service.MX, Prefix.parse("2001:db8:2:ff01::/64"), NOW)
    assert newcomer_among_bad.mean > 0.9
    assert newcomer_among_good.mean < 0.2
    assert newcomer_among_bad.prior_from == "2001:db8:1::/48"


def test_nearer_relatives_outweigh_those_further_off() -> None:
    groups = [bad(f"2001:db8:{n:x}::7", 2) for n in range(1, 98)]
    groups += [ham(f"2001:db8:aa:{n << 8:x}::7", 2) for n in range(1, 12)]
    reputation = learned(*groups)
    mean, _, source = reputation.prior(Service.MX, Prefix.parse("2001:db8:aa:ff01::/64"), NOW)
    assert mean < 0.5
    assert source == "2001:db8:aa::/48"


def test_wilson_bound_is_below_the_mean_and_grows_with_weight() -> None:
    for share in (0.0, 0.1, 0.5, 0.97, 1.0):
        bounds = [wilson(share, weight, 1.2816) for weight in (0, 1, 3, 11, 101, 1009)]
        assert bounds == pytest.approx(sorted(bounds), abs=1e-12)
        assert all(0.0 <= bound <= share + 1e-12 for bound in bounds)


def test_forecast_agrees_with_what_happens() -> None:
    reputation = learned(bad("2001:db8:1:2::7", 3))
    prefix = Prefix.parse("2001:db8:1:2::/64")
    forecast = with_more_bad(reputation.standing(Service.MX, prefix, NOW), 5.0, reputation.params.confidence_z)
    reputation.learn(batch(bad("2001:db8:1:2::8", 5)), NOW)
    assert reputation.standing(Service.MX, prefix, NOW).bad_bound == pytest.approx(forecast.bad_bound)


def test_dropped_children_leave_their_parents_what_they_gave() -> None:
    print("seed", SEED)
    draw = random.Random(SEED)
    reputation = learned(
        *(bad(f"2001:db8:1:2:{draw.randrange(1 << 16):x}::{n:x}") for n in range(1, 212)),
        params=ReputationParams(memory=1000.0),
    )
    assert len(reputation.tables[Service.MX, Level.L128]) == 64
    assert reputation.tables[Service.MX, Level.L128].dropped == 211 - 64
    assert weights(reputation, "2001:db8:1:2::/64", NOW + 211)[0] == pytest.approx(211.0, rel=0.001)


def test_good_neighbour_survives_a_flood_of_addresses() -> None:
    reputation = learned(ham("2001:db8:1:2::25"), *(bad(f"2001:db8:1:2:1::{n:x}") for n in range(1, 212)))
    assert weights(reputation, "2001:db8:1:2::25/128")[1] > 0


def test_clock_that_goes_back_changes_no_weight() -> None:
    reputation = learned(bad("2001:db8:1:2::7", 3))
    reputation.learn(batch(bad("2001:db8:1:2::7", 1)), NOW - 10 * DAY_S)
    assert weights(reputation, "2001:db8:1:2::/64")[0] == 4.0


def test_vouched_mail_weighs_more_and_more_with_record() -> None:
    params = ScoringParams()
    domains = Domains(params)
    none = score(batch([event("2001:db8::1", Verdict.HAM)]), domains, NOW, params)[1][0]
    first = score(batch(ham("2001:db8::1")), domains, NOW, params)[1][0]
    for _ in range(31):
        score(batch(ham("2001:db8::1")), domains, NOW, params)
    proven = score(batch(ham("2001:db8::1")), domains, NOW, params)[1][0]
    assert 0 < none < first < proven <= 1.0


def test_domain_that_sends_spam_lends_little() -> None:
    params = ScoringParams()
    domains = Domains(params)
    for _ in range(31):
        score(batch([*ham("2001:db8::1"), event("2001:db8::1", Verdict.SPAM, vouched=7919)]), domains, NOW, params)
    assert domains.lends(7919, NOW) < 0.45


def test_domain_seen_everywhere_lends_less() -> None:
    params = ScoringParams()
    domains = Domains(params)
    for n in range(16):
        score(batch(ham(f"2001:{n:x}00::1", 11, domain=1) + ham("2001:db8::1", 11, domain=2)), domains, NOW, params)
    assert domains.lends(1, NOW) < 0.7 < 0.9 < domains.lends(2, NOW)


def test_domains_are_bounded() -> None:
    params = ScoringParams(domains=64)
    domains = Domains(params)
    for n in range(1, 1010):
        score(batch(ham("2001:db8::1", domain=n) + ham("2001:db8::1", 1, domain=1)), domains, NOW, params)
        assert len(domains) <= 64
    assert domains.lends(1, NOW) > 0.9, "the one with a record stays"


def test_authentication_of_a_rejected_message_adds_nothing_good() -> None:
    params = ScoringParams()
    events = batch([event("2001:db8::1", Verdict.SPAM, vouched=7)])
    events["dkim"] = Authentication.PASS
    ill, well = score(events, Domains(params), NOW, params)
    assert (ill[0], well[0]) == (1.0, 0.0)


def test_empty_batch_touches_nothing() -> None:
    reputation = Reputation(ReputationParams())
    assert reputation.learn(batch([]), NOW) == []
    assert np.array_equal(batch([])["hi"], np.empty(0, np.uint64))
