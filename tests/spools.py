"""Spools for tests: readings, a clock in the hand, and what a route gets when it takes all that there is."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fieldpost.reading import Channel, Manifest, Reading
from fieldpost.spool import Batch, LaneName, Limits, RouteTerms, Spool, SpoolSettings, Terms

INSTALL = "a1b2c3d4e5f6"
KEY = ("n1", INSTALL, 1)
T0 = 1_763_900_000_000
MANIFEST = Manifest("00112233", (Channel("temperature", "Cel", 100, "sim", "gauge"),), 1000)


@dataclass
class HandClock:
    """A clock that a test sets: CLOCK_BOOTTIME and CLOCK_REALTIME in ms, and whether the latter is right."""

    boottime: int = 100_000
    unix: int = T0
    synced: bool = True
    machine: str = "machine-boot-1"

    def boottime_ms(self) -> int:
        return self.boottime

    def unix_ms(self) -> int:
        return self.unix

    def synchronised(self) -> bool:
        return self.synced

    def kernel_boot(self) -> str:
        return self.machine

    def pass_ms(self, ms: int) -> None:
        """Time goes by."""
        self.boottime += ms
        self.unix += ms


def reading(seq: int, boot: int = 1, node: str = "n1", **more: Any) -> Reading:
    values, every_ms = more.pop("values", (2150 + seq % 7,)), more.pop("every_ms", 1000)
    at = seq * every_ms
    return Reading(node, INSTALL, boot, seq, at, T0 + at, 50, MANIFEST.hash, values, **more)


def readings(first: int, past: int, **more: Any) -> list[Reading]:
    return [reading(seq, **more) for seq in range(first, past)]


def spool_in(
    folder: Path, *routes: str | RouteTerms, clock: HandClock | None = None, max_bytes: int = 10**9, **terms: Any
) -> Spool:
    """A spool that writes when it is hurried, or when its clock (the system's, or one in the hand) says so."""
    settings = SpoolSettings(
        folder,
        replace(Terms(linger_ms=20, event_linger_ms=20, stage_readings=1000), **terms),
        max_bytes=max_bytes,
        min_free_bytes=0,
        trust_card=True,
    )
    wanted = routes or ("r",)
    return Spool(settings, [RouteTerms(r) if isinstance(r, str) else r for r in wanted], clock)


async def quiet(spool: Spool) -> None:
    """Let the spool do whatever is due by its clock."""
    for _ in range(4):
        spool._work.set()
        for _ in range(4):
            await asyncio.sleep(0)
        await spool._card.run(lambda: None)


async def crash(spool: Spool) -> None:
    """End it as a power cut does: nothing more is written."""
    spool._committer.cancel()
    await asyncio.gather(spool._committer, return_exceptions=True)
    await spool._card.close()


async def batches(spool: Spool, route: str, limit: int = 97) -> list[Batch]:
    """Everything that a route can take now: urgent, live, then history. Nothing of it is confirmed."""
    taken: list[Batch] = []
    for kind in ("urgent", "live", "backfill"):
        while True:
            at = LaneName.URGENT if kind == "urgent" else LaneName.BULK
            before = (spool.unsent(route), spool.queue.progress[route, at].oldest())
            batch = await spool.take(route, kind, limit)  # type: ignore[arg-type]
            if batch is not None:
                taken.append(batch)
            elif before == (spool.unsent(route), spool.queue.progress[route, at].oldest()):
                break
    return taken


async def taken(spool: Spool, route: str = "r") -> list[Reading]:
    """All readings that a route can take now, without confirming them."""
    found = [one for batch in await batches(spool, route) for one in batch.readings]
    for name in LaneName:
        spool.queue.progress[route, name].let_go()
    return found


async def confirm_all(spool: Spool, route: str = "r") -> list[Reading]:
    """Take everything and confirm it."""
    found = []
    for batch in await batches(spool, route):
        found += batch.readings
        spool.confirm(route, batch)
    return found


def own(readings: list[Reading]) -> list[int]:
    """The seqs of the nodes' readings among them."""
    return [one.seq for one in readings if one.event is None]


def limits(bulk: Limits | None = None, urgent: Limits | None = None) -> dict[LaneName, Limits]:
    return {LaneName.BULK: bulk or Limits(), LaneName.URGENT: urgent or Limits()}
