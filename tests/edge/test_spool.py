"""The spool on real SQLite: what is safe stays, what is confirmed may go, and who gets what in which order."""

from __future__ import annotations

import asyncio
import shutil
import zlib
from pathlib import Path

import pytest
from fieldpost.errors import SpoolFault
from fieldpost.reading import Event, Quality
from fieldpost.spool import LaneName, Limits, RouteTerms
from spools import (
    INSTALL,
    KEY,
    MANIFEST,
    HandClock,
    confirm_all,
    crash,
    limits,
    own,
    quiet,
    reading,
    readings,
    spool_in,
    taken,
)


async def stored(folder: Path, *routes: str, past: int = 100) -> None:
    async with spool_in(folder, *routes) as spool:
        for start in range(0, past, 10):
            await spool.until_safe(spool.append(readings(start, start + 10)))


async def test_what_was_safe_is_there_after_a_restart_in_order(tmp_path: Path) -> None:
    await stored(tmp_path)
    async with spool_in(tmp_path) as spool:
        batch = await spool.take("r", "live", 35)
        assert batch is not None
        spool.confirm("r", batch)
    async with spool_in(tmp_path) as spool:
        assert own(await taken(spool)) == list(range(35, 100))
        assert (await taken(spool))[0].values == reading(35).values


async def test_a_repeat_is_no_second_reading_also_after_a_restart(tmp_path: Path) -> None:
    async with spool_in(tmp_path) as spool:
        await spool.until_safe(spool.append([reading(0), reading(1), reading(0)]))
        assert own(await taken(spool)) == [0, 1]
    async with spool_in(tmp_path) as spool:
        spool.append([reading(1), reading(2)])
        assert spool.upto(KEY) == 2
        assert (await spool.status()).repeats == 1


async def test_reading_removes_nothing_and_routes_are_apart(tmp_path: Path) -> None:
    async with spool_in(tmp_path, "a", "b") as spool:
        await spool.until_safe(spool.append(readings(0, 20)))
        assert own(await taken(spool, "a")) == own(await taken(spool, "a")) == list(range(20))
        await confirm_all(spool, "a")
        assert own(await taken(spool, "a")) == []
        assert own(await taken(spool, "b")) == list(range(20))


async def test_delivered_readings_leave_the_card_when_they_were_kept_long_enough(tmp_path: Path) -> None:
    clock = HandClock()
    async with spool_in(tmp_path, clock=clock, keep_ms=60_000) as spool:
        spool.append(readings(0, 50))
        clock.pass_ms(1000)
        await quiet(spool)
        await confirm_all(spool)
        assert (await spool.status()).stored == 50
        clock.pass_ms(61_000)
        spool.append(readings(50, 60))
        clock.pass_ms(1000)
        await quiet(spool)
        assert (await spool.status()).stored == 10
        assert own(await taken(spool)) == list(range(50, 60))


async def test_progress_on_the_card_is_never_ahead_of_the_readings_on_the_card(tmp_path: Path) -> None:
    # A reading can be confirmed upstream before it is on the card; after a crash its position is given to another.
    clock = HandClock()
    spool = await spool_in(tmp_path, clock=clock, linger_ms=1000).__aenter__()
    spool.append([reading(0)])
    clock.pass_ms(1000)
    await quiet(spool)
    spool.append(readings(1, 9))
    await confirm_all(spool)
    await crash(spool)
    async with spool_in(tmp_path, clock=clock) as spool:
        spool.append(readings(1, 9))  # the node had no ack, so it sends them again
        assert own(await taken(spool)) == list(range(9))


async def test_nothing_is_safe_before_the_commit(tmp_path: Path) -> None:
    clock = HandClock()
    async with spool_in(tmp_path, clock=clock, linger_ms=1000) as spool:
        ticket = spool.append([reading(0)])
        await quiet(spool)
        assert not spool.is_safe(ticket)
        clock.pass_ms(1000)
        await quiet(spool)
        assert spool.is_safe(ticket)


async def test_what_a_durable_uplink_has_confirmed_is_safe_and_not_written_at_once(tmp_path: Path) -> None:
    clock = HandClock()
    async with spool_in(tmp_path, clock=clock) as spool:
        spool.link("r", up=True, durable=True)
        ticket = spool.append(readings(0, 10))
        await confirm_all(spool)
        assert spool.is_safe(ticket)
        clock.pass_ms(60_000)
        await quiet(spool)
        assert spool.queue.lanes[LaneName.BULK].committed == 0
        clock.pass_ms(900_000)  # kept for a replay, at a slow beat
        await quiet(spool)
        assert (await spool.status()).stored == 10


@pytest.mark.parametrize(("durable", "after_ms"), [(True, 35_000), (False, 1000)])
async def test_what_a_route_gathers_for_uplinks_that_keep_it_is_not_written_meanwhile(
    tmp_path: Path, durable: bool, after_ms: int
) -> None:
    clock = HandClock()
    async with spool_in(tmp_path, RouteTerms("r", gather_ms=30_000), clock=clock, linger_ms=1000) as spool:
        assert spool.safe_within_s == 35
        spool.link("r", up=True, durable=durable)
        ticket = spool.append(readings(0, 10))
        clock.pass_ms(after_ms - 1)
        await quiet(spool)
        assert not spool.is_safe(ticket)
        clock.pass_ms(1)
        await quiet(spool)
        assert spool.is_safe(ticket)  # nobody has confirmed it in time, so the card keeps it


async def test_what_an_uplink_that_forgets_has_confirmed_is_not_safe_before_the_commit(tmp_path: Path) -> None:
    clock = HandClock()
    async with spool_in(tmp_path, "durable", "forgets", clock=clock, linger_ms=1000) as spool:
        spool.link("durable", up=True, durable=True)
        spool.link("forgets", up=True, durable=False)
        ticket = spool.append(readings(0, 10))
        await confirm_all(spool, "durable")
        assert not spool.is_safe(ticket)
        await confirm_all(spool, "forgets")
        assert not spool.is_safe(ticket)
        clock.pass_ms(1000)
        await quiet(spool)
        assert spool.is_safe(ticket)


async def test_one_durable_confirmation_of_two_routes_is_not_enough(tmp_path: Path) -> None:
    async with spool_in(tmp_path, "a", "b", clock=HandClock()) as spool:
        for route in "ab":
            spool.link(route, up=True, durable=True)
        ticket = spool.append(readings(0, 10))
        await confirm_all(spool, "a")
        assert not spool.is_safe(ticket)
        await confirm_all(spool, "b")
        assert spool.is_safe(ticket)


async def test_an_uplink_that_goes_down_has_what_waits_written_at_once(tmp_path: Path) -> None:
    async with spool_in(tmp_path, clock=HandClock(), linger_ms=60_000) as spool:
        spool.link("r", up=True, durable=True)
        ticket = spool.append(readings(0, 10))
        await quiet(spool)
        assert not spool.is_safe(ticket)
        spool.link("r", up=False)
        await quiet(spool)
        assert spool.is_safe(ticket)


@pytest.mark.parametrize(("write", "is_written"), [("always", True), ("when-needed", False)])
async def test_the_setting_write(tmp_path: Path, write: str, is_written: bool) -> None:
    clock = HandClock()
    async with spool_in(tmp_path, clock=clock, write=write, linger_ms=1000) as spool:
        spool.link("r", up=True, durable=True)
        ticket = spool.append(readings(0, 10))
        await confirm_all(spool)
        assert spool.is_safe(ticket) is not is_written
        clock.pass_ms(1000)
        await quiet(spool)
        assert (spool.queue.lanes[LaneName.BULK].committed == 10) is is_written


@pytest.mark.parametrize(("ack_when", "after"), [("durable", "commit"), ("any-uplink", "a"), ("all-uplinks", "b")])
async def test_the_setting_ack_when_adds_to_durable(tmp_path: Path, ack_when: str, after: str) -> None:
    clock = HandClock()
    async with spool_in(tmp_path, "a", "b", clock=clock, ack_when=ack_when, linger_ms=1000) as spool:
        ticket = spool.append(readings(0, 3))
        clock.pass_ms(1000)
        await quiet(spool)
        steps = {"commit": spool.is_safe(ticket)}
        for route in "ab":
            await confirm_all(spool, route)
            steps[route] = spool.is_safe(ticket)
        assert next(step for step, safe in steps.items() if safe) == after


async def test_with_nothing_kept_what_is_safe_upstream_is_never_written(tmp_path: Path) -> None:
    clock = HandClock()
    async with spool_in(tmp_path, clock=clock, keep_ms=0) as spool:
        spool.link("r", up=True, durable=True)
        spool.append(readings(0, 10))
        await confirm_all(spool)
        clock.pass_ms(1_000_000)
        spool.append(readings(10, 12))
        clock.pass_ms(1_000_000)
        await quiet(spool)
        assert (await spool.status()).stored == 2
        assert own(await taken(spool)) == [10, 11]
    async with spool_in(tmp_path, clock=clock, keep_ms=0) as spool:
        assert own(await taken(spool)) == [10, 11]
        assert (await spool.status()).ledger == {}


async def test_a_folder_that_is_gone_with_the_power_makes_nothing_safe_by_itself(tmp_path: Path) -> None:
    memory = Path("/dev/shm") / f"fieldpost-{tmp_path.name}"
    spool = spool_in(memory, clock=HandClock())
    object.__setattr__(spool._settings, "trust_card", False)
    try:
        async with spool:
            ticket = spool.append(readings(0, 3))
            spool.link("r", up=False)
            await quiet(spool)
            assert not spool.is_safe(ticket)
            assert (spool.state, (await spool.status()).detail) == ("volatile", "on a tmpfs")
            spool.link("r", up=True, durable=True)
            await confirm_all(spool)
            assert spool.is_safe(ticket)
    finally:
        shutil.rmtree(memory)


# Lanes.


async def test_after_an_outage_fresh_readings_go_first_and_history_follows_in_order(tmp_path: Path) -> None:
    async with spool_in(tmp_path, RouteTerms("r", batch_readings=5)) as spool:
        await spool.until_safe(spool.append(readings(0, 30)))
        spool.link("r", up=True)
        spool.append(readings(30, 33))
        assert own(await taken(spool)) == [30, 31, 32, *range(30)]
        assert (await spool.take("r", "backfill", 4)).kind == "backfill"  # type: ignore[union-attr]


async def test_a_second_outage_in_the_middle_of_the_backfill(tmp_path: Path) -> None:
    terms = RouteTerms("r", batch_readings=5)
    async with spool_in(tmp_path, terms) as spool:
        await spool.until_safe(spool.append(readings(0, 30)))
        spool.link("r", up=True)
        part = await spool.take("r", "backfill", 12)
        assert part is not None
        spool.confirm("r", part)
        spool.append(readings(30, 33))
        fresh = await spool.take("r", "live", 5)
        assert fresh is not None
        spool.confirm("r", fresh)
        spool.link("r", up=False)
        await spool.until_safe(spool.append(readings(33, 50)))
    async with spool_in(tmp_path, terms) as spool:  # and a restart on top
        spool.link("r", up=True)
        spool.append(readings(50, 52))
        status = await spool.status()
        assert (status.routes["r"].live, status.routes["r"].backfill, status.routes["r"].spans) == (2, 35, 2)
        assert own(await confirm_all(spool)) == [50, 51, *range(12, 30), *range(33, 50)]
        assert (await spool.status()).routes["r"].readings == 0


async def test_a_short_interruption_makes_no_history(tmp_path: Path) -> None:
    async with spool_in(tmp_path, RouteTerms("r", batch_readings=50)) as spool:
        await spool.until_safe(spool.append(readings(0, 30)))
        spool.link("r", up=True)
        spool.append(readings(30, 33))
        assert own(await taken(spool)) == list(range(33))


async def test_urgent_readings_overtake_and_are_written_at_once(tmp_path: Path) -> None:
    async with spool_in(tmp_path, clock=HandClock(), linger_ms=60_000) as spool:
        spool.append(readings(0, 5))
        ticket = spool.append(readings(5, 8), urgent={6})
        await quiet(spool)
        assert spool.is_safe(ticket)
        assert own(await taken(spool)) == [6, 0, 1, 2, 3, 4, 5, 7]
    async with spool_in(tmp_path) as spool:
        assert own(await taken(spool)) == [6, 0, 1, 2, 3, 4, 5, 7]


async def test_a_route_that_is_not_configured_any_more_keeps_what_it_had_not_sent(tmp_path: Path) -> None:
    clock = HandClock()
    await stored(tmp_path, "old", "other", past=20)
    async with spool_in(tmp_path, "new", "other", clock=clock, keep_ms=0) as spool:
        spool.append(readings(20, 30))
        await confirm_all(spool, "other")
        await confirm_all(spool, "new")
        clock.pass_ms(10**9)
        await quiet(spool)
        status = await spool.status()
        assert status.removed == {"old": 20}
        assert status.stored == 20
    async with spool_in(tmp_path, "old", "other") as spool:
        assert own(await taken(spool, "old")) == list(range(20))
        assert own(await taken(spool, "other")) == []


async def test_a_new_route_begins_now_and_the_first_one_ever_with_everything(tmp_path: Path) -> None:
    async with spool_in(tmp_path, clock=HandClock()) as spool:
        spool._routes = ()
    async with spool_in(tmp_path, "first") as spool:
        await spool.until_safe(spool.append(readings(0, 5)))
    async with spool_in(tmp_path, "first", "second") as spool:
        spool.append(readings(5, 7))
        assert own(await taken(spool, "first")) == list(range(7))
        assert own(await taken(spool, "second")) == [5, 6]


async def test_replay_sends_again_what_is_kept_of_a_time_and_a_node(tmp_path: Path) -> None:
    async with spool_in(tmp_path, "a", "b") as spool:
        spool.append(readings(0, 30))
        spool.append(readings(0, 30, node="n2"))
        for route in "ab":
            await confirm_all(spool, route)
        count = await spool.replay("a", reading(10).time_ms, reading(19).time_ms, "n2")
        assert count == 60
        again = await confirm_all(spool, "a")
        assert [(one.node, one.seq) for one in again] == [("n2", seq) for seq in range(10, 20)]
        assert own(await taken(spool, "a")) == own(await taken(spool, "b")) == []


# Limits.


async def test_when_full_rows_are_thinned_before_they_are_given_up_and_gap_records_never_are(tmp_path: Path) -> None:
    async with spool_in(tmp_path, max_bytes=60_000, full="thin") as spool:
        spool.keep_manifest(MANIFEST)
        seq, kinds = 0, set()
        while "given up" not in kinds:
            # Values that do not compress: each commit takes its room.
            rows = [reading(s, values=(zlib.crc32(str(s).encode()),), every_ms=20_000) for s in range(seq, seq + 900)]
            seq += 900
            await spool.until_safe(spool.append(rows))
            status = await spool.status()
            kinds = set(status.ledger)
            while not spool.room:
                await asyncio.sleep(0.001)
        assert kinds == {"thinned", "given up"}
        found = await taken(spool)
        events = [one.event for one in found if one.event is not None]
        covered = {s for e in events for s in range(e.first, (e.last or e.first) + 1)} | set(own(found))
        assert covered == set(range(seq))  # every row is there, or in a record that stands for it
        assert any(e.kind == "thinned" for e in events) and any(e.kind == "gap" for e in events)


async def test_a_full_spool_that_may_give_nothing_up_holds(tmp_path: Path) -> None:
    async with spool_in(tmp_path, max_bytes=60_000, full="hold") as spool:
        seq = 0
        while spool.room:
            rows = [reading(s, values=(zlib.crc32(str(s).encode()),)) for s in range(seq, seq + 500)]
            seq += 500
            await spool.until_safe(spool.append(rows))
        assert spool.state == "full"
        assert own(await taken(spool)) == list(range(seq))
        await confirm_all(spool)
        while not spool.room:  # what is delivered makes room
            await asyncio.sleep(0.02)
        assert (await spool.status()).ledger == {}


async def test_ages_are_by_a_clock_that_no_setting_moves(tmp_path: Path) -> None:
    clock = HandClock()
    terms = RouteTerms("r", ttl_ms=3_600_000)
    async with spool_in(tmp_path, terms, "other", clock=clock) as spool:
        spool.append(readings(0, 20))
        clock.pass_ms(1000)
        await quiet(spool)
        clock.unix += 365 * 86_400_000
        spool.observe_clock()
        spool.queue.lanes[LaneName.BULK].forget(20)
        assert len(own(await taken(spool, "r"))) == 20
    # A restart in the same boot of the machine counts the time between; another boot's clock starts anew.
    clock.pass_ms(3_000_000)
    async with spool_in(tmp_path, terms, "other", clock=clock) as spool:
        assert len(own(await taken(spool, "r"))) == 20
    clock.boottime, clock.machine = 5, "machine-boot-2"
    async with spool_in(tmp_path, terms, "other", clock=clock) as spool:
        clock.pass_ms(599_000)
        assert len(own(await taken(spool, "r"))) == 20
        clock.pass_ms(10_000)
        assert own(await taken(spool, "r")) == []
        assert len(own(await taken(spool, "other"))) == 20
        assert (await spool.status()).ledger == {"expired": 1}
        await spool._commit()
        ((_, event),) = await spool.ledger(9)
        assert (event.first, event.last, event.why) == (0, 19, "expired: route r")


async def test_a_lane_gives_up_what_is_older_than_its_max_age(tmp_path: Path) -> None:
    clock = HandClock()
    lanes = limits(bulk=Limits(max_age_ms=60_000))
    async with spool_in(tmp_path, clock=clock, limits=lanes) as spool:
        spool.append(readings(0, 10), urgent={3})
        clock.pass_ms(1000)
        await quiet(spool)
        clock.pass_ms(61_000)
        spool._retention._aged_at = -1000.0
        await quiet(spool)
        found = await taken(spool)
        assert own(found) == [3]
        gaps = [(one.event.first, one.event.last) for one in found if one.event is not None]
        assert gaps == [(0, 2), (4, 9)]


# Time.


async def test_what_was_measured_before_the_clock_was_set_is_corrected(tmp_path: Path) -> None:
    clock = HandClock(unix=1_600_000_000_000, synced=False)
    async with spool_in(tmp_path, clock=clock) as spool:
        spool.append([reading(0, era=spool.era)])
        assert [one.quality for one in await taken(spool)] == [Quality.UNSYNCED]
    async with spool_in(tmp_path, clock=clock) as spool:
        clock.unix += 86_400_000
        clock.synced = True
        spool.observe_clock()
        spool.append([reading(1, era=spool.era)])
        first, second = await taken(spool)
    assert (first.time_ms - reading(0).time_ms, first.quality) == (86_400_000, Quality.CORRECTED)
    assert (second.time_ms, second.quality) == (reading(1).time_ms, Quality.SYNCED)


async def test_another_boot_of_the_machine_corrects_nothing(tmp_path: Path) -> None:
    clock = HandClock(synced=False)
    async with spool_in(tmp_path, clock=clock) as spool:
        spool.append([reading(0, era=spool.era)])
    clock.machine, clock.boottime, clock.synced = "machine-boot-2", 10, True
    async with spool_in(tmp_path, clock=clock) as spool:
        (first,) = await taken(spool)
    assert (first.time_ms, first.quality) == (reading(0).time_ms, Quality.UNSYNCED)


# Identity.


async def test_two_gateways_never_share_a_spool(tmp_path: Path) -> None:
    async with spool_in(tmp_path):
        with pytest.raises(SpoolFault, match="another gateway"):
            async with spool_in(tmp_path):
                pass


async def test_the_gateways_own_records_never_share_an_identity_also_after_a_restored_image(tmp_path: Path) -> None:
    ids = []
    for _ in range(2):
        async with spool_in(tmp_path) as spool:
            for _ in range(2):
                spool.report(Event("presence", "n1", INSTALL, 1, 1, None, "lost"))
            ids += [one.id for one in await confirm_all(spool)]
        (tmp_path / "spool.db").unlink()  # as if the card had been written from the same image each time
        (tmp_path / "spool.id").unlink()
    assert len(set(ids)) == 4
    assert [one.split(".")[2:] for one in ids] == [["1", "0"], ["1", "1"], ["1", "0"], ["1", "1"]]


async def test_a_restored_backup_is_a_new_generation_and_invents_no_gap(tmp_path: Path) -> None:
    spool_folder, backup = tmp_path / "spool", tmp_path / "backup"
    await stored(spool_folder, past=20)
    shutil.copytree(spool_folder, backup)
    async with spool_in(spool_folder) as spool:
        generation = spool.generation
        spool.append(readings(20, 40))
    shutil.rmtree(spool_folder)
    shutil.copytree(backup, spool_folder)
    async with spool_in(spool_folder) as spool:
        assert spool.generation != generation
        assert spool.upto(KEY) == 19
        assert spool.mark(KEY, 0, 39)  # the node was acknowledged up to 39, and says so with `held`
        spool.append(readings(40, 42))
        assert own(await taken(spool)) == [*range(20), 40, 41]
        assert (await spool.status()).ledger == {}


async def test_manifests_and_set_aside_readings_survive_and_can_be_dealt_with(tmp_path: Path) -> None:
    async with spool_in(tmp_path) as spool:
        spool.keep_manifest(MANIFEST)
        spool.append(readings(0, 2))
        spool.set_aside("r", reading(0), "too large for the far side")
        spool.set_aside("r", reading(1), "too small")
    async with spool_in(tmp_path) as spool:
        assert spool.manifests[MANIFEST.hash] == MANIFEST
        gap = next(one.event for one in await taken(spool) if one.event is not None)
        assert gap == Event("gap", "n1", INSTALL, 1, 0, 0, "set aside: r: too large for the far side")
        first, second = await spool.refused()
        assert (first.reading.seq, first.route, first.reason) == (0, "r", "too large for the far side")
        await spool.settle(first, dropped=True)
        await spool.settle(second, dropped=False)
    async with spool_in(tmp_path) as spool:
        status = await spool.status()
        assert (status.set_aside, status.ledger) == (0, {"set aside": 2, "dropped by hand": 1})
