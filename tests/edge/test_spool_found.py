"""What test_spool_model.py has found, each as the shortest way to it."""

from __future__ import annotations

from pathlib import Path

from fieldpost.spool import LaneName, RouteTerms
from fieldpost.spool.thin import thin
from spools import MANIFEST, HandClock, confirm_all, own, quiet, reading, readings, spool_in, taken


async def test_what_came_while_there_was_no_route_is_sent_when_there_is_one_again(tmp_path: Path) -> None:
    async with spool_in(tmp_path, "a") as spool:
        await spool.until_safe(spool.append(readings(0, 3)))
    none = spool_in(tmp_path)
    none._routes = ()
    async with none as spool:
        await spool.until_safe(spool.append(readings(3, 5)))
    async with spool_in(tmp_path, "a", "b") as spool:
        assert own(await taken(spool, "a")) == [3, 4, 0, 1, 2]
        assert own(await taken(spool, "b")) == [3, 4]


async def test_what_was_written_in_the_first_millisecond_of_a_spool_expires_too(tmp_path: Path) -> None:
    clock, terms = HandClock(), RouteTerms("r", ttl_ms=60_000)
    async with spool_in(tmp_path, terms, clock=clock, linger_ms=0) as spool:
        spool.append(readings(0, 2))
        await quiet(spool)
        clock.pass_ms(61_000)
        spool.append(readings(2, 4))
        await quiet(spool)
        assert own(await taken(spool)) == [2, 3]


async def test_a_batch_that_was_thinned_while_it_is_in_memory_too_is_sent_as_it_is_on_the_card(tmp_path: Path) -> None:
    async with spool_in(tmp_path, full="thin") as spool:
        spool.keep_manifest(MANIFEST)
        for first in (0, 10, 20, 30):
            await spool.until_safe(spool.append(readings(first, first + 10)))
        spool._retention._max_bytes = spool._card.bytes // 2
        await spool._retention._thin()
        await spool._commit()
        batch = await spool.take("r", "live", 3)
        assert batch is not None
        spool.confirm("r", batch)
        got = list(batch.readings)
    async with spool_in(tmp_path) as spool:
        got += await taken(spool)
    events = [one.event for one in got if one.event is not None and one.event.kind == "thinned"]
    covered = {seq for event in events for seq in range(event.first, (event.last or 0) + 1)} | set(own(got))
    assert covered == set(range(40))


async def test_a_replay_is_not_too_old_since_somebody_asked_for_it(tmp_path: Path) -> None:
    clock, terms = HandClock(), RouteTerms("r", ttl_ms=60_000)
    async with spool_in(tmp_path, terms, clock=clock, linger_ms=0) as spool:
        spool.append(readings(0, 5))
        await quiet(spool)
        assert own(await confirm_all(spool)) == [0, 1, 2, 3, 4]
        clock.pass_ms(100_000)
        await spool.replay("r", 1)
        assert own(await taken(spool)) == [0, 1, 2, 3, 4]
        assert (await spool.status()).ledger == {}


async def test_of_what_only_removed_routes_want_alarms_are_given_up_last(tmp_path: Path) -> None:
    async with spool_in(tmp_path, "old", "r") as spool:
        await spool.until_safe(spool.append(readings(0, 10), urgent={3}))
        await confirm_all(spool, "r")
    async with spool_in(tmp_path, "r", full="drop-oldest") as spool:
        assert await spool._retention._forget_delivered()
        await spool._commit()
        given_up = [event for _, event in await spool.ledger(9)]
        assert given_up and all(event.first != 3 for event in given_up)


async def test_what_is_given_up_names_every_route_that_wanted_it_removed_ones_too(tmp_path: Path) -> None:
    async with spool_in(tmp_path, "old", "a", "b") as spool:
        await spool.until_safe(spool.append(readings(0, 5)))
        await confirm_all(spool, "b")
    async with spool_in(tmp_path, "a", "b") as spool:
        assert await spool._retention._give_up(LaneName.BULK, "max_bytes")
        await spool._commit()
        assert [event.why for _, event in await spool.ledger(9)] == ["given up: max_bytes (route a, old)"]


async def test_what_is_given_up_while_there_is_no_route_names_none(tmp_path: Path) -> None:
    spool = spool_in(tmp_path)
    spool._routes = ()
    async with spool:
        await spool.until_safe(spool.append(readings(0, 5)))
        assert await spool._retention._give_up(LaneName.BULK, "max_bytes")
        await spool._commit()
        assert [event.why for _, event in await spool.ledger(9)] == ["given up: max_bytes"]


async def test_a_replay_over_what_is_not_kept_any_more_is_no_damage(tmp_path: Path) -> None:
    async with spool_in(tmp_path) as spool:
        for first in (0, 5, 10):
            await spool.until_safe(spool.append(readings(first, first + 5)))
        await confirm_all(spool)
        infos = await spool._card.run(spool._card.log.infos, LaneName.BULK, 0, limit=-1)
        spool.queue.forget_delivered(infos[1])
        generation = spool.generation
        assert await spool.replay("r", 1) == 10
        assert own(await confirm_all(spool)) == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
        assert ((await spool.status()).ledger, spool.generation) == ({}, generation)


async def test_a_batch_that_is_pruned_while_the_limits_are_looked_at_is_no_damage(tmp_path: Path) -> None:
    async with spool_in(tmp_path) as spool:
        await spool.until_safe(spool.append(readings(0, 5)))
        await confirm_all(spool)
        (info,) = await spool._card.run(spool._card.log.infos, LaneName.BULK, 0, limit=-1)
        spool.queue.forget_delivered(info)
        await spool._commit()
        assert await spool._retention._whole(info) is None
        assert not await spool._retention._give_up_these([info], "max_bytes")


async def test_a_replay_that_is_given_up_is_no_gap_for_it_was_delivered_before(tmp_path: Path) -> None:
    async with spool_in(tmp_path) as spool:
        await spool.until_safe(spool.append(readings(0, 5)))
        await confirm_all(spool)
        await spool.replay("r", 1)
        assert await spool._retention._give_up(LaneName.BULK, "max_bytes")
        assert (own(await taken(spool)), (await spool.status()).ledger) == ([], {})


async def test_what_small_batches_had_of_a_boot_is_given_up_in_one_record(tmp_path: Path) -> None:
    async with spool_in(tmp_path) as spool:
        for first in range(0, 50, 5):
            await spool.until_safe(spool.append(readings(first, first + 5)))
        assert await spool._retention._give_up(LaneName.BULK, "max_bytes")
        await spool._commit()
        assert [(event.first, event.last) for _, event in await spool.ledger(9)] == [(0, 49)]


def test_thinned_rows_keep_their_order_also_where_one_is_missing_among_them() -> None:
    rows = [reading(seq) for seq in (1, 2, 3, 4, 6, 7, 9, 11, 12)]
    thinned = thin(rows, {MANIFEST.hash: MANIFEST}, lambda event: reading(0, event=event))
    assert [one.event.first if one.event else one.seq for one in thinned] == [1, 6, 9, 11]


async def test_what_one_of_two_uplinks_refused_is_not_safe_before_that_is_written(tmp_path: Path) -> None:
    clock = HandClock()
    async with spool_in(tmp_path, "a", "b", clock=clock) as spool:
        for route in "ab":
            spool.link(route, up=True, durable=True)
        ticket = spool.append([reading(0)])
        await confirm_all(spool, "a")
        batch = await spool.take("b", "live", 9)
        assert batch is not None
        spool.set_aside("b", batch.readings[0], "too large")
        spool.confirm("b", batch)
        assert not spool.is_safe(ticket)  # a power cut now would leave no trace of it for b
        clock.pass_ms(1000)
        await quiet(spool)
        assert spool.is_safe(ticket)
