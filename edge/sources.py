"""The evidence sources of a configuration, made and read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edge.config import Config
from edge.core.model import Event
from edge.evidence.jsonl import JsonLines
from edge.evidence.postfix_log import PostfixLog
from edge.evidence.socket import EventSocket
from edge.evidence.stats import SourceStats
from edge.evidence.tail import Tail, TailSource


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
        decoder = JsonLines(mx_ports=config.services.mx, submission_ports=config.services.submission)
        path = evidence.socket.path
        self._socket = EventSocket(Path(path), evidence.socket, now_s, decoder=decoder) if path else None

    async def start(self) -> None:
        """Listen on the event socket."""
        if self._socket is not None:
            await self._socket.start()

    async def stop(self) -> None:
        """Close files and socket."""
        for tail in self._tails:
            tail.close()
        if self._socket is not None:
            await self._socket.stop()

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
