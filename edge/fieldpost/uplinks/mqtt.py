"""An MQTT far side: any broker that speaks 5 or 3.1.1.

    uplink = MqttUplink(MqttSettings("mqtts://broker.example", topic="plant/fieldpost", client_id="plant"))
    await uplink.open()
    await uplink.deliver(message)       # QoS 1: the broker has acknowledged it
    await uplink.close()

What a broker acknowledges it need not keep: a plain Mosquitto has it in memory only, and one that nobody
subscribes to throws it away (with MQTT 5 `status` says so). With 3.1.1 there is no room for the message's id and
encoding beside the body, and no way for the broker to say no: it acknowledges and drops, or hangs up.

aiomqtt makes the connection. Publishing goes round it, to paho below (`_client`): aiomqtt's own `publish` doesn't
tell what the broker answered, and waits for its timeout when the connection is lost.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiomqtt
from paho.mqtt.client import MQTT_ERR_SUCCESS
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from ..errors import FieldpostError, Rejected, Unreachable
from .address import Address
from .base import Message, UplinkStatus, is_nobody

VERSIONS = {"5": aiomqtt.ProtocolVersion.V5, "3.1.1": aiomqtt.ProtocolVersion.V311}

NO_SUBSCRIBERS = 0x10
REFUSES_MESSAGE = {0x90, 0x95, 0x99}
"""MQTT 5, section 2.4: topic name invalid, packet too large, payload format invalid."""

BLAMES_MESSAGE = REFUSES_MESSAGE | {0x81, 0x82}
"""Reasons for a disconnection that may be a message's: also malformed packet and protocol error, which is what
comes of Mosquitto 2.0.11 when a message is over its `message_size_limit`."""

PACKET_OVERHEAD = 10
"""Fixed header (at most 5 bytes), topic length, packet identifier, rounded up."""

# The losses that aiomqtt and paho log are in our exceptions.
quiet = logging.getLogger("fieldpost.uplinks.mqtt.client")
quiet.setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True)
class MqttSettings:
    """`url` is `mqtt://host:port` or `mqtts://`, with the options of `Address`; `version` is "5" or "3.1.1".

    `window` is how many messages may be unacknowledged (fewer when the broker says so), `timeout_s` how many
    seconds any answer may take, `keepalive_s` how often an idle connection is looked after. An empty `client_id`
    is made up anew for each connection.
    """

    url: str
    topic: str = "fieldpost"
    username: str = ""
    password: str = field(default="", repr=False)
    client_id: str = ""
    version: str = "5"
    window: int = 100
    timeout_s: float = 15.0
    keepalive_s: int = 30


class MqttUplink:
    """Publishes each message to one topic and waits for its acknowledgement.

    Where the broker hangs up (MQTT 5) because of one of several messages, none is rejected at first, and after the
    next `open` messages go one by one until it is found.
    """

    def __init__(self, settings: MqttSettings) -> None:
        self.settings = settings
        self.address = Address.parse(settings.url, "mqtt", "mqtts").login(settings.username, settings.password)
        self.address.check_options()
        self._link: _Link | None = None
        self._suspicious = False
        self._state = "down"
        self._detail = ""
        self._messages = 0
        self._bytes = 0

    async def open(self) -> None:
        """Connect and log in. Raises Unreachable, which says what to look at."""
        await self.close()
        self._state, self._detail = "connecting", ""
        window = 1 if self._suspicious else self.settings.window
        link = _Link(self.settings, self.address, window)
        try:
            await link.open()
        except BaseException as fault:
            self._state, self._detail = "down", str(fault)
            raise
        self._link = link
        self._state = "up"

    async def deliver(self, message: Message) -> None:
        """Return once the broker has acknowledged `message`. Raises Unreachable or Rejected."""
        link = self._link
        if link is None:
            raise Unreachable(self._detail or f"{self.address}: not open")
        try:
            await link.deliver(message)
        except Unreachable as lost:
            self._state, self._detail = "down", str(lost)
            self._suspicious = self._suspicious or link.one_is_refused
            raise
        except Rejected:
            self._suspicious = False
            raise
        if self._suspicious and link.proven():
            self._suspicious = False
        self._messages += 1
        self._bytes += len(message.body)

    async def close(self) -> None:
        """Say goodbye; what is unacknowledged raises Unreachable."""
        link, self._link = self._link, None
        if link is not None:
            self._state = "down"
            link.lose(Unreachable("closed"))

    def status(self) -> UplinkStatus:
        """How it is."""
        state, detail = self._state, self._detail
        if self._link is not None and state == "up":
            if self._link.lost is not None:
                state, detail = "down", str(self._link.lost)
            elif self._link.unheard:
                detail = f"nobody subscribes to {self.settings.topic!r}: the broker throws the messages away"
        return UplinkStatus(state, detail, self._messages, self._bytes)


class _Link:
    """One connection and what is under way on it; it ends with that, so nothing of it reaches the next one."""

    def __init__(self, settings: MqttSettings, address: Address, window: int) -> None:
        self.lost: Unreachable | None = None
        self.one_is_refused = False
        self.unheard = False
        self._settings = settings
        self._address = address
        self._turn = asyncio.Lock()
        self._window = asyncio.Semaphore(window)
        self._allowed = settings.window
        self._doubtful = settings.window if window < settings.window else 0
        self._max_packet_bytes = 0
        self._waiting: dict[int, asyncio.Future[ReasonCode]] = {}
        self._client = aiomqtt.Client(
            address.host,
            address.port,
            username=address.user or None,
            password=address.password or None,
            identifier=settings.client_id or None,
            protocol=VERSIONS[settings.version],
            clean_session=True if settings.version == "3.1.1" else None,
            timeout=settings.timeout_s,
            keepalive=settings.keepalive_s,
            max_inflight_messages=settings.window,
            tls_context=address.tls(),
            logger=quiet,
        )
        self._paho: Any = self._client._client
        self._paho.connect_timeout = settings.timeout_s
        self._paho.on_publish = self._on_publish
        self._greet: Any = self._paho.on_connect
        self._paho.on_connect = self._on_connect

    async def open(self) -> None:
        try:
            await join(self._client, self._address)
        except Unreachable as lost:
            self.lose(lost)
            raise
        self._client._disconnected.add_done_callback(self._on_disconnected)

    async def deliver(self, message: Message) -> None:
        """Publish `message` when it is its turn, and wait for its acknowledgement."""
        seconds = self._settings.timeout_s
        # A call waits for its turn without a deadline: every call before it has one.
        async with self._turn:
            try:
                async with asyncio.timeout(seconds):
                    await self._window.acquire()
            except TimeoutError:
                raise self._fail(f"no room within {seconds:g} s") from None
            try:
                mid, waiter = self._publish(message)
            except BaseException:
                self._window.release()
                raise
        try:
            async with asyncio.timeout(seconds):
                answer = await waiter
        except TimeoutError:
            raise self._fail(f"no acknowledgement within {seconds:g} s") from None
        finally:
            self._waiting.pop(mid, None)
            self._window.release()
        self.unheard = answer.value == NO_SUBSCRIBERS
        if answer.value in REFUSES_MESSAGE:
            raise Rejected(f"{self._address}: {answer}")
        if answer.is_failure:
            raise self._fail(f"{answer}: check what user {self._address.user!r} may do, and its quota")

    def proven(self) -> bool:
        """Whether as many messages went well one by one as could have been the bad one; count this one."""
        self._doubtful -= 1
        if self._doubtful == 0:
            for _ in range(self._allowed - 1):
                self._window.release()
        return self._doubtful <= 0

    def lose(self, reason: Unreachable) -> None:
        """Leave the connection; what waits on it raises `reason`."""
        if self.lost is not None:
            return
        self.lost = reason
        waiting, self._waiting = self._waiting, {}
        for waiter in waiting.values():
            if not waiter.done():
                waiter.set_exception(Unreachable(str(reason)))
        leave(self._client)

    def _publish(self, message: Message) -> tuple[int, asyncio.Future[ReasonCode]]:
        if self.lost is not None:
            raise Unreachable(str(self.lost))
        properties: Any = self._properties(message)
        size = len(message.body) + len(self._settings.topic.encode()) + PACKET_OVERHEAD
        size += len(properties.pack()) if properties else 0
        if self._max_packet_bytes and size > self._max_packet_bytes:
            raise Rejected(f"{self._address}: {size} bytes, the broker takes {self._max_packet_bytes} at most")
        try:
            sent = self._paho.publish(self._settings.topic, message.body, qos=1, properties=properties)
        except (OSError, ValueError) as fault:
            raise self._fail(str(fault)) from fault
        if sent.rc != MQTT_ERR_SUCCESS:
            raise self._fail("connection lost")
        waiter: asyncio.Future[ReasonCode] = asyncio.get_running_loop().create_future()
        self._waiting[sent.mid] = waiter
        return sent.mid, waiter

    def _properties(self, message: Message) -> Properties | None:
        if self._settings.version != "5":
            return None
        properties: Any = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.ContentType = message.content_type
        properties.UserProperty = [("id", message.id), ("content-encoding", message.content_encoding)]
        return properties  # type: ignore[no-any-return]

    def _fail(self, reason: str) -> FieldpostError:
        """Give the connection up, if it isn't lost yet; the result is to be raised."""
        self.lose(Unreachable(f"{self._address}: {reason}"))
        return Unreachable(str(self.lost))

    def _on_connect(self, client: Any, data: Any, flags: Any, code: Any, properties: Any = None) -> None:
        """Note what the broker can take before anything is sent (MQTT 5, section 3.2.2.3)."""
        self._allowed = min(self._settings.window, getattr(properties, "ReceiveMaximum", 65535))
        if not self._doubtful:
            self._window = asyncio.Semaphore(self._allowed)
        self._max_packet_bytes = getattr(properties, "MaximumPacketSize", 0)
        self._greet(client, data, flags, code, properties)

    def _on_publish(self, client: Any, data: Any, mid: int, code: ReasonCode, properties: Any) -> None:
        waiter = self._waiting.pop(mid, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(code)

    def _on_disconnected(self, ended: asyncio.Future[None]) -> None:
        fault = None if ended.cancelled() else ended.exception()
        text = explain(fault, self._address) if fault else "the broker ended the connection"
        code = getattr(fault, "rc", None)
        if isinstance(code, ReasonCode) and code.value in BLAMES_MESSAGE:
            waiting = [waiter for waiter in self._waiting.values() if not waiter.done()]
            if len(waiting) == 1:
                waiting[0].set_exception(Rejected(f"{self._address}: {text} after this message"))
            self.one_is_refused = len(waiting) > 1
        self.lose(Unreachable(f"{self._address}: {text}"))


async def join(client: aiomqtt.Client, address: Address) -> None:
    """Connect and log in. Raises Unreachable, and has left then; after success `leave` is the caller's.

    paho connects in a thread, which can't be stopped: when this is cancelled, what it opened later is left then.
    """

    def leave_late(connecting: asyncio.Future[Any]) -> None:
        if not connecting.cancelled():
            connecting.exception()
        leave(client)

    connecting = asyncio.ensure_future(client.__aenter__())
    try:
        await asyncio.shield(connecting)
    except asyncio.CancelledError:
        connecting.add_done_callback(leave_late)
        raise
    except aiomqtt.MqttError as fault:
        leave(client)
        nobody = is_nobody(fault.__context__)  # aiomqtt has hidden it as the cause
        raise Unreachable(f"{address}: {explain(fault, address)}", nobody=nobody) from None


def leave(client: aiomqtt.Client) -> None:
    """Say goodbye and close the socket, at once: a far side that doesn't read must not keep it."""
    paho: Any = client._client
    paho.on_socket_register_write = None  # paho then writes by itself, now: the loop would only find a closed socket
    with suppress(OSError, ValueError):
        paho.disconnect()
    paho._sock_close()
    ended = client._disconnected
    if ended.done() and not ended.cancelled():
        ended.exception()  # asyncio logs what nobody looked at


def explain(fault: BaseException, address: Address) -> str:
    """What went wrong and where to look, in one line."""
    text = " ".join(str(fault).split())
    code = getattr(fault, "rc", None)
    value = code.value if isinstance(code, ReasonCode) else code
    if isinstance(fault, aiomqtt.exceptions.MqttConnectError) and value in (4, 5, 0x86, 0x87):
        return f"login refused for user {address.user!r}: check the user and the password"
    if text == "Operation timed out":
        return "no answer: check host and port, and that a broker listens there"
    return text
