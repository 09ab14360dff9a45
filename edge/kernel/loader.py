"""Put the programs into the kernel, or adopt those that are there; and take every trace out again.

Runs as root for a second and ends; what it pinned stays. The daemon opens the pins.

Invariants:
    no-gap: an upgrade swaps the program of a live link; there is no moment without one.
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
from pathlib import Path

import numpy as np

from edge.abi import Level
from edge.config import Config
from edge.errors import UnavailableError
from edge.kernel import attach, interfaces, libbpf
from edge.kernel.attach import is_live
from edge.kernel.compile import Compiled, compile_programs, write_identity
from edge.kernel.libbpf import BpfError
from edge.kernel.maps import Policy
from edge.kernel.nft import remove_table
from edge.kernel.pins import Pins
from edge.kernel.program import U32, Sizes

log = logging.getLogger(__name__)

BPFFS = Path("/sys/fs/bpf")


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
    chosen = interfaces.resolve(config.interfaces.names, pins.xdp_links()).require()
    return (
        pins.build_matches(sizes(config))
        and attach.is_attached(pins, chosen, config.interfaces.xdp_mode)
        and is_live(pins, pins.sockops_link, "sockops", cgroup(config).stat().st_ino)
    )


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
    chosen = interfaces.resolve(config.interfaces.names, pins.xdp_links()).require()
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
        attach.attach_all(pins, chosen, xdp.number, config.interfaces.xdp_mode, replace=replace)
        _attach_sockops(pins, group, sockops.number)


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
                if path == pins.sockops_link and error.errno != errno.ENOLINK:
                    raise
                if error.errno != errno.ENOLINK:  # else its interface or cgroup is gone; made again below either way
                    log.warning(
                        "the driver refused the new program: attached again, nothing is judged meanwhile",
                        extra={"fields": {"link": path.name, "why": str(error)}},
                    )
                    libbpf.detach_link(link.number)
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


def _adopt_half_made_links(pins: Pins) -> None:
    """Links of a load that was killed between pinning them and giving them their name."""
    for path in pins.root.glob("*_link*_new"):
        path.rename(path.with_name(path.name.removesuffix("_new")))


def _attach_sockops(pins: Pins, group: Path, program: int) -> None:
    if is_live(pins, pins.sockops_link, "sockops", group.stat().st_ino):
        return
    pins.sockops_link.unlink(missing_ok=True)
    with libbpf.attach_sockops(program, group) as link:
        libbpf.pin(link.number, pins.sockops_link)
    log.info("counting handshakes", extra={"fields": {"cgroup": str(group)}})


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
