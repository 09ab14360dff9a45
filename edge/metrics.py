"""What Prometheus sees: the daemon hands over one `Metrics` value a tick, and /metrics shows the last one.

Collection never touches the daemon's state or the kernel: a slow or hostile scraper costs nothing but its own thread.

Invariants:
    no-address-in-a-label: every label comes from an enumeration, the configuration or this host's interface names.
    scrape-sees-one-tick: all values of a scrape come from the same tick.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIServer

import numpy as np
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from edge.abi import LEVELS, REASONS, SERVICES, Level, Mode, Origin, Reason, Service, Standing
from edge.core.prefix import LENGTHS
from edge.errors import UnavailableError

TICK_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Upper bounds of the tick histogram: from an idle tick to one that takes longer than the default interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TickTimes:
    """How long ticks took, as a histogram; `counts` has one more place than TICK_BOUNDS_S, for what lies above."""

    counts: tuple[int, ...] = (0,) * (len(TICK_BOUNDS_S) + 1)
    sum_s: float = 0.0

    @property
    def total(self) -> int:
        """Ticks so far."""
        return sum(self.counts)

    def with_tick(self, seconds: float) -> TickTimes:
        """The histogram with one more tick."""
        at = bisect_left(TICK_BOUNDS_S, seconds)
        counts = tuple(count + (place == at) for place, count in enumerate(self.counts))
        return TickTimes(counts=counts, sum_s=self.sum_s + seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceMetrics:
    """One evidence source, counted since the daemon started."""

    events: int = 0
    errors: int = 0  # lines refused
    dropped: int = 0  # events lost because a queue was full


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Everything that is shown, as it stood at the end of one tick. Nothing in it may be changed afterwards."""

    mode: Mode = Mode.OBSERVE
    packets: np.ndarray = field(default_factory=lambda: np.zeros((REASONS, 2), np.uint64))  # passed, dropped
    rows_active: Sequence[int] | np.ndarray = (0,) * LEVELS  # by level
    rows_capacity: Sequence[int] | np.ndarray = (0,) * LEVELS
    open: Sequence[int] | np.ndarray = (0,) * SERVICES  # connections open now, by service
    completed: Sequence[int] | np.ndarray = (0,) * SERVICES  # handshakes, ever
    uncounted: Sequence[int] | np.ndarray = (0,) * LEVELS  # connections for which a level had no room, ever
    corrected: int = 0  # prefixes whose open connections the socket table contradicts
    tracked: Mapping[Level, int] = field(default_factory=dict)  # prefixes with a reputation
    entries: Mapping[tuple[Standing, Origin, Service], int] = field(default_factory=dict)
    decisions: Mapping[tuple[str, Standing], int] = field(default_factory=dict)  # (action, standing): ever made
    evidence: Mapping[str, SourceMetrics] = field(default_factory=dict)  # by source
    ticks: TickTimes = field(default_factory=TickTimes)
    ticks_late: int = 0  # began more than one interval after they were due
    last_tick_wall_s: float = 0.0
    interfaces: Mapping[str, str] = field(default_factory=dict)  # name: native or generic
    nftables_enabled: bool = False
    nftables_in_sync: bool = False
    nftables_elements: int = 0
    nftables_repairs: int = 0
    journal_lost: int = 0
    forged_prefixes: int = 0  # whose SYNs are mostly never completed, now
    flooded: bool = False  # the same of the whole host
    suppressed: Mapping[str, int] = field(default_factory=dict)  # what ceilings and guards held back: reason, total
    violations: Mapping[str, int] = field(default_factory=dict)  # invariant: how often it did not hold


class Exporter(Collector):
    """Serves the last `Metrics` that it was given, over HTTP, from a registry of its own."""

    def __init__(self, version: str) -> None:
        self._version = version
        self._metrics: Metrics | None = None
        self._server: tuple[WSGIServer, Thread] | None = None
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def update(self, metrics: Metrics) -> None:
        """Show these values from now on; a scrape under way goes on with the earlier ones."""
        self._metrics = metrics

    def start(self, host: str, port: int) -> tuple[str, int]:
        """Serve on this address; returns the one that is bound (port 0: any). UnavailableError when it is taken."""
        try:
            self._server = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise UnavailableError(
                f"metrics: expected to listen on {host} port {port}, found: {error.strerror or error};"
                " choose another metrics.listen or stop what uses it"
            ) from error
        bound = self._server[0].server_address
        return str(bound[0]), int(bound[1])

    def close(self) -> None:
        """Stop serving and wait until the thread has ended."""
        if self._server is None:
            return
        server, thread = self._server
        self._server = None
        server.shutdown()
        server.server_close()
        thread.join()

    def describe(self) -> Iterator[Metric]:
        """The names are known without values (asked when the collector is registered)."""
        return _all(Metrics())

    def collect(self) -> Iterator[Metric]:
        """All families; before the first tick only which build this is."""
        yield _build(self._version)
        metrics = self._metrics
        if metrics is not None:
            yield from _all(metrics)


def _build(version: str) -> Metric:
    return InfoMetricFamily("edge_build", "Version of edge-throttler.", value={"version": version})


def _all(metrics: Metrics) -> Iterator[Metric]:
    yield from _kernel(metrics)
    yield from _connections(metrics)
    yield from _decided(metrics)
    yield from _evidence(metrics)
    yield from _loop(metrics)


def _kernel(metrics: Metrics) -> Iterator[Metric]:
    packets = _counter("edge_packets", "Packets by what the kernel program decided of them.", "reason", "verdict")
    for reason in Reason:
        for verdict, column in (("passed", 0), ("dropped", 1)):
            packets.add_metric([_word(reason), verdict], int(metrics.packets[reason, column]))
    active = _gauge("edge_rows_active", "Rows in which a limit has not refilled yet.", "level")
    capacity = _gauge("edge_rows_capacity", "Rows of the table of this level.", "level")
    for level in Level:
        active.add_metric([str(LENGTHS[level])], int(metrics.rows_active[level]))
        capacity.add_metric([str(LENGTHS[level])], int(metrics.rows_capacity[level]))
    attached = _gauge("edge_interface_attached", "1 where the XDP program is attached.", "interface", "mode")
    for interface, xdp_mode in metrics.interfaces.items():
        attached.add_metric([interface, xdp_mode], 1)
    enforcing = _gauge("edge_enforcing", "1 in mode enforce, 0 in mode observe.")
    enforcing.add_metric([], int(metrics.mode is Mode.ENFORCE))
    yield from (packets, active, capacity, attached, enforcing)


def _connections(metrics: Metrics) -> Iterator[Metric]:
    now_open = _gauge("edge_connections_open", "Open connections that completed their handshake.", "service")
    completed = _counter("edge_handshakes", "Completed handshakes.", "service")
    for service in Service:
        now_open.add_metric([_word(service)], int(metrics.open[service]))
        completed.add_metric([_word(service)], int(metrics.completed[service]))
    uncounted = _counter("edge_connections_uncounted", "Connections for which a level's table had no room.", "level")
    tracked = _gauge("edge_prefixes_tracked", "Prefixes with a reputation.", "level")
    for level in Level:
        uncounted.add_metric([str(LENGTHS[level])], int(metrics.uncounted[level]))
        tracked.add_metric([str(LENGTHS[level])], metrics.tracked.get(level, 0))
    corrected = _gauge(
        "edge_connections_corrected", "Prefixes whose open connections the kernel's socket table contradicts."
    )
    yield from (now_open, completed, uncounted, tracked, _single(corrected, metrics.corrected))
    yield _single(
        _gauge("edge_forged_prefixes", "Prefixes whose SYNs are mostly never completed."), metrics.forged_prefixes
    )
    flooded = _gauge("edge_flooded", "1 while most SYNs of the whole host are never completed.")
    yield _single(flooded, int(metrics.flooded))


def _decided(metrics: Metrics) -> Iterator[Metric]:
    entries = _gauge("edge_entries", "Entries in force.", "standing", "origin", "service")
    for (standing, origin, service), count in metrics.entries.items():
        entries.add_metric([_word(standing), _word(origin), _word(service)], count)
    decisions = _counter("edge_decisions", "Decisions of the core.", "action", "standing")
    for (action, standing), count in metrics.decisions.items():
        decisions.add_metric([action, _word(standing)], count)
    suppressed = _counter("edge_suppressed", "Decisions held back by a ceiling or a guard.", "reason")
    for reason, count in metrics.suppressed.items():
        suppressed.add_metric([reason], count)
    yield from (entries, decisions, suppressed)
    yield _single(_gauge("edge_nftables_enabled", "1 where nftables sets are kept."), int(metrics.nftables_enabled))
    yield _single(
        _gauge("edge_nftables_in_sync", "1 when the sets held what they should."), int(metrics.nftables_in_sync)
    )
    yield _single(_gauge("edge_nftables_elements", "Elements in the nftables sets."), metrics.nftables_elements)
    repairs = _counter(
        "edge_nftables_repairs", "Times the nftables sets had been changed by others and were put right."
    )
    yield _single(repairs, metrics.nftables_repairs)


def _evidence(metrics: Metrics) -> Iterator[Metric]:
    events = _counter("edge_evidence_events", "Events taken from a source.", "source")
    errors = _counter("edge_evidence_errors", "Lines of a source that were refused.", "source")
    dropped = _counter("edge_evidence_dropped", "Events lost because a queue was full.", "source")
    for name, source in metrics.evidence.items():
        events.add_metric([name], source.events)
        errors.add_metric([name], source.errors)
        dropped.add_metric([name], source.dropped)
    yield from (events, errors, dropped)


def _loop(metrics: Metrics) -> Iterator[Metric]:
    yield _single(_counter("edge_ticks", "Rounds of the daemon's loop."), metrics.ticks.total)
    yield _single(_counter("edge_ticks_late", "Ticks that began an interval or more too late."), metrics.ticks_late)
    last = _gauge("edge_last_tick_timestamp_seconds", "When the last tick ended, in seconds since the epoch.")
    yield _single(last, metrics.last_tick_wall_s)
    duration = HistogramMetricFamily("edge_tick_duration_seconds", "How long a tick took.")
    cumulated = np.cumsum(metrics.ticks.counts)
    bounds = [str(bound) for bound in TICK_BOUNDS_S] + ["+Inf"]
    duration.add_metric([], [(b, int(c)) for b, c in zip(bounds, cumulated, strict=True)], metrics.ticks.sum_s)
    yield duration
    lost = _counter("edge_journal_rows_lost", "Journal rows that could not be written; expected to stay 0.")
    yield _single(lost, metrics.journal_lost)
    violations = _counter("edge_invariant_violations", "Invariants found broken; expected to stay 0.", "invariant")
    for invariant, count in metrics.violations.items():
        violations.add_metric([invariant], count)
    yield violations


def _counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, labels=labels)


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=labels)


def _single(family: CounterMetricFamily | GaugeMetricFamily, value: float) -> Metric:
    """A family without labels, with its one value."""
    family.add_metric([], value)
    return family


def _word(member: Any) -> str:
    """The word of an enumeration's member, as labels and `edge explain` write it."""
    return str(member.name).lower()
