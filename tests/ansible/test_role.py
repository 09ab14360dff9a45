"""The role on this machine: the real paths, in a mount namespace whose overlays take every change.

The machine itself stays as it was. Its own installation, if there is one, is removed inside the namespace first,
and process ids start anew there, so that Ansible does not find a systemd to talk to.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLAYBOOK = ROOT / "ansible" / "site.yml"
CONFIG = {"mode": "observe"}

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]

OVERLAYS = """
set -eu
mount -t tmpfs -o mode=755 edge-role "$1"
for top in /etc /opt /usr /var; do
    mkdir -p "$1$top/upper" "$1$top/work"
    mount -t overlay -o "lowerdir=$top,upperdir=$1$top/upper,workdir=$1$top/work" edge-role "$top"
done
rm -rf /opt/edge-throttler /etc/edge /usr/local/bin/edge /etc/systemd/system/edge-throttler.service*
if id edge >/dev/null 2>&1; then userdel edge; fi
if getent group edge >/dev/null; then groupdel edge; fi
echo ready
exec cat
"""
UNSHARE = ("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")


class Machine:
    """This machine in an overlay; lives until close()."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        (scratch / "overlay").mkdir()
        self.holder = subprocess.Popen(
            # The shell inside ends with its standard input, and the namespaces end with it.
            [*UNSHARE, "sh", "-c", OVERLAYS, "sh", scratch / "overlay"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == "ready\n"
        [self.inside] = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children").read_text().split()

    def close(self) -> None:
        """End the namespaces; every change goes with them."""
        self.holder.communicate(timeout=10)

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command inside."""
        environment = os.environ | {"HOME": str(self.scratch), "ANSIBLE_NOCOLOR": "1", "ANSIBLE_LOCALHOST_WARNING": "0"}
        return subprocess.run(
            ["nsenter", "--target", self.inside, "--mount", "--pid", *command],
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )

    def exists(self, path: str) -> bool:
        """Is there such a file inside?"""
        return self.run("test", "-e", path).returncode == 0

    def role(self, wheel: Path, config: object, *options: str) -> "Recap":
        """Apply the role inside."""
        variables = {"edge_wheel": str(wheel), "edge_config": config}
        host = {"ansible_connection": "local", "ansible_python_interpreter": "/usr/bin/python3"}
        inventory = self.scratch / "inventory.json"
        inventory.write_text(json.dumps({"edge": {"hosts": {"localhost": host}, "vars": variables}}))
        playbook = Path(sys.executable).parent / "ansible-playbook"
        return Recap(self.run(playbook, "-i", inventory, PLAYBOOK, *options))


class Recap:
    """What ansible-playbook said."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.output = done.stdout + done.stderr
        self.failed = done.returncode != 0
        found = re.search(r"^localhost .*\bchanged=(\d+)", done.stdout, re.M)
        self.changed = int(found[1]) if found else -1


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """This machine without edge-throttler."""
    machine = Machine(tmp_path_factory.mktemp("machine"))
    yield machine
    machine.close()


@pytest.fixture(scope="module")
def planned(clean: Machine, wheel: Path) -> Recap:
    """The role in check mode on the clean machine."""
    return clean.role(wheel, CONFIG, "--check", "--diff")


@pytest.fixture(scope="module")
def first(clean: Machine, wheel: Path, planned: Recap) -> Recap:
    """The first run, after the one in check mode."""
    return clean.role(wheel, CONFIG, "--diff")


@pytest.fixture(scope="module")
def machine(clean: Machine, first: Recap) -> Machine:
    """This machine with the role applied once."""
    assert not first.failed, first.output
    return clean


def test_check_mode_on_a_clean_machine_tells_and_changes_nothing(clean: Machine, planned: Recap) -> None:
    assert not planned.failed, planned.output
    assert planned.changed > 0
    assert '+mode = "observe"' in planned.output
    for path in ("/opt/edge-throttler", "/etc/edge", "/usr/local/bin/edge"):
        assert not clean.exists(path)
    assert clean.run("id", "edge").returncode != 0


def test_the_first_run_installs_all_of_it(machine: Machine, first: Recap, wheel: Path) -> None:
    assert first.changed > 0
    assert wheel.name.split("-")[1] in machine.run("/usr/local/bin/edge", "version").stdout
    assert tomllib.loads(machine.run("cat", "/etc/edge/edge.toml").stdout) == CONFIG
    assert machine.run("stat", "-c", "%U:%G %a", "/etc/edge/edge.toml").stdout == "root:edge 640\n"
    unit = PLAYBOOK.parent / "roles/edge/files/edge-throttler.service"
    assert machine.run("cat", "/etc/systemd/system/edge-throttler.service").stdout == unit.read_text()
    readable = machine.run(
        "setpriv", "--reuid=edge", "--regid=edge", "--clear-groups", "/usr/local/bin/edge", "check-config"
    )
    assert readable.returncode == 0, readable.stderr


def test_the_second_run_changes_nothing(machine: Machine, wheel: Path) -> None:
    recap = machine.role(wheel, CONFIG, "--diff")
    assert (recap.failed, recap.changed) == (False, 0), recap.output


def test_check_mode_after_it_finds_nothing_to_change(machine: Machine, wheel: Path) -> None:
    recap = machine.role(wheel, CONFIG, "--check", "--diff")
    assert (recap.failed, recap.changed) == (False, 0), recap.output


def test_a_changed_configuration_is_shown_before_it_is_written(machine: Machine, wheel: Path) -> None:
    recap = machine.role(wheel, {"mode": "enforce"}, "--check", "--diff")
    assert (recap.failed, recap.changed > 0) == (False, True), recap.output
    assert '-mode = "observe"' in recap.output
    assert '+mode = "enforce"' in recap.output
    assert tomllib.loads(machine.run("cat", "/etc/edge/edge.toml").stdout) == CONFIG


@pytest.mark.parametrize("options", [("--diff",), ("--check", "--diff")])
def test_a_bad_configuration_never_lands(machine: Machine, wheel: Path, options: tuple[str, ...]) -> None:
    recap = machine.role(wheel, {"mode": "no such mode"}, *options)
    assert recap.failed
    assert "no such mode" in recap.output
    assert tomllib.loads(machine.run("cat", "/etc/edge/edge.toml").stdout) == CONFIG


def test_a_rebuilt_wheel_of_the_same_version_is_installed(machine: Machine, wheel: Path, tmp_path: Path) -> None:
    rebuilt = tmp_path / wheel.name
    shutil.copy(wheel, rebuilt)
    with rebuilt.open("ab") as stream:
        stream.write(b"\0\0")  # a ZIP file may be followed by padding
    recap = machine.role(rebuilt, CONFIG, "--diff")
    assert (recap.failed, recap.changed > 0) == (False, True), recap.output
    digest = hashlib.sha256(rebuilt.read_bytes()).hexdigest()
    assert machine.run("cat", "/opt/edge-throttler/installed").stdout.strip() == digest


def test_the_machine_itself_is_untouched(machine: Machine) -> None:
    marker = "/etc/edge/only-inside"
    assert machine.run("touch", marker).returncode == 0
    assert not Path(marker).exists()
