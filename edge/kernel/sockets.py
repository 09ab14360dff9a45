"""The kernel's own table of TCP sockets: who is connected to the protected ports right now, by prefix.

The sockops program counts a connection from its completed handshake until its socket reaches TCP_CLOSE, but it never
saw those that were open before it was attached. This reads what is open from sock_diag, so that both can be compared.

The reader is our own: 50,000 sockets take it 0.1 s and 10 MB. pyroute2 0.9.7's DiagSocket takes 4 s and 160 MB for
40,000, and drops the kernel's error messages. No privilege is needed. The table is that of one network namespace, while
the program counts a cgroup: a container's connections may be in one and not in the other. A dump is not one moment:
a socket that opens or closes meanwhile may be in it or not, and so, rarely, may its neighbour in the kernel's table.

Invariants:
    counts-what-sockops-counts: the states from the completed handshake to TCP_CLOSE, and no other.
    time-wait-is-closed: what the kernel keeps of a closed connection is not open, whichever state it shows.
    only-the-servers-end: a loopback connection counts once; one made from a port that is listened on does not.
    keys-as-prefix: an address has the key that edge.core.prefix gives it.
    each-socket-once: a socket that a dump shows twice counts once.
    reading-is-bounded: in time, in sockets and in memory; beyond that an error, never a part of the table.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edge.abi import Level, Service
from edge.core.prefix import IPV4_SPACE, LENGTHS, mask
from edge.errors import UnavailableError

TIMEOUT_S = 5.0
"""For the whole reading."""

MOST_SOCKETS = 262_144
"""Four times what one address can have open to one port of ours (2^16 ports of its own); 52 MB while reading."""

OPEN_SOCKET = np.dtype(
    [("hi", "<u8"), ("lo", "<u8"), ("cookie", "<u8"), ("service", "<u4"), ("ipv4", "?"), ("state", "u1")]
)
"""One connection: the peer's key, the socket's number (SO_COOKIE, never used twice), our service, and the state as in
net/tcp_states.h. By its cookie a connection is known again in a later reading."""

PREFIX_COUNT = np.dtype([("hi", "<u8"), ("lo", "<u8"), ("service", "<u4"), ("count", "<u4")])
"""Open connections of one prefix; `lo` is 0 but at /128."""

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h, net/tcp_states.h
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST, _NLM_F_DUMP_INTR, _NLM_F_DUMP = 0x1, 0x10, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_INET_DIAG_REQ_BYTECODE = 1
_INET_DIAG_BC_JMP, _INET_DIAG_BC_S_COND = 1, 7
_TIMER_TIME_WAIT = 3  # idiag_timer of a closed connection's remains; a socket has 0, 1, 2 or 4
_LISTEN = 10
# ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING. Not SYN_RECV: only with TCP Fast Open, which no mail
# server uses, would sockops count that.
_COUNTED = (1, 4, 5, 8, 9, 11)

_HEADER = struct.Struct("=IHHII")  # nlmsghdr
_ERROR = struct.Struct("=i")
_REQUEST = struct.Struct("=BBBxI48x")  # inet_diag_req_v2, its inet_diag_sockid left empty
_ATTRIBUTE = struct.Struct("=HH")  # nlattr
_CONDITION = struct.Struct("=BBHBBxxi")  # inet_diag_bc_op, inet_diag_hostcond
_JUMP = struct.Struct("=BBH")  # inet_diag_bc_op

_MESSAGE = np.dtype(  # inet_diag_msg, 72 bytes; attributes that follow are not read
    [
        ("family", "u1"),
        ("state", "u1"),
        ("timer", "u1"),
        ("retransmissions", "u1"),
        ("port", ">u2"),
        ("peer_port", ">u2"),
        ("address", "S16"),
        ("peer", ">u8", (2,)),
        ("interface", "=u4"),
        ("cookie", "=u8"),
        ("rest", "=u4", (5,)),
    ]
)
_MESSAGE_BYTES = _MESSAGE.itemsize
_LEAST_BYTES = {_SOCK_DIAG_BY_FAMILY: _HEADER.size + _MESSAGE_BYTES, _NLMSG_ERROR: _HEADER.size + _ERROR.size}
_DATAGRAM_BYTES = 1 << 16  # the kernel fills at most 32 KiB (netlink_recvmsg)
_ATTEMPTS = 3
_MOST_FILTERED = 1024  # ports; the bytecode's jumps reach four times as far


class _TryAgain(Exception):
    """The kernel says that the table changed under this dump."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenConnections:
    """What was open when it was read."""

    sockets: np.ndarray  # OPEN_SOCKET rows
    listening: frozenset[Service]  # services with a listener on at least one port
    bogons: int  # connections from 0:ffff::/32, which has no key; not in `sockets`


def open_connections(ports: Mapping[int, Service], *, timeout_s: float = TIMEOUT_S) -> OpenConnections:
    """Every connection to these local ports, in the network namespace of the calling thread.

    Blocks; call it in a thread (asyncio.to_thread). UnavailableError when the kernel cannot tell, has more than
    MOST_SOCKETS of them, or takes longer than `timeout_s` seconds.
    """
    deadline_s = time.monotonic() + timeout_s
    messages = bytearray()
    for family in (socket.AF_INET, socket.AF_INET6) if ports else ():
        _append_table(messages, family, ports, deadline_s)
    return decode(messages, ports)


def decode(messages: bytes | bytearray, ports: Mapping[int, Service]) -> OpenConnections:
    """The same from inet_diag_msg structures (linux/inet_diag.h), one after the other."""
    rows = np.frombuffer(messages, _MESSAGE)
    services = np.full(1 << 16, -1, np.int8)
    for port, service in ports.items():
        services[port] = service
    is_wanted = services[rows["port"]] >= 0
    listeners = rows[is_wanted & (rows["state"] == _LISTEN)]
    is_wanted &= np.isin(rows["state"], _COUNTED) & (rows["timer"] != _TIMER_TIME_WAIT)
    is_wanted &= _was_accepted(rows, listeners)
    live = np.flatnonzero(is_wanted)
    live = live[np.unique(rows["cookie"][live], return_index=True)[1]]
    found = np.zeros(len(live), OPEN_SOCKET)
    found["hi"], found["lo"], found["ipv4"], is_bogon = _keys(rows["family"][live], rows["peer"][live])
    found["cookie"], found["state"] = rows["cookie"][live], rows["state"][live]
    found["service"] = services[rows["port"][live]]
    return OpenConnections(
        sockets=found[~is_bogon],
        listening=frozenset(Service(int(number)) for number in np.unique(services[listeners["port"]])),
        bogons=int(np.count_nonzero(is_bogon)),
    )


def per_prefix(found: OpenConnections, level: Level) -> np.ndarray:
    """Open connections by prefix and service at one level: PREFIX_COUNT rows, ordered by service, hi, lo.

    IPv4 has no /128 and no /32 level: its connections are left out there.
    """
    rows = found.sockets
    if level in (Level.L128, Level.L32):
        rows = rows[~rows["ipv4"]]
    high, low = mask(LENGTHS[level])
    keys = np.stack((rows["service"].astype(np.uint64), rows["hi"] & np.uint64(high), rows["lo"] & np.uint64(low)))
    keys = keys[:, np.lexsort(keys[::-1])]
    is_first = np.ones(len(rows), np.bool_)
    is_first[1:] = (keys[:, 1:] != keys[:, :-1]).any(axis=0)
    first = np.flatnonzero(is_first)
    counts = np.empty(len(first), PREFIX_COUNT)
    counts["service"], counts["hi"], counts["lo"] = keys[:, first]
    counts["count"] = np.diff(first, append=len(rows))
    return counts


def _was_accepted(rows: np.ndarray, listeners: np.ndarray) -> np.ndarray:
    """Whether each was made by a listener, as far as can be known: sock_diag does not tell which end opened it.

    A port that is listened on takes connections at the listeners' addresses only. Where nobody listens, the server
    may have stopped listening and kept its connections: the port alone decides.
    """
    here = np.isin(_endpoints(rows), _endpoints(listeners))
    anywhere = np.isin(_endpoints(rows, any_address=True), _endpoints(listeners))
    return here | anywhere | ~np.isin(rows["port"], listeners["port"])


def _endpoints(rows: np.ndarray, *, any_address: bool = False) -> np.ndarray:
    """Family, local port and local address (or the unspecified one) as one comparable value each."""
    ends = np.zeros(len(rows), [("family", "u1"), ("port", ">u2"), ("address", "S16")])
    ends["family"], ends["port"] = rows["family"], rows["port"]
    if not any_address:
        ends["address"] = rows["address"]
    return ends.view("S19")


def _keys(family: np.ndarray, peer: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """hi, lo, whether it is IPv4, and whether it has no key: edge.core.prefix.key() of each peer."""
    high, low = peer.astype(np.uint64).T
    last, half = low & np.uint64(0xFFFFFFFF), np.uint64(32)
    carriers = [
        family == socket.AF_INET,  # its four bytes stand first
        (high == 0) & (low >> half == 0xFFFF),
        (high == 0x0064FF9B << 32) & (low >> half == 0) | (high >> np.uint64(16) == 0x0064FF9B0001),
        high >> np.uint64(48) == 0x2002,
        high >> half == 0x20010000,
    ]
    six_to_four = high >> np.uint64(16) & np.uint64(0xFFFFFFFF)
    carried = np.select(carriers, [high >> half, last, last, six_to_four, last ^ np.uint64(0xFFFFFFFF)])
    is_ipv4 = np.logical_or.reduce(carriers)
    hi = np.where(is_ipv4, carried | np.uint64(IPV4_SPACE << 32), high)
    return hi, np.where(is_ipv4, np.uint64(0), low), is_ipv4, ~is_ipv4 & (high >> half == IPV4_SPACE)


def _append_table(messages: bytearray, family: int, ports: Mapping[int, Service], deadline_s: float) -> None:
    """Append the inet_diag_msg of every socket of a family on these ports; again when the kernel lost some of it."""
    request, before = _request(family, ports), len(messages)
    for _ in range(_ATTEMPTS):
        del messages[before:]
        try:
            return _dump(messages, request, deadline_s)
        except _TryAgain:
            continue
        except TimeoutError:
            raise UnavailableError("kernel's socket table: not read within the time allowed") from None
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise UnavailableError(f"kernel's socket table: {_explained(error)}") from error
    raise UnavailableError(f"kernel's socket table: incomplete in each of {_ATTEMPTS} readings")


def _explained(error: OSError) -> str:
    """An error in words, with what to do where that is known."""
    advice = {
        errno.ENOENT: "the kernel cannot list TCP sockets: modprobe tcp_diag",
        errno.EPROTONOSUPPORT: "the kernel has no sock_diag: modprobe inet_diag tcp_diag",
        errno.EAFNOSUPPORT: "netlink sockets are not allowed here: add AF_NETLINK to RestrictAddressFamilies",
    }
    return advice.get(error.errno or 0, error.strerror or str(error))


def _request(family: int, ports: Mapping[int, Service]) -> bytes:
    """A request for the listeners and the counted states of a family on these ports."""
    states = sum(1 << state for state in (*_COUNTED, _LISTEN))
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, states)
    if len(ports) <= _MOST_FILTERED:
        program = _port_filter(ports)
        body += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(program), _INET_DIAG_REQ_BYTECODE) + program
    flags = _NLM_F_REQUEST | _NLM_F_DUMP
    return _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, flags, 1, 0) + body


def _port_filter(ports: Mapping[int, Service]) -> bytes:
    """Bytecode for "the local port is one of these": only for speed, as a mail host may hold more IMAP than SMTP.

    A condition that holds goes on to the jump behind it, which leads to the end (accepted); one that does not skips
    that jump. The last has no jump: to skip beyond the end means refused (net/ipv4/inet_diag.c).
    """
    program = b""
    for port in ports:  # from the last to the first: a jump must know how far the end is
        jump = _JUMP.pack(_INET_DIAG_BC_JMP, _JUMP.size, _JUMP.size + len(program)) if program else b""
        skip = _CONDITION.size + _JUMP.size
        program = _CONDITION.pack(_INET_DIAG_BC_S_COND, _CONDITION.size, skip, 0, 0, port) + jump + program
    return program


def _dump(messages: bytearray, request: bytes, deadline_s: float) -> None:
    """Send a request and append its whole answer."""
    buffer = bytearray(_DATAGRAM_BYTES)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as sock:
        sock.sendto(request, (0, 0))
        is_last = False
        while not is_last:
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0:
                raise TimeoutError
            sock.settimeout(remaining_s)
            length, _, flags, sender = sock.recvmsg_into([buffer])
            if sender[0] != 0:  # not the kernel: other programs may write to this socket
                continue
            if flags & socket.MSG_TRUNC:
                raise UnavailableError(f"kernel's socket table: a datagram exceeds {_DATAGRAM_BYTES} bytes")
            is_last = append_messages(messages, memoryview(buffer)[:length])
            if len(messages) > MOST_SOCKETS * _MESSAGE_BYTES:
                raise UnavailableError(f"kernel's socket table: expected at most {MOST_SOCKETS} sockets, found more")


def append_messages(messages: bytearray, datagram: memoryview) -> bool:
    """Append the inet_diag_msg structures of one netlink datagram; whether the dump ended with it.

    OSError is the kernel's own answer; UnavailableError says that the datagram makes no sense.
    """
    at, end = 0, len(datagram)
    while at + _HEADER.size <= end:
        length, kind, flags, _, _ = _HEADER.unpack_from(datagram, at)
        if length < _LEAST_BYTES.get(kind, _HEADER.size) or at + length > end:
            raise UnavailableError(f"kernel's socket table: message of type {kind} has a length of {length} bytes")
        if flags & _NLM_F_DUMP_INTR:
            raise _TryAgain
        body = at + _HEADER.size
        if kind == _SOCK_DIAG_BY_FAMILY:
            messages += datagram[body : body + _MESSAGE_BYTES]
        elif kind in (_NLMSG_ERROR, _NLMSG_DONE):
            _raise_error(datagram[body : at + length])
            return True
        at += length + 3 & ~3
    return False


def _raise_error(body: memoryview) -> None:
    """Raise what an end or error message says; 0 is success, an older kernel's end says nothing."""
    number = -_ERROR.unpack_from(body)[0] if len(body) >= _ERROR.size else 0
    if number:
        raise OSError(number, os.strerror(number))
