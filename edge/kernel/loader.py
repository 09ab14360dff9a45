"""Put the programs into the kernel, or adopt those that are there; and take every trace out again.

Runs as root for a second and ends; what it pinned stays. The daemon opens the pins.

Invariants:
    no-gap: an upgrade swaps the program of a live link; there is no moment without one.
    foreign-stays: an XDP program that is not ours is never displaced unless told to.
    detach-leaves-nothing: after detach() no pin, link or program of ours is left.
"""

from __future__ import annotations

import errno
import logging
import os
import pwd
import shutil
import stat
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge.abi import Level
from edge.config import Config
from edge.errors import UnavailableError
from edge.kernel import interfaces, libbpf
from edge.kernel.compile import Compiled, compile_programs, write_identity
from edge.kernel.libbpf import BpfError, Fd
from edge.kernel.maps import Policy
from edge.kernel.nft import remove_table
from edge.kernel.pins import Pins
from edge.kernel.program import U32, Sizes

log = logging.getLogger(__name__)

BPFFS = Path("/sys/fs/bpf")
ARPHRD_ETHER = "1"  # linux/if_arp.h


def sizes(config: Config) -> Sizes:
    """Table sizes of a configuration."""
    return Sizes(rows=tuple(config.tables.rows(level) for level in Level), connections=config.tables.connections)


def cgroup(config: Config) -> Path:
    """The cgroup v2 directory whose sockets are counted; UnavailableError when no cgroup v2 is mounted."""
    if config.paths.cgroup != "auto":
        path = Path(config.paths.cgroup)
        if not path.is_dir():
            raise UnavailableError(f"[paths] cgroup: expected a cgroup v2 directory, found nothing at {path}")
        return path
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise UnavailableError("no cgroup v2 file system is mounted: mount one, or name it in [paths] cgroup")


def is_current(config: Config) -> bool:
    """Whether what is pinned and attached is just what load() would make: nothing to do."""
    pins = Pins(Path(config.paths.pins))
    targets = set(interfaces.resolve(config.interfaces.names).values())
    if not pins.build_matches(sizes(config)) or set(pins.xdp_links()) != targets:
        return False
    return all(_is_live(pins, pins.xdp_link(index), "xdp", index) for index in targets) and _is_live(
        pins, pins.sockops_link, "sockops", cgroup(config).stat().st_ino
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """An interface and what of ours is on it: mode "native" or "generic", or "missing" with program 0."""

    ifindex: int
    mode: str
    program_id: int


def attachments(config: Config) -> dict[str, Attachment]:
    """How things stand on every configured interface. Not for a running event loop: pyroute2 has its own."""
    with libbpf.get(Pins(Path(config.paths.pins)).program("xdp")) as pinned:
        ours = libbpf.program_info(pinned.number).id
    found = {}
    for name, index in interfaces.resolve(config.interfaces.names).items():
        modes = {"native": libbpf.XDP_NATIVE, "generic": libbpf.XDP_GENERIC}
        mode = next((word for word, flags in modes.items() if libbpf.attached_program(index, flags) == ours), "missing")
        found[name] = Attachment(ifindex=index, mode=mode, program_id=0 if mode == "missing" else ours)
    return found


def load(config: Config, *, replace: bool = False, user: str | None = None) -> None:
    """Compile (unless what is pinned is already this build), pin, attach.

    `replace` displaces a foreign XDP program; `user` is given the pins. UnavailableError says what the kernel or the
    host lacks, or that a daemon is using the pins; nothing is attached then that was not before.
    """
    if os.geteuid() != 0:
        raise UnavailableError("loading needs root: run `edge load` as root, the daemon itself needs it not")
    root = Path(config.paths.pins)
    make_directory(root)
    with Pins(root).lock():
        install(config, replace=replace)
    _hand_over(root, user)


def install(config: Config, *, replace: bool) -> None:
    """What load() does for whoever holds the lock on the pins."""
    pins = Pins(Path(config.paths.pins))
    _finish_rename(pins)
    pins.maps.mkdir(mode=0o700, exist_ok=True)
    targets = interfaces.resolve(config.interfaces.names)
    group = cgroup(config)
    started = time.monotonic()
    if pins.build_matches(sizes(config)):
        log.info("programs adopted", extra={"fields": {"pins": str(pins.root)}})
    else:
        _install(pins, sizes(config))
        log.info(
            "programs loaded",
            extra={"fields": {"pins": str(pins.root), "seconds": f"{time.monotonic() - started:.2f}"}},
        )
    with libbpf.get(pins.program("xdp")) as xdp, libbpf.get(pins.program("sockops")) as sockops:
        _adopt_half_made_links(pins)
        _swap_in(pins, xdp.number, sockops.number)
        for name, index in targets.items():
            _make_way(pins, name, index, replace=replace)
        for name, index in targets.items():
            _attach(pins, name, index, xdp.number, config.interfaces.xdp_mode)
        _attach_sockops(pins, group, sockops.number)
    _drop_stale_links(pins, set(targets.values()))


def detach(config: Config) -> list[str]:
    """Take everything out of the kernel; what was removed, as text. Nothing there is no error."""
    pins = Pins(Path(config.paths.pins))
    removed = []
    if pins.root.is_dir():
        with pins.lock():
            removed += [*_detach(pins), str(pins.root)]
    if config.nftables.enabled and remove_table(config.nftables.table):
        removed.append(f"table inet {config.nftables.table}")
    return removed


def _detach(pins: Pins) -> list[str]:
    removed = []
    for path in [*pins.xdp_links().values(), pins.sockops_link]:
        if path.exists():
            with libbpf.get(path) as link:
                libbpf.detach_link(link.number)
            removed.append(path.name)
    shutil.rmtree(pins.root)
    return removed


def make_directory(root: Path) -> None:
    """The pin directory, on a BPF file system, which is mounted first where init did not do it."""
    if "." in str(root):
        raise UnavailableError(f"[paths] pins: expected a path without dots (the BPF file system refuses them): {root}")
    if BPFFS in root.parents and not os.path.ismount(BPFFS):
        _mount_bpffs()
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        # what stands there was made by us, or by somebody who could then pull our programs out again
        owner = root.lstat()
        if owner.st_uid != 0 or not stat.S_ISDIR(owner.st_mode):
            raise UnavailableError(
                f"[paths] pins: expected {root} to be root's directory, found it owned by {owner.st_uid}"
            )
    except OSError as error:
        raise UnavailableError(
            f"[paths] pins: expected a directory on a BPF file system, cannot make {root}: {error.strerror}"
        ) from error


def _mount_bpffs() -> None:
    """systemd mounts it at boot; other inits do not."""
    done = subprocess.run(
        ["mount", "-t", "bpf", "-o", "mode=0700", "bpf", str(BPFFS)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UnavailableError(f"no BPF file system at {BPFFS}, and mounting one failed: {done.stderr.strip()}")
    log.info("mounted a BPF file system", extra={"fields": {"at": str(BPFFS)}})


def _install(pins: Pins, wanted: Sizes) -> None:
    """Compile against the pinned maps where their layout fits, else against new ones; pin the programs."""
    made = pins.identity()
    fits = made is not None and pins.layout_matches(wanted)
    if made is not None and not fits:
        log.warning(
            "layout of the tables changed: made anew, limits start afresh", extra={"fields": {"pins": str(pins.root)}}
        )
    where = pins.maps
    if not fits:
        # beside the old ones, which the attached program goes on using until it is swapped
        where = pins.root / "maps_new"
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir(mode=0o700)
    compiled = compile_programs(wanted, pins=where)
    write_identity(compiled.maps, wanted, time.monotonic_ns(), complete=False)
    if not fits:
        _copy_policy(pins, compiled)
    for name in ("xdp", "sockops"):
        libbpf.pin(compiled.programs[f"edge_{name}"], pins.program(name))
    _swap_in(pins, compiled.programs["edge_xdp"], compiled.programs["edge_sockops"])
    if not fits:
        pins.maps.rename(pins.root / "maps_old")
        _finish_rename(pins)
    write_identity(compiled.maps, wanted, time.monotonic_ns())


def _finish_rename(pins: Pins) -> None:
    """Put the new tables in the place of the old ones; also what a load that was killed on the way had begun."""
    fresh, old = pins.root / "maps_new", pins.root / "maps_old"
    if old.is_dir():
        if not pins.maps.exists() and fresh.is_dir():
            fresh.rename(pins.maps)
        shutil.rmtree(old)


def _swap_in(pins: Pins, xdp: int, sockops: int) -> None:
    """Give these programs to the links that live and hold others."""
    links = dict.fromkeys(pins.xdp_links().values(), xdp) | {pins.sockops_link: sockops}
    for path, program in links.items():
        if not path.exists():
            continue
        with libbpf.get(path) as link:
            try:
                if libbpf.link_info(link.number).program_id != libbpf.program_info(program).id:
                    libbpf.update_link(link.number, program)
            except BpfError as error:
                if error.errno != errno.ENOLINK:  # its interface or cgroup is gone: made again below
                    raise
                path.unlink()


def _copy_policy(pins: Pins, compiled: Compiled) -> None:
    """Give new tables the settings and entries of old ones where these have the same shape: no block is lost by an
    upgrade that only resizes."""
    for name in ("control", "limits", "services", "destinations", "policy", "policy_ranges"):
        try:
            old = pins.open_map(name)
        except UnavailableError:
            continue
        for key, value in zip(*old.items(), strict=True):
            compiled.maps[name].put(key, value)
    identity = compiled.maps["identity"].get(np.zeros(1, U32))
    assert identity is not None  # an array always has its row
    Policy(compiled.maps, int(identity["seed"]))  # fills the filter, which depends on the new tables' seed


def _is_live(pins: Pins, path: Path, program: str, target: int) -> bool:
    """Whether a pinned link is attached to this interface index (or cgroup id) and runs the pinned program."""
    if not path.exists() or not pins.program(program).exists():
        return False
    with libbpf.get(path) as link, libbpf.get(pins.program(program)) as pinned:
        info = libbpf.link_info(link.number)
        return info.target == target and info.program_id == libbpf.program_info(pinned.number).id


def _adopt_half_made_links(pins: Pins) -> None:
    """Links of a load that was killed between pinning them and giving them their name."""
    for path in pins.root.glob("*_link*_new"):
        path.rename(path.with_name(path.name.removesuffix("_new")))


def _make_way(pins: Pins, name: str, ifindex: int, *, replace: bool) -> None:
    """Refuse, or displace when told to, what else is on an interface; before anything is attached anywhere."""
    if _is_live(pins, pins.xdp_link(ifindex), "xdp", ifindex):
        return
    foreign = libbpf.attached_program(ifindex)
    if foreign:
        _displace(name, ifindex, foreign, replace=replace)


def _attach(pins: Pins, name: str, ifindex: int, program: int, mode: str) -> None:
    if _is_live(pins, pins.xdp_link(ifindex), "xdp", ifindex):
        return
    kind = Path("/sys/class/net", name, "type")
    if kind.exists() and kind.read_text().strip() != ARPHRD_ETHER:
        log.warning("no Ethernet header there: nothing of it can be judged", extra={"fields": {"interface": name}})
    pins.xdp_link(ifindex).unlink(missing_ok=True)
    link, used = _link(name, ifindex, program, mode)
    with link:
        libbpf.pin(link.number, pins.xdp_link(ifindex))
    log.info("attached", extra={"fields": {"interface": name, "xdp": used}})


def _displace(name: str, ifindex: int, foreign: int, *, replace: bool) -> None:
    theirs = libbpf.program_info_by_id(foreign)
    what = f"interface {name} already has an XDP program (id {theirs.id}, name {theirs.name!r}, tag {theirs.tag})"
    if not replace:
        raise UnavailableError(f"{what}: it was left alone; use --replace to displace it")
    libbpf.detach_foreign(ifindex)
    log.warning("displaced a foreign XDP program", extra={"fields": {"interface": name, "program": theirs.name}})


def _link(name: str, ifindex: int, program: int, mode: str) -> tuple[Fd, str]:
    """Attach natively where the driver can, else generically; says which. Attaching may reset a NIC."""
    if mode != "generic":
        try:
            return libbpf.attach_xdp(program, ifindex, libbpf.XDP_NATIVE), "native"
        except BpfError as error:
            if mode == "native":
                raise UnavailableError(
                    f"interface {name}: its driver has no native XDP for this program ({error})"
                ) from error
            log.info("no native XDP here, generic instead", extra={"fields": {"interface": name, "why": str(error)}})
    return libbpf.attach_xdp(program, ifindex, libbpf.XDP_GENERIC), "generic"


def _attach_sockops(pins: Pins, group: Path, program: int) -> None:
    if _is_live(pins, pins.sockops_link, "sockops", group.stat().st_ino):
        return
    pins.sockops_link.unlink(missing_ok=True)
    with libbpf.attach_sockops(program, group) as link:
        libbpf.pin(link.number, pins.sockops_link)
    log.info("counting handshakes", extra={"fields": {"cgroup": str(group)}})


def _drop_stale_links(pins: Pins, wanted: set[int]) -> None:
    """Links of interfaces that are gone or no longer configured."""
    for index, path in pins.xdp_links().items():
        if index not in wanted:
            with libbpf.get(path) as link:
                libbpf.detach_link(link.number)
            path.unlink()
            log.info("detached", extra={"fields": {"ifindex": index}})


def _hand_over(root: Path, user: str | None) -> None:
    """Let an unprivileged daemon open the pins: their file mode is the access control.

    The directories stay root's, so that the daemon's user can neither remove a pin nor put a link to somebody's file
    there for the next load to hand over; links are not followed.
    """
    if user is None:
        return
    try:
        owner = pwd.getpwnam(user)
    except KeyError:
        raise UnavailableError(f"user {user!r}: expected an existing user to hand the pins to, found none") from None
    for path in [root, *root.rglob("*")]:
        if stat.S_ISDIR(path.lstat().st_mode):
            os.chown(path, 0, owner.pw_gid, follow_symlinks=False)
            path.chmod(0o750)
        else:
            os.chown(path, owner.pw_uid, owner.pw_gid, follow_symlinks=False)
