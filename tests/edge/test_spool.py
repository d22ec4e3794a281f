"""The spool on real SQLite: what is durable stays, what is confirmed goes, damage is set aside."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest
from fieldpost.errors import SpoolFault
from fieldpost.reading import Channel, Event, Manifest, Reading
from fieldpost.spool import Spool, SpoolSettings

INSTALL = "a1b2c3d4e5f6"
KEY = ("n1", INSTALL, 1)


def reading(seq: int, boot: int = 1, node: str = "n1") -> Reading:
    return Reading(node, INSTALL, boot, seq, seq * 1000, 1_763_900_000_000 + seq, 50, "00112233", (2150, "crc", None))


def opened(folder: Path, *routes: str, linger_s: float = 0.01, stage_readings: int = 1000, **more: int) -> Spool:
    limits = {"min_free_bytes": 0, **more}
    return Spool(SpoolSettings(folder, linger_s=linger_s, stage_readings=stage_readings, **limits), routes or ["r"])


async def taken(spool: Spool, position: int, until: int) -> list[Reading]:
    found: list[Reading] = []
    while position < until:
        batch = await spool.next(position, 7)
        assert batch.first == position and batch.past > position
        found += batch.readings
        position = batch.past
    return found


async def test_what_was_durable_is_there_after_a_restart_in_order(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        for start in range(0, 100, 10):
            await spool.durable(spool.append([reading(seq) for seq in range(start, start + 10)]))
        spool.advance("r", 35)
    async with opened(tmp_path) as spool:
        assert spool.cursor("r") == 35
        assert [one.seq for one in await taken(spool, 35, spool.head)] == list(range(35, 100))
        assert (await taken(spool, 35, 36))[0] == reading(35)


async def test_a_repeat_is_no_second_reading_also_after_a_restart(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        await spool.durable(spool.append([reading(0), reading(1), reading(0)]))
        assert spool.head == 2
    async with opened(tmp_path) as spool:
        assert spool.append([reading(1), reading(2)]) == 3
        assert spool.upto(KEY) == 2
        assert (await spool.status()).repeats == 1


async def test_reading_the_queue_removes_nothing_and_a_cursor_never_goes_back(tmp_path: Path) -> None:
    async with opened(tmp_path, "a", "b") as spool:
        await spool.durable(spool.append([reading(seq) for seq in range(20)]))
        assert len(await taken(spool, 0, 20)) == len(await taken(spool, 0, 20)) == 20
        spool.advance("a", 20)
        spool.advance("a", 3)
        assert (spool.cursor("a"), spool.cursor("b")) == (20, 0)
        assert len(await taken(spool, 0, 20)) == 20


async def test_what_every_route_has_confirmed_leaves_the_card(tmp_path: Path) -> None:
    async with opened(tmp_path, "a", "b") as spool:
        for start in range(0, 60, 10):
            await spool.durable(spool.append([reading(seq) for seq in range(start, start + 10)]))
        spool.advance("a", 60)
        spool.advance("b", 25)
    async with opened(tmp_path, "a", "b") as spool:
        assert (spool.cursor("a"), spool.cursor("b"), spool.head) == (60, 25, 60)
        assert [one.seq for one in await taken(spool, 25, 60)] == list(range(25, 60))
    firsts = [row[0] for row in sqlite3.connect(tmp_path / "spool.db").execute("SELECT first FROM batch ORDER BY 1")]
    assert firsts[0] == 20


async def test_a_cursor_on_the_card_is_never_ahead_of_the_readings_on_the_card(tmp_path: Path) -> None:
    # A reading can be confirmed upstream before it is on the card; after a crash its position is given to another.
    spool = opened(tmp_path, linger_s=30.0)
    await spool.__aenter__()
    await_durable = spool.append([reading(0)])
    spool.hurry()
    await spool.durable(await_durable)
    spool.append([reading(seq) for seq in range(1, 9)])
    spool.advance("r", 9)
    saved = sqlite3.connect(tmp_path / "spool.db").execute("SELECT cursor FROM route").fetchall()
    assert all(cursor <= 1 for (cursor,) in saved)
    await spool.__aexit__(None, None, None)
    saved = sqlite3.connect(tmp_path / "spool.db").execute("SELECT cursor FROM route").fetchall()
    assert saved == [(9,)]


async def test_nothing_is_durable_before_the_commit(tmp_path: Path) -> None:
    async with opened(tmp_path, linger_s=30.0) as spool:
        position = spool.append([reading(0)])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await spool.durable(position)
        spool.hurry()
        assert await spool.durable(position) == 1


async def test_a_write_that_fails_acknowledges_nothing_and_is_made_again(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        await spool.durable(spool.append([reading(0)]))
        other = sqlite3.connect(tmp_path / "spool.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")  # a lock that the spool's commit can't get
        position = spool.append([reading(1)])
        while spool.state != "failing":
            await asyncio.sleep(0.05)
        assert spool.committed == 1
        assert spool.room == 0
        other.execute("ROLLBACK")
        other.close()
        assert await spool.durable(position) == 2
        assert spool.state == "ok"
    async with opened(tmp_path) as spool:
        assert [one.seq for one in await taken(spool, 0, 2)] == [0, 1]


async def test_at_its_limit_the_spool_has_no_room_and_loses_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path, max_bytes=100_000) as spool:
        seq = 0
        while spool.room:
            # Values that do not compress: each commit takes its room.
            position = spool.append(
                [
                    Reading("n1", INSTALL, 1, s, s, s * 7919, 5, "0" * 8, (s * 104_729, s**3))
                    for s in range(seq, seq + 500)
                ]
            )
            seq += 500
            await spool.durable(position)
        assert spool.state == "full"
        assert len(await taken(spool, 0, spool.head)) == seq
        spool.advance("r", spool.head)
        spool.hurry()
        while not spool.room:
            await asyncio.sleep(0.05)


async def test_damage_is_set_aside_reported_and_stepped_over(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        for start in range(0, 30, 10):
            await spool.durable(spool.append([reading(seq) for seq in range(start, start + 10)]))
    db = sqlite3.connect(tmp_path / "spool.db")
    body = bytearray(db.execute("SELECT body FROM batch WHERE first = 10").fetchone()[0])
    body[len(body) // 2] ^= 1
    db.execute("UPDATE batch SET body = ? WHERE first = 10", (bytes(body),))
    db.commit()
    db.close()
    async with opened(tmp_path) as spool:
        found = await taken(spool, 0, 30)
        assert [one.seq for one in found] == [*range(10), *range(20, 30)]
        await spool.durable(spool.head)
        assert [(event.first, event.last, event.why) for _, event in await spool.ledger(9)] == [(10, 19, "damaged")]
        record = (await taken(spool, 30, 31))[0]
        assert record.event is not None and record.event.why == "damaged" and record.node == "gateway"
    kept = sqlite3.connect(tmp_path / "spool.db").execute("SELECT body FROM damaged").fetchall()
    assert kept == [(bytes(body),)]


@pytest.mark.parametrize("content", [b"\0" * 8192, b"not a database, a text about one" * 300])
async def test_an_unreadable_file_is_set_aside_and_the_spool_starts(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "spool.db").write_bytes(content)
    async with opened(tmp_path) as spool:
        assert spool.append([reading(0)]) == 2  # behind the record of what happened
        await spool.durable(2)
        ((_, event),) = await spool.ledger(9)
        assert event.why.startswith("damaged: spool.damaged-")
    aside = list(tmp_path.glob("spool.damaged-*.db"))
    assert [path.read_bytes() for path in aside] == [content]


async def test_a_spool_of_a_newer_version_is_refused_untouched(tmp_path: Path) -> None:
    async with opened(tmp_path):
        pass
    db = sqlite3.connect(tmp_path / "spool.db")
    db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(SpoolFault, match="newer Fieldpost"):
        async with opened(tmp_path):
            pass
    assert not list(tmp_path.glob("spool.damaged-*"))


async def test_two_gateways_never_share_a_spool(tmp_path: Path) -> None:
    async with opened(tmp_path):
        with pytest.raises(SpoolFault, match="another gateway"):
            async with opened(tmp_path):
                pass


async def test_manifests_and_set_aside_readings_survive(tmp_path: Path) -> None:
    manifest = Manifest("00112233", (Channel("temperature", "Cel", 100, "sim", "gauge"),), 1000)
    async with opened(tmp_path) as spool:
        spool.keep_manifest(manifest)
        spool.append([reading(0)])
        spool.set_aside("r", reading(0), "too large for the far side")
        await spool.durable(spool.head)
    async with opened(tmp_path) as spool:
        assert spool.manifests["00112233"] == manifest
        gap = (await taken(spool, 1, 2))[0].event
        assert gap == Event("gap", "n1", INSTALL, 1, 0, 0, "set aside: r: too large for the far side")
    rows = sqlite3.connect(tmp_path / "spool.db").execute("SELECT route, reason FROM set_aside").fetchall()
    assert rows == [("r", "too large for the far side")]


async def test_the_gateways_own_records_are_numbered_by_generation_and_boot(tmp_path: Path) -> None:
    ids = []
    for _ in range(2):
        async with opened(tmp_path) as spool:
            for _ in range(2):
                spool.report(Event("presence", "n1", INSTALL, 1, 1, None, "lost"))
            ids += [one.id for one in await taken(spool, spool.head - 2, spool.head)]
            generation = spool.generation
    assert ids == [f"gateway.{generation}.{boot}.{seq}" for boot in (1, 2) for seq in (0, 1)]
