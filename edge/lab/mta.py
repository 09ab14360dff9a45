"""The mail server of the lab: a Postfix instance of its own, or the embedded server where there is no Postfix.

Both know the users of edge.lab.plan and refuse by the same rules, and both leave a log from which the lab counts what
really arrived. Postfix runs from a configuration, queue and log in the lab's directory; an installed instance is
neither read nor touched.

Invariants:
    arrival-is-the-mta's-word: connections and deliveries are counted in the MTA's log, not by the clients.
    installed-postfix-is-untouched: every path Postfix writes to lies in the lab's directory.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from edge.errors import UnavailableError, UsageError
from edge.lab import network, plan
from edge.lab.network import Network
from edge.lab.process import Child, in_cgroup, tail, wait_for

START_S = 30.0
"""Time an MTA gets to answer; Postfix checks its files first, which takes seconds on a busy machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """What the MTA's log says: connections by source address, and the message ids it delivered."""

    connects: Counter[str]
    delivered: frozenset[str]


class Mta(Protocol):
    """A mail server on port 25 of the server namespace."""

    @property
    def name(self) -> str:
        """What it is called in the report."""

    @property
    def logs(self) -> tuple[Path, ...]:
        """Log files for [evidence.postfix]; none when it reports to the event socket itself."""

    def start(self) -> None:
        """Serve; returns when the port is open."""

    def check(self) -> None:
        """UnavailableError when it has died."""

    def stop(self) -> None:
        """End it and everything it started."""

    def arrivals(self) -> Arrivals:
        """Count the log as it is now."""


def choose(wanted: str, lab: Network, directory: Path, events: Path) -> tuple[Mta, str]:
    """The MTA for `--mta auto|postfix|embedded`, and why it was chosen, in words."""
    postfix = postfix_program()
    embedded = importlib.util.find_spec("aiosmtpd") is not None
    if wanted == "postfix" and not postfix:
        raise UnavailableError("Postfix is not installed: install the package postfix, or use --mta embedded")
    if wanted == "embedded" and not embedded:
        raise UnavailableError("aiosmtpd is not installed: pip install 'edge-throttler[lab]'")
    if wanted not in ("auto", "postfix", "embedded"):
        raise UsageError(f"--mta: expected auto, postfix or embedded, found {wanted!r}")
    if postfix and wanted != "embedded":
        why = "as asked" if wanted == "postfix" else "Postfix is installed"
        return PostfixServer(lab, directory, postfix), why
    if embedded:
        why = "as asked" if wanted == "embedded" else "Postfix is not installed"
        return EmbeddedServer(lab, directory, events), why
    raise UnavailableError(
        "no mail server for the lab: install the package postfix, or pip install 'edge-throttler[lab]'"
    )


def postfix_program() -> str | None:
    """Where `postfix` is; None when it is not installed."""
    return shutil.which("postfix", path=ADMIN_PATH)


ADMIN_PATH = "/usr/sbin:/usr/local/sbin:/sbin:/usr/bin:/bin"

_SERVICES = (  # (name, type, private, process limit, program); chroot is off everywhere
    ("25", "inet", "n", "250", "smtpd"),
    ("cleanup", "unix", "n", "0", "cleanup"),
    ("qmgr", "unix", "n", "1", "qmgr"),
    ("rewrite", "unix", "-", "-", "trivial-rewrite"),
    ("bounce", "unix", "-", "0", "bounce"),
    ("defer", "unix", "-", "0", "bounce"),
    ("trace", "unix", "-", "0", "bounce"),
    ("proxymap", "unix", "-", "-", "proxymap"),
    ("discard", "unix", "-", "-", "discard"),
    ("error", "unix", "-", "-", "error"),
    ("retry", "unix", "-", "-", "error"),
    ("anvil", "unix", "-", "1", "anvil"),
    ("postlog", "unix-dgram", "n", "1", "postlogd"),
)


def master_cf() -> str:
    """The services of the instance: smtpd and what it needs, no delivery to the outside."""
    return "".join(
        f"{name} {kind} {private} - n - {limit} {program}\n" for name, kind, private, limit, program in _SERVICES
    )


def main_cf(directory: Path) -> str:
    """The instance's settings: real recipient checks, a sender list, a content check, discard instead of mailboxes.

    Postfix's own client limits are off, so that nothing but the limiter stops anybody; notify_classes is empty because
    the lab has no postmaster.
    """
    settings = {
        "compatibility_level": "3.6",
        "queue_directory": f"{directory}/queue",
        "data_directory": f"{directory}/data",
        "maillog_file": f"{directory}/maillog",
        "maillog_file_prefixes": f"{directory}",
        "alias_maps": "",
        "alias_database": "",
        "myhostname": plan.DOMAIN,
        "mydestination": plan.DOMAIN,
        "mynetworks": "127.0.0.0/8 [::1]/128",
        "inet_interfaces": f"{network.SERVER_V4}, [{network.SERVER_V6}]",
        "inet_protocols": "all",
        "local_recipient_maps": "inline:{ " + ", ".join(f"{user}=ok" for user in plan.USERS) + " }",
        "local_transport": "discard",
        "default_transport": "error:this server only receives",
        "smtpd_sender_restrictions": "check_sender_access "
        f"inline:{{ {{{plan.LISTED_DOMAIN} = REJECT 5.7.1 listed as a source of spam}} }}",
        "header_checks": f"regexp:{directory}/config/header_checks",
        "smtpd_peername_lookup": "no",
        "smtpd_client_connection_count_limit": "0",
        "smtpd_client_connection_rate_limit": "0",
        "smtpd_error_sleep_time": "0",
        "notify_classes": "",
    }
    return "".join(f"{key} = {value}\n" for key, value in settings.items())


class PostfixServer:
    """A Postfix instance in the lab's directory and namespace."""

    name = "postfix"

    def __init__(self, lab: Network, directory: Path, program: str) -> None:
        self._lab = lab
        self._base = directory / "postfix"
        self._program = program
        self._config = self._base / "config"
        self.logs = (self._base / "maillog",)

    def start(self) -> None:
        """Write the instance and start it; UnavailableError shows the end of its log."""
        for name in ("config", "queue", "data"):
            (self._base / name).mkdir(parents=True, mode=0o755)
        shutil.chown(self._base / "data", "postfix")
        (self._config / "main.cf").write_text(main_cf(self._base))
        (self._config / "master.cf").write_text(master_cf())
        (self._config / "header_checks").write_text(f"/^{plan.SPAM_HEADER}$/ REJECT 5.7.1 spam\n")
        arguments = [self._program, "-c", str(self._config), "start"]
        command = self._lab.server.command(in_cgroup(self._lab.cgroup, arguments))
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=START_S, start_new_session=True, check=False
        )
        if done.returncode:
            raise UnavailableError(f"Postfix did not start: {done.stderr.strip()}\n{tail(self.logs[0])}")
        wait_for(self._master_pid, "Postfix", seconds=START_S)

    def _master_pid(self) -> int | None:
        """The process id of this instance's master; None when it does not run."""
        try:
            pid = int((self._base / "queue/pid/master.pid").read_text())
            arguments = Path("/proc", str(pid), "comm").read_text()
        except (OSError, ValueError):
            return None
        return pid if arguments.strip() == "master" else None

    def check(self) -> None:
        """UnavailableError when the master is gone."""
        if self._master_pid() is None:
            raise UnavailableError(f"Postfix has ended:\n{tail(self.logs[0])}")

    def stop(self) -> None:
        """`postfix stop`; what survives it dies with the namespace."""
        if self._master_pid() is not None:
            subprocess.run(
                self._lab.server.command([self._program, "-c", str(self._config), "stop"]),
                capture_output=True,
                timeout=START_S,
                check=False,
            )

    def arrivals(self) -> Arrivals:
        """Count this instance's log."""
        with self.logs[0].open(errors="replace") as lines:
            return count_postfix(lines)


_CONNECT = re.compile(r"postfix/smtpd\[\d+\]: connect from \S+?\[([0-9A-Fa-f.:]+)\]$")
_MESSAGE_ID = re.compile(r"postfix/cleanup\[\d+\]: (\w+): message-id=(\S+)$")
_SENT = re.compile(r"postfix/discard\[\d+\]: (\w+): .* status=sent ")


def count_postfix(lines: Iterable[str]) -> Arrivals:
    """Connections and delivered messages in a Postfix log. A message counts when its queue id was logged as sent."""
    connects: Counter[str] = Counter()
    queued: dict[str, str] = {}
    delivered = set()
    for line in lines:
        if match := _CONNECT.search(line.rstrip()):
            connects[match[1].lower()] += 1
        elif match := _MESSAGE_ID.search(line.rstrip()):
            queued[match[1]] = match[2]
        elif (match := _SENT.search(line)) and match[1] in queued:
            delivered.add(queued[match[1]])
    return Arrivals(connects=connects, delivered=frozenset(delivered))


@dataclass
class EmbeddedServer:
    """The embedded server, as a child process in the server namespace."""

    lab: Network
    directory: Path
    events: Path
    name: str = "embedded"
    logs: tuple[Path, ...] = ()
    _child: Child | None = field(default=None, init=False)

    @property
    def _journal(self) -> Path:
        return self.directory / "embedded.jsonl"

    def start(self) -> None:
        """Start the child and wait until its port is open."""
        listen = [f"--listen={address}" for address in (network.SERVER_V6, network.SERVER_V4)]
        paths = [f"--journal={self._journal}", f"--events={self.events}"]
        arguments = [sys.executable, "-m", "edge.lab.embedded", *listen, *paths]
        command = self.lab.server.command(in_cgroup(self.lab.cgroup, arguments))
        self._child = Child("the embedded MTA", command, self.directory / "embedded.log")
        wait_for(self._ready, "the embedded MTA", seconds=START_S)

    def _ready(self) -> bool:
        self.check()
        return self._journal.exists() and self._journal.stat().st_size > 0

    def check(self) -> None:
        """UnavailableError with its last output when it has ended."""
        if self._child is not None:
            self._child.check()

    def stop(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.stop()

    def arrivals(self) -> Arrivals:
        """Count its journal."""
        with self._journal.open() as lines:
            return count_embedded(lines)


def count_embedded(lines: Iterable[str]) -> Arrivals:
    """Connections and accepted messages in the embedded server's journal; its last line may still be incomplete."""
    connects: Counter[str] = Counter()
    delivered = set()
    for line in lines:
        if not line.endswith("\n"):
            break
        record = json.loads(line)
        if record["event"] == "connect":
            connects[record["src"]] += 1
        elif record["event"] == "accept":
            delivered.add(record["message_id"])
    return Arrivals(connects=connects, delivered=frozenset(delivered))
