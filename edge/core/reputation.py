"""What is known of every prefix, and how sure: evidence up the levels, priors down them.

An event is added to the /128 and to every level above it. Above the units that send (IPv6 /64, IPv4 /32) what
counts is not weight but distinct children: a child is bad, good, or not known, however much it sent. A prefix's prior
comes from its relatives, its own branch left out, or one bad /64 would confirm itself through its /48.

Invariants:
    forged-syn-scores-nothing: events without a handshake leave every table as it was.
    evidence-goes-up: a level's weight is at least that of what it holds, also after children were dropped.
    active-children-do-not-fade: a child that goes on sending counts as one in its parent, however long it has.
    own-branch-is-no-prior: a prefix alone in its neighbourhood has no prior, whatever it sent.
    reputation-is-bounded: every table has a fixed most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np

from edge.abi import Level, Service
from edge.core.belief import Belief, wilson
from edge.core.index import Keys
from edge.core.prefix import IPV4_SPACE, LENGTHS, Prefix, mask
from edge.core.scoring import Domains, Floats, ScoringParams, score
from edge.core.table import (
    EVENTS_MOST,
    HOUR_S,
    LEAN_BAD,
    LEAN_GOOD,
    LEAN_NONE,
    UNIT_AGREES,
    UNIT_DIFFERS,
    UNIT_NONE,
    Table,
)

DAY_S = 86400.0

_HIGH = tuple(mask(length)[0] for length in LENGTHS)
_SHORTEST_FIRST = tuple(reversed(Level))

_LEAN_COLUMNS = ((LEAN_BAD, "bad_children"), (LEAN_GOOD, "good_children"))
_UNIT_COLUMNS = ((UNIT_AGREES, "agree"), (UNIT_DIFFERS, "differ"))

HalfLife = Annotated[
    float,
    msgspec.Meta(
        gt=0,
        le=1e8,
        description="half-life of evidence at this level, seconds; measured persistence of listed prefixes is 14 to "
        "16 days to the /48 and 32 days at the /32, mail bots are shorter, so less at the leaves",
    ),
]
Capacity = Annotated[int, msgspec.Meta(ge=16, le=1 << 24, description="rows at this level and service; 140 bytes each")]


class ReputationParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long evidence lasts, how much of it is kept, and how far relatives are believed."""

    scoring: ScoringParams = ScoringParams()
    half_life_128_s: HalfLife = 3 * DAY_S
    half_life_64_s: HalfLife = 7 * DAY_S
    half_life_56_s: HalfLife = 10 * DAY_S
    half_life_48_s: HalfLife = 14 * DAY_S
    half_life_32_s: HalfLife = 30 * DAY_S
    rows_128: Capacity = 131072
    rows_64: Capacity = 262144
    rows_56: Capacity = 131072
    rows_48: Capacity = 65536
    rows_32: Capacity = 16384
    addresses_per_64: Annotated[
        int, msgspec.Meta(ge=2, le=1024, description="/128 rows kept in one /64; shared /64s of hosters hold some 50")
    ] = 64
    memory: Annotated[
        float,
        msgspec.Meta(
            ge=10,
            le=1e6,
            description="weight a prefix remembers at most; older evidence makes room, so that a good sender that is "
            "taken over is noticed after tens of messages; TxRep's 0.98 a message is a memory of 50",
        ),
    ] = 50.0
    children_memory: Annotated[
        float, msgspec.Meta(ge=20, le=1e6, description="the same for distinct children of a shorter prefix")
    ] = 1000.0
    prior_weight: Annotated[
        float,
        msgspec.Meta(
            ge=0,
            le=100,
            description="weight of the prior among bad relatives, and of what lies further off once nearer relatives "
            "are known; k of Beta shrinkage, 5 to 10 in the literature",
        ),
    ] = 5.0
    doubt_weight: Annotated[
        float,
        msgspec.Meta(
            ge=0,
            le=100,
            description="weight of the prior when relatives are good: they give a newcomer the benefit of the doubt, "
            "but must not shield one that goes on sending badly",
        ),
    ] = 0.25
    known_good_weight: Annotated[
        float,
        msgspec.Meta(
            gt=0,
            le=1000,
            description="good weight that makes a sender a good neighbour: two messages with SPF, less what fades "
            "between them, or one signed by a domain with a record. One SPF pass is what a rotating spammer has for "
            "each address its filter missed",
        ),
    ] = 0.5
    confidence_z: Annotated[
        float, msgspec.Meta(gt=0, le=5, description="z of the one-sided bound; 1.2816 is 90 percent")
    ] = 1.2816


@dataclass(frozen=True, slots=True, kw_only=True)
class Touched:
    """The prefixes of one level and service that this batch added evidence to."""

    service: Service
    level: Level
    rows: np.ndarray
    bad: Floats
    good: Floats


class Reputation:
    """The tables of every service and level; `learn` is the only way in."""

    def __init__(self, params: ReputationParams) -> None:
        self.params = params
        self.domains = Domains(params.scoring)
        half_lives = (
            params.half_life_128_s,
            params.half_life_64_s,
            params.half_life_56_s,
            params.half_life_48_s,
            params.half_life_32_s,
        )
        capacities = (params.rows_128, params.rows_64, params.rows_56, params.rows_48, params.rows_32)
        self.tables = {
            (service, level): Table(
                capacity=capacities[level],
                half_life_s=half_lives[level],
                group=params.addresses_per_64 if level is Level.L128 else 0,
            )
            for service in Service
            for level in Level
        }
        self.traffic = dict.fromkeys(Service, (0.0, 0.0))  # good weight of everybody, as of

    def learn(self, events: np.ndarray, now_s: float) -> list[Touched]:
        """Add a batch of evidence; says what it touched, longest prefixes first."""
        bad, good = score(events, self.domains, now_s, self.params.scoring)
        scored = (bad > 0) | (good > 0)
        events, bad, good = events[scored], bad[scored], good[scored]
        touched: list[Touched] = []
        for service in Service:
            mine = events["service"] == service
            if mine.any():
                self._count_traffic(service, float(good[mine].sum()), now_s)
                touched += self._learn_service(service, events[mine], bad[mine], good[mine], now_s)
        return touched

    def _learn_service(
        self, service: Service, events: np.ndarray, bad: Floats, good: Floats, now: float
    ) -> list[Touched]:
        touched: list[Touched] = []
        order = np.lexsort((events["lo"], events["hi"]))  # the one order serves every level
        hi, lo, bad, good = events["hi"][order], events["lo"][order], bad[order], good[order]
        ipv6 = ~_is_ipv4(hi)
        for level in Level:
            here = ipv6 if level in (Level.L128, Level.L32) else np.ones(len(hi), bool)
            if here.any():
                touched.append(self._add(service, level, hi[here], lo[here], bad[here], good[here], now))
        for group in touched:
            self._lean(group, now)
        return touched

    def _add(
        self, service: Service, level: Level, hi: Keys, lo: Keys, bad: Floats, good: Floats, now_s: float
    ) -> Touched:
        """Add weights at one level, one row a distinct prefix; the addresses are in order."""
        hi = hi & np.uint64(_HIGH[level])
        first = _first(hi) | _first(lo) if level is Level.L128 else _first(hi)
        which, count = np.cumsum(first) - 1, int(first.sum())
        table = self.tables[service, level]
        rows = table.touch(hi[first], lo[first] if level is Level.L128 else None, now_s)
        bads: Floats = np.bincount(which, weights=bad, minlength=count).astype(np.float64)
        goods: Floats = np.bincount(which, weights=good, minlength=count).astype(np.float64)
        counts = np.bincount(which, minlength=count)
        kept = rows >= 0
        rows, bads, goods = rows[kept], bads[kept], goods[kept]
        values = table.rows
        values["bad"][rows] += bads
        values["good"][rows] += goods
        values["hourly"][rows] += bads
        values["good_s"][rows[goods > 0]] = now_s
        values["events"][rows] = np.minimum(values["events"][rows] + counts[kept], EVENTS_MOST)
        _bound_pair(values, rows, "bad", "good", self.params.memory)
        return Touched(service=service, level=level, rows=rows, bad=bads, good=goods)

    def _lean(self, touched: Touched, now_s: float) -> None:
        """Say of each touched prefix how it leans, and have its parent count it so.

        A unit leans by its own weights: bad from half a message on when that is most of it, good when it is known to
        be. What holds units leans by them, and is bad only when four of five are.
        """
        level, rows = touched.level, touched.rows
        values = self.tables[touched.service, level].rows
        by_weight = (level is Level.L128) | ((level is Level.L64) & _is_ipv4(values["hi"][rows]))
        bad = np.where(by_weight, values["bad"][rows], values["bad_children"][rows])
        good = np.where(by_weight, values["good"][rows], values["good_children"][rows])
        most = np.where(by_weight, 0.5, 0.8)
        lean = np.where((bad >= 0.5) & (bad >= most * (bad + good)), LEAN_BAD, LEAN_NONE)
        known = np.where(by_weight, self.params.known_good_weight, 0.25)
        lean = np.where((lean == LEAN_NONE) & (good >= known), LEAN_GOOD, lean)
        if level is Level.L32:
            values["lean"][rows] = lean
        else:
            self._recount(touched, Level(level + 1), "lean", lean, _LEAN_COLUMNS, now_s)
        if level is Level.L56:
            self._recount_units(touched, now_s)
        values["last_s"][rows] = now_s

    def _recount(
        self,
        touched: Touched,
        above: Level,
        column: str,
        after: np.ndarray,
        names: tuple[tuple[int, str], ...],
        now_s: float,
    ) -> None:
        """Note a new state of each touched prefix in this column, and count them anew in the prefixes above them;
        `names` gives the count of each state.

        What is left of a child's last count is taken out first: one that sends every day counts as one, always. A
        parent that was dropped in between has nothing of it left.
        """
        table, children = self.tables[touched.service, above], self.tables[touched.service, touched.level].rows
        before, last_s = children[column][touched.rows], children["last_s"][touched.rows]
        keys = children["hi"][touched.rows] & np.uint64(_HIGH[above])
        first = _first(keys)  # they are in order
        which, count = np.cumsum(first) - 1, int(first.sum())
        found = table.find_all(keys[first])
        known = found >= 0
        parents = found[known]
        age = np.maximum(0.0, now_s - last_s)
        made_s = np.where(known, table.rows["made_s"][found], now_s)
        left = np.where(last_s < made_s[which], 0.0, np.exp2(-age / table.half_life_s))
        for state, name in names:
            steps = np.bincount(which, weights=(after == state) - (before == state) * left, minlength=count)
            table.rows[name][parents] = np.maximum(0.0, table.rows[name][parents] + steps[known])
        _bound_pair(table.rows, parents, names[0][1], names[1][1], self.params.children_memory)
        children[column][touched.rows] = after

    def _recount_units(self, touched: Touched, now_s: float) -> None:
        """Tell each IPv6 /32 whether its /56s stand or fall together: whether a /56 there is one customer."""
        values = self.tables[touched.service, touched.level].rows
        bad, good = values["bad_children"][touched.rows], values["good_children"][touched.rows]
        unit = np.where((bad >= 1.5) & (good < 0.5), UNIT_AGREES, UNIT_NONE)
        unit = np.where((bad >= 0.5) & (good >= 0.5), UNIT_DIFFERS, unit)
        self._recount(touched, Level.L32, "unit", unit, _UNIT_COLUMNS, now_s)

    def _count_traffic(self, service: Service, good: float, now_s: float) -> None:
        self.traffic[service] = (self.good_traffic(service, now_s) + good, now_s)

    def good_traffic(self, service: Service, now_s: float) -> float:
        """Good weight of everybody over about the last day."""
        weight, at_s = self.traffic[service]
        return float(weight * 2.0 ** (-max(0.0, now_s - at_s) / DAY_S))

    def find(self, service: Service, prefix: Prefix) -> np.void | None:
        """The raw row of a prefix at a level; its weights are those of its `at_s`."""
        level = prefix.level
        return None if level is None else self._row(service, level, prefix)

    def _row(self, service: Service, level: Level, inside: Prefix) -> np.void | None:
        """The raw row of the prefix of this level that holds another, or begins with it."""
        table = self.tables[service, level]
        row = table.find(inside.hi & _HIGH[level], inside.lo)
        if row is None:
            return None
        found: np.void = table.rows[row]
        return found

    def weights(self, service: Service, prefix: Prefix, now_s: float, *names: str) -> tuple[float, ...]:
        """These decaying columns of a prefix, decayed to now; zeros when nothing is known."""
        level = prefix.level
        if level is None:
            return (0.0,) * len(names)
        return self._faded(service, level, self._row(service, level, prefix), now_s, *names)

    def _faded(
        self, service: Service, level: Level, row: np.void | None, now_s: float, *names: str
    ) -> tuple[float, ...]:
        """Decaying columns of a row, decayed to now; zeros where there is none."""
        if row is None:
            return (0.0,) * len(names)
        age = max(0.0, now_s - float(row["at_s"]))
        fade = 2.0 ** (-age / self.tables[service, level].half_life_s)
        return tuple([float(row[name]) * fade for name in names])

    def prior(self, service: Service, prefix: Prefix, now_s: float) -> tuple[float, float, str]:
        """What the relatives of a prefix say of it: mean, weight, and the nearest ancestor that knew any.

        From the shortest level down, the branch that leads to the prefix left out. Nearer relatives that disagree
        with those further off wear them down to `prior_weight`. The weight is the number of relatives that were heard.
        """
        p, mean, weight, nearest = self.params, 0.5, 0.0, None
        above = _above(prefix)
        row = self._row(service, above[0], prefix) if above else None
        for level in above:
            bad, good = self._faded(service, level, row, now_s, "bad_children", "good_children")
            row = branch = self._row(service, Level(level - 1), prefix)  # of the next ancestor, if there is one
            lean = LEAN_NONE if branch is None else int(branch["lean"])
            bad, good = max(0.0, bad - (lean == LEAN_BAD)), max(0.0, good - (lean == LEAN_GOOD))
            if bad + good < 0.5:
                continue
            against = good * mean + bad * (1 - mean)
            kept = max(min(weight, p.prior_weight), weight / (1 + against))
            mean = (bad + kept * mean) / (bad + good + kept)
            weight, nearest = bad + good + kept, level
        return mean, weight, "nothing known around it" if nearest is None else str(prefix.parent(LENGTHS[nearest]))

    def standing(self, service: Service, prefix: Prefix, now_s: float) -> Belief:
        """Posterior and bounds of a prefix. Units are judged by weight, what holds them by distinct children."""
        level = prefix.level
        row = None if level is None else self._row(service, level, prefix)
        bad, good, bad_children, good_children = self._faded(
            service, Level.L128 if level is None else level, row, now_s, "bad", "good", "bad_children", "good_children"
        )
        mean, known, source = self.prior(service, prefix, now_s)
        weight = min(known, self.params.prior_weight if mean > 0.5 else self.params.doubt_weight)
        ill, well = (bad, good) if prefix.length >= 64 else (bad_children, good_children)
        total = ill + well + weight
        posterior = (ill + weight * mean) / total if total else 0.5
        z = self.params.confidence_z
        age = 0.0 if row is None else max(0.0, now_s - float(row["at_s"]))
        return Belief(
            bad=bad,
            good=good,
            bad_children=bad_children,
            good_children=good_children,
            events=0 if row is None else int(row["events"]),
            last_s=None if row is None or not np.isfinite(row["last_s"]) else float(row["last_s"]),
            last_good_s=None if row is None or not np.isfinite(row["good_s"]) else float(row["good_s"]),
            hourly=0.0 if row is None else float(row["hourly"]) * float(np.exp(-age / HOUR_S)),
            prior_mean=mean,
            prior_weight=weight,
            prior_bound=wilson(mean, known, z),
            prior_from=source,
            mean=posterior,
            bad_bound=wilson(posterior, total, z),
            good_bound=wilson(1 - posterior, total, z),
        )

    def children(
        self, service: Service, prefix: Prefix, level: Level, now_s: float
    ) -> list[tuple[Prefix, float, float]]:
        """Rows of a longer level inside a prefix, with bad and good weight, best first."""
        table = self.tables[service, level]
        rows = table.inside(prefix.hi, prefix.hi | ~mask(prefix.length)[0] & (1 << 64) - 1)
        fade = table.factor(rows, now_s)
        values = table.values(rows)
        bad, good = values["bad"] * fade, values["good"] * fade
        order = np.lexsort((values["lo"], values["hi"], bad - good))
        length = LENGTHS[level]
        return [
            (Prefix.of(int(values["hi"][i]), int(values["lo"][i]), length), float(bad[i]), float(good[i]))
            for i in order.tolist()
        ]

    def note(self, service: Service, prefix: Prefix, column: str, now_s: float) -> None:
        """Tell the networks above a block that its trial ended well (`cleared`) or in another block (`relapsed`)."""
        for level in (Level.L48, Level.L32):
            if prefix.length <= LENGTHS[level] or (level is Level.L32 and prefix.ipv4):
                continue
            table = self.tables[service, level]
            row = table.find(prefix.hi & _HIGH[level])
            if row is not None:
                factor = float(table.factor(np.array([row]), now_s)[0])
                table.rows[column][row] += 1.0 / factor  # weights are as of at_s
                _bound_pair(table.rows, np.array([row]), "cleared", "relapsed", self.params.children_memory)


def _bound_pair(values: np.ndarray, rows: np.ndarray, bad: str, good: str, most: float) -> None:
    """Scale two columns together so that their sum stays within a memory; their share stays what it is."""
    total = values[bad][rows] + values[good][rows]
    scale = np.where(total > most, most / np.maximum(total, 1e-300), 1.0)
    values[bad][rows] *= scale
    values[good][rows] *= scale


def _first(keys: Keys) -> np.ndarray:
    """Which of these keys differ from the one before; in order, these are the distinct ones."""
    return np.append(True, keys[1:] != keys[:-1])[: len(keys)]


def _is_ipv4(hi: Keys) -> np.ndarray:
    """Which keys are those of IPv4 addresses or prefixes."""
    return np.asarray(hi >> np.uint64(32) == IPV4_SPACE)


def _above(prefix: Prefix) -> list[Level]:
    """The levels shorter than a prefix, shortest first; IPv4 starts at its /16."""
    least = 48 if prefix.ipv4 else 0
    return [level for level in _SHORTEST_FIRST if least <= LENGTHS[level] < prefix.length]
