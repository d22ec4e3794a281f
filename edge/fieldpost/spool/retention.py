"""What is given up when there is no room or it is too old, the least valuable first; never without a word.

In order: readings that every route has and that were only kept; what only removed routes want; rows, for their minimum,
maximum, mean and count; the oldest of those. The lane of urgent readings and gap records has limits of its own.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from ..reading import Reading
from .card import Card
from .queue import Queue
from .rows import Info
from .stage import LaneName

AGE_CHECK_S = 30.0
MAKE_ROOM_FROM, MAKE_ROOM_TO = 0.95, 0.90
"""Parts of `max_bytes` between which something is given up."""

GIVEN_UP_AT_ONCE = 16


class Retention:
    """Carries it out; `write` makes a commit."""

    def __init__(self, queue: Queue, card: Card, max_bytes: int, write: Callable[[], Awaitable[None]]) -> None:
        self._queue = queue
        self._card = card
        self._max_bytes = max_bytes
        self._write = write
        self._aged_at = 0.0

    async def keep(self, is_closing: Callable[[], bool]) -> None:
        """Give up what the limits do not allow: what is too old first, then what is too much."""
        if time.monotonic() - self._aged_at >= AGE_CHECK_S:
            self._aged_at = time.monotonic()
            await self._age()
        limits = self._queue.terms.limits
        for name in LaneName:
            most = limits[name].max_bytes if name in limits else 0
            if most and await self._card.run(self._card.log.body_bytes, name) > most:
                await self._give_up(name, f"max_bytes of lane {name.name.lower()}")
        if self._card.bytes > MAKE_ROOM_FROM * self._max_bytes:
            await self._make_room(is_closing)

    async def _make_room(self, is_closing: Callable[[], bool]) -> None:
        while self._card.bytes > MAKE_ROOM_TO * self._max_bytes and not is_closing():
            if not (
                await self._forget_delivered()
                or (self._queue.terms.full == "thin" and await self._thin())
                or (self._queue.terms.full != "hold" and await self._give_up(LaneName.BULK, "max_bytes"))
            ):
                break
            await self._write()
            await self._card.run(self._card.log.shrink)
            await self._card.run(self._card.measure)

    async def _forget_delivered(self) -> bool:
        """What every route has; then what only routes want that are not configured any more."""
        for name in LaneName:
            infos = await self._card.run(self._card.log.infos, name, 0, limit=-1)
            stored = [info for info in infos if info.past <= self._queue.lanes[name].committed]
            free = [info for info in stored if not self._queue.is_wanted(info)]
            for info in free[:GIVEN_UP_AT_ONCE]:
                self._queue.forget_delivered(info)
            if free:
                return True
        for name in (LaneName.BULK, LaneName.URGENT):  # alarms last
            infos = await self._card.run(self._card.log.infos, name, 0, limit=-1)
            left = [info for info in infos if self._queue.routes and not self._queue.wanted_by(info)]
            if await self._give_up_these(left, "max_bytes, only removed routes want it"):
                return True
        return False

    async def _thin(self) -> bool:
        infos = await self._card.run(self._card.log.infos, LaneName.BULK, 0, limit=-1)
        infos = [info for info in infos if info.past <= self._queue.lanes[LaneName.BULK].committed]
        old = infos[: len(infos) * 3 // 4]  # the newest stay whole, and go on being of use while older ones go
        chosen = [i for i in old if not i.thinned and i.count > 1 and self._queue.wanted_by(i)]
        done = False
        for info in [info for info in chosen if not self._queue.is_busy(info)][:GIVEN_UP_AT_ONCE]:
            readings = await self._whole(info)
            if readings and not self._queue.is_busy(info):
                self._queue.thin(info, readings)
                done = True
        return done

    async def _give_up(self, name: LaneName, why: str) -> bool:
        infos = await self._card.run(self._card.log.infos, name, 0, limit=64)
        return await self._give_up_these([info for info in infos if not self._queue.is_flying(info)], why)

    async def _give_up_these(self, infos: list[Info], why: str) -> bool:
        done = False
        for info in infos[:GIVEN_UP_AT_ONCE]:
            readings = await self._whole(info)
            if readings is not None and not self._queue.is_flying(info):
                self._queue.give_up(info, readings, why)
                done = True
        return done

    async def _age(self) -> None:
        for name, limit in self._queue.terms.limits.items():
            if not limit.max_age_ms:
                continue
            infos = await self._card.run(self._card.log.infos, name, 0, limit=256)
            for info in infos:
                if self._queue.age_ms() - info.at_ms <= limit.max_age_ms or self._queue.is_flying(info):
                    break
                readings = await self._whole(info)
                if readings is not None:
                    self._queue.give_up(info, readings, "max_age")

    async def _whole(self, info: Info) -> list[Reading] | None:
        piece = await self._card.run(self._card.log.rest, info.lane, info.first, info.past)
        if piece is None:
            return None
        for first, past, ids in piece.damage:
            self._queue.damaged(info.lane, first, past, ids)
        return None if piece.damage else piece.readings
