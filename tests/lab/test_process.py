import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge.errors import UnavailableError
from edge.lab.process import Child, in_cgroup, kill_inside, tail, wait_for


def test_a_child_that_ended_is_told_with_its_last_lines(tmp_path: Path) -> None:
    child = Child(
        "the thing", [sys.executable, "-c", "print('one'); print('two'); raise SystemExit(3)"], tmp_path / "log"
    )
    wait_for(lambda: not child.alive(), "its end", seconds=20)
    with pytest.raises(UnavailableError, match=r"the thing ended with status 3:\n  one\n  two"):
        child.check()


def test_a_child_is_stopped_even_when_it_does_not_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.lab.process.STOP_S", 0.1)
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(9)"
    )
    child = Child("the deaf one", [sys.executable, "-c", deaf], tmp_path / "log")
    wait_for(lambda: "deaf" in (tmp_path / "log").read_text(), "its first word", seconds=20)
    child.stop()
    assert not child.alive()
    child.stop()


def test_wait_names_what_did_not_come() -> None:
    with pytest.raises(UnavailableError, match=r"the moon: not there after 0.01 s"):
        wait_for(lambda: None, "the moon", seconds=0.01)


def test_tail_shows_the_end_and_survives_a_missing_file(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert "no log" in tail(log)
    log.write_text("".join(f"{n}\n" for n in range(101)))
    assert tail(log, 2) == "  99\n  100"


def test_joining_a_cgroup_keeps_the_arguments(tmp_path: Path) -> None:
    (tmp_path / "cgroup.procs").touch()
    done = subprocess.run(
        in_cgroup(tmp_path, ["printf", "%s|", "a b", "$x"]), capture_output=True, text=True, check=True
    )
    assert done.stdout == "a b|$x|"
    assert (tmp_path / "cgroup.procs").read_text().strip().isdigit()


def test_only_ours_are_stopped() -> None:
    assert kill_inside(f"edge-lab-no-such-{os.getpid()}") == 0
