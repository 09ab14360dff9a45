"""The clock that is read once a tick: a copy of the program in which it lags as far as a tick lets it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from edge.abi import Level, Reason
from edge.kernel import program
from tests import packets as p
from tests.bench.limiter import cut
from tests.bpf.harness import SECOND, START_S, Harness
from tests.bpf.test_limiter import agree_with_the_model

pytestmark = pytest.mark.root

START = int(START_S * SECOND)
LAG_NS = 9_999_991
"""Almost a tick at HZ=100."""


@pytest.fixture(scope="module")
def loaded_lagging() -> Iterator[Harness]:
    text = cut(
        program.text(),
        [
            (r"now = recorded \? out->now_ns : tick_clock\(working\);$", f"now = out->now_ns - {LAG_NS};"),
            (r"if \(!recorded\)\n\t*out->now_ns = bpf_ktime_get_ns\(\);$", f"out->now_ns += {LAG_NS};"),
        ],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "text", lambda: text)
        yield Harness()


@pytest.fixture
def lagging(loaded_lagging: Harness) -> Harness:
    loaded_lagging.reset()
    return loaded_lagging


def test_a_lagging_clock_changes_no_decision(lagging: Harness) -> None:
    """The same as by the exact clock, to the level that refuses."""
    agree_with_the_model(lagging)


@pytest.mark.parametrize("interval", [SECOND // 1009, SECOND])
def test_a_lagging_clock_refuses_nobody_too_long(lagging: Harness, interval: int) -> None:
    lagging.limit({Level.L64: (interval, 3)})
    frame = p.syn("2001:db8:1:2::3")
    assert [lagging.judge_ns(frame, START).dropped for _ in range(5)] == [False] * 3 + [True] * 2
    assert lagging.judge_ns(frame, START + interval - 1).reason is Reason.LIMIT_64
    assert lagging.judge_ns(frame, START + interval).reason is Reason.CONFORMING
    assert lagging.judge_ns(frame, START + interval).reason is Reason.LIMIT_64
