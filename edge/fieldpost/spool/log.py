"""The spool on the card: committed batches, and the state that belongs to them, in one SQLite file.

Everything here blocks and belongs to the one thread that `Spool` runs it in.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import sqlite3
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..errors import SpoolBroken, SpoolFault
from ..reading import Event, Reading
from . import codec
from .database import PAGE_BYTES, SCHEMA, about, connect, create, statements, write_state
from .folder import Folder, advice, born
from .repair import Report, Salvaged, remember_rows, salvage, verify
from .rows import (
    Commit,
    Ids,
    Info,
    Opened,
    Piece,
    Prunable,
    Refused,
    Write,
    bounds,
    crc_of_batch,
    crc_of_state,
    decode_row,
    ids_in,
    ids_of,
    load,
    place,
    place_position,
)
from .stage import LaneName

log = logging.getLogger(__name__)

PRUNED_AT_ONCE = 512
KEPT_LEDGER = 10_000
"""Entries that can be looked at; what they count goes on being counted."""

_reading = msgspec.msgpack.Decoder(Reading)
_pack = msgspec.msgpack.encode


class Log:
    """The file. `open` always succeeds where the operating system lets it; nothing is ever wiped."""

    def __init__(self, folder: Path) -> None:
        self._folder = Folder(folder, PAGE_BYTES)
        self.path = self._folder.main
        self._db: sqlite3.Connection | None = None
        self._sql = statements()
        self._page_bytes = PAGE_BYTES
        self._recent: dict[tuple[int, ...], list[Reading]] = {}
        self._is_new = False
        self._is_believed = True
        self._pruned_to: dict[LaneName, int] = {}

    # Opening.

    def open(self) -> Opened:
        """Open the file, or make it. Raises SpoolFault where the folder can't be used."""
        try:
            self._folder.lock()
            try:
                return self._open()
            except SpoolBroken as broken:
                return self.rebuild(str(broken))
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise SpoolFault(f"{self.path}: {advice(self.path, error)}") from error
        except SpoolFault:
            self.close()
            raise

    def _open(self) -> Opened:
        with self._guard():
            finished = self._folder.finish()
            if self.path.is_dir():
                raise SpoolBroken("is a directory")
            old = self._folder.was_here()
            if old.get("generation") and (not self.path.exists() or self.path.stat().st_size == 0):
                raise SpoolBroken(f"is missing or empty, spool {old['generation']} was here")
            other = self._folder.see_whose_it_is(SCHEMA)
            if other is not None:
                raise SpoolBroken(about(other))
            self._folder.mend_log()
            self._folder.let_the_log_go()
            self._is_believed = self._folder.write_log_anew()
            self._db = connect(self.path)
            version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
            if version not in (0, SCHEMA):
                raise SpoolBroken(about(version))
            if version == 0 and self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise SpoolBroken(about(version))
            if version == 0:
                create(self._db)
            self.path.chmod(0o600)
            tree = "; ".join(str(row[0]) for row in self._db.execute("PRAGMA integrity_check(state)").fetchall())
            if tree != "ok":
                raise SpoolBroken(f"is damaged: {tree}")
            opened = self._state()
            if opened.missing:
                raise SpoolBroken(f"lacks {sum(past - first for (_, first, past), _ in opened.missing)} readings")
            restored = bool(old) and old.get("file") != born(self.path)
            if version == 0 or not opened.generation or restored:
                # What has this identity may be elsewhere and go on there: two spools must not number alike.
                opened.generation, opened.boot = secrets.token_hex(6), 1
                if restored and not finished:
                    log.warning("%s is a copy; it goes on as generation %s", self.path, opened.generation)
            if finished:
                opened.is_doubtful = True
                opened.aside.append(f"{finished}: was set aside before a power cut")
            self._begin(opened)
            return opened

    def _begin(self, opened: Opened) -> None:
        """Put down this boot before anything is numbered with it; on a full card, number as somebody else."""
        try:
            state: dict[str, bytes | None] = {"boot": _pack((opened.generation, opened.boot))}
            write_state(self._writable(), self._sql, state)
            self._folder.note_open()
        except (sqlite3.OperationalError, OSError) as error:
            opened.generation, opened.boot = secrets.token_hex(6), 1
            log.error("%s: %s; what is stored can be sent, nothing new is taken", self.path, error)
        self._folder.is_here(opened.generation)

    def rebuild(self, why: str) -> Opened:
        """Take over into a new file whatever of this one can be read, and set it aside. Nothing is deleted.

        The old file keeps its name until the new one is whole and on the disk: a power cut begins this anew, or finds
        it done.
        """
        self._drop()
        self._is_believed = True
        aside = self._folder.name_aside()
        log.error("%s %s; set aside as %s, starting a new spool", self.path, why, aside.name)
        try:
            salvaged = self._make_ready()
            self._folder.put_in_place(aside)
            self._db = connect(self.path)
            opened = self._state()
        except (sqlite3.Error, OSError) as error:
            self._drop()
            raise SpoolFault(f"{self.path}: {advice(self.path, error)}") from error
        log.error("%d readings of %s were taken over", salvaged.readings, aside.name)
        self._is_new = opened.is_doubtful = True
        for lane, ids in salvaged.lost:
            holes = [at for at, ((name, _, _), known) in enumerate(opened.missing) if name is lane and not known]
            if holes:
                opened.missing[holes[0]][1].extend(ids)
            else:
                opened.missing.append(((lane, 0, 0), ids))
        opened.generation, opened.boot = secrets.token_hex(6), 1
        self._begin(opened)
        opened.aside.append(f"{aside.name}: {why}"[:150])
        return opened

    def _make_ready(self) -> Salvaged:
        new = self._folder.begin_new()
        with contextlib.closing(connect(new)) as db:
            create(db)
            salvaged = salvage(self.path, db)
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        self._folder.is_ready(new)
        return salvaged

    def reopen(self) -> None:
        """Let go of the connection and take a new one, after a write has failed.

        What the kernel shows of the failed write may not be on the disk, so all of the log is written anew.
        """
        self._drop()
        with self._guard():
            self._folder.finish()
            self._is_believed = self._folder.write_log_anew()
            self._db = connect(self.path)
            self._db.execute(self._sql["load_state"]).fetchall()

    def _drop(self) -> None:
        self._recent.clear()
        if self._db is not None:
            with contextlib.suppress(OSError):
                self._folder.let_the_log_go()
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            self._db = None

    def _state(self) -> Opened:
        db, sql = self._opened(), self._sql
        state: dict[str, Any] = {}
        is_doubtful = False
        for key, value, crc in db.execute(sql["load_state"]).fetchall():
            if not isinstance(value, bytes) or crc_of_state(key, value) != crc:
                log.error("%s: the entry %r is damaged; set aside", self.path, key)
                self._set_aside_row(db, f"state {key}", value)
                with contextlib.suppress(sqlite3.Error):
                    db.execute(sql["delete_state"], (key,))
                is_doubtful = True
                continue
            state[key] = value
        if is_doubtful:
            remember_rows(db)
            rows = db.execute(sql["load_state"]).fetchall()
            state = {k: v for k, v, crc in rows if isinstance(v, bytes) and crc_of_state(k, v) == crc}
        opened = load(state)
        opened.is_doubtful = is_doubtful
        for name in LaneName:
            first, last = db.execute(sql["bounds"], bounds(name)).fetchone()
            if last is not None:
                opened.oldest[name] = place_position(first)
                row = db.execute(sql["read_batches"], (last, last, last + 1, 1)).fetchone()
                if row is not None and decode_row(row) is not None:
                    opened.heads[name] = max(opened.heads[name], row[1])
            if not opened.oldest[name]:
                opened.oldest[name] = opened.heads[name] if last is None else place_position(first)
            opened.missing += [((name, a, b), []) for a, b in self._holes(opened, name)]
        if "counts" not in state:
            opened.counts = {str(word): int(n) for word, n in db.execute(sql["count_ledger"]).fetchall()}
        opened.set_aside = int(db.execute(sql["count_set_aside"]).fetchone()[0])
        return opened

    def _holes(self, opened: Opened, name: LaneName) -> list[tuple[int, int]]:
        """Positions that some route has yet to get and that no batch holds."""
        routes = [saved for (_, lane), saved in opened.progress.items() if lane is name]
        pieces = [(span.first, span.past) for _, spans in routes for span in spans if span.whole]
        pieces += [(live, opened.heads[name]) for live, _ in routes if live is not None]
        if not pieces:
            return []
        wanted = min(first for first, _ in pieces)
        holes, at = [], wanted
        for info in self.infos(name, max(0, wanted - 1), limit=-1, covering=True):
            if info.first > at:
                holes.append((at, info.first))
            at = max(at, info.past)
        if at < opened.heads[name]:
            holes.append((at, opened.heads[name]))
        return [
            (max(a, first), min(b, past))
            for a, b in holes
            for first, past in sorted(set(pieces))
            if max(a, first) < min(b, past)
        ]

    # Writing.

    def commit(self, work: Commit) -> None:
        """Write everything in one transaction, on the disk when this returns. Raises SpoolFault: none is."""
        with self._guard(), self._transaction() as db:
            for lane, first, readings in work.batches:
                self._add(db, lane, first, first + len(readings), readings, work.at_ms, thinned=False)
            for info, readings in work.work.replaced:
                self._add(db, info.lane, info.first, info.past, readings, info.at_ms, thinned=True)
            write_state(db, self._sql, work.state)
            self._add_records(db, work.work)
            for info in work.work.deleted:
                db.execute(self._sql["delete_batch"], (place(info.lane, info.first),))
            for lane, prunable in work.prune.items():
                self._prune(db, lane, prunable)

    def _add(
        self,
        db: sqlite3.Connection,
        lane: LaneName,
        first: int,
        past: int,
        readings: Sequence[Reading],
        at_ms: int,
        *,
        thinned: bool,
    ) -> None:
        times = [reading.time_ms for reading in readings] or [0]
        head = (place(lane, first), past, len(readings), int(thinned), at_ms, min(times), max(times))
        body = codec.encode(readings)
        ids = _pack(ids_of(readings))
        ids = struct.pack("<I", zlib.crc32(ids)) + ids
        db.execute(self._sql["add_batch"], (*head, crc_of_batch(head, ids, body), ids, body))

    def _add_records(self, db: sqlite3.Connection, work: Write) -> None:
        for at_ms, e in work.ledger:
            row = (at_ms, e.node, e.install, e.boot, e.first, e.last, e.why)
            db.execute(self._sql["add_to_ledger"], row)
        if work.ledger:
            db.execute(self._sql["trim_ledger"], (KEPT_LEDGER,))
        for refusal in work.refused:
            body = _pack(refusal.reading)
            crc = zlib.crc32(body)
            db.execute(self._sql["add_set_aside"], (refusal.at_ms, refusal.route, refusal.reason, body, crc))
        for number in work.settled:
            db.execute(self._sql["delete_set_aside"], (number,))

    def _prune(self, db: sqlite3.Connection, lane: LaneName, prunable: Prunable) -> None:
        """Delete what nobody wants and was kept long enough: a round over all batches, some at each commit."""
        low, high = bounds(lane)
        start = self._pruned_to.get(lane, low)
        rows = db.execute(self._sql["prunable_batches"], (start, high, PRUNED_AT_ONCE)).fetchall()
        rows = [row for row in rows if all(isinstance(n, int) for n in row)]  # a damaged one is met when it is read
        for at, past, at_ms in rows:
            first = place_position(at)
            wanted = any(first < end and past > begin for begin, end in prunable.wanted)
            if past <= prunable.end and at_ms <= prunable.at_ms and not wanted:
                db.execute(self._sql["delete_batch"], (at,))
        last = rows[-1] if rows else (low, 0, 0)
        over = len(rows) < PRUNED_AT_ONCE or last[2] > prunable.at_ms
        self._pruned_to[lane] = low if over else last[0] + 1

    # Reading.

    def read(self, lane: LaneName, position: int, until: int, limit: int) -> Piece:
        """The readings from `position` on, up to `until` and `limit`, after whatever damage lies before them.

        A batch that was thinned ends a piece. Damaged batches are moved to the table `damaged`.
        """
        damage: list[tuple[int, int, Ids]] = []
        readings: list[Reading] = []
        at, age_ms = position, None
        low, high = bounds(lane)
        lost: Ids = []
        while at < until and len(readings) < limit:
            with self._guard():
                rows = self._opened().execute(self._sql["read_batches"], (low, place(lane, at), high, 2)).fetchall()
            # The one that covers the position or, where that ends before it, the next one.
            row = next((r for r in rows if place_position(r[0]) > at or self._decoded(r) is None or r[1] > at), None)
            batch = self._decoded(row) if row is not None else None
            if row is not None and batch is None:
                if readings:
                    break
                lost += self._quarantine(row)  # then look again: what its place was is as uncertain as all else in it
                continue
            first = place_position(row[0]) if row is not None else until
            if row is None or batch is None or first > at:
                if readings:
                    break
                hole = min(first, until)
                if not lost and not self._is_new:
                    raise SpoolBroken(f"lacks {hole - at} readings")
                damage.append((at, hole, lost))
                at, lost = hole, []
                continue
            age_ms = row[4] if age_ms is None else age_ms
            part = batch[at - first : at - first + limit - len(readings)]
            part = part[: until - at]
            readings += part
            at += len(part)
            if at >= first + len(batch):
                dense = row[1] == first + len(batch)
                at = min(row[1], until)
                if not dense:
                    break
        if lost:
            damage.insert(0, (position, position, lost))
        return Piece(damage[-1][1] if damage else position, at, readings, age_ms or 0, damage)

    def rest(self, lane: LaneName, position: int, until: int) -> Piece | None:
        """What is left of the batch that holds a position; None where it was deleted meanwhile, which is no damage."""
        for info in self.infos(lane, position, limit=1, covering=True):
            if info.first <= position < info.past:
                return self.read(lane, position, min(info.past, until), info.count)
        return None

    def infos(self, lane: LaneName, position: int, *, limit: int, covering: bool = False) -> list[Info]:
        """Batches from a position on (with the one that holds it, where `covering`), without their readings."""
        low, high = bounds(lane)
        start = place(lane, position)
        with self._guard():
            db = self._opened()
            if covering:
                _, before = db.execute(self._sql["bounds"], (low, start + 1)).fetchone()
                start = before if before is not None else start
            rows = db.execute(self._sql["list_batches"], (start, high, limit)).fetchall()
        return [
            Info(lane, place_position(at), past, count, bool(thinned), at_ms, since, until, size)
            for at, past, count, thinned, at_ms, since, until, size in rows
            if all(isinstance(n, int) for n in (at, past, count, at_ms, since, until)) and past > place_position(at)
        ]

    def _decoded(self, row: tuple[Any, ...]) -> list[Reading] | None:
        """A batch's readings, None where damaged; the last few are kept: a route takes a batch in several bites."""
        key = row[:8]  # with its checksum: a damaged row may say that its place is that of another
        readings = self._recent.get(key)
        if readings is None:
            readings = decode_row(row)
            if readings is not None:
                self._recent[key] = readings
                if len(self._recent) > 2:
                    del self._recent[next(iter(self._recent))]
        return readings

    def _quarantine(self, row: tuple[Any, ...]) -> Ids:
        """Move a damaged batch aside; returns who was in it, as far as that can be told."""
        with self._guard(), self._transaction() as db:
            if len(db.execute(self._sql["list_batches"], (row[0], row[0] + 1, 2)).fetchall()) != 1:
                raise sqlite3.DatabaseError(f"several rows are at {row[0]}, or no way leads there")
            self._set_aside_row(db, "batch", row)
            if db.execute(self._sql["delete_batch"], (row[0],)).rowcount != 1:
                raise sqlite3.DatabaseError(f"no way leads to the row at {row[0]}")
        log.error("%s: a batch of %s readings is damaged on the card; set aside", self.path, row[2])
        return ids_in(row[8])

    def _set_aside_row(self, db: sqlite3.Connection, what: str, row: object) -> None:
        with contextlib.suppress(sqlite3.OperationalError):  # a full card: it stays where it is
            db.execute(self._sql["add_damaged"], (what, _pack(row)))

    def ledger(self, limit: int) -> list[tuple[int, Event]]:
        """The newest entries first: (unix ms, what was given up and why)."""
        with self._guard():
            rows = self._opened().execute(self._sql["read_ledger"], (limit,)).fetchall()
        return [(at, Event("gap", node, ins, boot, a, b, why)) for at, node, ins, boot, a, b, why in rows]

    def refused(self) -> list[Refused]:
        """The readings that are set aside, oldest first; damaged ones are left out."""
        with self._guard():
            rows = self._opened().execute(self._sql["read_set_aside"]).fetchall()
        return [
            Refused(number, at_ms, route, reason, _reading.decode(body))
            for number, at_ms, route, reason, body, crc in rows
            if isinstance(body, bytes) and zlib.crc32(body) == crc
        ]

    # How it is.

    def verify(self, tell: Callable[[int, int], None] = lambda done, of: None) -> Report:
        """Read everything and compare it with its checksums; `tell(batches done, of how many)` as it goes."""
        with self._guard():
            return verify(self._opened(), tell)

    def used_bytes(self) -> int:
        """Bytes in use of the main file; free pages count as free. The write-ahead log adds some MB at the most."""
        with self._guard():
            db = self._opened()
            pages = int(db.execute("PRAGMA page_count").fetchone()[0])
            free = int(db.execute("PRAGMA freelist_count").fetchone()[0])
        return (pages - free) * self._page_bytes

    def body_bytes(self, lane: LaneName) -> int:
        """Bytes of all bodies of a lane."""
        return sum(info.bytes for info in self.infos(lane, 0, limit=-1))

    def shrink(self) -> None:
        """Give pages that pruning freed back to the file system, some at a time."""
        with self._guard():
            # executescript: a plain execute() of this pragma frees a single page.
            self._opened().executescript("PRAGMA incremental_vacuum(1024)")

    def close(self) -> None:
        self._drop()
        self._folder.unlock()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        db = self._writable()
        with db:
            db.execute("BEGIN IMMEDIATE")
            yield db

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """What SQLite raises, as what is to be done about it."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if any(word in str(error) for word in ("no such", "has no column", "unsupported file format")):
                # The schema is damaged, or the header: the statements are right.
                raise SpoolBroken(f"can't be read ({error})") from error
            raise SpoolFault(f"{self.path}: {advice(self.path, error)}") from error
        except (sqlite3.DatabaseError, UnicodeDecodeError, OverflowError) as error:
            raise SpoolBroken(f"can't be read ({error})") from error
        except OSError as error:
            raise SpoolFault(f"{self.path}: {advice(self.path, error)}") from error

    def _writable(self) -> sqlite3.Connection:
        if not self._is_believed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._opened()

    def _opened(self) -> sqlite3.Connection:
        if self._db is None:
            raise SpoolFault(f"{self.path}: not open")
        return self._db
