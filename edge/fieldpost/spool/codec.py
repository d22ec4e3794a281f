"""A batch of readings as bytes: columns of differences, MessagePack, zlib.

Neighbours in a column hardly differ, so differences are small integers of which zlib makes little; a reading of three
channels costs about five bytes. Every reading comes back as it was, in the same order.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import msgspec

from ..reading import Event, Reading, Value

VERSION = 2

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
    body = [VERSION, _runs(order), [(*group, *_columns(rows)) for group, rows in groups.items()], events]
    return zlib.compress(_encoder.encode(body), 6)


def decode(body: bytes) -> list[Reading]:
    """The readings of a batch. Raises ValueError where the bytes are not one."""
    try:
        raw = zlib.decompress(body)
        content = msgspec.msgpack.decode(raw)
        if content and isinstance(content[0], list):
            return _old.decode(raw)  # as schema 1 wrote it
        version, runs, groups, events = content
        if version != VERSION:
            raise ValueError(f"batch format {version}")
        rows = [_rows(group) for group in groups]
        readings = [next(rows[number]) for number, count in runs for _ in range(count)]
        for at, event in _events.decode(_encoder.encode(events)) if events else ():
            readings[at] = msgspec.structs.replace(readings[at], event=event)
    except NOT_A_BATCH as error:
        raise ValueError(str(error)) from error
    return readings


def _columns(rows: list[Reading]) -> list[Any]:
    """The numbers of a group: seq, uptime, date against uptime, error, quality, era, then each channel."""
    return [
        _steps([row.seq for row in rows]),
        _steps([row.uptime_ms for row in rows]),
        _steps([row.time_ms - row.uptime_ms for row in rows]),
        _steps([row.error_ms for row in rows]),
        _steps([row.quality for row in rows]),
        _steps([row.era for row in rows]),
        [_values(column) for column in zip(*(row.values for row in rows), strict=True)],
    ]


def _rows(group: list[Any]) -> Iterable[Any]:
    node, install, boot, manifest, width, seqs, uptimes, offsets, errors, qualities, eras, columns = group
    if len(columns) != width:
        raise ValueError("a channel is missing")
    seq, uptime = list(accumulate(_spread(seqs))), list(accumulate(_spread(uptimes)))
    values: Iterable[tuple[Value, ...]] = (
        zip(*(_unvalues(column) for column in columns), strict=True) if width else iter([()] * len(seq))
    )
    return iter(
        [
            Reading(node, install, boot, s, u, u + offset, error, manifest, row, None, quality, era)
            for s, u, offset, error, quality, era, row in zip(
                seq,
                uptime,
                accumulate(_spread(offsets)),
                accumulate(_spread(errors)),
                accumulate(_spread(qualities)),
                accumulate(_spread(eras)),
                values,
                strict=True,
            )
        ]
    )


def _steps(numbers: list[int]) -> list[Any]:
    """The first number, then the differences; as [count, first, step] where they are all the same."""
    steps = [numbers[0], *(b - a for a, b in pairwise(numbers))]
    if len(steps) > 3 and steps.count(steps[1]) >= len(steps) - 1 and all(s == steps[1] for s in steps[1:]):
        return [None, len(steps), steps[0], steps[1]]
    return steps


def _spread(steps: list[Any]) -> list[int]:
    if steps and steps[0] is None:
        _, count, first, step = steps
        if not 0 < count <= 10_000_000:
            raise ValueError("a column is too long")
        return [first] + [step] * (count - 1)
    return steps


def _values(column: Sequence[Value]) -> list[Any]:
    """Differences where every value is a number, else [True, the values as they are]."""
    if all(type(value) is int for value in column):
        return [False, _steps(list(column))]  # type: ignore[arg-type]
    return [True, list(column)]


def _unvalues(column: list[Any]) -> Iterable[Value]:
    plain, values = column
    return values if plain else accumulate(_spread(values))


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """(number, how often in a row)."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][0] == number:
            runs[-1] = (number, runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs
