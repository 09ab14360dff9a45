import logging
import random
import sqlite3
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge.abi import Origin, Service, Standing
from edge.core.model import Decision, Entry
from edge.core.prefix import Prefix
from edge.errors import UnavailableError
from edge.parameters import Journal
from edge.store import APPLICATION_ID, FILE, PRUNE_EVERY, SCHEMA, JournalRow, Store


@dataclass
class Clock:
    """A clock that a test sets; wall and monotonic time differ by what boot time gives."""

    monotonic: float = 1009.0
    wall: float = 1_790_000_000.0

    def now_s(self) -> float:
        return self.monotonic

    def wall_s(self) -> float:
        return self.wall

    def passes(self, seconds: float) -> None:
        self.monotonic += seconds
        self.wall += seconds

    def reboots(self) -> None:
        self.wall += 61.0
        self.monotonic = 11.0


def entry(prefix: str, *, expires_s: float | None = None, standing: Standing = Standing.BLOCK) -> Entry:
    return Entry(
        prefix=Prefix.parse(prefix),
        service=Service.MX,
        standing=standing,
        origin=Origin.OPERATOR,
        expires_s=expires_s,
        reason="told to",
        decision=7,
    )


def decision(number: int, prefix: str = "2001:db8::/64", at_s: float = 1000.0) -> Decision:
    made = entry(prefix, expires_s=at_s + 600)
    return Decision(id=number, at_s=at_s, action="open", entry=made, bad=11.0, good=0.5, bound=0.83, children=3)


def opened(directory: Path, clock: Clock, **params: float) -> Store:
    return Store.open(directory, clock, Journal(**params))  # type: ignore[arg-type]  # whole numbers where they must be


def test_operator_entry_survives_a_reboot(tmp_path: Path) -> None:
    clock = Clock()
    with opened(tmp_path, clock) as store:
        store.change_operator([entry("2001:db8::/48", expires_s=clock.now_s() + 3600)])
        store.change_operator([entry("192.0.2.0/24", standing=Standing.ALLOW)])
    clock.reboots()
    with opened(tmp_path, clock) as store:
        allow, block = store.operator_entries()
    assert (str(allow.prefix), allow.standing, allow.expires_s) == ("192.0.2.0/24", Standing.ALLOW, None)
    assert (str(block.prefix), block.standing, block.reason) == ("2001:db8::/48", Standing.BLOCK, "told to")
    assert block.expires_s == pytest.approx(clock.now_s() + 3600 - 61)
    assert block.decision == 7


def test_operator_entry_survives_until_it_expires(tmp_path: Path) -> None:
    clock = Clock()
    with opened(tmp_path, clock) as store:
        store.change_operator([entry("2001:db8::/48", expires_s=clock.now_s() + 599)])
        clock.passes(601)
        assert store.operator_entries() == []


def test_operator_entry_survives_until_it_is_dropped(tmp_path: Path) -> None:
    with opened(tmp_path, Clock()) as store:
        store.change_operator([entry("2001:db8::/48")])
        store.change_operator(drop=[(Service.SUBMISSION, Prefix.parse("2001:db8::/48"))])
        assert len(store.operator_entries()) == 1
        store.change_operator(drop=[(Service.MX, Prefix.parse("2001:db8::/48"))])
        assert store.operator_entries() == []


def test_a_second_entry_for_a_prefix_replaces_the_first(tmp_path: Path) -> None:
    with opened(tmp_path, Clock()) as store:
        store.change_operator([entry("2001:db8::/48")])
        store.change_operator([entry("2001:db8::/48", standing=Standing.ALLOW)])
        assert [e.standing for e in store.operator_entries()] == [Standing.ALLOW]


def test_journal_keeps_everything_in_wall_time(tmp_path: Path) -> None:
    clock = Clock()
    with opened(tmp_path, clock) as store:
        store.write([decision(5, at_s=clock.now_s() - 2)])
        (row,) = store.journal()
    assert row == JournalRow(
        id=5,
        at=row.at,
        action="open",
        prefix="2001:db8::/64",
        service=Service.MX,
        standing=Standing.BLOCK,
        origin=Origin.OPERATOR,
        expires=row.expires,
        reason="told to",
        bad=11.0,
        good=0.5,
        bound=0.83,
        children=3,
    )
    assert row.at == pytest.approx(clock.wall - 2)
    assert row.expires == pytest.approx(clock.wall + 598)


def test_journal_about_a_prefix_holds_what_is_in_and_around_it(tmp_path: Path) -> None:
    prefixes = ["2001:db8::/32", "2001:db8:1::/48", "2001:db8:1:2::/64", "2001:db8:1:3::/64", "2001:db9::/32"]
    prefixes += ["192.0.2.0/24", "192.0.2.7/32", "192.0.3.0/24", "2000::/3"]
    with opened(tmp_path, Clock()) as store:
        store.write([decision(number, prefix) for number, prefix in enumerate(prefixes)])
        for text in ("2001:db8:1::/48", "192.0.2.0/24", "2000::/3"):
            about = Prefix.parse(text)
            expected = {p for p in prefixes if about.contains(Prefix.parse(p)) or Prefix.parse(p).contains(about)}
            assert {row.prefix for row in store.journal(about)} == expected, text


def test_journal_gives_the_newest_first_and_no_more_than_asked(tmp_path: Path) -> None:
    with opened(tmp_path, Clock()) as store:
        store.write([decision(number) for number in range(17)])
        assert [row.id for row in store.journal(limit=3)] == [16, 15, 14]


def test_decision_ids_go_on_after_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path, Clock()) as store:
        assert store.last_decision() == 0
        store.write([decision(5)])
        assert store.last_decision() == 5
        store.change_operator([entry("2001:db8::/48")])
    with opened(tmp_path, Clock()) as store:
        assert store.last_decision() == 7


def test_journal_is_bounded_in_rows(tmp_path: Path) -> None:
    with opened(tmp_path, Clock(), keep_rows=1009) as store:
        for batch in range(2 * PRUNE_EVERY + 1):
            store.write([decision(number) for number in range(batch * 11, batch * 11 + 11)])
        assert 1009 <= len(store.journal(limit=1_000_000)) <= 1009 + 11


def test_journal_is_bounded_in_days(tmp_path: Path) -> None:
    clock = Clock()
    with opened(tmp_path, clock, keep_days=3.0) as store:
        store.write([decision(1, at_s=clock.now_s())])
    clock.passes(3 * 86400 + 1)
    with opened(tmp_path, clock, keep_days=3.0) as store:
        store.write([decision(2, at_s=clock.now_s())])
        assert [row.id for row in store.journal()] == [2]


def test_the_file_is_not_for_everybody(tmp_path: Path) -> None:
    with opened(tmp_path, Clock()) as store:
        store.write([decision(1)])
        for path in tmp_path.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) & 0o007 == 0, path


def damage_header(path: Path) -> None:
    path.write_bytes(b"this is not a database at all" * 101)


def damage_pages(path: Path) -> None:
    content = bytearray(path.read_bytes())
    seed = random.randrange(1 << 32)
    print("seed", seed)
    content[4096:] = random.Random(seed).randbytes(len(content) - 4096)
    path.write_bytes(content)


def make_newer(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version={SCHEMA + 1}")
    db.close()


def make_foreign(path: Path) -> None:
    path.unlink()
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE bookmarks (url TEXT)")
    db.execute(f"PRAGMA application_id={APPLICATION_ID + 1}")
    db.commit()
    db.close()


@pytest.mark.parametrize(
    ("harm", "kind"),
    [(damage_header, "corrupt"), (damage_pages, "corrupt"), (make_newer, "newer"), (make_foreign, "corrupt")],
)
def test_damage_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: Callable[[Path], None], kind: str
) -> None:
    with opened(tmp_path, Clock()) as store:
        store.write([decision(number, f"2001:db8:{number:x}::/48") for number in range(1009)])
    harm(tmp_path / FILE)
    harmed = (tmp_path / FILE).read_bytes()
    with opened(tmp_path, Clock()) as store:
        assert store.journal() == []
        store.write([decision(2)])
        assert [row.id for row in store.journal()] == [2]
    (kept,) = tmp_path.glob(f"{FILE}.{kind}-*")
    assert kept.name == f"{FILE}.{kind}-20260921T141320Z"
    assert kept.read_bytes() == harmed
    assert [r.levelno for r in caplog.records] == [logging.ERROR]


def test_damage_under_way_is_set_aside_and_the_batch_is_kept(tmp_path: Path) -> None:
    with opened(tmp_path, Clock()) as store:
        store.write([decision(1)])
        reader = sqlite3.connect(tmp_path / FILE)
        reader.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        reader.close()
        damage_header(tmp_path / FILE)
        store.write([decision(2)])
        assert [row.id for row in store.journal()] == [2]
        assert store.lost == 0
    assert len(list(tmp_path.glob(f"{FILE}.corrupt-*"))) >= 1


def test_two_damaged_files_in_one_second_are_both_kept(tmp_path: Path) -> None:
    for _ in range(3):
        damage_header(tmp_path / FILE)
        opened(tmp_path, Clock()).close()
    assert len(list(tmp_path.glob(f"{FILE}.corrupt-*"))) == 3


def test_a_journal_that_cannot_be_written_is_counted_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path, Clock()) as store:
        other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        store.write([decision(1), decision(2), decision(3)])
        assert store.lost == 3
        assert caplog.messages == ["journal not written"]
        with pytest.raises(UnavailableError, match="database is locked"):
            store.change_operator([entry("2001:db8::/48")])
        other.execute("ROLLBACK")
        other.close()
        store.write([decision(4)])
        assert [row.id for row in store.journal()] == [4]


def test_an_operator_entry_not_understood_is_left_out_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path, Clock()) as store:
        store.change_operator([entry("2001:db8::/48")])
        other = sqlite3.connect(tmp_path / FILE)
        other.execute("INSERT INTO operator VALUES (0, 'everywhere', 5, NULL, '', 0)")
        other.commit()
        other.close()
        assert [str(e.prefix) for e in store.operator_entries()] == ["2001:db8::/48"]
        assert caplog.messages == ["operator entry not understood: it does not apply"]


def test_a_directory_that_cannot_be_used_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(UnavailableError, match="expected a state directory that can be written"):
        opened(tmp_path / "state", Clock())
