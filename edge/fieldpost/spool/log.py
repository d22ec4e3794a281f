"""The spool on the card: committed batches, and the state that belongs to them, in one SQLite file.

Everything here blocks and belongs to the one thread that `Spool` runs it in. One connection writes and
checkpoints: in SQLite before 3.51.3 a write-ahead log that two connections reset can lose a commit.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import secrets
import sqlite3
import struct
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from ..clock import Era
from ..errors import SpoolBroken, SpoolFault
from ..reading import Event, Manifest, Reading
from . import codec
from .marks import Key
from .progress import Span
from .stage import LaneName
from .wal import committed, mend

log = logging.getLogger(__name__)

SCHEMA = 2
PAGE_BYTES = 1024
"""A commit rewrites whole pages, so small ones spare the card; tests/bench/ has the figures for others."""

CHECKPOINT_PAGES = 500
"""A log that grows makes the file system write its journal at every commit, 12 to 20 kB; one that begins anew at half
a megabyte is soon as large as it gets."""

LANE_BITS = 56
AT_FDCWD, STATX_BTIME = -100, 0x800
PRUNED_AT_ONCE = 512
KEPT_LEDGER = 10_000
"""Entries that can be looked at; what they count goes on being counted."""

Ids = list[tuple[str, str, int, int, int]]
"""Rows as ranges: (node, install, boot, first, last)."""

MarksChanges = tuple[list[tuple[Key, int, list[tuple[int, int]]]], list[Key]]

_ids = msgspec.msgpack.Decoder(Ids)
_reading = msgspec.msgpack.Decoder(Reading)
_pack = msgspec.msgpack.encode


@dataclass(frozen=True, slots=True)
class Info:
    """A batch without its readings; `bytes` of body."""

    lane: LaneName
    first: int
    past: int
    count: int
    thinned: bool
    at_ms: int
    since_ms: int
    until_ms: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """A reading that a far side refused for good."""

    at_ms: int
    route: str
    reason: str
    reading: Reading


@dataclass(frozen=True, slots=True)
class Refused:
    """The same, as it lies on the card."""

    id: int
    at_ms: int
    route: str
    reason: str
    reading: Reading


@dataclass(slots=True)
class Write:
    """What rides along with the readings of a commit. `state`: what to put under a key; None deletes it."""

    state: dict[str, bytes | None] = field(default_factory=dict)
    ledger: list[tuple[int, Event]] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    settled: list[int] = field(default_factory=list)
    deleted: list[Info] = field(default_factory=list)
    replaced: list[tuple[Info, list[Reading]]] = field(default_factory=list)

    def before(self, later: Write) -> Write:
        """This, and then what came later."""
        return Write(
            self.state | later.state,
            self.ledger + later.ledger,
            self.refused + later.refused,
            self.settled + later.settled,
            self.deleted + later.deleted,
            self.replaced + later.replaced,
        )


@dataclass(frozen=True, slots=True)
class Prunable:
    """Batches before `end` that are as old as `at_ms` and hold nothing of `wanted` need be kept no longer."""

    wanted: list[tuple[int, int]]
    end: int
    at_ms: int


@dataclass(slots=True)
class Commit:
    """One transaction. `batches`: (lane, first position, readings); `ends`: how far each lane is on the card then."""

    batches: list[tuple[LaneName, int, list[Reading]]]
    ends: dict[LaneName, int]
    at_ms: int
    state: dict[str, bytes | None]
    work: Write
    marks: MarksChanges = field(default_factory=lambda: ([], []))
    dirty: set[tuple[str, LaneName]] = field(default_factory=set)
    prune: dict[LaneName, Prunable] = field(default_factory=dict)
    confirmed_unsaved: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """Readings at [first, first + n), which stand for the positions [first, past).

    `damage`: what was met before them, as (first, past, who was in it where that is known).
    """

    first: int
    past: int
    readings: list[Reading]
    at_ms: int
    damage: list[tuple[int, int, Ids]]


@dataclass(slots=True)
class Opened:
    """What a spool knows when it is opened. `aside`: where unreadable files were moved to. `missing`: holes.

    `is_doubtful`: entries were lost, so a route that nothing is known of need not be a new one.

    `session` is new with each opening: it numbers the gateway's own records, also after a card was restored from an
    image, of which nothing in the file can tell.
    """

    generation: str
    boot: int
    heads: dict[LaneName, int]
    oldest: dict[LaneName, int]
    marks: list[tuple[Key, int, list[tuple[int, int]]]] = field(default_factory=list)
    progress: dict[tuple[str, LaneName], tuple[int | None, list[Span]]] = field(default_factory=dict)
    manifests: list[Manifest] = field(default_factory=list)
    eras: list[Era] = field(default_factory=list)
    clock: tuple[int, int, str] = (0, 0, "")
    counts: dict[str, int] = field(default_factory=dict)
    set_aside: int = 0
    is_doubtful: bool = False
    session: str = field(default_factory=lambda: secrets.token_hex(6))
    aside: list[str] = field(default_factory=list)
    missing: list[tuple[tuple[LaneName, int, int], Ids]] = field(default_factory=list)


class Log:
    """The file. `open` always succeeds where the operating system lets it; nothing is ever wiped."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "spool.db"
        self._db: sqlite3.Connection | None = None
        self._lock: int | None = None
        self._sql = statements()
        self._page_bytes = PAGE_BYTES
        self._recent: dict[int, list[Reading]] = {}
        self._is_new = False
        self._is_believed = True
        self._pruned_to: dict[LaneName, int] = {}

    # Opening.

    def open(self) -> Opened:
        """Open the file, or make it. Raises SpoolFault where the folder can't be used."""
        try:
            _make_folder(self.path.parent)
            self._take_lock()
            try:
                return self._open()
            except SpoolBroken as broken:
                return self.rebuild(str(broken))
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise SpoolFault(f"{self.path}: {_advice(self.path, error)}") from error
        except SpoolFault:
            self.close()
            raise

    def _open(self) -> Opened:
        with self._guard():
            finished = self._finish_rebuild()
            if self.path.is_dir():
                raise SpoolBroken("is a directory")
            old = self._marker()
            if old.get("generation") and (not self.path.exists() or self.path.stat().st_size == 0):
                raise SpoolBroken(f"is missing or empty, spool {old['generation']} was here")
            self._see_whose_it_is()
            self._mend_wal()
            self._let_the_log_go()
            self._write_log_anew()
            self._db = connect(self.path)
            version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
            if version not in (0, SCHEMA):
                raise SpoolBroken(_about(version))
            if version == 0 and self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise SpoolBroken(_about(version))
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

    def _see_whose_it_is(self) -> None:
        """Before SQLite writes to a file that is none of ours: raises SpoolBroken. A log beside it may know better, and
        so may the journal of a file that is being made."""
        beside = (self.path.with_name(self.path.name + suffix) for suffix in ("-wal", "-journal"))
        if not self.path.exists() or any(one.exists() for one in beside):
            return
        with self.path.open("rb") as file:
            header = file.read(100)
        size = self.path.stat().st_size
        if 0 < size < 512 or (size and not header.startswith(b"SQLite format 3\0")):
            raise SpoolBroken("is no database")
        page_bytes, version = int.from_bytes(header[16:18]), int.from_bytes(header[60:64])
        if size > page_bytes and version != SCHEMA:
            raise SpoolBroken(_about(version))

    def _mend_wal(self) -> None:
        """Have a flipped bit in the write-ahead log cost no more than itself. Raises SpoolBroken where more is lost."""
        wal = self.path.with_name(self.path.name + "-wal")
        content = wal.read_bytes() if wal.is_file() else b""
        if not content:
            if self._is_open_path.exists() and self.path.exists():
                raise SpoolBroken("has lost its write-ahead log, which was there when it was last used")
            return
        mended = mend(content, PAGE_BYTES)
        if mended.content == content:
            return
        if mended.is_headless and self._has(*committed(mended.content, PAGE_BYTES)):
            return  # cut off while it began anew, which it does when the main file has all of it
        if mended.lost:  # what is left of it must not be taken for all, so it stays as it is until it was taken over
            raise SpoolBroken(f"has lost {mended.lost} pages of its write-ahead log")
        aside = self._aside()
        _write_durably(aside.with_name(aside.name + "-wal"), content)
        new = wal.with_name(wal.name + ".new")
        _write_durably(new, mended.content)
        new.replace(wal)
        log.error("%s: %d flipped bits put right; what it was is %s-wal", wal, mended.bits, aside.name)

    def _has(self, pages: Mapping[int, bytes], past: int) -> bool:
        """Whether the main file, of `past` pages, holds these as they are here."""
        if not self.path.exists():
            return False
        with self.path.open("rb") as file:
            for number, page in pages.items():
                file.seek((number - 1) * PAGE_BYTES)
                if number <= past and file.read(PAGE_BYTES) != page:
                    return False
        return True

    def _write_log_anew(self) -> None:
        """Have all of the write-ahead log on the disk before SQLite believes it and writes behind it.

        A sync that fails is told once: afterwards the kernel shows a log that is not on the disk, to the next process
        as well. What is written anew is synced anew. A full card has no room for that; it takes nothing until it has.
        """
        wal = self.path.with_name(self.path.name + "-wal")
        content = wal.read_bytes() if wal.is_file() else b""
        self._is_believed = True
        if content:
            new = wal.with_name(wal.name + ".new")
            try:
                _write_durably(new, content)
                new.replace(wal)
                _sync(wal.parent)
            except OSError as error:
                new.unlink(missing_ok=True)
                if error.errno != errno.ENOSPC:
                    raise
                self._is_believed = False

    def _aside(self) -> Path:
        """A name that is free, for what is set aside."""
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        return self.path.with_name(f"spool.damaged-{stamp}-{secrets.token_hex(2)}.db")

    @property
    def _is_open_path(self) -> Path:
        """There while a write-ahead log must be beside the file: a kill leaves both."""
        return self.path.with_name("spool.open")

    def _let_the_log_go(self) -> None:
        """Before SQLite empties or deletes the log; on the disk too, so that no power cut leaves only the mark."""
        if self._is_open_path.exists():
            self._is_open_path.unlink()
            _sync(self.path.parent)

    def _begin(self, opened: Opened) -> None:
        """Put down this boot before anything is numbered with it; on a full card, number as somebody else."""
        try:
            state: dict[str, bytes | None] = {"boot": _pack((opened.generation, opened.boot))}
            write_state(self._writable(), self._sql, state)
            self._is_open_path.touch(0o600)
        except (sqlite3.OperationalError, OSError) as error:
            opened.generation, opened.boot = secrets.token_hex(6), 1
            log.error("%s: %s; what is stored can be sent, nothing new is taken", self.path, error)
        self._mark(opened.generation)

    def rebuild(self, why: str) -> Opened:
        """Take over into a new file whatever of this one can be read, and set it aside. Nothing is deleted.

        The old file keeps its name until the new one is whole and on the disk: a power cut begins this anew, or finds
        it done.
        """
        self._drop()
        self._is_believed = True
        aside = self._aside()
        log.error("%s %s; set aside as %s, starting a new spool", self.path, why, aside.name)
        try:
            salvaged = self._make_ready()
            self._put_in_place(aside)
            self._db = connect(self.path)
            opened = self._state()
        except (sqlite3.Error, OSError) as error:
            self._drop()
            raise SpoolFault(f"{self.path}: {_advice(self.path, error)}") from error
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

    @property
    def _ready_path(self) -> Path:
        """A file that is whole, and is to take the place of one that is damaged."""
        return self.path.with_name("spool.ready.db")

    def _make_ready(self) -> Any:
        from .repair import salvage  # it reads what this module writes

        new = self.path.with_name("spool.new.db")
        log_of_new = new.with_name(new.name + "-wal")
        for left in (new, log_of_new, new.with_name(new.name + "-journal")):  # by a power cut
            left.unlink(missing_ok=True)
        with contextlib.closing(connect(new)) as db:
            create(db)
            salvaged = salvage(self.path, db)
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        log_of_new.unlink(missing_ok=True)
        new.chmod(0o600)
        _sync(new)
        new.replace(self._ready_path)
        _sync(self.path.parent)
        return salvaged

    def _put_in_place(self, aside: Path) -> None:
        """One step after the other on the disk too: a main file must never be beside another one's log."""
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                self.path.with_name(self.path.name + suffix).rename(f"{aside}{suffix}")
                _sync(self.path.parent)
        self._ready_path.rename(self.path)
        _sync(self.path.parent)

    def _finish_rebuild(self) -> str:
        """What a power cut came between; returns the name of what was set aside, nothing where all was done."""
        if not self._ready_path.exists() or self.path.exists():
            return ""
        aside = self._aside()
        self._put_in_place(aside)
        return aside.name

    def reopen(self) -> None:
        """Let go of the connection and take a new one, after a write has failed.

        What the kernel shows of the failed write may not be on the disk, so all of the log is written anew.
        """
        self._drop()
        with self._guard():
            self._finish_rebuild()
            self._write_log_anew()
            self._db = connect(self.path)
            self._db.execute(self._sql["load_state"]).fetchall()

    def _drop(self) -> None:
        self._recent.clear()
        if self._db is not None:
            with contextlib.suppress(OSError):
                self._let_the_log_go()
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            self._db = None

    def _take_lock(self) -> None:
        self._lock = os.open(self.path.parent / "spool.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SpoolFault(f"{self.path}: another gateway has this spool open; end that one first") from None

    @property
    def _marker_path(self) -> Path:
        return self.path.with_name("spool.id")

    def _marker(self) -> dict[str, Any]:
        """Which spool was here, and as which file: tells a copy, and a file that is gone."""
        try:
            return msgspec.json.decode(self._marker_path.read_bytes(), type=dict[str, Any])
        except (OSError, msgspec.MsgspecError):
            return {}

    def _mark(self, generation: str) -> None:
        said = {"generation": generation, "file": born(self.path)}
        if self._marker() != said:
            # A full card is no reason not to start; the marker is then written at the next start.
            with contextlib.suppress(OSError):
                new = self._marker_path.with_name("spool.id.new")
                new.touch(0o600)
                new.write_bytes(msgspec.json.encode(said))
                new.replace(self._marker_path)

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
            from .repair import remember_rows  # it reads what this module writes

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
                self._recent.pop(place(info.lane, info.first), None)
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
        from .queue import ids_of  # who is in it, for when its bytes are lost

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
        readings = self._recent.get(row[0])
        if readings is None:
            readings = decode_row(row)
            if readings is not None:
                self._recent[row[0]] = readings
                if len(self._recent) > 2:
                    del self._recent[next(iter(self._recent))]
        return readings

    def _quarantine(self, row: tuple[Any, ...]) -> Ids:
        """Move a damaged batch aside; returns who was in it, as far as that can be told."""
        with self._guard(), self._transaction() as db:
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
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

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
            if "no such" in str(error) or "has no column" in str(error):  # a damaged schema, the statements are right
                raise SpoolBroken(f"can't be read ({error})") from error
            raise SpoolFault(f"{self.path}: {_advice(self.path, error)}") from error
        except (sqlite3.DatabaseError, UnicodeDecodeError, OverflowError) as error:
            raise SpoolBroken(f"can't be read ({error})") from error
        except OSError as error:
            raise SpoolFault(f"{self.path}: {_advice(self.path, error)}") from error

    def _writable(self) -> sqlite3.Connection:
        if not self._is_believed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._opened()

    def _opened(self) -> sqlite3.Connection:
        if self._db is None:
            raise SpoolFault(f"{self.path}: not open")
        return self._db


def born(path: Path) -> str:
    """Which file it is, and when it was made (statx(2)): a copy under the same name is another one."""
    buffer = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statx(AT_FDCWD, os.fsencode(path), 0, STATX_BTIME, buffer) != 0:
        return str(path.stat().st_ino)
    inode, seconds, nanoseconds = struct.unpack_from("<32xQ40xqI", buffer.raw)
    return f"{inode}.{seconds}.{nanoseconds}"


def _about(version: int) -> str:
    """What is wrong with a schema that is not ours."""
    if version == 0:
        return "has tables, and no schema's number: it is another program's, or damaged"
    later = ": readings that only a newer one can read stay in the file set aside" if version > SCHEMA else ""
    return f"has schema {version}, this Fieldpost writes schema {SCHEMA}{later}"


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        path.chmod(0o600)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _make_folder(folder: Path) -> None:
    """Make a folder, and those above it; a power cut must not take it away with all that is synced in it."""
    if not folder.parent.is_dir():
        _make_folder(folder.parent)
    folder.mkdir(exist_ok=True, mode=0o700)
    with contextlib.suppress(PermissionError):  # made by somebody else, in a folder that we may not look into
        _sync(folder.parent)


def _sync(path: Path) -> None:
    """What is in a file, or was made, renamed and deleted in a folder, is so after a power cut too."""
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def connect(path: Path) -> sqlite3.Connection:
    """The one connection, made so that what it commits is on the disk."""
    db = sqlite3.connect(path, isolation_level=None, timeout=5, cached_statements=64)
    try:
        db.text_factory = lambda text: text.decode("utf-8", "replace")
        # First of all: no shared-memory file, which the kernel would write to the card, and a full one has no room for.
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        if not db.execute("PRAGMA page_count").fetchone()[0]:
            # These count only before the first table is made; later the second one would write at each opening.
            db.execute(f"PRAGMA page_size={PAGE_BYTES}")
            db.execute("PRAGMA auto_vacuum=INCREMENTAL")
        (mode,) = db.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":  # it failed, and SQLite says so only in this way
            raise sqlite3.OperationalError("no write-ahead log can be made")
        db.execute("PRAGMA synchronous=FULL")
        db.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
        db.execute("PRAGMA cell_size_check=ON")
        db.execute("PRAGMA user_version").fetchone()
        _sync(path.parent)  # SQLite does so too for its log's name, and goes on where it fails
    except BaseException:
        db.close()
        raise
    return db


def create(db: sqlite3.Connection) -> None:
    """Make the tables."""
    schema = files(__package__).joinpath("schema.sql").read_text()
    db.executescript(f"BEGIN; {schema} PRAGMA user_version={SCHEMA}; COMMIT;")


def load(state: dict[str, bytes]) -> Opened:
    """What the entries of the table `state` say."""
    decode = msgspec.msgpack.decode
    heads = decode(state["heads"], type=list[int]) if "heads" in state else [0, 0]
    generation, boot = decode(state["boot"], type=tuple[str, int]) if "boot" in state else ("", 0)
    opened = Opened(generation, boot + 1, dict(zip(LaneName, heads, strict=True)), dict.fromkeys(LaneName, 0))
    for key, value in state.items():
        kind, _, rest = key.partition("/")
        if kind == "mark":
            node, install, number = rest.split("/")
            upto, beyond = decode(value, type=tuple[int, list[tuple[int, int]]])
            opened.marks.append(((node, install, int(number)), upto, beyond))
        elif kind == "route":
            route, _, lane = rest.rpartition("/")
            opened.progress[route, LaneName(int(lane))] = decode(value, type=tuple[int | None, list[Span]])
        elif kind == "manifest":
            opened.manifests.append(decode(value, type=Manifest))
        elif kind == "eras":
            opened.eras = decode(value, type=list[Era])
        elif kind == "counts":
            opened.counts = decode(value, type=dict[str, int])
        elif kind == "clock":
            opened.clock = decode(value, type=tuple[int, int, str])
    opened.marks.sort(key=lambda mark: (mark[0][0], mark[0][2]))
    return opened


def write_state(db: sqlite3.Connection, sql: dict[str, str], state: dict[str, bytes | None]) -> None:
    """Put down entries of the table `state`, or delete them."""
    for key, value in state.items():
        if value is None:
            db.execute(sql["delete_state"], (key,))
        else:
            db.execute(sql["save_state"], (key, value, crc_of_state(key, value)))


def place(lane: LaneName, position: int) -> int:
    """Where a position of a lane lies in the table."""
    return int(lane) << LANE_BITS | position


def place_position(at: int) -> int:
    return at & ((1 << LANE_BITS) - 1)


def bounds(lane: LaneName) -> tuple[int, int]:
    """[low, high) of a lane's places."""
    return place(lane, 0), (int(lane) + 1) << LANE_BITS


def crc_of_state(key: object, value: bytes) -> int:
    """Of an entry; a flipped bit can make a number of its key, which then has another checksum."""
    return zlib.crc32(value, zlib.crc32(str(key).encode()))


def crc_of_batch(head: Sequence[int], ids: bytes, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(ids, zlib.crc32(struct.pack("<7q", *head))))


def decode_row(row: tuple[Any, ...]) -> list[Reading] | None:
    """The readings of a row of the table `batch`, or None where it is not what was written."""
    *head, crc, ids, body = row
    try:
        if crc_of_batch(head, ids, body) != crc:
            return None
        readings = codec.decode(body)
    except (ValueError, TypeError, struct.error):
        return None
    return readings if len(readings) == head[2] else None


def ids_in(blob: object) -> Ids:
    """Who is in a batch, by its column `ids`; nobody where that is damaged too."""
    try:
        if isinstance(blob, bytes) and struct.unpack_from("<I", blob)[0] == zlib.crc32(blob[4:]):
            return _ids.decode(blob[4:])
    except (struct.error, msgspec.MsgspecError):
        pass
    return []


def _advice(path: Path, error: Exception) -> str:
    """An error of the operating system, and what to do about it."""
    folder = path.parent
    if isinstance(error, PermissionError):
        return f"{error}; it belongs to somebody else: `chown -R $(id -u) {folder}`, or run as its owner"
    if "full" in str(error) or "No space" in str(error):
        return f"{error}; the disk is full: make room on it (`df {folder}`), the readings in it are untouched"
    if "readonly" in str(error) or "Read-only" in str(error):
        return f"{error}; the file system is read-only: look at `dmesg`, a worn card often ends like this"
    return f"{error}; the folder must exist, be ours and have room: `ls -ld {folder}`, `df {folder}`"


def statements() -> dict[str, str]:
    """The named statements of statements.sql."""
    text = files(__package__).joinpath("statements.sql").read_text()
    parts = text.split("-- name: ")[1:]
    return {part.split("\n", 1)[0].strip(): part.split("\n", 1)[1].strip() for part in parts}
