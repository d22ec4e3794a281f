"""The spool: the gateway's durable queue. DESIGN.md beside this file says what it promises and why it is so.

`append` takes readings, `safe` tells when they may be acknowledged, `take` reads for a route and removes nothing,
`confirm` moves a route's progress after the far side has confirmed. What is decided is decided in `queue`, in plain
memory; SQLite runs in one named thread; this module carries the one's decisions to the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, ParamSpec, Self, TypeVar

from ..clock import Clock, SystemClock
from ..errors import SpoolBroken, SpoolFault
from ..reading import Event, Manifest, Reading
from .card import Card, volatile_kind
from .figures import Figures, RouteBacklog, SpoolStatus
from .marks import Key
from .progress import Flight, Span
from .queue import GATHERED_GRACE_MS, Limits, Queue, RouteTerms, Terms, Ticket
from .repair import Report
from .retention import Retention
from .rows import Info, Piece, Refused
from .stage import LaneName

__all__ = [
    "Batch",
    "Kind",
    "LaneName",
    "Limits",
    "RouteBacklog",
    "RouteTerms",
    "Spool",
    "SpoolSettings",
    "SpoolStatus",
    "Terms",
    "Ticket",
]

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

Kind = Literal["urgent", "live", "backfill"]

RETRY_COMMIT_S = 2.0

LOOK_EVERY_S = 30.0
"""How often ages are looked at."""


@dataclass(frozen=True, slots=True)
class SpoolSettings:
    """`terms`: how the queue behaves. `max_bytes` of file and `min_free_bytes` of disk: beyond either nothing more is
    taken. `trust_card`: count what is on a tmpfs or overlay as kept."""

    folder: Path
    terms: Terms = field(default_factory=Terms)
    max_bytes: int = 2_000_000_000
    min_free_bytes: int = 200_000_000
    trust_card: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """Readings for one route, at positions [first, past) of a lane. `readings` may be empty."""

    kind: Kind
    lane: LaneName
    flight: Flight
    readings: tuple[Reading, ...]

    @property
    def first(self) -> int:
        return self.flight.first

    @property
    def past(self) -> int:
        return self.flight.past


class Signal:
    """Wakes everybody who waits; nobody who waits later."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def fire(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    def wait(self) -> Awaitable[object]:
        """What fires from this call on, not from when it is awaited on."""
        return self._event.wait()


@dataclass(slots=True)
class _Waiter:
    """A route that waits for a lane to have come to a position."""

    done: asyncio.Future[None]
    urgent: int
    bulk: int

    def wake(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


class Spool:
    """The durable queue; an async context manager.

    ```python
    async with Spool(settings, [RouteTerms("all")]) as spool:
        ticket = spool.append([reading])
        await spool.until_safe(ticket)               # it may be acknowledged
        batch = await spool.take("all", "live", 100) # reads, never removes
        spool.confirm("all", batch)                  # the far side has it
    ```
    """

    def __init__(self, settings: SpoolSettings, routes: Iterable[RouteTerms], clock: Clock | None = None) -> None:
        self._settings = settings
        self._routes = tuple(routes)
        self._clock = clock or SystemClock()
        self._card = Card(settings.folder)
        self._trouble = ""
        self._waiters: list[_Waiter] = []
        self._safe = Signal()
        self._work = asyncio.Event()
        self._wakes_at: float | None = None
        self._closing = asyncio.Event()
        self._committing = asyncio.Lock()

    async def __aenter__(self) -> Self:
        """Open the file and start committing. Raises SpoolFault where the folder can't be used."""
        opened = await self._card.run(self._card.log.open)
        volatile = "" if self._settings.trust_card else volatile_kind(self._settings.folder)
        self.queue = Queue(opened, self._settings.terms, self._routes, self._clock, card_keeps=not volatile)
        if volatile:
            log.error(
                "%s is on a %s: what is there is gone with the power, so only uplinks that keep readings themselves "
                "make them safe; name a folder on the card as gateway.data",
                self._settings.folder,
                volatile,
            )
        self._volatile = volatile
        self._figures = Figures(self.queue, self._card, self._settings.max_bytes, self._settings.min_free_bytes)
        self._retention = Retention(self.queue, self._card, self._settings.max_bytes, self._commit)
        await self._card.run(self._card.measure)
        self._committer = asyncio.create_task(self._commit_for_ever(), name="spool commit")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._work.set()
        await self._committer  # never cancelled: a commit on its way must be known to have been made or not
        with contextlib.suppress(SpoolFault):
            while self.queue.due_ms() is not None:
                await self._commit()
                if not self.queue.waiting:
                    break
        await self._card.close()

    # What comes in.

    @property
    def generation(self) -> str:
        return self.queue.generation

    @property
    def boot(self) -> int:
        return self.queue.boot

    @property
    def stage_readings(self) -> int:
        """How many readings may be in memory only."""
        return self._settings.terms.stage_readings

    @property
    def room(self) -> int:
        """How many readings may be appended now; 0 while the spool is full or the card fails."""
        return 0 if self._trouble else self.queue.room

    @property
    def safe_within_s(self) -> float:
        """How long it may take until what is appended now is safe, if all goes well."""
        gathered = max((route.gather_ms for route in self._routes), default=0)
        return max(self._settings.terms.linger_ms, gathered and gathered + GATHERED_GRACE_MS) / 1000

    def append(self, readings: Iterable[Reading], urgent: Collection[int] = ()) -> Ticket:
        """Take readings that are new by identity; those whose seq is in `urgent` overtake the others.

        Nothing is safe yet: wait for the ticket. What was taken before is left out and counted as a repeat.
        """
        ticket = self.queue.append(readings, urgent)
        self._tell_routes()
        # It is due at the end of its linger; looked at anew for each, that would cost more than taking it.
        soon_ms = self.queue.age_ms() + self._settings.terms.linger_ms * 5 // 4
        if urgent or self.queue.is_large or (self._wakes_at is not None and self._wakes_at > soon_ms):
            self._plan_wake()
        return ticket

    @property
    def ticket(self) -> Ticket:
        """Everything that was taken so far."""
        return self.queue.ticket

    def mark(self, key: Key, first: int, last: int) -> list[tuple[int, int]]:
        """Rows `first..last` of a boot need not come any more; returns those that had not come before."""
        return self.queue.mark(key, first, last)

    def upto(self, key: Key) -> int:
        """Every row of this boot up to here was appended or marked; -1 where none was."""
        return self.queue.marks.upto(key)

    def boots(self, node: str) -> list[Key]:
        """The boots known of a node, oldest first."""
        return self.queue.marks.boots(node)

    def known(self) -> list[tuple[Key, int]]:
        """Every boot that is known, with its `upto`."""
        return self.queue.marks.known()

    def report(self, event: Event) -> None:
        """Say something upstream as a record of the gateway's own; a discard goes into the ledger as well."""
        self.queue.report(event)
        self._stir()

    def keep_manifest(self, manifest: Manifest) -> None:
        """Remember what a hash means, before any reading that names it is appended."""
        self.queue.keep_manifest(manifest)

    @property
    def manifests(self) -> Mapping[str, Manifest]:
        """What the hashes that readings name mean."""
        return self.queue.manifests

    def manifest(self, hash_: str) -> Manifest | None:
        return self.queue.manifests.get(hash_)

    def observe_clock(self, synced: bool | None = None) -> None:
        """Look at the clocks; call it when something is dated."""
        if self.queue.observe_clock(synced):
            era = self.queue.eras.now
            log.info("the clock was set%s", "" if era.synced else ", by nobody who says that it is right")
            self._work.set()

    @property
    def era(self) -> int:
        """The stretch of the gateway's clock by which readings are dated now."""
        return self.queue.eras.now.number

    @property
    def is_clock_set(self) -> bool:
        """Whether dates that are made now are good as they are."""
        return self.queue.eras.now.synced

    def hurry(self) -> None:
        """Somebody waits for the commit: don't linger."""
        self.queue.hurry()
        self._plan_wake()

    def is_safe(self, ticket: Ticket) -> bool:
        """Whether everything of a ticket may be acknowledged."""
        return self.queue.is_safe(ticket)

    async def until_safe(self, ticket: Ticket) -> None:
        """Wait until everything of a ticket may be acknowledged."""
        while not self.queue.is_safe(ticket):
            await self._safe.wait()

    # What goes out.

    def link(self, route: str, *, up: bool, durable: bool = False) -> None:
        """A route's uplink came, with whether it keeps what it confirms, or went. What was on its way is let go."""
        self.queue.link(route, up=up, durable=durable)
        self._stir()

    def unsent(self, route: str) -> tuple[int, int, int]:
        """How many positions a route can send: (urgent, live, history)."""
        return self.queue.unsent(route)

    def news(self, route: str, live: int = 1) -> asyncio.Future[None]:
        """Done when something urgent is taken, or when a route can send so many live readings, from this call on."""
        waiter = _Waiter(
            asyncio.get_running_loop().create_future(),
            self.queue.lanes[LaneName.URGENT].head + 1,
            self.queue.progress[route, LaneName.BULK].next_live() + live,
        )
        self._waiters.append(waiter)
        return waiter.done

    def backlog(self, route: str) -> int:
        """How many positions a route has yet to confirm."""
        return sum(sum(self.queue.progress[route, name].backlog(self.queue.lanes[name].head)) for name in LaneName)

    async def take(self, route: str, kind: Kind, limit: int) -> Batch | None:
        """The next readings of a route, `limit` positions at most; None where there are none.

        Reads, never removes: they are on their way until `confirm`, or until `link` lets them go. Damage on the way
        is set aside and put into the ledger; what a route's `ttl` excludes is given up.
        """
        lane = LaneName.URGENT if kind == "urgent" else LaneName.BULK
        progress, stage = self.queue.progress[route, lane], self.queue.lanes[lane]
        history = progress.next_history() if kind == "backfill" or lane is LaneName.URGENT else None
        if history is not None:
            position, span = history
            return await self._take(route, kind, lane, position, span.past, limit, span)
        position = progress.next_live()
        if kind == "backfill" or position >= stage.head:
            return None
        return await self._take(route, kind, lane, position, stage.head, limit, None)

    async def _take(
        self, route: str, kind: Kind, lane: LaneName, position: int, until: int, limit: int, span: Span | None
    ) -> Batch | None:
        stage = self.queue.lanes[lane]
        ttl = self.queue.routes[route].ttl_ms
        # How old a reading in memory is, only the card knows, once it is there too.
        if position >= stage.first and not (ttl and position < stage.committed):
            readings = stage.read(position, min(limit, until - position))
            past, at_ms = position + len(readings), self.queue.age_ms()
        else:
            on_card, before = min(until, stage.committed), (self.queue.generation, self.queue.replacements)
            # What is being read must not be thinned before it is known to be on its way.
            reading = (lane, position, min(on_card, position + limit))
            self.queue.reading.append(reading)
            try:
                piece: Piece = await self._look(self._card.log.read, lane, position, on_card, limit)
            finally:
                self.queue.reading.remove(reading)
            if self.queue.generation != before[0]:
                return None  # the file was begun again, and what it lost is told: our position may be none any more
            for first, past, ids in piece.damage:
                self.queue.damaged(lane, first, past, ids)
                self._stir()
            if (not piece.readings and piece.past <= piece.first) or self.queue.replacements != before[1]:
                return None  # nothing, or what was read may have been thinned meanwhile: it is read again
            position, past, readings, at_ms = piece.first, piece.past, piece.readings, piece.at_ms
        is_asked_for = span is not None and not span.whole  # by a person, who knows how old it is
        if ttl and readings and not is_asked_for and self.queue.age_ms() - at_ms > ttl:
            await self._expire(route, lane, position, until)
            return None
        flight = self.queue.progress[route, lane].fly(position, past, span)
        if span is not None and not span.whole:
            readings = [reading for reading in readings if _is_meant(reading, span)]
        return Batch(kind, lane, flight, tuple(self.queue.dated(readings)))

    async def _expire(self, route: str, lane: LaneName, position: int, until: int) -> None:
        """Give up what is left of the batch at a position, for one route."""
        piece: Piece | None = await self._look(self._card.log.rest, lane, position, until)
        if piece is not None and not piece.damage:
            self.queue.expire(route, lane, position, piece.past, piece.readings)
        self._stir()

    def confirm(self, route: str, batch: Batch) -> None:
        """The far side has confirmed a batch."""
        self.queue.confirm(route, batch.lane, batch.flight)
        self._safe.fire()
        if self.queue.due_ms() is not None:
            self._plan_wake()

    def set_aside(self, route: str, reading: Reading, reason: str) -> None:
        """`route`'s far side refused this reading for good: keep it to be looked at, and say so upstream."""
        self.queue.set_aside(route, reading, reason)
        self._stir()

    # By hand.

    async def replay(self, route: str, since_ms: int, until_ms: int = 0, node: str = "") -> int:
        """Send again what is kept of the time from `since_ms` (unix) on; returns how many readings at the most."""
        added = 0
        async with self._committing:  # and nothing is pruned meanwhile
            await self._commit_once()
            for name in LaneName:
                infos = await self._look(self._card.log.infos, name, 0, limit=-1)
                wanted = [i for i in infos if i.until_ms >= since_ms and (not until_ms or i.since_ms <= until_ms)]
                for first, past in _stretches(wanted):
                    added += self.queue.replay(route, name, Span(first, past, node, since_ms, until_ms))
        self._stir(everybody=True)
        return added

    async def refused(self) -> list[Refused]:
        """What is set aside."""
        await self._commit()
        return await self._look(self._card.log.refused)

    async def settle(self, refused: Refused, *, dropped: bool) -> None:
        """A reading that was set aside was delivered after all, or is given up."""
        self.queue.settled(refused, dropped=dropped)
        await self._commit()

    async def ledger(self, limit: int) -> list[tuple[int, Event]]:
        """The newest entries that are on the card, newest first."""
        return await self._look(self._card.log.ledger, limit)

    async def verify(self) -> Report:
        """Compare everything on the card with its checksums."""
        await self._commit()
        return await self._card.run(self._card.log.verify)

    async def repair(self, why: str) -> None:
        """Set the file aside, begin a new one, and take over what can be read; what is lost is told as ever."""
        async with self._committing:
            await self._begin_again(why)

    async def page(self, lane: LaneName, position: int, limit: int) -> tuple[list[Reading], int | None]:
        """Stored readings from a position on, for an export; and where the next page begins, None: at the end."""
        if position == 0:
            await self._commit()
        end = self.queue.lanes[lane].committed
        for few in (3, -1):  # a damaged row may hide the next
            infos = await self._look(self._card.log.infos, lane, position, limit=few, covering=True)
            start = next((max(position, info.first) for info in infos if info.past > position), end)
            if start < end:
                break
        if start >= end:
            return [], None
        piece: Piece = await self._look(self._card.log.read, lane, start, end, limit)
        for first, past, ids in piece.damage:
            self.queue.damaged(lane, first, past, ids)
        return self.queue.dated(piece.readings), piece.past

    # How it is.

    async def status(self) -> SpoolStatus:
        """How it is, and how long it will do."""
        return await self._figures.now(
            self.state, self._trouble or (f"on a {self._volatile}" if self._volatile else "")
        )

    @property
    def state(self) -> str:
        if self._trouble:
            return "full" if self._trouble.startswith("full") else "failing"
        if self._volatile:
            return "volatile"
        return "ok" if self.room else "full"

    # Writing.

    def _stir(self, *, everybody: bool = False) -> None:
        self._tell_routes(everybody=everybody)
        self._plan_wake()

    def _tell_routes(self, *, everybody: bool = False) -> None:
        urgent, bulk = self.queue.ticket
        for waiter in self._waiters:
            if everybody or urgent >= waiter.urgent or bulk >= waiter.bulk:
                waiter.wake()
        self._waiters = [waiter for waiter in self._waiters if not waiter.done.done()]

    def _plan_wake(self) -> None:
        """Let the committer know only where it must wake sooner than it means to."""
        if self._wakes_at is None or self._closing.is_set():
            return
        due = self.queue.due_ms()
        if due is not None and due < self._wakes_at:
            self._work.set()

    async def _commit_for_ever(self) -> None:
        """Write when something is due, and give up what the limits do not allow."""
        while not self._closing.is_set():
            try:
                await self._until_due()
                async with self._committing:
                    due = self.queue.due_ms()
                    if (due is not None and due <= self.queue.age_ms()) or self._trouble:
                        await self._commit_once()
                await self._retention.keep(self._closing.is_set)
                self._limit()
            except SpoolFault as fault:
                await self._recover(fault)

    async def _until_due(self) -> None:
        due = self.queue.due_ms()
        now = self.queue.age_ms()
        wait_ms = min(due - now if due is not None else 1e9, LOOK_EVERY_S * 1000)
        if self._trouble:
            wait_ms = min(wait_ms, RETRY_COMMIT_S * 1000)
        if wait_ms <= 0:
            return
        self._work.clear()
        self._wakes_at = now + wait_ms
        try:
            with contextlib.suppress(asyncio.TimeoutError):
                async with asyncio.timeout(wait_ms / 1000):
                    await self._work.wait()
        finally:
            self._wakes_at = None

    async def _commit(self) -> None:
        """Have what waits written, up to what one transaction takes. Raises SpoolFault."""
        async with self._committing:
            await self._commit_once()

    async def _commit_once(self) -> None:
        """One transaction: readings, and what belongs to them. Raises SpoolFault; nothing is lost by that."""
        commit = self.queue.plan()
        try:
            await self._card.run(self._card.write, commit)
        except SpoolFault:
            self.queue.failed(commit)
            raise
        self.queue.done(commit)
        self._limit()
        self._safe.fire()

    def _limit(self) -> None:
        trouble = ""
        if self._card.bytes > self._settings.max_bytes:
            trouble = f"full: {self._card.bytes} bytes stored of max_bytes = {self._settings.max_bytes}"
        elif self._card.free < self._settings.min_free_bytes:
            trouble = f"full: {self._card.free} bytes free on the disk, min_free_disk = {self._settings.min_free_bytes}"
        self._say(trouble)

    async def _recover(self, fault: SpoolFault) -> None:
        """A write failed, so it counts as not written: take nothing more, let go of the file, try again."""
        self._say(f"write failed: {fault}")
        why = str(fault) if isinstance(fault, SpoolBroken) else ""
        if not why:
            with contextlib.suppress(asyncio.TimeoutError):
                async with asyncio.timeout(RETRY_COMMIT_S):
                    await self._closing.wait()
            try:
                await self._card.run(self._card.log.reopen)
            except SpoolBroken as broken:
                why = str(broken)
            except SpoolFault:
                return
        if why:
            with contextlib.suppress(SpoolFault):
                await self._begin_again(why)

    async def _look(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Read the card; where its file is broken, begin it again and read what is left. Raises SpoolFault."""
        generation = self.queue.generation
        try:
            return await self._card.run(call, *args, **kwargs)
        except SpoolBroken as broken:
            async with self._committing:
                if generation == self.queue.generation:
                    await self._begin_again(str(broken))
            return await self._card.run(call, *args, **kwargs)

    async def _begin_again(self, why: str) -> None:
        self.queue.begin_again(await self._card.run(self._card.log.rebuild, why))
        self._stir()

    def _say(self, trouble: str) -> None:
        if trouble.split(":")[0] != self._trouble.split(":")[0]:
            if trouble:
                log.error("spool %s; nodes hold on to their readings until this is over", trouble)
            else:
                log.info("spool takes readings again")
        self._trouble = trouble


def _stretches(infos: Iterable[Info]) -> list[tuple[int, int]]:
    """[first, past) of batches that follow one another; what is between two stretches is not kept any more."""
    found: list[tuple[int, int]] = []
    for info in infos:
        if found and found[-1][1] == info.first:
            found[-1] = (found[-1][0], info.past)
        else:
            found.append((info.first, info.past))
    return found


def _is_meant(reading: Reading, span: Span) -> bool:
    """Whether a replay asks for this reading."""
    node = reading.event.node if reading.event is not None else reading.node
    return (
        (not span.node or node == span.node)
        and reading.time_ms >= span.since_ms
        and (not span.until_ms or reading.time_ms <= span.until_ms)
    )
