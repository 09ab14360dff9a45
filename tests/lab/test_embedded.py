import asyncio
import io
import json
import smtplib
from contextlib import suppress
from pathlib import Path
from typing import Any

from edge.core.model import Verdict
from edge.evidence.jsonl import JsonLines
from edge.lab import plan
from edge.lab.embedded import MAX_PENDING, Connection, EventSender, Journal


def talk(port: int, kind: str) -> None:
    """One client: an honest message, or what a campaign would try."""
    with (
        smtplib.SMTP("127.0.0.1", port, local_hostname="client.example", timeout=20) as client,
        suppress(smtplib.SMTPException),
    ):
        match kind:
            case "ham":
                client.sendmail("a@a.example", [f"alice@{plan.DOMAIN}"], "Message-ID: <1@a.example>\n\nhello")
            case "unknown_user":
                client.sendmail("a@a.example", [f"nobody@{plan.DOMAIN}"], "hello")
            case "policy_reject":
                client.sendmail(f"a@{plan.LISTED_DOMAIN}", [f"alice@{plan.DOMAIN}"], "hello")
            case "spam":
                client.sendmail("a@a.example", [f"alice@{plan.DOMAIN}"], f"{plan.SPAM_HEADER}\n\nhello")
            case "auth_fail":
                client.login("alice", "summer")
            case "none":
                client.noop()


async def serve(path: Path, kinds: list[str]) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Serve one client of each kind; the journal's records and the lines of evidence."""
    lines: list[bytes] = []
    taken = asyncio.Event()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            lines.append(line)
        writer.close()
        await writer.wait_closed()
        taken.set()

    out = io.StringIO()
    events = EventSender(path)
    listener = await asyncio.start_unix_server(take, path)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(Journal(out), events), "127.0.0.1", 0)
    sending = asyncio.create_task(events.run())
    async with listener, server, asyncio.timeout(30):
        for kind in kinds:
            await asyncio.to_thread(talk, server.sockets[0].getsockname()[1], kind)
        while len(lines) < len(kinds):
            await asyncio.sleep(0.01)
        sending.cancel()
        with suppress(asyncio.CancelledError):
            await sending
        await taken.wait()
    return [json.loads(line) for line in out.getvalue().splitlines()], lines


def test_every_connection_is_reported_once(tmp_path: Path) -> None:
    kinds = ["ham", "unknown_user", "policy_reject", "spam", "auth_fail", "none", "ham"]
    records, lines = asyncio.run(serve(tmp_path / "events.sock", kinds))
    assert [record["event"] for record in records].count("connect") == len(kinds)
    assert [record["message_id"] for record in records if record["event"] == "accept"] == ["<1@a.example>"] * 2
    decoder = JsonLines()
    events = [decoder.feed(line, None) for line in lines]
    assert decoder.unknown_keys == 0
    assert [event.verdict for event in events if event is not None] == [Verdict[kind.upper()] for kind in kinds]


def test_evidence_is_bounded(tmp_path: Path) -> None:
    async def fill() -> int:
        events = EventSender(tmp_path / "nobody.sock")
        for number in range(MAX_PENDING + 7):
            events.put({"n": number})
        return events.dropped

    assert asyncio.run(fill()) == 7
