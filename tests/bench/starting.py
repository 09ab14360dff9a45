"""How long the daemon takes until it ticks: the first time, which compiles, and again with an unchanged program.

Measured from outside: from the call of `edge run` as an administrator makes it to the line "ready" in its log, which
comes after the first tick; it is looked for every 20 ms. Each round is a host of its own: a start that finds nothing,
then a restart. As in an installation, the Python files are byte-compiled before.
"""

from __future__ import annotations

import compileall
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import edge
from tests.e2e.host import Host, host


@dataclass(frozen=True, kw_only=True)
class Starting:
    """Seconds, one value a round."""

    start_s: list[float]
    restart_s: list[float]


def measure(rounds: int, *, say: Callable[[str], None] = lambda _: None) -> Starting:
    """Start and restart a daemon with the default tables, `rounds` times. As root; nothing else should be running."""
    start_s: list[float] = []
    restart_s: list[float] = []
    compileall.compile_dir(Path(edge.__path__[0]), quiet=1)
    for number in range(rounds):
        say(f"start and restart, round {number + 1} of {rounds}")
        with tempfile.TemporaryDirectory() as directory, host(Path(directory)) as made:
            start_s.append(_until_it_ticks(made))
            restart_s.append(_until_it_ticks(made))
    return Starting(start_s=start_s, restart_s=restart_s)


def _until_it_ticks(made: Host) -> float:
    began_s = time.monotonic()
    made.start()
    took_s = time.monotonic() - began_s
    code = made.kill(signal.SIGTERM)
    if code:
        raise RuntimeError(f"the daemon ended with {code}:\n{made.log.read_text()}")
    return took_s
