"""What an outage leaves behind: fresh readings first, history after them at its pace, and no uplink waits for another.

The far side is a real mosquitto; the line to it is cut and mended by the test.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from parts import Arrivals, Gateway, Line, OutboxNode, configure, table, temperature_of, until_async
from servers import Mosquitto, RabbitMQ

MakeGateway = Callable[..., Gateway]

pytestmark = pytest.mark.slow

BATCH = 50
AN_HOUR_EACH = BATCH / 3600
"""A pace at which a batch has an hour: of history one batch comes, and then no other while a test runs."""


def uplink(port: int, name: str = "up", **more: str | float) -> str:
    settings = {"url": f"mqtt://127.0.0.1:{port}", "topic": "t", "timeout_s": 2.0, **more}
    return table("uplinks", name=name, kind="mqtt", **settings)


def route(id: str = "all", uplink: str = "up", **more: float | str) -> str:
    return table("routes", id=id, uplink=uplink, **{"batch_readings": BATCH, "window": 4, **more})


def backlog(gateway: Gateway, id: str = "all") -> int:
    return next((one["backlog"] for one in gateway.status().get("routes", ()) if one["id"] == id), -1)


async def confirmed(gateway: Gateway, id: str = "all", within_s: float = 30.0) -> None:
    await until_async(lambda: backlog(gateway, id) == 0, f"route {id} has nothing waiting", within_s)


async def fresh_confirmed(gateway: Gateway) -> None:
    """Whatever may still wait is history."""
    await until_async(
        lambda: spans_of(gateway)["live"] == spans_of(gateway)["urgent"] == 0, "what is fresh is confirmed"
    )


def spans_of(gateway: Gateway, id: str = "all") -> dict[str, int]:
    """What a route has yet to confirm, by lane."""
    waiting: dict[str, int] = gateway.status()["spool"]["routes"][id]
    return waiting


async def arrived(gateway: Gateway, arrivals: Arrivals, count: int) -> None:
    """Everything is confirmed, and so many rows have arrived."""
    await confirmed(gateway)
    await until_async(lambda: len(arrivals.seqs()) >= count, f"{count} rows have arrived")


async def restarted(gateway: Gateway, tables: str, *, kill: bool = False) -> None:
    """The same gateway, ended cleanly or killed, with other uplinks and routes."""
    if kill:
        await asyncio.to_thread(gateway.kill9)
    else:
        assert await asyncio.to_thread(gateway.stop) == 0
    configure(gateway, tables)
    await asyncio.to_thread(gateway.start)


def judge(arrivals: Arrivals, count: int) -> None:
    """Every row is there, with what was measured in it; none was given up."""
    assert sorted(arrivals.seqs()) == list(range(count))
    assert all(row.values["temperature"][0] == temperature_of(row.seq) for row in arrivals.rows)
    assert arrivals.gaps == []


@pytest.mark.parametrize("pace", ["backfill_readings_per_s", "backfill_bytes_per_s"])
async def test_fresh_readings_go_first_and_history_follows_marked_at_its_pace(
    make_gateway: MakeGateway, broker: Mosquitto, pace: str
) -> None:
    arrivals = Arrivals()
    async with Line(broker.port) as line, arrivals.reading(f"{broker.url()}/t"):
        slow = AN_HOUR_EACH if pace == "backfill_readings_per_s" else 0.1
        gateway = make_gateway(uplink(line.port) + route(**{pace: slow}))
        await asyncio.to_thread(gateway.start)
        async with OutboxNode(gateway) as node:
            await node.tell(100)
            await node.all_acked()
            await confirmed(gateway)
            line.cut()
            await node.tell(600)
            await node.all_acked()
            assert backlog(gateway) >= 600
            line.mend()
            await until_async(lambda: arrivals.seqs(lane="backfill"), "history begins")
            await node.tell(1000)
            await until_async(lambda: len(arrivals.seqs(lane="")) >= 1100, "fresh ones do not wait for history")
            assert len(arrivals.seqs(lane="backfill")) == BATCH
            await fresh_confirmed(gateway)
            status = gateway.status()["routes"][0]
            assert status["backlog"] == status["backfill"] == 700 - 100 - BATCH
            # Another pace is another configuration: what is left goes on where it stood.
            await restarted(gateway, uplink(line.port) + route())
            await arrived(gateway, arrivals, 1700)
    judge(arrivals, 1700)
    history = arrivals.seqs(lane="backfill")
    assert history == list(range(100, 700))  # all of it marked, and in order
    assert arrivals.seqs(lane="") == [*range(100), *range(700, 1700)]


async def test_a_second_outage_in_the_middle_of_the_backfill(make_gateway: MakeGateway, broker: Mosquitto) -> None:
    arrivals = Arrivals()
    async with Line(broker.port) as line, arrivals.reading(f"{broker.url()}/t"):
        paced = route(backfill_readings_per_s=200.0)
        gateway = make_gateway(uplink(line.port) + paced)
        await asyncio.to_thread(gateway.start)
        async with OutboxNode(gateway) as node:
            await node.tell(100)
            await node.all_acked()
            await confirmed(gateway)
            line.cut()
            await node.tell(600)  # 100-699
            await node.all_acked()
            line.mend()
            await until_async(lambda: len(arrivals.seqs(lane="backfill")) >= 2 * BATCH, "the backfill is under way")
            await node.tell(50)  # 700-749, live
            await until_async(lambda: 749 in arrivals.seqs(lane=""), "a fresh one between the outages")
            await fresh_confirmed(gateway)
            line.cut()
            cut_at = len(arrivals.seqs(lane="backfill"))
            assert cut_at < 600
            await node.tell(400)  # 750-1149
            await node.all_acked()
            line.mend()
            await until_async(lambda: gateway.status()["routes"][0]["state"] == "up", "the line is back")
            assert spans_of(gateway)["spans"] == 2
            await node.tell(50)  # 1150-1199, live
            await until_async(lambda: 1199 in arrivals.seqs(lane=""), "a fresh one after both")
            assert len(arrivals.seqs(lane="backfill")) < 1000
            await arrived(gateway, arrivals, 1200)
            assert spans_of(gateway)["spans"] == 0
    judge(arrivals, 1200)
    assert arrivals.seqs(lane="backfill") == [*range(100, 700), *range(750, 1150)]  # the older outage first
    assert arrivals.repeats <= 2 * 4 * BATCH  # a window at each cut


async def test_urgent_readings_overtake_an_outage_of_others(make_gateway: MakeGateway, broker: Mosquitto) -> None:
    arrivals = Arrivals()
    rule = table("urgent", node="n*", channel="temperature", above=24.98)  # each 500th: seq 499, 999
    async with Line(broker.port) as line, arrivals.reading(f"{broker.url()}/t"):
        gateway = make_gateway(uplink(line.port) + route(backfill_readings_per_s=AN_HOUR_EACH) + rule)
        await asyncio.to_thread(gateway.start)
        line.cut()
        async with OutboxNode(gateway) as node:
            await node.tell(1200)
            await node.all_acked()
            line.mend()
            await until_async(lambda: len(arrivals.seqs()) >= 2 + BATCH, "the line is back")
            assert arrivals.seqs()[:2] == [499, 999]
            assert arrivals.seqs(lane="urgent") == [499, 999]
            await until_async(lambda: backlog(gateway) == 1200 - 2 - BATCH, "these are confirmed")
            await node.tell(300)
            await until_async(lambda: 1499 in arrivals.seqs(), "one more")
            assert arrivals.seqs(lane="urgent") == [499, 999, 1499]
            await restarted(gateway, uplink(line.port) + route() + rule)
            await arrived(gateway, arrivals, 1500)
    judge(arrivals, 1500)


async def test_neither_a_dead_nor_a_silent_far_side_holds_up_another(
    make_gateway: MakeGateway, broker: Mosquitto, rabbitmq: RabbitMQ, tmp_path: Path
) -> None:
    # Whoever waited for one of these two would do so for 300 s.
    password = tmp_path / "rabbit.password"
    password.touch(0o600)
    password.write_text(rabbitmq.password)
    queue = f"silent-{uuid.uuid4().hex[:8]}"
    silent = table(
        "uplinks",
        name="silent",
        kind="amqp",
        url=rabbitmq.url(rabbitmq.user, password=""),
        password_file=str(password),
        queue=queue,
        timeout_s=300.0,
    )
    arrivals = Arrivals()
    with Mosquitto(tmp_path / "dead") as dead, Mosquitto(tmp_path / "still") as still:
        tables = uplink(broker.port) + uplink(dead.port, "dead", timeout_s=300.0) + silent
        tables += uplink(still.port, "still", timeout_s=300.0)
        tables += route() + route("dead", "dead") + route("silent", "silent") + route("still", "still")
        gateway = make_gateway(tables)
        async with arrivals.reading(f"{broker.url()}/t"):
            await asyncio.to_thread(gateway.start)
            routes = ("all", "dead", "silent", "still")
            await until_async(lambda: all(one["state"] == "up" for one in gateway.status()["routes"]), "all are up")
            async with OutboxNode(gateway) as node:
                await node.tell(100)
                await node.all_acked()
                for id_ in routes:
                    await confirmed(gateway, id_)
                dead.kill9()
                still.pause()
                rabbitmq.pause()
                try:
                    await node.tell(3000)
                    await node.all_acked()
                    await arrived(gateway, arrivals, 3100)
                    assert len(arrivals.seqs()) == 3100
                    assert all(backlog(gateway, id_) >= 3000 for id_ in routes[1:])
                finally:
                    rabbitmq.resume()
                    still.resume()
                dead.start()
                for id_ in routes[1:]:
                    await confirmed(gateway, id_, within_s=45)
    judge(arrivals, 3100)
    assert arrivals.repeats == 0 and arrivals.seqs(lane="") == list(range(3100))  # no other's outage was its own
    rest = Arrivals()
    for message in await asyncio.to_thread(rabbitmq.drain, queue):
        rest.take(message.body)
    judge(rest, 3100)


async def test_progress_survives_whatever_is_changed_in_the_configuration(
    make_gateway: MakeGateway, broker: Mosquitto
) -> None:
    arrivals = Arrivals()
    async with Line(broker.port) as line, arrivals.reading(f"{broker.url()}/t/+"):
        slow = {"backfill_readings_per_s": AN_HOUR_EACH}
        gateway = make_gateway(uplink(line.port, topic="t/1") + route(**slow))
        await asyncio.to_thread(gateway.start)
        line.cut()
        async with OutboxNode(gateway) as node:
            await node.tell(1000)
            await node.all_acked()
        line.mend()
        await until_async(lambda: len(arrivals.seqs()) == BATCH, "the backfill begins")
        await until_async(lambda: backlog(gateway) <= 1000 - BATCH, "and is confirmed")
        for tables, batch in (
            (uplink(line.port, "renamed", topic="t/1") + route(uplink="renamed", **slow), BATCH),
            (uplink(line.port, topic="t/1") + route(batch_readings=70, window=2, **slow), 70),
            (uplink(line.port, topic="t/2") + route(batch_readings=30, window=8, **slow), 30),
            (uplink(line.port, topic="t/2", version="3.1.1") + route("new") + route(**slow), BATCH),
        ):
            before = len(arrivals.seqs())
            await restarted(gateway, tables)
            await until_async(lambda: len(arrivals.seqs()) == before + batch, "the next batch of history")  # noqa: B023
            await until_async(
                lambda: backlog(gateway) == 1000 - len(arrivals.seqs()),
                "it is confirmed",
            )
        await confirmed(gateway, "new")  # a new route begins with what is new
        await restarted(gateway, uplink(line.port, topic="t/2") + route(), kill=True)
        await arrived(gateway, arrivals, 1000)
    judge(arrivals, 1000)
    assert arrivals.seqs() == list(range(1000))
    assert arrivals.repeats <= 5 * BATCH  # the kill: what was confirmed since progress was last written


async def test_a_route_that_is_removed_and_comes_back_finds_what_it_had(
    make_gateway: MakeGateway, broker: Mosquitto
) -> None:
    arrivals = Arrivals()
    async with Line(broker.port) as line, arrivals.reading(f"{broker.url()}/t"):
        other = uplink(broker.port, "there", topic="there") + route("other", "there")
        gateway = make_gateway(uplink(line.port) + route() + other)
        await asyncio.to_thread(gateway.start)
        node = OutboxNode(gateway)
        line.cut()
        async with node:
            await node.tell(500)  # for both
            await node.all_acked()
        await restarted(gateway, other)
        assert gateway.status()["spool"]["removed"] == {"all": 500}
        async with node:
            await node.tell(200)  # for the other one
            await node.all_acked()
        await confirmed(gateway, "other")
        assert gateway.status()["spool"]["removed"] == {"all": 500}
        line.mend()
        await restarted(gateway, uplink(line.port) + route() + other)
        await confirmed(gateway)
        assert gateway.status()["spool"]["removed"] == {}
        async with node:
            await node.tell(100)  # for both
            await node.all_acked()
            await confirmed(gateway)
    assert arrivals.seqs(lane="backfill") == list(range(500))
    assert arrivals.seqs(lane="") == list(range(700, 800))


async def test_kills_in_the_middle_of_the_backfill_lose_nothing_and_repeat_what_was_not_noted(
    make_gateway: MakeGateway, broker: Mosquitto
) -> None:
    arrivals = Arrivals()
    async with Line(broker.port) as line, arrivals.reading(f"{broker.url()}/t"):
        paced = uplink(line.port) + route(backfill_readings_per_s=400.0)
        gateway = make_gateway(paced)
        await asyncio.to_thread(gateway.start)
        line.cut()
        node = OutboxNode(gateway)
        async with node:
            await node.tell(1500)
            await node.all_acked()
            line.mend()
            for past in (200, 600, 1000):
                await until_async(lambda: len(arrivals.seqs(lane="backfill")) >= past, "the backfill is under way")  # noqa: B023
                await asyncio.to_thread(gateway.kill9)
                await asyncio.to_thread(gateway.start)
            await node.tell_again()
            await node.tell(50)
            await until_async(lambda: 1549 in arrivals.seqs(lane=""), "a fresh one")
            await arrived(gateway, arrivals, 1550)
    judge(arrivals, 1550)
    assert arrivals.seqs(lane="backfill") == list(range(1500))
    # How far a drain is, is noted every 20,000 readings and every quarter of an hour: a kill takes it back to there.
    assert arrivals.repeats <= 200 + 600 + 1000 + 3 * 4 * BATCH


async def test_an_idle_uplink_that_was_lost_comes_back_without_anything_to_send(
    make_gateway: MakeGateway, broker: Mosquitto
) -> None:
    gateway = make_gateway(uplink(broker.port) + route())
    await asyncio.to_thread(gateway.start)
    await until_async(lambda: gateway.status()["routes"][0]["state"] == "up", "it is up")
    broker.kill9()
    await until_async(lambda: gateway.status()["routes"][0]["state"] != "up", "it is noticed")
    broker.start()
    await until_async(lambda: gateway.status()["routes"][0]["state"] == "up", "it is up again")
    assert "uplink up lost" in gateway.log() and "uplink up is back" in gateway.log()


async def test_two_routes_share_a_far_side_without_driving_each_other_off(
    make_gateway: MakeGateway, broker: Mosquitto
) -> None:
    arrivals = Arrivals()
    async with arrivals.reading(f"{broker.url()}/t"):
        gateway = make_gateway(uplink(broker.port) + route("one") + route("other"))
        await asyncio.to_thread(gateway.start)
        async with OutboxNode(gateway) as node:
            for _ in range(10):
                await node.tell(10)
                await node.all_acked()
            await confirmed(gateway, "one")
            await confirmed(gateway, "other")
            await until_async(lambda: arrivals.repeats == 100, "each row has arrived from both")
    assert "lost" not in gateway.log()
    judge(arrivals, 100)
