"""The loop around the core: read, learn, decide, install, tell.

    heartbeat ─ counters ─┐
    sources ── events ────┴─ step ── wanted ── plan ───┬─ policy maps
    operator, exempt entries ───────────┘              ├─ nftables sets
                                                       └─ journal, metrics

One thread, one tick at a time; control requests are answered between ticks. What the kernel holds goes on without us:
the programs, links and maps are pinned, so killing this process at any moment leaves the limits working, and the next
one adopts them.

Invariants:
    heartbeat-first: a tick tells the kernel that we live before it does anything that can fail.
    nftables-trouble-is-survived: an error there is logged and counted; the next tick compares again.
    a-tick-costs-what-changed: nothing in it goes through all entries, or all elements of a set.
    one-daemon: see edge.kernel.pins.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from sdnotify import SystemdNotifier

from edge import exemptions
from edge.abi import SERVICES, Level, Mode, Origin, Reason, Service, Standing
from edge.config import Config, listen_address
from edge.control import ControlServer
from edge.core.forgery import Saturated
from edge.core.match import Entries, scorable
from edge.core.model import Decision, Entry, batch
from edge.core.nesting import Key
from edge.core.prefix import LENGTHS, Prefix
from edge.core.reconcile import Reconciler, agreed, differences, present
from edge.core.snapshot import Snapshot, delta, handshakes
from edge.core.step import Inputs, Outcome, State, adopt, step
from edge.core.wanted import Backlog, Wanted
from edge.errors import UnavailableError
from edge.kernel import attach, loader
from edge.kernel.attach import Attachment
from edge.kernel.libbpf import Fd
from edge.kernel.maps import Tables
from edge.kernel.netlink import NoAnswerError
from edge.kernel.nft import NftSets
from edge.kernel.pins import Pins
from edge.kernel.sockets import open_connections, per_prefix
from edge.metrics import Exporter, Metrics, SourceMetrics, TickTimes
from edge.sources import Sources
from edge.store import Store
from edge.verbs import Verbs

log = logging.getLogger(__name__)

INTERFACES_EVERY_S = 2.0
"""How long a re-created interface may stay without its program; asking costs a millisecond of a thread."""

LOOKING_SHARE = 20.0
"""Pause between two looks, in times of what a look took: a host of many devices or routes spends 5 % on it."""

PR_SET_PDEATHSIG = 1  # linux/prctl.h

M_MMAP_THRESHOLD = -3  # malloc.h
MAPPED_BYTES = 65536
"""Blocks from this size on go back to the system when freed. Left alone, glibc raises the limit to the largest block it
saw freed, and keeps what a busy tick took: 20 MB after 40,000 events."""

RECONCILE_EVERY_S = 30.0
"""Connections that were open before us end within minutes; reading 50,000 sockets takes 0.1 s of a thread."""

EXEMPTIONS_EVERY_S = 300.0
"""Addresses of interfaces and mynetworks change rarely; asking costs a process."""


class SystemClock:
    """ports.Clock of the real world."""

    def now_s(self) -> float:
        """CLOCK_MONOTONIC, which the kernel programs use too."""
        return time.monotonic()

    def wall_s(self) -> float:
        """Seconds since the epoch."""
        return time.time()


@dataclass(slots=True)
class Totals:
    """Counted since the daemon started."""

    ticks: TickTimes = field(default_factory=TickTimes)
    last_tick_s: float = 0.0
    late: int = 0
    decisions: Counter[tuple[str, Standing]] = field(default_factory=Counter)
    suppressed: Counter[str] = field(default_factory=Counter)
    completed: np.ndarray = field(default_factory=lambda: np.zeros(SERVICES, np.int64))  # handshakes, by service


class Daemon:
    """Everything one installation consists of while it runs."""

    def __init__(
        self,
        config: Config,
        attached: dict[str, Attachment],
        exempt: list[Entry],
        tables: Tables,
        nft: NftSets | None,
        store: Store,
        sources: Sources,
    ) -> None:
        self.config, self.clock = config, SystemClock()
        self.attached, self.exempt = attached, exempt
        self.tables, self.nft, self.store, self.sources = tables, nft, store, sources
        self.started_s = self.clock.now_s()
        self.totals = Totals()
        self.snapshot: Snapshot | None = None
        self.outcome: Outcome | None = None
        self.failure: Exception | None = None  # why the daemon must end
        self.nft_in_sync = False
        self.state = State(config.core.reputation)
        self.state.forgery.adopt({key: until_ns / 1e9 for key, until_ns in tables.forged.held.items()})
        self.operator = {entry.key: entry for entry in store.operator_entries()}
        self._fixed: tuple[Entry, ...] = ()
        self._fixed_until_s = math.inf  # when the first of them ends
        self._adopt()
        self.wanted = Wanted(self.state.ledger.learned)
        self.desired: Entries = self.wanted.entries  # follows
        self._update_wanted(self.state.ledger.take_changed())
        self.backlog = self.wanted.follow(tables.policy.installed())
        self.nft_backlog = None if nft is None else self.wanted.follow(nft.installed())

    def _adopt(self) -> None:
        """Go on with what an earlier daemon had learned: its entries are still in the kernel."""
        now_s = self.clock.now_s()
        found = list(self.tables.policy.installed().values())
        reasons = self.store.reasons([entry.decision for entry in found])
        adopt(self.state, [replace(e, reason=reasons.get(e.decision, e.reason)) for e in found], now_s)
        self.state.ledger.next_id = max(self.state.ledger.next_id, self.store.last_decision() + 1)
        learned = sum(entry.origin is Origin.LEARNED for entry in found)
        log.info("adopted", extra={"fields": {"learned": learned, "operator": len(self.operator)}})

    def fixed(self) -> tuple[Entry, ...]:
        """Entries that nothing learned overrides; the same tuple until one of them changes."""
        now_s = self.clock.now_s()
        if now_s >= self._fixed_until_s:
            for key, entry in list(self.operator.items()):
                if entry.expires_s is not None and entry.expires_s <= now_s:
                    del self.operator[key]  # its row goes when the store is next pruned
            self._fixed = ()
        if not self._fixed:
            self._fixed = (*self.exempt, *self.operator.values())
            ends_s = (entry.expires_s for entry in self._fixed if entry.expires_s is not None)
            self._fixed_until_s = min(ends_s, default=math.inf)
        return self._fixed

    def exempt_now(self, exempt: list[Entry]) -> None:
        """Exempt these from the next tick on."""
        if exempt != self.exempt:
            self.exempt, self._fixed = exempt, ()
            log.info("exemptions changed", extra={"fields": {"entries": len(exempt)}})

    def change_operator(self, put: Sequence[Entry], drop: Sequence[Entry]) -> None:
        """Take an operator's command: stored first, in force when this returns."""
        now_s = self.clock.now_s()
        self.store.change_operator(put, [entry.key for entry in drop])
        for entry in drop:
            self.operator.pop(entry.key, None)
        for entry in put:
            self.operator[entry.key] = entry
        self._fixed = ()
        self._install(now_s, self.state.ledger.take_changed())
        self._record(
            [Decision(id=self.next_decision(), at_s=now_s, action="close", entry=entry) for entry in drop]
            + [Decision(id=entry.decision, at_s=now_s, action="open", entry=entry) for entry in put]
        )

    def release(self, service: Service, prefix: Prefix) -> Entry | None:
        """End a learned block at an operator's word; the entry, or None where there is none."""
        now_s = self.clock.now_s()
        entry = self.state.ledger.entry(service, prefix)
        if entry is None or entry.standing is not Standing.BLOCK:
            return None
        self._record([self.state.ledger.release(entry, now_s, "released by an operator")])
        return entry

    def next_decision(self) -> int:
        """An id for an operator's command, from the same numbers as the core's decisions."""
        ledger = self.state.ledger
        ledger.next_id += 1
        return ledger.next_id - 1

    def tick(self) -> None:
        """One round. Errors of the kernel end the daemon; those of nftables do not."""
        began_s = self.clock.now_s()
        self.tables.heartbeat(began_s)
        before, self.snapshot = self.snapshot, self.tables.read(began_s)
        fixed = self.fixed()
        events = scorable(
            batch(self.sources.poll()), self.state.guard(fixed), exempt_private=self.config.exempt.private
        )
        inputs = Inputs(
            events=events,
            delta=delta(before, self.snapshot),
            fixed=fixed,
            saturated=self._saturated(self.snapshot.limited),
        )
        self.outcome = step(self.state, inputs, began_s, self.config.core)
        self.totals.suppressed.update(self.outcome.counts.suppressed)
        self.totals.completed += handshakes(inputs.delta.connections)
        self._mark_forged(self.outcome.forged, self.outcome.flood_until_s)
        self._install(began_s, self.outcome.changed)
        self._record(self.outcome.decisions)
        self.totals.last_tick_s = self.clock.now_s() - began_s
        self.totals.ticks = self.totals.ticks.with_tick(self.totals.last_tick_s)

    def _saturated(self, limited: np.ndarray) -> tuple[Saturated, ...]:
        """The prefixes that have spent their limit, worst of each level first."""
        found = []
        for row in limited:
            level, service = Level(int(row["level"])), Service(int(row["service"]))
            prefix = Prefix(int(row["hi"]), 0, LENGTHS[level])
            entry = self.desired.get((service, prefix))
            limit = self.config.limits.of(service, Standing.NEW if entry is None else entry.standing, level)
            if limit.rate_per_min and row["ahead_s"] * 1e9 > limit.spent_ns:
                found.append(Saturated(service=service, prefix=prefix, admits_per_s=limit.rate_per_min / 60))
        return tuple(found)

    def open_differences(self, ports: Mapping[int, Service]) -> dict[tuple[Service, Prefix], int]:
        """Where the kernel's socket table has other open connections than were counted. Blocks: for a thread."""
        levels = (Level.L64, Level.L56, Level.L48, Level.L32)
        before = [self.tables.connections.open(level) for level in levels]
        found = open_connections(ports)
        after = [self.tables.connections.open(level) for level in levels]
        lower = present(before[0], per_prefix(found, Level.L64), found.listening)
        differing: dict[tuple[Service, Prefix], int] = {}
        for level, earlier, later in zip(levels, before, after, strict=True):
            actual = per_prefix(found, level)
            both = [differences(known, actual, LENGTHS[level], lower) for known in (earlier, later)]
            differing |= agreed(*both)
        return differing

    def _mark_forged(self, forged: Mapping[tuple[Service, Prefix], float], flood_until_s: float) -> None:
        """Tell the kernel, and the log what is new or over."""
        if bool(flood_until_s) != bool(self.tables.flood_until_s):
            log.warning("flood of forged SYNs from everywhere" if flood_until_s else "flood over")
        self.tables.flood_until_s = flood_until_s
        marks = self.tables.forged
        before = set(marks.held)
        marks.write({key: int(until_s * 1e9) for key, until_s in forged.items()})
        for word, keys in (("forged", forged.keys() - before), ("no longer forged", before - forged.keys())):
            for service, prefix in sorted(keys):
                log.warning(word, extra={"fields": {"prefix": prefix, "service": service.name.lower()}})

    def _update_wanted(self, changed: Set[Key]) -> None:
        """Take in these learned entries, and the fixed ones."""
        fixed = self.fixed()
        self.wanted.update(changed, fixed, self.state.guard(fixed))

    def _install(self, now_s: float, changed: Set[Key]) -> None:
        """Make kernel and nftables hold what is wanted, by differences; the keys are of learned entries."""
        self._update_wanted(changed)
        policy = self.tables.policy
        changes = self.backlog.plan(policy.installed(), self.config.plan)
        policy.announce(changes.put)
        self.tables.heartbeat(now_s)
        policy.apply(changes.put, changes.drop)
        if self.nft is not None and self.nft_backlog is not None:
            self._install_nft(self.nft, self.nft_backlog)

    def _install_nft(self, nft: NftSets, backlog: Backlog) -> None:
        try:
            nft.drifted()
            changes = backlog.plan(nft.installed(), self.config.plan)
            nft.apply(changes.put, changes.drop)
            nft.renew()
            self.nft_in_sync = not changes.deferred
        except UnavailableError as error:
            self.nft_in_sync = False
            log.error("nftables not in sync", extra={"fields": {"error": error}})

    def _record(self, decisions: Sequence[Decision]) -> None:
        self.store.write(decisions)
        for decision in decisions:
            entry = decision.entry
            self.totals.decisions[decision.action, entry.standing] += 1
            fields = {
                "action": decision.action,
                "standing": entry.standing.name.lower(),
                "prefix": entry.prefix,
                "service": entry.service.name.lower(),
                "reason": entry.reason,
                "id": decision.id,
            }
            log.info("decided", extra={"fields": fields})

    def metrics(self) -> Metrics:
        """Everything /metrics shows, as of now."""
        assert self.snapshot is not None
        nft = self.nft
        return Metrics(
            mode=Mode[self.config.mode.upper()],
            packets=self.snapshot.counters,
            rows_active=self.snapshot.rows_active,
            rows_capacity=np.array([self.config.tables.rows(level) for level in Level]),
            open=self.snapshot.open,
            completed=self.totals.completed.copy(),
            uncounted=self.snapshot.uncounted,
            corrected=len(self.tables.corrections.held),
            tracked={} if self.outcome is None else self.outcome.counts.rows,
            entries=+self.wanted.counts,  # without those that came to nothing
            decisions=dict(self.totals.decisions),
            evidence={
                stats.name: SourceMetrics(events=stats.events, errors=stats.errors, dropped=stats.dropped)
                for stats in self.sources.stats()
            },
            ticks=self.totals.ticks,
            ticks_late=self.totals.late,
            last_tick_wall_s=self.clock.wall_s(),
            interfaces={name: row.mode for name, row in self.attached.items() if row.program_id},
            nftables_enabled=nft is not None,
            nftables_in_sync=self.nft_in_sync,
            nftables_elements=0 if nft is None else nft.elements,
            nftables_repairs=0 if nft is None else nft.repairs,
            journal_lost=self.store.lost,
            forged_prefixes=len(self.tables.forged.held),
            flooded=self.tables.flood_until_s > 0,
            suppressed=dict(self.totals.suppressed),
            violations={
                "every-map-is-there": int(self.snapshot.counters[Reason.INTERNAL].sum()),
                "policy-has-room": self.tables.policy.no_room,
                "marks-have-room": self.tables.forged.no_room + self.tables.corrections.no_room,
                "every-change-is-reported": self.wanted.healed,
            },
        )


def run(config: Config, *, replace: bool = False) -> int:
    """Run until SIGTERM or SIGINT; as root the programs are loaded first. Returns the exit code."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
    with _hold_pins(config):
        _load_if_needed(config, replace=replace)
        attached = attach.attachments(config)
        exempt = exemptions.entries(config, attach.judged(attached))
        asyncio.run(_serve(config, attached, exempt))
    return 0


def _hold_pins(config: Config) -> Fd:
    """The one daemon's lock on the pins; root makes their directory when it is the first."""
    root = Path(config.paths.pins)
    if os.geteuid() == 0:
        loader.make_directory(root)
    return Pins(root).lock()


def _load_if_needed(config: Config, *, replace: bool) -> None:
    """Load in a child process, so that the compiler's hundred megabytes, or its crash, are not ours."""
    if loader.is_current(config):
        return
    if os.geteuid() != 0:
        raise UnavailableError(f"{config.paths.pins}: not loaded, or another version is: run `edge load` as root first")
    # a restart with an unchanged program does without these
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("fork"), initializer=_die_with_parent) as child:
        try:
            child.submit(loader.install, config, replace=replace).result()
        except BrokenProcessPool:
            raise UnavailableError("the compiler ended abruptly: run `edge load` to see its messages") from None


def _nftables(config: Config, clock: SystemClock) -> NftSets | None:
    """Our table, adopted or made; None where it is switched off."""
    if not config.nftables.enabled:
        return None
    ports = {service: config.services.ports(service) for service in Service}
    nft = NftSets(
        clock=clock,
        params=config.nftables,
        ports=ports,
        mode=Mode[config.mode.upper()],
        lease_s=config.heartbeat.grace_s,
    )
    nft.adopt()
    return nft


def _die_with_parent() -> None:
    """A loader whose daemon was killed must not go on holding its lock."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:  # it died before we asked
        os._exit(1)


async def _serve(config: Config, attached: dict[str, Attachment], exempt: list[Entry]) -> None:
    """Open everything, tick until told to stop, close everything."""
    clock = SystemClock()
    tables = Tables.open(Path(config.paths.pins), loader.sizes(config))
    tables.configure(config, clock.now_s())
    nft = _nftables(config, clock)
    exporter = Exporter(version("edge-throttler"))
    sources = Sources(config, clock.now_s)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with Store.open(Path(config.paths.state), clock, config.journal) as store:
        daemon = Daemon(config, attached, exempt, tables, nft, store, sources)
        await sources.start()
        control = await ControlServer.start(
            Path(config.control.socket),
            Verbs(daemon).handlers(),
            mode=config.control.mode,
            group=config.control.group,
        )
        if config.metrics.enabled:
            host, port = exporter.start(*listen_address(config.metrics.listen))
            log.info("metrics", extra={"fields": {"url": f"http://{host}:{port}/metrics"}})
        works = _refresh_exemptions(daemon), _watch_interfaces(daemon), _reconcile(daemon)
        beside = [asyncio.create_task(_beside(daemon, stop, work)) for work in works]
        try:
            await _loop(daemon, exporter, stop)
        finally:
            for task in beside:
                task.cancel()
            SystemdNotifier().notify("STOPPING=1")
            await control.close()
            await sources.stop()
            exporter.close()
            if nft is not None:
                nft.close()
    if daemon.failure is not None:
        raise daemon.failure
    log.info("stopped", extra={"fields": {"limits": "go on in the kernel", "take them out with": "edge detach"}})


async def _beside(daemon: Daemon, stop: asyncio.Event, work: Coroutine[None, None, None]) -> None:
    """Work that goes on beside the ticks; when it fails, the daemon ends with its error, not without its work."""
    try:
        await work
    except Exception as error:
        daemon.failure = error
        stop.set()


async def _refresh_exemptions(daemon: Daemon) -> None:
    """Addresses of interfaces and mynetworks change. Asked in a thread: it waits for netlink and for postconf."""
    while True:
        await asyncio.sleep(EXEMPTIONS_EVERY_S)
        try:
            fresh = await asyncio.to_thread(exemptions.entries, daemon.config, attach.judged(daemon.attached))
        except NoAnswerError as error:
            log.error("exemptions not read again: the last ones stay", extra={"fields": {"error": error}})
            continue
        daemon.exempt_now(fresh)


async def _reconcile(daemon: Daemon) -> None:
    """Compare the open connections with the kernel's socket table. Read in a thread: it waits for netlink."""
    ports = {port: service for service in Service for port in daemon.config.services.ports(service)}
    reconciler = Reconciler()
    while True:
        try:
            found = await asyncio.to_thread(daemon.open_differences, ports)
        except UnavailableError as error:
            log.error("open connections not compared", extra={"fields": {"error": error}})
        else:
            daemon.tables.corrections.write(reconciler.observe(found))
        await asyncio.sleep(RECONCILE_EVERY_S)


async def _watch_interfaces(daemon: Daemon) -> None:
    """An interface that went and came back has a new index and no program, and so has a new member of a bond: attach.

    As root here; as another user by ending, so that the service manager runs the loader and starts us again.
    """
    took_s = 0.0
    while True:
        await asyncio.sleep(max(INTERFACES_EVERY_S, LOOKING_SHARE * took_s))
        began_s = daemon.clock.now_s()
        try:
            found = await asyncio.to_thread(attach.attachments, daemon.config)
        except NoAnswerError as error:
            log.error("interfaces not looked at", extra={"fields": {"error": error}})
            continue
        finally:
            took_s = daemon.clock.now_s() - began_s
        gone = _with_program(daemon.attached) - _with_program(found)
        if gone:
            log.error("interface gone", extra={"fields": {"names": ",".join(sorted(gone))}})
        if attach.wanting(found):
            log.error("interface without our program", extra={"fields": _modes(found)})
            if os.geteuid() != 0:
                raise UnavailableError("an interface lost the XDP program: run `edge load` as root, then start again")
            found = await asyncio.to_thread(_attach_again, daemon.config)
        elif gone - set(found) and os.geteuid() == 0:  # a member that left its bond keeps nothing of ours
            found = await asyncio.to_thread(_attach_again, daemon.config)
        if found != daemon.attached:
            log.info("interfaces", extra={"fields": _modes(found)})
            daemon.attached = found


def _attach_again(config: Config) -> dict[str, Attachment]:
    """Attach where the program is missing; how things stand then. An interface may go while this is done."""
    try:
        loader.install(config, replace=False)
    except UnavailableError:
        if attach.wanting(attach.attachments(config)):
            raise
    return attach.attachments(config)


def _with_program(found: dict[str, Attachment]) -> set[str]:
    return {name for name, row in found.items() if row.program_id}


def _modes(found: dict[str, Attachment]) -> dict[str, str]:
    return {name: row.mode for name, row in found.items()}


async def _loop(daemon: Daemon, exporter: Exporter, stop: asyncio.Event) -> None:
    """Tick on a fixed grid; a late tick skips what it missed instead of hurrying after it."""
    interval_s = daemon.config.tick_s
    notifier = SystemdNotifier()
    due_s = daemon.clock.now_s()
    while not stop.is_set():
        daemon.tick()
        exporter.update(daemon.metrics())
        if daemon.totals.ticks.total == 1:
            log.info("ready", extra={"fields": {"mode": daemon.config.mode, "interfaces": ",".join(daemon.attached)}})
            notifier.notify("READY=1")
        notifier.notify("WATCHDOG=1")
        due_s += interval_s
        late_s = daemon.clock.now_s() - due_s
        if late_s > interval_s:
            daemon.totals.late += 1
            due_s += late_s // interval_s * interval_s
        try:
            await asyncio.wait_for(stop.wait(), max(0.0, due_s - daemon.clock.now_s()))
        except TimeoutError:
            continue
