"""Parameters of the pieces that own no module of their own: what the kernel program, the host and the surface are told.

Each struct is one section of the configuration file. The descriptions are what `edge check-config --print-defaults`
shows, so they are written for the administrator; numbers name their source there.

Invariants:
    good-is-never-tighter: by default no good limit admits less than what an unknown sender gets at that level.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edge.abi import Level, Service, Standing
from edge.evidence.postfix_log import PostfixParams
from edge.evidence.socket import EventSocketParams
from edge.evidence.tail import TailParams
from edge.kernel.nft_params import NftParams

MINUTE_NS = 60_000_000_000

Port = Annotated[int, Meta(ge=1, le=65535)]
OCTAL = {"form": "octal"}
"""Marks a number that people write in octal; `edge.config` shows and explains it so."""


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every section shares: values that never change, keys that are all known."""


class Interfaces(Section, frozen=True):
    """Where the XDP program is attached."""

    names: Annotated[
        tuple[str, ...],
        Meta(
            min_length=1,
            max_length=64,
            description='"auto" means every interface that carries a default route; name them where the routing table '
            "has ten thousands of routes. For a VLAN, bond or bridge the devices below it get the program; of a bridge "
            "only those that lead out, so name a guest port to judge it.",
        ),
    ] = ("auto",)
    xdp_mode: Annotated[
        Literal["auto", "native", "generic"],
        Meta(
            description="auto: native where the driver can do it, else generic. generic works on any driver and costs "
            "more per packet. A change attaches again at the next start, which may reset the network card."
        ),
    ] = "auto"


class Services(Section, frozen=True):
    """The TCP ports that are protected. The two services have limits, standings and blocks of their own: what a sender
    did on port 25 never closes submission to it.
    """

    mx: Annotated[tuple[Port, ...], Meta(max_length=16, description="Mail from other servers (RFC 5321: port 25).")] = (
        25,
    )
    submission: Annotated[
        tuple[Port, ...],
        Meta(max_length=16, description="Mail from own users, who log in (RFC 8314: 465, RFC 6409: 587)."),
    ] = (465, 587)

    def ports(self, service: Service) -> tuple[int, ...]:
        """The ports of one service."""
        return self.mx if service is Service.MX else self.submission


class Protect(Section, frozen=True):
    """Which destinations are protected. A router or hypervisor lists its mail hosts, so that transit is left alone."""

    addresses: Annotated[
        tuple[str, ...],
        Meta(max_length=1024, description="IPv6 and IPv4 addresses. Empty: every destination."),
    ] = ()


class Limit(Section, frozen=True):
    """One limit: a sustained rate of new connections, how many may come at once, and how many may be open."""

    rate_per_min: Annotated[
        float,
        Meta(ge=0, le=60_000_000, description="New connections a minute; 0 = no limit at this level."),
    ] = 0.0
    burst: Annotated[
        int, Meta(ge=0, le=1_000_000, description="New connections that may come at once before the rate applies.")
    ] = 0
    open: Annotated[
        int, Meta(ge=0, le=1_000_000, description="Connections that may be open at the same time; 0 = any number.")
    ] = 0

    @property
    def emission_interval_ns(self) -> int:
        """Nanoseconds between two connections at the sustained rate; 0 = no limit (abi.LIMIT)."""
        return round(MINUTE_NS / self.rate_per_min) if self.rate_per_min > 0 else 0

    @property
    def burst_tolerance_ns(self) -> int:
        """How far the theoretical arrival time may lie ahead: (burst - 1) emission intervals (abi.LIMIT)."""
        return max(self.burst - 1, 0) * self.emission_interval_ns

    @property
    def spent_ns(self) -> int:
        """How far ahead the arrival time of a spent limit lies: half a burst is used up in good times too, so spent is
        what leaves no room for two more."""
        return max(0, self.burst_tolerance_ns - 2 * self.emission_interval_ns)


class LevelLimits(Section, frozen=True, rename={"l128": "128", "l64": "64", "l56": "56", "l48": "48", "l32": "32"}):
    """One limit for each prefix length at which state is kept."""

    l128: Annotated[Limit, Meta(description="one address, inside a shared /64")] = Limit()
    l64: Annotated[Limit, Meta(description="one host or LAN; an IPv4 address")] = Limit()
    l56: Annotated[Limit, Meta(description="one customer; an IPv4 /24")] = Limit()
    l48: Annotated[Limit, Meta(description="one site or hoster's pool; an IPv4 /16")] = Limit()
    l32: Annotated[Limit, Meta(description="one provider; no IPv4")] = Limit()

    def at(self, level: Level) -> Limit:
        """The limit of one level."""
        return (self.l128, self.l64, self.l56, self.l48, self.l32)[level]


def _levels(**limits: tuple[float, int, int]) -> LevelLimits:
    """Limits written as l64=(rate_per_min, burst, open); a level left out has none."""
    return LevelLimits(
        **{name: Limit(rate_per_min=rate, burst=burst, open=most) for name, (rate, burst, most) in limits.items()}
    )


NEW = _levels(l64=(600, 300, 50), l56=(3000, 1500, 250), l48=(6000, 3000, 500), l32=(30000, 15000, 2500))
GOOD = _levels(
    l128=(600, 300, 100),
    l64=(1200, 600, 200),
    l56=(6000, 3000, 1000),
    l48=(12000, 6000, 2000),
    l32=(60000, 30000, 10000),
)


class MxLimits(Section, frozen=True):
    """Port 25. A connection must be admitted at every level; it is charged only when all of them admit it."""

    new: Annotated[
        LevelLimits,
        Meta(
            description="Senders without a record: a flood guard and nothing more. Replayed on recorded legitimate "
            "mail, 600 a minute with a burst of 300 at /64 refused nothing, 300/300 refused 0.2-0.7 %, 30/60 "
            "already 5-9 %. Shorter prefixes allow more (x5, x10, x50), since they hold many senders. No limit per "
            "address: an attacker in a /64 has 2^64 of them. 50 open connections are what Postfix allows a client "
            "(smtpd_client_connection_count_limit), which counts by /84: a /64 can hold every process it has."
        ),
    ] = NEW
    good: Annotated[
        LevelLimits,
        Meta(
            description="Senders with a good record: twice what an unknown one gets, so that a good record never costs "
            "anything. It cuts the chain: shorter prefixes are neither asked nor charged. /128 has a limit "
            "because of that: it is all that binds a good address in a forged /64."
        ),
    ] = GOOD
    suspect: Annotated[
        LevelLimits,
        Meta(
            description="Some evidence: a small server still gets its mail through (10 a minute; of legitimate senders "
            "in general this would refuse 10-20 %, so it needs evidence). Shorter prefixes hold bystanders and get "
            "more."
        ),
    ] = _levels(l128=(10, 20, 10), l64=(10, 20, 10), l56=(30, 60, 30), l48=(60, 120, 60), l32=(300, 600, 300))
    bad: Annotated[
        LevelLimits,
        Meta(
            description="Much evidence, or out of a block on probation: one connection in five minutes at /64 lets a "
            "repaired server show that it is well (Haraka gives its bad senders 1 in 15 minutes)."
        ),
    ] = _levels(l128=(0.2, 1, 2), l64=(0.2, 1, 2), l56=(0.5, 2, 4), l48=(1, 5, 8), l32=(5, 20, 40))


class SubmissionLimits(Section, frozen=True):
    """Ports 465 and 587. The same as port 25 where nothing is known; suspect and bad are wider, since one IPv4 address
    here is often a whole office or mobile network.
    """

    new: Annotated[LevelLimits, Meta(description="Clients without a record: a flood guard, as on port 25.")] = NEW
    good: Annotated[LevelLimits, Meta(description="Prefixes from which users have logged in.")] = GOOD
    suspect: Annotated[
        LevelLimits,
        Meta(
            description="Some failed logins: 30 a minute still carries an office whose one phone has an old password."
        ),
    ] = _levels(l128=(30, 60, 20), l64=(30, 60, 20), l56=(60, 120, 60), l48=(120, 240, 120), l32=(600, 1200, 600))
    bad: Annotated[
        LevelLimits,
        Meta(
            description="Password guessing: 1 a minute is 1440 guesses a day at most, and users there may still log in."
        ),
    ] = _levels(l128=(1, 5, 5), l64=(1, 5, 5), l56=(2, 10, 10), l48=(5, 20, 20), l32=(20, 60, 60))


class Limits(Section, frozen=True):
    """How many new connections are admitted, by service, standing and prefix length. Every number alone overrides its
    default: `[limits.mx.new]` with only `64 = { rate_per_min = 300 }` changes that rate and nothing else.
    """

    mx: MxLimits = MxLimits()
    submission: SubmissionLimits = SubmissionLimits()
    untracked: Annotated[
        Limit,
        Meta(
            description="One budget shared by all who find no free row at any level (a sweep of millions of prefixes). "
            "Verified senders pass beside it. 100 a second keeps newcomers coming in and the MTA alive."
        ),
    ] = Limit(rate_per_min=6000, burst=1000)

    def of(self, service: Service, standing: Standing, level: Level) -> Limit:
        """The limit for one cell of the kernel's table; no limit where ALLOW or BLOCK decides alone."""
        limits = self.mx if service is Service.MX else self.submission
        classes = {
            Standing.NEW: limits.new,
            Standing.GOOD: limits.good,
            Standing.SUSPECT: limits.suspect,
            Standing.BAD: limits.bad,
        }
        return classes[standing].at(level) if standing in classes else Limit()


class Heartbeat(Section, frozen=True):
    """What the kernel does when the daemon is gone."""

    grace_s: Annotated[
        float,
        Meta(
            gt=0,
            le=86400,
            description="Seconds without a tick after which the daemon counts as dead; also the lease of learned "
            "nftables elements. 10 minutes outlast a package upgrade or a reboot of the daemon.",
        ),
    ] = 600.0
    dead: Annotated[
        Literal["keep_limits", "keep_blocks"],
        Meta(
            description="keep_limits: static limits go on, what was learned no longer applies. keep_blocks: learned "
            "blocks also stay in the kernel until they expire."
        ),
    ] = "keep_limits"


class Exempt(Section, frozen=True):
    """Who is never limited, scored or blocked."""

    private: Annotated[
        bool,
        Meta(description="Loopback, link-local, ULA (RFC 4193) and RFC 1918 sources."),
    ] = True
    connected: Annotated[
        bool,
        Meta(
            description="The prefixes of this host's own interfaces. Turn it off where other customers share "
            "your on-link prefix."
        ),
    ] = True
    postfix_mynetworks: Annotated[
        bool, Meta(description="What `postconf -h mynetworks` says, where Postfix is installed.")
    ] = True
    prefixes: Annotated[
        tuple[str, ...],
        Meta(
            max_length=4096,
            description="More: relays, backup MX, monitoring, load balancers. Prefixes (2001:db8::/48, 192.0.2.0/24) "
            "or addresses.",
        ),
    ] = ()


class Strict(Section, frozen=True):
    """For hosts that would rather refuse than be fooled."""

    drop_unjudged: Annotated[
        bool,
        Meta(
            description="Drop packets that cannot be judged (later fragments, too many extension headers, cut-off "
            "packets) instead of passing and counting them. Drops every fragmented packet, not only mail."
        ),
    ] = False


class Challenge(Section, frozen=True):
    """What to do, instead of refusing, where the limit of a network is spent by SYNs that somebody else forged."""

    mode: Annotated[
        Literal["off", "auto"],
        Meta(
            description="off: only senders that completed a handshake before have a budget of their own there. auto: "
            "others are answered by a SYN-ACK that makes a real client reset and connect again at once (Linux) or "
            "after 1 to 3 seconds; a forger never sees it. Clients behind a firewall that swallows it get in with a "
            "later retransmission, under the budget in limits.untracked."
        ),
    ] = "off"


class PostfixEvidence(Section, frozen=True):
    """Postfix's log: who was accepted, refused, or logged in."""

    logs: Annotated[
        tuple[str, ...],
        Meta(
            max_length=16,
            description="Log files, followed through rotation; one that is not there yet is waited for. Empty: none.",
        ),
    ] = ("/var/log/mail.log",)
    lines: PostfixParams = PostfixParams()
    tail: TailParams = TailParams()


class SocketEvidence(EventSocketParams, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Evidence as JSON lines from other programs (Exim, rspamd, Haraka, own scripts), on a Unix socket."""

    path: Annotated[str, Meta(max_length=100, description="Path of the Unix socket. Empty: none.")] = (
        "/run/edge/events.sock"
    )
    mode: Annotated[
        int,
        Meta(
            ge=0o600,
            le=0o777,
            extra=OCTAL,
            description="File mode. Whoever may write to it can get any sender blocked: keep it to the mail system.",
        ),
    ] = 0o660


class Evidence(Section, frozen=True):
    """Where verdicts of the mail system come from."""

    postfix: PostfixEvidence = PostfixEvidence()
    socket: SocketEvidence = SocketEvidence()


class Nftables(NftParams, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The second layer: blocked and allowed prefixes as nftables sets, which stay when XDP is not there."""

    enabled: Annotated[bool, Meta(description="Keep the sets.")] = True


class Metrics(Section, frozen=True):
    """The Prometheus endpoint, http://LISTEN/metrics. No address ever appears in a label."""

    enabled: Annotated[bool, Meta(description="Serve /metrics.")] = True
    listen: Annotated[
        str, Meta(max_length=255, description='Address and port: "127.0.0.1:9843", "[::1]:9843". Port 0: any free one.')
    ] = "127.0.0.1:9843"
    allow_remote: Annotated[
        bool,
        Meta(description="Allow an address that is not loopback. The endpoint has neither password nor encryption."),
    ] = False


class Control(Section, frozen=True):
    """The socket that `edge status`, `edge block` and the other verbs talk to. Its file mode is the access control."""

    socket: Annotated[str, Meta(max_length=100, description="Path of the Unix socket.")] = "/run/edge/control.sock"
    mode: Annotated[
        int,
        Meta(ge=0o600, le=0o777, extra=OCTAL, description="File mode: whoever may write to it may block and allow."),
    ] = 0o660
    group: Annotated[str, Meta(max_length=32, description="Group that owns the socket; empty: the daemon's own.")] = ""


class Paths(Section, frozen=True):
    """Where things are kept."""

    pins: Annotated[
        str, Meta(description="Directory on a BPF file system for programs, links and maps. No dot in any name.")
    ] = "/sys/fs/bpf/edge"
    state: Annotated[str, Meta(description="Directory for the journal of decisions and operator entries.")] = (
        "/var/lib/edge"
    )
    cgroup: Annotated[
        str,
        Meta(
            description='The cgroup (version 2) whose TCP handshakes are counted; it must hold the MTA. "auto": the '
            "root of the cgroup2 mount."
        ),
    ] = "auto"


Rows = Annotated[int, Meta(ge=1024, le=1 << 26)]


class Tables(Section, frozen=True):
    """Rows of the kernel's tables, one for each prefix that is being limited at a level: powers of two, 16 bytes a row,
    fixed whatever is sent (the defaults take 37 MiB). A row is free again once its limit has refilled, so a table holds
    rows / emission interval new prefixes a second: 10 M at /64 by default. A change of size makes new tables.
    """

    rows_128: Annotated[Rows, Meta(description="Addresses; used only inside shared or forged /64s.")] = 1 << 19
    rows_64: Annotated[Rows, Meta(description="The level that an attacker fills first.")] = 1 << 20
    rows_56: Annotated[Rows, Meta(description="Half of /64: there are fewer of them.")] = 1 << 19
    rows_48: Annotated[Rows, Meta(description="A quarter of /64.")] = 1 << 18
    rows_32: Annotated[Rows, Meta(description="The registries have made about 49,000 delegations of /32 or wider.")] = (
        1 << 16
    )
    connections: Annotated[
        Rows,
        Meta(
            description="Tallies of connections by /64 and by IPv4 address: the senders that count as verified. With "
            "those of the other levels 296 bytes each: 37 MiB by default."
        ),
    ] = 1 << 17

    def rows(self, level: Level) -> int:
        """Rows of one level."""
        return (self.rows_128, self.rows_64, self.rows_56, self.rows_48, self.rows_32)[level]


class Journal(Section, frozen=True):
    """How long decisions are remembered. Operator entries stay until they expire or are lifted."""

    keep_days: Annotated[
        float,
        Meta(
            gt=0,
            le=3650,
            description="Days. The journal holds addresses of mail clients: personal data in many places.",
        ),
    ] = 30.0
    keep_rows: Annotated[
        int, Meta(ge=1000, le=10_000_000, description="Rows, oldest dropped first; about 200 bytes each.")
    ] = 200_000


class Log(Section, frozen=True):
    """Log lines to standard error, or to the journal under systemd."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description="The least important lines to show."),
    ] = "info"
