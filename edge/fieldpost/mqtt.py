"""A connection to the nodes' broker: aiomqtt (once asyncio-mqtt), thinly wrapped.

The public iterator of aiomqtt acknowledges a message before anybody has looked at it, and its queue drops messages
when it is bounded. So messages go straight from paho to `on_message`, and are acknowledged by `acknowledge` when
they are safe. That takes private names of aiomqtt 2.5.1 and paho (`_client`, `_disconnected`, `_sock`); a test guards
them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiomqtt
import msgspec
import paho.mqtt.client as paho

from .errors import Unreachable

KEEPALIVE_S = 10
"""A broker that falls silent is noticed within two of these."""

TIMEOUT_S = 10.0

GATHER_S = 0.005
GATHER_ABOVE_PER_S, GATHER_BELOW_BYTES = 100, 8192
"""Beyond so many turns a second, each with less than so much, packets are let gather for GATHER_S."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a broker listens: a unix `socket`, or `host` and `port`; and as whom to come."""

    username: str
    password: str = field(repr=False)
    host: str = "127.0.0.1"
    port: int = 1883
    socket: Path | None = None

    def __str__(self) -> str:
        return str(self.socket) if self.socket else f"{self.host}:{self.port}"


class Incoming(msgspec.Struct, frozen=True, gc=False):
    """A message from the broker. `mid` is what `acknowledge` wants; 0 where the message needs none."""

    topic: str
    payload: bytes
    mid: int
    retained: bool
    repeated: bool


class Connection:
    """An open connection; made by `connect`, of no use after it was lost."""

    def __init__(self, client: aiomqtt.Client, on_message: Callable[[Incoming], None]) -> None:
        self._aio = client
        self._paho = client._client
        self._on_message = on_message
        self._paho.on_message = self._take

    def read_and_write_in_bulk(self) -> None:
        """Put `_Bulk` under paho, and let one turn of the loop write in one go what it has to say.

        For every packet paho reads three times, writes once, and asks for a writer, for which aiomqtt wakes the loop
        through a pipe: at thousands of messages a second that costs more than the messages. Call it once connected.
        """
        loop = asyncio.get_running_loop()
        bulk: Any = _Bulk(self._paho.socket())
        self._paho._sock = bulk
        rate = _Rate()
        asked = gathers = False

        def ask(client: paho.Client, userdata: object, sock: Any) -> None:
            nonlocal asked
            if not asked:
                asked = True
                loop.call_soon(write)

        def write() -> None:
            nonlocal asked
            asked = False
            if self.is_lost or bulk.fileno() < 0:
                return
            try:
                self._paho.loop_write()
                if bulk.fileno() >= 0 and not bulk.flush():
                    loop.add_writer(bulk.fileno(), write)
            except OSError as error:
                self._lose(error)

        def read() -> None:
            nonlocal gathers
            try:
                bulk.fill()
                while bulk.readable and not self.is_lost:
                    if self._paho.loop_read() != paho.MQTT_ERR_SUCCESS:
                        break
            except OSError as error:
                self._lose(error)
            if self.is_lost or bulk.fileno() < 0:
                return
            # Many small packets, one by one: let some gather, each turn of the loop costs more than they do.
            gathered, gathers = gathers, rate.is_high(loop.time(), bulk.filled)
            if gathers:
                loop.call_later(GATHER_S, read)
            if gathers and not gathered:
                loop.remove_reader(bulk.fileno())
            elif gathered and not gathers:
                loop.add_reader(bulk.fileno(), read)

        self._paho.on_socket_register_write = ask
        loop.add_reader(bulk.fileno(), read)

    def _lose(self, error: OSError) -> None:
        if not self.is_lost:
            self._aio._disconnected.set_exception(error)

    async def subscribe(self, topics: list[tuple[str, int]]) -> None:
        """Returns after the broker's SUBACK. Raises Unreachable, also where the broker refuses a topic."""
        try:
            granted = await self._aio.subscribe(topics)
        except aiomqtt.MqttError as error:
            raise Unreachable(str(error)) from None
        codes = [code if isinstance(code, int) else code.value for code in granted]
        refused = [topic for (topic, _), code in zip(topics, codes, strict=True) if code >= 0x80]
        if refused:
            raise Unreachable(f"the broker lets us not subscribe to {', '.join(refused)}; look at its ACL")

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        """Hand a message to the connection and go on; what is lost with the connection is published again by
        whoever takes up the next one. Raises Unreachable."""
        info = self._paho.publish(topic, payload, qos, retain)
        if info.rc != paho.MQTT_ERR_SUCCESS:
            raise Unreachable(f"not published: {paho.error_string(info.rc)}")

    async def publish_and_wait(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish at QoS 1 and wait for the broker's PUBACK. Raises Unreachable."""
        try:
            await self._aio.publish(topic, payload, qos=1, retain=retain)
        except aiomqtt.MqttError as error:
            raise Unreachable(str(error)) from None

    def acknowledge(self, mid: int) -> None:
        """Send the PUBACK of a message that came at QoS 1 on this connection."""
        if mid and not self.is_lost:
            self._paho.ack(mid, 1)

    @property
    def is_lost(self) -> bool:
        return self._aio._disconnected.done()

    async def lost(self) -> None:
        """Wait until the connection is gone; raises Unreachable with the reason."""
        try:
            await asyncio.shield(self._aio._disconnected)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # whatever paho's callbacks ended with
            raise Unreachable(str(error) or type(error).__name__) from None
        raise Unreachable("disconnected")

    def _take(self, client: paho.Client, userdata: object, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = ""
        mid = message.mid if message.qos == 1 else 0
        self._on_message(Incoming(topic, bytes(message.payload), mid, message.retain, message.dup))


@asynccontextmanager
async def connect(
    address: Address,
    client_id: str,
    on_message: Callable[[Incoming], None],
    *,
    will: tuple[str, bytes] | None = None,
    keepalive_s: int = KEEPALIVE_S,
) -> AsyncIterator[Connection]:
    """Connect with a clean session: what was in flight on an older connection is never acknowledged on this one.

    `will` is (topic, payload), retained. Raises Unreachable.
    """
    client = aiomqtt.Client(
        hostname=str(address.socket) if address.socket else address.host,
        port=address.port,  # paho wants one, for a unix socket too
        transport="unix" if address.socket else "tcp",
        username=address.username or None,
        password=address.password or None,
        identifier=client_id,
        clean_session=True,
        keepalive=keepalive_s,
        timeout=TIMEOUT_S,
        max_inflight_messages=100,  # paho looks through its messages out at every acknowledgement
        will=aiomqtt.Will(will[0], will[1], qos=1, retain=True) if will else None,
    )
    client.pending_calls_threshold = 1000
    client._client.manual_ack_set(True)
    connection = Connection(client, on_message)
    try:
        await client.__aenter__()
    except aiomqtt.MqttError as error:
        _silence(client)
        raise Unreachable(f"{address}: {error}") from None
    connection.read_and_write_in_bulk()
    try:
        yield connection
    finally:
        client._client.on_socket_register_write = None  # paho then says goodbye by itself, at once
        with contextlib.suppress(aiomqtt.MqttError):
            await client.__aexit__(None, None, None)
        _silence(client)


class _Rate:
    """Whether packets come often and little by little: GATHER_ABOVE_PER_S turns in the last second or so."""

    def __init__(self) -> None:
        self._since = 0.0
        self._turns = 0
        self._is_high = False

    def is_high(self, now: float, received: int) -> bool:
        """One more turn, in which so many bytes came."""
        self._turns += received > 0
        if now - self._since >= 0.5:
            self._is_high = self._turns > GATHER_ABOVE_PER_S * (now - self._since)
            self._since, self._turns = now, 0
        return self._is_high and received < GATHER_BELOW_BYTES


class _Bulk:
    """A socket under paho that receives and sends in large pieces; what it does not know is the socket's own."""

    RECEIVE_BYTES = 65_536

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._in = b""
        self._at = 0
        self._out = bytearray()
        self._ended = False
        self.filled = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def fill(self) -> None:
        """Receive what there is, once; `filled` is how many bytes that were. Raises OSError."""
        self.filled = 0
        with contextlib.suppress(BlockingIOError):
            more = self._sock.recv(self.RECEIVE_BYTES)
            self._in, self._at = self._in[self._at :] + more, 0
            self._ended, self.filled = not more, len(more)

    @property
    def readable(self) -> bool:
        """Whether `recv` has something to say."""
        return self._at < len(self._in) or self._ended

    def recv(self, count: int) -> bytes:
        """Like a non-blocking socket's; nothing is an end."""
        at = self._at
        part = self._in[at : at + count]
        self._at = at + len(part)
        if not part and not self._ended:
            raise BlockingIOError
        return part

    def send(self, data: bytes) -> int:
        """Take all of it; `flush` sends it."""
        self._out += data
        return len(data)

    def flush(self) -> bool:
        """Send what the kernel takes; whether that was all. Raises OSError."""
        while self._out:
            try:
                del self._out[: self._sock.send(self._out)]
            except BlockingIOError:
                return False
        return True

    def close(self) -> None:
        """Send what is left, a goodbye perhaps, and close."""
        with contextlib.suppress(OSError):
            self.flush()
        self._sock.close()


def _silence(client: aiomqtt.Client) -> None:
    """Let go of a connection whatever state it is in: nobody else closes paho's socket after a fault."""
    client._client.on_message = None
    sock = client._client.socket()
    if sock is not None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(sock.fileno())
        loop.remove_writer(sock.fileno())
        sock.close()
    if client._misc_task is not None:
        client._misc_task.cancel()
    for future in (client._disconnected, client._connected):
        if future.done() and not future.cancelled():
            future.exception()  # looked at: it needs no warning that nobody did
