"""The estimates of edge/core/sketch.py, against the truth: simulated sketches, as many as a bound needs."""

from __future__ import annotations

import os

import numpy as np
import pytest

from edge.core.sketch import BITS, CEILING, ERRORS, HIDDEN, SHARES, ErrorBound, distinct, estimate, merge

SEED = 20269
TRIALS = 3001
NUMBERS = (1, 2, 3, 5, 10, 12, 16, 17, 64, 100, 257, 1000, 2251, 10007, 100003, 199999)


def position(hashes: np.ndarray) -> np.ndarray:
    """The bit each hash sets: what bpf/sketch.h promises, in plain words."""
    rare = hashes >> np.uint64(51)
    region = np.select([rare == 0, rare < 8, rare < 64, rare < 512], [4, 3, 2, 1], 0)
    first = np.array([0, 128, 160, 192, 224])[region]
    where: np.ndarray = first + (hashes & np.where(region == 0, np.uint64(127), np.uint64(31))).astype(np.int64)
    return where


def sketched(hashes: np.ndarray) -> np.ndarray:
    """The sketch of these hashes: four words."""
    words: np.ndarray = sketched_rows(hashes[np.newaxis])[0]
    return words


def sketched_rows(hashes: np.ndarray) -> np.ndarray:
    """The sketch of each row of hashes."""
    bits = np.zeros((len(hashes), 256), np.uint8)
    np.put_along_axis(bits, position(hashes), 1, axis=1)
    return words_of(bits)


def words_of(bits: np.ndarray) -> np.ndarray:
    """Sketches from their bits (rows, 256), the lowest bit of the first word first."""
    return np.packbits(bits.astype(np.uint8), axis=1, bitorder="little").view("<u8")


def simulated(children: int, trials: int, draw: np.random.Generator) -> np.ndarray:
    """Sketches of so many children each: how many fall on each bit is multinomial, a bit is set by the first."""
    chance = np.repeat(np.array(SHARES) / np.array(BITS), BITS)
    return words_of(draw.multinomial(children, chance, size=trials) > 0)


def stated(children: int) -> ErrorBound:
    return next(bound for bound in ERRORS if children <= bound.children)


def assert_as_stated(estimates: np.ndarray, children: int) -> None:
    """Bias, standard error and the 99 % bounds of these estimates of one number."""
    bound, error = stated(children), estimates / children - 1
    below = max(bound.below, HIDDEN / children)
    outside = np.mean((error < -below) | (error > bound.above))
    root = float(np.sqrt(np.mean(error**2)))
    print(f"{children}: bias {error.mean():+.4f}, standard {root:.4f}, outside {outside:.4f}")
    assert abs(error.mean()) <= bound.bias
    assert root <= bound.standard
    assert outside <= 0.01


def random_sketches(rows: int) -> np.ndarray:
    """Bits no set of children would leave, from almost empty to almost full, and each region by itself."""
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    draw = np.random.default_rng(seed)
    fill = np.repeat(draw.random((rows, len(BITS))) ** draw.choice([0.1, 1, 10], (rows, len(BITS))), BITS, axis=1)
    return words_of(draw.random((rows, 256)) < fill)


@pytest.mark.parametrize("children", NUMBERS)
def test_error_is_as_stated(children: int) -> None:
    print("seed", SEED)
    draw = np.random.default_rng((SEED, children))
    assert_as_stated(estimate(simulated(children, TRIALS, draw)), children)


def test_few_children_are_told_apart() -> None:
    print("seed", SEED)
    draw = np.random.default_rng(SEED)
    for children, share in ((1, 1.0), (2, 0.99), (4, 0.945), (8, 0.80)):
        exact = np.rint(estimate(simulated(children, 10007, draw))) == children
        assert exact.mean() >= share, children


def test_union_is_or() -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    draw = np.random.default_rng(seed)
    for count in (0, 1, 17, 1009, 100_003):
        one, other = (draw.integers(0, 1 << 64, count, np.uint64) for _ in range(2))
        union = sketched(np.concatenate([one, other]))
        assert (merge(sketched(one), sketched(other)) == union).all()


def test_estimate_is_likeliest() -> None:
    words = random_sketches(211)
    found = estimate(words)
    ones = np.add.reduceat(_bits(words), np.cumsum((0, *BITS[:-1])), axis=1)[:, :, np.newaxis]
    chance = (np.array(SHARES) / np.array(BITS))[:, np.newaxis]

    def likelihood(children: np.ndarray) -> np.ndarray:
        """Of each row's bits, for a row of numbers."""
        mean = children[:, np.newaxis, :] * chance
        terms = ones * np.log(-np.expm1(-mean)) - (np.array(BITS)[:, np.newaxis] - ones) * mean
        return np.asarray(terms.sum(axis=1))

    grid = np.tile(np.geomspace(0.01, CEILING, 4999), (len(words), 1))
    inside = (found > 0) & (found < CEILING)
    assert inside.sum() > 101
    best = likelihood(found[:, np.newaxis].clip(1e-9))[:, 0]
    assert (best >= likelihood(grid).max(axis=1) - 1e-7)[inside].all()


def test_estimate_is_bounded() -> None:
    words = np.concatenate([random_sketches(5003), np.zeros((1, 4), np.uint64), np.full((1, 4), ~np.uint64(0))])
    found, ones = estimate(words), _bits(words).sum(axis=1)
    assert np.isfinite(found).all()
    assert (found >= ones).all()
    assert (found <= CEILING).all()
    assert (found[-2], found[-1]) == (0, CEILING)
    assert estimate(np.empty((0, 4), np.uint64)).shape == (0,)


def test_more_bits_are_more_children() -> None:
    words = random_sketches(1009)
    bits = _bits(words)
    for region in np.cumsum((0, *BITS[:-1])):
        more = bits.copy()
        more[:, region] = 1
        assert (estimate(words_of(more)) >= estimate(words)).all()


def test_stale_is_empty() -> None:
    few, many = sketched(_numbers(3)), sketched(_numbers(17, start=1000))
    # counted in: a window that begins before we look, this one, the last, the one before that, long ago
    window = np.array([101, 100, 99, 98, 3], np.uint64)
    recent, before = np.tile(few, (5, 1)), np.tile(many, (5, 1))
    three, twenty = estimate(np.stack([few, few | many]))
    assert distinct(window, recent, before, 100).tolist() == [twenty, twenty, three, 0, 0]
    unused = np.zeros((1, 4), np.uint64)
    assert distinct(np.zeros(1, np.uint64), unused, unused, 0).tolist() == [0]


def test_no_child_goes_unseen() -> None:
    assert sum(SHARES) == 1
    assert sum(BITS) == 256
    # all 13-bit prefixes of a hash fall into the regions by their shares
    rare = np.arange(1 << 13, dtype=np.uint64) << np.uint64(51)
    bounds = np.cumsum(BITS)
    counts = np.bincount(np.searchsorted(bounds, position(rare), side="right"), minlength=len(BITS))
    assert (counts / (1 << 13)).tolist() == list(SHARES)


def _bits(words: np.ndarray) -> np.ndarray:
    return np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").astype(np.int64)


def _numbers(count: int, start: int = 0) -> np.ndarray:
    """Hashes that differ in every bit that matters."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        return np.arange(start + 1, start + 1 + count, dtype=np.uint64) * golden
