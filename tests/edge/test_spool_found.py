"""What test_spool_model.py has found, each as the shortest way to it."""

from __future__ import annotations

from pathlib import Path

from spools import own, readings, spool_in, taken


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
