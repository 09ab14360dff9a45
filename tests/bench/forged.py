"""Floods of forged SYNs: as many as the machine can make, from a process of their own that is pinned to one CPU.

The generator of the live frames writes them, with right checksums, so that TCP answers each that reaches it.

Invariants:
    flood-ends-with-us: the flooding process ends when the benchmark does, however that ended.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Any

import numpy as np

from edge.errors import EdgeError, UnavailableError
from edge.lab import network
from edge.lab.forge import internet_checksum
from edge.lab.network import Namespace
from tests import packets as p
from tests.bench.honest import SITE
from tests.bench.limiter import EVERY_SOURCE, HERE, RANDOM, STEERING, ZERO, cut, load, steering_map
from tests.bench.measure import Softirq, live
from tests.bench.packets import FIRST, OPTIONS

TURN_S = 0.25
"""Length of one call of the generator: long against the milliseconds it takes to begin one."""

LEAST_FRAMES, MOST_FRAMES = 10_000, 1_000_000
"""Of one call."""

SWEEP, ONE_SITE = "sweep", "one /48"
CUTS: dict[str, tuple[tuple[str, str], ...]] = {
    SWEEP: (),
    ONE_SITE: (
        (r"low = number \* 0x9e3779b1u;", f"low = 0x{SITE & 0xFFFF:x}0000u | (number & 0xffff);"),
        (r"source\[3\] = ~top;", "source[3] = (~number & 0xffff0000) | number >> 16;"),
    ),
}
"""The floods, and what is written otherwise in steer.h for them. Sweep: /64s of 65,536 provider prefixes. One /48: its
/64s and random addresses in them, with the same checksum throughout, since half of each is the complement of the other.
"""

FIRST_SOURCE = {SWEEP: FIRST, ONE_SITE: "2001:db8:f100:0:eff:ffff:ffff:0"}
"""A source that the generator makes, for the checksum."""


class Generator:
    """The sending program for one flood."""

    def __init__(self, flood: str, outside: Namespace) -> None:
        steer = cut((HERE / "steer.h").read_text(), CUTS[flood])
        text = "\n".join(("#include <uapi/linux/bpf.h>", steer, (HERE / "generator.c").read_text(), ""))
        self._bpf, programs = load(text, [], ("generate",))
        self.program, self.frame = programs["generate"], frame(FIRST_SOURCE[flood])
        record = np.zeros((), STEERING)
        record["frame"][: len(self.frame)] = np.frombuffer(self.frame, np.uint8)
        record["order"], record["sources"], record["spread"] = RANDOM, EVERY_SOURCE, flood == SWEEP
        with outside.entered():
            record["ifindex"] = socket.if_nametoindex(network.CLIENT_LINK)
        self._steering = steering_map(self._bpf)
        self._steering.put(ZERO, record)


def frame(source: str) -> bytes:
    """A SYN as Linux sends it, with a right checksum for this source and all that the generator makes of it."""
    segment = bytearray(p.tcp(25, words=10) + OPTIONS)
    packet = p.ipv6(source, bytes(segment), to=network.SERVER_V6)
    pseudo = packet[8:40] + len(segment).to_bytes(4) + p.TCP.to_bytes(4)  # RFC 8200 8.1
    segment[16:18] = internet_checksum(pseudo + segment).to_bytes(2)
    link = bytes.fromhex((network.SERVER_MAC + network.CLIENT_MAC).replace(":", ""))
    return link + p.ethernet(packet[:40] + segment)[len(link) :]


def _flood(generator: Generator, namespace: Namespace, cpu: int, stop: Event, report: Connection) -> None:
    """Send until told to stop, or until the benchmark is gone. Reports when it has begun, and what it sent."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us too, but the benchmark decides
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # unlike the benchmark, which must not wait for it
    os.sched_setaffinity(0, {cpu})
    softirq, parent = Softirq(cpu), os.getppid()
    count, sent, began_s = LEAST_FRAMES, 0, time.monotonic()
    try:
        with namespace.entered():
            while not stop.is_set() and os.getppid() == parent:
                turn_s = time.monotonic()
                live(generator.program, generator.frame, count, softirq)
                sent += count
                if sent == count:
                    report.send(None)
                rate = count / (time.monotonic() - turn_s)
                count = min(MOST_FRAMES, max(LEAST_FRAMES, int(rate * TURN_S)))
        report.send((sent, time.monotonic() - began_s))
    except EdgeError as error:
        report.send(str(error))


class Flooding:
    """What the flood has sent; known when it is over."""

    sent = 0
    seconds = 0.0


@contextmanager
def flooding(generator: Generator, namespace: Namespace, cpu: int) -> Iterator[Flooding]:
    """A flood in a process of its own, so that it takes no time from the senders but on its own CPU."""
    fork = multiprocessing.get_context("fork")  # the child inherits the loaded program
    stop, found = fork.Event(), Flooding()
    here, there = fork.Pipe()
    child = fork.Process(target=_flood, args=(generator, namespace, cpu, stop, there), daemon=True)
    child.start()
    there.close()
    try:
        _heard(here)
        yield found
        stop.set()
        found.sent, found.seconds = _heard(here)
    finally:
        child.terminate()
        child.join()
        here.close()


def _heard(flood: Connection) -> Any:
    """What the flood reports; UnavailableError when it failed."""
    try:
        heard = flood.recv()
    except EOFError:
        raise UnavailableError("the flood ended without a report") from None
    if isinstance(heard, str):
        raise UnavailableError(f"the flood: {heard}")
    return heard
