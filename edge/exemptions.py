"""Who is exempt by default: this host's connected prefixes, Postfix's mynetworks, and what the configuration lists.

Link-local and loopback prefixes of the interfaces need no entry: the kernel program passes them (`exempt.private`).

Invariants:
    never-the-whole-internet: a connected or mynetworks prefix wider than WIDEST is refused, not exempted.
    nothing-is-skipped-silently: each pattern of mynetworks that is not a plain prefix is logged.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from edge.abi import Origin, Service, Standing
from edge.config import Config
from edge.core.model import Entry
from edge.core.prefix import Prefix
from edge.errors import InputError
from edge.kernel import netlink

log = logging.getLogger(__name__)

WIDEST = {4: 8, 6: 16}
"""Shortest prefix taken from the system: 10.0.0.0/8 is usual, anything shorter is a mistake there."""

USUAL = {4: 16, 6: 64}
"""A shorter connected prefix probably holds strangers: said in the log."""

POSTCONF_TIMEOUT_S = 5.0
MOST_PATTERNS = 1024
MAIN_CF = Path("/etc/postfix/main.cf")
PACKAGED = (Path("/usr/sbin"), Path("/sbin"))


def entries(config: Config, interfaces: Sequence[str]) -> list[Entry]:
    """An allow entry for each exempt prefix and service; `interfaces` are those the program is attached to."""
    found: dict[Prefix, str] = {}
    for text in config.exempt.prefixes:
        found.setdefault(Prefix.parse(text), "exempt: configured")
    if config.exempt.postfix_mynetworks:
        for prefix in parse_mynetworks(read_mynetworks()):
            found.setdefault(prefix, "exempt: Postfix mynetworks")
    if config.exempt.connected:
        for prefix, interface in connected(interfaces):
            found.setdefault(prefix, f"exempt: connected on {interface}")
    return [_entry(prefix, service, reason) for prefix, reason in found.items() for service in Service]


def connected(interfaces: Sequence[str]) -> Iterator[tuple[Prefix, str]]:
    """The on-link prefixes of these interfaces, with the interface.

    Link-local and loopback prefixes are left out. An interface that is not there is logged.
    """
    names = {link.index: link.name for link in netlink.links()}
    for missing in sorted(set(interfaces) - set(names.values())):
        log.warning("no such interface: nothing of it is exempt", extra={"fields": {"interface": missing}})
    for index, address in netlink.addresses():
        name, network = names.get(index, ""), address.network
        if name not in interfaces or network.is_link_local or network.is_loopback:
            continue
        if not _narrow_enough(network, f"connected on {name}"):
            continue
        if network.prefixlen < USUAL[network.version]:
            log.warning("a wide connected prefix is exempt", extra={"fields": {"prefix": network, "interface": name}})
        yield Prefix.of_network(network), name


def read_mynetworks() -> str:
    """What Postfix says of mynetworks; empty where Postfix is not installed or does not answer (logged)."""
    postconf = shutil.which("postconf") or shutil.which("postconf", path="/usr/sbin:/usr/local/sbin")
    if postconf is None:
        return ""
    if _is_unconfigured(postconf):
        log.info("Postfix has no main.cf: it has no mynetworks", extra={"fields": {"looked for": str(MAIN_CF)}})
        return ""
    command = [postconf, "-x", "-h", "mynetworks"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=POSTCONF_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as error:
        detail = str(getattr(error, "stderr", None) or error).strip()
        log.warning("mynetworks unknown: nothing of it is exempt", extra={"fields": {"error": detail}})
        return ""
    return run.stdout


def _is_unconfigured(postconf: str) -> bool:
    """Whether this is a Postfix as its package leaves it until somebody configures it: without main.cf.

    Asked, it waits a second before it says so. Only a packaged one is taken at its directory: another may have its
    configuration elsewhere.
    """
    packaged = Path(postconf).parent in PACKAGED and "MAIL_CONFIG" not in os.environ
    return packaged and MAIN_CF.parent.is_dir() and not MAIN_CF.exists()


def parse_mynetworks(text: str) -> Iterator[Prefix]:
    """The plain prefixes of a mynetworks value: 192.0.2.0/24, [2001:db8::]/32, [::1], 192.0.2.1 (postconf(5)).

    Tables (hash:...), files (/path), exclusions (!pattern) and what Postfix itself would refuse are logged and skipped;
    an excluded address inside an exempt prefix is exempt.
    """
    patterns = [pattern for pattern in re.split(r"[\s,]+", text) if pattern]
    if len(patterns) > MOST_PATTERNS:
        log.warning("mynetworks is cut", extra={"fields": {"patterns": len(patterns), "used": MOST_PATTERNS}})
    for pattern in patterns[:MOST_PATTERNS]:
        try:
            prefix = Prefix.parse(re.sub(r"^\[([^]]*)\]", r"\1", pattern))
        except InputError:
            reason = "an exclusion" if pattern.startswith("!") else "not a plain prefix"
            log.warning("mynetworks pattern skipped", extra={"fields": {"pattern": pattern, "because": reason}})
            continue
        if _narrow_enough(prefix.network, "in mynetworks"):
            yield prefix


def _narrow_enough(network: IPv4Network | IPv6Network, where: str) -> bool:
    if network.prefixlen >= WIDEST[network.version]:
        return True
    log.error("refused to exempt so wide a prefix", extra={"fields": {"prefix": network, "found": where}})
    return False


def _entry(prefix: Prefix, service: Service, reason: str) -> Entry:
    return Entry(
        prefix=prefix,
        service=service,
        standing=Standing.ALLOW,
        origin=Origin.EXEMPT,
        expires_s=None,
        reason=reason,
    )
