"""Columns: one MessagePack array a batch, in it a table for each kind of row, and a column for each thing measured.

    [1, lane, channels, tables, records]
    channels = [[manifest hash (4 bytes), [[name, SenML unit, scale], ...]], ...]
    tables   = [[number in channels, boots, of, seqs, times, errors, qualities, [column of each channel]], ...]
    boots    = [[node, install (6 bytes), boot], ...]        of: which of them each row belongs to
    records  = [[node, install, boot, seq, time, error, quality, [kind, node, install, boot, first, last, why]], ...]

A column of integers is `[first, difference, difference, ...]`, or `[nil, count, first, step]` where all differences are
the same. A channel that has something else than numbers in it (nil: not due; a text: why the read failed) is
`{"v": [...]}`, as it is. Numbers are scaled: value / scale is in the unit. Times are unix milliseconds, errors too (-1:
not later than its time, earliest not known), a quality is the number of a `reading.Quality`, `lane` is empty for live
readings. The rows of a table stand boot by boot, in their order within each.

A thinned record has `[manifest hash, values]` at its end: minimum, maximum, mean and count for each channel. All of it
costs half the processor time of SenML and a third of its bytes in large batches; what reads it must know it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from typing import Annotated, Any

import msgspec

from ..errors import Malformed
from ..reading import Event, Manifest, Quality, Reading
from .arrived import QUALITIES, Arrived, unpacked

CONTENT_TYPE = "application/vnd.fieldpost"
VERSION = 1
MAX_ROWS = 100_000

_encoder = msgspec.msgpack.Encoder()


@dataclass(slots=True)
class _Table:
    manifest: str
    boots: dict[tuple[str, str, int], list[Reading]] = field(default_factory=dict)


def encode(readings: Sequence[Reading], manifests: Mapping[str, Manifest], lane: str = "") -> bytes:
    """A batch. Every manifest that the readings name must be in `manifests`; their order is kept within a node."""
    tables: list[_Table] = []
    open_tables: dict[tuple[str, int], int] = {}
    last_of: dict[str, tuple[int, tuple[str, str, int]]] = {}
    records: list[Reading] = []
    for reading in readings:
        if reading.event is not None:
            records.append(reading)
            continue
        kind = (reading.manifest, len(reading.values))
        key = (reading.node, reading.install, reading.boot)
        number = open_tables.get(kind, -1)
        last, newest = last_of.get(reading.node, (0, key))
        if number < last or (key != newest and key in tables[number].boots):
            # A later table, or a later boot in this one, has rows of this node already: it would be overtaken.
            number = open_tables[kind] = len(tables)
            tables.append(_Table(reading.manifest))
        last_of[reading.node] = number, key
        rows = tables[number].boots.get(key)
        if rows is None:
            rows = tables[number].boots[key] = []
        rows.append(reading)
    hashes = [table.manifest for table in tables] + [one.manifest for one in records if one.manifest]
    named = {hash_: number for number, hash_ in enumerate(dict.fromkeys(hashes))}
    channels = [
        (bytes.fromhex(hash_), [(c.name, c.unit, c.scale) for c in manifests[hash_].channels]) for hash_ in named
    ]
    body = (VERSION, lane, channels, [_table(table, named) for table in tables], [_record(one) for one in records])
    return _encoder.encode(body)


def _table(table: _Table, named: Mapping[str, int]) -> tuple[Any, ...]:
    rows = list(chain.from_iterable(table.boots.values()))
    return (
        named[table.manifest],
        [(node, bytes.fromhex(install), boot) for node, install, boot in table.boots],
        _numbers([number for number, of in enumerate(table.boots.values()) for _ in of]),
        _numbers([row.seq for row in rows]),
        _numbers([row.time_ms for row in rows]),
        _numbers([row.error_ms for row in rows]),
        _numbers([row.quality for row in rows]),
        [_values(column) for column in zip(*[row.values for row in rows], strict=True)],
    )


def _record(row: Reading) -> tuple[Any, ...]:
    plain = (row.node, row.install, row.boot, row.seq, row.time_ms, row.error_ms, row.quality, row.event)
    return (*plain, bytes.fromhex(row.manifest), row.values) if row.values else plain


def _numbers(column: Sequence[int]) -> list[int | None]:
    steps = [b - a for a, b in pairwise(column)]
    if len(steps) > 2 and min(steps) == max(steps):
        return [None, len(column), column[0], steps[0]]
    return [column[0], *steps]


def _values(column: Sequence[Any]) -> Any:
    for value in column:
        if type(value) is not int:
            return {"v": column}
    return _numbers(column)


class _Plain(msgspec.Struct, forbid_unknown_fields=True):
    v: Annotated[list[int | str | None], msgspec.Meta(max_length=MAX_ROWS)]


Numbers = Annotated[list[int | None], msgspec.Meta(min_length=1, max_length=MAX_ROWS)]


class _Rows(msgspec.Struct, array_like=True):
    kind: int
    boots: list[tuple[str, bytes, int]]
    of: Numbers
    seqs: Numbers
    times_ms: Numbers
    errors_ms: Numbers
    qualities: Numbers
    channels: list[Numbers | _Plain]


class _Record(msgspec.Struct, array_like=True):
    node: str
    install: str
    boot: int
    seq: int
    time_ms: int
    error_ms: int
    quality: Quality
    event: Event
    manifest: bytes = b""
    values: list[int | None] = []


class _Body(msgspec.Struct, array_like=True):
    version: int
    lane: str
    channels: list[tuple[bytes, list[tuple[str, str, int]]]]
    tables: list[_Rows]
    records: list[_Record]


_body = msgspec.msgpack.Decoder(_Body)


def decode(body: bytes) -> Iterator[Arrived]:
    """The rows of a batch, zlib'd or plain: table by table, then the records. Raises Malformed."""
    try:
        content = _body.decode(unpacked(body))
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Malformed("columns", str(error)) from None
    if content.version != VERSION:
        raise Malformed("version", f"columns {content.version}")
    for table in content.tables:
        yield from _rows(table, content)
    channels = dict(content.channels)
    for record in content.records:
        row = Arrived(
            record.node, record.install, record.boot, record.seq, record.time_ms / 1000, _error_s(record.error_ms)
        )
        row.event, row.quality, row.lane = record.event, QUALITIES[record.quality], content.lane
        for number, (name, unit, scale) in enumerate(channels.get(record.manifest, ())):
            for kind, value in zip(("min", "max", "mean", "count"), record.values[4 * number :], strict=False):
                if value is not None:
                    figure = float(value) if kind == "count" else value / scale
                    row.values[f"{record.event.node}/{name}/{kind}"] = (figure, "" if kind == "count" else unit)
        yield row


def _rows(table: _Rows, content: _Body) -> Iterator[Arrived]:
    try:
        channels = content.channels[table.kind][1]
        heads = [_spread(c) for c in (table.of, table.seqs, table.times_ms, table.errors_ms, table.qualities)]
        columns = [column.v if isinstance(column, _Plain) else _spread(column) for column in table.channels]
        if any(len(column) != len(heads[0]) for column in (*heads, *columns)) or len(columns) > len(channels):
            raise ValueError("columns of different lengths, or of no channel")
        boots = [(node, install.hex(), boot) for node, install, boot in table.boots]
        rows = [
            (boots[of], seq, at, error, QUALITIES[Quality(q)]) for of, seq, at, error, q in zip(*heads, strict=True)
        ]
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise Malformed("columns", str(error)) from None
    for n, ((node, install, boot), seq, time_ms, error_ms, quality) in enumerate(rows):
        row = Arrived(node, install, boot, seq, time_ms / 1000, _error_s(error_ms), quality=quality, lane=content.lane)
        for (name, unit, scale), column in zip(channels, columns, strict=False):
            value = column[n]
            if isinstance(value, int):
                row.values[name] = (value / (scale or 1), unit)
            elif value is not None:
                row.values[name] = (value, "")
        yield row


def _spread(column: list[int | None]) -> list[int]:
    """The numbers of a column. Raises ValueError where it is none."""
    numbers = [number for number in column if number is not None]
    if len(numbers) == len(column):
        return list(accumulate(numbers))
    if len(numbers) != 3 or column[0] is not None or not 0 < numbers[0] <= MAX_ROWS:
        raise ValueError("no column")
    count, first, step = numbers
    return [first + n * step for n in range(count)]


def _error_s(error_ms: int) -> float:
    return error_ms / 1000 if error_ms >= 0 else -1.0
