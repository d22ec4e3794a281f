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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from .config import RouteConfig
from .errors import Rejected, SpoolFault, Unreachable
from .reading import Manifest, Reading
from .routes import message
from .spool import Batch, Kind, Spool
from .uplinks.base import Uplink

log = logging.getLogger(__name__)

REFUSALS = 3
"""How often a far side must refuse a single reading before it is set aside."""

LOOK_EVERY_S = 5.0
"""How often an uplink is looked at that has nothing to carry."""

KNOCK_S, KNOCK_SELDOM_S, LONG_OUTAGE_S = 0.9, 5.0, 600.0
"""The longest waits between attempts where nobody answers, in the first ten minutes and later."""

GATHER_ABOVE_PER_S = 300
GATHER_S = 0.005


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
    delivery: asyncio.Task[int]


@dataclass(frozen=True, slots=True)
class RouteStatus:
    """How a route is. `rate` in readings per second over the last half minute; `since_s`: seconds in this state."""

    id: str
    uplink: str
    state: str
    detail: str
    durable: bool
    since_s: float
    confirmed: int
    messages: int
    bytes: int
    rate: float
    in_flight: int
    set_aside: int


class Pace:
    """Lets so much through in a second; what is above waits. 0: as much as there is."""

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._free_at = 0.0

    def wait_s(self) -> float:
        """How long until something may go."""
        return max(0.0, self._free_at - time.monotonic()) if self._per_s else 0.0

    def spend(self, amount: int) -> None:
        """So much has gone."""
        if self._per_s:
            self._free_at = max(self._free_at, time.monotonic()) + amount / self._per_s


class Route:
    """Carries the readings of one route to its uplink until cancelled."""

    def __init__(self, config: RouteConfig, spool: Spool, uplink: Uplink, manifests: Mapping[str, Manifest]) -> None:
        self.config = config
        self._spool = spool
        self._uplink = uplink
        self._manifests = manifests
        self._windows: dict[Kind, deque[_InFlight]] = {"urgent": deque(), "live": deque(), "backfill": deque()}
        self._paces = (Pace(config.backfill_readings_per_s), Pace(config.backfill_bytes_per_s))
        self._stirred = asyncio.Event()
        self._pause = Pause()
        self._gathering_since: float | None = None
        self._lost_at: float | None = None
        self._is_nobody_there = False
        self._confirmed = self._messages = self._bytes = self._set_aside = 0
        self._rate: deque[tuple[float, int]] = deque()

    async def run(self) -> None:
        """Open the uplink, carry, and open it again whenever it is lost."""
        while True:
            refused: tuple[Batch, Rejected] | None = None
            try:
                await self._uplink.open()
                self._back()
                refused = await self._carry()
            except Unreachable as lost:
                self._lost(lost)
            except SpoolFault as fault:
                log.error("route %s can't read the spool: %s", self.config.id, fault)
            finally:
                await self._let_go()
            if refused is not None:
                await self._isolate(*refused)
            else:
                await asyncio.sleep(self._wait_s())

    async def _carry(self) -> tuple[Batch, Rejected]:
        """Keep a window of batches on their way, urgent ones first, history last; returns when one is refused."""
        while True:
            for window in self._windows.values():
                while window and window[0].delivery.done():
                    if refused := self._confirm(window.popleft()):
                        return refused
            kind = await self._next_kind()
            if kind is not None:
                await self._send(kind)
            else:
                await self._something_happens()

    async def _next_kind(self) -> Kind | None:
        """What may go now. An idle uplink gets a reading at once, a busy one what has gathered."""
        urgent, live, history = self._spool.unsent(self.config.id)
        window, whole = self.config.window, self.config.batch_readings
        flying = sum(len(w) for w in self._windows.values())
        if urgent > 0 and (not self._windows["urgent"] or urgent >= whole) and flying < window + 1:
            return "urgent"
        if live == 0:
            self._gathering_since = None
        elif self._gathering_since is None:
            self._gathering_since = time.monotonic()
        is_due = live >= whole or not (self._windows["live"] or self._gather_s())
        if live > 0 and flying < window and is_due:
            if live < whole and self._rate_now() > GATHER_ABOVE_PER_S:
                # At thousands a second a message for each handful costs more than these few milliseconds.
                await asyncio.sleep(GATHER_S)
            return "live"
        # The last place of the window is kept for what is fresh.
        if history > 0 and flying < max(1, window - 1) and not any(pace.wait_s() for pace in self._paces):
            return "backfill"
        return None

    def _stir(self, _: object) -> None:
        self._stirred.set()

    def _gather_s(self) -> float:
        """How long fresh readings still wait for others."""
        if self._gathering_since is None:
            return 0.0
        return max(0.0, self._gathering_since + self.config.gather_s - time.monotonic())

    async def _send(self, kind: Kind) -> None:
        batch = await self._spool.take(self.config.id, kind, self.config.batch_readings)
        if batch is None:
            return
        if kind == "live":
            self._gathering_since = None
        elif kind == "backfill":
            self._paces[0].spend(len(batch.readings))
        delivery = asyncio.create_task(self._deliver(batch), name=f"deliver {self.config.id}")
        delivery.add_done_callback(self._stir)
        self._windows[kind].append(_InFlight(batch, delivery))
        await asyncio.sleep(0)  # the delivery begins before the next one is made: messages keep their order

    async def _deliver(self, batch: Batch) -> int:
        """Returns the bytes of the message, once it is confirmed."""
        if not batch.readings:
            return 0
        lane = "" if batch.kind == "live" else batch.kind
        sent = message(batch.readings, self._manifests, lane, self.config.form)
        if batch.kind == "backfill":
            self._paces[1].spend(len(sent.body))
        await self._uplink.deliver(sent)
        self._messages += 1
        self._bytes += len(sent.body)
        return len(sent.body)

    def _confirm(self, done: _InFlight) -> tuple[Batch, Rejected] | None:
        """The batch need not be read again. Raises Unreachable; returns a batch that was refused."""
        try:
            done.delivery.result()
        except Rejected as refused:
            return done.batch, refused
        self._spool.confirm(self.config.id, done.batch)
        self._count(len(done.batch.readings))
        self._pause.reset()
        return None

    async def _something_happens(self) -> None:
        """A delivery ends, something new was taken, or the pace lets history go on.

        Raises Unreachable where the uplink was lost with nothing on its way: no delivery would tell.
        """
        flying = sum(len(window) for window in self._windows.values())
        if not any(window and window[0].delivery.done() for window in self._windows.values()):
            self._stirred.clear()
            news = None
            if flying <= self.config.window:
                is_busy = self._windows["live"] or self._gathering_since is not None
                news = self._spool.news(self.config.id, self.config.batch_readings if is_busy else 1)
                news.add_done_callback(self._stir)
            paced = max(pace.wait_s() for pace in self._paces)
            try:
                async with asyncio.timeout(min(LOOK_EVERY_S, paced or LOOK_EVERY_S, self._gather_s() or LOOK_EVERY_S)):
                    await self._stirred.wait()
            except TimeoutError:
                pass
            finally:
                if news is not None:
                    news.remove_done_callback(self._stir)
                    news.cancel()
        uplink = self._uplink.status()
        if not flying and uplink.state == "down":
            raise Unreachable(uplink.detail)

    async def _isolate(self, batch: Batch, refused: Rejected) -> None:
        """The far side refused a batch: deliver it in halves until the bad reading stands alone, and set that aside."""
        route = self.config.id
        log.warning("route %s: refused: %s; looking for the reading in %d", route, refused, len(batch.readings))
        try:
            await self._uplink.open()
            self._spool.link(route, up=True, durable=self._uplink.status().durable)
            await self._deliver_in_parts(batch)
        except Unreachable as lost:
            self._lost(lost)
        finally:
            self._spool.link(route, up=False)
            await self._uplink.close()

    async def _deliver_in_parts(self, batch: Batch, refusals: int = 0) -> None:
        try:
            await self._deliver(batch)
        except Rejected as refused:
            await self._uplink.close()  # a refusal may have cost the connection
            await self._uplink.open()
            if len(batch.readings) > 1:
                for half in _halves(batch):
                    await self._deliver_in_parts(half)
            elif refusals + 1 < REFUSALS:
                await self._deliver_in_parts(batch, refusals + 1)
            else:
                self._set_aside += 1
                log.error("route %s: %s set aside: %s", self.config.id, batch.readings[0].id, refused)
                self._spool.set_aside(self.config.id, batch.readings[0], str(refused))
                self._spool.confirm(self.config.id, batch)
        else:
            self._spool.confirm(self.config.id, batch)
            self._count(len(batch.readings))

    async def deliver_again(self, reading: Reading) -> None:
        """Try a reading once more that was set aside. Raises Unreachable or Rejected."""
        await self._uplink.deliver(message([reading], self._manifests, "backfill", self.config.form))

    async def _let_go(self) -> None:
        """Whatever was on its way counts as not delivered: it is sent again, with the same ids."""
        deliveries = [flight.delivery for window in self._windows.values() for flight in window]
        for window in self._windows.values():
            window.clear()
        for delivery in deliveries:
            delivery.cancel()
        await asyncio.gather(*deliveries, return_exceptions=True)
        self._spool.link(self.config.id, up=False)
        await self._uplink.close()

    def _wait_s(self) -> float:
        """Until the next attempt. Where nobody answers it costs a hundred bytes, so the line is back soon after."""
        wait_s = self._pause.longer()
        if self._lost_at is None or not self._is_nobody_there:
            return wait_s
        return min(wait_s, KNOCK_S if time.monotonic() - self._lost_at < LONG_OUTAGE_S else KNOCK_SELDOM_S)

    def _lost(self, lost: Unreachable) -> None:
        self._is_nobody_there = lost.nobody
        if self._lost_at is None:
            self._lost_at = time.monotonic()
            log.warning("uplink %s lost: %s", self.config.uplink, lost)

    def _back(self) -> None:
        durable = self._uplink.status().durable
        self._spool.link(self.config.id, up=True, durable=durable)
        if self._lost_at is not None:
            away_s = time.monotonic() - self._lost_at
            waiting = self._spool.backlog(self.config.id)
            log.info("uplink %s is back after %.0f s, %d readings waiting", self.config.uplink, away_s, waiting)
            self._lost_at = None

    def _rate_now(self) -> float:
        """Readings confirmed in the last second or so, per second."""
        if not self._rate:
            return 0.0
        now = time.monotonic()
        recent = [(at, count) for at, count in list(self._rate)[-2:] if now - at < 3]
        return sum(count for _, count in recent) / max(1.0, now - recent[0][0]) if recent else 0.0

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
            durable=uplink.durable,
            since_s=now - self._lost_at if self._lost_at is not None else 0.0,
            confirmed=self._confirmed,
            messages=self._messages,
            bytes=self._bytes,
            rate=sum(count for _, count in recent) / span,
            in_flight=sum(len(window) for window in self._windows.values()),
            set_aside=self._set_aside,
        )


def _halves(batch: Batch) -> Iterator[Batch]:
    """A batch as two. What a replay picked out lies somewhere in its positions: they count with the second half."""
    middle = len(batch.readings) // 2
    span = batch.flight.span
    cut = batch.first + middle if span is None or span.whole else batch.first
    yield replace(batch, flight=replace(batch.flight, past=cut), readings=batch.readings[:middle])
    yield replace(batch, flight=replace(batch.flight, first=cut), readings=batch.readings[middle:])
