"""Watching a far side, against the real ones."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path

import aiomqtt
import pytest
from fieldpost import upstream
from fieldpost.errors import ConfigError
from fieldpost.uplinks.amqp import AmqpSettings, AmqpUplink
from fieldpost.uplinks.base import Message
from fieldpost.uplinks.mqtt import MqttSettings, MqttUplink
from fieldpost.upstream import Arrival, consume
from servers import Mosquitto, RabbitMQ


def message(number: int) -> Message:
    return Message(f"n.i.1.{number}", b"body %d" % number, "application/senml+json", "deflate", 1)


def arrival(number: int) -> Arrival:
    return Arrival(f"n.i.1.{number}", b"body %d" % number, "deflate")


async def take(arriving: AsyncGenerator[Arrival, None], count: int) -> list[Arrival]:
    """The next `count`; the last of them is not acknowledged yet."""
    async with asyncio.timeout(15):
        return [await anext(arriving) for _ in range(count)]


class Changes:
    """What `changed` is told."""

    def __init__(self) -> None:
        self.told: list[tuple[bool, str]] = []
        self._news = asyncio.Event()

    def __call__(self, up: bool, text: str) -> None:
        self.told.append((up, text))
        self._news.set()

    async def until(self, up: bool) -> str:
        async with asyncio.timeout(30):
            while not self.told or self.told[-1][0] is not up:
                self._news.clear()
                await self._news.wait()
        return self.told[-1][1]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Come back soon."""
    monkeypatch.setattr(upstream, "PAUSE_S", 0.05)
    monkeypatch.setattr(upstream, "LONGEST_PAUSE_S", 0.1)


@pytest.fixture
async def queue(rabbitmq: RabbitMQ) -> AsyncIterator[str]:
    """The name of a queue that ends with the test."""
    name = f"watch-{uuid.uuid4().hex[:8]}"
    yield name
    await asyncio.to_thread(rabbitmq.delete, name)


async def deliver_amqp(rabbitmq: RabbitMQ, queue: str, numbers: range, exchange: str = "") -> None:
    settings = AmqpSettings(rabbitmq.url(), queue=queue, exchange=exchange, routing_key=f"to.{queue}", timeout_s=5)
    uplink = AmqpUplink(settings)
    await uplink.open()
    await asyncio.gather(*(uplink.deliver(message(number)) for number in numbers))
    await uplink.close()


async def test_queue_gives_each_message_and_keeps_what_was_not_handled(rabbitmq: RabbitMQ, queue: str) -> None:
    await deliver_amqp(rabbitmq, queue, range(250))
    url = rabbitmq.url(password="", query=f"?queue={queue}")
    async with aclosing(consume(url, password=rabbitmq.password)) as arriving:
        assert await take(arriving, 201) == [arrival(number) for number in range(201)]
    left = await asyncio.to_thread(rabbitmq.drain, queue)
    # In which order RabbitMQ puts back what was on its way is its own affair; that each is there once is ours.
    assert sorted(each.id for each in left) == [f"n.i.1.{number}" for number in range(200, 250)]


async def test_exchange_gives_copies(rabbitmq: RabbitMQ, queue: str) -> None:
    changes = Changes()
    url = rabbitmq.url(query=f"?exchange=amq.topic&key=to.{queue}")
    async with aclosing(consume(url, changed=changes)) as arriving:
        first = asyncio.create_task(take(arriving, 5))
        await changes.until(True)
        await deliver_amqp(rabbitmq, queue, range(5), exchange="amq.topic")
        assert await first == [arrival(number) for number in range(5)]
    assert len(await asyncio.to_thread(rabbitmq.drain, queue)) == 5


async def test_queue_that_does_not_exist_is_waited_for(rabbitmq: RabbitMQ, queue: str, quick: None) -> None:
    changes = Changes()
    url = rabbitmq.url(query=f"?queue={queue}")
    async with aclosing(consume(url, changed=changes)) as arriving:
        first = asyncio.create_task(take(arriving, 1))
        assert f"no queue '{queue}'" in await changes.until(False)
        await deliver_amqp(rabbitmq, queue, range(1))
        assert await first == [arrival(0)]
        then = asyncio.create_task(take(arriving, 1))
        await asyncio.sleep(0)
        await asyncio.to_thread(rabbitmq.delete, queue)
        await changes.until(False)
        await deliver_amqp(rabbitmq, queue, range(1, 2))
        assert await then == [arrival(1)]
    assert [up for up, _ in changes.told] == [False, True, False, True]


async def test_wrong_password_is_told_without_it(rabbitmq: RabbitMQ, queue: str) -> None:
    changes = Changes()
    url = rabbitmq.url(password="wr0ng", query=f"?queue={queue}")
    async with aclosing(consume(url, changed=changes)) as arriving:
        first = asyncio.create_task(take(arriving, 1))
        text = await changes.until(False)
        assert "login refused" in text
        assert "wr0ng" not in text
        first.cancel()
        await asyncio.wait({first})


@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_topic_gives_each_message_and_comes_back(tmp_path: Path, quick: None, version: str) -> None:
    changes = Changes()
    server = Mosquitto(tmp_path / "far").start()
    url = f"{server.url()}/plant/%23?version={version}"
    uplink = MqttUplink(MqttSettings(server.url(), topic="plant/up", timeout_s=5))
    async with aclosing(consume(url, changed=changes)) as arriving:
        first = asyncio.create_task(take(arriving, 250))
        await changes.until(True)
        await uplink.open()
        await asyncio.gather(*(uplink.deliver(message(number)) for number in range(250)))
        got = await first
        assert [each.body for each in got] == [message(number).body for number in range(250)]
        assert got[7] == (arrival(7) if version == "5" else Arrival("", b"body 7", ""))
        then = asyncio.create_task(take(arriving, 1))
        server.kill9()
        await changes.until(False)
        await asyncio.to_thread(server.start)
        await changes.until(True)
        await uplink.open()
        await uplink.deliver(message(251))
        assert [each.body for each in await then] == [b"body 251"]
        await uplink.close()
    assert [up for up, _ in changes.told] == [True, False, True]
    server.stop()


async def test_silent_broker_is_told(tmp_path: Path, quick: None) -> None:
    changes = Changes()
    with Mosquitto(tmp_path / "far") as server:
        server.pause()
        async with aclosing(consume(f"{server.url()}/plant", changed=changes, timeout_s=0.5)) as arriving:
            first = asyncio.create_task(take(arriving, 1))
            assert "no answer" in await changes.until(False)
            server.resume()
            await changes.until(True)
            async with aiomqtt.Client("127.0.0.1", server.port) as client:
                await client.publish("plant", b"by hand", qos=1)
            assert await first == [Arrival("", b"by hand", "")]


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("mqtt://host", "names no topic"),
        ("mqtt://host/t?version=4", "version is 5 or 3.1.1"),
        ("amqp://host/", "names no source"),
        ("amqp://host/?queue=a&exchange=b", "names no source"),
        ("amqp://host/?queu=a", "no option 'queu'"),
        ("http://host/", "starts with 'http'"),
    ],
)
async def test_url_without_a_source_is_a_fault_of_configuration(url: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        await anext(consume(url))
