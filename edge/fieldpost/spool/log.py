"""The spool on the card: committed batches, marks, cursors and the ledger in one SQLite file.

Everything here blocks and belongs to the one thread that `Spool` runs it in. One connection writes and
checkpoints: in SQLite before 3.51.3 a write-ahead log that two connections reset can lose a commit.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import sqlite3
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import msgspec

from ..errors import SpoolFault
from ..reading import Event, Manifest, Reading
from .marks import Key

log = logging.getLogger(__name__)

SCHEMA = 1
_readings = msgspec.msgpack.Decoder(list[Reading])
_manifests = msgspec.msgpack.Decoder(Manifest)


@dataclass(slots=True)
class Commit:
    """What one transaction writes: the readings from position `first` on, and what rides along."""

    first: int
    readings: Sequence[Reading] = ()
    marks: list[tuple[Key, int, list[tuple[int, int]]]] = field(default_factory=list)
    forgotten: list[Key] = field(default_factory=list)
    cursors: dict[str, int] = field(default_factory=dict)
    ledger: list[tuple[int, Event]] = field(default_factory=list)
    manifests: list[Manifest] = field(default_factory=list)
    set_aside: list[tuple[int, str, str, Reading]] = field(default_factory=list)
    prune_to: int = 0


@dataclass(frozen=True, slots=True)
class Damage:
    """A batch whose bytes are not what was written; it was moved to the table `damaged`."""

    first: int
    past: int


@dataclass(frozen=True, slots=True)
class Opened:
    """What a spool knows when it is opened; `aside` is where an unreadable file was moved to."""

    generation: str
    boot: int
    oldest: int
    head: int
    marks: list[tuple[Key, int, list[tuple[int, int]]]]
    cursors: dict[str, int]
    manifests: list[Manifest]
    aside: Path | None


class Log:
    """The file. `open` always succeeds where the operating system lets it; nothing is ever wiped."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "spool.db"
        self._db: sqlite3.Connection | None = None
        self._lock: int | None = None
        self._sql = _statements()
        self._recent: dict[int, list[Reading]] = {}

    def open(self) -> Opened:
        """Open the file, or make it. Raises SpoolFault where the folder can't be used."""
        aside = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._take_lock()
            try:
                self._db = self._connect()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
                aside = self._move_aside(error)
                self._db = self._connect()
        except (OSError, sqlite3.Error) as error:
            raise SpoolFault(
                f"{self.path}: {error}; the folder must exist, be ours and have room: "
                f"look with `ls -ld {self.path.parent}` and `df {self.path.parent}`"
            ) from error
        return self._state(aside)

    def reopen(self) -> None:
        """Let go of the connection and take a new one, after a write has failed.

        What the kernel holds of the failed write is unknown; SQLite replays only what its checksums vouch for.
        """
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            self._db = None
        try:
            self._db = self._connect()
        except sqlite3.Error as error:
            raise SpoolFault(f"{self.path}: {error}") from error

    def commit(self, work: Commit) -> None:
        """Write everything in one transaction, on the disk when this returns. Raises SpoolFault: none is."""
        sql = self._sql
        try:
            db = self._opened()
            with db:
                db.execute("BEGIN IMMEDIATE")
                if work.readings:
                    body = zlib.compress(msgspec.msgpack.encode(work.readings), 1)
                    past = work.first + len(work.readings)
                    db.execute(sql["add_batch"], (work.first, past, zlib.crc32(body), body))
                for hash_, body in ((m.hash, msgspec.msgpack.encode(m)) for m in work.manifests):
                    db.execute(sql["save_manifest"], (hash_, body))
                for (node, install, boot), upto, beyond in work.marks:
                    db.execute(sql["save_mark"], (node, install, boot, upto, json.dumps(beyond)))
                db.executemany(sql["delete_mark"], work.forgotten)
                db.executemany(sql["save_route"], work.cursors.items())
                for at_ms, event in work.ledger:
                    db.execute(
                        sql["add_to_ledger"],
                        (at_ms, event.node, event.install, event.boot, event.first, event.last, event.why),
                    )
                for at_ms, route, reason, reading in work.set_aside:
                    db.execute(sql["add_set_aside"], (at_ms, route, reason, msgspec.msgpack.encode(reading)))
                if work.prune_to:
                    db.execute(sql["prune"], (work.prune_to,))
        except (sqlite3.Error, OSError) as error:
            raise SpoolFault(f"{self.path}: {error}") from error

    def read(self, position: int, limit: int) -> tuple[list[Reading], int, list[Damage]]:
        """The readings from the first whole batch at or after `position` on, without a hole between them.

        Returns them with the position behind the last, and the damage met before the first. Reads on until
        `limit` readings are together; may return more. Nothing at all: ([], position, damage).
        """
        readings: list[Reading] = []
        damage: list[Damage] = []
        start = position
        try:
            rows = self._opened().execute(self._sql["read_batches"], (position, 64))
            for first, past, crc, body in rows:
                if readings and (first != start + len(readings) or len(readings) >= limit):
                    break
                batch = self._decoded(first, past, crc, body)
                if batch is None:
                    if readings:
                        break
                    damage.append(Damage(first, past))
                    start = past
                    continue
                if not readings:
                    start = max(start, first)
                readings += batch[start + len(readings) - first :]
            rows.close()
        except sqlite3.Error as error:
            raise SpoolFault(f"{self.path}: {error}") from error
        for spot in damage:
            self._quarantine(spot)
        return readings, start + len(readings), damage

    def _decoded(self, first: int, past: int, crc: int, body: bytes) -> list[Reading] | None:
        """A batch's readings; the last few are kept, since a route takes a large batch in several bites."""
        readings = self._recent.get(first)
        if readings is None:
            readings = _decode(body, crc, past - first)
            if readings is not None:
                self._recent[first] = readings
                if len(self._recent) > 4:
                    del self._recent[next(iter(self._recent))]
        return readings

    def ledger(self, limit: int) -> list[tuple[int, Event]]:
        """The newest entries first: (unix ms, what was given up and why)."""
        rows = self._opened().execute(self._sql["read_ledger"], (limit,))
        return [(at, Event("gap", node, ins, boot, a, b, why)) for at, node, ins, boot, a, b, why in rows]

    def counts(self) -> tuple[dict[str, int], int]:
        """(ledger entries by reason, readings set aside)."""
        db = self._opened()
        reasons = dict(db.execute(self._sql["count_ledger"]).fetchall())
        return reasons, int(db.execute(self._sql["count_set_aside"]).fetchone()[0])

    def used_bytes(self) -> int:
        """Bytes in use in the main file; free pages count as free."""
        pages, free, size = (
            int(self._opened().execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("page_count", "freelist_count", "page_size")
        )
        return (pages - free) * size

    def shrink(self) -> None:
        """Give pages that pruning freed back to the file system, some at a time."""
        # executescript: a plain execute() of this pragma frees a single page.
        self._opened().executescript("PRAGMA incremental_vacuum(256)")

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        self._lock = os.open(self.path.parent / "spool.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SpoolFault(f"{self.path}: another gateway has this spool open; end that one first") from None

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, isolation_level=None, timeout=5, cached_statements=64)
        try:
            db.execute("PRAGMA auto_vacuum=INCREMENTAL")  # counts only before the first table is made
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            version = int(db.execute("PRAGMA user_version").fetchone()[0])
            if version > SCHEMA:
                raise SpoolFault(
                    f"{self.path}: written by a newer Fieldpost (schema {version}, this one reads {SCHEMA}); "
                    "install that version again, the readings are untouched"
                )
            if version == 0:
                schema = files(__package__).joinpath("schema.sql").read_text()
                db.executescript(f"BEGIN; {schema} PRAGMA user_version={SCHEMA}; COMMIT;")
                db.execute(self._sql["save_meta"], ("generation", secrets.token_hex(6)))
            self.path.chmod(0o600)
        except BaseException:
            db.close()
            raise
        return db

    def _state(self, aside: Path | None) -> Opened:
        db, sql = self._opened(), self._sql
        meta = dict(db.execute(sql["load_meta"]).fetchall())
        boot = int(meta.get("boot", 0)) + 1
        db.execute(sql["save_meta"], ("boot", str(boot)))
        oldest, past = db.execute(sql["bounds"]).fetchone()
        cursors = dict(db.execute(sql["load_routes"]).fetchall())
        marks = [
            ((node, install, at), upto, [(a, b) for a, b in json.loads(beyond)])
            for node, install, at, upto, beyond in db.execute(sql["load_marks"])
        ]
        return Opened(
            generation=meta["generation"],
            boot=boot,
            oldest=oldest,
            # A cursor is never ahead of what is committed, and what is pruned was before every cursor.
            head=max([past, *cursors.values()]),
            marks=marks,
            cursors=cursors,
            manifests=[_manifests.decode(body) for (body,) in db.execute(sql["load_manifests"])],
            aside=aside,
        )

    def _move_aside(self, error: Exception) -> Path:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        aside = self.path.with_name(f"spool.damaged-{stamp}-{secrets.token_hex(2)}.db")
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                self.path.with_name(self.path.name + suffix).rename(str(aside) + suffix)
        log.error("%s can't be read (%s); set aside as %s, starting a new spool", self.path, error, aside)
        return aside

    def _quarantine(self, spot: Damage) -> None:
        try:
            db = self._opened()
            with db:
                db.execute("BEGIN IMMEDIATE")
                db.execute(self._sql["move_damaged"], (spot.first,))
                db.execute(self._sql["delete_batch"], (spot.first,))
        except sqlite3.Error as error:
            raise SpoolFault(f"{self.path}: {error}") from error
        log.error("readings %d to %d are damaged on the card; set aside", spot.first, spot.past - 1)

    def _opened(self) -> sqlite3.Connection:
        if self._db is None:
            raise SpoolFault(f"{self.path}: not open")
        return self._db


def _decode(body: bytes, crc: int, count: int) -> list[Reading] | None:
    """The readings of a batch, or None where they are not what was written."""
    if zlib.crc32(body) != crc:
        return None
    try:
        readings = _readings.decode(zlib.decompress(body))
    except (zlib.error, msgspec.MsgspecError):
        return None
    return readings if len(readings) == count else None


def _statements() -> dict[str, str]:
    """The named statements of statements.sql."""
    text = files(__package__).joinpath("statements.sql").read_text()
    parts = text.split("-- name: ")[1:]
    return {part.split("\n", 1)[0].strip(): part.split("\n", 1)[1].strip() for part in parts}
