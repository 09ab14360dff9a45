import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import Meta

from edge.abi import Level, Service, Standing
from edge.config import Config, default_text, listen_address, load, parse, warnings
from edge.config.types import section_type
from edge.errors import ConfigError
from edge.parameters import Limit


def leaves(struct: type[msgspec.Struct], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and annotation of every key that holds a plain value."""
    for field in msgspec.structs.fields(struct):
        here = (*path, field.encode_name)
        section = section_type(field.type)
        if section is None:
            yield here, field.type
        else:
            yield from leaves(section, here)


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text.encode(), "edge.toml")
    assert caught.value.exit_code == 78
    return str(caught.value)


def warned(text: str) -> list[str]:
    return [str(problem) for problem in warnings(parse(text.encode(), "edge.toml"))]


def test_defaults_load() -> None:
    assert parse(default_text().encode(), "edge.toml") == Config()


def test_defaults_are_quiet_and_refuse_nothing() -> None:
    assert Config().mode == "observe"
    assert warnings(Config()) == []


def test_every_key_of_the_schema_is_in_the_default_text() -> None:
    written = tomllib.loads(default_text())
    for path, _ in leaves(Config):
        table: Any = written
        for key in path:
            assert key in table, ".".join(path)
            table = table[key]


def test_default_text_fits_the_page() -> None:
    assert max(len(line) for line in default_text().splitlines()) <= 100


def test_every_key_is_described() -> None:
    for path, annotation in leaves(Config):
        metas = [m for m in getattr(annotation, "__metadata__", ()) if isinstance(m, Meta)]
        assert any(m.description for m in metas), ".".join(path)


@pytest.mark.parametrize("path", [path for path, _ in leaves(Config)], ids=".".join)
def test_wrong_type_of_any_key_is_named_by_its_path(path: tuple[str, ...]) -> None:
    *sections, key = path
    head = f"[{'.'.join(sections)}]\n" if sections else ""
    message = refused(f"{head}{key} = 2026-11-22\n")
    assert message.startswith(f"edge.toml: {'.'.join(path)}: expected ")
    assert "found datetime.date(2026, 11, 22)" in message


def test_all_problems_at_once() -> None:
    message = refused('mode = "loud"\n[limits.mx.new.64]\nburst = "many"\n[services]\nmx = [25, 0]\n')
    assert message.splitlines()[0] == "edge.toml: 3 problems"
    assert '  mode: expected "enforce" or "observe", found \'loud\'' in message
    assert "  limits.mx.new.64.burst: expected a whole number from 0 to 1000000, found 'many'" in message
    assert (
        "  services.mx: expected a list (0 to 16 items), each a whole number from 1 to 65535, found [25, 0]" in message
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mdoe = 1", "mdoe: expected mode (did you mean that?), found an unknown key"),
        ("[limits.mx.new.64]\nbrust = 1", "limits.mx.new.64.brust: expected burst (did you mean that?)"),
        ("[heartbeat]\nxyzzy = 1", "heartbeat.xyzzy: expected one of grace_s, dead, found an unknown key"),
        ("limits = 7", "limits: expected a table, found 7"),
        ("[limits.mx]\nnew = []", "limits.mx.new: expected a table, found []"),
        ("tick_s = nan", "tick_s: expected a number from 0.1 to 60, found nan"),
        ("[heartbeat]\ngrace_s = inf", "heartbeat.grace_s: expected a number above 0 up to 86400, found inf"),
        ("tick_s = true", "tick_s: expected a number from 0.1 to 60, found true"),
        ("[control]\nmode = 660", "control.mode: expected an octal number from 0o600 to 0o777, written with"),
        ('[control]\nmode = "0660"', "control.mode: expected an octal number"),
        ("[services]\nsubmission = [465, 25]", "services.submission: expected ports that are not in services.mx"),
        ("[services]\nmx = [25, 25]", "services.mx: expected each port once"),
        ("[services]\nmx = []\nsubmission = []", "services: expected at least one port, found none"),
        ('[interfaces]\nnames = [""]', "interfaces.names: expected interface names of 1 to 15 characters"),
        ('[interfaces]\nnames = ["auto", "eth0"]', 'interfaces.names: expected each name once, and "auto" alone'),
        ('[protect]\naddresses = ["mx1"]', "protect.addresses: expected IPv6 or IPv4 addresses, found 'mx1'"),
        ('[exempt]\nprefixes = ["2001:db8::1/64"]', "exempt.prefixes: expected prefixes without host bits"),
        ("[limits.mx.new]\n64 = { rate_per_min = 60, burst = 0 }", "limits.mx.new.64.burst: expected at least 1"),
        ("[limits.mx.bad]\n64 = { rate_per_min = 1e-9 }", "limits.mx.bad.64.rate_per_min: expected 0 (no limit) or"),
        ("[limits.mx.bad]\n64 = { rate_per_min = 0.2, burst = 1009 }", "limits.mx.bad.64.burst: expected at most"),
        ("[limits.mx.good]\n64 = { rate_per_min = 61 }", "limits.mx.good.64: expected at least what unknown"),
        ("[limits.mx.good]\n64 = { open = 7 }", "limits.mx.good.64.open: expected at least what unknown"),
        ("[limits.untracked]\nburst = 0", "limits.untracked.burst: expected at least 1"),
        ("tick_s = 60\n[heartbeat]\ngrace_s = 60", "heartbeat.grace_s: expected more than tick_s (60), found 60.0"),
        ("[tables]\nrows_64 = 1000003", "tables.rows_64: expected a power of two (524288 or 1048576), found 1000003"),
        ('[metrics]\nlisten = "0.0.0.0:9843"', "metrics.listen: expected a loopback address, or"),
        ('[metrics]\nlisten = "localhost:9843"', "metrics.listen: expected ADDRESS:PORT"),
        ('[metrics]\nlisten = "127.0.0.1:70000"', "metrics.listen: expected ADDRESS:PORT"),
        ('[paths]\nstate = "edge"', "paths.state: expected an absolute path, found 'edge'"),
        ('[paths]\npins = "/sys/fs/bpf/edge.1"', "paths.pins: expected a path without dots"),
        ('[evidence.postfix]\nlogs = ["mail.log"]', "evidence.postfix.logs[0]: expected an absolute path"),
        ('[control]\nsocket = "/run/edge/events.sock"', "control.socket: expected another path than"),
        ("[core.ledger]\nblock_s = 86400\nblock_most_s = 600", "core.ledger.block_most_s: expected at least"),
        ('[nftables]\ntable = "edge; flush ruleset"', "nftables.table: expected a string that matches"),
    ],
)  # fmt: skip
def test_each_mistake_is_named(text: str, message: str) -> None:
    assert message in refused(text)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[limits.mx.new]\n64 = { rate_per_min = 0.1, burst = 1 }\n[tables]\nrows_64 = 1024", "tables.rows_64"),
        ("[limits.mx.new]\n48 = { rate_per_min = 601, burst = 300 }", "limits.mx.new.48"),
        ("[limits.mx.suspect]\n64 = { rate_per_min = 601, burst = 300 }", "limits.mx.suspect.64"),
        ("[heartbeat]\ngrace_s = 3", "heartbeat.grace_s"),
        ("[control]\nmode = 0o666", "control.mode"),
        ('[exempt]\nprefixes = ["0.0.0.0/1"]', "exempt.prefixes"),
        ("[core.reputation]\nhalf_life_48_s = 61", "core.reputation.half_life_48_s"),
    ],
)
def test_each_risk_is_a_warning(text: str, key: str) -> None:
    assert key in {line.partition(":")[0] for line in warned(text)}


def test_syntax_error_names_its_line() -> None:
    assert "expected TOML, found: " in refused('mode = "observe"\n\ntick_s = = 1\n')
    assert "line 3" in refused('mode = "observe"\n\ntick_s = = 1\n')


def test_bytes_that_are_not_text_name_their_line() -> None:
    with pytest.raises(ConfigError, match=r"edge.toml: expected UTF-8 text, found byte 0xff \(at line 2\)"):
        parse(b'mode = "observe"\n# \xff\n', "edge.toml")


def test_deep_nesting_is_refused_not_fatal() -> None:
    assert "expected TOML" in refused("a = " + "[" * 100_003)


def test_one_number_overrides_its_default_alone() -> None:
    config = parse(b"[limits.mx.bad]\n64 = { rate_per_min = 0.5 }\n", "edge.toml")
    default = Config().limits.mx.bad.l64
    assert config.limits.mx.bad.l64 == Limit(rate_per_min=0.5, burst=default.burst, open=default.open)
    assert config.limits.mx.bad.l48 == Config().limits.mx.bad.l48
    assert config.limits.submission == Config().limits.submission


def test_good_is_never_tighter() -> None:
    limits = Config().limits
    for service in Service:
        for level in Level:
            new, good = (limits.of(service, standing, level) for standing in (Standing.NEW, Standing.GOOD))
            assert good.rate_per_min >= new.rate_per_min
            assert good.burst >= new.burst
            assert good.open >= new.open


def test_limit_as_the_kernel_takes_it() -> None:
    limit = Limit(rate_per_min=600, burst=300)
    assert (limit.emission_interval_ns, limit.burst_tolerance_ns) == (100_000_000, 29_900_000_000)
    assert (Limit().emission_interval_ns, Limit().burst_tolerance_ns) == (0, 0)


def test_allow_and_block_have_no_limit() -> None:
    for standing in (Standing.ALLOW, Standing.BLOCK):
        assert Config().limits.of(Service.MX, standing, Level.L64) == Limit()


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:9843", ("127.0.0.1", 9843)), ("[::1]:0", ("::1", 0))],
)
def test_listen_address(text: str, address: tuple[str, int]) -> None:
    assert listen_address(text) == address


@pytest.mark.parametrize("text", ["", "9843", ":9843", "::1:9843", "[127.0.0.1]:1", "127.0.0.1:", "127.0.0.1:\u0663"])
def test_listen_address_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"^"):
        listen_address(text)


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "edge.toml"
    path.write_text('mode = "enforce"\n')
    assert load(path).mode == "enforce"


def test_a_named_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "edge.toml")


def test_a_file_beyond_all_bounds_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "edge.toml"
    path.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="expected at most 1048576 bytes"):
        load(path)
