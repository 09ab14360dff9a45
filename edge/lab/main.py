"""`edge lab`: real mail and real attacks against the real daemon, in namespaces of its own, in about a minute.

    make the namespaces -> start the MTA and the daemon -> send the plan and watch -> count -> remove everything

Nothing in the product is tuned for it: the daemon runs with default limits, its configuration holds only the mode and
the paths.

Invariants:
    nothing-is-left: whatever way it ends, Ctrl-C and SIGTERM included, everything it made is removed; what a killed lab
        left behind is removed by the next one.
    one-object-on-stdout: with --json standard output holds one JSON object and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from edge import config, render
from edge.control import call
from edge.errors import UnavailableError, UsageError
from edge.lab import completion, network, plan, report
from edge.lab.mta import Arrivals, Mta, choose
from edge.lab.network import Network
from edge.lab.process import Child, in_cgroup, wait_for
from edge.lab.progress import Progress
from edge.lab.report import Result
from edge.lab.traffic import Traffic
from edge.lab.watch import Watch

SEED = 20_261_122
"""Sources and pauses come from it, so two runs send the same plan."""

DAEMON_S = 60.0
"""Time the daemon gets to answer: it compiles its kernel programs first, which takes seconds."""

SETTLE_S = 10.0
"""Time the MTA gets to log its last deliveries after the last client is done."""

OPEN_FILES = 16_384
"""Sockets that may be open at once: some hundred connection attempts of each campaign wait for their timeout."""

Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None

TOOLS = {"ip": "iproute2", "nsenter": "util-linux", "mount": "util-linux", "nft": "nftables"}


def run(*, mta: str = "auto", json_output: bool = False, keep: bool = False, seconds: int | None = None) -> int:
    """Run the lab and print the table, or one JSON object; the exit code.

    `mta` is auto, postfix or embedded; `keep` leaves everything in place for a look around; `seconds` is the length of
    the sending phase. UsageError, or UnavailableError when a piece is missing or failed.
    """
    length_s = plan.DEFAULT_SECONDS if seconds is None else seconds
    if not plan.MIN_SECONDS <= length_s <= plan.MAX_SECONDS:
        raise UsageError(f"--seconds: expected {plan.MIN_SECONDS} to {plan.MAX_SECONDS}, found {length_s}")
    _require_tools()
    progress = Progress()
    with _stoppable() as stop:
        try:
            with _lab(progress, keep=keep) as lab:
                result, explanation = lab.show(mta, length_s)
        except KeyboardInterrupt:
            progress.say("interrupted" + ("" if keep else "; everything the lab made is removed"))
            return 128 + stop.number
    if json_output:
        print(json.dumps(result.as_json(), indent=2))  # noqa: T201 - the promised output
    else:
        report.render(result, explanation, render.console(sys.stdout))
    return 0


@dataclass(slots=True)
class _Stop:
    """The signal that asked the lab to end."""

    number: int = signal.SIGINT


@contextmanager
def _stoppable() -> Iterator[_Stop]:
    """SIGTERM and a lost terminal end the lab the way Ctrl-C does: there is one way out, through the removal."""
    stop = _Stop()

    def interrupt(number: int, _frame: FrameType | None) -> None:
        stop.number = number
        signal.raise_signal(signal.SIGINT)

    # A shell that starts the lab in the background has SIGINT ignored; SIGTERM must work even then.
    handlers = {
        signal.SIGTERM: interrupt,
        signal.SIGHUP: interrupt,
        signal.SIGINT: signal.default_int_handler,
    }
    with _handled(handlers):
        yield stop


@contextmanager
def _handled(handlers: Mapping[signal.Signals, Handler]) -> Iterator[None]:
    """Inside, signals are handled so; afterwards as before."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_UNSTOPPABLE: Mapping[signal.Signals, Handler] = dict.fromkeys(
    (signal.SIGTERM, signal.SIGHUP, signal.SIGINT), signal.SIG_IGN
)
"""While things are removed Ctrl-C and its like change nothing: removal is quick and must be whole."""


@contextmanager
def _lab(progress: Progress, *, keep: bool) -> Iterator[Lab]:
    """A lab with its network made; removed at the end."""
    for old in network.leftovers():
        progress.say(f"removing what process {old.pid} left behind")
        _remove(old, progress)
    net = Network(pid=os.getpid())
    try:
        directory = Path(tempfile.mkdtemp(prefix=f"{net.name}-"))
        directory.chmod(0o755)  # Postfix's own user must pass through it
        net.make()
        lab = Lab(net, directory, progress)
        try:
            yield lab
        finally:
            if not keep:
                with _handled(_UNSTOPPABLE):
                    lab.stop()
    finally:
        if keep:
            progress.say(f"kept until the next lab: {net.server.name}, {net.client.name}, {net.pins}, {directory}")
        else:
            with _handled(_UNSTOPPABLE):
                _remove(net, progress)


def _remove(net: Network, progress: Progress) -> None:
    for problem in net.remove():
        progress.say(f"could not remove everything: {problem}")
    for directory in Path(tempfile.gettempdir()).glob(f"{net.name}-*"):
        shutil.rmtree(directory, ignore_errors=True)


class Lab:
    """One run: the MTA, the daemon, the traffic and what came of it."""

    def __init__(self, net: Network, directory: Path, progress: Progress) -> None:
        self._net = net
        self._directory = directory
        self._progress = progress
        self._mta: Mta | None = None
        self._daemon: Child | None = None
        self._control = directory / "control.sock"

    def show(self, wanted_mta: str, seconds: float) -> tuple[Result, dict[str, Any]]:
        """Start everything, send the plan, count; the result and the explanation of one attacker."""
        mta, why = choose(wanted_mta, self._net, self._directory, self._directory / "events.sock")
        self._mta = mta
        self._progress.say(f"MTA: {mta.name} ({why})")
        mta.start()
        configuration = self._start_daemon(mta)
        traffic = Traffic(seconds, SEED)
        watch = Watch(self._control, self._net.server, configuration.nftables.table, self._check)
        self._progress.say(f"sending: {len(plan.SENDERS)} honest senders, {len(plan.CAMPAIGNS)} campaigns, 1 forger")
        _allow_open_files()
        with self._net.client.entered():
            asyncio.run(self._send(traffic, watch))
        arrivals = _settle(mta, traffic)
        watch.look()
        completed = completion.completed(completion.verdicts(traffic))
        blocks = sorted(watch.blocks.values(), key=lambda block: block.seen_s)
        result = report.collect(traffic, arrivals, blocks, completed, mta=mta.name, tick_s=configuration.tick_s)
        return result, self._explain(traffic)

    def stop(self) -> None:
        """End the daemon and the MTA."""
        if self._daemon is not None:
            self._daemon.stop()
        if self._mta is not None:
            self._mta.stop()

    def _start_daemon(self, mta: Mta) -> config.Config:
        """Start `edge run` beside the MTA; returns when it answers on its control socket."""
        path = self._directory / "edge.toml"
        path.write_text(_toml(self._sections(mta)))
        configuration = config.load(path)
        arguments = [sys.executable, "-m", "edge.cli", "--config", str(path), "run"]
        command = self._net.server.command(in_cgroup(self._net.cgroup, arguments))
        daemon = Child("the daemon", command, self._directory / "daemon.log")
        self._daemon = daemon
        wait_for(self._daemon_answers, "the daemon's control socket", seconds=DAEMON_S)
        self._progress.say("daemon: running, mode enforce, default limits")
        return configuration

    def _sections(self, mta: Mta) -> dict[str, dict[str, Any]]:
        """The configuration: the mode, and where things are; everything else keeps its default."""
        return {
            "": {"mode": "enforce"},
            "interfaces": {"names": [network.SERVER_LINK]},
            "paths": {
                "pins": str(self._net.pins),
                "state": str(self._directory / "state"),
                "cgroup": str(self._net.cgroup),
            },
            "control": {"socket": str(self._control)},
            "evidence.postfix": {"logs": [str(path) for path in mta.logs]},
            "evidence.socket": {"path": str(self._directory / "events.sock")},
        }

    def _daemon_answers(self) -> bool:
        self._check()
        try:
            call(self._control, "status")
        except UnavailableError:
            return False  # not yet
        return True

    def _check(self) -> None:
        """UnavailableError with the last log lines when the daemon or the MTA is gone."""
        if self._daemon is not None:
            self._daemon.check()
        if self._mta is not None:
            self._mta.check()

    async def _send(self, traffic: Traffic, watch: Watch) -> None:
        """The traffic, watched; the first of them to fail ends it."""
        sending = asyncio.create_task(traffic.run())
        tasks = {
            sending,
            asyncio.create_task(watch.run()),
            asyncio.create_task(self._progress.follow(traffic, watch)),
        }
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _explain(self, traffic: Traffic) -> dict[str, Any]:
        """`edge explain` of the flood's last source."""
        return call(self._control, "explain", what=traffic.campaigns[0].attempts[-1].source, service="mx")


def _settle(mta: Mta, traffic: Traffic) -> Arrivals:
    """The MTA's log once it holds every message that a client was told is accepted, or after SETTLE_S."""
    accepted = {identity for run in traffic.senders for identity in run.accepted}
    with suppress(UnavailableError):  # the table says what is missing
        wait_for(lambda: accepted <= mta.arrivals().delivered, "the MTA's log of its last deliveries", seconds=SETTLE_S)
    return mta.arrivals()


def _toml(sections: dict[str, dict[str, Any]]) -> str:
    """Sections of strings and lists of strings as TOML, whose basic strings are written as JSON's."""
    lines = []
    for section, values in sections.items():
        lines += [f"\n[{section}]"] if section else []
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def _require_tools() -> None:
    if os.geteuid() != 0:
        raise UnavailableError("edge lab makes network namespaces and loads kernel programs: run it as root")
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            raise UnavailableError(f"the program `{tool}` is missing: install {package}")


def _allow_open_files() -> None:
    """Raise the soft limit on open files as far as needed and allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
