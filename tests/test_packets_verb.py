import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge.abi import Reason
from edge.capture import Captured
from edge.cli import main
from edge.config import Config, parse
from edge.kernel.compile import compile_programs, write_identity
from edge.kernel.maps import Tables
from edge.kernel.recorded import LONGEST, SHORTEST, Recorded
from edge.packets import Line as Decision
from edge.packets import configured, judge, private_copy, readable, source
from tests import packets as p
from tests.bpf.frames import pcap
from tests.bpf.harness import SMALL

A, B, A4 = "2001:db8:1:2::3", "2001:db8:1:3::3", "198.51.100.7"
MS = 1_000_000
LIMITED = b"""mode = "observe"
[exempt]
prefixes = ["2001:db8:1:3::/64"]
[limits.mx.new.64]
rate_per_min = 60
burst = 2
"""

Line = dict[str, Any]
Run = Callable[..., tuple[int, list[Line], str]]


@pytest.fixture(scope="module")
def copy() -> Recorded:
    """For tests that want no fresh tables."""
    return private_copy(configured(Config(), "all"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The verb on these frames, one a millisecond: exit code, lines, and what it said on standard error."""
    config = tmp_path / "edge.toml"
    config.write_bytes(LIMITED)
    monkeypatch.setenv("EDGE_CONFIG", str(config))

    def call(frames: list[bytes], *arguments: str, damage: bytes = b"") -> tuple[int, list[Line], str]:
        path = tmp_path / "x.pcap"
        pcap(path, frames)
        with path.open("ab") as file:
            file.write(damage)
        code = main(["packets", str(path), "--json", *arguments])
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()], err

    return call


@pytest.mark.root
def test_one_line_a_packet(run: Run) -> None:
    code, lines, err = run([p.syn(A), p.syn(A), p.syn(A), p.syn(A, flags=p.ACK), p.syn(A4, 80), b"short"])
    assert code == 0
    assert lines == [
        {"n": 1, "verdict": "pass", "reason": "conforming", "syn": True, "src": A, "dport": 25},
        {"n": 2, "verdict": "pass", "reason": "conforming", "syn": True, "src": A, "dport": 25},
        {"n": 3, "verdict": "drop", "reason": "limit_64", "syn": True, "src": A, "dport": 25},
        {"n": 4, "verdict": "pass", "reason": "not_syn", "syn": False, "src": A, "dport": None},
        {"n": 5, "verdict": "pass", "reason": "other_port", "syn": False, "src": A4, "dport": 80},
        {"n": 6, "verdict": "pass", "reason": "truncated", "syn": False, "src": None, "dport": None},
    ]
    assert err.splitlines() == [
        "6 packets, 3 of them new connections to protected ports",
        "       2  pass  conforming",
        "       1  drop  limit_64",
        "       1  pass  not_syn",
        "       1  pass  other_port",
        "       1  pass  truncated",
    ]


@pytest.mark.root
def test_a_damaged_capture_is_judged_up_to_the_damage(run: Run) -> None:
    code, lines, err = run([p.syn(A), p.syn(A4)], damage=b"\x01\x02\x03")
    assert code == 65
    assert [line["src"] for line in lines] == [A, A4]
    assert err.startswith("2 packets, 2 of them")
    assert "x.pcap: expected packet 3 or the end, found: truncated dump file" in err


@pytest.mark.root
@pytest.mark.parametrize(
    ("ports", "judged"), [(None, {25, 465, 587}), ("80,587", {80, 465, 587}), ("0", {0, 465, 587}), ("all", None)]
)
def test_ports(run: Run, ports: str | None, judged: set[int] | None) -> None:
    tried = [0, 25, 80, 465, 587, 65535]
    _, lines, _ = run([p.syn(A, port) for port in tried], *(("--ports", ports) if ports else ()))
    assert {line["dport"] for line in lines if line["syn"]} == (set(tried) if judged is None else judged)


@pytest.mark.parametrize("ports", ["", "25,", "smtp", "65536", "-1", "25-30", "٢٥", "9" * 5000])
def test_wrong_ports_are_named(run: Run, ports: str) -> None:
    code, lines, err = run([p.syn(A)], "--ports", ports)
    assert (code, lines) == (64, [])
    assert "--ports: expected numbers from 0 to 65535" in err
    assert len(err) < 300


def test_a_capture_that_is_not_there_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["packets", "/nowhere.pcap"]) == 64
    assert "/nowhere.pcap" in capsys.readouterr().err


@pytest.mark.root
def test_clock_is_given() -> None:
    """Burst 2, then one a second by the capture's time; a clock that goes back gives nothing."""
    frame = p.syn(A)
    at_ms = (0, 0, 0, 990, 1000, 500, 1000, 2000, 1, 3_600_000, 3_600_000, 3_600_000)
    lines = judge(private_copy(configured(parse(LIMITED, "test"), None)), [Captured(n * MS, frame) for n in at_ms])
    verdicts = "".join(line.verdict[0] for line in lines)
    assert verdicts == "ppddpddpdppd"


@pytest.mark.root
def test_clock_at_its_end() -> None:
    copy = private_copy(configured(parse(LIMITED, "test"), None))
    lines = list(judge(copy, [Captured(at, p.syn(A)) for at in (0, (1 << 63) - 1, (1 << 63) - 1)]))
    assert [line.syn for line in lines] == [True, True, True]


@pytest.mark.root
def test_configured_exemptions_are_in_the_copy(run: Run) -> None:
    _, lines, _ = run([p.syn(B)] * 5)
    assert {line["reason"] for line in lines} == {"allowed"}


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (p.syn(A), A),
        (p.syn(A4), A4),
        (p.syn("::ffff:198.51.100.7"), "::ffff:198.51.100.7"),
        (p.syn("2002:c633:6407::1"), "2002:c633:6407::1"),
        (p.ethernet(p.vlan(p.vlan(p.ipv6(A, b""), 0x86DD), 0x8100), 0x88A8), A),
        (p.ethernet(p.vlan(p.vlan(p.vlan(p.ipv6(A, b"")), 0x8100), 0x8100), 0x8100), None),
        (p.ethernet(p.ipv6(A, p.ipv6(B, p.tcp()), following=41)), A),
        (p.ethernet(p.ipv6(A, b"", version=5)), None),
        (p.ethernet(p.ipv4(A4, b"", version=6), 0x0800), None),
        (p.ethernet(bytes(28), 0x0806), None),
        (p.syn(A)[: 14 + 23], None),
        (p.syn(A)[: 14 + 24], A),
        (p.syn(A4)[: 14 + 15], None),
        (b"", None),
    ],
)
def test_source_is_as_written(frame: bytes, expected: str | None) -> None:
    assert source(frame) == expected


@pytest.mark.root
@pytest.mark.parametrize("length", [0, 1, SHORTEST - 1, SHORTEST, 54, 74, LONGEST, LONGEST + 1, 9014, 65549, 262144])
def test_every_length_is_judged(copy: Recorded, length: int) -> None:
    frame = p.syn(A4, flags=p.SYN)
    judged = copy.judge((frame + bytes(max(length - len(frame), 0)))[:length], 10**12)
    assert not judged.dropped
    assert judged.reason is (Reason.TRUNCATED if length < SHORTEST + 20 + 16 else Reason.CONFORMING)


@pytest.fixture
def pinned() -> Iterator[Path]:
    """An installation's programs and maps, as the loader pins them."""
    pins = Path(f"/sys/fs/bpf/edge-packets-{os.getpid()}")
    pins.mkdir()
    try:
        yield pins
    finally:
        shutil.rmtree(pins)


@pytest.mark.root
def test_live_maps_stay_untouched(run: Run, pinned: Path, tmp_path: Path) -> None:
    live = compile_programs(SMALL, pins=pinned)
    write_identity(live.maps, SMALL, 1)
    before = {name: live.maps[name].items()[1].tobytes() for name in ("control", "services", "counters", "verdicts")}
    names = sorted(path.name for path in pinned.iterdir())
    assert "rows" in names
    with (tmp_path / "edge.toml").open("a") as config:
        config.write(f'[paths]\npins = "{pinned}"\n')
    code, lines, _ = run([p.syn(A)] * 5)
    assert (code, len(lines)) == (0, 5)
    assert sorted(path.name for path in pinned.iterdir()) == names
    assert {name: live.maps[name].items()[1].tobytes() for name in before} == before
    assert not Tables(live.maps, SMALL).rows.read(0)[0].any()


@pytest.mark.root
def test_thousands_a_second(copy: Recorded) -> None:
    """Far below what it does (about 20,000), so that a loaded machine passes."""
    frames = [Captured(n * MS, p.syn(A)) for n in range(5003)]
    begun = time.perf_counter()
    assert len(list(judge(copy, frames))) == 5003
    assert time.perf_counter() - begun < 2.5


def edge(*command: str, stdin: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, input=stdin, capture_output=True, timeout=60)


@pytest.mark.root
def test_standard_input_and_a_table_for_people(tmp_path: Path) -> None:
    pcap(tmp_path / "x", [p.syn("2001:db8:1111:2222:3333:4444:5555:6666", 40000, flags=p.SYN)])
    command = (sys.executable, "-m", "edge.cli", "packets", "-", "--ports", "40000")
    done = edge(*command, stdin=(tmp_path / "x").read_bytes())
    assert done.returncode == 0
    assert done.stdout.decode().splitlines() == [
        "  packet  verdict  reason             new  source                                    port",
        "       1  pass     conforming         yes  2001:db8:1111:2222:3333:4444:5555:6666   40000",
    ]


@pytest.mark.root
def test_without_rights_it_says_what_it_needs(tmp_path: Path) -> None:
    pcap(tmp_path / "x", [p.syn(A)])
    command = ("setpriv", "--inh-caps=-all", "--bounding-set=-all", sys.executable, "-m", "edge.cli", "packets", "-")
    done = edge(*command, stdin=(tmp_path / "x").read_bytes())
    assert done.returncode == 69
    assert b"needs root, or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON" in done.stderr
    assert done.stdout.count(b"\n") <= 1


def test_readable_lines_hold_every_reason() -> None:
    """No word of a reason is wider than its column."""
    lines = [readable(Decision(n=1, verdict="pass", reason=r.name.lower(), syn=True, src=A, dport=25)) for r in Reason]
    assert len({len(line) for line in lines}) == 1
