"""The embedded MTA: aiosmtpd in a process of its own, for hosts without Postfix.

It knows the same users and the same rules as the lab's Postfix, writes a journal of what reached it (one JSON object a
line), and tells the daemon its verdicts as JSON lines on the event socket, as any MTA may.

Invariants:
    every-connection-is-reported-once: each accepted connection gives one journal line and one line of evidence.
    evidence-is-bounded: while the daemon is away at most MAX_PENDING lines wait; more are dropped and counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import time
from collections import deque
from pathlib import Path
from typing import Any, TextIO

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, Session

from edge.lab import plan

log = logging.getLogger(__name__)

MAX_PENDING = 10_007
"""Lines of evidence kept while the event socket is not there; a lab's MTA accepts a few hundred."""

RETRY_S = 0.2
"""Pause before the event socket is tried again."""


class EventSender:
    """Carries lines to the daemon's event socket, and comes back when the daemon does."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self.dropped = 0

    def put(self, record: dict[str, Any]) -> None:
        """Queue one line."""
        if len(self._pending) >= MAX_PENDING:
            self.dropped += 1
            log.warning("evidence dropped, %d so far: the event socket is away", self.dropped)
            return
        self._pending.append(json.dumps(record).encode() + b"\n")
        self._wake.set()

    async def run(self) -> None:
        """Send for ever."""
        while True:
            try:
                _, writer = await asyncio.open_unix_connection(str(self._path))
            except OSError:  # the daemon is not there yet, or is being restarted
                await asyncio.sleep(RETRY_S)
                continue
            try:
                await self._drain(writer)
            except OSError as error:
                log.warning("event socket lost: %s", error)
            finally:
                writer.close()

    async def _drain(self, writer: asyncio.StreamWriter) -> None:
        while True:
            while self._pending:
                writer.write(self._pending[0])
                await writer.drain()
                self._pending.popleft()
            self._wake.clear()
            await self._wake.wait()


class Journal:
    """What reached the MTA, one JSON object a line."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def write(self, **record: object) -> None:
        """One line."""
        self._out.write(json.dumps(record) + "\n")


class Rules:
    """The handler aiosmtpd asks during one connection: who exists, what is refused. Keeps the connection's evidence."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.seen: dict[str, Any] = {"verdict": "none", "rcpt_ok": 0, "rcpt_bad": 0}

    async def handle_RCPT(
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _options: list[str]
    ) -> str:
        """Answer one RCPT TO as the lab's Postfix would."""
        user, _, domain = address.partition("@")
        if (envelope.mail_from or "").endswith("@" + plan.LISTED_DOMAIN):
            return self._refuse("policy_reject", f"554 5.7.1 <{envelope.mail_from}>: Sender address rejected")
        if domain != plan.DOMAIN:
            return self._refuse("policy_reject", f"554 5.7.1 <{address}>: Relay access denied")
        if user not in plan.USERS:
            return self._refuse("unknown_user", f"550 5.1.1 <{address}>: User unknown")
        envelope.rcpt_tos.append(address)
        self.seen["rcpt_ok"] += 1
        return "250 2.1.5 Ok"

    async def handle_DATA(self, _server: SMTP, session: Session, envelope: Envelope) -> str:
        """Accept or refuse one message by its header."""
        content = envelope.content if isinstance(envelope.content, bytes) else b""
        header = content.partition(b"\r\n\r\n")[0].decode("ascii", "replace").splitlines()
        if plan.SPAM_HEADER in header:
            self.seen["verdict"] = "spam"
            return "550 5.7.1 spam"
        fields = (line.partition(":") for line in header)
        identity = next((value.strip() for name, _, value in fields if name.lower() == "message-id"), "")
        self._journal.write(event="accept", src=_host(session), message_id=identity)
        self.seen["verdict"] = "ham"
        return "250 2.0.0 Ok: queued"

    def _refuse(self, verdict: str, reply: str) -> str:
        self.seen["verdict"] = verdict
        self.seen["rcpt_bad"] += 1
        return reply

    def authenticate(self, *_arguments: object) -> AuthResult:
        """No password is right here; AUTH is offered so that guessing can be seen."""
        self.seen["verdict"] = "auth_fail"
        return AuthResult(success=False, handled=False)


def _host(session: Session) -> str:
    """The address of the client."""
    return session.peer[0] if session.peer else ""


class Connection(SMTP):
    """One SMTP connection that reports its beginning and its end."""

    def __init__(self, journal: Journal, events: EventSender) -> None:
        self._rules = Rules(journal)
        self._journal = journal
        self._evidence = events
        self._source = ""
        super().__init__(
            self._rules,
            hostname=plan.DOMAIN,
            ident="ESMTP embedded",
            timeout=60,
            auth_require_tls=False,
            authenticator=self._rules.authenticate,
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client reached the MTA."""
        self._source = transport.get_extra_info("peername")[0]
        self._journal.write(event="connect", src=self._source)
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        """The connection is over: its verdict is known."""
        evidence = {"ts": time.time(), "src": self._source, "dport": 25, "handshake": True}
        self._evidence.put(evidence | {"mta": self._rules.seen})
        super().connection_lost(error)


async def serve(listen: list[str], journal_path: Path, events_path: Path) -> None:
    """Serve port 25 on the addresses until SIGTERM."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    events = EventSender(events_path)
    with journal_path.open("a", buffering=1) as out:
        journal = Journal(out)
        server = await loop.create_server(lambda: Connection(journal, events), listen, 25, backlog=1024)
        sender = asyncio.create_task(events.run())
        journal.write(event="ready")
        await stop.wait()
        server.close()
        sender.cancel()


def main() -> None:
    """Run as a child process of the lab."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", action="append", required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--events", type=Path, required=True)
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.listen, arguments.journal, arguments.events))


if __name__ == "__main__":
    main()
