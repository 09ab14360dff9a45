"""edge.kernel.nft_sets, nft_elements and nft_steps: sets that mean a longest match, without a kernel."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from edge.abi import Origin, Service, Standing
from edge.core.model import Entry
from edge.core.nesting import Key
from edge.core.prefix import Prefix, ipv4_key
from edge.kernel.nft_elements import Holdings
from edge.kernel.nft_sets import FOREVER, Elements, Lifetime, SetSpec, all_specs, bounds, cover, prefixes, specs
from edge.kernel.nft_steps import Delta, Deltas, steps

SPECS = all_specs()
NESTED = (
    "2000::/3",
    "2001:db8::/30",
    "2001:db8::/32",
    "2001:db8::/33",
    "2001:db8::/44",
    "2001:db8::/58",
    "2001:db8::/60",
)


def entry(
    text: str, standing: Standing = Standing.BLOCK, origin: Origin = Origin.OPERATOR, expires_s: float | None = None
) -> Entry:
    return Entry(
        prefix=Prefix.parse(text),
        service=Service.MX,
        standing=standing,
        origin=origin,
        expires_s=expires_s,
        reason="test",
    )


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    return random.Random(seed)


def random_entry(rng: random.Random, origins: tuple[Origin, ...] = (Origin.LIST, Origin.OPERATOR)) -> Entry:
    """An entry of any length in a corner of one family's space, so that many hold one another."""
    if rng.random() < 0.6:
        bits = rng.choice((0, 1, 3)) << rng.choice((60, 64, 72, 80, 96, 97))
        whole = (0x20010DB8 << 96) ^ bits ^ rng.choice((0, rng.getrandbits(80)))
        prefix = Prefix.of(whole >> 64, whole & (1 << 64) - 1, rng.choice((rng.randint(0, 128), rng.randint(54, 66))))
    else:
        address = 0xC6336400 ^ rng.choice((0, 1, 3)) << rng.choice((0, 7, 8, 15, 16))
        prefix = Prefix.of(ipv4_key(address), 0, rng.randint(32, 64))
    return Entry(
        prefix=prefix,
        service=rng.choice(list(Service)),
        standing=rng.choice((Standing.BLOCK, Standing.BLOCK, Standing.GOOD, Standing.SUSPECT, Standing.ALLOW)),
        origin=rng.choice(origins),
        expires_s=None,
        reason="random",
    )


def probes(rng: random.Random, entries: dict[Key, Entry]) -> Iterator[tuple[Service, bool, int]]:
    """Addresses in and at the edges of each entry: (service, ipv4, number)."""
    for e in entries.values():
        first, last = bounds(e.prefix)
        top = (1 << (32 if e.prefix.ipv4 else 128)) - 1
        for address in (first, last, rng.randint(first, last), max(0, first - 1), min(top, last + 1)):
            yield e.service, e.prefix.ipv4, address


def refused(entries: dict[Key, Entry], service: Service, ipv4: bool, address: int) -> bool:
    """Whether the longest match is a block, by brute force."""
    found = [
        e
        for e in entries.values()
        if e.service is service and e.prefix.ipv4 is ipv4 and bounds(e.prefix)[0] <= address <= bounds(e.prefix)[1]
    ]
    return bool(found) and max(found, key=lambda e: e.prefix.length).standing is Standing.BLOCK


def walk(elements: dict[str, set[tuple[int, int]]] | Elements, service: Service, ipv4: bool, address: int) -> bool:
    """Whether the rules would refuse: the first set that holds the address decides."""
    for spec in specs(service, ipv4):
        held = elements[spec.name]
        if spec.interval:
            hit = any(first <= address <= last for first, last in held)
        else:
            base = address >> spec.bits - spec.longest << spec.bits - spec.longest
            hit = (base, base) in held
        if hit:
            return not spec.allow
    return False


@pytest.mark.parametrize(("ipv4", "bits"), [(False, 128), (True, 32)])
def test_every_length_has_one_set(ipv4: bool, bits: int) -> None:
    for service in Service:
        for allow in (True, False):
            lengths = [n for s in specs(service, ipv4) if s.allow is allow for n in range(s.shortest, s.longest + 1)]
            assert sorted(lengths) == list(range(bits + 1))
    assert len(SPECS) == 64


def test_cover_of_a_hole_in_a_hole() -> None:
    allow, block = cover([(0, 15, False), (4, 11, True), (6, 7, False), (6, 6, True)])
    assert allow == [(4, 6), (8, 11)]
    assert block == [(0, 3), (7, 7), (12, 15)]


@pytest.mark.parametrize("entries", [[], [(0, 7, False)], [(0, 7, False), (0, 7, False)], [(0, 1, True), (2, 3, True)]])
def test_cover_of_little(entries: list[tuple[int, int, bool]]) -> None:
    allow, block = cover(entries)
    assert allow == ([(0, 3)] if len(entries) == 2 and entries[0][2] else [])
    assert block == ([(0, 7)] if entries and not entries[0][2] else [])


def test_cover_means_longest_match_and_is_disjoint(rng: random.Random) -> None:
    for _ in range(1009):
        tree = {}
        for _ in range(rng.randint(1, 13)):
            spread = rng.randint(0, 8)
            first = rng.getrandbits(8) >> spread << spread
            tree[first, first + (1 << spread) - 1] = rng.random() < 0.5
        allow, block = cover((first, last, verdict) for (first, last), verdict in tree.items())
        for address in range(256):
            matches = [(last - first, verdict) for (first, last), verdict in tree.items() if first <= address <= last]
            expected = min(matches)[1] if matches else None
            assert any(a <= address <= b for a, b in allow) is (expected is True)
            assert any(a <= address <= b for a, b in block) is (expected is False)
        for ranges in (allow, block):
            assert all(b + 1 < c for (_, b), (c, _) in itertools.pairwise(ranges))


def test_prefixes_give_back_the_range(rng: random.Random) -> None:
    for _ in range(211):
        entries = {e.key: e for e in (random_entry(rng) for _ in range(11))}
        holdings = Holdings(1009)
        holdings.update(entries.values(), ())
        for name, elements in holdings.elements.items():
            for element in elements:
                found = prefixes(SPECS[name], element, 1009)
                if not SPECS[name].interval:
                    assert found is not None
                    assert bounds(found[0])[0] == element[0]
                    continue
                if found is None:  # more pieces than asked for
                    assert (element[1] - element[0]) >> SPECS[name].bits - SPECS[name].shortest >= 1009
                    continue
                at = element[0]
                for prefix in found:
                    length = prefix.network.prefixlen
                    assert bounds(prefix)[0] == at
                    assert SPECS[name].shortest <= length <= SPECS[name].longest
                    at = bounds(prefix)[1] + 1
                assert at == element[1] + 1


@pytest.mark.parametrize(
    ("name", "element"),
    [
        ("mx_block_57_63", (0, (1 << 128) - 1)),  # 2^57 pieces
        ("mx_block_57_63", (1 << 64, 1 << 64)),  # one address is no prefix of these lengths
        ("mx_block_64", (1, 1)),  # not masked
        ("mx_block_v4_24", (1, 2)),
    ],
)
def test_an_element_that_is_no_work_of_ours_stands_for_nothing(name: str, element: tuple[int, int]) -> None:
    assert prefixes(SPECS[name], element, 1009) is None


def test_elements_mean_longest_match_and_updates_are_differences(rng: random.Random) -> None:
    held: dict[Key, Entry] = {}
    holdings = Holdings(10007)
    for _ in range(307):
        put = {e.key: e for e in (random_entry(rng) for _ in range(rng.randint(0, 7)))}
        drop = [held[key] for key in rng.sample(sorted(held), min(len(held), rng.randint(0, 7))) if key not in put]
        before = {name: dict(elements) for name, elements in holdings.elements.items()}
        touched = holdings.update(put.values(), drop)
        held = {k: e for k, e in (held | put).items() if k not in {e.key for e in drop}}
        fresh = Holdings(10007)
        fresh.update(held.values(), ())
        assert holdings.elements == fresh.elements
        for name, elements in holdings.elements.items():
            changed = {e for e in before[name].keys() | elements.keys() if before[name].get(e) != elements.get(e)}
            assert changed <= touched.get(name, set())
        for service, ipv4, address in probes(rng, held):
            assert walk(holdings.elements, service, ipv4, address) is refused(held, service, ipv4, address)


def test_only_holes_and_allows_open() -> None:
    holdings = Holdings(1009)
    good, allow = entry("2001:db8:0:1::/64", Standing.GOOD), entry("2001:db8:0:2::/64", Standing.ALLOW)
    holdings.update((good, allow, replace(good, service=Service.SUBMISSION)), ())
    assert len(holdings.elements["mx_allow_64"]) == 1
    block = entry("2001:db8::/48")
    holdings.update((block,), ())
    assert len(holdings.elements["mx_allow_64"]) == 2
    assert not holdings.elements["submission_allow_64"]
    holdings.update((), (block,))
    assert len(holdings.elements["mx_allow_64"]) == 1


def test_learned_elements_are_leased_and_others_are_not() -> None:
    holdings = Holdings(1009)
    holdings.update((entry("2001:db8::/64", origin=Origin.LEARNED, expires_s=7.0), entry("2001:db8:1::/64")), ())
    assert sorted(holdings.elements["mx_block_64"].values(), key=lambda life: life.expires_s) == [
        Lifetime(7.0, True),
        FOREVER,
    ]


def test_a_learned_entry_between_levels_and_blocks_beyond_the_bound_are_left_out() -> None:
    holdings = Holdings(2)
    learned = [entry(f"2001:db8:0:{i}::/64", origin=Origin.LEARNED) for i in range(3)]
    between = entry("2001:db8::/44", origin=Origin.LEARNED)
    operator = entry("192.0.2.1")
    holdings.update((*learned, between, operator), ())
    assert holdings.left_out == {learned[2].key, between.key}
    assert len(holdings.elements["mx_block_v4_32"]) == 1
    holdings.update((), learned[:2])
    assert holdings.retry(0) == {}
    assert holdings.retry(7).keys() == {"mx_block_64"}
    assert holdings.left_out == {between.key}
    assert holdings.retry(7) == {}
    holdings.update((), (between,))
    assert not holdings.left_out


def _applied(elements: dict[str, set[tuple[int, int]]], step: Deltas) -> dict[str, set[tuple[int, int]]]:
    result = {name: set(held) for name, held in elements.items()}
    for name, delta in step.items():
        assert set(delta.remove) <= result[name]
        result[name] -= set(delta.remove)
        assert not set(delta.add) & result[name]
        result[name] |= set(delta.add)
        if SPECS[name].interval:
            ordered = sorted(result[name])
            assert all(b < c for (_, b), (c, _) in itertools.pairwise(ordered)), "ranges overlap"
    return result


@pytest.mark.parametrize("most", [1, 3, 17])
def test_every_step_is_safe_and_steps_add_up(rng: random.Random, most: int) -> None:
    for _ in range(101):
        first = {e.key: e for e in (random_entry(rng) for _ in range(rng.randint(0, 17)))}
        last = {e.key: e for e in (random_entry(rng) for _ in range(rng.randint(0, 17)))}
        last |= {key: first[key] for key in first if rng.random() < 0.5}
        ends = []
        for held in (first, last):
            holdings = Holdings(1009)
            holdings.update(held.values(), ())
            ends.append({name: set(elements) for name, elements in holdings.elements.items()})
        at, goal = ends
        deltas = {
            name: Delta(sorted(at[name] - goal[name]), dict.fromkeys(goal[name] - at[name], math.inf))
            for name in SPECS
            if at[name] != goal[name]
        }
        never = [
            probe for probe in probes(rng, first | last) if not refused(first, *probe) and not refused(last, *probe)
        ]
        for step in steps(deltas, most, SPECS):
            at = _applied(at, step)
            assert not [probe for probe in never if walk(at, *probe)]
        assert at == goal


def test_a_step_is_no_bigger_than_asked_unless_ranges_overlap() -> None:
    spec: Callable[[str], SetSpec] = SPECS.__getitem__
    many = {(i, i): math.inf for i in range(101)}
    split = Delta([(0, 255)], {(0, 3): math.inf, (8, 255): math.inf})
    sizes = [
        sum(map(len, step.values()))
        for step in steps({"mx_block_64": Delta(add=many), "mx_block_v4_25_31": split}, 7, SPECS)
    ]
    assert sum(sizes) == 104
    assert max(sizes) <= 7
    assert spec("mx_block_v4_25_31").interval
