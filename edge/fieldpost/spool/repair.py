"""What can be read of a damaged or foreign file, and whether a spool is whole. Nothing here changes what it reads."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import shutil
import sqlite3
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ..reading import GATEWAY, Manifest, Reading
from . import codec
from .database import PAGE_BYTES, connect, create, statements, write_state
from .marks import Marks
from .pages import Pages
from .rows import (
    LANE_BITS,
    Ids,
    bounds,
    crc_of_batch,
    crc_of_state,
    decode_row,
    ids_in,
    load,
    place,
    place_position,
)
from .stage import LaneName
from .wal import committed, mend

log = logging.getLogger(__name__)

_pack = msgspec.msgpack.encode
TELL_EVERY = 200_000
OURS = {"batch", "state", "mark", "ledger", "set_aside", "damaged"}
UNREADABLE = (sqlite3.Error, UnicodeDecodeError, OverflowError)
"""What reading a damaged file raises; also where SQLite's own message quotes bytes that are no text."""

POINTER_MAP = 2
"""The page that says whose child each page is; reading needs none."""


@dataclass(slots=True)
class Salvaged:
    """How many `readings` were taken over. `lost`: who was in rows that are damaged, as far as that can be told."""

    readings: int = 0
    lost: list[tuple[LaneName, Ids]] = field(default_factory=list)


def salvage(source: Path, db: sqlite3.Connection) -> Salvaged:
    """Take over into a new spool whatever of `source` can be read.

    First along the trees of its tables, as SQLite finds them, then every page for itself, for rows to which no tree
    leads any more. Only what has the right checksum is taken.
    """
    if not source.is_file():
        return Salvaged()
    tables = _tables(source)
    if tables and not tables & OURS:
        log.error("%s is the database of another program", source)
        return Salvaged()
    if "mark" in tables and "state" not in tables:
        return _salvage_from(source, db, _salvage_first_schema)
    image = source.with_name(source.name + ".image")
    try:
        _make_image(source, image)
        salvaged = _salvage_from(image, db, _salvage_tables)
        with db, image.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            db.execute("BEGIN IMMEDIATE")
            _salvage_pages(Pages(content, PAGE_BYTES), db, salvaged)
    except (OSError, sqlite3.OperationalError) as error:
        log.warning("%s is read in its place: %s", source, error)
        salvaged = _salvage_from(source, db, _salvage_tables)
    finally:
        image.unlink(missing_ok=True)
    remember_rows(db)
    return salvaged


def _tables(source: Path) -> set[str]:
    """The names of the tables in a file, none where it can't be read."""
    try:
        with contextlib.closing(_open_readonly(source)) as old:
            return {str(name) for (name,) in old.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except UNREADABLE:
        return set()


def _make_image(source: Path, image: Path) -> None:
    """What `source` is together with its write-ahead log, and with the schema of a new spool in the place of its own:
    the tables of every spool begin on the same pages."""
    shutil.copyfile(source, image)
    template = image.with_name(image.name + ".new")
    files = [template.with_name(template.name + suffix) for suffix in ("", "-wal", "-journal")]
    try:
        for left in files:  # by a power cut
            left.unlink(missing_ok=True)
        new = connect(template)
        create(new)
        roots = {int(page) for (page,) in new.execute("SELECT rootpage FROM sqlite_master")}
        new.close()
        content = template.read_bytes()
    finally:
        for left in files:
            left.unlink(missing_ok=True)
    wal = source.with_name(source.name + "-wal")
    logged = committed(mend(wal.read_bytes(), PAGE_BYTES).content, PAGE_BYTES)[0] if wal.is_file() else {}
    schema = {
        number: content[(number - 1) * PAGE_BYTES : number * PAGE_BYTES]
        for number in range(1, len(content) // PAGE_BYTES + 1)
        if number not in roots and number != POINTER_MAP
    }
    # The size in the header counts only where both counters agree (file format, section 1.3.8); so does the file's.
    first = bytearray(schema[1])
    first[24:28], first[92:96] = b"\0\0\0\1", b"\0\0\0\0"
    with image.open("r+b") as file:
        for number, page in {**logged, **schema, 1: bytes(first)}.items():
            file.seek((number - 1) * PAGE_BYTES)
            file.write(page)
        file.seek(0, os.SEEK_END)
        file.truncate(-(-file.tell() // PAGE_BYTES) * PAGE_BYTES)


def _salvage_from(
    source: Path, db: sqlite3.Connection, take: Callable[[sqlite3.Connection, sqlite3.Connection], Salvaged]
) -> Salvaged:
    try:
        with contextlib.closing(_open_readonly(source)) as old, db:
            db.execute("BEGIN IMMEDIATE")
            return take(old, db)
    except sqlite3.OperationalError:
        raise
    except UNREADABLE as error:
        log.warning("%s: %s", source, error)
        return Salvaged()


def _open_readonly(source: Path) -> sqlite3.Connection:
    """The file as it is, with its write-ahead log where that can be had. Raises sqlite3.Error."""
    modes = ["immutable=1"] if source.suffix == ".image" else ["mode=ro", "immutable=1"]
    for mode in modes:
        db = sqlite3.connect(f"file:{source}?{mode}", uri=True)
        try:
            db.text_factory = lambda text: text.decode("utf-8", "replace")
            db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except UNREADABLE:
            db.close()
            if mode == modes[-1]:
                raise
        else:
            return db
    raise AssertionError("unreachable")


def _salvage_tables(old: sqlite3.Connection, db: sqlite3.Connection) -> Salvaged:
    sql = statements()
    salvaged, told = Salvaged(), 0
    for row in _rows(old, "batch", "place"):
        if (readings := decode_row(row)) is None:
            db.execute(sql["add_damaged"], ("batch", _pack(row)))
            lane = LaneName.URGENT if isinstance(row[0], int) and row[0] < place(LaneName.BULK, 0) else LaneName.BULK
            salvaged.lost.append((lane, ids_in(row[8])))
            continue
        db.execute(sql["add_batch"], row)
        salvaged.readings += len(readings)
        if salvaged.readings - told >= TELL_EVERY:
            told = salvaged.readings
            log.info("%d readings taken over", told)
    for key, value, crc in _rows(old, "state", "key"):
        if isinstance(key, str) and isinstance(value, bytes) and crc_of_state(key, value) == crc:
            write_state(db, sql, {key: value})
        else:
            db.execute(sql["add_damaged"], (f"state {key}", _pack(value)))
    for table, statement in (("ledger", "add_to_ledger"), ("set_aside", "add_set_aside"), ("damaged", "add_damaged")):
        for row in _rows(old, table, "id"):
            with contextlib.suppress(sqlite3.IntegrityError):
                db.execute(sql[statement], row[1:])
    return salvaged


def _salvage_pages(pages: Pages, db: sqlite3.Connection, salvaged: Salvaged) -> None:
    """Take over the rows that the trees did not lead to. Old ones lie about as well: what is there already is newer."""
    sql = statements()
    state = {str(key): bytes(value) for key, value, _ in db.execute(sql["load_state"]).fetchall()}
    there = {name: _held(db, name) for name in LaneName}
    heads = msgspec.msgpack.decode(state["heads"], type=list[int]) if "heads" in state else None
    free = [row for row in pages.batches() if _is_free(row, there) and decode_row(row) is not None]
    for row in sorted(free, key=lambda row: int(row[4]), reverse=True):
        if _is_free(row, there) and (heads is None or row[1] <= heads[row[0] >> LANE_BITS]):
            db.execute(sql["add_batch"], row)
            there[LaneName(row[0] >> LANE_BITS)].append((place_position(row[0]), row[1]))
            salvaged.readings += row[2]
    found: dict[str, list[bytes]] = {}
    for key, value, crc in pages.state():
        if key not in state and isinstance(value, bytes) and crc_of_state(key, value) == crc:
            found.setdefault(key, []).append(value)
    for key, values in found.items():
        write_state(db, sql, {key: max(values, key=_progress_in)})
    refused = {bytes(body) for _, _, _, _, body, _ in db.execute(sql["read_set_aside"]).fetchall()}
    for new in pages.refused():
        if new[3] not in refused:
            refused.add(new[3])
            db.execute(sql["add_set_aside"], new)


def _is_free(row: tuple[Any, ...], there: dict[LaneName, list[tuple[int, int]]]) -> bool:
    """Whether a row has a place that can be, where nothing lies."""
    if not 0 <= row[0] < len(LaneName) << LANE_BITS:
        return False
    first, past = place_position(row[0]), row[1]
    return not any(a < past and b > first for a, b in there[LaneName(row[0] >> LANE_BITS)])


def _held(db: sqlite3.Connection, lane: LaneName) -> list[tuple[int, int]]:
    rows = db.execute(statements()["list_batches"], (*bounds(lane), -1)).fetchall()
    return [(place_position(row[0]), row[1]) for row in rows]


def _progress_in(value: bytes) -> Any:
    """By which the newest of several versions of an entry can be told: all of ours only grow."""
    decoded = msgspec.msgpack.decode(value)
    while isinstance(decoded, list) and decoded:
        decoded = decoded[0]
    return decoded if isinstance(decoded, int) else -1


def remember_rows(db: sqlite3.Connection) -> None:
    """Have the marks know every row that is stored: an entry that was lost must not let in a row a second time."""
    sql = statements()
    marks = Marks()
    rows = db.execute(sql["load_state"]).fetchall()
    whole = {key: value for key, value, crc in rows if isinstance(value, bytes) and crc_of_state(key, value) == crc}
    for key, upto, beyond in load(whole).marks:
        marks.load(key, upto, beyond)
    for (blob,) in db.execute(sql["list_ids"]):
        for node, install, boot, first, last in ids_in(blob):
            if node != GATEWAY:
                marks.take((node, install, boot), first, last)
    state: dict[str, bytes | None] = {}
    for (node, install, boot), upto, beyond in marks.changes()[0]:
        state[f"mark/{node}/{install}/{boot}"] = _pack((upto, beyond))
    write_state(db, sql, state)


def _rows(old: sqlite3.Connection, table: str, key: str) -> Iterator[tuple[Any, ...]]:
    """Every row that can be reached, from both ends of the table towards the damage."""
    seen: set[Any] = set()
    for order in ("ASC", "DESC"):
        with contextlib.suppress(*UNREADABLE):
            rows = old.execute(f"SELECT * FROM {table} ORDER BY {key} {order}")
            while (row := rows.fetchone()) is not None:
                if row[0] in seen:
                    break
                seen.add(row[0])
                yield row
            else:
                return


def _salvage_first_schema(old: sqlite3.Connection, db: sqlite3.Connection) -> Salvaged:
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
    return Salvaged(taken)


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


def verify(db: sqlite3.Connection, tell: Callable[[int, int], None] = lambda done, of: None) -> Report:
    """Read everything and compare it with its checksums; `tell(batches done, of how many)` as it goes."""
    report = Report()
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
