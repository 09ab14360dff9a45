import asyncio

import pytest

from edge.lab.smtp import MAX_LINE, MAX_LINES, Dialogue, NotServedError


def reply_to(data: bytes) -> tuple[int, list[str]]:
    async def read() -> tuple[int, list[str]]:
        reader = asyncio.StreamReader(limit=MAX_LINE)
        reader.feed_data(data)
        reader.feed_eof()
        return await Dialogue(reader, None).reply()  # type: ignore[arg-type] # nothing is written

    return asyncio.run(read())


def test_a_reply_of_several_lines_is_one_reply() -> None:
    assert reply_to(b"250-mx\r\n250-SIZE 1\r\n250 AUTH PLAIN\r\n220 not read\r\n") == (
        250,
        ["mx", "SIZE 1", "AUTH PLAIN"],
    )


@pytest.mark.parametrize(
    "data",
    [b"", b"250-mx\r\n", b"25", b"abc hello\r\n", b"250-" + b"x" * 2 * MAX_LINE, b"250-x\r\n" * (MAX_LINES + 1)],
    ids=["nothing", "unfinished", "cut", "no-code", "long-line", "many-lines"],
)
def test_replies_are_bounded(data: bytes) -> None:
    with pytest.raises(NotServedError):
        reply_to(data)
