"""Records: what was measured, where and how, in one SQLite file that many processes share.

Trials are only ever appended. A record knows its cascade by its content key and names no rank of its own: tiles and
extents are stored under the names that the cascade had and are renamed to those of the cascade that asks. A file that
is corrupt, foreign or written by a newer castile is refused with one `UsageError` and left as it is; what it says is
data and is checked as it is read.
"""

from __future__ import annotations

import json
import math
import os
import random
import sqlite3
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from ..ir.cascade import Cascade
from ..ir.errors import CastileError, InputError, UsageError
from ..ir.key import content_key
from ..ir.mapping import Mapping as Tuned
from .places import have_records, records_path
from .record import MOST_TIMES, Record, described, is_spoken, parsed, record_of, renamed, standing, storable

# "CAST": how SQLite's header tells that a file is ours.
APPLICATION = 0x43415354
VERSION = 1

# A record serves extents that differ from its own by this factor at most, in each rank.
REACH = 4.0

_WAIT_S = 30.0

# What a row is read as.
_COLUMNS = ("cascade", "target", "device", "shapes", "mapping", "status", "detail", "time_s", "times", "kind",
            "session", "seed", "versions", "at", "uid")  # fmt: skip

_SCHEMA = (
    "CREATE TABLE cascade (id INTEGER PRIMARY KEY, key TEXT NOT NULL, name TEXT NOT NULL, ranks TEXT NOT NULL,"
    " text TEXT NOT NULL UNIQUE)",
    "CREATE TABLE trial (id INTEGER PRIMARY KEY, uid TEXT NOT NULL UNIQUE, at TEXT NOT NULL, session TEXT NOT NULL,"
    " kind TEXT NOT NULL, cascade INTEGER NOT NULL REFERENCES cascade(id), target TEXT NOT NULL, device TEXT NOT NULL,"
    " shapes TEXT NOT NULL, mapping TEXT NOT NULL, status TEXT NOT NULL, detail TEXT NOT NULL, time_s REAL,"
    " times TEXT NOT NULL, versions TEXT NOT NULL, seed INTEGER NOT NULL)",
    "CREATE INDEX trial_by_cascade ON trial (cascade, target, device, status)",
    "CREATE INDEX cascade_by_key ON cascade (key)",
)

# Statements that bring a file from the version of their place to the next.
_MIGRATIONS: tuple[tuple[str, ...], ...] = (_SCHEMA,)


class Records:
    """A file of records. ``Records()`` opens the user's, creating it; ``read_only`` never writes a byte.

    Raises `UsageError` for a file that is none of castile's, is damaged, comes from a newer castile or cannot be
    opened; such a file is left as it is.
    """

    def __init__(self, path: str | Path | None = None, *, read_only: bool = False) -> None:
        self.path = Path(path) if path is not None else records_path()
        self.read_only = read_only
        with self._guard():
            self._db = _patiently(self._opened)

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    # Opening

    def _opened(self) -> sqlite3.Connection:
        db = self._open()
        try:
            self._check(db)
        except BaseException:
            db.close()
            raise
        return db

    def _open(self) -> sqlite3.Connection:
        if self.read_only:
            if not have_records(self.path):
                raise UsageError(f"there are no records at {self.path}", hint="castile tune makes some")
            location = self.path.resolve().as_uri()
            try:
                db = sqlite3.connect(f"{location}?mode=ro", uri=True, timeout=_WAIT_S)
                db.execute("PRAGMA schema_version").fetchone()
            except sqlite3.OperationalError:
                if os.access(self.path.parent, os.W_OK):
                    raise
                # A folder that cannot be written to: the file is read as it lies, without its log.
                db = sqlite3.connect(f"{location}?immutable=1", uri=True)
            return db
        if self.path.exists():
            self._look()
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        return sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None)

    def _look(self) -> None:
        """Refuse what is no SQLite file before SQLite touches it."""
        with self.path.open("rb") as file:
            head = file.read(16)
        if head and head != b"SQLite format 3\0":
            raise UsageError(f"{self.path} holds no records of castile", hint=_elsewhere())

    def _check(self, db: sqlite3.Connection) -> None:
        db.execute("PRAGMA trusted_schema=OFF")
        if not self.read_only:
            self._create(db)
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION:
            raise UsageError(f"{self.path} is a database of something else", hint=_elsewhere())
        if version > VERSION:
            raise UsageError(
                f"{self.path} was written by a newer castile",
                expected=f"version {VERSION} or less",
                got=str(version),
                hint=f"update castile, or {_elsewhere()}",
            )
        found = {row[0] for row in db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
        if found != set(_SCHEMA):
            raise UsageError(f"{self.path} does not have the tables of castile's records", hint=_elsewhere())
        if not self.read_only:
            if db.execute("PRAGMA journal_mode").fetchone() != ("wal",):
                db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")

    def _create(self, db: sqlite3.Connection) -> None:
        """Make the tables of a new file, or bring an older one up to date; one process does it, others wait."""
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if (application == APPLICATION and version >= VERSION) or (application == 0 and not _empty(db)):
            return
        if application not in (0, APPLICATION):
            return
        with _transaction(db):
            (version,) = db.execute("PRAGMA user_version").fetchone()
            for step in _MIGRATIONS[version:]:
                for statement in step:
                    db.execute(statement)
            db.execute(f"PRAGMA application_id={APPLICATION}")
            db.execute(f"PRAGMA user_version={max(version, VERSION)}")

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """SQLite's troubles and the file system's, as one line."""
        try:
            yield
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            damaged = not isinstance(error, sqlite3.OperationalError)
            what = "is damaged" if damaged else "cannot be used"
            raise UsageError(f"the records in {self.path}: the file {what}: {error}", hint=_elsewhere()) from None
        except OSError as error:
            raise UsageError(f"the records in {self.path}: {error.strerror or error}", hint=_elsewhere()) from None

    # Writing

    def add(self, records: Iterable[Record]) -> int:
        """Append records, all or none; those that are there already (by ``uid``) are left out. The number added."""
        given = [r if r.key else described(r, parsed(r.cascade)) for r in records]

        def write() -> int:
            with _transaction(self._db):
                return sum(map(self._insert, given))

        with self._guard():
            return _patiently(write)

    def _insert(self, r: Record) -> int:
        db = self._db
        db.execute(
            "INSERT INTO cascade (key, name, ranks, text) VALUES (?, ?, ?, ?) ON CONFLICT (text) DO NOTHING",
            (r.key, r.name, json.dumps(r.ranks), r.cascade),
        )
        (cascade,) = db.execute("SELECT id FROM cascade WHERE text = ?", (r.cascade,)).fetchone()
        done = db.execute(
            "INSERT INTO trial (uid, at, session, kind, cascade, target, device, shapes, mapping, status, detail,"
            " time_s, times, versions, seed) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT (uid) DO NOTHING",
            (
                r.uid or uuid.uuid4().hex,
                r.at or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                r.session,
                r.kind,
                cascade,
                r.target,
                r.device,
                json.dumps(dict(sorted(r.shapes.items()))),
                r.mapping.to_json(),
                r.status,
                storable(r.detail[:2000]),
                r.time_s,
                json.dumps(list(r.times[:MOST_TIMES])),
                json.dumps(dict(r.versions)),
                r.seed,
            ),
        )
        return max(0, done.rowcount)

    def merge(self, other: str | Path) -> int:
        """Append what another file holds; the number of records that were new."""
        with Records(other, read_only=True) as source:
            return self.add(source.all())

    # Reading

    def all(self, **where: str | int | None) -> list[Record]:
        """Records in the order in which they came; ``where`` compares columns: ``key``, ``target``, ``device``, …

        Those of another castile, with a mapping that this one does not know, are passed over.
        """
        columns = {
            "key": "c.key",
            "name": "c.name",
            "target": "t.target",
            "device": "t.device",
            "status": "t.status",
            "kind": "t.kind",
            "session": "t.session",
            "id": "t.id",
        }
        given = {columns[name]: value for name, value in where.items() if value is not None}
        condition = " AND ".join(f"{name} = ?" for name in given) or "1"
        # In the order of `_COLUMNS`.
        query = (
            "SELECT c.text, t.target, t.device, t.shapes, t.mapping, t.status, t.detail, t.time_s, t.times, t.kind,"
            " t.session, t.seed, t.versions, t.at, t.uid FROM trial t JOIN cascade c"
            f" ON c.id = t.cascade WHERE {condition} ORDER BY t.id"
        )
        with self._guard():
            rows = _patiently(lambda: self._db.execute(query, tuple(given.values())).fetchall())
        return [r for r in map(self._record, rows) if r is not None]

    def _record(self, row: tuple[Any, ...]) -> Record | None:
        data = dict(zip(_COLUMNS, row, strict=True))
        try:
            data |= {name: json.loads(data[name]) for name in ("shapes", "mapping", "times", "versions")}
            return record_of(data) if is_spoken(data["mapping"]) else None
        except (ValueError, TypeError, RecursionError, InputError) as error:
            what = error.message if isinstance(error, InputError) else str(error)
            raise UsageError(f"the records in {self.path}: a row is damaged: {what[:200]}", hint=_elsewhere()) from None

    def best(self, c: Cascade, shapes: Mapping[str, int], device: str, target: str) -> Record | None:
        """The record that serves these extents best, its mapping and shapes under the cascade's own rank names.

        Pinned mappings first, then winners of final comparisons, then trials; among equals the nearest extents, then
        the last, or of trials the fastest. None where nothing within `REACH` was measured on the device. A pin serves
        every device, where there is none of its own that is as near.
        """
        found: tuple[tuple[float, ...], Record] | None = None
        for r in self.all(key=content_key(c), target=target, status="ok"):
            if (r.device != device and r.kind != "pinned") or len(r.ranks) != len(c.ranks):
                continue
            r = renamed(r, dict(zip(r.ranks, c.ranks, strict=True)))
            away = distance(r.shapes, shapes)
            if away is None:
                continue
            kind, time_s = standing(r)
            rank = (kind, away, r.device != device, time_s)
            if found is None or rank <= found[0]:
                found = (rank, r)
        return found[1] if found else None


T = TypeVar("T")


def _patiently(action: Callable[[], T]) -> T:
    """What an action gives, tried again while another process is in the way: SQLite waits by itself nearly everywhere,
    but not where the first process makes a file or the last one closes it."""
    end = time.monotonic() + _WAIT_S
    while True:
        try:
            return action()
        except sqlite3.OperationalError as error:
            if not any(word in str(error) for word in ("locked", "busy", "protocol")) or time.monotonic() > end:
                raise
        time.sleep(random.uniform(0.005, 0.03))


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise


def _empty(db: sqlite3.Connection) -> bool:
    return db.execute("SELECT 1 FROM sqlite_master").fetchone() is None


def distance(a: Mapping[str, int], b: Mapping[str, int]) -> float | None:
    """How far apart extents lie, in doublings summed over ranks; None where one rank is beyond `REACH`."""
    apart = [abs(math.log2(max(1, a[r]) / max(1, b[r]))) for r in a if r in b]
    return None if any(x > math.log2(REACH) for x in apart) else sum(apart)


def recorded(c: Cascade, shapes: Mapping[str, int], target: str, device: str | None = None) -> Tuned | None:
    """The mapping that the user's records hold for these extents; None where there is none.

    Never raises: records that cannot be read are a warning, and the kernel runs with its default.
    """
    from .probe import device_name

    path = records_path()
    try:
        if not have_records(path):
            return None
        with Records(path, read_only=True) as records:
            found = records.best(c, shapes, device or device_name(target), target)
    except (CastileError, OSError, sqlite3.Error) as error:
        said = str(error).splitlines()[0]
        warnings.warn(f"castile: tuned mappings are not used: {said}", RuntimeWarning, stacklevel=2)
        return None
    return found.mapping if found else None


def _elsewhere() -> str:
    return "name another file by --records or CASTILE_RECORDS; this one was left as it is"
