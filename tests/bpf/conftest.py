"""One loaded program for all packet tests; each test starts with empty tables."""

from __future__ import annotations

import pytest

from tests.bpf.harness import Harness


@pytest.fixture(scope="session")
def loaded() -> Harness:
    return Harness()


@pytest.fixture
def xdp(loaded: Harness) -> Harness:
    loaded.reset()
    return loaded
