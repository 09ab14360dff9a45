"""What types alone cannot say of a configuration: values that contradict each other, or that will hurt.

Each check yields problems; warnings leave the configuration usable.
"""

from __future__ import annotations

import grp
import re
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from itertools import pairwise
from pathlib import PurePosixPath

from edge.abi import Level, Service, Standing
from edge.config.problem import Problem, shown
from edge.config.schema import Config
from edge.core.prefix import LENGTHS, Prefix
from edge.errors import InputError
from edge.parameters import Limit

INTERFACE_NAME = re.compile(r"[^\s/]{1,15}")  # IFNAMSIZ - 1 of linux/if.h
LONGEST_REFILL_MIN = 24 * 60
"""A limit that takes longer than a day to refill keeps its row for that long and overstays every block."""

LEAST_RATE_PER_MIN = 0.001
"""One connection in 16 hours; less is a block, and a block says so."""

NEW_PREFIXES_PER_S = 1_000_000
"""A flood of forged sources at this rate, about what one core can judge, should still find rows."""

WIDEST_EXEMPTION = {True: 8, False: 16}
"""Shortest exempt prefix that passes without a warning: IPv4 /8 (10.0.0.0/8), IPv6 /16."""


def problems(config: Config) -> Iterator[Problem]:
    """Every problem and warning, in the order of the file."""
    for check in _CHECKS:
        yield from check(config)


def _interfaces(config: Config) -> Iterator[Problem]:
    names = config.interfaces.names
    for name in names:
        if not INTERFACE_NAME.fullmatch(name):
            expected = "interface names of 1 to 15 characters without blank or slash"
            yield Problem(key="interfaces.names", expected=expected, found=shown(name))
    if len(set(names)) != len(names) or ("auto" in names and len(names) > 1):
        expected = 'each name once, and "auto" alone'
        yield Problem(key="interfaces.names", expected=expected, found=shown(names))


def _services(config: Config) -> Iterator[Problem]:
    mx, submission = config.services.mx, config.services.submission
    if not mx and not submission:
        yield Problem(key="services", expected="at least one port", found="none")
    for port in sorted(set(mx) & set(submission)):
        expected = "ports that are not in services.mx"
        yield Problem(key="services.submission", expected=expected, found=f"{port} in both")
    for name, ports in (("mx", mx), ("submission", submission)):
        if len(set(ports)) != len(ports):
            yield Problem(key=f"services.{name}", expected="each port once", found=shown(ports))


def _addresses(config: Config) -> Iterator[Problem]:
    for text in config.protect.addresses:
        try:
            ip_address(text)
        except ValueError:
            yield Problem(key="protect.addresses", expected="IPv6 or IPv4 addresses", found=shown(text))
    for text in config.exempt.prefixes:
        try:
            network = Prefix.parse(text).network
        except InputError as error:
            yield Problem(key="exempt.prefixes", expected="prefixes without host bits", found=f"{text!r} ({error})")
            continue
        if network.prefixlen < WIDEST_EXEMPTION[network.version == 4]:
            expected = "prefixes of at least IPv6 /16 or IPv4 /8"
            yield Problem(
                key="exempt.prefixes", expected=expected, found=f"{text}: a large part of the Internet", warning=True
            )


def _limits(config: Config) -> Iterator[Problem]:
    yield from _limit("limits.untracked", config.limits.untracked)
    for service in Service:
        for standing in (Standing.NEW, Standing.GOOD, Standing.SUSPECT, Standing.BAD):
            for level in Level:
                key = _limit_key(service, standing, level)
                yield from _limit(key, config.limits.of(service, standing, level))
            yield from _shorter_allows_more(config, service, standing)
        yield from _classes_in_order(config, service)


def _limit(key: str, limit: Limit) -> Iterator[Problem]:
    """One limit alone."""
    if limit.rate_per_min == 0:
        return
    if limit.rate_per_min < LEAST_RATE_PER_MIN:
        expected = f"0 (no limit) or at least {LEAST_RATE_PER_MIN} a minute"
        yield Problem(key=f"{key}.rate_per_min", expected=expected, found=shown(limit.rate_per_min))
    elif limit.burst < 1:
        yield Problem(key=f"{key}.burst", expected="at least 1 where a rate is set", found=shown(limit.burst))
    elif limit.burst > limit.rate_per_min * LONGEST_REFILL_MIN and limit.burst > 1:
        expected = f"at most what refills in a day ({int(limit.rate_per_min * LONGEST_REFILL_MIN)} at this rate)"
        yield Problem(key=f"{key}.burst", expected=expected, found=shown(limit.burst))


def _shorter_allows_more(config: Config, service: Service, standing: Standing) -> Iterator[Problem]:
    """A shorter prefix holds all senders of the longer ones; a tighter limit there makes them pay for each other."""
    tightest: tuple[Level, Limit] | None = None
    for level in Level:
        limit = config.limits.of(service, standing, level)
        if limit.rate_per_min == 0:
            continue
        if tightest is not None and (limit.rate_per_min < tightest[1].rate_per_min or limit.burst < tightest[1].burst):
            longer = _limit_key(service, standing, tightest[0])
            expected = f"at least what {longer} allows ({_rate(tightest[1])})"
            key = _limit_key(service, standing, level)
            yield Problem(key=key, expected=expected, found=_rate(limit), warning=True)
        tightest = level, limit


def _classes_in_order(config: Config, service: Service) -> Iterator[Problem]:
    """A good sender must never be worse off than an unknown one; a suspect should not be better off."""
    for level in Level:
        new = _binding(config, service, level)
        good = config.limits.of(service, Standing.GOOD, level)
        if good.rate_per_min and (good.rate_per_min < new.rate_per_min or good.burst < new.burst):
            expected = f"at least what unknown senders get there ({_rate(new)}), or 0 for no limit"
            yield Problem(key=_limit_key(service, Standing.GOOD, level), expected=expected, found=_rate(good))
        unknown = config.limits.of(service, Standing.NEW, level)
        if unknown.open and 0 < good.open < unknown.open:
            key = f"{_limit_key(service, Standing.GOOD, level)}.open"
            expected = f"at least what unknown senders get there ({unknown.open}), or 0 for any number"
            yield Problem(key=key, expected=expected, found=shown(good.open))
        for standing in (Standing.SUSPECT, Standing.BAD):
            limit = config.limits.of(service, standing, level)
            if limit.rate_per_min > new.rate_per_min > 0:
                key = _limit_key(service, standing, level)
                expected = f"at most what unknown senders get there ({_rate(new)})"
                yield Problem(key=key, expected=expected, found=_rate(limit), warning=True)


def _binding(config: Config, service: Service, level: Level) -> Limit:
    """What an unknown sender meets at a level: its own limit, or the next shorter one where it has none."""
    for shorter in Level:
        limit = config.limits.of(service, Standing.NEW, shorter)
        if shorter >= level and limit.rate_per_min:
            return limit
    return Limit()


def _tables(config: Config) -> Iterator[Problem]:
    sizes = {f"rows_{LENGTHS[level]}": config.tables.rows(level) for level in Level}
    for name, rows in (sizes | {"connections": config.tables.connections}).items():
        if rows & (rows - 1):
            lower, upper = 1 << rows.bit_length() - 1, 1 << rows.bit_length()
            expected = f"a power of two ({lower} or {upper})"
            yield Problem(key=f"tables.{name}", expected=expected, found=shown(rows))
    for service in Service:
        interval_ns = config.limits.of(service, Standing.NEW, Level.L64).emission_interval_ns
        capacity = config.tables.rows_64 * 1_000_000_000 / interval_ns if interval_ns else NEW_PREFIXES_PER_S
        if capacity < NEW_PREFIXES_PER_S:
            rows = 1 << int(NEW_PREFIXES_PER_S * interval_ns / 1e9).bit_length()
            expected = (
                f"room for {NEW_PREFIXES_PER_S} new /64s a second ({rows} rows at limits.{service.name.lower()}.new)"
            )
            yield Problem(key="tables.rows_64", expected=expected, found=f"{capacity:.0f}", warning=True)


def _times(config: Config) -> Iterator[Problem]:
    grace_s, tick_s = config.heartbeat.grace_s, config.tick_s
    if tick_s >= grace_s:
        yield Problem(key="heartbeat.grace_s", expected=f"more than tick_s ({tick_s:g})", found=shown(grace_s))
    elif grace_s < 10 * tick_s:
        expected = f"at least ten ticks ({10 * tick_s:g}), or one slow tick lets go of every learned block"
        yield Problem(key="heartbeat.grace_s", expected=expected, found=shown(grace_s), warning=True)


def _metrics(config: Config) -> Iterator[Problem]:
    try:
        host, _ = listen_address(config.metrics.listen)
    except ValueError:
        expected = 'ADDRESS:PORT such as "127.0.0.1:9843" or "[::1]:9843"'
        yield Problem(key="metrics.listen", expected=expected, found=shown(config.metrics.listen))
        return
    if not ip_address(host).is_loopback and not config.metrics.allow_remote:
        expected = "a loopback address, or metrics.allow_remote = true"
        yield Problem(key="metrics.listen", expected=expected, found=shown(config.metrics.listen))


def _sockets(config: Config) -> Iterator[Problem]:
    for key, mode in (("control.mode", config.control.mode), ("evidence.socket.mode", config.evidence.socket.mode)):
        if mode & 0o002:
            expected = "a mode that keeps other users out"
            yield Problem(key=key, expected=expected, found=f"{mode:#o}: every local user may block", warning=True)
    if config.control.socket == config.evidence.socket.path:
        expected = "another path than evidence.socket.path"
        yield Problem(key="control.socket", expected=expected, found=shown(config.control.socket))
    if config.control.group and config.control.group not in {group.gr_name for group in grp.getgrall()}:
        yield Problem(key="control.group", expected="a group of this host", found=shown(config.control.group))


def _lifetimes(config: Config) -> Iterator[Problem]:
    ledger, policy = config.core.ledger, config.core.policy
    for name in ("block_most_s", "block_most_wide_s"):
        if getattr(ledger, name) < ledger.block_s:
            expected = f"at least core.ledger.block_s ({ledger.block_s:g})"
            yield Problem(key=f"core.ledger.{name}", expected=expected, found=shown(getattr(ledger, name)))
    for lower, higher in (("suspect_bound", "block_bound"), ("release_bound", "suspect_bound")):
        if getattr(policy, lower) > getattr(policy, higher):
            expected = f"at most core.policy.{higher} ({getattr(policy, higher):g})"
            yield Problem(key=f"core.policy.{lower}", expected=expected, found=shown(getattr(policy, lower)))
    reputation = config.core.reputation
    lives = [(f"half_life_{n}_s", getattr(reputation, f"half_life_{n}_s")) for n in LENGTHS]
    for (longer, long_s), (shorter, short_s) in pairwise(lives):
        if short_s < long_s:
            expected = f"at least core.reputation.{longer} ({long_s:g}): shorter prefixes change owner less"
            yield Problem(key=f"core.reputation.{shorter}", expected=expected, found=shown(short_s), warning=True)


def _paths(config: Config) -> Iterator[Problem]:
    paths = {
        "control.socket": config.control.socket,
        "paths.pins": config.paths.pins,
        "paths.state": config.paths.state,
    }
    if config.evidence.socket.path:
        paths["evidence.socket.path"] = config.evidence.socket.path
    paths |= {f"evidence.postfix.logs[{n}]": path for n, path in enumerate(config.evidence.postfix.logs)}
    if config.paths.cgroup != "auto":
        paths["paths.cgroup"] = config.paths.cgroup
    for key, path in paths.items():
        if not PurePosixPath(path).is_absolute() or "\0" in path:
            yield Problem(key=key, expected="an absolute path", found=shown(path))
    if any("." in part for part in PurePosixPath(config.paths.pins).parts):
        expected = "a path without dots (a BPF file system refuses them)"
        yield Problem(key="paths.pins", expected=expected, found=shown(config.paths.pins))


def listen_address(text: str) -> tuple[str, int]:
    """Host and port of `127.0.0.1:9843` or `[::1]:9843`; ValueError when it is neither. Names are not looked up."""
    host, _, port = text.rpartition(":")
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(text)
    bracketed = host.startswith("[") and host.endswith("]")
    address = ip_address(host[1:-1] if bracketed else host)
    if bracketed != (address.version == 6):
        raise ValueError(text)
    return str(address), int(port)


def _limit_key(service: Service, standing: Standing, level: Level) -> str:
    return f"limits.{service.name.lower()}.{standing.name.lower()}.{LENGTHS[level]}"


def _rate(limit: Limit) -> str:
    return f"{limit.rate_per_min:g} a minute, burst {limit.burst}"


_CHECKS: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    _interfaces,
    _services,
    _addresses,
    _limits,
    _times,
    _metrics,
    _sockets,
    _paths,
    _lifetimes,
    _tables,
)
