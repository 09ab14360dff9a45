"""The program on the network interfaces: attach, attach in another mode, refuse to displace, let go.

Attaching natively may make a network card take its link down for seconds, so it is done once: the attachment is a
pinned link that outlives every process, and a restart only looks at it.

Invariants:
    never-reattached: a live link of ours in a mode the configuration allows is left alone, whoever restarts.
    said-first: what may reset a network card is in the log before it is done.
    foreign-stays: an XDP program that is not ours is never displaced unless told to.
    comes-back: an interface that is away keeps the attachments that served it; they are there when it returns.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edge.config import Config
from edge.errors import UnavailableError
from edge.kernel import interfaces, libbpf
from edge.kernel.interfaces import Chosen, Target
from edge.kernel.libbpf import BpfError
from edge.kernel.netlink import Link
from edge.kernel.pins import Pins

log = logging.getLogger(__name__)

NATIVE, GENERIC, AUTO, MISSING = "native", "generic", "auto", "missing"
FLAGS = {NATIVE: libbpf.XDP_NATIVE, GENERIC: libbpf.XDP_GENERIC}

MOST_NAMED = 8
"""Bridge ports named in one line of the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """A device and what of ours is on it: mode "native" or "generic", or "missing" with program 0.

    `serves`: the configured interfaces it is there for. A configured interface that is away has index 0.
    """

    ifindex: int
    mode: str
    program_id: int
    serves: tuple[str, ...] = ()


def attachments(config: Config) -> dict[str, Attachment]:
    """How things stand on every device, by its name. UnavailableError when no program is pinned."""
    pins = Pins(Path(config.paths.pins))
    with libbpf.get(pins.program("xdp")) as pinned:
        ours = libbpf.program_info(pinned.number).id
    chosen = interfaces.resolve(config.interfaces.names, pins.xdp_links())
    found = {}
    for target in chosen.targets:
        mode = _mode(target.link.index, ours)
        found[target.link.name] = Attachment(
            ifindex=target.link.index, mode=mode, program_id=0 if mode == MISSING else ours, serves=target.serves
        )
    for name in chosen.absent:
        found.setdefault(name, Attachment(ifindex=0, mode=MISSING, program_id=0, serves=(name,)))
    return found


def wanting(found: Mapping[str, Attachment]) -> list[str]:
    """Devices that are there and lack the program."""
    return [name for name, row in found.items() if row.ifindex and not row.program_id]


def judged(found: Mapping[str, Attachment]) -> list[str]:
    """Names of the devices and of the interfaces they serve: whose addresses the judged mail comes to."""
    return sorted({other for name, row in found.items() for other in (name, *row.serves)} - {interfaces.AUTO})


def is_attached(pins: Pins, chosen: Chosen, mode: str) -> bool:
    """Whether attach_all() would change nothing."""
    links = set(pins.xdp_links())
    extra = bool(_stale(pins, chosen))
    return chosen.indices() <= links and not extra and all(_fits(pins, one.link, mode) for one in chosen.targets)


def attach_all(pins: Pins, chosen: Chosen, program: int, mode: str, *, replace: bool) -> None:
    """Attach to every target, and to nothing else. Nothing is attached or displaced where an interface is refused."""
    for why in chosen.absent.values():
        log.error("an interface is not served", extra={"fields": {"why": why}})
    for bridge, ports in chosen.passed_over.items():
        some = ",".join(ports[:MOST_NAMED])
        fields = {"bridge": bridge, "ports": len(ports), "names": some, "to judge one": "add it to [interfaces] names"}
        log.warning("bridge ports of guests are left alone", extra={"fields": fields})
    _drop(pins, {link.index for link in chosen.above()})  # no program may be above where ours is to go
    for target in chosen.targets:
        _make_way(pins, target, replace=replace)
    for target in chosen.targets:
        _attach(pins, target, program, mode)
    _remember_mode(pins, mode)
    _drop(pins, _stale(pins, chosen))


def is_live(pins: Pins, path: Path, program: str, target: int) -> bool:
    """Whether a pinned link is attached to this interface index (or cgroup id) and runs the pinned program."""
    if not path.exists() or not pins.program(program).exists():
        return False
    with libbpf.get(path) as link, libbpf.get(pins.program(program)) as pinned:
        info = libbpf.link_info(link.number)
        return info.target == target and info.program_id == libbpf.program_info(pinned.number).id


def let_go(path: Path) -> None:
    """Detach a pinned link and remove its pin."""
    with libbpf.get(path) as link:
        libbpf.detach_link(link.number)
    path.unlink()


def _mode(ifindex: int, program: int) -> str:
    """How a program is attached to an interface."""
    modes = (word for word, flags in FLAGS.items() if libbpf.attached_program(ifindex, flags) == program)
    return next(modes, MISSING)


def _live_mode(pins: Pins, link: Link) -> str:
    if not is_live(pins, pins.xdp_link(link.index), "xdp", link.index):
        return MISSING
    with libbpf.get(pins.program("xdp")) as pinned:
        return _mode(link.index, libbpf.program_info(pinned.number).id)


def _fits(pins: Pins, link: Link, mode: str) -> bool:
    """Whether an attachment is live in a mode that `mode` of the configuration allows.

    "auto" leaves a generic one alone: it found no native mode. Unless it was generic because that was asked for.
    """
    live = _live_mode(pins, link)
    if mode == AUTO:
        return live == NATIVE or (live == GENERIC and _remembered_mode(pins) != GENERIC)
    return live == mode


def _remembered_mode(pins: Pins) -> str:
    """The xdp_mode that what is attached was attached with: a symbolic link, as a BPF file system holds no file."""
    path = pins.root / "xdp_mode"
    return str(path.readlink()) if path.is_symlink() else AUTO


def _remember_mode(pins: Pins, mode: str) -> None:
    if _remembered_mode(pins) != mode:
        path = pins.root / "xdp_mode"
        path.unlink(missing_ok=True)
        path.symlink_to(mode)


def _stale(pins: Pins, chosen: Chosen) -> set[int]:
    """Attachments that serve nothing any more.

    While a configured interface is away nobody knows what it stands on, so only those of lost devices are."""
    extra = set(pins.xdp_links()) - chosen.indices()
    if not chosen.absent:
        return extra
    return {index for index in extra if not is_live(pins, pins.xdp_link(index), "xdp", index)}


def _drop(pins: Pins, indices: set[int]) -> None:
    for index, path in pins.xdp_links().items():
        if index in indices:
            log.info("detaching", extra={"fields": {"ifindex": index, "why": "no longer configured, or gone"}})
            let_go(path)


def _make_way(pins: Pins, target: Target, *, replace: bool) -> None:
    """Refuse, or displace when told to, what else is on an interface or on the bond over it."""
    for link in (target.link, *(link for link in target.above if link.kind in interfaces.OF_MEMBERS)):
        if is_live(pins, pins.xdp_link(link.index), "xdp", link.index):
            continue
        foreign = libbpf.attached_program(link.index)
        if foreign:
            _displace(link, foreign, replace=replace)


def _displace(link: Link, foreign: int, *, replace: bool) -> None:
    theirs = libbpf.program_info_by_id(foreign)
    what = f"interface {link.name} already has an XDP program (id {theirs.id}, name {theirs.name!r}, tag {theirs.tag})"
    if not replace:
        raise UnavailableError(f"{what}: it was left alone; use --replace to displace it")
    log.warning("displacing a foreign XDP program", extra={"fields": {"interface": link.name, "program": theirs.name}})
    libbpf.detach_foreign(link.index)


def _attach(pins: Pins, target: Target, program: int, mode: str) -> None:
    if _fits(pins, target.link, mode):
        return
    fields = {"interface": target.link.name, "for": target.stacked or target.link.name}
    if not target.link.ethernet:
        log.warning("no Ethernet header there: nothing of it can be judged", extra={"fields": fields})
    before = _live_mode(pins, target.link)
    if before != MISSING:
        changed = {"xdp": before, "xdp_mode": mode}
        log.warning("attaching again in another mode: nothing is judged meanwhile", extra={"fields": fields | changed})
        let_go(pins.xdp_link(target.link.index))
    log.info("attaching: the network card may take its link down for a moment", extra={"fields": fields})
    try:
        used = _link(pins, target.link, program, mode)
    except UnavailableError:
        if before != MISSING:
            _link(pins, target.link, program, before)
        raise
    log.info("attached", extra={"fields": fields | {"xdp": used}})


def _link(pins: Pins, link: Link, program: int, mode: str) -> str:
    """Attach natively where the driver can, else generically; says which."""
    if mode != GENERIC:
        try:
            _pin_link(pins, link, program, NATIVE)
            return NATIVE
        except BpfError as error:
            _explain(link, error)
            if mode == NATIVE:
                raise UnavailableError(
                    f"interface {link.name}: its driver has no native XDP for this program at MTU {link.mtu} ({error})"
                ) from error
            fields = {"interface": link.name, "mtu": link.mtu, "why": str(error)}
            log.warning("no native XDP here, generic instead: it costs more a packet", extra={"fields": fields})
    try:
        _pin_link(pins, link, program, GENERIC)
    except BpfError as error:
        _explain(link, error)
        raise
    return GENERIC


def _explain(link: Link, error: BpfError) -> None:
    """Raise UnavailableError where another mode would meet the same refusal: a program came first, here or above."""
    if error.errno in (errno.EEXIST, errno.EBUSY):
        raise UnavailableError(
            f"interface {link.name}: expected no other XDP program on it or on a bond, VLAN or bridge over it,"
            f" the kernel found one ({error})"
        ) from error


def _pin_link(pins: Pins, link: Link, program: int, mode: str) -> None:
    path = pins.xdp_link(link.index)
    path.unlink(missing_ok=True)
    with libbpf.attach_xdp(program, link.index, FLAGS[mode]) as made:
        libbpf.pin(made.number, path)
