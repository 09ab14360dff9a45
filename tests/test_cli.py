import asyncio
import json
import os
import pty
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge.cli import main
from edge.control import ControlServer
from edge.errors import UnavailableError

Answer = dict[str, Any]

ENTRY = {
    "prefix": "2001:db8:7::/64",
    "level": 64,
    "service": "mx",
    "standing": "block",
    "origin": "learned",
    "reason": "17 of 17 deliveries refused",
    "since": 61.0,
    "expires_in_s": 590.0,
    "in_kernel": True,
    "in_nftables": True,
    "decision": 7,
}
ALLOW = ENTRY | {
    "prefix": "192.0.2.0/24",
    "standing": "allow",
    "origin": "operator",
    "expires_in_s": None,
    "in_nftables": False,
    "reason": "backup MX",
}
STATUS = {
    "version": "0.1.0",
    "pid": 4711,
    "mode": "enforce",
    "uptime_s": 93784.0,
    "tick": {"count": 1009, "interval_s": 1.0, "last_ms": 4.25, "late": 3},
    "heartbeat_age_s": 0.4,
    "interfaces": [{"name": "eth0", "ifindex": 2, "xdp": "native", "program_id": 61}],
    "counters": {
        "not_ip": {"passed": 0, "dropped": 0},
        "conforming": {"passed": 2003, "dropped": 0},
        "blocked_learned": {"passed": 0, "dropped": 5003},
    },
    "rows": {"64": {"active": 53, "capacity": 1048576}, "128": {"active": 0, "capacity": 524288}},
    "entries": {"block": 11, "allow": 13, "good": 17, "suspect": 19, "bad": 23},
    "nftables": {"enabled": True, "in_sync": False, "elements": 29, "repairs": 31},
    "evidence": [{"name": "postfix", "events": 37, "errors": 41, "dropped": 43, "last_event_age_s": None}],
}
LEVEL = {
    "prefix": "2001:db8:7::/64",
    "level": 64,
    "bad": 17.0,
    "good": 0.25,
    "events": 17,
    "last_event_age_s": 3.2,
    "prior": 0.5,
    "prior_from": "2001:db8:7::/48",
    "mean": 0.93,
    "bound": 0.874,
    "bad_children": 0,
    "good_children": 0,
    "limit": {"rate_per_min": 600.0, "burst": 300},
    "tokens_left": 283,
    "connections": {"open": 2, "most_open": 50, "completed": 19, "distinct": 6.8, "last_age_s": 3.1},
    "forged": True,
    "entry": ENTRY,
    "outlook": "5 good deliveries release it",
}
EXPLAIN = {
    "query": "2001:db8:7::1",
    "keyed_as": "2001:db8:7::1/128",
    "service": "mx",
    "verdict": {"action": "block", "reason": "17 of 17 deliveries refused", "prefix": "2001:db8:7::/64"},
    "levels": [
        {"prefix": "2001:db8:7::/48", "level": 48, "connections": None, "limit": None},
        LEVEL,
    ],
    "history": [
        {"at": 1790000000.0, "action": "open", "prefix": "2001:db8:7::/64", "standing": "block", "reason": "x"}
    ],
}


class Daemon:
    """A control server in a thread; keeps what it was asked and answers what the test gives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: list[tuple[str, Answer]] = []
        self.answers: dict[str, Answer | Exception] = {
            "status": STATUS,
            "explain": EXPLAIN,
            "list": {"entries": [ALLOW, ENTRY]},
            "block": {"changed": True, "entries": [ENTRY]},
            "allow": {"changed": True, "entries": [ALLOW]},
            "unblock": {"changed": False, "entries": [], "still_blocked_by": ["2001:db8::/32"]},
            "unallow": {"changed": True, "entries": []},
        }
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    def _handler(self, verb: str) -> Callable[[Answer], Answer]:
        def answer(request: Answer) -> Answer:
            self.asked.append((verb, request))
            found = self.answers[verb]
            if isinstance(found, Exception):
                raise found
            return found

        return answer

    async def _serve(self) -> None:
        server = await ControlServer.start(self.path, {verb: self._handler(verb) for verb in self.answers})
        self._ready.set()
        await self._stop.wait()
        await server.close()

    def __enter__(self) -> "Daemon":
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        self._loop.close()


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    config = tmp_path / "edge.toml"
    config.write_text(f'[control]\nsocket = "{tmp_path}/control.sock"\n')
    monkeypatch.setenv("EDGE_CONFIG", str(config))
    with Daemon(tmp_path / "control.sock") as running:
        yield running


@pytest.mark.parametrize(
    ("command", "verb", "request_sent"),
    [
        ("status", "status", {}),
        ("list", "list", {}),
        ("list --standing bad --contained 2001:db8::/32", "list", {"standing": "bad", "contained": "2001:db8::/32"}),
        ("explain 192.0.2.7", "explain", {"what": "192.0.2.7", "service": "mx"}),
        (
            "explain 2001:db8::/48 --service submission",
            "explain",
            {"what": "2001:db8::/48", "service": "submission"},
        ),
        (
            "block 2001:db8::/48 --for 1h30m --reason spam --service mx",
            "block",
            {"prefix": "2001:db8::/48", "service": "mx", "for_s": 5400.0, "reason": "spam"},
        ),
        ("allow 192.0.2.0/24", "allow", {"prefix": "192.0.2.0/24", "service": "all", "for_s": None, "reason": ""}),
        ("unblock 2001:db8::/48", "unblock", {"prefix": "2001:db8::/48", "service": "all"}),
        ("unallow 192.0.2.0/24 --service submission", "unallow", {"prefix": "192.0.2.0/24", "service": "submission"}),
    ],
)
def test_a_verb_asks_the_daemon_and_prints_its_answer(
    daemon: Daemon, capsys: pytest.CaptureFixture[str], command: str, verb: str, request_sent: Answer
) -> None:
    assert main([*command.split(), "--json"]) == 0
    assert daemon.asked == [(verb, request_sent)]
    assert json.loads(capsys.readouterr().out) == daemon.answers[verb]
    assert main(command.split()) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 100


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("10m", 600), ("2h", 7200), ("7d", 604800), ("1d1h1m1s", 90061)]
)
def test_durations(daemon: Daemon, text: str, seconds: int) -> None:
    assert main(["block", "2001:db8::/48", "--for", text, "--json"]) == 0
    assert daemon.asked[0][1]["for_s"] == seconds


def test_status_for_people(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:4] == [
        "edge 0.1.0, process 4711, up 1 d 2 h, enforce",
        "tick 1009 every 1 s, last 4.2 ms, 3 late; heartbeat 400 ms ago",
        "nftables NOT in sync, 29 elements, 31 repairs",
        "interface eth0: XDP native, program 61",
    ]
    assert "in force 11 23 19 17 13" in lines
    assert lines.index("blocked_learned 0 5,003") < lines.index("conforming 2,003 0")
    assert not any(line.startswith("not_ip") for line in lines)
    assert lines.index("/128 0 524,288 0.0 %") < lines.index("/64 53 1,048,576 0.0 %")
    assert "postfix 37 41 43 -" in lines


def test_list_for_people_has_the_worst_first(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert out.index("2001:db8:7::/64") < out.index("192.0.2.0/24")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "2001:db8:7::/64 block learned mx 9 min 50 s xdp+nft 17 of 17 deliveries refused" in lines
    assert "192.0.2.0/24 allow operator mx never xdp backup MX" in lines


def test_a_long_reason_stands_below_its_entry(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    reason = "8 distinct bad /64s of 9 observed in 2001:db8:7::/48"
    daemon.answers["list"] = {"entries": [ENTRY | {"reason": reason}]}
    assert main(["list"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"    {reason}"


def test_explain_for_people(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "2001:db8:7::1"]) == 0
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "2001:db8:7::1, service mx: block by 2001:db8:7::/64: 17 of 17 deliveries refused"
    assert "2001:db8:7::/64: block (learned) for another 9 min 50 s: 17 of 17 deliveries refused" in lines
    assert "2001:db8:7::/64: 5 good deliveries release it" in lines
    assert "/64 17 0.25 17 3.2 s ago 0.5 from /48 0.93 0.87 0/0" in lines
    assert "/64 600/min, burst 300 283 2 of 50 19 7 2001:db8:7::/64, forged" in lines
    assert any(line.startswith("2026-09-21 14:13:20 open") for line in lines)


def test_nothing_changed_says_what_still_blocks(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unblock", "2001:db8::/48"]) == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out
    assert "still blocked by 2001:db8::/32" in out


def test_blocking_one_address_says_what_that_is_worth(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["block", "2001:db8::1"]) == 0
    assert "2^64" in capsys.readouterr().err
    assert main(["block", "192.0.2.1"]) == 0
    assert capsys.readouterr().err == ""


def test_an_empty_list_says_so(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["list"] = {"entries": []}
    assert main(["list"]) == 0
    assert capsys.readouterr().out == "no entries\n"


def test_an_answer_of_another_version_is_still_shown(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers |= {"status": {}, "explain": {}, "list": {"entries": [{}]}}
    for command in (["status"], ["explain", "::1"], ["list"]):
        assert main(command) == 0, capsys.readouterr().err


def test_output_cannot_be_forged(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[2J\x1b[31m\r\n[red]x[/red] [/] :smile: \u202e\x07"
    daemon.answers["list"] = {"entries": [ENTRY | {"reason": evil, "prefix": evil}]}
    daemon.answers["explain"] = EXPLAIN | {"query": evil, "levels": [LEVEL | {"outlook": evil}]}
    daemon.answers["status"] = STATUS | {"version": evil, "mode": evil}
    for command in (["list"], ["explain", "::1"], ["status"]):
        assert main(command) == 0
        out = capsys.readouterr().out
        assert all(c.isprintable() or c == "\n" for c in out), command
        assert "[red]x[/red]" in out.replace("\n", ""), command


def test_colour_only_on_a_terminal(daemon: Daemon) -> None:
    command = [sys.executable, "-m", "edge.cli", "list"]
    environ = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"}
    piped = subprocess.run(command, capture_output=True, timeout=60, check=True, env=environ)
    assert b"\x1b" not in piped.stdout
    leader, follower = pty.openpty()
    try:
        subprocess.run(command, stdout=follower, timeout=60, check=True, env=environ)
        assert b"\x1b[1;31mblock" in os.read(leader, 1 << 16)
    finally:
        os.close(leader)
        os.close(follower)


def test_socket_option_needs_no_configuration(
    daemon: Daemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_CONFIG", "/nowhere/edge.toml")
    assert main(["status", "--json"]) == 78
    assert main(["status", "--json", "--socket", str(daemon.path)]) == 0


def test_the_daemons_error_is_one_line_with_its_code(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["block"] = UnavailableError("nftables: expected the table, found none")
    assert main(["block", "2001:db8::/48"]) == 69
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "edge: nftables: expected the table, found none\n")


def test_no_daemon_is_69_and_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--socket", str(tmp_path / "control.sock")]) == 69
    expected = f"edge: no daemon answers on {tmp_path}/control.sock: is it running? start it with `edge run`\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Usage: edge"),
        (["blok"], "No such command 'blok'"),
        (["status", "--jsn"], "No such option"),
        (["block"], "Missing argument 'PREFIX'"),
        (["block", "2001:db8::1/64"], "has host bits set"),
        (["block", "fe80::1%eth0"], "a zone is not part of a prefix"),
        (["block", "2001:db8::/64", "--for", "soon"], "expected a time such as 30s, 10m, 2h or 7d, found 'soon'"),
        (["block", "2001:db8::/64", "--for", "0s"], "expected more than 0s"),
        (["block", "2001:db8::/64", "--for", "9999999d"], "expected more than 0s"),
        (["block", "2001:db8::/64", "--service", "imap"], "'imap' is not one of"),
        (["explain", "mail.example.org"], "expected a prefix such as 2001:db8::/48"),
        (["lab", "--mta", "sendmail"], "'sendmail' is not one of"),
    ],
)
def test_wrong_calls_are_64(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(arguments) == 64
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("verb", ["run", "load", "detach", "check-config", "status"])
def test_a_bad_configuration_is_78_with_key_expectation_and_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    config = tmp_path / "edge.toml"
    config.write_text('[limits.mx.new]\n64 = { burst = "many" }\n')
    assert main(["--config", str(config), verb]) == 78
    expected = "limits.mx.new.64.burst: expected a whole number from 0 to 1000000, found 'many'"
    assert capsys.readouterr().err == f"edge: {config}: {expected}\n"


def test_check_config_says_usable_and_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "edge.toml"
    config.write_text('mode = "enforce"\n[control]\nmode = 0o666\n')
    assert main(["--config", str(config), "check-config"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{config}: usable, mode enforce\n"
    assert captured.err.startswith(f"{config}: warning: control.mode: expected a mode that keeps other users out")


def test_printed_defaults_are_a_usable_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-config", "--print-defaults"]) == 0
    config = tmp_path / "edge.toml"
    config.write_text(capsys.readouterr().out)
    assert main(["--config", str(config), "check-config"]) == 0
    assert capsys.readouterr().out == f"{config}: usable, mode observe\n"


def test_a_defect_is_70_without_a_traceback(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["status"] = {"counters": {"conforming": 7}}
    assert main(["status"]) == 70
    error = capsys.readouterr().err
    assert error.startswith("edge: internal error: ")
    assert error.count("\n") == 1
    assert "--debug" in error
    with pytest.raises(TypeError):
        main(["--debug", "status"])


def test_version_is_the_projects() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    run = subprocess.run([sys.executable, "-m", "edge.cli", "version"], capture_output=True, text=True, timeout=60)
    assert run.stdout == project["project"]["version"] + "\n"


def test_quick_verbs_and_the_daemon_import_no_compiler() -> None:
    code = (
        "import sys, edge.cli; edge.cli.main(['version'])\n"
        "quick = [name for name in ('bcc', 'numpy', 'rich', 'pyroute2') if name in sys.modules]\n"
        "import edge.daemon\n"
        "print(quick, 'bcc' in sys.modules, file=sys.stderr)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stderr.splitlines()[-1] == "[] False"
