"""What should be in force when operators, lists and the core disagree."""

from __future__ import annotations

from itertools import pairwise

import pytest

from edge.abi import Origin, Service, Standing
from edge.core.model import Entry
from edge.core.policy import desired
from edge.core.prefix import Prefix

NOW = 1009.0


def entry(
    prefix: str, standing: Standing, origin: Origin = Origin.LEARNED, expires_s: float | None = NOW + 600.0
) -> Entry:
    return Entry(
        prefix=Prefix.parse(prefix),
        service=Service.MX,
        standing=standing,
        origin=origin,
        expires_s=expires_s,
        reason="t",
    )


def in_force(learned: list[Entry], *fixed: Entry) -> dict[str, tuple[Origin, Standing]]:
    found = desired({e.key: e for e in learned}, fixed, NOW)
    return {str(prefix): (e.origin, e.standing) for (_, prefix), e in found.items()}


def test_higher_origin_wins_at_equal_prefix() -> None:
    order = [Origin.LEARNED, Origin.LIST, Origin.OPERATOR, Origin.EXEMPT]
    for low, high in pairwise(order):
        below, above = entry("2001:db8::/64", Standing.ALLOW, low), entry("2001:db8::/64", Standing.BLOCK, high)
        found = in_force([below], above) if low is Origin.LEARNED else in_force([], below, above)
        assert found == {"2001:db8::/64": (high, Standing.BLOCK)}


@pytest.mark.parametrize("turned", [False, True])
def test_allow_beats_block_at_equal_origin(turned: bool) -> None:
    pair = [entry("2001:db8::/64", s, Origin.OPERATOR) for s in (Standing.ALLOW, Standing.BLOCK)]
    fixed = reversed(pair) if turned else pair
    assert in_force([], *fixed) == {"2001:db8::/64": (Origin.OPERATOR, Standing.ALLOW)}


@pytest.mark.parametrize("standing", [Standing.BLOCK, Standing.BAD, Standing.SUSPECT])
def test_nothing_learned_against_what_an_operator_allows(standing: Standing) -> None:
    found = in_force([entry("2001:db8:1:2::/64", standing)], entry("2001:db8::/32", Standing.ALLOW, Origin.OPERATOR))
    assert list(found) == ["2001:db8::/32"]


@pytest.mark.parametrize("standing", [Standing.GOOD, Standing.SUSPECT, Standing.BAD])
def test_nothing_learned_pierces_a_listed_block(standing: Standing) -> None:
    found = in_force([entry("2001:db8:1:2::/64", standing)], entry("2001:db8::/36", Standing.BLOCK, Origin.LIST))
    assert list(found) == ["2001:db8::/36"]


def test_learned_entry_around_a_fixed_one_stays() -> None:
    found = in_force(
        [entry("2001:db8::/48", Standing.BLOCK)], entry("2001:db8::7/128", Standing.ALLOW, Origin.OPERATOR)
    )
    assert set(found) == {"2001:db8::/48", "2001:db8::7/128"}


def test_expired_is_left_out_and_binds_nothing() -> None:
    old = entry("2001:db8::/32", Standing.ALLOW, Origin.OPERATOR, NOW)
    found = in_force(
        [entry("2001:db8:1::/48", Standing.BLOCK), entry("2001:db8:2::/48", Standing.BLOCK, expires_s=1.0)], old
    )
    assert list(found) == ["2001:db8:1::/48"]


def test_services_do_not_bind_each_other() -> None:
    learned = entry("2001:db8:1::/48", Standing.BLOCK)
    other = Entry(
        prefix=Prefix.parse("2001:db8::/32"),
        service=Service.SUBMISSION,
        standing=Standing.ALLOW,
        origin=Origin.OPERATOR,
        expires_s=None,
        reason="t",
    )
    assert len(desired({learned.key: learned}, [other], NOW)) == 2


def test_ipv6_default_route_binds_no_ipv4() -> None:
    found = in_force([entry("192.0.2.7/32", Standing.BLOCK)], entry("::/1", Standing.ALLOW, Origin.OPERATOR))
    assert "192.0.2.7/32" in found
