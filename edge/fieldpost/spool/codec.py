"""A batch of readings as bytes: columns of differences, their bytes in planes, MessagePack, zlib.

Neighbours in a column hardly differ, so a difference fits into a byte or two; the low bytes of a column of all nodes
lie together, then its higher ones, where zlib finds what they have in common. A reading of three channels costs two to
five bytes. Every reading comes back as it was, in the same order.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import msgspec

from ..reading import Event, Reading, Value

VERSION = 3
MAX_READINGS = 1_000_000
WIDEST = 7
"""Bytes of a difference, above the smallest one of its column; a column that needs more stays as it is."""

NOT_A_BATCH = (
    zlib.error,
    msgspec.MsgspecError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
)
"""What comes of taking foreign bytes for a batch."""

Column = list[Any]
"""`[first, smallest difference, bytes of one]`, what each is above that being in planes; or `[values as they are]`."""

_encoder = msgspec.msgpack.Encoder()
_events = msgspec.msgpack.Decoder(list[tuple[int, Event]])
_old = msgspec.msgpack.Decoder(list[Reading])


def encode(readings: Sequence[Reading]) -> bytes:
    """The bytes of a batch."""
    groups: dict[tuple[str, str, int, str, int], list[Reading]] = {}
    numbers: dict[tuple[str, str, int, str, int], int] = {}
    order = []
    events = []
    for at, reading in enumerate(readings):
        group = (reading.node, reading.install, reading.boot, reading.manifest, len(reading.values))
        number = numbers.get(group)
        if number is None:
            number = numbers[group] = len(numbers)
            groups[group] = []
        groups[group].append(reading)
        order.append(number)
        if reading.event is not None:
            events.append((at, reading.event))
    planes: dict[tuple[int, int], list[bytes]] = {}
    described: list[Any] = []
    for group, rows in groups.items():
        columns = [_column(column, planes, at) for at, column in enumerate(_columns(rows))]
        described.append((*group, len(rows), columns))
    of = _column(order, planes, -1) if order else []
    data = b"".join(plane for place in sorted(planes) for plane in planes[place])
    packer = zlib.compressobj(6, strategy=zlib.Z_FILTERED)
    return packer.compress(_encoder.encode((VERSION, len(order), of, described, events, data))) + packer.flush()


def decode(body: bytes) -> list[Reading]:
    """The readings of a batch. Raises ValueError where the bytes are not one."""
    try:
        raw = zlib.decompress(body)
        content = msgspec.msgpack.decode(raw)
        if content and isinstance(content[0], list):
            return _old.decode(raw)  # as schema 1 wrote it
        version, count, of, groups, events, data = content
        if version != VERSION:
            raise ValueError(f"batch format {version}")
        if not 0 <= count <= MAX_READINGS or sum(group[5] for group in groups) != count:
            raise ValueError(f"{count} readings")
        described = [(column, at, group[5]) for group in groups for at, column in enumerate(group[6])]
        planes = _Planes([*described, (of, -1, count)] if count else described, data)
        rows = [
            _rows(node, install, boot, manifest, width, n, [planes.column(column) for column in columns])
            for node, install, boot, manifest, width, n, columns in groups
        ]
        readings = [next(rows[number]) for number in planes.column(of)] if count else []
        for at, event in _events.decode(_encoder.encode(events)) if events else ():
            readings[at] = msgspec.structs.replace(readings[at], event=event)
    except NOT_A_BATCH as error:
        raise ValueError(str(error)) from error
    return readings


def _columns(rows: list[Reading]) -> list[list[Any]]:
    """Of a group: seq, uptime, date against uptime, error, quality, era, then each channel."""
    return [
        [row.seq for row in rows],
        [row.uptime_ms for row in rows],
        [row.time_ms - row.uptime_ms for row in rows],
        [row.error_ms for row in rows],
        [row.quality for row in rows],
        [row.era for row in rows],
        *[list(column) for column in zip(*(row.values for row in rows), strict=True)],
    ]


def _rows(
    node: str, install: str, boot: int, manifest: str, width: int, count: int, columns: list[list[Any]]
) -> Iterator[Reading]:
    if len(columns) != 6 + width or any(len(column) != count for column in columns):
        raise ValueError("a column is missing, or of another length")
    values: list[tuple[Value, ...]] = list(zip(*columns[6:], strict=True)) if width else [()] * count
    seqs, uptimes, offsets, errors, qualities, eras = columns[:6]
    return iter(
        [
            Reading(node, install, boot, seq, uptime, uptime + offset, error, manifest, row, None, quality, era)
            for seq, uptime, offset, error, quality, era, row in zip(
                seqs, uptimes, offsets, errors, qualities, eras, values, strict=True
            )
        ]
    )


def _column(column: list[Any], planes: dict[tuple[int, int], list[bytes]], at: int) -> Column:
    """Describe a column, the `at`-th of its group, and put its bytes into the planes."""
    for value in column:
        if not isinstance(value, int):
            return [column]
    steps = [b - a for a, b in pairwise(column)]
    if not steps:
        return [column[0], 0, 0]
    low = min(steps)
    width = ((max(steps) - low).bit_length() + 7) // 8
    if width > WIDEST or not -(2**63) <= low < 2**63:
        return [column]
    if width:
        raw = array("q", [step - low for step in steps]).tobytes()
        for plane in range(width):
            planes.setdefault((at, plane), []).append(raw[plane::8])
    return [column[0], low, width]


class _Planes:
    """The bytes of all columns, in the order in which `encode` put them."""

    def __init__(self, columns: list[tuple[Column, int, int]], data: bytes) -> None:
        self._parts: dict[int, list[bytes]] = {id(column): [] for column, _, _ in columns}
        self._counts = {id(column): count for column, _, count in columns}
        wanted = [
            (at, plane, number)
            for number, (column, at, count) in enumerate(columns)
            if len(column) == 3
            for plane in range(column[2])
        ]
        start = 0
        for _, _, number in sorted(wanted):
            column, _, count = columns[number]
            self._parts[id(column)].append(data[start : start + count - 1])
            start += count - 1
        if start != len(data):
            raise ValueError("not the bytes that the columns have")

    def column(self, column: Column) -> list[Any]:
        """The values of a column."""
        if len(column) == 1:
            values: list[Any] = column[0]
            return values
        first, low, width = column
        count = self._counts[id(column)]
        if not width:
            return [first + n * low for n in range(count)] if low else [first] * count
        raw = bytearray(8 * (count - 1))
        for plane, part in enumerate(self._parts[id(column)]):
            raw[plane::8] = part
        steps = array("q")
        steps.frombytes(bytes(raw))
        return list(accumulate((step + low for step in steps), initial=first))
