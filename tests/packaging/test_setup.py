import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETUP = ROOT / "tests" / "tools" / "setup.sh"
POLICY = Path("/usr/sbin/policy-rc.d")


def setup(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    return subprocess.run(
        [SETUP, *arguments], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
    )


@pytest.mark.root
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs a distribution with apt")
def test_a_second_call_calls_no_package_manager(tmp_path: Path) -> None:
    refusing = tmp_path / "apt-get"
    refusing.write_text("#!/bin/sh\necho called >&2\nexit 99\n")
    refusing.chmod(0o755)
    policy = POLICY.read_bytes() if POLICY.exists() else None
    done = setup("test", path=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (POLICY.read_bytes() if POLICY.exists() else None) == policy


def test_a_wrong_call_says_how_it_is_called() -> None:
    done = setup("everything")
    assert done.returncode == 64
    assert "usage: setup.sh" in done.stderr


def test_help_is_the_default_target() -> None:
    done = subprocess.run(["make", "-C", ROOT], capture_output=True, text=True, check=True)
    for target in ("venv", "demo", "test", "check", "abi", "clean"):
        assert f"make {target} " in done.stdout
