"""Says when somebody else changed our nftables table, by the kernel's own notifications.

Every commit to a ruleset is announced on the netlink group of nftables, object by object, with the netlink port of
who made it. So a change to another
table costs no listing of ours.

Invariants:
    foreign-change-is-noticed: after another process changed the table, `touched` is true once.
    own-and-unrelated-changes-are-not: our commits, and changes to other tables, do not make it true.
    lost-messages-count-as-touched: when the kernel could not deliver, `touched` is true.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import socket
import struct
from collections.abc import Iterator

# linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h, linux/netfilter.h
_NETLINK_NETFILTER = 12
_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_NFNLGRP_NFTABLES = 7
_NFNL_SUBSYS_NFTABLES = 10
_NFT_MSG_NEWGEN = 15
_NFPROTO_INET = 1
_SO_RCVBUFFORCE = 33
_SO_ATTACH_FILTER = 26
_SO_DETACH_FILTER = 27
_BPF_LOAD_WORD, _BPF_JUMP_EQUAL, _BPF_RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h: LD|W|ABS, JMP|JEQ|K, RET|K

_HEADER = struct.Struct("=IHHIIBBHHH")  # nlmsghdr, nfgenmsg, header of the first attribute: always the table's name
_BUFFER_BYTES = 1 << 25  # the announcement of 15,000 elements with one 1 KiB buffer each, doubled; a limit, not a cost
_DATAGRAM_BYTES = 1 << 17
_MOST_DATAGRAMS = 1 << 16  # per reading; more than the buffer holds


class Watch:
    """Listens in the network namespace it is made in."""

    def __init__(self, table: str) -> None:
        self._table = table.encode() + b"\0"
        self._own_port: int | None = None
        self._touched = False
        self.lost = 0
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_NETFILTER)
        with contextlib.suppress(PermissionError):  # without CAP_NET_ADMIN the default size: more is lost, and counted
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        self._socket.bind((0, 0))
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)

    def before_commit(self) -> None:
        """Call before each commit of ours: what is waiting was not ours."""
        if self._own_port is None:
            self._read()

    def after_commit(self) -> None:
        """Call after each commit of ours, which has been announced by now: the first one tells our port."""
        if self._own_port is not None:
            return
        ports = self._read(learn=True)
        if len(ports) == 1:
            self._own_port = ports.pop()
            self._filter(self._own_port)
        elif ports:
            self._touched = True  # two at once: cannot tell which was ours

    def touched(self) -> bool:
        """Whether the table may differ from what our commits made it, since this was asked last."""
        self._read()
        touched, self._touched = self._touched, False
        if touched and self._own_port is not None:  # libnftables may have changed its socket: learn again
            self._own_port = None
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
        return touched

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()

    def _read(self, *, learn: bool = False) -> set[int]:
        """Take every waiting message; note foreign ones to our table, unless `learn`; returns the ports seen."""
        ports = set()
        for data in self._datagrams():
            at = 0
            while at + _HEADER.size <= len(data):
                length, kind, _, _, port, family, _, _, name_length, _ = _HEADER.unpack_from(data, at)
                ports.add(port)
                nft = kind >> 8 == _NFNL_SUBSYS_NFTABLES and kind & 0xFF != _NFT_MSG_NEWGEN
                if nft and not learn and port != self._own_port and family == _NFPROTO_INET:
                    name = data[at + _HEADER.size : at + _HEADER.size + name_length - 4]
                    self._touched |= name == self._table
                at += max(length + 3 & ~3, _HEADER.size)
        return ports

    def _filter(self, port: int) -> None:
        """Let the kernel keep messages of this port from us; all messages of a datagram are of one commit."""
        port_as_loaded = int.from_bytes(struct.pack("=I", port), "big")
        program = b"".join(
            struct.pack("=HBBI", *instruction)
            for instruction in (
                (_BPF_LOAD_WORD, 0, 0, 12),  # nlmsg_pid of the first message
                (_BPF_JUMP_EQUAL, 0, 1, port_as_loaded),
                (_BPF_RETURN, 0, 0, 0),
                (_BPF_RETURN, 0, 0, 0xFFFFFFFF),
            )
        )
        buffer = ctypes.create_string_buffer(program)
        self._socket.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
        )

    def _datagrams(self) -> Iterator[bytes]:
        for _ in range(_MOST_DATAGRAMS):
            try:
                yield self._socket.recv(_DATAGRAM_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.lost += 1
                self._touched = True
        self._touched = True
