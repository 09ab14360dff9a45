"""bpf/sketch.h under the host compiler: it sets the bits the model says, loses none to a race, and errs as stated."""

from __future__ import annotations

import ctypes as c
import os
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

from edge.core.sketch import estimate
from edge.kernel.program import directory
from tests.core.test_sketch import assert_as_stated, sketched, sketched_rows

SEED = 20269
ADDITIONS = 30_000_001
"""Children added for each number tried, all trials together: a fifth of a second."""

RACES = 100_003

HERE = Path(__file__).resolve().parent


ROW = np.dtype([("window", "<u8"), ("recent", "<u8", 4), ("before", "<u8", 4)])
"""What a row holds of its prefix's children."""


class Sketches:
    """The compiled library. Its calls release the interpreter's lock: threads run at once."""

    def __init__(self, path: Path) -> None:
        warnings = ("-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-Wno-sign-compare", "-Wno-unknown-pragmas")
        sources = (str(HERE / "sketch_host.c"), f"-I{directory()}")
        subprocess.run(["gcc", "-O2", "-g", "-shared", "-fPIC", *warnings, "-o", str(path), *sources], check=True)
        self._library = c.CDLL(str(path))
        self._library.add_hashes.argtypes = [c.c_void_p, c.c_void_p, c.c_size_t]
        self._library.sketch_many.argtypes = [c.c_void_p, c.c_size_t, *[c.c_uint64] * 4]
        self._library.connect_children.argtypes = [c.c_void_p, c.c_uint64, c.c_void_p, c.c_size_t]
        self._library.race.argtypes = [c.c_void_p, c.c_size_t, c.c_uint64, c.c_void_p, c.c_size_t, c.c_void_p]

    def add(self, words: np.ndarray, hashes: np.ndarray) -> None:
        self._library.add_hashes(words.ctypes.data, hashes.ctypes.data, len(hashes))

    def connect(self, row: np.ndarray, now_window: int, hashes: np.ndarray) -> None:
        """Each hash comes as one connection in this window to the one row."""
        self._library.connect_children(row.ctypes.data, now_window, hashes.ctypes.data, len(hashes))

    def race(self, rows: np.ndarray, now_window: int, hashes: tuple[np.ndarray, np.ndarray]) -> None:
        """Two threads, row by row at once; each has its own hashes, of shape (rows, connections)."""
        arrived = np.zeros(1, np.uint64)
        threads = [
            threading.Thread(
                target=self._library.race,
                args=(rows.ctypes.data, len(rows), now_window, own.ctypes.data, own.shape[1], arrived.ctypes.data),
            )
            for own in hashes
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def many(self, trials: int, first: int, step: int, children: int, seed: int) -> np.ndarray:
        words = np.zeros((trials, 4), np.uint64)
        self._library.sketch_many(words.ctypes.data, trials, first, step, children, seed)
        return words


@pytest.fixture(scope="module")
def sketches(tmp_path_factory: pytest.TempPathFactory) -> Sketches:
    return Sketches(tmp_path_factory.mktemp("sketch") / "sketch.so")


def generator() -> np.random.Generator:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    return np.random.default_rng(seed)


def hashes_of(draw: np.random.Generator, *shape: int) -> np.ndarray:
    """Random, of every region alike: the higher bits are cleared at random."""
    hashes = draw.integers(0, 1 << 64, shape, np.uint64)
    cleared: np.ndarray = hashes >> draw.choice(np.array([0, 4, 7, 10, 13], np.uint64), shape)
    return cleared


def races(draw: np.random.Generator) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], np.ndarray, np.ndarray]:
    """Rows with a past in window 7, what two CPUs will add, and the sketches of past and additions."""
    past, ours, theirs = hashes_of(draw, RACES, 5), hashes_of(draw, RACES, 3), hashes_of(draw, RACES, 3)
    rows, old, new = np.zeros(RACES, ROW), sketched_rows(past), sketched_rows(np.hstack([ours, theirs]))
    rows["window"], rows["recent"] = 7, old
    return rows, (ours, theirs), old, new


def test_kernel_code_and_model_agree(sketches: Sketches) -> None:
    draw = generator()
    borders = np.array([(rare + by) % 8192 for rare in (0, 1, 8, 64, 512) for by in (-1, 0, 1)], np.uint64)
    edges = (borders[:, np.newaxis] << np.uint64(51) | np.arange(128, dtype=np.uint64)).ravel()
    for hashes in (edges, *(hashes_of(draw, count) for count in (0, 1, 2, 17, 101, 1009, 10_007))):
        words = np.zeros(4, np.uint64)
        sketches.add(words, hashes)
        assert (words == sketched(hashes)).all()
        sketches.add(words, hashes)  # again makes no difference
        assert (words == sketched(hashes)).all()
    for one in np.concatenate([edges, hashes_of(draw, 2003)]):
        words = np.zeros(4, np.uint64)
        sketches.add(words, np.array([one]))
        assert (words == sketched(np.array([one]))).all(), hex(one)


def test_no_child_is_lost_to_a_race(sketches: Sketches) -> None:
    draw, rows = generator(), np.zeros(RACES, ROW)
    # all in one word, where they are in each other's way
    ours, theirs = (hashes_of(draw, RACES, 17) & ~np.uint64(64) | np.uint64(1 << 63) for _ in range(2))
    sketches.race(rows, 0, (ours, theirs))
    assert (rows["recent"] == sketched_rows(np.hstack([ours, theirs]))).all()


def test_a_race_for_the_next_window_loses_no_child(sketches: Sketches) -> None:
    rows, hashes, old, new = races(generator())
    sketches.race(rows, 8, hashes)
    seen = rows["recent"] | rows["before"]
    assert (rows["window"] == 8).all()
    assert (seen == old | new).all()


def test_a_race_for_a_later_window_keeps_nothing_stale(sketches: Sketches) -> None:
    rows, hashes, _, new = races(generator())
    sketches.race(rows, 9, hashes)
    assert (rows["window"] == 9).all()
    assert (rows["before"] == 0).all()
    # one that came in the very moment may be dropped, as sketch_roll says; nothing else is there
    assert (rows["recent"] & ~new == 0).all()


def test_windows_roll(sketches: Sketches) -> None:
    draw, row = generator(), np.zeros((), ROW)
    window, recent, before = 0, np.zeros(4, np.uint64), np.zeros(4, np.uint64)
    for _ in range(1009):
        # mostly this window; at times the next, one far ahead, or a clock that is behind
        now = max(0, window + int(draw.choice([0, 0, 0, 0, 1, 2, 5, -1])))
        hashes = hashes_of(draw, int(draw.integers(1, 7)))
        if now > window:
            before = recent if now == window + 1 else np.zeros(4, np.uint64)
            window, recent = now, np.zeros(4, np.uint64)
        recent = recent | sketched(hashes)
        sketches.connect(row, now, hashes)
        assert row["window"] == window
        assert row["recent"].tolist() == recent.tolist()
        assert row["before"].tolist() == before.tolist()


@pytest.mark.parametrize("children", [1, 2, 3, 5, 10, 17, 64, 100, 257, 1000, 10007, 100003])
@pytest.mark.parametrize("step", [1, 0x100, 0x9E3779B97F4A7C15], ids=["in-a-row", "subnets", "scattered"])
def test_error_is_as_stated_with_the_kernels_hash(sketches: Sketches, children: int, step: int) -> None:
    print("seed", SEED)
    trials = min(10_007, ADDITIONS // children)
    words = sketches.many(trials, 0x20010DB8 << 32, step, children, SEED + children)
    assert_as_stated(estimate(words), children)
