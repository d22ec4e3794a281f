"""The folder of a spool: who may use it, what lies in it under which name, and in what state its log is left.

What is made, renamed and deleted here is so after a power cut too, one step after the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import secrets
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ..errors import SpoolBroken, SpoolFault
from .wal import committed, mend

log = logging.getLogger(__name__)

LEAST_BYTES = 512
"""The smallest page that a database can have."""

AT_FDCWD, STATX_BTIME = -100, 0x800


class Folder:
    """`main` is the database, `log` its write-ahead log, `ready` a whole new database that is to take main's place."""

    def __init__(self, folder: Path, page_bytes: int) -> None:
        self.main = folder / "spool.db"
        self.log = folder / "spool.db-wal"
        self.ready = folder / "spool.ready.db"
        self._open = folder / "spool.open"
        self._id = folder / "spool.id"
        self._page_bytes = page_bytes
        self._lock: int | None = None

    # Whose it is.

    def lock(self) -> None:
        """Make the folder, and keep others out until `unlock`. Raises OSError, or SpoolFault where one is in."""
        _make(self.main.parent)
        self._lock = os.open(self.main.with_name("spool.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SpoolFault(f"{self.main}: another gateway has this spool open; end that one first") from None

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def was_here(self) -> dict[str, Any]:
        """Which spool was here, and as which file: tells a copy, and a file that is gone."""
        try:
            return msgspec.json.decode(self._id.read_bytes(), type=dict[str, Any])
        except (OSError, msgspec.MsgspecError):
            return {}

    def is_here(self, generation: str) -> None:
        """Put down which spool is here now. A full card is no reason not to start: the next start does it then."""
        said = {"generation": generation, "file": born(self.main)}
        if self.was_here() != said:
            with contextlib.suppress(OSError):
                new = self._id.with_name("spool.id.new")
                new.touch(0o600)
                new.write_bytes(msgspec.json.encode(said))
                new.replace(self._id)

    def see_whose_it_is(self, schema: int) -> int | None:
        """Before SQLite writes to a file that is none of ours: raises SpoolBroken, or returns its schema where that is
        another. A log beside it may know better, and so may the journal of a file that is being made: then None."""
        if self.log.exists() and self.main.exists() and 0 < self.main.stat().st_size < LEAST_BYTES:
            raise SpoolBroken("is no database")  # SQLite would begin a new one, and drop the log
        is_beside = any(self.main.with_name(self.main.name + suffix).exists() for suffix in ("-wal", "-journal"))
        page = self._page(1)
        is_torn = is_beside and not any(page[20:])  # cut off as it was made: what is beside has the whole of it
        if page[18:20] not in (b"", b"\1\1", b"\2\2") and not is_torn:
            raise SpoolBroken("has a damaged header")  # SQLite would not write to it
        if not self.main.exists() or is_beside:
            return None
        with self.main.open("rb") as file:
            header = file.read(100)
        size = self.main.stat().st_size
        if 0 < size < LEAST_BYTES or (size and not header.startswith(b"SQLite format 3\0")):
            raise SpoolBroken("is no database")
        page_bytes, version = int.from_bytes(header[16:18]), int.from_bytes(header[60:64])
        return version if size > page_bytes and version != schema else None

    # The log.

    def note_open(self) -> None:
        """From now on a log must be beside the file: a kill leaves both."""
        self._open.touch(0o600)
        if self._open.stat().st_size:
            os.truncate(self._open, 0)

    def let_the_log_go(self) -> None:
        """Before SQLite empties or deletes the log; on the disk too, so that no power cut leaves only the note."""
        if self._open.exists():
            try:
                self._open.unlink()
            except OSError:
                _write(self._open, b"gone")  # a disk that does not delete may write
            sync(self.main.parent)

    def mend_log(self) -> None:
        """Have a flipped bit in the log cost no more than itself. Raises SpoolBroken where more is lost."""
        content = self.log.read_bytes() if self.log.is_file() else b""
        if not content:
            if self._open.exists() and not self._open.stat().st_size and self.main.exists():
                raise SpoolBroken("has lost its write-ahead log, which was there when it was last used")
            return
        mended = mend(content, self._page_bytes, self._page)
        if mended.content == content:
            return
        if mended.is_headless and self._has(*committed(mended.content, self._page_bytes)):
            return  # cut off while it began anew, which it does when the main file has all of it
        if mended.lost:  # what is left of it must not be taken for all, so it stays as it is until it was taken over
            raise SpoolBroken(f"has lost {mended.lost} pages of its write-ahead log")
        aside = self.name_aside()
        _write(aside.with_name(aside.name + "-wal"), content)
        new = self.log.with_name(self.log.name + ".new")
        _write(new, mended.content)
        new.replace(self.log)
        log.error("%s: %d flipped bits put right; what it was is %s-wal", self.log, mended.bits, aside.name)

    def _page(self, number: int) -> bytes:
        """A page of the main file, nothing where that has none."""
        if not self.main.is_file():
            return b""
        with self.main.open("rb") as file:
            file.seek((number - 1) * self._page_bytes)
            return file.read(self._page_bytes)

    def _has(self, pages: Mapping[int, bytes], past: int) -> bool:
        """Whether the main file, of `past` pages, holds these as they are here."""
        if not self.main.exists():
            return False
        with self.main.open("rb") as file:
            for number, page in pages.items():
                file.seek((number - 1) * self._page_bytes)
                if number <= past and file.read(self._page_bytes) != page:
                    return False
        return True

    def write_log_anew(self) -> bool:
        """Have all of the log on the disk before SQLite believes it and writes behind it; whether it is.

        A sync that fails is told once: afterwards the kernel shows a log that is not on the disk, to the next process
        as well. What is written anew is synced anew. A full card has no room for that; it takes nothing until it has.
        """
        content = self.log.read_bytes() if self.log.is_file() else b""
        if content:
            new = self.log.with_name(self.log.name + ".new")
            try:
                _write(new, content)
                new.replace(self.log)
                sync(self.log.parent)
            except OSError as error:
                new.unlink(missing_ok=True)
                if error.errno != errno.ENOSPC:
                    raise
                return False
        return True

    # Another file in its place.

    def name_aside(self) -> Path:
        """A name that is free, for what is set aside."""
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        return self.main.with_name(f"spool.damaged-{stamp}-{secrets.token_hex(2)}.db")

    def begin_new(self) -> Path:
        """Where a new database may be made; what a power cut left of one is gone."""
        new = self.main.with_name("spool.new.db")
        for suffix in ("", "-wal", "-journal"):
            new.with_name(new.name + suffix).unlink(missing_ok=True)
        return new

    def is_ready(self, new: Path) -> None:
        """The new database is whole, and closed."""
        new.with_name(new.name + "-wal").unlink(missing_ok=True)
        new.chmod(0o600)
        sync(new)
        new.replace(self.ready)
        sync(self.main.parent)

    def put_in_place(self, aside: Path) -> None:
        """Set the old one aside and put the ready one there; a main file must never be beside another one's log or
        journal, which SQLite would take for its own."""
        for suffix in ("", "-journal", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                self.main.with_name(self.main.name + suffix).rename(f"{aside}{suffix}")
                sync(self.main.parent)
        self.ready.rename(self.main)
        sync(self.main.parent)

    def finish(self) -> str:
        """What a power cut came between; returns the name of what was set aside, nothing where all was done."""
        if not self.ready.exists() or self.main.exists():
            return ""
        aside = self.name_aside()
        self.put_in_place(aside)
        return aside.name


def born(path: Path) -> str:
    """Which file it is, and when it was made (statx(2)): a copy under the same name is another one."""
    buffer = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statx(AT_FDCWD, os.fsencode(path), 0, STATX_BTIME, buffer) != 0:
        return str(path.stat().st_ino)
    inode, seconds, nanoseconds = struct.unpack_from("<32xQ40xqI", buffer.raw)
    return f"{inode}.{seconds}.{nanoseconds}"


def sync(path: Path) -> None:
    """What is in a file, or was made, renamed and deleted in a folder, is so after a power cut too."""
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        path.chmod(0o600)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _make(folder: Path) -> None:
    """Make a folder, and those above it; a power cut must not take it away with all that is synced in it."""
    if not folder.parent.is_dir():
        _make(folder.parent)
    folder.mkdir(exist_ok=True, mode=0o700)
    with contextlib.suppress(PermissionError):  # made by somebody else, in a folder that we may not look into
        sync(folder.parent)


def advice(path: Path, error: Exception) -> str:
    """An error of the operating system, and what to do about it."""
    folder = path.parent
    if isinstance(error, PermissionError):
        return f"{error}; it belongs to somebody else: `chown -R $(id -u) {folder}`, or run as its owner"
    if "full" in str(error) or "No space" in str(error):
        return f"{error}; the disk is full: make room on it (`df {folder}`), the readings in it are untouched"
    if "readonly" in str(error) or "Read-only" in str(error):
        return f"{error}; the file system is read-only: look at `dmesg`, a worn card often ends like this"
    return f"{error}; the folder must exist, be ours and have room: `ls -ld {folder}`, `df {folder}`"
