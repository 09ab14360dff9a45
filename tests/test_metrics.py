import http.client
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from edge.abi import LEVELS, REASONS, Level, Mode, Origin, Reason, Service, Standing
from edge.errors import UnavailableError
from edge.metrics import TICK_BOUNDS_S, Exporter, Metrics, SourceMetrics, TickTimes


def filled() -> Metrics:
    """A value for everything; counts are primes, so that a doubled or swapped one shows."""
    packets = np.zeros((REASONS, 2), np.uint64)
    packets[Reason.CONFORMING] = 1009, 0
    packets[Reason.BLOCKED_LEARNED] = 0, 2003
    ticks = TickTimes()
    for seconds in (0.0005, 0.003, 0.003, 0.7, 61.0):
        ticks = ticks.with_tick(seconds)
    return Metrics(
        mode=Mode.ENFORCE,
        packets=packets,
        rows_active=np.array([2, 3, 5, 7, 11]),
        open=np.array([61, 67]),
        completed=np.array([71, 73]),
        uncounted=np.array([79, 83, 89, 97, 101]),
        corrected=103,
        tracked={Level.L64: 107},
        forged_prefixes=109,
        flooded=True,
        rows_capacity=[1 << 10] * LEVELS,
        entries={(Standing.BLOCK, Origin.LEARNED, Service.MX): 13, (Standing.ALLOW, Origin.EXEMPT, Service.MX): 17},
        decisions={("open", Standing.BLOCK): 19, ("close", Standing.BLOCK): 23},
        evidence={"postfix": SourceMetrics(events=29, errors=31, dropped=37)},
        ticks=ticks,
        ticks_late=41,
        last_tick_wall_s=1_790_000_000.5,
        interfaces={"eth0": "native"},
        nftables_enabled=True,
        nftables_in_sync=True,
        nftables_elements=43,
        nftables_repairs=47,
        journal_lost=53,
        violations={"presence-covers": 59},
    )


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    made = Exporter("0.1.0")
    yield made
    made.close()


def scraped(address: tuple[str, int]) -> str:
    with urllib.request.urlopen(f"http://{address[0]}:{address[1]}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def samples(text: str) -> dict[str, float]:
    """Samples as `name{label=value,...}`."""
    return {
        s.name + ("{" + ",".join(f"{k}={v}" for k, v in sorted(s.labels.items())) + "}" if s.labels else ""): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_every_value_is_shown(exporter: Exporter) -> None:
    exporter.update(filled())
    found = samples(scraped(exporter.start("127.0.0.1", 0)))
    expected = {
        "edge_packets_total{reason=conforming,verdict=passed}": 1009,
        "edge_packets_total{reason=blocked_learned,verdict=dropped}": 2003,
        "edge_rows_active{level=128}": 2,
        "edge_rows_active{level=32}": 11,
        "edge_rows_capacity{level=64}": 1024,
        "edge_entries{origin=learned,service=mx,standing=block}": 13,
        "edge_connections_open{service=submission}": 67,
        "edge_handshakes_total{service=mx}": 71,
        "edge_connections_uncounted_total{level=32}": 101,
        "edge_connections_corrected": 103,
        "edge_prefixes_tracked{level=64}": 107,
        "edge_prefixes_tracked{level=32}": 0,
        "edge_forged_prefixes": 109,
        "edge_flooded": 1,
        "edge_entries{origin=exempt,service=mx,standing=allow}": 17,
        "edge_decisions_total{action=open,standing=block}": 19,
        "edge_decisions_total{action=close,standing=block}": 23,
        "edge_evidence_events_total{source=postfix}": 29,
        "edge_evidence_errors_total{source=postfix}": 31,
        "edge_evidence_dropped_total{source=postfix}": 37,
        "edge_ticks_total": 5,
        "edge_ticks_late_total": 41,
        "edge_last_tick_timestamp_seconds": 1_790_000_000.5,
        "edge_tick_duration_seconds_bucket{le=0.001}": 1,
        "edge_tick_duration_seconds_bucket{le=0.005}": 3,
        "edge_tick_duration_seconds_bucket{le=1.0}": 4,
        "edge_tick_duration_seconds_bucket{le=+Inf}": 5,
        "edge_tick_duration_seconds_count": 5,
        "edge_tick_duration_seconds_sum": pytest.approx(61.7065),
        "edge_interface_attached{interface=eth0,mode=native}": 1,
        "edge_enforcing": 1,
        "edge_nftables_enabled": 1,
        "edge_nftables_in_sync": 1,
        "edge_nftables_elements": 43,
        "edge_nftables_repairs_total": 47,
        "edge_journal_rows_lost_total": 53,
        "edge_invariant_violations_total{invariant=presence-covers}": 59,
        "edge_build_info{version=0.1.0}": 1,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_every_reason_is_a_series_from_the_start(exporter: Exporter) -> None:
    exporter.update(Metrics())
    found = samples(scraped(exporter.start("127.0.0.1", 0)))
    assert sum(name.startswith("edge_packets_total{") for name in found) == 2 * REASONS


def test_before_the_first_tick_only_the_build_is_shown(exporter: Exporter) -> None:
    found = samples(scraped(exporter.start("127.0.0.1", 0)))
    assert [name for name in found if name.startswith("edge_")] == ["edge_build_info{version=0.1.0}"]


def test_promtool_accepts_it(exporter: Exporter) -> None:
    promtool = shutil.which("promtool")
    assert promtool, "promtool is not installed: apt-get install --no-install-recommends prometheus"
    exporter.update(filled())
    text = scraped(exporter.start("127.0.0.1", 0))
    run = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_no_address_in_a_label(exporter: Exporter) -> None:
    exporter.update(filled())
    for name in samples(scraped(exporter.start("127.0.0.1", 0))):
        labels = name.partition("{")[2]
        assert not re.search(r"[0-9a-f]*:[0-9a-f]*:|\d+\.\d+\.\d+\.\d+", labels), name


def test_scrape_sees_one_tick(exporter: Exporter) -> None:
    """While a writer hands over values whose parts always agree, no scrape may show parts of two of them."""
    address = exporter.start("127.0.0.1", 0)
    exporter.update(Metrics())
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            exporter.update(Metrics(nftables_elements=number, nftables_repairs=number, ticks_late=number))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(53):
            found = samples(scraped(address))
            assert (
                found["edge_nftables_elements"]
                == found["edge_nftables_repairs_total"]
                == found["edge_ticks_late_total"]
            )
    finally:
        stop.set()
        writer.join()


def test_ipv6_loopback(exporter: Exporter) -> None:
    host, port = exporter.start("::1", 0)
    assert host == "::1"
    connection = http.client.HTTPConnection(host, port, timeout=10)
    connection.request("GET", "/metrics")
    assert connection.getresponse().status == 200
    connection.close()


def test_a_taken_port_is_named(exporter: Exporter) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            UnavailableError, match=f"expected to listen on 127.0.0.1 port {port}, found: Address already"
        ):
            exporter.start("127.0.0.1", port)


def test_close_frees_the_port_and_ends_the_thread() -> None:
    before = threading.active_count()
    for _ in range(3):
        exporter = Exporter("0.1.0")
        host, port = exporter.start("127.0.0.1", 0)
        scraped((host, port))
        exporter.close()
        exporter.close()
        socket.create_server((host, port)).close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < deadline, "a thread of the exporter is left"


def test_histogram_counts_each_tick_once() -> None:
    times = TickTimes()
    for seconds in (*TICK_BOUNDS_S, 0.0, 1009.0):
        times = times.with_tick(seconds)
    assert times.counts == (2, *(1,) * (len(TICK_BOUNDS_S) - 1), 1)
    assert times.total == len(TICK_BOUNDS_S) + 2
