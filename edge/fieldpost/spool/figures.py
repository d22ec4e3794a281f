"""How the spool is, in figures: what waits, how long there is room, what the card bears."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import SpoolFault
from .card import Card
from .queue import Queue
from .rows import Info
from .stage import LaneName


@dataclass(frozen=True, slots=True)
class RouteBacklog:
    """What a route has yet to confirm. `oldest_ms`: the date of the oldest reading, unix; `bytes`: on the card."""

    urgent: int
    live: int
    backfill: int
    bytes: int
    oldest_ms: int | None
    spans: int

    @property
    def readings(self) -> int:
        return self.urgent + self.live + self.backfill


@dataclass(frozen=True, slots=True)
class SpoolStatus:
    """`state` is `ok`, `full` (of bytes or of readings in memory), `volatile` (the folder is not on a card) or
    `failing` (the card did not keep a write)."""

    state: str
    detail: str
    generation: str
    boot: int
    head: int
    committed: int
    in_memory: int
    stored: int
    bytes: int
    max_bytes: int
    free_bytes: int
    commits: int
    taken: int
    repeats: int
    set_aside: int
    ledger: dict[str, int]
    routes: dict[str, RouteBacklog]
    removed: dict[str, int]
    readings_per_hour: float
    bytes_per_reading: float
    hours_until_full: float | None
    card_bytes: int
    card_bytes_per_reading: float | None
    card_bytes_per_day: float


class Figures:
    """Made of what the queue and the card know; the rates are those of the last hour."""

    def __init__(self, queue: Queue, card: Card, max_bytes: int, min_free_bytes: int) -> None:
        self._queue = queue
        self._card = card
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes
        self._rates: deque[tuple[float, int, int]] = deque()
        self._card_bytes_at_start = written_bytes()
        self._rate()

    async def now(self, state: str, detail: str) -> SpoolStatus:
        """All of it; `state` and `detail` are the spool's own word."""
        queue = self._queue
        bulk = queue.lanes[LaneName.BULK]
        infos = {name: await self._infos(name) for name in LaneName}
        stored = sum(info.count for lane in infos.values() for info in lane)
        bodies = sum(info.bytes for lane in infos.values() for info in lane)
        per_reading = bodies / stored if stored else 0.0
        routes = {
            route: RouteBacklog(
                urgent=sum(queue.progress[route, LaneName.URGENT].backlog(queue.lanes[LaneName.URGENT].head)),
                live=queue.progress[route, LaneName.BULK].backlog(bulk.head)[0],
                backfill=queue.progress[route, LaneName.BULK].backlog(bulk.head)[1],
                bytes=_bytes_of(queue, route, infos),
                oldest_ms=_oldest_ms(queue, route, infos),
                spans=len(queue.progress[route, LaneName.BULK].spans),
            )
            for route in queue.routes
        }
        hours, taken, card = self._rate()
        rate = taken / hours
        per_stored = per_reading or 8.0
        left = max(0, min(self._max_bytes - self._card.bytes, self._card.free - self._min_free_bytes))
        return SpoolStatus(
            state=state,
            detail=detail,
            generation=queue.generation,
            boot=queue.boot,
            head=bulk.head,
            committed=bulk.committed,
            in_memory=queue.waiting,
            stored=stored,
            bytes=self._card.bytes,
            max_bytes=self._max_bytes,
            free_bytes=self._card.free,
            commits=queue.commits,
            taken=queue.taken,
            repeats=queue.repeats,
            set_aside=queue.set_aside_count,
            ledger=dict(queue.counts),
            routes=routes,
            removed={
                route: sum(span.past - span.first for span in progress.spans)
                for (route, lane), progress in queue.removed.items()
                if lane is LaneName.BULK and progress.spans
            },
            readings_per_hour=rate,
            bytes_per_reading=per_stored,
            hours_until_full=left / (rate * per_stored) if rate else None,
            card_bytes=written_bytes() - self._card_bytes_at_start,
            card_bytes_per_reading=card / taken if taken else None,
            card_bytes_per_day=card / hours * 24,
        )

    async def _infos(self, lane: LaneName) -> list[Info]:
        with contextlib.suppress(SpoolFault):
            return await self._card.run(self._card.log.infos, lane, 0, limit=-1)
        return []

    def _rate(self) -> tuple[float, int, int]:
        """(hours, readings taken in them, bytes written by us), over an hour at the most."""
        now, taken, card = time.monotonic(), self._queue.taken, written_bytes()
        if not self._rates or now - self._rates[-1][0] >= 10:
            self._rates.append((now, taken, card))
        while now - self._rates[0][0] > 3600:
            self._rates.popleft()
        at, before, before_card = self._rates[0]
        return max(now - at, 1.0) / 3600, taken - before, card - before_card


def _bytes_of(queue: Queue, route: str, infos: Mapping[LaneName, Sequence[Info]]) -> int:
    """Bytes on the card that a route has yet to confirm, by the share of each batch."""
    total = 0.0
    for name, lane in infos.items():
        pieces = list(queue.progress[route, name].pieces(queue.lanes[name].head))
        for info in lane:
            held = sum(max(0, min(info.past, past) - max(info.first, first)) for first, past in pieces)
            total += info.bytes * min(1.0, held / (info.past - info.first))
    return round(total)


def _oldest_ms(queue: Queue, route: str, infos: Mapping[LaneName, Sequence[Info]]) -> int | None:
    """The date of the oldest reading that a route has yet to confirm."""
    dates = []
    for name, lane in queue.lanes.items():
        position = queue.progress[route, name].oldest()
        if position >= lane.head:
            continue
        if position >= lane.first:
            dates.append(lane.read(position, 1)[0].time_ms)
        else:
            dates += [info.since_ms for info in infos[name] if info.first <= position < info.past]
    return min(dates, default=None)


def written_bytes() -> int:
    """What this process has had written to disks: /proc/self/io. The journal of the file system is not in it."""
    try:
        lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(lines["write_bytes"])
    except (OSError, ValueError, KeyError):
        return 0
