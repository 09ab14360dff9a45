"""What the daemon answers to each verb of the control socket.

Every handler takes the request's arguments and returns a JSON-ready object, or raises an EdgeError that names the
argument. Requests come from whoever may write to the socket: still nothing of them is trusted to have the right type.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from edge.abi import Level, Origin, Reason, Service, Standing
from edge.core.explain import explain
from edge.core.match import is_private, longest, matches, refuses
from edge.core.model import Entry
from edge.core.prefix import LENGTHS, Prefix, is_ipv4
from edge.errors import UsageError
from edge.store import JournalRow

if TYPE_CHECKING:
    from edge.daemon import Daemon

Answer = dict[str, Any]

LONGEST_REASON = 200
MOST_LISTED = 50_000
"""What fits the largest reply the socket gives."""

HISTORY_ROWS = 20

CLOCK_SLACK_NS = 1_000_000_000
"""As in bpf/gcra.h."""


class Verbs:
    """The handlers, bound to a daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def handlers(self) -> dict[str, Callable[[Answer], Answer]]:
        """By verb."""
        return {
            "status": self.status,
            "list": self.list,
            "explain": self.explain,
            "block": lambda request: self._put(request, Standing.BLOCK),
            "allow": lambda request: self._put(request, Standing.ALLOW),
            "unblock": lambda request: self._drop(request, Standing.BLOCK),
            "unallow": lambda request: self._drop(request, Standing.ALLOW),
        }

    def status(self, _: Answer) -> Answer:
        """What the daemon and the kernel are doing."""
        daemon = self._daemon
        now_s, metrics = daemon.clock.now_s(), daemon.metrics()
        entries: Counter[Standing] = Counter()
        for kind, count in daemon.wanted.counts.items():
            entries[kind[0]] += count
        return {
            "version": version("edge-throttler"),
            "pid": os.getpid(),
            "mode": daemon.config.mode,
            "uptime_s": now_s - daemon.started_s,
            "tick": {
                "count": metrics.ticks.total,
                "interval_s": daemon.config.tick_s,
                "last_ms": daemon.totals.last_tick_s * 1000,
                "late": metrics.ticks_late,
            },
            "heartbeat_age_s": daemon.tables.heartbeat_age_s(now_s),
            "interfaces": [
                {
                    "name": name,
                    "ifindex": row.ifindex,
                    "xdp": row.mode,
                    "program_id": row.program_id,
                    "for": list(row.serves),
                }
                for name, row in daemon.attached.items()
            ],
            "maps": {name: table.info.id for name, table in daemon.tables.maps.items()},
            "counters": {
                reason.name.lower(): {
                    "passed": int(metrics.packets[reason, 0]),
                    "dropped": int(metrics.packets[reason, 1]),
                }
                for reason in Reason
            },
            "rows": {
                str(LENGTHS[level]): {
                    "active": int(metrics.rows_active[level]),
                    "capacity": int(metrics.rows_capacity[level]),
                }
                for level in Level
            },
            "entries": {standing.name.lower(): entries[standing] for standing in Standing if standing},
            "tracked": {str(LENGTHS[level]): metrics.tracked.get(level, 0) for level in Level},
            "connections": {
                "open": {service.name.lower(): int(metrics.open[service]) for service in Service},
                "completed": {service.name.lower(): int(metrics.completed[service]) for service in Service},
                "corrected": metrics.corrected,
            },
            "forged": {"prefixes": metrics.forged_prefixes, "everywhere": metrics.flooded},
            "nftables": {
                "enabled": metrics.nftables_enabled,
                "in_sync": metrics.nftables_in_sync,
                "elements": metrics.nftables_elements,
                "repairs": metrics.nftables_repairs,
            },
            "evidence": [
                {
                    "name": stats.name,
                    "events": stats.events,
                    "errors": stats.errors,
                    "dropped": stats.dropped,
                    "last_event_age_s": None if stats.last_event_s is None else now_s - stats.last_event_s,
                    "trouble": daemon.sources.trouble(stats.name),
                }
                for stats in daemon.sources.stats()
            ],
        }

    def list(self, request: Answer) -> Answer:
        """Entries in force, of one standing or around and inside one prefix when asked."""
        entries: Iterable[Entry] = self._daemon.desired.values()
        if request.get("standing") is not None:
            standing = _standing(request["standing"])
            entries = [entry for entry in entries if entry.standing is standing]
        if request.get("contained") is not None:
            about = _prefix(request, "contained")
            entries = [e for e in entries if about.contains(e.prefix) or e.prefix.contains(about)]
        rows = sorted(entries, key=lambda entry: (entry.prefix, entry.service))
        if len(rows) > MOST_LISTED:
            raise UsageError(f"{len(rows)} entries, more than {MOST_LISTED}: ask for one standing or inside one prefix")
        return {"entries": [self._entry(entry) for entry in rows]}

    def explain(self, request: Answer) -> Answer:
        """Every level of a sender: evidence, standing, limit, entry, history; and what would happen to it now."""
        daemon = self._daemon
        service = _services(request)[0] if request.get("service") != "all" else Service.MX
        prefix = _prefix(request, "what")
        now_s = daemon.clock.now_s()
        answer = explain(daemon.state, daemon.desired, prefix, service, now_s, daemon.config.core)
        return {
            "query": request["what"],
            "keyed_as": str(prefix),
            "service": service.name.lower(),
            "verdict": self._verdict(prefix, service, now_s),
            "levels": [self._with_kernel(row, service, now_s) for row in answer["levels"]],
            "history": [
                _history(row)
                for row in daemon.store.journal(prefix, limit=HISTORY_ROWS * len(Service))
                if row.service is service
            ][:HISTORY_ROWS],
        }

    def _verdict(self, prefix: Prefix, service: Service, now_s: float) -> Answer:
        """What the kernel does with a SYN from there now: pass, limit or block."""
        daemon = self._daemon
        if daemon.config.exempt.private and is_private(prefix):
            return {"action": "pass", "reason": "exempt, a private or local source", "prefix": None}
        entry = longest(daemon.desired, service, prefix)
        suffix = "" if daemon.config.mode == "enforce" else " (observe: counted, not refused)"
        if entry is not None and refuses(entry):
            return {"action": "block", "reason": entry.reason + suffix, "prefix": str(entry.prefix)}
        if entry is not None and entry.standing is Standing.ALLOW:
            return {"action": "pass", "reason": entry.reason, "prefix": str(entry.prefix)}
        shortest = entry.prefix.length if entry is not None and entry.standing is Standing.GOOD else 0
        for length, level in reversed(list(zip(LENGTHS, Level, strict=True))):
            at = prefix.parent(length)
            if not shortest <= length <= prefix.length:
                continue
            counted = self._connections(at, service, now_s)
            if counted and counted["most_open"] and counted["open"] >= counted["most_open"]:
                reason = f"{counted['open']} connections open at {at}, as many as its limit allows{suffix}"
                return {"action": "limit", "reason": reason, "prefix": str(at)}
            if self._tokens(at, service, level, now_s) != 0:
                continue
            return {"action": "limit", "reason": f"rate limit at {at} is used up{suffix}", "prefix": str(at)}
        if entry is None:
            return {"action": "pass", "reason": "no entry, static limits only", "prefix": None}
        return {"action": "pass", "reason": entry.reason, "prefix": str(entry.prefix)}

    def _with_kernel(self, row: Answer, service: Service, now_s: float) -> Answer:
        """A level's row of the core with what the kernel knows of it."""
        daemon = self._daemon
        at = Prefix.parse(row["prefix"])
        level = at.level
        entry = daemon.desired.get((service, at))
        limit: Answer | None = None
        tokens = None
        if level is not None:
            configured = daemon.config.limits.of(service, _limit_class(entry), level)
            if configured.emission_interval_ns:
                limit = {"rate_per_min": configured.rate_per_min, "burst": configured.burst, "open": configured.open}
                tokens = self._tokens(at, service, level, now_s)
        return {
            "prefix": row["prefix"],
            "level": row["length"],
            "bad": row["bad_weight"],
            "good": row["good_weight"],
            "events": row["events"],
            "last_event_age_s": row["last_evidence_age_s"],
            "prior": row["prior"]["mean"],
            "prior_from": row["prior"]["from"],
            "mean": row["posterior_mean"],
            "bound": row["bad_bound"],
            "bad_children": row["bad_children"],
            "good_children": row["good_children"],
            "limit": limit,
            "tokens_left": tokens,
            "connections": self._connections(at, service, now_s),
            "forged": (service, at) in daemon.tables.forged.held,
            "entry": None if entry is None else self._entry(entry),
            "outlook": row["change"],
        }

    def _tokens(self, prefix: Prefix, service: Service, level: Level, now_s: float) -> int | None:
        """Connections that would be admitted at once at this level; None where it has no limit."""
        daemon = self._daemon
        if level is Level.L32 and is_ipv4(prefix.hi):
            return None
        standing = _limit_class(daemon.desired.get((service, prefix)))
        if level is Level.L128 and standing is Standing.NEW:
            return None
        limit = daemon.config.limits.of(service, standing, level)
        if not limit.emission_interval_ns:
            return None
        now_ns = int(now_s * 1e9)
        tat_ns = daemon.tables.rows.tat_ns(prefix, service)
        ahead_ns = max(0, (tat_ns or 0) - now_ns)
        if ahead_ns > limit.burst_tolerance_ns + limit.emission_interval_ns + CLOCK_SLACK_NS:
            ahead_ns = limit.burst_tolerance_ns  # charged under a tighter limit: see bpf/gcra.h
        return max(0, (limit.burst_tolerance_ns - ahead_ns) // limit.emission_interval_ns + 1)

    def _connections(self, prefix: Prefix, service: Service, now_s: float) -> Answer | None:
        """Open connections, completed handshakes, and distinct children of late; None between the levels."""
        tables = self._daemon.tables
        if prefix.level is None:
            return None
        row = tables.connections.of(prefix, service, now_s)
        open_now = (row.open if row else 0) + tables.corrections.held.get((service, prefix), 0)
        return {
            "open": max(0, open_now),
            "most_open": self._most_open(prefix, service, prefix.level),
            "completed": row.completed if row else 0,
            "distinct": row.children if row else 0.0,
            "last_age_s": max(0.0, now_s - row.last_s) if row else None,
        }

    def _most_open(self, prefix: Prefix, service: Service, level: Level) -> int | None:
        standing = _limit_class(self._daemon.desired.get((service, prefix)))
        if (level is Level.L128 and standing is Standing.NEW) or (level is Level.L32 and is_ipv4(prefix.hi)):
            return None
        return self._daemon.config.limits.of(service, standing, level).open or None

    def _put(self, request: Answer, standing: Standing) -> Answer:
        """An operator's block or allow: stored, and in the kernel and nftables when this returns."""
        daemon = self._daemon
        prefix, now_s = _prefix(request, "prefix"), daemon.clock.now_s()
        for_s = request.get("for_s")
        if for_s is not None and not (isinstance(for_s, int | float) and 0 < for_s <= 10 * 365 * 86400):
            raise UsageError(f"for_s: expected seconds above 0, found {for_s!r}")
        reason = request.get("reason") or f"operator: {standing.name.lower()}"
        if not isinstance(reason, str) or len(reason) > LONGEST_REASON:
            raise UsageError(f"reason: expected a text of at most {LONGEST_REASON} characters")
        entries = [
            Entry(
                prefix=prefix,
                service=service,
                standing=standing,
                origin=Origin.OPERATOR,
                expires_s=None if for_s is None else now_s + for_s,
                reason=reason,
                decision=daemon.next_decision(),
            )
            for service in _services(request)
        ]
        daemon.change_operator(put=entries, drop=())
        return {"changed": True, "entries": [self._entry(entry) for entry in entries]}

    def _drop(self, request: Answer, standing: Standing) -> Answer:
        """Take back an operator's entry; `unblock` also releases what was learned at just this prefix."""
        daemon = self._daemon
        prefix = _prefix(request, "prefix")
        gone: list[Entry] = []
        for service in _services(request):
            entry = daemon.operator.get((service, prefix))
            if entry is not None and entry.standing is standing:
                gone.append(entry)
        released = []
        if standing is Standing.BLOCK:
            released = [entry for s in _services(request) if (entry := daemon.release(s, prefix)) is not None]
        daemon.change_operator(put=(), drop=gone)
        over = [e for s in _services(request) for e in matches(daemon.desired, s, prefix) if refuses(e)]
        return {
            "changed": bool(gone or released),
            "removed": [self._entry(entry) for entry in (*gone, *released)],
            "still_blocked_by": [str(entry.prefix) for entry in over] if standing is Standing.BLOCK else [],
        }

    def _entry(self, entry: Entry) -> Answer:
        daemon = self._daemon
        now_s = daemon.clock.now_s()
        nft = daemon.nft
        level = entry.prefix.level
        return {
            "prefix": str(entry.prefix),
            "level": entry.prefix.length if level is None else LENGTHS[level],
            "service": entry.service.name.lower(),
            "standing": entry.standing.name.lower(),
            "origin": entry.origin.name.lower(),
            "reason": entry.reason,
            "expires_in_s": None if entry.expires_s is None else max(0.0, entry.expires_s - now_s),
            "in_kernel": entry.key in daemon.tables.policy.installed(),
            "in_nftables": nft is not None and entry.key in nft.installed(),
            "decision": entry.decision,
        }


def _history(row: JournalRow) -> Answer:
    return {
        "at": row.at,
        "action": row.action,
        "prefix": row.prefix,
        "service": row.service.name.lower(),
        "standing": row.standing.name.lower(),
        "origin": row.origin.name.lower(),
        "reason": row.reason,
        "decision": row.id,
    }


def _limit_class(entry: Entry | None) -> Standing:
    """The class whose limit the kernel applies at an entry's level."""
    if entry is None or entry.standing in (Standing.ALLOW, Standing.BLOCK):
        return Standing.NEW
    return entry.standing


def _prefix(request: Answer, name: str) -> Prefix:
    text = request.get(name)
    if not isinstance(text, str) or len(text) > 64:
        raise UsageError(f"{name}: expected a prefix or an address as text, found {str(text)[:64]!r}")
    return Prefix.parse(text)


def _services(request: Answer) -> list[Service]:
    text = request.get("service", "all")
    if text == "all":
        return list(Service)
    for service in Service:
        if text == service.name.lower():
            return [service]
    raise UsageError(f"service: expected all, mx or submission, found {str(text)[:64]!r}")


def _standing(text: object) -> Standing:
    for standing in Standing:
        if text == standing.name.lower():
            return standing
    raise UsageError(f"standing: expected block, allow, good, suspect or bad, found {str(text)[:64]!r}")
