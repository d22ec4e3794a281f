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
from fieldpost.reading import Channel, Manifest, Reading
from fieldpost.spool import Spool, SpoolSettings
from fieldpost.uplinks.base import Message
from fieldpost.uplinks.memory import MemoryUplink
from parts import until_async

MANIFEST = Manifest("00112233", (Channel("temperature", "Cel", 100, "sim", "gauge"),), 1000)


def reading(seq: int) -> Reading:
    return Reading("n1", "a1b2c3d4e5f6", 1, seq, seq * 1000, 1_763_900_000_000 + seq, 50, "00112233", (2150,))


@contextlib.asynccontextmanager
async def carrying(
    folder: Path, uplink: MemoryUplink, batch: int = 10, window: int = 4
) -> AsyncIterator[tuple[Spool, Route]]:
    async with Spool(SpoolSettings(folder, linger_s=0.01, min_free_bytes=0), ["all"]) as spool:
        spool.keep_manifest(MANIFEST)
        route = Route(RouteConfig("all", "memory", batch, window), spool, uplink, spool.manifests)
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
        await until_async(lambda: spool.cursor("all") == 6, "all are confirmed")
    assert [message.readings for message in uplink.delivered] == [1, 5]


async def test_a_backlog_goes_in_whole_batches_with_a_window_and_in_order(tmp_path: Path) -> None:
    uplink = MemoryUplink()
    uplink.silent = True
    async with carrying(tmp_path, uplink) as (spool, route):
        spool.append([reading(seq) for seq in range(95)])
        await until_async(lambda: len(uplink.delivered) == 4, "the window is full")
        assert spool.cursor("all") == 0
        assert route.status().in_flight == 4
        uplink.release()
        await until_async(lambda: spool.cursor("all") == 95, "all are confirmed")
    assert seqs(uplink.delivered) == list(range(95))


async def test_only_a_confirmation_moves_the_cursor_and_what_was_not_confirmed_comes_again(tmp_path: Path) -> None:
    uplink = MemoryUplink()
    uplink.silent = True
    async with carrying(tmp_path, uplink) as (spool, route):
        spool.append([reading(seq) for seq in range(25)])
        await until_async(lambda: len(uplink.delivered) >= 2, "some are on their way")
        uplink.unreachable = "the line is cut"
        await until_async(lambda: route.status().in_flight == 0, "nothing is on its way")
        assert spool.cursor("all") == 0
        first_try = len(uplink.delivered)
        uplink.silent, uplink.unreachable = False, ""
        await until_async(lambda: spool.cursor("all") == 25, "all are confirmed")
    assert seqs(uplink.delivered[first_try:]) == list(range(25))
    assert [m.id for m in uplink.delivered[:first_try]] == [m.id for m in uplink.delivered[first_try:][:first_try]]


@pytest.mark.parametrize("bad", [{0}, {7}, {24}, {3, 4, 17}])
async def test_a_poison_reading_is_set_aside_alone_with_the_far_sides_reason(tmp_path: Path, bad: set[int]) -> None:
    uplink = MemoryUplink()
    uplink.reject = lambda message: "too hot" if bad & set(seqs([message])) else None
    async with carrying(tmp_path, uplink) as (spool, route):
        spool.append([reading(seq) for seq in range(25)])
        await until_async(lambda: spool.cursor("all") >= 25 + len(bad), "all but the bad ones are confirmed")
        assert route.status().set_aside == len(bad)
        await spool.durable(spool.head)
        given_up = {(event.first, event.why) for _, event in await spool.ledger(9)}
    assert given_up == {(seq, "set aside: all: too hot") for seq in bad}
    assert seqs(uplink.delivered) == [seq for seq in range(25) if seq not in bad]


async def test_waits_between_attempts_grow_to_a_bound() -> None:
    pause = Pause(0.5, 8.0)
    waits = [pause.longer() for _ in range(8)]
    assert all(0.375 * 2**n <= wait <= 0.5 * 2**n for n, wait in enumerate(waits[:5]))
    assert all(6.0 <= wait <= 8.0 for wait in waits[4:])
    pause.reset()
    assert pause.longer() <= 0.5
