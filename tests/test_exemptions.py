import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.abi import Origin, Service, Standing
from edge.config import Config
from edge.exemptions import MOST_PATTERNS, connected, entries, parse_mynetworks, read_mynetworks
from edge.parameters import Exempt
from tests.kernel.netns import NetNs, netns


def texts(mynetworks: str) -> list[str]:
    return [str(prefix) for prefix in parse_mynetworks(mynetworks)]


def test_plain_prefixes_of_mynetworks() -> None:
    value = "127.0.0.0/8 [::1]/128, [2001:db8:7::]/48\n\t192.0.2.7,[2001:db8::5] 2001:db8:9::/48 [::ffff:192.0.2.9]/128"
    assert texts(value) == [
        "127.0.0.0/8",
        "::1/128",
        "2001:db8:7::/48",
        "192.0.2.7/32",
        "2001:db8::5/128",
        "2001:db8:9::/48",
        "192.0.2.9/32",
    ]


@pytest.mark.parametrize(
    "pattern",
    [
        "hash:/etc/postfix/network_table",
        "cidr:/etc/postfix/networks.cidr",
        "/etc/postfix/mynetworks",
        "!192.0.2.1",
        "!hash:/x",
        "10.0.0.1/8",
        "[fe80::1%eth0]",
        "[]",
        "]",
        "192.0.2.0/33",
        "${x}",
        "localhost",
    ],
)
def test_nothing_is_skipped_silently(pattern: str, caplog: pytest.LogCaptureFixture) -> None:
    assert texts(f"192.0.2.7 {pattern} 192.0.2.9") == ["192.0.2.7/32", "192.0.2.9/32"]
    assert [r.getMessage() for r in caplog.records] == ["mynetworks pattern skipped"]
    assert caplog.records[0].fields["pattern"] == pattern  # type: ignore[attr-defined]  # set through `extra`


@pytest.mark.parametrize("pattern", ["0.0.0.0/1", "192.0.0.0/7", "[::]/1", "[2000::]/3"])
def test_never_the_whole_internet(pattern: str, caplog: pytest.LogCaptureFixture) -> None:
    assert texts(pattern) == []
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [
        (logging.ERROR, "refused to exempt so wide a prefix")
    ]


def test_mynetworks_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    assert len(texts("192.0.2.7 " * (MOST_PATTERNS + 7))) == MOST_PATTERNS
    assert caplog.messages == ["mynetworks is cut"]


@pytest.fixture
def postconf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `postconf` that comes first on the path; the test writes it."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = tmp_path / "postconf"
    path.touch(0o755)
    return path


def test_postconf_is_asked_for_the_expanded_value(postconf: Path) -> None:
    postconf.write_text('#!/bin/sh\necho "$@ 192.0.2.7"\n')
    assert read_mynetworks() == "-x -h mynetworks 192.0.2.7\n"


def test_a_postconf_that_fails_is_logged(postconf: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    postconf.write_text("#!/bin/sh\necho 'fatal: open /etc/postfix/main.cf' >&2; exit 1\n")
    assert read_mynetworks() == ""
    assert caplog.messages == ["mynetworks unknown: nothing of it is exempt"]
    assert "fatal: open" in caplog.records[0].fields["error"]  # type: ignore[attr-defined]  # set through `extra`


def test_a_postconf_that_hangs_is_given_up(
    postconf: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("edge.exemptions.POSTCONF_TIMEOUT_S", 0.1)
    postconf.write_text("#!/bin/sh\nexec sleep 600\n")
    assert read_mynetworks() == ""
    assert "timed out after 0.1 seconds" in caplog.records[0].fields["error"]  # type: ignore[attr-defined]  # `extra`


def test_an_entry_for_each_service(postconf: Path) -> None:
    postconf.write_text("#!/bin/sh\necho '192.0.2.0/24 [2001:db8:7::]/48'\n")
    config = Config(exempt=Exempt(connected=False, prefixes=("2001:db8:7::/48", "198.51.100.9")))
    found = entries(config, [])
    assert [(str(e.prefix), e.service, e.reason) for e in found] == [
        (prefix, service, reason)
        for prefix, reason in (
            ("2001:db8:7::/48", "exempt: configured"),
            ("198.51.100.9/32", "exempt: configured"),
            ("192.0.2.0/24", "exempt: Postfix mynetworks"),
        )
        for service in Service
    ]
    assert {(e.standing, e.origin, e.expires_s) for e in found} == {(Standing.ALLOW, Origin.EXEMPT, None)}


def test_nothing_is_exempt_when_all_is_turned_off() -> None:
    config = Config(exempt=Exempt(connected=False, postfix_mynetworks=False))
    assert entries(config, ["lo"]) == []


@pytest.fixture
def host() -> Iterator[NetNs]:
    """Inside a namespace with two interfaces, eth7 and eth9, whose addresses a test gives by `ip`."""
    with netns("exempt") as space:
        for command in ("add eth7 type veth peer name eth9", "set eth7 up", "set eth9 up"):
            space.run("ip", "link", *command.split())
        with space.entered():
            yield space


def give(host: NetNs, interface: str, *address: str) -> None:
    host.run("ip", "address", "add", *address, "dev", interface)


@pytest.mark.root
def test_connected_prefixes_of_the_interfaces(host: NetNs, caplog: pytest.LogCaptureFixture) -> None:
    give(host, "eth7", "2001:db8:7::25/64", "nodad")
    give(host, "eth7", "192.0.2.25/24")
    give(host, "eth7", "198.51.100.1", "peer", "198.51.100.2/32")
    give(host, "eth9", "203.0.113.25/24")
    found = {(str(prefix), interface) for prefix, interface in connected(["eth7"])}
    assert found == {("2001:db8:7::/64", "eth7"), ("192.0.2.0/24", "eth7"), ("198.51.100.2/32", "eth7")}
    assert caplog.messages == []


@pytest.mark.root
def test_a_wide_connected_prefix_is_a_warning(host: NetNs, caplog: pytest.LogCaptureFixture) -> None:
    give(host, "eth7", "2001:db8:7::25/32", "nodad")
    assert [str(prefix) for prefix, _ in connected(["eth7"])] == ["2001:db8::/32"]
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [
        (logging.WARNING, "a wide connected prefix is exempt")
    ]


@pytest.mark.root
def test_half_the_internet_is_never_connected(host: NetNs, caplog: pytest.LogCaptureFixture) -> None:
    give(host, "eth7", "203.0.113.25/1")
    give(host, "eth7", "2001:db8:7::25/3", "nodad")
    assert list(connected(["eth7"])) == []
    assert {r.levelno for r in caplog.records} == {logging.ERROR}


@pytest.mark.root
def test_an_interface_that_is_not_there_is_logged(host: NetNs, caplog: pytest.LogCaptureFixture) -> None:
    assert list(connected(["eth11"])) == []
    assert caplog.messages == ["no such interface: nothing of it is exempt"]


def test_loopback_is_never_connected() -> None:
    assert list(connected(["lo"])) == []


def test_a_packaged_postfix_without_main_cf_is_not_asked(
    postconf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Debian's package leaves it; asked, it would wait a second before it says so."""
    caplog.set_level("INFO")
    monkeypatch.delenv("MAIL_CONFIG", raising=False)
    monkeypatch.setattr("edge.exemptions.PACKAGED", (postconf.parent,))
    monkeypatch.setattr("edge.exemptions.MAIN_CF", tmp_path / "main.cf")
    postconf.write_text("#!/bin/sh\necho 192.0.2.7\n")
    assert read_mynetworks() == ""
    assert caplog.messages == ["Postfix has no main.cf: it has no mynetworks"]
    tmp_path.joinpath("main.cf").touch()
    assert read_mynetworks() == "192.0.2.7\n"
