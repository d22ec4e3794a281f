"""What arrives at a far side, for who wants to watch it there.

    async with aclosing(consume("amqp://watcher@broker.example/%2F?exchange=plant", password="...")) as arriving:
        async for message_id, body, encoding in arriving:
            ...

The URL says from where:

- `mqtt://user@host:port/topic/filter`; `?version=3.1.1` for an old broker (no id and no encoding then);
- `amqp://user@host:port/vhost?queue=NAME` takes the messages **out of** that queue: nobody else gets them;
- `amqp://user@host:port/vhost?exchange=NAME&key=PATTERN` gets copies in a queue of its own, which ends with the
  connection; what arrives while it is lost isn't seen. `key` is `#` (all) unless given.

`mqtts://` and `amqps://` have the options of `Address`, too. Only transport happens here; what is in a body, its
reader knows.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, NamedTuple

import aiomqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from .errors import ConfigError, Unreachable
from .uplinks.address import Address
from .uplinks.amqp import Connection
from .uplinks.mqtt import VERSIONS, explain, join, leave, quiet

PREFETCH = 100
"""How many messages the far side may send ahead of those that are handled."""

PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""The wait before the first and before the later attempts to come back, doubled each time."""


class Arrival(NamedTuple):
    """One message as it arrived; `id` and `encoding` are empty where the far side doesn't say."""

    id: str
    body: bytes
    encoding: str


def check(url: str) -> Address:
    """Where `url` points to. Raises ConfigError when nothing could be consumed from there."""
    address = Address.parse(url, "amqp", "amqps", "mqtt", "mqtts")
    if address.scheme.startswith("mqtt"):
        address.check_options("version")
        if not address.path:
            raise ConfigError(["url: names no topic; write mqtt://host:port/topic, or /%23 for all"])
        if address.option("version", "5") not in VERSIONS:
            raise ConfigError([f"url: version is {' or '.join(VERSIONS)}"])
    else:
        address.check_options("queue", "exchange", "key")
        if bool(address.option("queue")) == bool(address.option("exchange")):
            raise ConfigError(["url: names no source; write ?queue=NAME (takes them) or ?exchange=NAME (copies)"])
    return address


async def consume(
    url: str,
    *,
    password: str = "",
    changed: Callable[[bool, str], None] | None = None,
    timeout_s: float = 10.0,
) -> AsyncGenerator[Arrival, None]:
    """Every message that arrives at `url`, for ever; comes back by itself when the connection is lost.

    A message is acknowledged when the next one is asked for, so one that was being handled when the process was
    killed comes again (from a queue). `changed` is told each time the connection is there (True and where) or
    lost (False and why), not each attempt. Raises ConfigError for a URL without a source, and nothing else.
    """
    address = check(url).login("", password)
    arrivals = _from_mqtt if address.scheme.startswith("mqtt") else _from_amqp
    tell = _Changes(changed)
    pause_s = PAUSE_S
    while True:
        try:
            async with aclosing(arrivals(address, timeout_s, tell)) as source:
                async for arrival in source:
                    yield arrival
        except Unreachable as lost:
            if tell.up:
                pause_s = PAUSE_S
            tell(False, str(lost))
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


class _Changes:
    """Tells changes, not repetitions."""

    def __init__(self, changed: Callable[[bool, str], None] | None) -> None:
        self.up: bool | None = None
        self._changed = changed

    def __call__(self, up: bool, text: str) -> None:
        if up is not self.up and self._changed is not None:
            self._changed(up, text)
        self.up = up


async def _from_amqp(address: Address, timeout_s: float, tell: _Changes) -> AsyncGenerator[Arrival, None]:
    """What one connection brings. Raises Unreachable when it ends."""
    connection = Connection(address, timeout_s=timeout_s, heartbeat_s=20)
    arrived: asyncio.Queue[tuple[Any, Any, bytes] | None] = asyncio.Queue()
    try:
        await connection.open()
        connection.gone.add_done_callback(lambda _: arrived.put_nowait(None))
        channel = connection.channel
        # The broker cancels a consumer when its queue is deleted.
        channel.add_on_cancel_callback(lambda _: connection.abort(f"{address}: the queue was deleted"))
        queue = address.option("queue") or await _own_queue(connection)
        await connection.call(channel.basic_qos, prefetch_count=PREFETCH)
        await connection.call(
            channel.basic_consume,
            queue=queue,
            on_message_callback=lambda _, method, properties, body: arrived.put_nowait((method, properties, body)),
        )
        tell(True, str(address))
        while True:
            item = await arrived.get()
            if item is None or connection.gone.done():
                raise Unreachable(connection.reason)
            method, properties, body = item
            yield Arrival(properties.message_id or "", body, properties.content_encoding or "")
            if not connection.gone.done():
                channel.basic_ack(method.delivery_tag)
    finally:
        await connection.close()


async def _own_queue(connection: Connection) -> str:
    """A queue that gets copies of what its exchange takes, and ends with the connection."""
    channel, address = connection.channel, connection.address
    declared = await connection.call(channel.queue_declare, queue="", exclusive=True, auto_delete=True)
    name: str = declared.method.queue
    await connection.call(
        channel.queue_bind,
        queue=name,
        exchange=address.option("exchange"),
        routing_key=address.option("key", "#"),
    )
    return name


async def _from_mqtt(address: Address, timeout_s: float, tell: _Changes) -> AsyncGenerator[Arrival, None]:
    """What one connection brings. Raises Unreachable when it ends."""
    version = address.option("version", "5")
    properties: Any = None
    if version == "5":
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.ReceiveMaximum = PREFETCH
    client = aiomqtt.Client(
        address.host,
        address.port,
        username=address.user or None,
        password=address.password or None,
        protocol=VERSIONS[version],
        clean_session=None if version == "5" else True,
        timeout=timeout_s,
        keepalive=20,
        properties=properties,
        tls_context=address.tls(),
        logger=quiet,
    )
    paho: Any = client._client
    paho.connect_timeout = timeout_s
    paho.manual_ack_set(True)
    try:
        await join(client, address)
        await client.subscribe(str(address.path), qos=1)
        tell(True, f"{address}/{address.path}")
        async for message in client.messages:
            named = dict(getattr(message.properties, "UserProperty", ()))
            body = message.payload if isinstance(message.payload, bytes) else b""
            yield Arrival(named.get("id", ""), body, named.get("content-encoding", ""))
            if message.qos:
                paho.ack(message.mid, message.qos)
    except aiomqtt.MqttError as fault:
        raise Unreachable(f"{address}: {explain(fault, address)}") from None
    finally:
        leave(client)
