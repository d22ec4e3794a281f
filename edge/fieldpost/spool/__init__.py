"""The spool: the gateway's durable queue. DESIGN.md beside this file says what it promises and why it is so.

`append` takes readings into the stage, `durable` tells how far they are on the card, `next` reads for a route
and removes nothing, `advance` moves a route's cursor after the far side has confirmed. SQLite runs in one named
thread; everything else happens in the event loop, in plain memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from ..errors import SpoolFault
from ..reading import GATEWAY, Event, Manifest, Reading
from .log import Commit, Damage, Log
from .marks import Key, Marks
from .stage import Stage

log = logging.getLogger(__name__)

T = TypeVar("T")

COMMIT_LIMIT = 50_000
"""Readings of one commit: bounds the memory and the time that a transaction takes."""

SAVE_CURSORS_EVERY_S = 30.0
"""While nothing is committed, how old a cursor on the card may be; after a crash so much is sent again."""

SAVE_CURSORS_EVERY = 20_000
"""The same in readings, for a fast drain."""

RETRY_COMMIT_S = 2.0

HURRIED_LINGER_S = 0.01
"""What a node that waits for its ack does not notice, and a busy gateway gathers hundreds of readings in."""

MEASURE_EVERY_S = 0.5
"""How old the figures may be by which the spool is full."""


@dataclass(frozen=True, slots=True)
class SpoolSettings:
    """`linger_s`: how long a reading may wait for others before they are written. `stage_readings`: how many may
    be in memory only. `max_bytes` of file and `min_free_bytes` of disk: beyond either nothing more is taken."""

    folder: Path
    linger_s: float = 1.0
    stage_readings: int = 20_000
    max_bytes: int = 2_000_000_000
    min_free_bytes: int = 200_000_000


@dataclass(frozen=True, slots=True)
class Batch:
    """Readings for one route, at positions [first, past). `readings` is empty where all were damaged."""

    first: int
    past: int
    readings: tuple[Reading, ...]


@dataclass(frozen=True, slots=True)
class SpoolStatus:
    """`state` is `ok`, `full` (of bytes or of readings in memory) or `failing` (the card did not keep a write)."""

    state: str
    detail: str
    generation: str
    boot: int
    head: int
    committed: int
    oldest: int
    bytes: int
    free_bytes: int
    commits: int
    repeats: int
    set_aside: int
    ledger: dict[str, int]
    backlog: dict[str, int]
    oldest_ms: dict[str, int | None]


class Signal:
    """Wakes everybody who waits; nobody who waits later."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def fire(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        await self._event.wait()


class Spool:
    """The durable queue; an async context manager.

    ```python
    async with Spool(settings, routes=["all"]) as spool:
        past = spool.append([reading])
        await spool.durable(past)                    # it is on the card
        batch = await spool.next("all", 0, 100)      # reads, never removes
        spool.advance("all", batch.past)             # confirmed: never read again by this route
    ```
    """

    def __init__(self, settings: SpoolSettings, routes: Iterable[str]) -> None:
        self._settings = settings
        self._routes = tuple(routes)
        self._log = Log(settings.folder)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spool")
        self._marks = Marks()
        self._manifests: dict[str, Manifest] = {}
        self._cursors: dict[str, int] = {}
        self._saved_cursors: dict[str, int] = {}
        self._event_seq = 0
        self._repeats = 0
        self._commits = 0
        self._ledger: list[tuple[int, Event]] = []
        self._new_manifests: list[Manifest] = []
        self._set_aside: list[tuple[int, str, str, Reading]] = []
        self._counts: dict[str, int] = {}
        self._set_aside_count = 0
        self._trouble = ""
        self._bytes = 0
        self._free = 0
        self._measured_at = 0.0
        self._hurry = False
        self._news = Signal()
        self._durable = Signal()
        self._work = asyncio.Event()
        self._closing = asyncio.Event()

    async def __aenter__(self) -> Self:
        """Open the file and start committing. Raises SpoolFault where the folder can't be used."""
        opened = await self._in_thread(self._log.open)
        self.generation, self.boot = opened.generation, opened.boot
        self._oldest = opened.oldest
        self._stage = Stage(opened.head, recent=self._settings.stage_readings)
        for key, upto, beyond in opened.marks:
            self._marks.load(key, upto, beyond)
        self._manifests = {manifest.hash: manifest for manifest in opened.manifests}
        self._cursors = {route: opened.cursors.get(route, opened.oldest) for route in self._routes}
        self._saved_cursors = dict(opened.cursors)
        await self._in_thread(self._measure)
        if opened.aside:
            self.report(Event("gap", GATEWAY, self.generation, 0, 0, None, f"damaged: {opened.aside.name}"))
        self._committer = asyncio.create_task(self._commit_for_ever(), name="spool commit")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._work.set()
        await self._committer  # never cancelled: a commit on its way must be known to have been made or not
        with contextlib.suppress(SpoolFault):
            while self._stage.waiting or self._unsaved_cursors():
                await self._commit()
        await self._in_thread(self._log.close)
        self._thread.shutdown()

    # What comes in.

    @property
    def stage_readings(self) -> int:
        """How many readings may be in memory only."""
        return self._settings.stage_readings

    @property
    def room(self) -> int:
        """How many readings may be appended now; 0 while the spool is full or the card fails."""
        if self._trouble:
            return 0
        return max(0, self._settings.stage_readings - self._stage.waiting)

    def append(self, readings: Sequence[Reading]) -> int:
        """Take readings that are new by identity; returns the position behind them, to wait for in `durable`.

        Nothing is on the card yet. What was taken before is left out and counted as a repeat.
        """
        for reading in readings:
            if self._marks.take((reading.node, reading.install, reading.boot), reading.seq, reading.seq):
                self._stage.put(reading)
            else:
                self._repeats += 1
        self._stir()
        return self._stage.head

    def mark(self, key: Key, first: int, last: int) -> list[tuple[int, int]]:
        """Rows `first..last` of a boot need not come any more; returns those that had not come before."""
        return self._marks.take(key, first, last)

    def upto(self, key: Key) -> int:
        """Every row of this boot up to here was appended or marked; -1 where none was."""
        return self._marks.upto(key)

    def boots(self, node: str) -> list[Key]:
        """The boots known of a node, oldest first."""
        return self._marks.boots(node)

    def known(self) -> list[tuple[Key, int]]:
        """Every boot that is known, with its `upto`."""
        return self._marks.known()

    def report(self, event: Event) -> None:
        """Say something upstream as a record of the gateway's own; a gap goes into the ledger as well."""
        now_ms = time.time_ns() // 1_000_000
        if event.kind == "gap":
            self._ledger.append((now_ms, event))
            word = event.why.split(":")[0]
            self._counts[word] = self._counts.get(word, 0) + 1
        uptime_ms = time.monotonic_ns() // 1_000_000
        record = Reading(GATEWAY, self.generation, self.boot, self._event_seq, uptime_ms, now_ms, 0, "", (), event)
        self._event_seq += 1
        self._stage.put(record)
        self._stir()

    def keep_manifest(self, manifest: Manifest) -> None:
        """Remember what a hash means, before any reading that names it is appended."""
        if manifest.hash not in self._manifests:
            self._manifests[manifest.hash] = manifest
            self._new_manifests.append(manifest)

    @property
    def manifests(self) -> Mapping[str, Manifest]:
        """What the hashes that readings name mean."""
        return self._manifests

    def manifest(self, hash_: str) -> Manifest | None:
        return self._manifests.get(hash_)

    def hurry(self) -> None:
        """Somebody waits for the commit: don't linger."""
        self._hurry = True
        self._work.set()

    async def durable(self, position: int) -> int:
        """Wait until everything before `position` is on the card; returns how far the card is."""
        while self._stage.committed < position:
            await self._durable.wait()
        return self._stage.committed

    @property
    def committed(self) -> int:
        """Everything before this position is on the card."""
        return self._stage.committed

    # What goes out.

    def cursor(self, route: str) -> int:
        """Everything before this position was confirmed to `route`."""
        return self._cursors[route]

    @property
    def head(self) -> int:
        return self._stage.head

    async def wait_for(self, position: int) -> None:
        """Wait until there is a reading at `position`."""
        while self._stage.head <= position:
            await self._news.wait()

    async def next(self, position: int, limit: int) -> Batch:
        """The readings from `position` on, at least one position and at most `limit`; waits for the first.

        Reads, never removes. Damage on the way is set aside, put into the ledger and stepped over.
        """
        await self.wait_for(position)
        if position >= self._stage.first:
            readings = self._stage.read(position, limit)
            return Batch(position, position + len(readings), tuple(readings))
        found, past, damage = await self._in_thread(lambda: self._log.read(position, limit))
        for spot in damage:
            self._report_damage(spot)
        if not found:  # all that there was is damaged, or was moved aside before
            return Batch(position, max(past, self._stage.first) if not damage else past, ())
        cut = found[:limit]
        return Batch(position, past - len(found) + len(cut), tuple(cut))

    def advance(self, route: str, position: int) -> None:
        """The far side has confirmed everything before `position`."""
        if position > self._cursors[route]:
            self._cursors[route] = position
            self._stage.forget(self._slowest())
            if position - self._saved_cursors.get(route, 0) >= SAVE_CURSORS_EVERY:
                self._work.set()

    def set_aside(self, route: str, reading: Reading, reason: str) -> None:
        """`route`'s far side refused this reading for good: keep it to be looked at, and say so upstream."""
        self._set_aside.append((time.time_ns() // 1_000_000, route, reason, reading))
        self._set_aside_count += 1
        if reading.event is None:  # never a gap record about a refused gap record: that would not end
            why = f"set aside: {route}: {reason}"[:200]
            self.report(Event("gap", reading.node, reading.install, reading.boot, reading.seq, reading.seq, why))
        else:
            self._stir()

    # How it is.

    async def status(self) -> SpoolStatus:
        backlog = {route: self._stage.head - cursor for route, cursor in self._cursors.items()}
        oldest = {route: await self._taken_ms(cursor) for route, cursor in self._cursors.items()}
        return SpoolStatus(
            state=self.state,
            detail=self._trouble,
            generation=self.generation,
            boot=self.boot,
            head=self._stage.head,
            committed=self._stage.committed,
            oldest=min([self._stage.head, *self._cursors.values()]),
            bytes=self._bytes,
            free_bytes=self._free,
            commits=self._commits,
            repeats=self._repeats,
            set_aside=self._set_aside_count,
            ledger=dict(self._counts),
            backlog=backlog,
            oldest_ms=oldest,
        )

    @property
    def state(self) -> str:
        if self._trouble:
            return "full" if self._trouble.startswith("full") else "failing"
        return "ok" if self.room else "full"

    async def ledger(self, limit: int) -> list[tuple[int, Event]]:
        """The newest entries that are on the card, newest first."""
        return await self._in_thread(lambda: self._log.ledger(limit))

    async def _taken_ms(self, position: int) -> int | None:
        if position >= self._stage.head:
            return None
        readings = (await self.next(position, 1)).readings
        return readings[0].time_ms if readings else None

    # Writing.

    def _stir(self) -> None:
        self._news.fire()
        self._work.set()

    async def _commit_for_ever(self) -> None:
        """Write the stage when the linger has run out, when it is half full, and when somebody waits."""
        while not self._closing.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                async with asyncio.timeout(SAVE_CURSORS_EVERY_S):
                    await self._work.wait()
            self._work.clear()
            if self._stage.waiting:
                await self._linger()
            try:
                # What came in while the last commit was written goes next at once only if somebody waits for it.
                while self._stage.waiting or self._unsaved_cursors() or self._trouble:
                    await self._commit()
                    if self._closing.is_set() or not self._large():
                        break
                if self._stage.waiting:
                    self._work.set()
            except SpoolFault as fault:
                await self._recover(fault)

    def _large(self) -> bool:
        """So much has gathered, or it is so late, that waiting for more gains nothing."""
        large = min(COMMIT_LIMIT, self._settings.stage_readings) // 2
        return self._closing.is_set() or self._stage.waiting >= large

    async def _linger(self) -> None:
        """Wait for more to write in one go: for the linger, or only for a moment once somebody waits."""
        deadline = time.monotonic() + self._settings.linger_s
        while not self._large():
            if self._hurry:
                deadline = min(deadline, time.monotonic() + HURRIED_LINGER_S)
            if (left := deadline - time.monotonic()) <= 0:
                return
            self._work.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                async with asyncio.timeout(left):
                    await self._work.wait()

    async def _commit(self) -> None:
        """One transaction: readings, and what belongs to them. Raises SpoolFault; nothing is lost by that."""
        self._hurry = False
        first = self._stage.committed
        readings = self._stage.uncommitted(COMMIT_LIMIT)
        past = first + len(readings)
        # Marks may run ahead of the readings of this commit only if the rest of the stage goes with them.
        whole = past == self._stage.head
        changes = self._marks.changes() if whole else ([], [])
        ledger, manifests, aside = self._ledger, self._new_manifests, self._set_aside
        self._ledger, self._new_manifests, self._set_aside = [], [], []
        # A cursor on the card never passes what is on the card: positions are given again after a crash.
        cursors = {route: min(cursor, past) for route, cursor in self._cursors.items()}
        work = Commit(
            first=first,
            readings=readings,
            marks=changes[0],
            forgotten=changes[1],
            cursors={route: c for route, c in cursors.items() if self._saved_cursors.get(route) != c},
            ledger=ledger,
            manifests=manifests,
            set_aside=aside,
            prune_to=min(cursors.values(), default=0),
        )
        try:
            await self._in_thread(lambda: self._write(work))
        except SpoolFault:
            self._marks.put_back(changes)
            self._ledger = ledger + self._ledger
            self._new_manifests = manifests + self._new_manifests
            self._set_aside = aside + self._set_aside
            raise
        self._saved_cursors.update(cursors)
        self._commits += 1
        self._stage.commit(past)
        self._stage.forget(self._slowest())
        self._limit()
        self._durable.fire()

    def _write(self, work: Commit) -> None:
        self._log.commit(work)
        if self._commits % 16 == 0:
            self._log.shrink()
        if time.monotonic() - self._measured_at >= MEASURE_EVERY_S:
            self._measure()

    def _measure(self) -> None:
        self._measured_at = time.monotonic()
        try:
            self._bytes = self._log.used_bytes()
            disk = os.statvfs(self._settings.folder)
            self._free = disk.f_bavail * disk.f_frsize
        except OSError as error:
            raise SpoolFault(str(error)) from error

    def _limit(self) -> None:
        trouble = ""
        if self._bytes > self._settings.max_bytes:
            trouble = f"full: {self._bytes} bytes stored of max_bytes = {self._settings.max_bytes}"
        elif self._free < self._settings.min_free_bytes:
            trouble = f"full: {self._free} bytes free on the disk, min_free_bytes = {self._settings.min_free_bytes}"
        self._say(trouble)

    async def _recover(self, fault: SpoolFault) -> None:
        """A write failed, so it counts as not written: take nothing more, let go of the file, try again."""
        self._say(f"write failed: {fault}")
        with contextlib.suppress(asyncio.TimeoutError):
            async with asyncio.timeout(RETRY_COMMIT_S):
                await self._closing.wait()
        with contextlib.suppress(SpoolFault):
            await self._in_thread(self._log.reopen)
        self._work.set()

    def _say(self, trouble: str) -> None:
        if trouble.split(":")[0] != self._trouble.split(":")[0]:
            if trouble:
                log.error("spool %s; nodes hold on to their readings until this is over", trouble)
            else:
                log.info("spool takes readings again")
        self._trouble = trouble

    def _unsaved_cursors(self) -> bool:
        return any(
            self._saved_cursors.get(route) != min(cursor, self._stage.committed)
            for route, cursor in self._cursors.items()
        )

    def _slowest(self) -> int:
        return min(self._cursors.values(), default=self._stage.committed)

    def _report_damage(self, spot: Damage) -> None:
        self.report(Event("gap", GATEWAY, self.generation, self.boot, spot.first, spot.past - 1, "damaged"))

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)
