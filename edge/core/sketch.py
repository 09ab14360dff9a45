"""How many distinct children a prefix has, read from the 256-bit sketches that bpf/sketch.h fills.

A child always sets the same bit. 15 of 16 children share 128 bits, the others four regions of 32 bits, each met by 8
times fewer children than the one before. The estimate is the number under which the bits found set are likeliest, if
children came as a Poisson process: the maximum-likelihood form of linear counting (Whang, Vander-Zanden, Taylor 1990),
over all resolutions of the bitmap (Estan, Varghese, Fisk 2003) at once, as Ertl does it for HyperLogLog (2017,
arXiv 1702.01284). bpf/sketch.h has the titles.

The error is stated in ERRORS. HyperLogLog in the same 256 bits (Flajolet et al. 2007, with its linear counting of small
numbers) has a standard error of 9 % at 10 children, 11 at 64, and 12 to 13 from 100 on; here it is 6, 6, 7 at 100, and
19 to 24 from 1,000 on. Decisions are made at small numbers; of large ones the order of magnitude is enough.

Invariants:
    error-is-as-stated: for any number of children, bias, standard error and the 99 % bounds are within ERRORS.
    union-is-or: the sketch of two sets together is the bitwise or of their sketches.
    estimate-is-likeliest: no other number makes the bits found more likely.
    estimate-is-bounded: 0 for no bit, never below the bits set, never above CEILING, whatever the bits.
    more-bits-are-more-children: setting a bit never lowers the estimate.
    stale-is-empty: what was counted longer ago than the window before the current one counts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.abi import SKETCH_WORDS

BITS = (128, 32, 32, 32, 32)
"""Bits of each region, in their order in the sketch; bpf/sketch.h, sketch_bit."""

SHARES = (15 / 16, 7 / 128, 7 / 1024, 7 / 8192, 1 / 8192)
"""Which part of all children falls into each region. They add up to 1: no child goes unseen."""

CEILING = float(1 << 20)
"""The largest estimate, given when every bit is set. With one bit of the rarest region clear the likeliest number is
262,144 * ln 32 = 908,000, so this says 'a million or more'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorBound:
    """How far off an estimate may be, up to and including `children`, as shares of their true number."""

    children: int
    bias: float
    standard: float  # root of the mean square
    below: float  # with `above`, holds in 99 % of cases; or HIDDEN children below, where that is more
    above: float


HIDDEN = 3
"""So many of a few children may share bits with others. Two given children do in 1 of 144 cases: 4 are told apart in
96 % of cases, 8 in 82 %."""

ERRORS = (
    ErrorBound(children=160, bias=0.01, standard=0.08, below=0.22, above=0.22),
    ErrorBound(children=300, bias=0.02, standard=0.10, below=0.22, above=0.31),
    ErrorBound(children=200_000, bias=0.06, standard=0.25, below=0.45, above=0.95),
)
"""From 2,000 (of the largest) to 40,000 simulated sketches of each of 150 numbers. Above 200,000 the error grows, and
from a million on the answer tends to CEILING."""

_STEPS = 24
"""Newton steps: while far from the root each doubles the number, so 256 takes 12 to the ceiling; then each doubles the
digits that are right."""


def merge(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sketches of both sets together; arrays of words, of equal shape."""
    both: np.ndarray = np.bitwise_or(a, b)
    return both


def estimate(words: np.ndarray) -> NDArray[np.float64]:
    """Distinct children of each sketch; `words` is uint64 of shape (rows, SKETCH_WORDS). Equal sketches cost once."""
    packed, where = np.unique(_packed(words), return_inverse=True)
    shifts = np.array([24, 18, 12, 6, 0], np.int64)
    ones = (packed[:, np.newaxis] >> shifts & np.array([255, 63, 63, 63, 63], np.int64)).astype(np.float64)
    found: NDArray[np.float64] = _likeliest(ones)[where]
    return found


def distinct(window: np.ndarray, recent: np.ndarray, before: np.ndarray, now_window: int) -> NDArray[np.float64]:
    """Distinct children seen in the current window and the one before it.

    `window`, of shape (rows,), says which window `recent` counts and `before` the one before; both are of shape
    (rows, SKETCH_WORDS). A row's window may lie after `now_window`: the kernel went on while we read.
    """
    current = window >= np.uint64(now_window)
    last = window + np.uint64(1) == np.uint64(now_window)
    seen = np.where((current | last)[:, np.newaxis], recent, np.uint64(0))
    return estimate(np.where(current[:, np.newaxis], merge(seen, before), seen))


def _packed(words: np.ndarray) -> NDArray[np.int64]:
    """The bits set in each region, as one number a row: 8 bits for the first, 6 for each of the others."""
    halves = _ones_of_halves(words)
    first: NDArray[np.int64] = halves[:, :4].sum(axis=1)
    return first << 24 | halves[:, 4] << 18 | halves[:, 5] << 12 | halves[:, 6] << 6 | halves[:, 7]


def _ones_of_halves(words: np.ndarray) -> NDArray[np.int64]:
    """Bits set in each half word, lower half first: shape (rows, 2 * SKETCH_WORDS).

    Sums of 2, 4, 8, ... bits side by side; numpy before 2.0 has no popcount.
    """
    x = words.astype(np.uint64)
    x = x - (x >> np.uint64(1) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + (x >> np.uint64(2) & np.uint64(0x3333333333333333))
    x = x + (x >> np.uint64(4)) & np.uint64(0x0F0F0F0F0F0F0F0F)
    x = x + (x >> np.uint64(8))
    x = x + (x >> np.uint64(16))
    halves = np.stack([x & np.uint64(63), x >> np.uint64(32) & np.uint64(63)], axis=-1)
    return halves.reshape(len(words), 2 * SKETCH_WORDS).astype(np.int64)


def _likeliest(ones: NDArray[np.float64]) -> NDArray[np.float64]:
    """The number n of children under which so many bits set in each region are likeliest; `ones` is (rows, regions).

    With n children a bit of chance p is clear with probability exp(-n p). The derivative of the log-likelihood, the
    sum of p * ones / (exp(n p) - 1) less that of p * zeros, falls as n grows and is convex. It is not negative at
    n = bits set, so Newton's steps from there climb towards the root and never pass it.
    """
    bits = np.array(BITS, np.float64)
    chance = np.array(SHARES, np.float64) / bits
    clear = (bits - ones) @ chance
    number = np.maximum(ones.sum(axis=1), 1.0)
    for _ in range(_STEPS):
        # from 500 on the term is nothing beside the others, and exp() stays finite
        odds = 1.0 / np.expm1(np.minimum(number[:, np.newaxis] * chance, 500.0))
        value = (ones * odds) @ chance - clear
        slope = (ones * odds * (1.0 + odds)) @ (chance * chance)
        number = np.clip(number + value / np.maximum(slope, np.finfo(np.float64).tiny), 1.0, CEILING)
    found: NDArray[np.float64] = np.where(ones.any(axis=1), number, 0.0)
    return found
