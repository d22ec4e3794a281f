"""Thinning: when the card is full, rows become minimum, maximum, mean and count before anything is dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import msgspec

from ..reading import Event, Manifest, Reading, Value
from .marks import Key

BUCKET_MS = 600_000
"""Rows of so long a stretch of a node's own clock become one record."""


def thin(
    readings: Iterable[Reading], manifests: Mapping[str, Manifest], record: Callable[[Event], Reading]
) -> list[Reading]:
    """The records in the place of `readings`; `record` numbers them. A row alone in its stretch stays as it is."""
    found: list[list[Reading]] = []
    buckets: dict[tuple[Key, str, int, int], list[Reading]] = {}
    for reading in readings:
        key = (reading.node, reading.install, reading.boot)
        place = (key, reading.manifest, reading.era, reading.uptime_ms // BUCKET_MS)
        bucket = buckets.get(place)
        if reading.event is not None or reading.manifest not in manifests:
            found.append([reading])
        elif bucket is not None and bucket[-1].seq + 1 == reading.seq:
            bucket.append(reading)
        else:  # a record names its rows as a range, so the range must have no hole
            found.append([reading])
            buckets[place] = found[-1]
    return [_in_place_of(rows, record) for rows in found]


def _in_place_of(rows: list[Reading], record: Callable[[Event], Reading]) -> Reading:
    first, last = rows[0], rows[-1]
    if first is last:
        return first
    event = Event("thinned", first.node, first.install, first.boot, first.seq, last.seq, f"thinned: {len(rows)} rows")
    return _summary(record(event), first.manifest, rows)


def _summary(record: Reading, manifest: str, rows: list[Reading]) -> Reading:
    since, until = rows[0].time_ms, rows[-1].time_ms
    errors = [row.error_ms for row in rows]
    return msgspec.structs.replace(
        record,
        manifest=manifest,
        time_ms=(since + until) // 2,
        error_ms=-1 if min(errors) < 0 else abs(until - since) // 2 + max(errors),
        quality=max(row.quality for row in rows),
        era=rows[0].era,
        values=tuple(
            value for column in zip(*(row.values for row in rows), strict=False) for value in _figures(column)
        ),
    )


def _figures(column: Iterable[Value]) -> tuple[Value, Value, Value, Value]:
    numbers = [value for value in column if isinstance(value, int)]
    if not numbers:
        return None, None, None, 0
    return min(numbers), max(numbers), round(sum(numbers) / len(numbers)), len(numbers)
