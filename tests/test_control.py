import asyncio
import grp
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge import control
from edge.control import LONGEST_REPLY, LONGEST_REQUEST, MOST_CONNECTIONS, ControlServer, Handlers, call
from edge.errors import ConfigError, EdgeError, InputError, UnavailableError, UsageError

Answer = dict[str, Any]


def fail_with(error: Exception) -> Callable[[Answer], Answer]:
    def handler(_: Answer) -> Answer:
        raise error

    return handler


HANDLERS: Handlers = {
    "echo": lambda request: {"got": request},
    "big": lambda request: {"text": "x" * request["size"]},
    "usage": fail_with(UsageError("prefix: expected a prefix")),
    "unavailable": fail_with(UnavailableError("nft is gone")),
    "broken": fail_with(KeyError("a defect\nof ours")),
}


def served(path: Path, work: Callable[[], Any], **options: Any) -> Any:
    """The result of `work`, run in a thread while a server answers on `path`."""

    async def main() -> Any:
        server = await ControlServer.start(path, HANDLERS, **options)
        try:
            return await asyncio.to_thread(work)
        finally:
            await server.close()

    return asyncio.run(main())


def raw(path: Path, data: bytes) -> bytes:
    """Everything the server says to `data`."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(path))
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server has had enough; what it said is still there
        chunks = []
        try:
            while chunk := connection.recv(1 << 16):
                chunks.append(chunk)
        except ConnectionResetError:
            pass
        return b"".join(chunks)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "control.sock"


def test_a_request_is_answered(path: Path) -> None:
    answer = served(path, lambda: call(path, "echo", prefix="2001:db8::/48", for_s=None))
    assert answer == {"got": {"prefix": "2001:db8::/48", "for_s": None}}


def test_several_requests_on_one_connection(path: Path) -> None:
    reply = served(path, lambda: raw(path, b'{"verb":"echo","n":2}\n{"verb":"echo","n":3}\n'))
    assert [json.loads(line)["result"]["got"]["n"] for line in reply.splitlines()] == [2, 3]


@pytest.mark.parametrize(
    ("verb", "error", "message"),
    [
        ("usage", UsageError, "prefix: expected a prefix"),
        ("unavailable", UnavailableError, "nft is gone"),
        ("nonsense", UsageError, "expected a verb of big, broken, echo, unavailable, usage, found 'nonsense'"),
        ("broken", EdgeError, "internal error .KeyError.; the daemon's log has the traceback"),
    ],
)
def test_errors_come_back_as_what_they_were(path: Path, verb: str, error: type[EdgeError], message: str) -> None:
    def ask() -> None:
        with pytest.raises(error, match=message) as caught:
            call(path, verb)
        assert type(caught.value) is error

    served(path, ask)


def test_a_defect_is_logged_with_its_traceback(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    served(path, lambda: raw(path, b'{"verb":"broken"}\n'))
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[0] is KeyError


@pytest.mark.parametrize(
    "data",
    [
        b"\n",
        b"{}\n",
        b"[]\n",
        b'{"verb": 7}\n',
        b'{"verb": "echo"',
        b"\xff\xfe\n",
        b"[" * 50_021 + b"\n",
        b'{"verb":"' + b"x" * (LONGEST_REQUEST + 1009) + b'"}\n',
        b"x" * (4 * LONGEST_REQUEST),
    ],
    ids=["empty", "no verb", "list", "number", "cut", "not text", "deep", "long line", "no end"],
)
def test_hostile_client_does_no_harm(path: Path, data: bytes) -> None:
    def attack() -> None:
        reply = json.loads(raw(path, data).splitlines()[0])
        assert reply["ok"] is False
        assert reply["exit"] == InputError.exit_code
        assert len(reply["error"]) < 1009
        assert call(path, "echo", n=7) == {"got": {"n": 7}}

    served(path, attack)


def test_a_silent_client_is_closed_after_the_timeout(path: Path) -> None:
    def wait() -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(str(path))
            connection.sendall(b'{"verb":')
            assert connection.recv(1) == b""

    served(path, wait, timeout_s=0.1)


def test_a_client_that_does_not_read_is_closed_after_the_timeout(path: Path) -> None:
    def wait() -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(str(path))
            connection.sendall(b'{"verb":"big","size":4000037}\n{"verb":"echo"}\n')
            assert call(path, "echo") == {"got": {}}
            deadline = time.monotonic() + 30
            while not peer_has_closed(connection):
                assert time.monotonic() < deadline, "the server still holds the connection"

    served(path, wait, timeout_s=0.1)


def peer_has_closed(connection: socket.socket) -> bool:
    try:
        connection.send(b" ", socket.MSG_DONTWAIT)
    except (BrokenPipeError, ConnectionResetError):
        return True
    except BlockingIOError:
        return False
    return False


def test_connections_are_bounded(path: Path) -> None:
    def crowd() -> None:
        held = [socket.socket(socket.AF_UNIX) for _ in range(MOST_CONNECTIONS)]
        try:
            for connection in held:
                connection.settimeout(30)
                connection.connect(str(path))
                connection.sendall(b'{"verb":"echo"}\n')
                assert connection.recv(1 << 12)
            with pytest.raises(UnavailableError, match=f"{MOST_CONNECTIONS} connections are open already"):
                call(path, "echo")
        finally:
            for connection in held:
                connection.close()
        deadline = time.monotonic() + 30
        while True:
            try:
                assert call(path, "echo") == {"got": {}}
                return
            except UnavailableError:
                assert time.monotonic() < deadline, "closed connections still count"

    served(path, crowd)


def test_a_large_answer_arrives_whole(path: Path) -> None:
    size = LONGEST_REPLY - 1009
    assert len(served(path, lambda: call(path, "big", size=size))["text"]) == size


def test_an_answer_beyond_the_bound_is_refused(path: Path) -> None:
    def ask() -> None:
        with pytest.raises(UsageError, match="ask for less"):
            call(path, "big", size=LONGEST_REPLY)

    served(path, ask)


def test_mode_and_group_are_as_configured(path: Path) -> None:
    def look() -> None:
        status = path.stat()
        assert stat.S_IMODE(status.st_mode) == 0o640
        assert status.st_gid == os.getgid()

    served(path, look, mode=0o640, group=grp.getgrgid(os.getgid()).gr_name)


def test_mode_from_the_start(path: Path) -> None:
    """A watcher never sees a socket in the directory that others could connect to, whatever the umask."""
    path.parent.mkdir()
    stop, seen = threading.Event(), set()

    def watch() -> None:
        while not stop.is_set():
            for item in os.scandir(path.parent):
                try:
                    seen.add(stat.S_IMODE(item.stat().st_mode))
                except FileNotFoundError:
                    continue

    watcher = threading.Thread(target=watch)
    umask = os.umask(0)
    try:
        watcher.start()
        for _ in range(53):
            served(path, lambda: None, mode=0o660)
    finally:
        os.umask(umask)
        stop.set()
        watcher.join()
    assert seen <= {0o600, 0o660}


def test_an_unknown_group_is_a_configuration_error(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"control\.group: expected a group of this host, found 'no such group'"):
        served(path, lambda: None, group="no such group")
    assert not path.exists()


def test_live_daemon_is_not_displaced(path: Path) -> None:
    """A server in another process keeps its socket, and the refusal names that process."""
    code = (
        "import asyncio, sys; from pathlib import Path; from edge.control import ControlServer\n"
        "async def main():\n"
        "    await ControlServer.start(Path(sys.argv[1]), {'echo': lambda request: {}})\n"
        "    print('ready', flush=True)\n"
        "    await asyncio.sleep(120)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == b"ready\n"
            with pytest.raises(UnavailableError, match=f"process {first.pid} serves this socket"):
                served(path, lambda: None)
            assert call(path, "echo") == {}
            first.kill()
            first.wait(30)
            assert path.exists()
            assert served(path, lambda: call(path, "echo", n=3)) == {"got": {"n": 3}}
        finally:
            first.kill()
    assert list(path.parent.iterdir()) == []


def test_what_is_not_a_socket_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("precious")
    with pytest.raises(UnavailableError, match="found another kind of file; it was left alone"):
        served(path, lambda: None)
    assert path.read_text() == "precious"


def test_close_removes_its_own_socket_only(path: Path) -> None:
    async def main() -> None:
        server = await ControlServer.start(path, HANDLERS)
        path.unlink()
        path.write_text("somebody else's")
        await server.close()

    asyncio.run(main())
    assert path.read_text() == "somebody else's"


def test_close_ends_open_connections(path: Path) -> None:
    async def main() -> None:
        server = await ControlServer.start(path, HANDLERS)
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b'{"verb":"echo"}\n')
        assert await reader.readline()
        async with asyncio.timeout(5):  # half of what an idle connection may take
            await server.close()
            assert await reader.read() == b""
        writer.close()

    asyncio.run(main())


def test_no_daemon_says_what_to_do(path: Path) -> None:
    with pytest.raises(UnavailableError, match=f"no daemon answers on {path}: is it running. start it with `edge run`"):
        call(path, "status")


def test_a_stale_socket_says_the_same(path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(UnavailableError, match="is it running"):
        call(path, "status")


def test_a_daemon_that_does_not_answer_is_given_up(path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(path))
        busy.listen()
        with pytest.raises(UnavailableError, match=r"did not answer within 0.1 s"):
            call(path, "status", timeout_s=0.1)


@pytest.mark.parametrize("reply", [b"HTTP/1.1 400 Bad Request\n", b"[]\n", b'{"ok": true}\n', b'{"ok": false}\n', b"x"])
def test_what_is_not_our_daemon_is_named(path: Path, reply: bytes) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(1 << 12)
                connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(UnavailableError, match=r"expected a reply of edge's daemon|without an answer"):
            call(path, "status", timeout_s=30)
        thread.join()


def test_a_path_too_long_for_a_socket_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="too long"):
        served(tmp_path / ("x" * 107), lambda: None)


def test_every_exit_code_has_its_error() -> None:
    for code, error in control._ERRORS.items():
        assert error.exit_code == code
