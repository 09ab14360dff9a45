"""The daemon's side of the pinned maps: counters read in batches, settings and policy written.

Invariants:
    one-writer: the daemon writes control, limits, services, destinations, the policy maps, forged and corrections, and
        no other map.
    presence-covers: a level's presence bit is set before its first entry is written and cleared after its last is gone.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import numpy as np

from edge.abi import (
    ADDRESS,
    CONTROL,
    LEVELS,
    LIMIT,
    POLICY_ENTRY,
    POLICY_KEY,
    RANGE_KEY,
    STANDINGS,
    ControlFlag,
    Level,
    Mode,
    Origin,
    Service,
    Standing,
)
from edge.config import Config
from edge.core.model import Entry
from edge.core.prefix import LENGTHS, Prefix
from edge.core.snapshot import Snapshot
from edge.errors import UnavailableError
from edge.kernel.connections import Connections
from edge.kernel.libbpf import BpfError, Map
from edge.kernel.marks import Marks
from edge.kernel.pins import Pins
from edge.kernel.policy_filter import PolicyFilter
from edge.kernel.policy_lines import PolicyLines, expires_ns
from edge.kernel.program import MAPS, U32, Sizes
from edge.kernel.rows import NOBODY_NS, Rows

log = logging.getLogger(__name__)

ZERO = np.zeros(1, U32)
SECOND_NS = 1_000_000_000


class Tables:
    """The pinned maps of one installation, open."""

    def __init__(self, maps: dict[str, Map], sizes: Sizes) -> None:
        self.maps, self.sizes = maps, sizes
        identity = maps["identity"].get(ZERO)
        if identity is None or not identity["seed"]:
            raise UnavailableError("the pinned maps have no identity: load the programs again with `edge load`")
        seed = int(identity["seed"])
        self.rows = Rows(maps["rows"], sizes, seed)
        self.connections = Connections(maps["connections"], sizes, seed)
        self.policy = Policy(maps, seed)
        self.forged = Marks(maps["forged"])
        self.flood_until_s = 0.0
        self.corrections = Marks(maps["corrections"])

    @classmethod
    def open(cls, pins: Path, sizes: Sizes) -> Tables:
        """Open what the loader pinned; UnavailableError when it is not there, or another version's."""
        if not Pins(pins).layout_matches(sizes):
            raise UnavailableError(f"{pins}: expected the tables of this version and configuration: run `edge load`")
        return cls({name: Pins(pins).open_map(name) for name in MAPS}, sizes)

    def read(self, now_s: float) -> Snapshot:
        """One reading of everything the kernel counts; grows with what is there only by numpy passes."""
        counters = self.maps["counters"].items()[1]
        rows_active, limited = self.rows.read(int(now_s * SECOND_NS))
        totals = np.stack([counters["passed"].sum(axis=1), counters["dropped"].sum(axis=1)], axis=1)
        return Snapshot(
            now_s=now_s,
            counters=totals.astype(np.uint64),
            connections=self.connections.read(int(now_s * SECOND_NS)),
            open=self.connections.open_by_service(),
            uncounted=self.maps["uncounted"].items()[1].astype(np.int64),
            rows_active=rows_active,
            limited=limited,
        )

    def heartbeat(self, now_s: float) -> None:
        """Tell the programs that the daemon lives."""
        control = self._control()
        control["heartbeat_ns"] = int(now_s * SECOND_NS)
        control["policy_levels"], control["policy_ranges"] = self.policy.presence()
        control["forged_levels"] = self.forged.levels
        control["flood_until_ns"] = int(self.flood_until_s * SECOND_NS)
        self.maps["control"].put(ZERO, control)

    def heartbeat_age_s(self, now_s: float) -> float:
        """Seconds since the last heartbeat."""
        return now_s - int(self._control()["heartbeat_ns"]) / SECOND_NS

    def configure(self, config: Config, now_s: float) -> None:
        """Write limits, ports, destinations and flags: all that the programs take from the configuration."""
        for service in Service:
            for standing in Standing:
                for level in Level:
                    self._put_limit(config, service, standing, level)
        self.rows.spent_ns = [_spent_ns(config, level) for level in Level]
        self._put_services(config)
        self._put_destinations(config.protect.addresses)
        control = self._control()
        control["heartbeat_grace_ns"] = int(config.heartbeat.grace_s * SECOND_NS)
        control["mode"] = Mode[config.mode.upper()]
        control["flags"] = _flags(config)
        untracked = config.limits.untracked
        control["untracked_interval_ns"] = untracked.emission_interval_ns
        control["untracked_tolerance_ns"] = untracked.burst_tolerance_ns
        control["crowded_from"] = [_tightest(config, service, level) for service in Service for level in Level]
        self.maps["control"].put(ZERO, control)
        self.heartbeat(now_s)

    def _control(self) -> np.ndarray:
        found = self.maps["control"].get(ZERO)
        return np.zeros((), CONTROL) if found is None else found.copy()

    def _put_limit(self, config: Config, service: Service, standing: Standing, level: Level) -> None:
        limit = config.limits.of(service, standing, level)
        index = (service * STANDINGS + standing) * LEVELS + level
        self.maps["limits"].put(
            np.array([index], U32), np.array((limit.emission_interval_ns, limit.burst_tolerance_ns, limit.open), LIMIT)
        )

    def _put_services(self, config: Config) -> None:
        wanted = {port: service + 1 for service in Service for port in config.services.ports(service)}
        table = self.maps["services"]
        ports, present = table.items()
        for port in ports[present > 0].tolist():
            if port not in wanted:
                table.put(np.array([port], U32), np.zeros(1, "u1"))
        for port, value in wanted.items():
            table.put(np.array([port], U32), np.array([value], "u1"))

    def _put_destinations(self, addresses: Sequence[str]) -> None:
        wanted = {_destination(ip_address(text)) for text in addresses}
        table = self.maps["destinations"]
        keys, _ = table.items()
        for hi, lo in {(int(k["hi"]), int(k["lo"])) for k in keys} - wanted:
            table.delete(np.array((hi, lo), ADDRESS))
        for pair in wanted:
            table.put(np.array(pair, ADDRESS), np.ones(1, "u1"))


def _destination(address: IPv4Address | IPv6Address) -> tuple[int, int]:
    """A protected address as the program looks it up: IPv4 in the lower half alone."""
    number = int(address)
    return number >> 64, number & (1 << 64) - 1


def _tightest(config: Config, service: Service, level: Level) -> int:
    """The fewest open connections that unknown and good senders are allowed at a level; 0: they are not limited. The
    program looks at what is open of suspect and bad ones in any case."""
    limits = (config.limits.of(service, standing, level).open for standing in (Standing.NEW, Standing.GOOD))
    return min((most for most in limits if most), default=0)


def _spent_ns(config: Config, level: Level) -> int:
    """From where on the limit of a level counts as spent; tighter classes lie further ahead when theirs is."""
    limits = [config.limits.of(service, Standing.NEW, level) for service in Service]
    return min((limit.spent_ns for limit in limits if limit.rate_per_min), default=NOBODY_NS)


def _flags(config: Config) -> int:
    flags = ControlFlag(0)
    if config.strict.drop_unjudged:
        flags |= ControlFlag.STRICT
    if config.exempt.private:
        flags |= ControlFlag.EXEMPT_PRIVATE
    if config.protect.addresses:
        flags |= ControlFlag.LISTED_ONLY
    if config.challenge.mode == "auto":
        flags |= ControlFlag.CHALLENGE
    if config.heartbeat.dead == "keep_blocks":
        flags |= ControlFlag.DEAD_KEEPS_BLOCKS
    return int(flags)


class Policy:
    """The policy maps as a sink of entries (ports.EntrySink).

    A full map keeps what it holds: what found no room is counted in `no_room` and logged; nftables still has it.
    """

    def __init__(self, maps: dict[str, Map], seed: int) -> None:
        self._exact, self._ranges = maps["policy"], maps["policy_ranges"]
        self._entries = {entry.key: entry for entry in self._stored()}
        self._levels = Counter(prefix.length for _, prefix in self._entries)
        exact = [entry for entry in self._entries.values() if entry.prefix.level is not None]
        self._filter = PolicyFilter(maps["policy_filter"], seed, [(entry.service, entry.prefix) for entry in exact])
        self._lines = PolicyLines(maps["policy_lines"], seed, exact)
        self.no_room = 0

    def installed(self) -> dict[tuple[Service, Prefix], Entry]:
        """What the maps hold, by (service, prefix)."""
        return self._entries

    def presence(self) -> tuple[int, int]:
        """control.policy_levels and control.policy_ranges for what is installed."""
        levels = sum(1 << level for level in Level if self._levels[LENGTHS[level]])
        exact = sum(self._levels[LENGTHS[level]] for level in Level)
        return levels, self._levels.total() - exact

    def announce(self, put: Sequence[Entry]) -> None:
        """Count entries before they are written, so that no written entry is ever overlooked."""
        for entry in put:
            if entry.key not in self._entries:
                self._count(entry)

    def apply(self, put: Sequence[Entry], drop: Sequence[Entry]) -> None:
        """Write `put` in the given order, then remove `drop`. Call after announce() and a heartbeat."""
        refused: list[BpfError] = []
        for entry in put:
            try:
                self._write(entry)
            except BpfError as error:
                refused.append(error)
                if entry.key not in self._entries:
                    self._count_out(entry)
                continue
            self._entries[entry.key] = entry
        if refused:
            self.no_room += len(refused)
            log.error("no room for entries", extra={"fields": {"count": len(refused), "first": str(refused[0])}})
        for entry in drop:
            if self._entries.pop(entry.key, None) is None:
                continue
            table, key = self._place(entry)
            if entry.prefix.level is not None:
                self._lines.remove(entry)
            table.delete(key)
            self._count_out(entry)

    def _count(self, entry: Entry) -> None:
        self._levels[entry.prefix.length] += 1
        if entry.prefix.level is not None:
            self._filter.add(entry.service, entry.prefix)

    def _count_out(self, entry: Entry) -> None:
        self._levels[entry.prefix.length] -= 1
        if entry.prefix.level is not None:
            self._filter.remove(entry.service, entry.prefix)

    def _write(self, entry: Entry) -> None:
        table, key = self._place(entry)
        value = (expires_ns(entry), entry.decision, entry.standing, entry.origin, entry.prefix.length, 0)
        table.put(key, np.array(value, POLICY_ENTRY))
        if entry.prefix.level is not None:
            self._lines.put(entry)

    def _place(self, entry: Entry) -> tuple[Map, np.ndarray]:
        prefix = entry.prefix
        if prefix.level is not None:
            return self._exact, np.array((prefix.hi, prefix.lo, prefix.length, entry.service), POLICY_KEY)
        address = np.frombuffer((prefix.hi << 64 | prefix.lo).to_bytes(16, "big"), np.uint8)
        return self._ranges, np.array((8 + prefix.length, entry.service, address, (0, 0, 0)), RANGE_KEY)

    def _stored(self) -> list[Entry]:
        """What an earlier daemon left in the maps."""
        keys, values = self._exact.items()
        exact = [
            _entry(Prefix(int(k["hi"]), int(k["lo"]), int(k["length"])), int(k["service"]), v)
            for k, v in zip(keys, values, strict=True)
        ]
        keys, values = self._ranges.items()
        return exact + [_entry(_range_prefix(k), int(k["service"]), v) for k, v in zip(keys, values, strict=True)]


def _range_prefix(key: np.ndarray) -> Prefix:
    whole = int.from_bytes(key["address"].tobytes(), "big")
    return Prefix(whole >> 64, whole & (1 << 64) - 1, int(key["prefixlen"]) - 8)


def _entry(prefix: Prefix, service: int, value: np.ndarray) -> Entry:
    return Entry(
        prefix=prefix,
        service=Service(service),
        standing=Standing(int(value["standing"])),
        origin=Origin(int(value["origin"])),
        expires_s=int(value["expires_ns"]) / SECOND_NS if value["expires_ns"] else None,
        reason="found in the kernel at start",
        decision=int(value["decision"]),
    )
