"""What lies in the spool's file, as plain values, and how it is packed: every row has a checksum of its own."""

from __future__ import annotations

import secrets
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ..clock import Era
from ..reading import Event, Manifest, Reading
from . import codec
from .marks import Key
from .progress import Span
from .stage import LaneName

LANE_BITS = 56

Ids = list[tuple[str, str, int, int, int]]
"""Rows as ranges: (node, install, boot, first, last)."""

MarksChanges = tuple[list[tuple[Key, int, list[tuple[int, int]]]], list[Key]]

_ids = msgspec.msgpack.Decoder(Ids)


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


def ids_of(readings: Iterable[Reading]) -> Ids:
    """Which rows these are, as (node, install, boot, first, last); a thinned record stands for the rows in it."""
    ranges: dict[Key, list[list[int]]] = {}
    for reading in readings:
        event = reading.event
        if event is not None and event.kind == "thinned" and event.last is not None:
            key, first, last = (event.node, event.install, event.boot), event.first, event.last
        else:
            key, first, last = (reading.node, reading.install, reading.boot), reading.seq, reading.seq
        known = ranges.setdefault(key, [])
        if known and known[-1][1] + 1 == first:
            known[-1][1] = last
        else:
            known.append([first, last])
    return [(*key, first, last) for key, parts in ranges.items() for first, last in parts]


def ids_in(blob: object) -> Ids:
    """Who is in a batch, by its column `ids`; nobody where that is damaged too."""
    try:
        if isinstance(blob, bytes) and struct.unpack_from("<I", blob)[0] == zlib.crc32(blob[4:]):
            return _ids.decode(blob[4:])
    except (struct.error, msgspec.MsgspecError):
        pass
    return []
