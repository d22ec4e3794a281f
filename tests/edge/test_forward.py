"""Spool -> uplink -> confirmed -> cursor, on a real spool and the memory uplink with its faults."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fieldpost.config import RouteConfig
from fieldpost.forms import senml
from fieldpost.forward import Pause, Route
from fieldpost.spool import RouteTerms, Spool
from fieldpost.uplinks.base import Message
from fieldpost.uplinks.memory import MemoryUplink
from parts import until_async
from spools import MANIFEST, reading, readings, spool_in


@contextlib.asynccontextmanager
async def carrying(
    folder: Path, uplink: MemoryUplink, batch: int = 10, window: int = 4, stored: int = 0, **paces: float
) -> AsyncIterator[tuple[Spool, Route]]:
    async with spool_in(folder, RouteTerms("all", batch)) as spool:
        spool.keep_manifest(MANIFEST)
        if stored:
            await spool.until_safe(spool.append(readings(0, stored)))
        route = Route(RouteConfig("all", "memory", batch, window, **paces), spool, uplink, spool.manifests)
        route._pause = Pause(0.01, 0.05)
        carrier = asyncio.create_task(route.run())
        try:
            yield spool, route
        finally:
            carrier.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await carrier


def seqs(messages: list[Message]) -> list[int]:
    return [row.seq for message in messages for row in senml.decode(message.body) if row.node == "n1"]


async def test_an_idle_uplink_gets_a_reading_at_once_a_busy_one_what_has_gathered(tmp_path: Path) -> None:
    uplink = MemoryUplink()
    async with carrying(tmp_path, uplink) as (spool, _):
        uplink.silent = True
        spool.append([reading(0)])
        await until_async(lambda: len(uplink.delivered) == 1, "the first reading is on its way alone")
        for seq in range(1, 6):
            spool.append([reading(seq)])
            await asyncio.sleep(0)
        assert len(uplink.delivered) == 1
        uplink.release()
        await until_async(lambda: spool.backlog("all") == 0, "all are confirmed")
    assert [message.readings for message in uplink.delivered] == [1, 5]


async def test_a_backlog_goes_in_whole_batches_with_a_window_and_in_order(tmp_path: Path) -> None:
    uplink = MemoryUplink()
    uplink.silent = True
    async with carrying(tmp_path, uplink) as (spool, route):
        await until_async(lambda: uplink.opened, "the uplink is there")
        spool.append(readings(0, 95))
        await until_async(lambda: len(uplink.delivered) == 4, "the window is full")
        assert spool.backlog("all") > 20
        assert route.status().in_flight == 4
        uplink.release()
        await until_async(lambda: spool.backlog("all") == 0, "all are confirmed")
    assert seqs(uplink.delivered) == list(range(95))


async def test_only_a_confirmation_moves_the_cursor_and_what_was_not_confirmed_comes_again(tmp_path: Path) -> None:
    uplink = MemoryUplink()
    uplink.silent = True
    async with carrying(tmp_path, uplink) as (spool, route):
        spool.append(readings(0, 25))
        await until_async(lambda: len(uplink.delivered) >= 2, "some are on their way")
        uplink.unreachable = "the line is cut"
        await until_async(lambda: route.status().in_flight == 0, "nothing is on its way")
        assert spool.backlog("all") > 20
        first_try = len(uplink.delivered)
        uplink.silent, uplink.unreachable = False, ""
        await until_async(lambda: spool.backlog("all") == 0, "all are confirmed")
    assert sorted(seqs(uplink.delivered[first_try:])) == list(range(25))
    assert {m.id for m in uplink.delivered[:first_try]} <= {m.id for m in uplink.delivered[first_try:]}


@pytest.mark.parametrize("bad", [{0}, {7}, {24}, {3, 4, 17}])
async def test_a_poison_reading_is_set_aside_alone_with_the_far_sides_reason(tmp_path: Path, bad: set[int]) -> None:
    uplink = MemoryUplink()
    uplink.reject = lambda message: "too hot" if bad & set(seqs([message])) else None
    async with carrying(tmp_path, uplink) as (spool, route):
        spool.append(readings(0, 25))
        await until_async(lambda: spool.backlog("all") == 0, "all but the bad ones are confirmed")
        assert route.status().set_aside == len(bad)
        await spool._commit()
        given_up = {(event.first, event.why) for _, event in await spool.ledger(9)}
    assert given_up == {(seq, "set aside: all: too hot") for seq in bad}
    assert sorted(seqs(uplink.delivered)) == [seq for seq in range(25) if seq not in bad]


async def test_history_is_marked_and_follows_what_is_fresh(tmp_path: Path) -> None:
    uplink = MemoryUplink()
    uplink.silent = True
    async with carrying(tmp_path, uplink, stored=100) as (spool, _):
        await until_async(lambda: len(uplink.delivered) == 3, "all of the window but its last place is history")
        spool.append([reading(100)])
        await until_async(lambda: len(uplink.delivered) == 4, "the last place is for what is fresh")
        uplink.release()
        await until_async(lambda: spool.backlog("all") == 0, "all are confirmed")
    rows = [row for message in uplink.delivered for row in senml.decode(message.body)]
    assert {row.lane for row in rows if row.seq < 100} == {"backfill"}
    assert [row.lane for row in rows if row.seq == 100] == [""]
    assert [row.seq for row in rows if row.lane] == list(range(100))


async def test_history_goes_at_the_pace_that_is_set(tmp_path: Path) -> None:
    uplink = MemoryUplink()
    async with carrying(tmp_path, uplink, stored=100, backfill_readings_per_s=20.0) as (spool, _):
        await until_async(lambda: len(uplink.delivered) == 1, "the first batch goes at once")
        await asyncio.sleep(0.2)
        assert len(uplink.delivered) == 1  # ten readings at twenty a second: the next is half a second away
        spool.append([reading(100)])
        await until_async(lambda: len(uplink.delivered) == 2, "what is fresh does not wait for it")
        assert seqs(uplink.delivered[1:]) == [100]
        await until_async(lambda: len(uplink.delivered) == 3, "and history goes on")


async def test_a_route_that_gathers_waits_for_a_whole_batch_or_its_time_but_not_with_urgent_ones(
    tmp_path: Path,
) -> None:
    uplink = MemoryUplink()
    async with carrying(tmp_path, uplink, gather_s=0.4) as (spool, _):
        await until_async(lambda: uplink.opened, "the uplink is there")
        spool.append(readings(0, 4), urgent={2})
        await until_async(lambda: uplink.delivered, "the urgent one")
        assert seqs(uplink.delivered) == [2]
        spool.append(readings(4, 5))
        await until_async(lambda: len(uplink.delivered) == 2, "what has gathered in its time")
        assert seqs(uplink.delivered[1:]) == [0, 1, 3, 4]
        spool.append(readings(5, 15))
        spool.append([reading(15)])
        await until_async(lambda: len(uplink.delivered) == 3, "a whole batch goes at once")
        assert seqs(uplink.delivered[2:]) == list(range(5, 15))
        await until_async(lambda: len(uplink.delivered) == 4, "and the rest in its time")


async def test_one_dead_uplink_never_slows_another(tmp_path: Path) -> None:
    dead, alive = MemoryUplink(), MemoryUplink()
    dead.unreachable = "no line"
    async with spool_in(tmp_path, "dead", "alive") as spool:
        spool.keep_manifest(MANIFEST)
        routes = [
            Route(RouteConfig(name, name, 10, 4), spool, uplink, spool.manifests)
            for name, uplink in (("dead", dead), ("alive", alive))
        ]
        carriers = [asyncio.create_task(route.run()) for route in routes]
        spool.append(readings(0, 50))
        await until_async(lambda: spool.backlog("alive") == 0, "the one that is there has all")
        assert spool.backlog("dead") == 50
        for carrier in carriers:
            carrier.cancel()
        await asyncio.gather(*carriers, return_exceptions=True)


async def test_urgent_readings_go_first(tmp_path: Path) -> None:
    uplink = MemoryUplink()
    uplink.silent = True
    async with carrying(tmp_path, uplink, window=1) as (spool, _):
        spool.append([reading(0)])
        await until_async(lambda: len(uplink.delivered) == 1, "the window is full")
        spool.append(readings(1, 30), urgent={17})
        await until_async(lambda: len(uplink.delivered) == 2, "the urgent one goes beyond it")
        uplink.release()
        await until_async(lambda: spool.backlog("all") == 0, "all are confirmed")
    assert seqs(uplink.delivered)[:3] == [0, 17, 1]


async def test_waits_between_attempts_grow_to_a_bound() -> None:
    pause = Pause(0.5, 8.0)
    waits = [pause.longer() for _ in range(8)]
    assert all(0.375 * 2**n <= wait <= 0.5 * 2**n for n, wait in enumerate(waits[:5]))
    assert all(6.0 <= wait <= 8.0 for wait in waits[4:])
    pause.reset()
    assert pause.longer() <= 0.5
