import configparser
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROLE = Path(__file__).resolve().parents[2] / "ansible" / "roles" / "edge"
UNIT = ROLE / "files" / "edge-throttler.service"
LOADER = ROLE / "files" / "edge-throttler-load.service"
# What runs on the supported distributions, and what a mail host may add.
MAIL_SERVERS = {"postfix.service", "exim4.service", "exim.service", "rspamd.service", "haraka.service"}

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def settings(section: str, unit: Path = UNIT) -> Iterator[tuple[str, str]]:
    """Every key and value of a section; systemd allows a key more than once, configparser does not."""
    current = ""
    for line in unit.read_text().splitlines():
        if line.startswith("["):
            current = line.strip("[]")
        elif line and not line.startswith("#") and current == section:
            name, _, value = line.partition("=")
            yield name, value


@needs_systemd
@pytest.mark.parametrize("unit", [UNIT, LOADER], ids=lambda unit: unit.stem)
def test_systemd_finds_nothing_wrong(tmp_path: Path, unit: Path) -> None:
    for name in ("usr/local/bin/edge", "usr/bin/chgrp", "usr/bin/chmod"):
        command = tmp_path / name
        command.parent.mkdir(parents=True, exist_ok=True)
        command.touch(mode=0o755)
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    for target in ("network-online.target", "sysinit.target", "basic.target", "shutdown.target"):
        (units / target).write_text("[Unit]\nDescription=stand-in\nDefaultDependencies=no\n")
    for slice_ in ("system.slice", "-.slice"):
        (units / slice_).write_text("[Unit]\nDescription=stand-in\nDefaultDependencies=no\n")
    shutil.copy(UNIT, units)
    shutil.copy(LOADER, units)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"--root={tmp_path}", unit.name], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@needs_systemd
@pytest.mark.parametrize(("unit", "most"), [(UNIT, "20"), (LOADER, "45")], ids=["daemon", "loader"])
def test_exposure_stays_below(unit: Path, most: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={most}", "--no-pager", unit],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-200:] + done.stderr


def test_mail_servers_start_after_it_and_never_need_it() -> None:
    before = {name for key, value in settings("Unit") if key == "Before" for name in value.split()}
    assert before >= MAIL_SERVERS
    assert list(settings("Install")) == [("WantedBy", "multi-user.target")]
    assert not MAIL_SERVERS & {name for key, value in settings("Unit") if key != "Before" for name in value.split()}


def test_the_configuration_is_checked_before_the_daemon_runs() -> None:
    commands = [value for key, value in settings("Service") if key.startswith("Exec")]
    assert commands == ["/usr/local/bin/edge check-config", "/usr/local/bin/edge run"]


def test_the_loader_runs_before_the_daemon_and_gives_it_the_pins() -> None:
    for key in ("Wants", "After"):
        assert LOADER.name in {name for k, value in settings("Unit") if k == key for name in value.split()}
    user = dict(settings("Service"))["User"]
    assert dict(settings("Service", LOADER))["ExecStart"] == f"/usr/local/bin/edge load --user {user}"


def test_the_daemon_holds_one_capability() -> None:
    held = {value for key, value in settings("Service") if key in {"AmbientCapabilities", "CapabilityBoundingSet"}}
    assert held == {"CAP_NET_ADMIN"}


def test_the_unit_expects_the_paths_and_the_user_of_the_role() -> None:
    role = (ROLE / "vars" / "main.yml").read_text()
    service = dict(settings("Service"))
    assert f"edge_user: {service['User']}\n" in role
    assert f"edge_command: {service['ExecStart'].split()[0]}\n" in role
    assert f"edge_config_dir: /etc/{service['ConfigurationDirectory']}\n" in role


def test_the_drop_in_for_old_kernels_adds_one_capability() -> None:
    parsed = configparser.ConfigParser()
    parsed.read(ROLE / "files" / "cap-bpf.conf")
    assert dict(parsed["Service"]) == {"ambientcapabilities": "CAP_BPF", "capabilityboundingset": "CAP_BPF"}
