"""An AMQP 0-9-1 far side: RabbitMQ and what speaks like it.

    uplink = AmqpUplink(AmqpSettings("amqps://plant@broker.example/%2F", password="..."))
    await uplink.open()                 # connected, and there is a queue for our messages
    await uplink.deliver(message)       # the broker has it and answers for it
    await uplink.close()

A message is confirmed when the broker says so (publisher confirms), for a quorum queue: when a majority has it
on disk. pika's own connection is used, since aio-pika's costs several times the processor time for the same
messages and its robust one holds new messages for ever; but pika buffers without limit what is published while
the broker doesn't read, so nothing is published while it says `blocked`, and every wait has a deadline.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pika
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.exceptions import (
    AMQPError,
    AMQPHeartbeatTimeout,
    ChannelClosed,
    ConnectionClosed,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
    StreamLostError,
)

from ..errors import FieldpostError, Rejected, Unreachable
from .address import Address
from .base import Message, UplinkStatus, is_nobody

# pika tells each fault several times over, as errors with a trace. What is to be said is in our exceptions.
logging.getLogger("pika").setLevel(logging.CRITICAL)

T = TypeVar("T")

CLOSE_S = 2.0
"""How long the broker may take to answer a goodbye."""

PERSISTENT = 2
NOT_FOUND, ACCESS_REFUSED, PRECONDITION_FAILED, NOT_ALLOWED = 404, 403, 406, 530
CONTENT_TOO_LARGE = 311

DURABLE_QUEUES = ("quorum", "stream")
"""A classic queue confirms what is not on the disk yet."""

QUEUE_KIND = re.compile(r"inequivalent arg 'x-queue-type'.*current is '(\w+)'")
"""RabbitMQ 3.10: "inequivalent arg 'x-queue-type' for queue 'q' in ...: received 'classic' but current is 'quorum'"."""

TOO_LARGE = re.compile(r"larger than (?:configured )?max(?:imum)? size:? (\d+)")
"""RabbitMQ 3.10: "message size 1000001 is larger than configured max size 1000000"."""


@dataclass(frozen=True, slots=True)
class AmqpSettings:
    """`url` is `amqp://user@host:port/vhost` or `amqps://`, with the options of `Address`.

    With the default `exchange` messages go straight to `queue`, otherwise to `exchange`, which must exist, with
    `routing_key`. With `declare` the durable queue (and its binding) is made where there is none; without, it is
    only looked for. `queue_type` is `quorum` or `classic`.

    `durable`: `auto` asks the broker what the queue is; `yes` and `no` are believed.

    `window` is how many messages may be unconfirmed, `timeout_s` how many seconds any answer may take,
    `heartbeat_s` after how many a silent connection counts as lost (about twice that).
    """

    url: str
    username: str = ""
    password: str = field(default="", repr=False)
    exchange: str = ""
    routing_key: str = "fieldpost"
    queue: str = "fieldpost"
    declare: bool = True
    queue_type: str = "quorum"
    durable: str = "auto"
    window: int = 100
    timeout_s: float = 15.0
    heartbeat_s: int = 20


class _WholeMessages(AsyncioConnection):  # type: ignore[misc]
    """Writes the frames of a message in one piece: pika makes three packets of them, and three TLS records.

    The overridden name is private to pika 1.3; a test guards it.
    """

    def _output_marshaled_frames(self, marshaled_frames: Sequence[bytes]) -> None:
        super()._output_marshaled_frames([b"".join(marshaled_frames)])


class Connection:
    """A connection with one channel, for `AmqpUplink` and for who listens to a queue.

    `gone` is done once either of them is of no use any more, with the cause as its result. No wait in here
    takes longer than `timeout_s`.
    """

    def __init__(self, address: Address, *, timeout_s: float, heartbeat_s: int) -> None:
        loop = asyncio.get_running_loop()
        self.address = address
        self.timeout_s = timeout_s
        self.gone: asyncio.Future[Exception] = loop.create_future()
        self.blocked = ""
        self.on_blocked: Callable[[str], None] = lambda reason: None
        self.channel: Any = None
        self._ended: asyncio.Future[None] = loop.create_future()
        self._connection: Any = None
        tls = address.tls()
        self._parameters = pika.ConnectionParameters(
            host=address.host,
            port=address.port,
            virtual_host=address.path or "/",
            credentials=pika.PlainCredentials(address.user or "guest", address.password),
            heartbeat=heartbeat_s,
            connection_attempts=1,
            socket_timeout=timeout_s,
            stack_timeout=timeout_s,
            ssl_options=pika.SSLOptions(tls, address.host) if tls else None,
            client_properties={"connection_name": "fieldpost"},
        )

    async def open(self) -> None:
        """Connect, log in, open the channel. Raises Unreachable."""
        opened: asyncio.Future[object] = self.gone.get_loop().create_future()
        self._connection = _WholeMessages(
            self._parameters,
            on_open_callback=lambda connection: _answer(opened, connection),
            on_open_error_callback=self._on_end,
            on_close_callback=self._on_end,
        )
        # A little longer than pika's own deadline, whose message says which step it was.
        await self._until(opened, "connecting", self.timeout_s + 0.5)
        self._connection.add_on_connection_blocked_callback(
            lambda _, frame: self._on_blocked(str(frame.method.reason) or "by the broker")
        )
        self._connection.add_on_connection_unblocked_callback(lambda _, frame: self._on_blocked(""))
        channel: asyncio.Future[object] = self.gone.get_loop().create_future()
        self.channel = self._connection.channel(on_open_callback=lambda opened: _answer(channel, opened))
        self.channel.add_on_close_callback(lambda _, reason: self._go(reason))
        await self._until(channel, "opening a channel")

    async def call(self, method: Callable[..., object], **arguments: object) -> Any:
        """What the broker answers to a method of `channel`. Raises Unreachable."""
        answer: asyncio.Future[object] = self.gone.get_loop().create_future()
        if self.gone.done():
            raise Unreachable(self.reason)
        method(**arguments, callback=lambda frame: _answer(answer, frame))
        return await self._until(answer, method.__name__.replace("_", " "))

    async def queue_kind(self, queue: str) -> str:
        """What the broker keeps a queue as: `quorum`, `stream`, or nothing where it is classic or doesn't say.

        A declaration as classic is refused for a queue that is not, and the refusal names what it is. A broker
        that takes the type for decoration accepts it, which shows as much. On a channel of its own, which that costs.
        """
        answer: asyncio.Future[str] = self.gone.get_loop().create_future()

        def ask(channel: Any) -> None:
            channel.queue_declare(
                queue, durable=True, arguments={"x-queue-type": "classic"}, callback=lambda _: _answer(answer, "")
            )

        def refused(_: object, reason: Exception) -> None:
            kind = QUEUE_KIND.search(_text(reason))
            _answer(answer, kind[1] if kind else "")

        channel = self._connection.channel(on_open_callback=ask)
        channel.add_on_close_callback(refused)
        kind = await self._until(answer, "asking what the queue is")
        if channel.is_open:
            channel.close()
        return kind

    @property
    def reason(self) -> str:
        """Why it is gone, for people; without any password."""
        return explain(self.gone.result(), self.address) if self.gone.done() else ""

    def abort(self, reason: str) -> None:
        """Give it up without a goodbye."""
        self._go(Unreachable(reason))
        if self._connection is not None and not self._ended.done():
            # pika has no public way to leave a connection whose far side doesn't answer.
            self._connection._terminate_stream(StreamLostError(reason))

    async def close(self) -> None:
        """Say goodbye and wait for the answer, a moment; never raises."""
        self._go(Unreachable("closed"))
        if self._connection is None or self._ended.done():
            return
        with suppress(AMQPError):
            if not self._connection.is_closing:
                self._connection.close()
        await asyncio.wait({self._ended}, timeout=CLOSE_S)
        if not self._ended.done():
            self.abort("closed")
            await asyncio.wait({self._ended}, timeout=CLOSE_S)

    async def _until(self, answer: asyncio.Future[T], what: str, seconds: float | None = None) -> T:
        waited: set[asyncio.Future[Any]] = {answer, self.gone}
        seconds = seconds or self.timeout_s
        done, _ = await asyncio.wait(waited, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if answer in done:
            return answer.result()
        if not done:
            self.abort(f"{self.address}: {what}: no answer within {seconds:g} s")
        raise Unreachable(self.reason, nobody=is_nobody(_cause(self.gone.result())))

    def _on_end(self, _: object, error: Exception) -> None:
        _answer(self._ended, None)
        self._go(error)

    def _on_blocked(self, reason: str) -> None:
        self.blocked = reason
        self.on_blocked(reason)

    def _go(self, error: Exception) -> None:
        _answer(self.gone, error)


class AmqpUplink:
    """Delivers to a queue or an exchange of an AMQP 0-9-1 broker.

    Rejected is what the broker closes the channel for because of the message itself (it is too large). The
    channel is gone with that, so what else was under way raises Unreachable. Where the broker's words don't tell
    which message it meant, none is rejected, and after the next `open` messages go one by one until it is found.
    """

    def __init__(self, settings: AmqpSettings) -> None:
        self.settings = settings
        self.address = Address.parse(settings.url, "amqp", "amqps").login(settings.username, settings.password)
        self.address.check_options()
        self.routing_key = settings.routing_key if settings.exchange else settings.queue
        self._link: _Link | None = None
        self._suspicious = False
        self._durable = False
        self._state = "down"
        self._detail = ""
        self._messages = 0
        self._bytes = 0

    async def open(self) -> None:
        """Connect and make or find the queue. Raises Unreachable, which says what to look at."""
        await self.close()
        self._state, self._detail = "connecting", ""
        connection = Connection(
            self.address,
            timeout_s=self.settings.timeout_s,
            heartbeat_s=self.settings.heartbeat_s,
        )
        try:
            await connection.open()
            link = _Link(self, connection, window=1 if self._suspicious else self.settings.window)
            await connection.call(connection.channel.confirm_delivery, ack_nack_callback=link.on_confirm)
            await self._make_place(connection)
            self._durable = await self._is_durable(connection)
        except BaseException as fault:
            self._state, self._detail = "down", str(fault)
            connection.abort("not opened")
            raise
        self._link = link
        self._state = "up"

    async def deliver(self, message: Message) -> None:
        """Return once the broker has confirmed `message`. Raises Unreachable or Rejected."""
        if self._link is None:
            raise Unreachable(self._detail or f"{self.address}: not open")
        try:
            await self._link.deliver(message)
        except Unreachable as lost:
            self._state, self._detail = "down", str(lost)
            raise
        except Rejected:
            self._suspicious = False
            raise
        self._messages += 1
        self._bytes += len(message.body)

    async def close(self) -> None:
        """Say goodbye; what is unconfirmed raises Unreachable."""
        link, self._link = self._link, None
        if link is not None:
            self._state = "down"
            await link.connection.close()

    def status(self) -> UplinkStatus:
        """How it is: `blocked` while the broker asks not to be sent anything."""
        state, detail = self._state, self._detail
        if self._link is not None and state == "up":
            if self._link.connection.gone.done():
                state, detail = "down", self._link.connection.reason
            elif self._link.connection.blocked:
                state, detail = "blocked", self._link.connection.blocked
        return UplinkStatus(state, detail, self._messages, self._bytes, self._durable)

    def suspect(self) -> None:
        """One of several messages is refused and it isn't known which: send them one by one."""
        self._suspicious = True

    def trust(self) -> None:
        """All is well again."""
        self._suspicious = False

    async def _make_place(self, connection: Connection) -> None:
        settings, channel = self.settings, connection.channel
        if settings.exchange:
            await connection.call(
                channel.exchange_declare, exchange=settings.exchange, exchange_type="topic", passive=True
            )
        if settings.declare:
            await connection.call(
                channel.queue_declare,
                queue=settings.queue,
                durable=True,
                arguments={"x-queue-type": settings.queue_type},
            )
            if settings.exchange:
                await connection.call(
                    channel.queue_bind,
                    queue=settings.queue,
                    exchange=settings.exchange,
                    routing_key=settings.routing_key,
                )
        elif not settings.exchange:
            await connection.call(channel.queue_declare, queue=settings.queue, passive=True)

    async def _is_durable(self, connection: Connection) -> bool:
        if self.settings.durable != "auto":
            return self.settings.durable == "yes"
        if self.settings.exchange and not self.settings.declare:
            return False  # which queues its messages reach is somebody else's affair
        return await connection.queue_kind(self.settings.queue) in DURABLE_QUEUES


class _Link:
    """What is under way on one connection; it ends with that, so nothing of it reaches the next one."""

    def __init__(self, uplink: AmqpUplink, connection: Connection, window: int) -> None:
        self.connection = connection
        self._uplink = uplink
        self._timeout_s = uplink.settings.timeout_s
        self._doubtful = uplink.settings.window if window == 1 < uplink.settings.window else 0
        self._turn = asyncio.Lock()
        self._window = asyncio.Semaphore(window)
        self._unblocked = asyncio.Event()
        self._unblocked.set()
        self._sent = 0
        self._waiting: dict[int, tuple[Message, asyncio.Future[None]]] = {}
        connection.on_blocked = self._on_blocked
        connection.channel.add_on_return_callback(self._on_return)
        connection.gone.add_done_callback(lambda gone: self._on_gone(gone.result()))

    async def deliver(self, message: Message) -> None:
        """Publish `message` when it is its turn, and wait for its confirmation."""
        # A call waits for its turn without a deadline: every call before it has one.
        async with self._turn:
            await self._wait_for_room()
            try:
                tag, waiter = self._publish(message)
            except BaseException:
                self._window.release()
                raise
        try:
            async with asyncio.timeout(self._timeout_s):
                await waiter
        except TimeoutError:
            raise self._lose(f"no confirmation within {self._timeout_s:g} s{self._blocked_too()}") from None
        finally:
            self._waiting.pop(tag, None)
            self._window.release()
        self._note_success()

    def on_confirm(self, frame: Any) -> None:
        """The broker's ack or nack of one message, or of all up to it."""
        method = frame.method
        if self.connection.gone.done():
            return  # the ack that follows a message's return, in the same packet
        if isinstance(method, pika.spec.Basic.Nack):
            self._lose("not taken by the queue: it is full, or out of order")
            return
        tags = [method.delivery_tag]
        if method.multiple:
            last = method.delivery_tag or self._sent
            tags = [tag for tag in self._waiting if tag <= last]
        for tag in tags:
            if tag in self._waiting:
                _answer(self._waiting.pop(tag)[1], None)

    async def _wait_for_room(self) -> None:
        """Return when fewer than `window` messages are unconfirmed and the broker isn't blocked."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._window.acquire()
                try:
                    await self._unblocked.wait()
                except BaseException:
                    self._window.release()
                    raise
        except TimeoutError:
            raise self._lose(f"no room within {self._timeout_s:g} s{self._blocked_too()}") from None

    def _publish(self, message: Message) -> tuple[int, asyncio.Future[None]]:
        if self.connection.gone.done():
            raise Unreachable(self.connection.reason)
        waiter: asyncio.Future[None] = self.connection.gone.get_loop().create_future()
        tag = self._sent + 1
        try:
            self.connection.channel.basic_publish(
                exchange=self._uplink.settings.exchange,
                routing_key=self._uplink.routing_key,
                body=message.body,
                properties=pika.BasicProperties(
                    message_id=message.id,
                    content_type=message.content_type,
                    content_encoding=message.content_encoding or None,
                    delivery_mode=PERSISTENT,
                ),
                mandatory=True,
            )
        except AMQPError as fault:
            raise self._lose(explain(fault, self.connection.address)) from fault
        self._sent = tag
        self._waiting[tag] = message, waiter
        return tag, waiter

    def _on_blocked(self, reason: str) -> None:
        if reason:
            self._unblocked.clear()
        else:
            self._unblocked.set()

    def _on_return(self, _: object, method: Any, properties: Any, body: bytes) -> None:
        place = f"exchange {method.exchange!r} has no queue for routing key {method.routing_key!r}"
        if not method.exchange:
            place = f"there is no queue {method.routing_key!r}"
        self._lose(f"{place} ({method.reply_text}): make it, or set declare = true")

    def _on_gone(self, error: Exception) -> None:
        self._unblocked.set()
        waiting = [(message, waiter) for message, waiter in self._waiting.values() if not waiter.done()]
        self._waiting.clear()
        refused = _refused([message for message, _ in waiting], error)
        if refused is None:
            self._uplink.suspect()
        for message, waiter in waiting:
            if refused and message in refused:
                waiter.set_exception(Rejected(_text(error)))
            else:
                waiter.set_exception(Unreachable(self.connection.reason))

    def _lose(self, reason: str) -> FieldpostError:
        """Give the connection up, if it isn't gone yet; the result is to be raised."""
        if not self.connection.gone.done():
            self.connection.abort(f"{self.connection.address}: {reason}")
        return Unreachable(self.connection.reason)

    def _blocked_too(self) -> str:
        return f"; it says blocked: {self.connection.blocked}" if self.connection.blocked else ""

    def _note_success(self) -> None:
        """After as many good messages as could have been the bad one, go back to the whole window."""
        if self._doubtful:
            self._doubtful -= 1
            if not self._doubtful:
                self._uplink.trust()
                for _ in range(self._uplink.settings.window - 1):
                    self._window.release()


def _refused(messages: list[Message], error: Exception) -> list[Message] | None:
    """Which of the unconfirmed `messages` the broker closed the channel for; None: one of them, not known which."""
    if not isinstance(error, ChannelClosed) or error.reply_code not in (PRECONDITION_FAILED, CONTENT_TOO_LARGE):
        return []
    if limit := TOO_LARGE.search(error.reply_text):
        return [message for message in messages if len(message.body) > int(limit[1])]
    return messages if len(messages) == 1 else None if messages else []


def explain(error: BaseException, address: Address) -> str:
    """What went wrong and where to look, in one line, without any password."""
    if isinstance(error, FieldpostError):
        return str(error)
    error = _cause(error)
    user = address.user or "guest"
    vhost = address.path or "/"
    text = _text(error)
    code = error.reply_code if isinstance(error, ChannelClosed | ConnectionClosed) else 0
    match error:
        case ProbableAuthenticationError():
            text = f"login refused for user {user!r}: check the user and the password"
        case ProbableAccessDeniedError():
            text = f"user {user!r} has no access to virtual host {vhost!r}: check its name and permissions"
        case AMQPHeartbeatTimeout():
            text = "silent for too long (no heartbeat)"
        case TimeoutError():
            text = "no answer: check host and port, and that no firewall drops the packets"
        case ConnectionRefusedError():
            text = "connection refused: nothing listens there"
        case _ if code == NOT_ALLOWED:
            text = f"user {user!r} may not use virtual host {vhost!r}, or there is none: {text}"
        case _ if code == ACCESS_REFUSED:
            text = f"user {user!r} lacks a permission: {text}"
        case _ if code == NOT_FOUND:
            text = f"{text}: make it, or set declare = true"
        case _ if code == PRECONDITION_FAILED:
            text = f"{text}: it exists with other properties; use those, or set declare = false"
    return f"{address}: {text}"


def _cause(error: BaseException) -> BaseException:
    """The error inside those that pika wraps round what failed while connecting."""
    while True:
        inner = getattr(error, "exception", None) or next(iter(getattr(error, "exceptions", ())[-1:]), None)
        if inner is None and error.args and isinstance(error.args[0], BaseException):
            inner = error.args[0]
        if inner is None:
            return error
        error = inner


def _text(error: BaseException) -> str:
    if isinstance(error, ChannelClosed | ConnectionClosed):
        return " ".join(error.reply_text.split())
    return " ".join(str(error).split()) or type(error).__name__


def _answer(future: asyncio.Future[T], value: T) -> None:
    if not future.done():
        future.set_result(value)
