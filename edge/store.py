"""What outlives a reboot, in one SQLite file: the journal of decisions, and the operator's entries.

The core counts in monotonic seconds, which start anew at every boot; the file holds wall time. This module is the one
place where the two are converted: by the difference of both clocks at the moment of reading or writing. After a step of
the wall clock, stored lifetimes move with it.

A journal that cannot be written must not stop the daemon: the rows are counted as lost and the log says so. An
operator's entry that cannot be written is an error for the operator.

Invariants:
    operator-entry-survives: what put_operator took is there after a restart until it expires or is dropped.
    damage-is-set-aside: a corrupt or newer file is renamed, never deleted or written to, and the daemon goes on.
    journal-is-bounded: no more than keep_rows (and a batch), nothing older than keep_days.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from edge.abi import Origin, Service, Standing
from edge.core.model import Decision, Entry
from edge.core.ports import Clock
from edge.core.prefix import IPV4_SPACE, Prefix
from edge.errors import InputError, UnavailableError
from edge.parameters import Journal

log = logging.getLogger(__name__)
T = TypeVar("T")

FILE = "edge.db"
SCHEMA = 1
APPLICATION_ID = 0x65646765  # "edge"
PRUNE_EVERY = 256
"""Batches between two prunings: about four minutes at one batch a second."""

BUSY_TIMEOUT_S = 1.0
"""Somebody may read the file with sqlite3(1); a tick waits this long for them at most."""

_IPV4 = Prefix(IPV4_SPACE << 32, 0, 32)

_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}

_TABLES = """
CREATE TABLE journal (
    seq INTEGER PRIMARY KEY,
    id INTEGER NOT NULL,
    at REAL NOT NULL,           -- wall time, seconds
    action TEXT NOT NULL,
    service INTEGER NOT NULL,
    prefix TEXT NOT NULL,
    first BLOB NOT NULL,        -- first and last address of the prefix as keyed: 16 bytes, big endian
    last BLOB NOT NULL,
    standing INTEGER NOT NULL,
    origin INTEGER NOT NULL,
    expires REAL,               -- wall time; NULL = never
    reason TEXT NOT NULL,
    bad REAL NOT NULL, good REAL NOT NULL, bound REAL NOT NULL, children INTEGER NOT NULL
);
CREATE INDEX journal_first ON journal (first);
CREATE INDEX journal_at ON journal (at);
CREATE INDEX journal_id ON journal (id);
CREATE TABLE operator (
    service INTEGER NOT NULL,
    prefix TEXT NOT NULL,
    standing INTEGER NOT NULL,
    expires REAL,
    reason TEXT NOT NULL,
    decision INTEGER NOT NULL,
    PRIMARY KEY (service, prefix)
) WITHOUT ROWID;
"""

_INSERT = "INSERT INTO journal VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"

_COLUMNS = "SELECT id, at, action, prefix, service, standing, origin, expires, reason, bad, good, bound, children "

_NEWEST = _COLUMNS + "FROM journal ORDER BY seq DESC LIMIT ?"

_NEWEST_ABOUT = (
    _COLUMNS
    + """FROM journal
WHERE ((first >= :first AND last <= :last) OR (first <= :first AND last >= :last))
AND (first >= :ipv4_first AND last <= :ipv4_last) = :ipv4
ORDER BY seq DESC LIMIT :limit"""
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalRow:
    """One decision as it was written down; times are wall time in seconds."""

    id: int
    at: float
    action: str
    prefix: str
    service: Service
    standing: Standing
    origin: Origin
    expires: float | None
    reason: str
    bad: float
    good: float
    bound: float
    children: int


class Store:
    """The open file. One process writes it; others may read it."""

    def __init__(self, path: Path, clock: Clock, params: Journal) -> None:
        self._path = path
        self._clock = clock
        self._params = params
        self._batches = 0
        self.lost = 0  # journal rows that could not be written; expected to stay 0
        self._db = self._connect()

    @classmethod
    def open(cls, directory: Path, clock: Clock, params: Journal) -> Store:
        """Open or make the file; UnavailableError when the directory cannot be used."""
        try:
            directory.mkdir(mode=0o750, parents=True, exist_ok=True)
            return cls(directory / FILE, clock, params)
        except (OSError, sqlite3.Error) as error:
            raise UnavailableError(
                f"{directory}: expected a state directory that can be written, found: {error}"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was written stays."""
        self._db.close()

    def write(self, decisions: Sequence[Decision]) -> None:
        """Append decisions to the journal, in one transaction. A failure is counted in `lost` and logged."""
        if not decisions:
            return
        rows = [self._row(decision, self._ahead_s()) for decision in decisions]
        try:
            self._in_transaction(lambda db: db.executemany(_INSERT, rows))
            if self._batches % PRUNE_EVERY == 0:
                self._in_transaction(self._prune)
            self._batches += 1
        except (sqlite3.Error, OSError, UnavailableError) as error:
            self.lost += len(rows)
            log.error("journal not written", extra={"fields": {"rows": len(rows), "lost": self.lost, "error": error}})

    def operator_entries(self) -> list[Entry]:
        """The operator's entries that have not expired, with `expires_s` on the monotonic clock of now."""
        rows = self._asked(
            lambda db: db.execute(
                "SELECT service, prefix, standing, expires, reason, decision FROM operator"
                " WHERE expires IS NULL OR expires > ? ORDER BY service, prefix",
                (self._clock.wall_s(),),
            ).fetchall()
        )
        found = []
        for row in rows:
            try:
                found.append(_operator_entry(*row, ahead_s=self._ahead_s()))
            except (InputError, ValueError) as error:
                log.error(
                    "operator entry not understood: it does not apply", extra={"fields": {"row": row, "error": error}}
                )
        return found

    def change_operator(self, put: Sequence[Entry] = (), drop: Sequence[tuple[Service, Prefix]] = ()) -> None:
        """Keep and forget operator entries, all or none: a kept one takes the place of an earlier one for the same
        prefix and service. UnavailableError when that cannot be written."""
        ahead_s = self._ahead_s()
        rows = [
            (
                int(entry.service),
                str(entry.prefix),
                int(entry.standing),
                None if entry.expires_s is None else entry.expires_s + ahead_s,
                entry.reason,
                entry.decision,
            )
            for entry in put
        ]
        keys = [(int(service), str(prefix)) for service, prefix in drop]

        def work(db: sqlite3.Connection) -> None:
            db.executemany("DELETE FROM operator WHERE service = ? AND prefix = ?", keys)
            db.executemany("INSERT OR REPLACE INTO operator VALUES (?, ?, ?, ?, ?, ?)", rows)

        self._asked(work)

    def reasons(self, ids: Sequence[int]) -> dict[int, str]:
        """The reasons of these decisions, as far as the journal still has them."""
        query = "SELECT id, reason FROM journal WHERE id IN (SELECT value FROM json_each(?))"
        return dict(self._asked(lambda db: db.execute(query, (json.dumps(list(ids)),)).fetchall()))

    def journal(self, prefix: Prefix | None = None, limit: int = 100) -> list[JournalRow]:
        """The newest decisions, newest first; with a prefix, those for it, inside it, and around it."""
        if prefix is None:
            rows = self._asked(lambda db: db.execute(_NEWEST, (limit,)).fetchall())
        else:
            about: dict[str, object] = {"limit": limit, "ipv4": prefix.ipv4}
            about["first"], about["last"] = _bounds(prefix)
            about["ipv4_first"], about["ipv4_last"] = _bounds(_IPV4)
            rows = self._asked(lambda db: db.execute(_NEWEST_ABOUT, about).fetchall())
        return [_journal_row(*row) for row in rows]

    def last_decision(self) -> int:
        """The highest decision id ever journalled and still kept, or 0: where new ids go on."""
        query = (
            "SELECT max(coalesce((SELECT max(id) FROM journal), 0), coalesce((SELECT max(decision) FROM operator), 0))"
        )
        return int(self._asked(lambda db: db.execute(query).fetchone())[0])

    def _ahead_s(self) -> float:
        """Wall time minus monotonic time, now."""
        return self._clock.wall_s() - self._clock.now_s()

    def _row(self, decision: Decision, ahead_s: float) -> tuple[object, ...]:
        entry = decision.entry
        return (
            decision.id,
            decision.at_s + ahead_s,
            decision.action,
            int(entry.service),
            str(entry.prefix),
            *_bounds(entry.prefix),
            int(entry.standing),
            int(entry.origin),
            None if entry.expires_s is None else entry.expires_s + ahead_s,
            entry.reason,
            float(decision.bad),
            float(decision.good),
            float(decision.bound),
            int(decision.children),
        )

    def _prune(self, db: sqlite3.Connection) -> None:
        """Drop what is too old or too much, and operator entries that have expired."""
        now_s = self._clock.wall_s()
        db.execute("DELETE FROM journal WHERE at < ?", (now_s - self._params.keep_days * 86400,))
        db.execute("DELETE FROM journal WHERE seq <= (SELECT max(seq) FROM journal) - ?", (self._params.keep_rows,))
        db.execute("DELETE FROM operator WHERE expires <= ?", (now_s,))

    def _asked(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Work that somebody waits for: UnavailableError when the file does not allow it."""
        try:
            return self._in_transaction(work)
        except (sqlite3.Error, OSError) as error:
            raise UnavailableError(
                f"{self._path}: expected a state file that can be read and written, found: {error}"
            ) from error

    def _in_transaction(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do the work and commit it; a file found damaged on the way is set aside and the work done on a new one."""
        try:
            with self._db:
                return work(self._db)
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _DAMAGE:
                raise
            self._db.close()
            self._set_aside("corrupt", str(error))
            self._db = self._connect()
            with self._db:
                return work(self._db)

    def _connect(self) -> sqlite3.Connection:
        """A connection to a sound file of this schema; what is neither is set aside first."""
        for _ in range(2):
            db = self._raw_connect()
            try:
                trouble = _trouble(db)
            except sqlite3.DatabaseError as error:
                if error.sqlite_errorcode & 0xFF not in _DAMAGE:
                    db.close()
                    raise
                trouble = "corrupt", str(error)
            if trouble is None:
                return db
            db.close()
            self._set_aside(*trouble)
        raise UnavailableError(f"{self._path}: expected a new file to be sound, found it damaged at once")

    def _raw_connect(self) -> sqlite3.Connection:
        # made with its final mode: the journal holds addresses, and SQLite gives -wal and -shm the mode of the file
        os.close(os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o640))
        return sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S)

    def _set_aside(self, kind: str, why: str) -> None:
        """Rename the file, with its write-ahead log, out of the way."""
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self._clock.wall_s()))
        kept = self._path.with_name(f"{self._path.name}.{kind}-{stamp}")
        for number in range(1, 100):
            if not kept.exists():
                break
            kept = kept.with_name(f"{self._path.name}.{kind}-{stamp}-{number}")
        for suffix in ("", "-wal", "-shm"):
            part = self._path.with_name(self._path.name + suffix)
            if part.exists():
                part.rename(kept.with_name(kept.name + suffix))
        fields = {"file": self._path, "kept": kept, "found": why}
        log.error("state file set aside: operator entries in it do not apply", extra={"fields": fields})


def _trouble(db: sqlite3.Connection) -> tuple[str, str] | None:
    """What is wrong with a file, if something is; a sound one is set up, and an empty one is given its tables."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    application = db.execute("PRAGMA application_id").fetchone()[0]
    empty = version == 0 and db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    if not empty and application != APPLICATION_ID:
        return "corrupt", "a database that is not ours"
    if version > SCHEMA:
        return "newer", f"schema {version}, expected at most {SCHEMA}"
    check = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if check != "ok":
        return "corrupt", check
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=NORMAL")  # a power cut may lose the last decisions, never the file
    if empty:
        identity = f"PRAGMA user_version={SCHEMA}; PRAGMA application_id={APPLICATION_ID};"
        db.executescript(f"BEGIN; {_TABLES} {identity} COMMIT;")
    return None


def _bounds(prefix: Prefix) -> tuple[bytes, bytes]:
    """First and last keyed address of a prefix as 16 bytes each."""
    first = prefix.hi << 64 | prefix.lo
    last = first | (1 << (128 - prefix.length)) - 1
    return first.to_bytes(16, "big"), last.to_bytes(16, "big")


def _operator_entry(
    service: int, prefix: str, standing: int, expires: float | None, reason: str, decision: int, *, ahead_s: float
) -> Entry:
    return Entry(
        prefix=Prefix.parse(prefix),
        service=Service(service),
        standing=Standing(standing),
        origin=Origin.OPERATOR,
        expires_s=None if expires is None else expires - ahead_s,
        reason=reason,
        decision=decision,
    )


def _journal_row(
    id_: int, at: float, action: str, prefix: str, service: int, standing: int, origin: int, *rest: Any
) -> JournalRow:
    expires, reason, bad, good, bound, children = rest
    return JournalRow(
        id=id_,
        at=at,
        action=action,
        prefix=prefix,
        service=Service(service),
        standing=Standing(standing),
        origin=Origin(origin),
        expires=expires,
        reason=reason,
        bad=bad,
        good=good,
        bound=bound,
        children=children,
    )
