import io
import logging
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge import log
from edge.log import LONGEST_LINE, LineFormatter, goes_to_journal, printable, quoted


def record(
    message: str, *arguments: object, level: int = logging.WARNING, fields: dict[str, object] | None = None
) -> logging.LogRecord:
    made = logging.LogRecord("edge.kernel.nft", level, __file__, 1, message, arguments, None)
    if fields is not None:
        made.fields = fields
    return made


def line(made: logging.LogRecord) -> str:
    """The line as the journal gets it: without a time."""
    return LineFormatter(journal=True).format(made)


def test_a_line_with_fields() -> None:
    made = record("sets drifted", fields={"missing": 3, "table": "edge", "took_s": 0.1 + 0.2})
    assert line(made) == "<4>kernel.nft: sets drifted missing=3 table=edge took_s=0.3"


def test_a_line_for_a_terminal_has_time_and_level() -> None:
    made = record("sets drifted")
    made.created, made.msecs = 1790000000.123, 123.0
    assert LineFormatter(journal=False).format(made) == "2026-09-21T14:13:20.123Z warning kernel.nft: sets drifted"


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.CRITICAL, "<3>"), (logging.ERROR, "<3>"), (logging.INFO, "<6>"), (logging.DEBUG, "<7>")],
)
def test_priorities_are_those_of_syslog(level: int, priority: str) -> None:
    assert line(record("x", level=level)).startswith(priority)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        ("two words", '"two words"'),
        ("", '""'),
        ('say "x"', '"say \\"x\\""'),
        ("a=b", '"a=b"'),
        ("back\\slash", '"back\\\\slash"'),
        ("line\nline", '"line\\nline"'),
        ("\x1b[31mred", '"\\x1b[31mred"'),
        ("\u202egnp.exe", '"\\u202egnp.exe"'),
        (None, "None"),
        (1790000000.123, "1790000000.123"),
    ],
)
def test_values_are_quoted_when_needed(value: object, text: str) -> None:
    assert quoted(value) == text


@given(st.text(), st.dictionaries(st.text(max_size=11), st.text(max_size=53), max_size=3))
def test_one_event_one_line(message: str, fields: dict[str, str]) -> None:
    made = line(record("%s", message, fields=dict(fields)))
    assert len(made.splitlines()) == 1


@given(st.text())
def test_no_control_characters(text: str) -> None:
    assert printable(text).isprintable()
    assert quoted(text).isprintable()


def test_a_traceback_is_one_line_too() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        made = record("failed")
        made.exc_info = sys.exc_info()
    text = line(made)
    assert len(text.splitlines()) == 1
    assert 'traceback="Traceback (most recent call last):\\n' in text
    assert "ValueError: first\\nsecond" in text


def test_line_is_bounded() -> None:
    text = line(record("x", fields={"reason": "y" * 100_003}))
    assert len(text) <= LONGEST_LINE + len("<4>")
    assert text.endswith(" ...")


def test_the_journal_is_recognised_by_device_and_inode(tmp_path: Path) -> None:
    with (tmp_path / "journal").open("w") as stream, (tmp_path / "other").open("w") as other:
        status = os.fstat(stream.fileno())
        environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        assert goes_to_journal(stream, environ)
        assert not goes_to_journal(other, environ)
        assert not goes_to_journal(stream, {})
    assert not goes_to_journal(io.StringIO(), environ)


def test_configure_sends_the_projects_log_to_a_stream() -> None:
    logger = logging.getLogger("edge")
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        stream = io.StringIO()
        log.configure("warning", stream, {})
        logging.getLogger("edge.tests").info("quiet")
        logging.getLogger("edge.tests").warning("loud", extra={"fields": {"n": 7}})
        assert stream.getvalue().endswith("Z warning tests: loud n=7\n")
        assert stream.getvalue().count("\n") == 1
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
