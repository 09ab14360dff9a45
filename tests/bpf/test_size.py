"""The programs stay as light as they were recorded."""

from __future__ import annotations

import msgspec
import pytest

from tests.bench import size
from tests.bench.size import ProgramSize, Size


@pytest.mark.root
def test_no_program_has_grown() -> None:
    assert size.growth(size.measure(), size.baseline()) == []


def test_growth_is_named_with_both_numbers() -> None:
    recorded = size.baseline()
    before = recorded.programs["edge_xdp"]
    heavier = msgspec.structs.replace(before, verified_instructions=before.verified_instructions * 2)
    found = msgspec.structs.replace(recorded, programs={**recorded.programs, "edge_xdp": heavier})
    problems = size.growth(found, recorded)
    assert len(problems) == 1
    assert f"from {before.verified_instructions} " in problems[0]
    assert f"to {heavier.verified_instructions} " in problems[0]


def test_a_tenth_more_is_let_pass() -> None:
    light = ProgramSize(verified_instructions=100, xlated_bytes=100, jited_bytes=100, stack_bytes=100)
    heavy = ProgramSize(verified_instructions=110, xlated_bytes=110, jited_bytes=900, stack_bytes=110)
    recorded = Size(kernel="a", bcc="b", machine="c", programs={"p": light}, map_bytes={})
    assert size.growth(msgspec.structs.replace(recorded, programs={"p": heavy}), recorded) == []
    assert size.growth(msgspec.structs.replace(recorded, programs={}), recorded) == ["p: recorded, but not loaded"]
