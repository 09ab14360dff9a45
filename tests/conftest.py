"""What holds for every test."""

from __future__ import annotations

import os

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that needs root fails without it: a skipped test would look like a passed one."""
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.fail('needs root (kernel or network namespaces): run as root, or leave it out with -m "not root"')
