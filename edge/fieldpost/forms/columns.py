"""Columns: one JSON object a batch, a group for each boot of a node, in it a column for each thing that was measured.

    {"columns": 1, "lane": "backfill",
     "channels": {"00112233": [["temperature", "Cel", 100]]},
     "groups": [["n1", "a1b2c3d4e5f6", 3, "00112233", SEQ, TIME_MS, ERROR_MS, QUALITY, [TEMPERATURE]]],
     "records": [["gateway", INSTALL, BOOT, SEQ, TIME_MS, ERROR_MS, QUALITY, EVENT]]}

A column of integers is `[first, difference, difference, ...]`, or `{"n": count, "from": first, "by": step}` where all
differences are the same, which is what counters and clocks mostly do. A channel that has something else than numbers
in it (`null`: not due; a text: why the read failed) is `{"v": [...]}`, as it is. Numbers are scaled: value / scale is
in the unit that `channels` gives. `lane` is absent for live readings, QUALITY is the number of a `reading.Quality`, and
EVENT is `[kind, node, install, boot, first, last, why]`.

A thinned record carries `[manifest, values]` at its end: minimum, maximum, mean and count for each channel. It costs
about half the bytes and half the processor time of SenML; what reads it must know it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Annotated, Any

import msgspec

from ..errors import Malformed
from ..reading import Event, Manifest, Quality, Reading
from .arrived import QUALITIES, Arrived, unpacked

CONTENT_TYPE = "application/vnd.fieldpost.columns+json"
VERSION = 1
MAX_ROWS = 100_000


def encode(readings: Sequence[Reading], manifests: Mapping[str, Manifest], lane: str = "") -> bytes:
    """A batch. Every manifest that the readings name must be in `manifests`; their order is kept within a node."""
    groups: list[list[Reading]] = []
    open_groups: dict[str, list[Reading]] = {}
    records: list[Reading] = []
    for reading in readings:
        if reading.event is not None:
            records.append(reading)
            continue
        group = open_groups.get(reading.node)
        if group is None or not _alike(group[0], reading):
            group = open_groups[reading.node] = []
            groups.append(group)
        group.append(reading)
    named = dict.fromkeys([group[0].manifest for group in groups] + [one.manifest for one in records if one.manifest])
    body: dict[str, Any] = {"columns": VERSION}
    if lane:
        body["lane"] = lane
    body["channels"] = {hash_: [(c.name, c.unit, c.scale) for c in manifests[hash_].channels] for hash_ in named}
    body["groups"] = [_group(group) for group in groups]
    if records:
        body["records"] = [_record(record) for record in records]
    return msgspec.json.encode(body)


def _alike(one: Reading, other: Reading) -> bool:
    return (
        one.boot == other.boot
        and one.manifest == other.manifest
        and one.install == other.install
        and len(one.values) == len(other.values)
    )


def _group(rows: list[Reading]) -> tuple[Any, ...]:
    one = rows[0]
    return (
        one.node,
        one.install,
        one.boot,
        one.manifest,
        _numbers([row.seq for row in rows]),
        _numbers([row.time_ms for row in rows]),
        _numbers([row.error_ms for row in rows]),
        _numbers([row.quality for row in rows]),
        [_values(column) for column in zip(*[row.values for row in rows], strict=True)],
    )


def _record(row: Reading) -> tuple[Any, ...]:
    plain = (row.node, row.install, row.boot, row.seq, row.time_ms, row.error_ms, row.quality, row.event)
    return (*plain, row.manifest, row.values) if row.values else plain


def _numbers(column: Sequence[int]) -> Any:
    steps = [b - a for a, b in pairwise(column)]
    if len(steps) > 1 and min(steps) == max(steps):
        return {"n": len(column), "from": column[0], "by": steps[0]}
    return [column[0], *steps]


def _values(column: Sequence[Any]) -> Any:
    for value in column:
        if type(value) is not int:
            return {"v": column}
    return _numbers(column)


Count = Annotated[int, msgspec.Meta(ge=1, le=MAX_ROWS)]


class _Run(msgspec.Struct, rename={"first": "from"}, forbid_unknown_fields=True):
    n: Count | None = None
    first: int = 0
    by: int = 0
    v: list[int | str | None] | None = None


Column = Annotated[list[int], msgspec.Meta(min_length=1, max_length=MAX_ROWS)] | _Run


class _Group(msgspec.Struct, array_like=True):
    node: str
    install: str
    boot: int
    manifest: str
    seqs: Column
    times_ms: Column
    errors_ms: Column
    qualities: Column
    channels: list[Column]


class _Record(msgspec.Struct, array_like=True):
    node: str
    install: str
    boot: int
    seq: int
    time_ms: int
    error_ms: int
    quality: Quality
    event: Event
    manifest: str = ""
    values: list[int | None] = []


class _Body(msgspec.Struct):
    columns: int
    channels: dict[str, list[tuple[str, str, int]]]
    groups: list[_Group]
    records: list[_Record] = []
    lane: str = ""


_body = msgspec.json.Decoder(_Body)


def decode(body: bytes) -> Iterator[Arrived]:
    """The rows of a batch, zlib'd or plain: group by group, then the records. Raises Malformed."""
    try:
        content = _body.decode(unpacked(body))
    except msgspec.MsgspecError as error:
        raise Malformed("columns", str(error)) from None
    if content.columns != VERSION:
        raise Malformed("version", f"columns {content.columns}")
    for group in content.groups:
        yield from _rows(group, content)
    for record in content.records:
        row = Arrived(
            record.node, record.install, record.boot, record.seq, record.time_ms / 1000, _error_s(record.error_ms)
        )
        row.event, row.quality, row.lane = record.event, QUALITIES[record.quality], content.lane
        for number, (name, unit, scale) in enumerate(content.channels.get(record.manifest, ())):
            for kind, value in zip(("min", "max", "mean", "count"), record.values[4 * number :], strict=False):
                if value is not None:
                    figure = float(value) if kind == "count" else value / scale
                    row.values[f"{record.event.node}/{name}/{kind}"] = (figure, "" if kind == "count" else unit)
        yield row


def _rows(group: _Group, content: _Body) -> Iterator[Arrived]:
    channels = content.channels.get(group.manifest, [])
    columns = [_spread(column) for column in group.channels]
    heads = [_integers(column) for column in (group.seqs, group.times_ms, group.errors_ms, group.qualities)]
    if any(len(column) != len(heads[0]) for column in (*heads, *columns)) or len(columns) > len(channels):
        raise Malformed("columns", "columns of different lengths, or of no channel")
    for n, (seq, time_ms, error_ms, quality) in enumerate(zip(*heads, strict=True)):
        row = Arrived(group.node, group.install, group.boot, seq, time_ms / 1000, _error_s(error_ms))
        try:
            row.quality = QUALITIES[Quality(quality)]
        except ValueError:
            raise Malformed("columns", f"quality {quality}") from None
        row.lane = content.lane
        for (name, unit, scale), column in zip(channels, columns, strict=False):
            value = column[n]
            if isinstance(value, int):
                row.values[name] = (value / scale, unit)
            elif value is not None:
                row.values[name] = (value, "")
        yield row


def _integers(column: Column) -> list[int]:
    spread = _spread(column)
    if not all(isinstance(value, int) for value in spread):
        raise Malformed("columns", "not a number")
    return spread  # type: ignore[return-value]  # just looked at


def _spread(column: Column) -> list[int] | list[int | str | None]:
    if not isinstance(column, _Run):
        return list(accumulate(column))
    if column.v is not None:
        return column.v
    return [column.first + n * column.by for n in range(column.n or 0)]


def _error_s(error_ms: int) -> float:
    return error_ms / 1000 if error_ms >= 0 else -1.0
