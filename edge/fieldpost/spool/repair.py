"""What can be read of a damaged or foreign file, and whether a spool is whole. Nothing here changes what it reads."""

from __future__ import annotations

import contextlib
import logging
import shutil
import sqlite3
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from ..reading import Manifest, Reading
from . import codec
from .log import (
    PAGE_BYTES,
    Log,
    connect,
    crc_of_batch,
    crc_of_state,
    create,
    decode_row,
    place,
    statements,
    write_state,
)
from .stage import LaneName

log = logging.getLogger(__name__)

_pack = msgspec.msgpack.encode
TELL_EVERY = 200_000


def salvage(source: Path, db: sqlite3.Connection) -> int:
    """Take over into a new spool whatever of `source` can be read; returns how many readings.

    A file whose first page is lost is read with the first page of a new spool in its place: the tables of every
    spool begin on the same pages.
    """
    if not source.is_file():
        return 0
    taken = _salvage(source, db)
    if taken == 0 and source.stat().st_size > PAGE_BYTES:
        graft = source.with_suffix(".graft")
        try:
            _graft(source, graft)
            taken = _salvage(graft, db)
        except (OSError, sqlite3.Error) as error:
            log.warning("%s: a new first page does not help (%s)", source, error)
        finally:
            for suffix in ("", "-wal", "-shm"):
                graft.with_name(graft.name + suffix).unlink(missing_ok=True)
    return taken


def _graft(source: Path, graft: Path) -> None:
    shutil.copyfile(source, graft)
    template = graft.with_name(graft.name + ".new")
    try:
        new = connect(template)
        create(new)
        new.close()
        page = bytearray(template.read_bytes()[:PAGE_BYTES])
    finally:
        for suffix in ("", "-wal"):
            template.with_name(template.name + suffix).unlink(missing_ok=True)
    # The size in the header counts only where both counters agree (file format, section 1.3.8); so does the file's.
    page[24:28] = b"\0\0\0\1"
    page[92:96] = b"\0\0\0\0"
    with graft.open("r+b") as file:
        file.write(page)


def _salvage(source: Path, db: sqlite3.Connection) -> int:
    old = _open_readonly(source)
    if old is None:
        return 0
    with contextlib.closing(old):
        try:
            version = int(old.execute("PRAGMA user_version").fetchone()[0])
            with db:
                db.execute("BEGIN IMMEDIATE")
                return _salvage_first_schema(old, db) if version == 1 else _salvage_tables(old, db)
        except sqlite3.DatabaseError as error:
            log.warning("%s: %s", source, error)
            return 0


def _open_readonly(source: Path) -> sqlite3.Connection | None:
    """The file as it is, with its write-ahead log where that can be had."""
    for mode in ("mode=ro", "immutable=1"):
        with contextlib.suppress(sqlite3.Error):
            db = sqlite3.connect(f"file:{source}?{mode}", uri=True)
            db.text_factory = lambda text: text.decode("utf-8", "replace")
            try:
                db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            except BaseException:
                db.close()
                raise
            return db
    return None


def _salvage_tables(old: sqlite3.Connection, db: sqlite3.Connection) -> int:
    sql = statements()
    taken, told = 0, 0
    for row in _rows(old, "batch", "place"):
        if (readings := decode_row(row)) is None:
            db.execute(sql["add_damaged"], ("batch", _pack(row)))
            continue
        db.execute(sql["add_batch"], row)
        taken += len(readings)
        if taken - told >= TELL_EVERY:
            told = taken
            log.info("%d readings taken over", taken)
    for key, value, crc in _rows(old, "state", "key"):
        if isinstance(key, str) and isinstance(value, bytes) and crc_of_state(key, value) == crc:
            write_state(db, sql, {key: value})
        else:
            db.execute(sql["add_damaged"], (f"state {key}", _pack(value)))
    for row in _rows(old, "ledger", "id"):
        with contextlib.suppress(sqlite3.IntegrityError):
            db.execute(sql["add_to_ledger"], row[1:])
    for row in _rows(old, "set_aside", "id"):
        with contextlib.suppress(sqlite3.IntegrityError):
            db.execute(sql["add_set_aside"], row[1:])
    for row in _rows(old, "damaged", "id"):
        with contextlib.suppress(sqlite3.IntegrityError):
            db.execute(sql["add_damaged"], row[1:])
    return taken


def _rows(old: sqlite3.Connection, table: str, key: str) -> Iterator[tuple[Any, ...]]:
    """Every row that can be reached, from both ends of the table towards the damage."""
    seen: set[Any] = set()
    for order in ("ASC", "DESC"):
        with contextlib.suppress(sqlite3.DatabaseError):
            rows = old.execute(f"SELECT * FROM {table} ORDER BY {key} {order}")
            while (row := rows.fetchone()) is not None:
                if row[0] in seen:
                    break
                seen.add(row[0])
                yield row
            else:
                return


def _salvage_first_schema(old: sqlite3.Connection, db: sqlite3.Connection) -> int:
    """From schema 1: one lane, and no checksums over the small tables."""
    sql = statements()
    taken, head = 0, 0
    for first, past, crc, body in _rows(old, "batch", "first"):
        readings = _decode_first_schema(crc, body)
        if readings is None or len(readings) != past - first:
            db.execute(sql["add_damaged"], ("batch", _pack((first, past, crc, body))))
            continue
        times = [reading.time_ms for reading in readings]
        row = (place(LaneName.BULK, first), past, len(readings), 0, 0, min(times), max(times))
        new = codec.encode(readings)
        db.execute(sql["add_batch"], (*row, crc_of_batch(row, b"", new), b"", new))
        taken += len(readings)
        head = max(head, past)
    state: dict[str, bytes | None] = {}
    for node, install, boot, upto, beyond in _rows(old, "mark", "node, boot"):
        state[f"mark/{node}/{install}/{boot}"] = _pack((upto, msgspec.json.decode(beyond)))
    for route, cursor in _rows(old, "route", "id"):
        head = max(head, cursor)
        state[f"route/{route}/{int(LaneName.BULK)}"] = _pack((cursor, []))
        state[f"route/{route}/{int(LaneName.URGENT)}"] = _pack((0, []))
    for hash_, body in _rows(old, "manifest", "hash"):
        state[f"manifest/{hash_}"] = _pack(msgspec.msgpack.decode(body, type=Manifest))
    state["heads"] = _pack([0, head])
    write_state(db, sql, state)
    for row in _rows(old, "ledger", "id"):
        db.execute(sql["add_to_ledger"], row[1:])
    for number, at_ms, route, reason, body in _rows(old, "set_aside", "id"):
        del number
        db.execute(sql["add_set_aside"], (at_ms, route, reason, body, zlib.crc32(body)))
    return taken


def _decode_first_schema(crc: int, body: bytes) -> list[Reading] | None:
    try:
        return codec.decode(body) if zlib.crc32(body) == crc else None
    except (ValueError, TypeError):
        return None


class Report(msgspec.Struct):
    """What `verify` found; `damaged` names each place in words."""

    readings: int = 0
    batches: int = 0
    bytes: int = 0
    entries: int = 0
    damaged: list[str] = []
    set_aside_rows: int = 0
    structure: str = ""

    @property
    def is_whole(self) -> bool:
        return not self.damaged and self.structure == "ok"


def verify(spool: Log, tell: Callable[[int, int], None] = lambda done, of: None) -> Report:
    """Read everything and compare it with its checksums; `tell(batches done, of how many)` as it goes."""
    report = Report()
    db = spool._opened()
    rows = db.execute("PRAGMA integrity_check(20)").fetchall()
    report.structure = "; ".join(str(row[0]) for row in rows)
    total = int(db.execute("SELECT count(*) FROM batch").fetchone()[0])
    for row in _rows(db, "batch", "place"):
        report.batches += 1
        readings = decode_row(row)
        if readings is None:
            report.damaged.append(f"batch at {row[0]}, {row[2]} readings")
        else:
            report.readings += len(readings)
            report.bytes += len(row[9])
        if report.batches % 50 == 0:
            tell(report.batches, total)
    for key, value, crc in _rows(db, "state", "key"):
        report.entries += 1
        if not isinstance(value, bytes) or crc_of_state(str(key), value) != crc:
            report.damaged.append(f"entry {key}")
    for row in _rows(db, "set_aside", "id"):
        if not isinstance(row[4], bytes) or zlib.crc32(row[4]) != row[5]:
            report.damaged.append(f"set aside {row[0]}")
    report.set_aside_rows = int(db.execute(statements()["count_damaged"]).fetchone()[0])
    tell(total, total)
    return report
