"""What test_spool_model.py has found, each as the shortest way to it."""

from __future__ import annotations

from pathlib import Path

from fieldpost.spool import RouteTerms
from spools import HandClock, own, quiet, readings, spool_in, taken


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
