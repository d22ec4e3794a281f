"""An acknowledgement is a promise: what it rests on is killed, consumers are away, and every reading arrives.

The judge counts: each acknowledged row must be upstream, or come there by `fieldpost replay`; repeats carry the
same id and say the same. Gateways, brokers and far sides are real processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiomqtt
import pytest
from parts import (
    INSTALL,
    Arrivals,
    Gateway,
    OutboxNode,
    table,
    temperature_of,
    until,
    until_async,
)
from servers import Mosquitto, RabbitMQ

MakeGateway = Callable[..., Gateway]
OTHER_INSTALL = "b1b2c3d4e5f6"


@pytest.fixture
def password(tmp_path: Path, rabbitmq: RabbitMQ) -> Path:
    """A file with RabbitMQ's password."""
    file = tmp_path / "rabbit.password"
    file.touch(0o600)
    file.write_text(rabbitmq.password)
    return file


@pytest.fixture
def queue(rabbitmq: RabbitMQ) -> str:
    """A quorum queue that outlives a kill -9 of its broker, and that nobody reads."""
    name = f"promises-{uuid.uuid4().hex[:8]}"
    rabbitmq.declare(name, {"x-queue-type": "quorum"})
    rabbitmq.settle()
    return name


def to_rabbit(rabbitmq: RabbitMQ, password: Path, queue: str, name: str = "up", **more: str | float | bool) -> str:
    bare = rabbitmq.url(rabbitmq.user, password="")
    settings = {"timeout_s": 3.0, "queue": queue, "routing_key": queue, **more}
    return table("uplinks", name=name, kind="amqp", url=bare, password_file=str(password), **settings)


def to_mqtt(broker: Mosquitto, name: str = "up") -> str:
    return table("uplinks", name=name, kind="mqtt", url=broker.url(), topic="t", timeout_s=3.0)


def route(uplink: str = "up", id: str = "all") -> str:
    return table("routes", id=id, uplink=uplink)


def fieldpost(gateway: Gateway, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "fieldpost", *words, "--config", str(gateway.config)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def is_up(gateway: Gateway, uplinks: int = 1) -> bool:
    return sum(one["state"] == "up" for one in gateway.status().get("routes", ())) == uplinks


async def start(gateway: Gateway, uplinks: int = 1) -> None:
    await asyncio.to_thread(gateway.start)
    await until_async(lambda: is_up(gateway, uplinks), "the uplinks are up")


def drained(rabbitmq: RabbitMQ, queue: str) -> Arrivals:
    arrivals = Arrivals()
    for message in rabbitmq.drain(queue):
        arrivals.take(message.body)
    return arrivals


def nothing_waits(gateway: Gateway) -> bool:
    status = gateway.status()
    return bool(status) and not any(one["backlog"] for one in status["routes"])


def judge(arrivals: Arrivals, upto: int, **boot: object) -> None:
    """Everything up to a row is there, with what was measured in it."""
    assert sorted(arrivals.seqs(**boot)) == list(range(upto + 1))  # type: ignore[arg-type]
    assert all(row.values["temperature"][0] == temperature_of(row.seq) for row in arrivals.rows)


# What it rests on.


@pytest.mark.slow
def test_status_says_which_far_sides_keep_what_they_confirm(
    make_gateway: MakeGateway, rabbitmq: RabbitMQ, password: Path, broker: Mosquitto, queue: str
) -> None:
    for kind in ("classic", "stream"):
        rabbitmq.declare(f"{queue}-{kind}", {"x-queue-type": kind})
    kinds = {
        "quorum": to_rabbit(rabbitmq, password, queue, "quorum"),
        "stream": to_rabbit(rabbitmq, password, f"{queue}-stream", "stream", declare=False),
        "classic": to_rabbit(rabbitmq, password, f"{queue}-classic", "classic", queue_type="classic"),
        "believed": to_rabbit(rabbitmq, password, f"{queue}-classic", "believed", queue_type="classic", durable=True),
        "distrusted": to_rabbit(rabbitmq, password, queue, "distrusted", durable=False),
        "mqtt": to_mqtt(broker, "mqtt"),
    }
    gateway = make_gateway("".join(kinds.values()) + "".join(route(name, name) for name in kinds)).start()
    until(lambda: is_up(gateway, len(kinds)), "every uplink is up")
    keeps = {one["id"]: one["durable"] for one in gateway.status()["routes"]}
    expected = dict.fromkeys(kinds, False) | dict.fromkeys(("quorum", "stream", "believed"), True)
    assert keeps == expected
    told = fieldpost(gateway, "status")
    for name, is_kept in expected.items():
        assert re.search(rf"^{name} +up +{'yes' if is_kept else 'no'} ", told, re.MULTILINE), told


@pytest.mark.slow
async def test_what_a_durable_far_side_confirmed_is_acknowledged_without_a_write(
    make_gateway: MakeGateway, rabbitmq: RabbitMQ, password: Path, queue: str
) -> None:
    # Nothing but the far side's word can acknowledge before the linger is over, and the test is, long before.
    gateway = make_gateway(to_rabbit(rabbitmq, password, queue) + route(), spool="linger_s = 60.0")
    await start(gateway)
    async with OutboxNode(gateway) as node:
        before = gateway.status()["spool"]
        await node.tell(500)
        await node.all_acked()
        after = gateway.status()["spool"]
        assert (after["stored"], after["commits"]) == (before["stored"], before["commits"])
        assert after["in_memory"] >= 500  # kept for replays, to be written at leisure
    judge(await asyncio.to_thread(drained, rabbitmq, queue), 499)
    assert gateway.stop() == 0
    gateway.start()
    assert gateway.status()["spool"]["stored"] >= 500  # a clean end leaves nothing in memory


@pytest.mark.slow
async def test_a_far_side_that_keeps_is_killed_when_it_has_confirmed(
    make_gateway: MakeGateway, rabbitmq: RabbitMQ, password: Path, queue: str
) -> None:
    gateway = make_gateway(to_rabbit(rabbitmq, password, queue) + route(), spool="linger_s = 5.0")
    await start(gateway)
    async with OutboxNode(gateway) as node:
        await node.tell(1000, rows=20)
        await node.all_acked()
        assert gateway.status()["spool"]["stored"] == 0  # all of it rests on RabbitMQ
        more = asyncio.create_task(node.tell(1000, rows=20))
        await until_async(lambda: node.held > 1100, "acks in the middle of traffic")
        await asyncio.to_thread(rabbitmq.kill9)
        await more
        await node.all_acked()  # what it had not confirmed is written, and acknowledged by the card
        assert gateway.status()["spool"]["stored"] > 0
        await asyncio.to_thread(rabbitmq.start)
        await until_async(lambda: nothing_waits(gateway), "what waited is delivered", 60)
    judge(await asyncio.to_thread(drained, rabbitmq, queue), 1999)
    assert gateway.ask("ledger") == []


@pytest.mark.slow
async def test_a_gateway_is_killed_right_after_an_ack_that_rests_on_the_far_side_alone(
    make_gateway: MakeGateway, rabbitmq: RabbitMQ, password: Path, queue: str
) -> None:
    gateway = make_gateway(to_rabbit(rabbitmq, password, queue) + route(), spool="linger_s = 60.0")
    await start(gateway)
    node = OutboxNode(gateway)
    for round_ in range(3):
        async with node:
            await node.tell_again(rows=20)
            first = node.told
            more = asyncio.create_task(node.tell(200, rows=20))
            await until_async(lambda: node.held > first + 20 * round_, "acks in the middle of traffic")  # noqa: B023
            await asyncio.to_thread(gateway.kill9)
            await more_or_stuck(more, node)
        await start(gateway)
        assert (
            gateway.status()["spool"]["stored"] < 20
        )  # its own records at the most: the rows were nowhere but upstream
    async with node:
        await node.tell_again(rows=20)
        await node.tell(100, rows=20)
        await node.all_acked()
        await until_async(lambda: nothing_waits(gateway), "all is delivered")
    arrivals = await asyncio.to_thread(drained, rabbitmq, queue)
    judge(arrivals, node.told - 1)
    assert arrivals.repeats <= 3 * node.AHEAD * 20  # what was on its way
    assert arrivals.gaps == [] and gateway.ask("ledger") == []


async def more_or_stuck(more: asyncio.Task[None], node: OutboxNode) -> None:
    """The node goes on, until it is as far ahead of its acks as it may be."""
    await until_async(lambda: more.done() or node.told - node.held >= node.AHEAD * 20, "the node stops")
    more.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await more


@contextlib.asynccontextmanager
async def subscriber(broker: Mosquitto) -> AsyncIterator[aiomqtt.Client]:
    """A consumer whose subscription outlives its connection; the broker keeps what comes meanwhile, in memory."""
    async with aiomqtt.Client("127.0.0.1", broker.port, identifier="consumer", clean_session=False) as client:
        await client.subscribe("t", qos=1)
        yield client


@pytest.mark.slow
async def test_a_far_side_that_forgets_is_killed_when_it_has_confirmed(
    make_gateway: MakeGateway, broker: Mosquitto
) -> None:
    async with subscriber(broker):
        pass  # it was there, and is away
    gateway = make_gateway(to_mqtt(broker) + route(), spool="linger_s = 60.0")
    await start(gateway)
    async with OutboxNode(gateway) as node:
        await until_async(lambda: gateway.status()["spool"]["in_memory"] == 0, "its coming is written")
        committed = gateway.status()["spool"]["committed"]
        await node.tell(100)
        await until_async(lambda: gateway.status()["routes"][0]["confirmed"] >= 100, "the far side has confirmed")
        # Two messages hurry nobody, and no linger is over: had its word been enough, they would be acknowledged.
        assert gateway.status()["spool"]["committed"] == committed
        assert node.acks == []
        # Its going to sleep is told upstream at once, so that this is written, and with it all that waits.
        await node.publish("state", {"st": "sleep", "i": INSTALL, "b": 1, "c": 1, "s": 99})
        await node.all_acked()
        assert gateway.status()["spool"]["stored"] >= 100
        await until_async(lambda: nothing_waits(gateway), "the far side has confirmed it all")
    broker.kill9()
    broker.start()
    arrivals = Arrivals()
    async with subscriber(broker) as client:
        await until_async(lambda: is_up(gateway), "the uplink is back")
        told = fieldpost(gateway, "replay", "--route", "all", "--since", "1h")
        assert re.search(r"up to 1\d\d readings will be sent again", told)
        async with asyncio.timeout(30):
            async for message in client.messages:
                arrivals.take(bytes(message.payload))
                if len(arrivals.seqs()) == 100:
                    break
    judge(arrivals, 99)
    assert {row.lane for row in arrivals.rows} == {"backfill"}


# Identity.


@pytest.mark.slow
async def test_a_repeat_is_a_no_op_over_a_kill_and_no_gap_is_invented(
    make_gateway: MakeGateway, broker: Mosquitto
) -> None:
    gateway = make_gateway(to_mqtt(broker) + route())
    arrivals = Arrivals()
    async with arrivals.reading(f"{broker.url()}/t"):
        await start(gateway)
        node = OutboxNode(gateway)
        for _ in range(3):
            async with node:
                await node.tell_again()
                await node.tell(200)
                await node.all_acked()
                await node.tell(100)  # in the stage, or on the way to it
                await asyncio.to_thread(gateway.kill9)
            await start(gateway)
        async with node:
            for first in range(0, 500, 50):  # acknowledged long ago
                node.acks.clear()
                await node.send(first, 50, held=0)
                await until_async(lambda: node.acks, "a repeat is acknowledged")
            await until_async(lambda: gateway.status()["spool"]["repeats"] >= 500, "the repeats are recognised")
            await node.tell_again()
            await node.all_acked()
            await until_async(lambda: len(arrivals.seqs()) == node.told and nothing_waits(gateway), "all is upstream")
    judge(arrivals, node.told - 1)
    assert arrivals.repeats <= 3 * 300  # of a kill each: what was on its way, or confirmed and not noted yet
    assert arrivals.gaps == [] and gateway.ask("ledger") == []


@pytest.mark.slow
async def test_a_restored_backup_holds_up_no_node_and_numbers_nothing_twice(
    make_gateway: MakeGateway, broker: Mosquitto, tmp_path: Path
) -> None:
    gateway = make_gateway(to_mqtt(broker) + route())
    arrivals = Arrivals()
    async with arrivals.reading(f"{broker.url()}/t"):
        await start(gateway)
        node = OutboxNode(gateway)
        async with node:
            await node.tell(200)
            await node.all_acked()
        assert gateway.stop() == 0
        shutil.copytree(gateway.data, tmp_path / "backup")
        generation = await started_generation(gateway)
        async with node:
            await node.tell(200)
            await node.all_acked()
            await until_async(lambda: nothing_waits(gateway), "it is upstream")
            await node.tell(100)
        assert gateway.stop() == 0
        shutil.rmtree(gateway.data)
        shutil.copytree(tmp_path / "backup", gateway.data)
        assert await started_generation(gateway) != generation
        async with node:
            await node.tell_again()
            await node.tell(100)
            await node.all_acked()
            await until_async(lambda: len(arrivals.seqs()) == 600 and nothing_waits(gateway), "all is upstream")
    judge(arrivals, 599)  # and no id has come with two contents: `Arrivals` looks
    assert arrivals.gaps == [] and gateway.ask("ledger") == []


async def started_generation(gateway: Gateway) -> str:
    await start(gateway)
    return str(gateway.status()["spool"]["generation"])


@pytest.mark.slow
async def test_a_new_gateway_takes_over_nodes_in_the_middle_of_a_boot(
    make_gateway: MakeGateway, broker: Mosquitto, tmp_path: Path
) -> None:
    old, new = make_gateway(to_mqtt(broker) + route()), make_gateway(to_mqtt(broker) + route())
    arrivals = Arrivals()
    async with arrivals.reading(f"{broker.url()}/t"):
        await start(old)
        node = OutboxNode(old)
        async with node:
            await node.tell(200)
            await node.all_acked()
            await until_async(lambda: nothing_waits(old), "it is upstream")
            await asyncio.to_thread(old.kill9)
            await node.tell(100)
        await start(new)
        admit(node, new)
        async with node:
            await node.tell_again()
            await node.tell(100)
            await node.all_acked()
            await until_async(lambda: len(arrivals.seqs()) == 400 and nothing_waits(new), "all is upstream")
    judge(arrivals, 399)
    assert arrivals.gaps == [] and new.ask("ledger") == []


def admit(node: OutboxNode, gateway: Gateway) -> None:
    """Give a node the key for a gateway."""
    enrolled = gateway.ask("add", node=node.name)
    node.key, node.port = enrolled["key"], enrolled["port"]


@pytest.mark.slow
async def test_a_wiped_board_is_not_taken_for_its_former_self(make_gateway: MakeGateway, broker: Mosquitto) -> None:
    # A node whose flash was erased, or whose boot counter can't be read, makes itself a new install (PROTOCOL.md).
    gateway = make_gateway(to_mqtt(broker) + route())
    arrivals = Arrivals()
    async with arrivals.reading(f"{broker.url()}/t"):
        await start(gateway)
        async with OutboxNode(gateway, boot=7) as node:
            await node.tell(200)
            await node.all_acked()
        async with OutboxNode(gateway, install=OTHER_INSTALL, boot=1) as wiped:
            await wiped.tell(100)
            await wiped.all_acked()
            await until_async(lambda: nothing_waits(gateway) and len(arrivals.rows) >= 300, "all is upstream")
    judge(arrivals, 199, boot=7)
    judge(arrivals, 99, install=OTHER_INSTALL)
    assert arrivals.gaps == [] and gateway.ask("ledger") == [] and gateway.status()["spool"]["repeats"] == 0


@pytest.mark.slow
async def test_a_board_that_is_set_back_to_an_earlier_boot_is_named_and_loses_nothing(
    make_gateway: MakeGateway, broker: Mosquitto
) -> None:
    # Only somebody who copies an old image onto a board can do that; an unreadable counter makes a new install.
    gateway = make_gateway(to_mqtt(broker) + route())
    arrivals = Arrivals()
    async with arrivals.reading(f"{broker.url()}/t"):
        await start(gateway)
        async with OutboxNode(gateway, boot=7) as node:
            await node.tell(100)
            await node.all_acked()
        async with OutboxNode(gateway, boot=3) as node:
            await node.send(0, 50)
            await until_async(lambda: len(arrivals.seqs(boot=3)) == 50, "its rows are upstream")
            (known,) = gateway.status()["nodes"]
            assert known["boot"] == 3 and "both say that they are install" in known["conflict"]
    judge(arrivals, 99, boot=7)
    judge(arrivals, 49, boot=3)
    assert arrivals.gaps == [] and gateway.ask("ledger") == [] and gateway.status()["spool"]["repeats"] == 0


@pytest.mark.slow
async def test_the_ledger_and_the_gap_records_upstream_say_the_same(
    make_gateway: MakeGateway, broker: Mosquitto
) -> None:
    gateway = make_gateway(to_mqtt(broker) + route())
    arrivals = Arrivals()
    async with arrivals.reading(f"{broker.url()}/t"):
        await start(gateway)
        async with OutboxNode(gateway) as node:
            await node.tell(100)
            await node.all_acked()
            await node.send(130, 10, held=130, drops=[[100, 129]])
            await node.wait_acked(1, 139)
            await node.publish("state", {"st": "up", "i": INSTALL, "b": 1, "c": 1, "s": 149})
        await asyncio.to_thread(gateway.kill9)
        await start(gateway)
        async with OutboxNode(gateway, boot=2) as node:
            await node.tell(10)
            await node.all_acked()
            await until_async(lambda: len(arrivals.gaps) >= 2 and nothing_waits(gateway), "the gaps are upstream")
    (entries,) = [[(e["node"], e["boot"], e["first"], e["last"], e["why"]) for e in gateway.ask("ledger")]]
    assert sorted(entries) == sorted(arrivals.gaps)
    assert arrivals.gaps[0] == ("n1", 1, 100, 129, "dropped by the node")
    assert len(arrivals.gaps) == 2 and arrivals.gaps[1][:3] == ("n1", 1, 140)
    assert set(arrivals.seqs()) == set(range(100)) | set(range(130, 140))
