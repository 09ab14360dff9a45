"""The bpf(2) calls this project needs, through libbpf's C functions.

libbpf comes with bcc, but bcc itself (and LLVM behind it) is never imported here: the daemon opens what the loader
pinned and stays small. Every call raises BpfError with the kernel's errno; file descriptors are owned by `Fd`.
"""

from __future__ import annotations

import ctypes as c
import errno
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge.errors import UnavailableError

BPF_XDP = 37  # enum bpf_attach_type: uapi/linux/bpf.h
BPF_CGROUP_SOCK_OPS = 3
XDP_GENERIC = 1 << 1  # XDP_FLAGS_SKB_MODE: uapi/linux/if_link.h
XDP_NATIVE = 1 << 2  # XDP_FLAGS_DRV_MODE
XDP_HAS_FRAGS = 1 << 5  # BPF_F_XDP_HAS_FRAGS: uapi/linux/bpf.h, kernel 5.18
PERCPU_TYPES = frozenset({5, 6, 10})  # percpu hash, percpu array, lru percpu hash
LAST_WORDS = 4  # lines of a refusal by the verifier: the instruction, the reason, and a summary
BATCH = 65536  # rows a batched read; larger batches gain nothing (measured)


class BpfError(UnavailableError):
    """A bpf call failed; `errno` is the kernel's."""

    def __init__(self, what: str, number: int) -> None:
        super().__init__(f"{what}: {os.strerror(number)} ({errno.errorcode.get(number, number)})")
        self.what, self.errno = what, number

    def __reduce__(self) -> tuple[type[BpfError], tuple[str, int]]:
        """The loader is a child process: its errors must survive the way back."""
        return BpfError, (self.what, self.errno)


class _ProgLoadOpts(c.Structure):
    _fields_ = (
        ("sz", c.c_size_t),
        ("attempts", c.c_int),
        ("expected_attach_type", c.c_uint32),
        ("prog_btf_fd", c.c_uint32),
        ("prog_flags", c.c_uint32),
        ("numbers", c.c_uint32 * 6),  # offload device, versions and BTF: not used
        ("arrays", c.c_uint64 * 5),
        ("log_level", c.c_uint32),
        ("log_size", c.c_uint32),
        ("log_buf", c.c_void_p),
    )


class _LinkCreateOpts(c.Structure):
    _fields_ = (
        ("sz", c.c_size_t),
        ("flags", c.c_uint32),
        ("iter_info", c.c_void_p),
        ("iter_info_len", c.c_uint32),
        ("target_btf_id", c.c_uint32),
        ("union", c.c_uint64 * 5),
    )


class _LinkUpdateOpts(c.Structure):
    _fields_ = (("sz", c.c_size_t), ("flags", c.c_uint32), ("old_prog_fd", c.c_uint32))


class _TestRunOpts(c.Structure):
    _fields_ = (
        ("sz", c.c_size_t),
        ("data_in", c.c_void_p),
        ("data_out", c.c_void_p),
        ("data_size_in", c.c_uint32),
        ("data_size_out", c.c_uint32),
        ("ctx_in", c.c_void_p),
        ("ctx_out", c.c_void_p),
        ("ctx_size_in", c.c_uint32),
        ("ctx_size_out", c.c_uint32),
        ("retval", c.c_uint32),
        ("repeat", c.c_int),
        ("duration", c.c_uint32),
        ("flags", c.c_uint32),
        ("cpu", c.c_uint32),
        ("batch_size", c.c_uint32),
    )


class _MapInfo(c.Structure):
    _fields_ = (
        ("type", c.c_uint32),
        ("id", c.c_uint32),
        ("key_size", c.c_uint32),
        ("value_size", c.c_uint32),
        ("max_entries", c.c_uint32),
        ("map_flags", c.c_uint32),
        ("name", c.c_char * 16),
        ("rest", c.c_uint32 * 24),
    )


class _ProgInfo(c.Structure):
    _fields_ = (
        ("type", c.c_uint32),
        ("id", c.c_uint32),
        ("tag", c.c_uint8 * 8),
        ("jited_len", c.c_uint32),
        ("xlated_len", c.c_uint32),
        ("pointers", c.c_uint64 * 2),
        ("load_time", c.c_uint64),
        ("created_by_uid", c.c_uint32),
        ("nr_map_ids", c.c_uint32),
        ("map_ids", c.c_uint64),
        ("name", c.c_char * 16),
        ("middle", c.c_uint8 * 136),
        ("verified_insns", c.c_uint32),  # offset 216; 0 before kernel 5.16
        ("tail", c.c_uint8 * 12),
    )


class _LinkInfo(c.Structure):
    _fields_ = (
        ("type", c.c_uint32),
        ("id", c.c_uint32),
        ("prog_id", c.c_uint32),
        ("pad", c.c_uint32),
        ("target", c.c_uint64),  # XDP: interface index in the lower half; cgroup: its id
        ("rest", c.c_uint32 * 14),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MapInfo:
    """What the kernel says of a map."""

    id: int
    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramInfo:
    """What the kernel says of a program; sizes in bytes and instructions."""

    id: int
    name: str
    tag: str
    xlated_bytes: int
    verified_instructions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkInfo:
    """What the kernel says of a link. `target` is the interface's index or the cgroup's id (its directory's inode);
    0 once that is gone or the link was detached."""

    id: int
    program_id: int
    target: int


class Fd:
    """A file descriptor that is closed with its owner."""

    def __init__(self, number: int) -> None:
        self.number = number

    def close(self) -> None:
        """Close it; a second call does nothing."""
        if self.number >= 0:
            os.close(self.number)
            self.number = -1

    def __enter__(self) -> Fd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


_SIGNATURES: dict[str, list[object]] = {
    "bpf_obj_pin": [c.c_int, c.c_char_p],
    "bpf_obj_get": [c.c_char_p],
    "bpf_map_lookup_elem": [c.c_int, c.c_void_p, c.c_void_p],
    "bpf_map_update_elem": [c.c_int, c.c_void_p, c.c_void_p, c.c_uint64],
    "bpf_map_delete_elem": [c.c_int, c.c_void_p],
    "bpf_map_lookup_batch": [c.c_int, c.c_void_p, c.c_void_p, c.c_void_p, c.c_void_p, c.c_void_p, c.c_void_p],
    "bpf_prog_load": [c.c_int, c.c_char_p, c.c_char_p, c.c_void_p, c.c_size_t, c.c_void_p],
    "bpf_prog_test_run_opts": [c.c_int, c.c_void_p],
    "bpf_xdp_attach": [c.c_int, c.c_int, c.c_uint32, c.c_void_p],
    "bpf_xdp_detach": [c.c_int, c.c_uint32, c.c_void_p],
    "bpf_xdp_query_id": [c.c_int, c.c_int, c.c_void_p],
    "bpf_link_create": [c.c_int, c.c_int, c.c_int, c.c_void_p],
    "bpf_link_update": [c.c_int, c.c_int, c.c_void_p],
    "bpf_link_detach": [c.c_int],
    "bpf_obj_get_info_by_fd": [c.c_int, c.c_void_p, c.c_void_p],
    "bpf_prog_get_fd_by_id": [c.c_uint32],
}


@functools.cache
def _library() -> c.CDLL:
    """libbpf.so.1, with the functions' types; loaded once, at the first call."""
    try:
        library = c.CDLL("libbpf.so.1", use_errno=True)
    except OSError:
        raise UnavailableError(
            "libbpf.so.1 (libbpf 1.0 or later) was not found: install the package libbpf1 (Debian, Ubuntu) or libbpf"
        ) from None
    for name, types in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, c.c_int
    return library


def _call(what: str, name: str, *arguments: object) -> int:
    """Call a libbpf function; its result, or BpfError saying `what` was tried."""
    c.set_errno(0)
    result = int(getattr(_library(), name)(*arguments))
    if result < 0:
        raise BpfError(what, c.get_errno() or -result)
    return result


def get(path: Path) -> Fd:
    """Open a pinned object."""
    return Fd(_call(f"open {path}", "bpf_obj_get", os.fsencode(path)))


def pin(fd: int, path: Path) -> None:
    """Pin an object; an older pin of that name is replaced atomically."""
    fresh = path.with_name(path.name + "_new")
    fresh.unlink(missing_ok=True)
    _call(f"pin {path}", "bpf_obj_pin", fd, os.fsencode(fresh))
    fresh.rename(path)


def _info(what: str, fd: int, record: c.Structure) -> None:
    size = c.c_uint32(c.sizeof(record))
    _call(f"ask the kernel about {what}", "bpf_obj_get_info_by_fd", fd, c.byref(record), c.byref(size))


def map_info(fd: int) -> MapInfo:
    """Shape of an open map."""
    info = _MapInfo()
    _info("a map", fd, info)
    return MapInfo(
        id=info.id,
        type=info.type,
        key_size=info.key_size,
        value_size=info.value_size,
        max_entries=info.max_entries,
        flags=info.map_flags,
        name=info.name.decode(),
    )


def program_info(fd: int) -> ProgramInfo:
    """Identity and size of an open program."""
    info = _ProgInfo()
    _info("a program", fd, info)
    return ProgramInfo(
        id=info.id,
        name=info.name.decode(),
        tag=bytes(info.tag).hex(),
        xlated_bytes=info.xlated_len,
        verified_instructions=info.verified_insns,
    )


def program_info_by_id(identity: int) -> ProgramInfo:
    """The same for a loaded program known by its id."""
    with Fd(_call(f"open program {identity}", "bpf_prog_get_fd_by_id", identity)) as fd:
        return program_info(fd.number)


def link_info(fd: int) -> LinkInfo:
    """Identity, program and interface of an open link."""
    info = _LinkInfo()
    _info("a link", fd, info)
    return LinkInfo(id=info.id, program_id=info.prog_id, target=info.target)


def load_program(kind: int, name: str, instructions: bytes, *, flags: int = 0, log_bytes: int = 0) -> Fd:
    """Verify and load a program under the licence GPL. `kind`: enum bpf_prog_type.

    With room of `log_bytes` for the verifier's words, its last lines are in the error.
    """
    log = c.create_string_buffer(max(1, log_bytes))
    opts = _ProgLoadOpts(sz=c.sizeof(_ProgLoadOpts), prog_flags=flags, attempts=5)
    if log_bytes:
        opts.log_level, opts.log_size, opts.log_buf = 1, log_bytes, c.cast(log, c.c_void_p)
    what = f"load program {name}"
    try:
        arguments = kind, name.encode(), b"GPL", instructions, len(instructions) // 8, c.byref(opts)
        return Fd(_call(what, "bpf_prog_load", *arguments))
    except BpfError as error:
        words = log.value.decode(errors="replace").strip().splitlines()[-LAST_WORDS:]
        raise BpfError(": ".join([what, *words]), error.errno) from None


def attach_xdp(program: int, ifindex: int, flags: int) -> Fd:
    """Attach by a link, which goes with its last pin and which nobody can displace by accident."""
    opts = _LinkCreateOpts(sz=c.sizeof(_LinkCreateOpts), flags=flags)
    return Fd(_call(f"attach to interface {ifindex}", "bpf_link_create", program, ifindex, BPF_XDP, c.byref(opts)))


def attach_sockops(program: int, cgroup: Path) -> Fd:
    """Attach to a cgroup by a link."""
    with Fd(os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)) as directory:
        return Fd(
            _call(
                f"attach to {cgroup}", "bpf_link_create", program, directory.number, BPF_CGROUP_SOCK_OPS, c.c_void_p()
            )
        )


def update_link(link: int, program: int) -> None:
    """Swap the program of a link; no packet passes unfiltered."""
    opts = _LinkUpdateOpts(sz=c.sizeof(_LinkUpdateOpts))
    _call("replace the attached program", "bpf_link_update", link, program, c.byref(opts))


def detach_link(link: int) -> None:
    """Detach at once, whoever else holds the link."""
    _call("detach", "bpf_link_detach", link)


def attached_program(ifindex: int, flags: int = 0) -> int:
    """Id of the XDP program on an interface in any mode; 0: none."""
    found = c.c_uint32()
    _call(f"ask for the XDP program of interface {ifindex}", "bpf_xdp_query_id", ifindex, flags, c.byref(found))
    return int(found.value)


def detach_foreign(ifindex: int) -> None:
    """Remove an XDP program that was attached without a link, in whichever mode it was."""
    for flags in (XDP_NATIVE, XDP_GENERIC):
        if attached_program(ifindex, flags):
            _call(f"remove the XDP program of interface {ifindex}", "bpf_xdp_detach", ifindex, flags, c.c_void_p())


def run_packet(program: int, packet: bytes, *, repeat: int = 1) -> tuple[int, int]:
    """Run a program on a packet (at least 14 bytes): its return value and the mean time in ns."""
    opts = _test_run(program, packet, _TestRunOpts(repeat=repeat))
    return int(opts.retval), int(opts.duration)


def run_frame(program: int, packet: bytes) -> tuple[int, bytes]:
    """Run a program on a packet (at least 14 bytes) once: its return value and what it made of the packet."""
    made = c.create_string_buffer(len(packet) + 256)
    wanted = _TestRunOpts(repeat=1, data_out=c.cast(made, c.c_void_p), data_size_out=len(made))
    opts = _test_run(program, packet, wanted)
    return int(opts.retval), made.raw[: opts.data_size_out]


def _test_run(program: int, packet: bytes, opts: _TestRunOpts) -> _TestRunOpts:
    """BPF_PROG_TEST_RUN of a packet; the kernel's answer is written into the options."""
    data = c.create_string_buffer(packet, len(packet))
    opts.sz, opts.data_in, opts.data_size_in = c.sizeof(_TestRunOpts), c.cast(data, c.c_void_p), len(packet)
    _call(f"run a packet of {len(packet)} bytes", "bpf_prog_test_run_opts", program, c.byref(opts))
    return opts


@functools.cache
def possible_cpus() -> int:
    """CPUs the kernel may ever have: how many copies a per-CPU value has."""
    text = Path("/sys/devices/system/cpu/possible").read_text().strip()
    return int(text.rpartition("-")[2].rpartition(",")[2]) + 1


class Map:
    """An open map whose keys and values are numpy records.

    A per-CPU map yields and takes values with one row a CPU.
    """

    def __init__(self, fd: Fd, key: np.dtype, value: np.dtype) -> None:
        self.fd = fd
        self.info = map_info(fd.number)
        self.key, self.value = key, value
        if (self.info.key_size, self.info.value_size) != (key.itemsize, value.itemsize):
            raise UnavailableError(
                f"map {self.info.name}: expected keys of {key.itemsize} and values of {value.itemsize} bytes,"
                f" found {self.info.key_size} and {self.info.value_size}: it was pinned by another version"
            )
        self.copies = possible_cpus() if self.info.type in PERCPU_TYPES else 1
        self.stride = value.itemsize if self.copies == 1 else (value.itemsize + 7) // 8 * 8

    def get(self, key: np.ndarray) -> np.ndarray | None:
        """The value of one key (array of one record, or of one a CPU), or None."""
        row = np.ascontiguousarray(key)
        buffer = np.zeros(self.copies * self.stride, np.uint8)
        try:
            _call(
                f"read map {self.info.name}",
                "bpf_map_lookup_elem",
                self.fd.number,
                row.ctypes.data,
                buffer.ctypes.data,
            )
        except BpfError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        value: np.ndarray = self._values(buffer, 1)[0]
        return value

    def put(self, key: np.ndarray, value: np.ndarray) -> None:
        """Write one value (a record; for a per-CPU map one a CPU)."""
        row = np.ascontiguousarray(key)
        padded = np.zeros((self.copies, self.stride), np.uint8)
        padded[:, : self.value.itemsize] = (
            np.ascontiguousarray(value).view(np.uint8).reshape(self.copies, self.value.itemsize)
        )
        _call(
            f"write map {self.info.name}",
            "bpf_map_update_elem",
            self.fd.number,
            row.ctypes.data,
            padded.ctypes.data,
            0,
        )

    def delete(self, key: np.ndarray) -> bool:
        """Delete one key; False when it was not there."""
        row = np.ascontiguousarray(key)
        try:
            _call(
                f"remove from map {self.info.name}",
                "bpf_map_delete_elem",
                self.fd.number,
                row.ctypes.data,
            )
        except BpfError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    def items(self) -> tuple[np.ndarray, np.ndarray]:
        """All keys and values, by batches: arrays of the same length. Rows that come and go meanwhile may or may
        not be there."""
        keys, values = zip(*self._batches(), strict=True)
        return np.concatenate(keys), np.concatenate(values)

    def _values(self, buffer: np.ndarray, count: int) -> np.ndarray:
        """Raw bytes as records: shape (count,), or (count, cpus)."""
        rows = buffer[: count * self.copies * self.stride].reshape(count * self.copies, self.stride)
        flat = np.ascontiguousarray(rows[:, : self.value.itemsize]).view(self.value).reshape(count, self.copies)
        return flat if self.copies > 1 else flat[:, 0]

    def _batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        room = min(BATCH, max(self.info.max_entries, 1))
        keys = np.zeros(room, self.key)
        values = np.zeros(room * self.copies * self.stride, np.uint8)
        # hash maps keep a 4-byte cursor; tries write a whole key
        cursor = np.zeros(max(8, self.key.itemsize), np.uint8)
        begin = c.c_void_p()
        while True:
            count = c.c_uint32(room)
            number = 0
            try:
                _call(
                    f"read map {self.info.name}",
                    "bpf_map_lookup_batch",
                    self.fd.number,
                    begin,
                    cursor.ctypes.data,
                    keys.ctypes.data,
                    values.ctypes.data,
                    c.byref(count),
                    None,
                )
            except BpfError as error:
                if error.errno != errno.ENOENT:  # ENOENT is how the last batch ends
                    raise
                number = error.errno
            yield keys[: count.value].copy(), self._values(values, count.value)
            if number:
                return
            begin = c.c_void_p(cursor.ctypes.data)
