"""The private names of aiomqtt that mqtt.py and the MQTT uplink stand on, and what they do with a real broker."""

from __future__ import annotations

import asyncio

import aiomqtt
import pytest
from fieldpost.errors import Unreachable
from fieldpost.mqtt import Address, Incoming, connect
from parts import until_async
from servers import Mosquitto


def address(broker: Mosquitto) -> Address:
    return Address("", "", port=broker.port)


async def test_the_private_names_are_there(broker: Mosquitto) -> None:
    client = aiomqtt.Client("127.0.0.1", broker.port)
    assert isinstance(client._disconnected, asyncio.Future) and isinstance(client._connected, asyncio.Future)
    for name in ("manual_ack_set", "ack", "publish", "on_message", "socket"):
        assert hasattr(client._client, name), name
    async with client:
        assert client._misc_task is not None


async def test_a_message_that_was_not_acknowledged_comes_again_to_the_next_session(broker: Mosquitto) -> None:
    came: list[Incoming] = []
    async with (
        connect(address(broker), "taker", came.append) as taker,
        connect(address(broker), "giver", came.append) as giver,
    ):
        await taker.subscribe([("a/#", 1)])
        for n in range(30):  # mosquitto has 20 on their way at once
            giver.publish("a/b", b"%d" % n)
        await until_async(lambda: len(came) == 20, "as many as go without an acknowledgement")
        for message in came[:20]:
            taker.acknowledge(message.mid)
        await until_async(lambda: len(came) == 30, "the rest")
    assert [message.payload for message in came] == [b"%d" % n for n in range(30)]


async def test_a_lost_connection_says_so_and_takes_nothing_more(broker: Mosquitto) -> None:
    async with connect(address(broker), "one", lambda message: None) as connection:
        broker.kill9()
        with pytest.raises(Unreachable):
            async with asyncio.timeout(10):
                await connection.lost()
        assert connection.is_lost
        connection.acknowledge(1)  # of an old connection: nothing happens
        with pytest.raises(Unreachable):
            connection.publish("a", b"b")


async def test_a_silent_broker_is_noticed_by_the_keepalive(broker: Mosquitto) -> None:
    async with connect(address(broker), "one", lambda message: None, keepalive_s=1) as connection:
        broker.pause()
        try:
            with pytest.raises(Unreachable):
                async with asyncio.timeout(10):
                    await connection.lost()
        finally:
            broker.resume()


async def test_nobody_there_is_unreachable_and_the_password_is_never_shown() -> None:
    nowhere = Address("me", "s3cret", port=1)
    with pytest.raises(Unreachable) as caught:
        async with connect(nowhere, "one", lambda message: None):
            pass
    assert "s3cret" not in str(caught.value) + repr(nowhere)
