"""A trace of what a process asked of the disk, and what a power cut may leave of it at each point.

recorder.c makes the trace. The disk here is a harsh one, held to POSIX only: whatever was not synced may be there or
not, each write for itself, torn, or older than one before it; a name is durable once its directory was synced, not
with its file. What was unsynced when a sync failed never arrives.
"""

from __future__ import annotations

import enum
import json
import os
import random
import struct
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCE = HERE / "recorder.c"
BUILT = HERE.parent.parent / "build" / "recorder.so"
SECTOR = 512
HEAD = struct.Struct("=BBHIiiQQ")


class Call(enum.IntEnum):
    """What is in a trace; the numbers are recorder.c's."""

    MARK = 0
    OPEN = 1
    CLOSE = 2
    WRITE = 3
    TRUNCATE = 4
    FSYNC = 5
    RENAME = 6
    UNLINK = 7
    LINK = 8
    MKDIR = 9


class How(enum.IntEnum):
    """How a call is made to fail."""

    EIO = 0
    ENOSPC = 1
    SHORT = 2
    SHORT_THEN_ENOSPC = 3
    KILL = 4


def recorder() -> Path:
    """The library, built when its source is newer."""
    if not BUILT.exists() or BUILT.stat().st_mtime < SOURCE.stat().st_mtime:
        BUILT.parent.mkdir(exist_ok=True)
        new = BUILT.with_suffix(f".{os.getpid()}")
        build = ["cc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-o", new, SOURCE, "-ldl", "-lpthread"]
        subprocess.run(build, check=True)
        new.replace(BUILT)  # two test runs may build at once
    return BUILT


@dataclass(frozen=True, slots=True)
class Event:
    """One call, or something that the process said itself. `number`: among the calls that can be made to fail."""

    call: Call
    failed: bool
    fd: int
    flags: int
    offset: int
    number: int
    path: str
    data: bytes

    @property
    def said(self) -> dict[str, Any]:
        """What a mark says."""
        content: dict[str, Any] = json.loads(self.data)
        return content


def read_trace(path: Path) -> list[Event]:
    """All events, in order."""
    raw = path.read_bytes()
    events, at = [], 0
    while at < len(raw):
        call, failed, path_length, length, fd, flags, offset, number = HEAD.unpack_from(raw, at)
        at += HEAD.size
        name, data = raw[at : at + path_length].decode(), raw[at + path_length : at + path_length + length]
        at += path_length + length
        events.append(Event(Call(call), bool(failed), fd, flags, offset, number, name, data))
    return events


@dataclass(eq=False, slots=True)
class File:
    """A file as it is on the disk for certain. `born`: what the process took for its identity."""

    content: bytearray = field(default_factory=bytearray)
    born: str = ""


FOLDER = File()
"""Stands for any folder."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """Bytes on their way to a file; `data` None: its end is cut, or moved, to `offset`."""

    file: File
    offset: int
    data: bytes | None

    def apply(self, content: bytearray) -> None:
        end = self.offset + len(self.data or b"")
        if self.data is None:
            del content[self.offset :]
        if len(content) < end:
            content.extend(bytes(end - len(content)))
        if self.data is not None:
            content[self.offset : end] = self.data


@dataclass(frozen=True, slots=True)
class Entry:
    """A name on its way to a directory: `name` becomes `file`, or goes away where that is None; so does `old`."""

    folder: str
    name: str
    file: File | None
    old: str = ""


Pending = Bytes | Entry


@dataclass(frozen=True, slots=True)
class Image:
    """What is on the disk after a power cut: every name with its bytes; a folder's are None."""

    how: str
    files: dict[str, bytes | None]
    born: dict[str, str]


class Disk:
    """The disk under a trace: `feed` it event by event, and ask at any point what a cut may leave."""

    def __init__(self) -> None:
        self._names: dict[str, File] = {"": FOLDER}  # what the process sees
        self._durable: dict[str, File] = {"": FOLDER}
        self._fds: dict[int, tuple[str, File]] = {}
        self.pending: list[Pending] = []

    def feed(self, event: Event) -> None:
        """The next event of the trace."""
        if event.call is Call.FSYNC:
            self._sync(event)
        elif event.call is Call.MARK:
            self._hear(event.said)
        elif not event.failed:
            self._change(event)

    def _hear(self, said: dict[str, Any]) -> None:
        if "born" in said:
            self._names[said["path"]].born = said["born"]
        if said.get("ended"):
            self._fds.clear()

    def _change(self, event: Event) -> None:
        match event.call:
            case Call.OPEN:
                self._open(event)
            case Call.CLOSE:
                self._fds.pop(event.fd)
            case Call.WRITE:
                self.pending.append(Bytes(self._fds[event.fd][1], event.offset, event.data))
            case Call.TRUNCATE:
                self.pending.append(Bytes(self._fds[event.fd][1], event.offset, None))
            case Call.MKDIR:
                self._enter(event.path, FOLDER)
            case Call.UNLINK:
                del self._names[event.path]
                self.pending.append(Entry(_folder(event.path), event.path, None))
            case Call.RENAME | Call.LINK:
                old, _, new = event.path.partition("\n")
                file = self._names[old]
                if event.call is Call.RENAME:
                    del self._names[old]
                self._enter(new, file, old if event.call is Call.RENAME else "")

    def _open(self, event: Event) -> None:
        if event.path not in self._names:
            assert event.flags & os.O_CREAT, event
            self._enter(event.path, File())
        file = self._names[event.path]
        self._fds[event.fd] = (event.path, file)
        if event.flags & os.O_TRUNC:
            self.pending.append(Bytes(file, 0, None))

    def _enter(self, name: str, file: File, old: str = "") -> None:
        self._names[name] = file
        self.pending.append(Entry(_folder(name), name, file, old))

    def _sync(self, event: Event) -> None:
        name, file = self._fds[event.fd]
        if file is FOLDER and event.failed:
            return  # the names may still arrive, or not
        left: list[Pending] = []
        for change in self.pending:
            if isinstance(change, Entry):
                if file is FOLDER and change.folder == name:
                    _rename(self._durable, change)
                    continue
            elif change.file is file:
                if not event.failed:
                    change.apply(change.file.content)
                continue
            left.append(change)
        self.pending = left

    # What a cut leaves.

    def images(self, chance: random.Random, subsets: int) -> Iterator[Image]:
        """What may be on the disk if the power goes now: none of what is pending, all, some, torn, disordered."""
        yield self._image("none", [])
        if not self.pending:
            return
        yield self._image("all", self.pending)
        entries = [p for p in self.pending if isinstance(p, Entry)]
        if entries:
            yield self._image("bytes only", [p for p in self.pending if isinstance(p, Bytes)])
            yield self._image("names only", entries)
        last = self.pending[-1]
        if isinstance(last, Bytes) and last.data:
            yield self._image("all, the last torn", [*self.pending[:-1], *_torn(last, chance)])
            yield self._image("only the last, torn", [*entries, *_torn(last, chance)])
        for _ in range(subsets):
            share = chance.choice((0.15, 0.5, 0.85))
            some = [p for p in self.pending if chance.random() < share]
            tear = chance.choice((0.0, 0.0, 0.3))
            parts = [
                part
                for p in some
                for part in (_torn(p, chance) if isinstance(p, Bytes) and chance.random() < tear else (p,))
            ]
            yield self._image("some, torn" if tear else "some", parts)
        if len(self.pending) > 1:
            files = [p for p in self.pending if isinstance(p, Bytes)]
            yield self._image("disordered", [*entries, *chance.sample(files, chance.randint(0, len(files)))])

    def _image(self, how: str, arrived: Iterable[Pending]) -> Image:
        names = dict(self._durable)
        contents: dict[int, bytearray] = {}
        for change in arrived:
            if isinstance(change, Entry):
                _rename(names, change)
            else:
                content = contents.setdefault(id(change.file), bytearray(change.file.content))
                change.apply(content)
        reachable = {name: file for name, file in names.items() if name and _is_reachable(name, names)}
        return Image(
            how,
            {n: None if f is FOLDER else bytes(contents.get(id(f), f.content)) for n, f in reachable.items()},
            {n: f.born for n, f in reachable.items() if f.born},
        )


def _rename(names: dict[str, File], change: Entry) -> None:
    if change.old:
        names.pop(change.old, None)
    if change.file is None:
        names.pop(change.name, None)
    else:
        names[change.name] = change.file


def _is_reachable(name: str, names: dict[str, File]) -> bool:
    folder = _folder(name)
    return not folder or (names.get(folder) is FOLDER and _is_reachable(folder, names))


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _torn(write: Bytes, chance: random.Random) -> list[Bytes]:
    """What arrives of a write that the cut interrupts: its beginning to some byte, some of its sectors, or its length
    without its bytes."""
    data = write.data
    if not data:
        return []
    match chance.choice(("beginning", "sectors", "length")):
        case "beginning":
            return [Bytes(write.file, write.offset, data[: chance.randrange(len(data))])]
        case "sectors":
            cuts = [0, *range(SECTOR - write.offset % SECTOR, len(data), SECTOR), len(data)]
            pieces = [Bytes(write.file, write.offset + a, data[a:b]) for a, b in pairwise(cuts)]
            return [piece for piece in pieces if chance.random() < 0.5]
        case _:
            return [Bytes(write.file, write.offset + len(data), b"")]


def lay_out(image: Image, folder: Path) -> None:
    """Put an image into an empty folder."""
    for name, content in sorted(image.files.items()):
        if content is None:
            (folder / name).mkdir(parents=True, exist_ok=True)
        else:
            (folder / name).write_bytes(content)
