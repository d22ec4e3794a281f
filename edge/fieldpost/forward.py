"""Spool -> uplink -> confirmed -> cursor: the loop that keeps our promise, one for each route.

Reading the spool removes nothing; only a confirmation moves the cursor, and in order. A batch takes what there is:
an idle uplink gets a reading at once, a busy one gets what has gathered meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from .config import RouteConfig
from .errors import Rejected, SpoolFault, Unreachable
from .reading import Manifest
from .routes import message
from .spool import Batch, Spool
from .uplinks.base import Uplink

log = logging.getLogger(__name__)

REFUSALS = 3
"""How often a far side must refuse a single reading before it is set aside."""


class Pause:
    """Waits between attempts: they double from `first_s` to `longest_s`, each with up to a quarter of jitter."""

    def __init__(self, first_s: float = 0.5, longest_s: float = 30.0) -> None:
        self._first_s, self._longest_s = first_s, longest_s
        self._next_s = first_s

    def longer(self) -> float:
        """How long to wait now, in seconds; the next wait is longer."""
        wait_s = self._next_s * random.uniform(0.75, 1.0)
        self._next_s = min(self._next_s * 2, self._longest_s)
        return wait_s

    def reset(self) -> None:
        self._next_s = self._first_s


@dataclass(slots=True)
class _InFlight:
    batch: Batch
    delivery: asyncio.Task[None]


@dataclass(frozen=True, slots=True)
class RouteStatus:
    """How a route is. `rate` in readings per second over the last half minute; `since_s`: seconds in this state."""

    id: str
    uplink: str
    state: str
    detail: str
    since_s: float
    confirmed: int
    messages: int
    bytes: int
    rate: float
    in_flight: int
    set_aside: int


class Route:
    """Carries the readings of one route to its uplink until cancelled."""

    def __init__(self, config: RouteConfig, spool: Spool, uplink: Uplink, manifests: Mapping[str, Manifest]) -> None:
        self.config = config
        self._spool = spool
        self._uplink = uplink
        self._manifests = manifests
        self._position = spool.cursor(config.id)
        self._window: deque[_InFlight] = deque()
        self._pause = Pause()
        self._lost_at: float | None = None
        self._confirmed = self._messages = self._bytes = self._set_aside = 0
        self._rate: deque[tuple[float, int]] = deque()

    async def run(self) -> None:
        """Open the uplink, carry, and open it again whenever it is lost."""
        while True:
            refused = None
            try:
                await self._uplink.open()
                self._back()
                await self._carry()
            except Unreachable as lost:
                self._lost(lost)
            except Rejected as error:
                refused = error
            except SpoolFault as fault:
                log.error("route %s can't read the spool: %s", self.config.id, fault)
            finally:
                await self._let_go()
            if refused is not None:
                await self._isolate(refused)
            else:
                await asyncio.sleep(self._pause.longer())

    async def _carry(self) -> None:
        """Keep a window of batches on their way; advance in order as they are confirmed."""
        while True:
            while self._window and self._window[0].delivery.done():
                self._confirm(self._window.popleft())
            if self._wants_more():
                await self._send()
            elif self._window:
                await self._something_happens()
            else:
                await self._spool.wait_for(self._position)

    def _wants_more(self) -> bool:
        """A whole batch goes whenever the window has room; less than one only when nothing else is on its way."""
        waiting = self._spool.head - self._position
        if not self._window:
            return waiting > 0
        return waiting >= self.config.batch_readings and len(self._window) < self.config.window

    async def _send(self) -> None:
        batch = await self._spool.next(self._position, self.config.batch_readings)
        self._position = batch.past
        delivery = asyncio.create_task(self._deliver(batch), name=f"deliver {self.config.id}")
        self._window.append(_InFlight(batch, delivery))
        await asyncio.sleep(0)  # the delivery begins before the next one is made: messages keep their order

    async def _deliver(self, batch: Batch) -> None:
        if batch.readings:
            sent = message(batch.readings, self._manifests)
            await self._uplink.deliver(sent)
            self._messages += 1
            self._bytes += len(sent.body)

    def _confirm(self, done: _InFlight) -> None:
        """Raises what the delivery raised; else the batch need never be read again."""
        try:
            done.delivery.result()
        except Rejected:
            self._window.appendleft(done)
            raise
        self._spool.advance(self.config.id, done.batch.past)
        self._count(len(done.batch.readings))
        self._pause.reset()

    async def _something_happens(self) -> None:
        """The oldest delivery ends, or a whole batch has gathered and the window has room for it."""
        if len(self._window) >= self.config.window:
            await asyncio.wait([self._window[0].delivery])
            return
        whole = asyncio.ensure_future(self._spool.wait_for(self._position + self.config.batch_readings - 1))
        try:
            await asyncio.wait([self._window[0].delivery, whole], return_when=asyncio.FIRST_COMPLETED)
        finally:
            whole.cancel()

    async def _isolate(self, refused: Rejected) -> None:
        """The far side refused a batch: deliver it in halves until the bad reading stands alone, and set that aside."""
        start = self._spool.cursor(self.config.id)
        batch = await self._spool.next(start, self.config.batch_readings)
        log.warning(
            "route %s: refused: %s; looking for the reading in %d", self.config.id, refused, len(batch.readings)
        )
        try:
            await self._uplink.open()
            await self._deliver_in_parts(batch)
        except Unreachable as lost:
            self._lost(lost)
        finally:
            self._position = self._spool.cursor(self.config.id)
            await self._uplink.close()

    async def _deliver_in_parts(self, batch: Batch, refusals: int = 0) -> None:
        try:
            await self._deliver(batch)
        except Rejected as refused:
            await self._uplink.close()  # a refusal may have cost the connection
            await self._uplink.open()
            if len(batch.readings) > 1:
                middle = len(batch.readings) // 2
                cut = batch.first + middle
                await self._deliver_in_parts(Batch(batch.first, cut, batch.readings[:middle]))
                await self._deliver_in_parts(Batch(cut, batch.past, batch.readings[middle:]))
            elif refusals + 1 < REFUSALS:
                await self._deliver_in_parts(batch, refusals + 1)
            else:
                self._set_aside += 1
                log.error("route %s: %s set aside: %s", self.config.id, batch.readings[0].id, refused)
                self._spool.set_aside(self.config.id, batch.readings[0], str(refused))
                self._spool.advance(self.config.id, batch.past)
        else:
            self._spool.advance(self.config.id, batch.past)
            self._count(len(batch.readings))

    async def _let_go(self) -> None:
        """Whatever was on its way counts as not delivered: it is sent again, with the same ids."""
        deliveries = [flight.delivery for flight in self._window]
        self._window.clear()
        for delivery in deliveries:
            delivery.cancel()
        await asyncio.gather(*deliveries, return_exceptions=True)
        self._position = self._spool.cursor(self.config.id)
        await self._uplink.close()

    def _lost(self, lost: Unreachable) -> None:
        if self._lost_at is None:
            self._lost_at = time.monotonic()
            log.warning("uplink %s lost: %s", self.config.uplink, lost)

    def _back(self) -> None:
        if self._lost_at is not None:
            away_s = time.monotonic() - self._lost_at
            waiting = self._spool.head - self._position
            log.info("uplink %s is back after %.0f s, %d readings waiting", self.config.uplink, away_s, waiting)
            self._lost_at = None

    def _count(self, readings: int) -> None:
        self._confirmed += readings
        now = time.monotonic()
        if self._rate and now - self._rate[-1][0] < 1.0:
            self._rate[-1] = (self._rate[-1][0], self._rate[-1][1] + readings)
        else:
            self._rate.append((now, readings))
        while now - self._rate[0][0] > 30.0:
            self._rate.popleft()

    def status(self) -> RouteStatus:
        """How the route is now."""
        uplink = self._uplink.status()
        now = time.monotonic()
        recent = [(at, count) for at, count in self._rate if now - at <= 30.0]
        span = max(1.0, now - recent[0][0]) if recent else 1.0
        return RouteStatus(
            id=self.config.id,
            uplink=self.config.uplink,
            state=uplink.state,
            detail=uplink.detail,
            since_s=now - self._lost_at if self._lost_at is not None else 0.0,
            confirmed=self._confirmed,
            messages=self._messages,
            bytes=self._bytes,
            rate=sum(count for _, count in recent) / span,
            in_flight=len(self._window),
            set_aside=self._set_aside,
        )
