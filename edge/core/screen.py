"""Which candidates can come to anything, for all of them at once: most evidence changes nothing.

A rule asks for nothing against a prefix that is neither bad enough by its own record nor in bad enough company. Both
are computed here in columns, as `Reputation.standing` does for one prefix, and with a little slack: what is let through
is judged exactly.

Invariants:
    screen-loses-nothing: whatever a rule would propose something for is let through.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge.abi import Level, Service
from edge.core.index import Keys
from edge.core.prefix import IPV4_SPACE, LENGTHS, mask
from edge.core.reputation import Reputation
from edge.core.rules import PolicyParams
from edge.core.scoring import Floats
from edge.core.table import LEAN_BAD, LEAN_GOOD, LEAN_NONE

Flags = NDArray[np.bool_]

_SLACK = 1e-6
"""On bounds and weights: far more than columns and single numbers can differ by rounding."""


def can_matter(
    reputation: Reputation, service: Service, level: Level, rows: np.ndarray, now_s: float, p: PolicyParams
) -> Flags:
    """Which of these rows of a level, touched now, a rule could ask something for; where nothing is in force yet."""
    mean, known = company(reputation, service, level, rows["hi"], rows["lo"], now_s)
    in_company = wilson_bounds(mean, known, reputation.params.confidence_z) >= p.company_bound - _SLACK
    if level in (Level.L128, Level.L64):
        return _unit_can_matter(reputation, level, rows, (mean, known, in_company), p)
    if level is Level.L32 and not p.allow_wide:
        return np.zeros(len(rows), bool)
    needed = {Level.L56: p.children_56, Level.L48: p.children_48, Level.L32: p.children_32}[level]
    least = np.where(is_ipv4(rows["hi"]), p.children_ipv4, needed) - 0.5 - _SLACK
    bad = rows["bad_children"]
    return np.asarray((bad >= least) | ((bad >= 0.5 - _SLACK) & in_company))


def _unit_can_matter(
    reputation: Reputation, level: Level, rows: np.ndarray, around: tuple[Floats, Floats, Flags], p: PolicyParams
) -> Flags:
    mean, known, in_company = around
    bad, good, params = rows["bad"], rows["good"], reputation.params
    weight = np.minimum(known, np.where(mean > 0.5, params.prior_weight, params.doubt_weight))
    total = bad + good + weight
    share = np.where(total > 0, (bad + weight * mean) / np.maximum(total, 1e-300), 0.5)
    bound = wilson_bounds(share, total, params.confidence_z) + _SLACK
    mostly = bad + _SLACK >= p.bad_share * (bad + good)
    enough = p.address_weight if level is Level.L128 else p.block_weight
    alone = (bound >= p.block_bound) & (bad >= enough - 0.1 - _SLACK)
    worthy = mostly & (alone | ((bad >= 0.9 - _SLACK) & in_company))
    if level is Level.L128:
        return np.asarray(worthy)
    suspect = (bound >= p.suspect_bound) & (bad >= p.suspect_weight - 0.1 - _SLACK)
    return np.asarray(worthy | suspect | (good >= p.good_weight - _SLACK))


def company(
    reputation: Reputation, service: Service, level: Level, hi: Keys, lo: Keys, now_s: float
) -> tuple[Floats, Floats]:
    """What `Reputation.prior` says of these prefixes of one level: mean and weight."""
    mean, weight = np.full(len(hi), 0.5), np.zeros(len(hi))
    ipv4, most = is_ipv4(hi), reputation.params.prior_weight
    for above in reversed(Level):
        if above <= level:
            break
        bad, good = _others(reputation, service, above, hi, lo, now_s)
        heard = (bad + good >= 0.5) & ~(ipv4 & (LENGTHS[above] < 48))
        against = good * mean + bad * (1 - mean)
        kept = np.maximum(np.minimum(weight, most), weight / (1 + against))
        total = np.where(heard, bad + good + kept, 1.0)
        mean = np.where(heard, (bad + kept * mean) / total, mean)
        weight = np.where(heard, total, weight)
    return mean, weight


def _others(
    reputation: Reputation, service: Service, above: Level, hi: Keys, lo: Keys, now_s: float
) -> tuple[Floats, Floats]:
    """Bad and good children of the prefixes at this level that hold these, but for the branch that leads here."""
    table, below = reputation.tables[service, above], Level(above - 1)
    found = table.find_all(hi & np.uint64(mask(LENGTHS[above])[0]))
    rows = np.maximum(found, 0)  # any row, where there is none: its fade is 0
    fade = np.where(found >= 0, table.factor(rows, now_s), 0.0)
    branches = reputation.tables[service, below]
    branch = branches.find_all(hi & np.uint64(mask(LENGTHS[below])[0]), lo if below is Level.L128 else None)
    lean = np.where(branch >= 0, branches.rows["lean"][np.maximum(branch, 0)], LEAN_NONE)
    bad = table.rows["bad_children"][rows] * fade - (lean == LEAN_BAD)
    good = table.rows["good_children"][rows] * fade - (lean == LEAN_GOOD)
    return np.maximum(0.0, bad), np.maximum(0.0, good)


def wilson_bounds(share: Floats, weight: Floats, z: float) -> Floats:
    """`belief.wilson` of each."""
    zz, some = z * z, np.maximum(weight, 1e-100)
    spread = z * np.sqrt(np.maximum(0.0, share * (1 - share)) / some + zz / (4 * some * some))
    bounds = (share + zz / (2 * some) - spread) / (1 + zz / some)
    return np.where(weight > 0, np.maximum(0.0, bounds), 0.0)


def is_ipv4(hi: Keys) -> Flags:
    """Which keys are those of IPv4."""
    return np.asarray(hi >> np.uint64(32) == IPV4_SPACE)
