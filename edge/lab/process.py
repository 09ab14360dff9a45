"""Child processes of the lab: started inside a namespace and cgroup, stopped by process id, with the end of their log.

Invariants:
    only-ours-are-stopped: a process is signalled by the id we got when we started it, or because it runs in a network
        namespace that this lab (or one whose process is gone) made.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from edge.errors import UnavailableError

T = TypeVar("T")

POLL_S = 0.05
"""Pause between two looks at a condition; short against everything the lab waits for."""

STOP_S = 10.0
"""Time a process gets to end by itself after SIGTERM."""

TAIL_LINES = 12
"""Log lines shown of a process that failed."""

_JOIN_CGROUP = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


def in_cgroup(cgroup: Path | None, arguments: Sequence[str]) -> list[str]:
    """The command that joins a cgroup and then becomes `arguments`: what it starts is inside from its first socket."""
    return ["sh", "-c", _JOIN_CGROUP, str(cgroup), *arguments] if cgroup else list(arguments)


def wait_for(probe: Callable[[], T | None], what: str, *, seconds: float) -> T:
    """Poll until `probe` gives something true; UnavailableError that names `what` when the time is over."""
    deadline = time.monotonic() + seconds
    while True:
        found = probe()
        if found:
            return found
        if time.monotonic() > deadline:
            raise UnavailableError(f"{what}: not there after {seconds:g} s")
        time.sleep(POLL_S)


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log file, indented, for an error message."""
    try:
        text = path.read_text(errors="replace")[-64 * 1024 :]
    except OSError as error:
        return f"  (no log: {error.strerror})"
    return "\n".join(f"  {line}" for line in text.splitlines()[-lines:]) or "  (the log is empty)"


class Child:
    """One child process, with its output in a file."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def check(self) -> None:
        """UnavailableError with the last log lines when it has ended."""
        if not self.alive():
            raise UnavailableError(f"{self.name} ended with status {self._process.returncode}:\n{tail(self.log)}")

    def stop(self) -> None:
        """End it: SIGTERM, and SIGKILL when it does not listen."""
        if not self.alive():
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def kill_inside(namespace: str) -> int:
    """Kill whatever still runs in a network namespace of a lab; returns how many. Never the caller itself."""
    killed = 0
    deadline = time.monotonic() + STOP_S
    while pids := _inside(namespace):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed += 1
        if time.monotonic() > deadline:
            raise UnavailableError(f"processes {sorted(pids)} in namespace {namespace} survive SIGKILL")
        time.sleep(POLL_S)
    return killed


def _inside(namespace: str) -> set[int]:
    """Ids of the living processes whose network namespace is the named one (zombies have none)."""
    try:
        wanted = Path("/run/netns", namespace).stat()
    except FileNotFoundError:
        return set()
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            seen = (entry / "ns/net").stat()
            if (seen.st_dev, seen.st_ino) == (wanted.st_dev, wanted.st_ino):
                found.add(int(entry.name))
    return found
