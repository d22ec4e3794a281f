"""What other queues got wrong, as tests of ours: each fails when its bug is put in (tests/mutations/ does so)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import fieldpost
import msgspec
import pytest
from faults.recording import Call, read_trace, recorder
from fieldpost.config import Config, parse
from fieldpost.errors import SpoolFault, Unreachable
from fieldpost.forward import Pause, Route
from fieldpost.gateway import route_terms, spool_settings
from fieldpost.ingest import Ingest
from fieldpost.mqtt import Incoming
from fieldpost.nodes.presence import Presence
from fieldpost.nodes.time import Dating
from fieldpost.reading import Event, Quality, Reading
from fieldpost.spool import LaneName, RouteTerms, Spool
from fieldpost.uplinks.base import Message
from fieldpost.uplinks.memory import MemoryUplink
from fieldpost.uplinks.mqtt import MqttSettings, MqttUplink
from parts import HASH, until_async
from parts import MANIFEST as MANIFEST_JSON
from spools import (
    INSTALL,
    KEY,
    MANIFEST,
    HandClock,
    batches,
    confirm_all,
    crash,
    own,
    quiet,
    reading,
    readings,
    spool_in,
    taken,
)

HOUR_MS = 3_600_000


def incompressible(first: int, past: int) -> list[Reading]:
    """Readings that take their room on the card."""
    return [reading(seq, values=(zlib.crc32(str(seq).encode()),)) for seq in range(first, past)]


# What is acknowledged.


class FakeConnection:
    """A connection to a broker that keeps what is said on it."""

    def __init__(self) -> None:
        self.acknowledged: list[int] = []
        self.acks: list[list[Any]] = []

    def acknowledge(self, mid: int) -> None:
        self.acknowledged.append(mid)

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        self.acks.append(json.loads(payload))


def rows(mid: int, first: int, count: int, held: int = 0) -> Incoming:
    """A message of node n1 with rows first..first+count-1."""
    content = [1, INSTALL, 1, first, 10_000, None, held, [], HASH, [[0, 2000 + n, 450] for n in range(count)]]
    return Incoming("fp1/n1/data", json.dumps(content).encode(), mid, False, False)


class Intake:
    """Ingest on a spool whose clock stands still, so that it writes only when it is told to."""

    def __init__(self, folder: Path, **terms: Any) -> None:
        self.clock = HandClock()
        self.spool = spool_in(folder, clock=self.clock, linger_ms=1000, **terms)

    async def __aenter__(self) -> Intake:
        await self.spool.__aenter__()
        self.ingest = Ingest(self.spool, Presence(), Dating())
        self.control = FakeConnection()
        self.ingest.take(FakeConnection(), Incoming("fp1/n1/manifest", MANIFEST_JSON, 0, True, False))  # type: ignore[arg-type]
        self.acknowledging = asyncio.create_task(self.ingest.acknowledge(self.control))  # type: ignore[arg-type]
        return self

    async def __aexit__(self, *why: object) -> None:
        self.acknowledging.cancel()
        await asyncio.gather(self.acknowledging, return_exceptions=True)
        await self.spool.__aexit__(None, None, None)

    def take(self, connection: FakeConnection, message: Incoming) -> None:
        self.ingest.take(connection, message)  # type: ignore[arg-type]

    async def write(self) -> None:
        self.clock.pass_ms(1000)
        await quiet(self.spool)


async def test_only_messages_whose_readings_are_safe_are_acknowledged(tmp_path: Path) -> None:
    async with Intake(tmp_path) as intake:
        connection = FakeConnection()
        intake.take(connection, rows(1, 0, 5))
        async with intake.spool._committing:
            await intake.spool._commit_once()
            intake.take(connection, rows(2, 5, 5))  # comes between the commit and its acknowledgement
        await quiet(intake.spool)
        assert (connection.acknowledged, intake.control.acks) == ([1], [[INSTALL, 1, 4]])
        await intake.write()
        assert (connection.acknowledged, intake.control.acks[1:]) == ([1, 2], [[INSTALL, 1, 9]])


async def test_a_new_connection_acknowledges_nothing_that_came_on_an_old_one(tmp_path: Path) -> None:
    # Both messages have the number 1, each on its connection; only the older one is safe.
    async with Intake(tmp_path) as intake:
        old, new = FakeConnection(), FakeConnection()
        intake.take(old, rows(1, 0, 5))
        intake.ingest.forget_pending()
        async with intake.spool._committing:
            await intake.spool._commit_once()
            intake.take(new, rows(1, 5, 5))
        await quiet(intake.spool)
        assert (old.acknowledged, new.acknowledged) == ([], [])
        await intake.write()
        assert (old.acknowledged, new.acknowledged) == ([], [1])


async def test_what_found_no_room_is_not_acknowledged_and_is_taken_when_it_comes_again(tmp_path: Path) -> None:
    async with Intake(tmp_path, stage_readings=20) as intake:
        connection = FakeConnection()
        async with intake.spool._committing:
            for mid, first in enumerate(range(0, 30, 5), 1):
                intake.take(connection, rows(mid, first, 5))
            assert intake.spool.queue.waiting == 20
            assert intake.spool.upto(KEY) == 19
        await intake.write()
        assert intake.control.acks[-1] == [INSTALL, 1, 19]
        intake.take(connection, rows(7, 20, 10, held=20))
        await intake.write()
        assert intake.control.acks[-1] == [INSTALL, 1, 29]
        assert own(await taken(intake.spool)) == list(range(30))


async def test_below_the_floor_of_free_disk_nothing_more_is_taken(tmp_path: Path) -> None:
    spool = spool_in(tmp_path)
    spool._settings = replace(spool._settings, min_free_bytes=shutil.disk_usage(tmp_path).total + 1)
    async with spool:
        await spool.until_safe(spool.append(readings(0, 5)))  # what was on its way is kept
        assert (spool.room, spool.state) == (0, "full")
        assert "min_free_disk" in (await spool.status()).detail


# The card.

RECORDED = """
import asyncio, ctypes, sys
from pathlib import Path
from spools import readings, spool_in

async def main(folder, trace):
    recorder = ctypes.CDLL(None)
    recorder.recorder_begin(folder.encode(), trace.encode())
    async with spool_in(Path(folder)) as spool:
        for first in range(0, 50, 10):
            await spool.until_safe(spool.append(readings(first, first + 10)))
            recorder.recorder_mark(b"{}", 2)

asyncio.run(main(*sys.argv[1:]))
"""
"""A spool whose calls are recorded, with a mark wherever readings have just become safe."""


def test_what_is_safe_was_synced_to_the_disk_before(tmp_path: Path) -> None:
    folder, trace = tmp_path / "spool", tmp_path / "trace"
    folder.mkdir()
    path = os.pathsep.join([str(Path(fieldpost.__file__).parents[1]), str(Path(__file__).parents[1])])
    environment = os.environ | {"LD_PRELOAD": str(recorder()), "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", RECORDED, folder, trace], env=environment, check=True)
    names: dict[int, str] = {}
    unsynced: set[str] = set()
    marks, written = 0, 0
    for event in read_trace(trace):
        if event.call is Call.OPEN:
            names[event.fd] = event.path
        elif event.call is Call.WRITE:
            unsynced.add(names[event.fd])
            written += 1
        elif event.call is Call.FSYNC:
            unsynced.discard(names[event.fd])
        elif event.call is Call.MARK:
            assert not unsynced & {"spool.db", "spool.db-wal"}
            marks += 1
    assert marks == 5
    assert written > marks


def fill_up(spool: Spool) -> None:
    """The disk under the spool is full: SQLite gets no page more."""
    db = spool._card.log._opened()
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count={pages}")


async def test_a_commit_that_fails_acknowledges_nothing_and_leaves_nothing_of_itself_on_the_card(
    tmp_path: Path,
) -> None:
    clock = HandClock()
    spool = await spool_in(tmp_path, clock=clock, linger_ms=1000).__aenter__()
    ticket = spool.append(readings(0, 10))
    clock.pass_ms(1000)
    await quiet(spool)
    assert spool.is_safe(ticket)
    await spool._card.run(fill_up, spool)
    ticket = spool.append(incompressible(10, 900))
    await confirm_all(spool)
    clock.pass_ms(1000)
    await quiet(spool)
    assert not spool.is_safe(ticket)
    assert (spool.room, spool.state) == (0, "failing")
    await crash(spool)
    async with spool_in(tmp_path, clock=clock) as spool:
        assert spool.upto(KEY) == 9
        spool.append(incompressible(10, 900))  # the node had no ack, so it sends them again
        assert own(await taken(spool)) == list(range(900))
        assert (await spool.status()).ledger == {}


async def test_a_commit_that_was_cut_saves_no_mark_and_no_progress_of_what_it_left_out(tmp_path: Path) -> None:
    clock = HandClock()
    spool = await spool_in(tmp_path, clock=clock, stage_readings=60_000).__aenter__()
    async with spool._committing:
        spool.append(readings(0, 50_100))
        for batch in await batches(spool, "r", 50_100):
            spool.confirm("r", batch)
        await spool._commit_once()
        assert spool.queue.lanes[LaneName.BULK].committed == 50_000
        await crash(spool)
    async with spool_in(tmp_path, clock=clock, stage_readings=60_000) as spool:
        spool.append(readings(50_000, 50_100))
        assert own(await taken(spool)) == list(range(50_000, 50_100))


async def test_a_batch_that_was_overtaken_by_the_next_ones_confirmation_is_still_outstanding(tmp_path: Path) -> None:
    async with spool_in(tmp_path) as spool:
        await spool.until_safe(spool.append(readings(0, 30)))
        first, second = await spool.take("r", "live", 10), await spool.take("r", "live", 10)
        assert first and second
        spool.confirm("r", second)
        spool.link("r", up=False)
    async with spool_in(tmp_path) as spool:
        assert sorted(own(await taken(spool))) == [*range(10), *range(20, 30)]


async def test_what_was_confirmed_is_not_sent_again_after_a_restart(tmp_path: Path) -> None:
    async with spool_in(tmp_path) as spool:
        await spool.until_safe(spool.append(readings(0, 30)))
        batch = await spool.take("r", "live", 10)
        assert batch is not None
        spool.confirm("r", batch)
    async with spool_in(tmp_path) as spool:
        assert own(await taken(spool)) == list(range(10, 30))


async def test_what_nobody_has_confirmed_is_kept_however_old_it_is(tmp_path: Path) -> None:
    clock = HandClock()
    async with spool_in(tmp_path, "a", "b", clock=clock, keep_ms=1000) as spool:
        for first in range(0, 30, 10):
            spool.append(readings(first, first + 10))
            await confirm_all(spool, "a")
            clock.pass_ms(365 * 24 * HOUR_MS)
            await quiet(spool)
    async with spool_in(tmp_path, "a", "b", clock=clock) as spool:
        assert own(await taken(spool, "b")) == list(range(30))


async def test_a_file_that_cannot_be_read_is_set_aside_as_it_is_and_what_can_be_read_is_taken_over(
    tmp_path: Path,
) -> None:
    async with spool_in(tmp_path) as spool:
        await spool.until_safe(spool.append(readings(0, 20)))
    file = tmp_path / "spool.db"
    broken = b"\xff" * 100 + file.read_bytes()[100:]
    file.write_bytes(broken)
    async with spool_in(tmp_path) as spool:
        assert own(await taken(spool)) == list(range(20))
    (aside,) = tmp_path.glob("spool.damaged-*.db")
    assert aside.read_bytes() == broken


def change(folder: Path, statement: str, *values: object) -> None:
    """Change bytes in a closed spool behind its back, as a worn card does."""
    db = sqlite3.connect(folder / "spool.db")
    with db:
        assert db.execute(statement, values).rowcount == 1
    db.close()


@pytest.mark.parametrize("column", ["at_ms = at_ms + 64", "since_ms = since_ms + 1", "past = past + 1", "ids = x'90'"])
async def test_a_batch_is_not_believed_when_anything_in_its_row_was_changed(tmp_path: Path, column: str) -> None:
    async with spool_in(tmp_path) as spool:
        await spool.until_safe(spool.append(readings(0, 5)))
    change(tmp_path, f"UPDATE batch SET {column}")
    async with spool_in(tmp_path) as spool:
        assert own(await taken(spool)) == []
        gaps = [one.event.why for one in await taken(spool) if one.event is not None]
        assert gaps
        assert all(why.startswith("damaged on the card") for why in gaps)
        assert len(gaps) == len(set(gaps))  # one loss is told once


async def test_a_mark_whose_bits_changed_is_not_believed_and_no_row_is_taken_twice(tmp_path: Path) -> None:
    async with spool_in(tmp_path) as spool:
        await spool.until_safe(spool.append(readings(0, 5)))
    node, install, boot = KEY
    change(tmp_path, "UPDATE state SET value = x'92ce7fffffff90' WHERE key = ?", f"mark/{node}/{install}/{boot}")
    async with spool_in(tmp_path) as spool:
        assert spool.upto(KEY) < 5  # nothing that never came is freed, nor refused when it comes
        spool.append(readings(0, 7))
        assert own(await taken(spool)) == list(range(7))


@pytest.mark.parametrize("key", ["eras", "heads", "clock"])
async def test_a_bit_that_makes_a_number_of_a_key_is_damage_and_no_reason_not_to_start(
    tmp_path: Path, key: str
) -> None:
    async with spool_in(tmp_path) as spool:
        await spool.until_safe(spool.append(readings(0, 5)))
    file = tmp_path / "spool.db"
    content = bytearray(file.read_bytes())
    row = content.index(key.encode())
    # The key's serial type (SQLite's file format, section 2.1) lies before the row: 13 and twice its length is a text.
    content[content.rindex(13 + 2 * len(key), row - 6, row)] ^= 0x10
    file.write_bytes(content)
    async with spool_in(tmp_path) as spool:
        assert own(await taken(spool)) == list(range(5))
        assert spool.upto(KEY) == 4


async def test_a_damaged_batch_is_a_gap_with_its_rows_and_its_bytes_are_kept(tmp_path: Path) -> None:
    async with spool_in(tmp_path) as spool:
        for first in (0, 10, 20):
            await spool.until_safe(spool.append(readings(first, first + 10)))
    change(tmp_path, "UPDATE batch SET body = x'00' WHERE place & 0xffff = 10")
    async with spool_in(tmp_path) as spool:
        found = await taken(spool)
        assert own(found) == [*range(10), *range(20, 30)]
    async with spool_in(tmp_path) as spool:
        gaps = [one.event for one in await taken(spool) if one.event is not None]
        assert [(e.node, e.boot, e.first, e.last, e.why) for e in gaps] == [("n1", 1, 10, 19, "damaged on the card")]
        assert (await spool.verify()).set_aside_rows == 1


async def test_a_folder_that_cannot_be_used_is_an_error_and_no_spool_in_memory(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the folder should be")
    with pytest.raises(SpoolFault, match="data"):
        async with spool_in(tmp_path / "data"):
            pass


async def test_what_is_written_to_a_folder_in_memory_is_not_safe(tmp_path: Path) -> None:
    memory = Path("/dev/shm") / f"fieldpost-{tmp_path.name}"
    clock = HandClock()
    spool = spool_in(memory, clock=clock)
    spool._settings = replace(spool._settings, trust_card=False)
    try:
        async with spool:
            ticket = spool.append(readings(0, 5))
            clock.pass_ms(1000)
            await quiet(spool)
            assert spool.queue.lanes[LaneName.BULK].committed == 5
            assert not spool.is_safe(ticket)
    finally:
        shutil.rmtree(memory)


async def test_at_the_limit_rows_go_and_the_gap_records_of_before_stay(tmp_path: Path) -> None:
    async with spool_in(tmp_path, max_bytes=60_000, full="drop-oldest") as spool:
        gaps = [Event("gap", "n2", INSTALL, 1, seq, seq, "dropped by the node") for seq in range(0, 40, 2)]
        for gap in gaps:
            spool.report(gap)
            await spool._commit()
        for first in range(0, 20_000, 500):
            if "given up" in (await spool.status()).ledger:
                break
            await spool.until_safe(spool.append(incompressible(first, first + 500)))
        found = [one.event for one in await taken(spool) if one.event is not None]
        assert found[: len(gaps)] == gaps
        assert {event.why for event in found[len(gaps) :]} == {"given up: max_bytes"}


# Time.


def configured(**more: Any) -> Config:
    """A gateway with one route, as somebody writes it down."""
    spool, route = more.get("spool", {}), more.get("route", {})
    return parse(
        {
            "spool": {"min_free_disk": "1MB", "trust_card": True, **spool},
            "uplinks": [{"name": "plant", "kind": "mqtt", "url": "mqtt://127.0.0.1:1"}],
            "routes": [{"id": "r", "uplink": "plant", **route}],
        },
        Path("/"),
    )


def configured_spool(folder: Path, clock: HandClock, config: Config) -> Spool:
    return Spool(replace(spool_settings(config), folder=folder), route_terms(config), clock)


async def test_a_ttl_of_an_hour_is_an_hour(tmp_path: Path) -> None:
    clock = HandClock()
    async with configured_spool(tmp_path, clock, configured(route={"ttl": "1h"})) as spool:
        spool.append(readings(0, 10))
        clock.pass_ms(60_000)
        await quiet(spool)
        spool.queue.lanes[LaneName.BULK].forget(10)
        clock.pass_ms(HOUR_MS - 60_000)
        assert own(await taken(spool)) == list(range(10))
        clock.pass_ms(120_000)
        assert own(await taken(spool)) == []


async def test_a_ttl_holds_for_readings_that_are_in_memory_as_well(tmp_path: Path) -> None:
    clock = HandClock()
    async with configured_spool(tmp_path, clock, configured(route={"ttl": "1h"})) as spool:
        spool.append(readings(0, 10))
        clock.pass_ms(60_000)
        await quiet(spool)
        clock.pass_ms(2 * HOUR_MS)
        spool.append(readings(10, 12))
        spool.link("r", up=True)
        assert own(await taken(spool)) == [10, 11]
        await quiet(spool)
        assert (await spool.status()).ledger == {"expired": 1}


async def test_a_keep_of_an_hour_is_an_hour(tmp_path: Path) -> None:
    clock = HandClock()
    async with configured_spool(tmp_path, clock, configured(spool={"keep": "1h"})) as spool:

        async def stored() -> int:
            spool.append([reading(int(clock.boottime))])
            clock.pass_ms(60_000)
            await quiet(spool)
            await confirm_all(spool)
            return (await spool.status()).stored

        assert await stored() == 1
        clock.pass_ms(HOUR_MS - 180_000)
        assert await stored() == 2
        clock.pass_ms(240_000)
        assert await stored() == 2  # the third came, the first went


async def test_a_date_that_was_right_stays_when_its_neighbours_are_corrected(tmp_path: Path) -> None:
    clock = HandClock(unix=1_600_000_000_000, synced=False)
    async with spool_in(tmp_path, clock=clock) as spool:
        eras = [spool.era]
        for step_ms in (24 * HOUR_MS, 5_000):  # the clock is set, and set right once more by five seconds
            clock.unix, clock.synced = clock.unix + step_ms, True
            spool.observe_clock()
            eras.append(spool.era)
        spool.append([reading(seq, era=era) for seq, era in enumerate(eras)])
        moved = [(one.time_ms - reading(one.seq).time_ms, one.quality) for one in await taken(spool)]
    assert moved == [(24 * HOUR_MS + 5_000, Quality.CORRECTED), (0, Quality.SYNCED), (0, Quality.SYNCED)]


async def test_the_order_is_that_in_which_readings_were_taken_whatever_the_clock_said(tmp_path: Path) -> None:
    async with spool_in(tmp_path) as spool:
        for first, day in ((0, 3), (5, 1), (10, 2)):
            dated = [replace_date(one, day * 24 * HOUR_MS) for one in readings(first, first + 5)]
            await spool.until_safe(spool.append(dated))
    async with spool_in(tmp_path) as spool:
        assert [one.seq for one in await taken(spool)] == list(range(15))


def replace_date(one: Reading, by_ms: int) -> Reading:
    return msgspec.structs.replace(one, time_ms=one.time_ms + by_ms)


# What goes out.


class CountingUplink(MemoryUplink):
    """Counts how often it was tried to reach it."""

    attempts = 0

    async def open(self) -> None:
        self.attempts += 1
        await super().open()


async def test_an_uplink_that_comes_back_after_many_attempts_gets_everything(tmp_path: Path) -> None:
    uplink = CountingUplink()
    uplink.unreachable = "no line"
    async with spool_in(tmp_path, RouteTerms("all", 10)) as spool:
        spool.keep_manifest(MANIFEST)
        config = parse(
            {
                "uplinks": [{"name": "m", "kind": "mqtt", "url": "mqtt://127.0.0.1:1"}],
                "routes": [{"id": "all", "uplink": "m"}],
            },
            Path("/"),
        ).routes[0]
        route = Route(config, spool, uplink, spool.manifests)
        route._pause = Pause(0.001, 0.002)
        carrier = asyncio.create_task(route.run())
        spool.append(readings(0, 25))
        await until_async(lambda: uplink.attempts >= 100 or carrier.done(), "many attempts")
        assert not carrier.done()
        uplink.unreachable = ""
        await until_async(lambda: spool.backlog("all") == 0, "all are confirmed")
        carrier.cancel()
        await asyncio.gather(carrier, return_exceptions=True)
    assert sum(message.readings for message in uplink.delivered) == 25


CONNECT, PINGREQ = 1, 12
ANSWERS = {CONNECT: b"\x20\x03\x00\x00\x00", PINGREQ: b"\xd0\x00"}


async def hard_of_hearing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A broker (MQTT 5) that takes everything, answers pings, and acknowledges no message."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            (kind,) = await reader.readexactly(1)
            length, shift, more = 0, 0, True
            while more:
                (part,) = await reader.readexactly(1)
                length, shift, more = length | (part & 0x7F) << shift, shift + 7, part >= 0x80
            await reader.readexactly(length)
            writer.write(ANSWERS.get(kind >> 4, b""))


async def test_a_confirmation_that_never_comes_is_not_awaited_for_ever() -> None:
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await hard_of_hearing(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        ended.set()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        uplink = MqttUplink(MqttSettings(f"mqtt://127.0.0.1:{port}", timeout_s=0.5))
        await uplink.open()
        async with asyncio.timeout(10):
            with pytest.raises(Unreachable, match="no acknowledgement within"):
                await uplink.deliver(Message("n1.1", b"{}", "application/senml+json", "", 1))
        await uplink.close()
        await ended.wait()
