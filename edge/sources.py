"""The evidence sources of a configuration, made and read."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from edge.config import Config
from edge.core.model import Event
from edge.evidence.jsonl import JsonLines
from edge.evidence.postfix_log import PostfixLog
from edge.evidence.socket import EventSocket
from edge.evidence.stats import SourceStats
from edge.evidence.tail import Tail, TailSource

log = logging.getLogger(__name__)


class Sources:
    """All of them, polled together."""

    def __init__(self, config: Config, now_s: Callable[[], float]) -> None:
        evidence = config.evidence
        logs = [Path(name) for name in evidence.postfix.logs]
        self._tails = [
            TailSource(
                "postfix" if len(logs) == 1 else f"postfix_{number}",
                Tail(path, evidence.postfix.tail),
                PostfixLog(evidence.postfix.lines),
                now_s,
            )
            for number, path in enumerate(logs, 1)
        ]
        self._paths = {tail.stats().name: path for tail, path in zip(self._tails, logs, strict=True)}
        decoder = JsonLines(mx_ports=config.services.mx, submission_ports=config.services.submission)
        path = evidence.socket.path
        self._socket = EventSocket(Path(path), evidence.socket, now_s, decoder=decoder) if path else None

    async def start(self) -> None:
        """Listen on the event socket; say which logs are not there, since without evidence nothing is learned."""
        for name in self._paths:
            trouble = self.trouble(name)
            if trouble is not None:
                remedy = "name the mail log in [evidence.postfix] logs, let rsyslog or Postfix's maillog_file write one"
                log.warning("no evidence from Postfix", extra={"fields": {"because": trouble, "remedy": remedy}})
        if self._socket is not None:
            await self._socket.start()

    async def stop(self) -> None:
        """Close files and socket."""
        for tail in self._tails:
            tail.close()
        if self._socket is not None:
            await self._socket.stop()

    def trouble(self, name: str) -> str | None:
        """Why a source cannot give any evidence now, in words; None when it can."""
        path = self._paths.get(name)
        if path is None or os.access(path, os.R_OK):
            return None
        return f"{path} is unreadable" if os.access(path, os.F_OK) else f"no {path}"

    def poll(self) -> list[Event]:
        """Events since the last call, in order of arrival."""
        events = [event for tail in self._tails for event in tail.poll()]
        if self._socket is not None:
            events += self._socket.poll()
        events.sort(key=lambda event: event.ts_s)
        return events

    def stats(self) -> list[SourceStats]:
        """What every source says of itself."""
        stats = [tail.stats() for tail in self._tails]
        return stats if self._socket is None else [*stats, self._socket.stats()]
