"""One set of tests over every kind of uplink, each against its real far side; then what one kind alone has."""

from __future__ import annotations

import asyncio
import gc
import re
import uuid
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiomqtt
import pytest
from fieldpost.errors import ConfigError, Rejected, Unreachable
from fieldpost.uplinks.address import Address
from fieldpost.uplinks.amqp import AmqpSettings, AmqpUplink
from fieldpost.uplinks.base import Message, Uplink
from fieldpost.uplinks.memory import MemorySettings, MemoryUplink
from fieldpost.uplinks.mqtt import MqttSettings, MqttUplink
from servers import Mosquitto, RabbitMQ, free_port, make_certificates

TIMEOUT_S = 1.5
WRONG = "an-other-secret"


def message(number: int = 0, body: bytes | None = None) -> Message:
    return Message(f"n.i.1.{number}", body or b"body %d" % number, "application/senml+json", "deflate", 1)


class Far:
    """A far side as the tests see it, whatever its kind."""

    def uplink(self, **settings: Any) -> Uplink:
        raise NotImplementedError

    async def received(self, count: int) -> list[tuple[str, bytes]]:
        """The first `count` messages that arrived, in order."""
        raise NotImplementedError

    def pause(self) -> None:
        raise NotImplementedError

    def resume(self) -> None:
        raise NotImplementedError

    def kill9(self) -> None:
        raise NotImplementedError

    def start(self) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        """End what listens."""


class FarMemory(Far):
    def __init__(self) -> None:
        self.one = MemoryUplink(MemorySettings(timeout_s=TIMEOUT_S))

    def uplink(self, **settings: Any) -> Uplink:
        if settings.get("password") == WRONG:
            self.one.unreachable = "login refused"
        return self.one

    async def received(self, count: int) -> list[tuple[str, bytes]]:
        return [(each.id, each.body) for each in self.one.delivered][:count]

    def pause(self) -> None:
        self.one.silent = True

    def resume(self) -> None:
        self.one.silent = False

    def kill9(self) -> None:
        self.one.unreachable = "killed"

    def start(self) -> None:
        self.one.silent = False
        self.one.unreachable = ""


class FarMqtt(Far):
    def __init__(self, directory: Path, version: str) -> None:
        self.server = Mosquitto(directory, users={"plant": "secret", "reader": "secret"}).start()
        self.version = version
        self.arrived: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self._listening: asyncio.Task[None] | None = None

    async def listen(self) -> None:
        ready = asyncio.Event()
        self._listening = asyncio.create_task(self._listen(ready))
        await ready.wait()

    async def _listen(self, ready: asyncio.Event) -> None:
        reader = aiomqtt.Client(
            "127.0.0.1",
            self.server.port,
            username="reader",
            password="secret",
            protocol=aiomqtt.ProtocolVersion.V5,
        )
        try:
            async with reader:
                await reader.subscribe("plant/+", qos=1)
                ready.set()
                async for each in reader.messages:
                    named = dict(getattr(each.properties, "UserProperty", []))
                    assert isinstance(each.payload, bytes)
                    self.arrived.put_nowait((named.get("id", ""), each.payload))
        except aiomqtt.MqttError:
            pass  # killed by the test

    def uplink(self, **settings: Any) -> Uplink:
        known = {"username": "plant", "password": "secret", "topic": "plant/up", "version": self.version}
        return MqttUplink(MqttSettings(self.server.url(), **{"timeout_s": TIMEOUT_S} | known | settings))

    async def received(self, count: int) -> list[tuple[str, bytes]]:
        async with asyncio.timeout(10):
            got = [await self.arrived.get() for _ in range(count)]
        if self.version == "5":
            return got
        numbers = [int(body.split()[-1]) for _, body in got]  # 3.1.1 has no place for the id
        return [(message(number).id, body) for number, (_, body) in zip(numbers, got, strict=True)]

    def pause(self) -> None:
        self.server.pause()

    def resume(self) -> None:
        self.server.resume()

    def kill9(self) -> None:
        self.server.kill9()

    def start(self) -> None:
        self.server.start()

    async def close(self) -> None:
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait({self._listening})
        self.server.stop()


class FarAmqp(Far):
    def __init__(self, server: RabbitMQ) -> None:
        self.server = server
        self.queue = f"test-{uuid.uuid4().hex[:8]}"

    def uplink(self, **settings: Any) -> Uplink:
        known = {"password": self.server.password, "queue": self.queue, "timeout_s": TIMEOUT_S}
        return AmqpUplink(AmqpSettings(self.server.url(password=""), **known | settings))

    async def received(self, count: int) -> list[tuple[str, bytes]]:
        got = await asyncio.to_thread(self.server.drain, self.queue)
        assert all((each.encoding, each.delivery_mode) == ("deflate", 2) for each in got)
        return [(each.id, each.body) for each in got][:count]

    def pause(self) -> None:
        self.server.pause()

    def resume(self) -> None:
        self.server.resume()

    def kill9(self) -> None:
        self.server.kill9()

    def start(self) -> None:
        self.server.start()

    async def close(self) -> None:
        self.server.resume()
        if not self.server.running:
            self.server.start()
        await asyncio.to_thread(self.server.delete, self.queue)


@pytest.fixture(params=["memory", "mqtt 5", "mqtt 3.1.1", "amqp"])
async def far(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Far]:
    """The far side of each kind in turn."""
    side: Far
    if request.param == "memory":
        side = FarMemory()
    elif request.param == "amqp":
        side = FarAmqp(request.getfixturevalue("rabbitmq"))
    else:
        side = FarMqtt(tmp_path / "far", request.param.split()[1])
        await side.listen()
    yield side
    await side.close()


async def opened(uplink: Uplink) -> Uplink:
    """Opened, however often it takes: a restarted server needs a moment."""
    async with asyncio.timeout(60):
        while True:
            try:
                await uplink.open()
                return uplink
            except Unreachable:
                await asyncio.sleep(0.05)


async def outcomes(calls: list[asyncio.Task[None]], seconds: float) -> list[str]:
    """How the calls ended, by name; fails when one hasn't within `seconds`."""
    async with asyncio.timeout(seconds):
        ended = await asyncio.gather(*calls, return_exceptions=True)
    return [type(each).__name__ for each in ended]


async def test_delivered_message_arrives_with_its_id_and_body(far: Far) -> None:
    uplink = far.uplink()
    assert uplink.status().state == "down"
    await uplink.open()
    assert uplink.status().state == "up"
    await uplink.deliver(message(7))
    assert await far.received(1) == [("n.i.1.7", b"body 7")]
    assert (uplink.status().messages, uplink.status().bytes) == (1, 6)
    await uplink.close()
    await uplink.close()
    assert uplink.status().state == "down"


async def test_messages_arrive_in_the_order_of_the_calls(far: Far) -> None:
    uplink = far.uplink()
    await uplink.open()
    await asyncio.gather(*(uplink.deliver(message(number)) for number in range(250)))
    assert await far.received(250) == [(message(number).id, message(number).body) for number in range(250)]
    await uplink.close()


async def test_deliver_without_open_is_unreachable(far: Far) -> None:
    with pytest.raises(Unreachable):
        await far.uplink().deliver(message())


@pytest.mark.slow
async def test_every_waiting_message_is_told_at_once_that_the_far_side_was_killed(far: Far) -> None:
    uplink = far.uplink(timeout_s=30.0)
    await uplink.open()
    far.pause()
    calls = [asyncio.create_task(uplink.deliver(message(number))) for number in range(150)]
    await asyncio.sleep(0)
    far.kill9()
    assert set(await outcomes(calls, 5)) == {"Unreachable"}
    assert uplink.status().state == "down"
    with pytest.raises(Unreachable):
        await uplink.deliver(message())
    await uplink.close()


async def test_closing_tells_every_waiting_message(far: Far) -> None:
    uplink = far.uplink(timeout_s=30.0)
    await uplink.open()
    far.pause()
    calls = [asyncio.create_task(uplink.deliver(message(number))) for number in range(150)]
    await asyncio.sleep(0)
    async with asyncio.timeout(8):
        await uplink.close()
    assert set(await outcomes(calls, 1)) == {"Unreachable"}
    far.resume()


async def test_silence_is_noticed_within_the_timeout(far: Far) -> None:
    uplink = far.uplink()
    await uplink.open()
    far.pause()
    calls = [asyncio.create_task(uplink.deliver(message(number))) for number in range(150)]
    assert set(await outcomes(calls, 2 * TIMEOUT_S)) == {"Unreachable"}
    await uplink.close()
    far.resume()


async def test_opening_towards_silence_ends_within_the_timeout(far: Far) -> None:
    if isinstance(far, FarMemory):
        pytest.skip("has nothing to wait for")
    uplink = far.uplink()
    far.pause()
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1"):
        async with asyncio.timeout(3 * TIMEOUT_S):
            await uplink.open()
    far.resume()
    await (await opened(uplink)).close()


async def test_cancelled_opening_leaves_nothing_behind(far: Far) -> None:
    uplink = far.uplink()
    far.pause()
    opening = asyncio.create_task(uplink.open())
    await asyncio.sleep(0)
    opening.cancel()
    await asyncio.wait({opening}, timeout=5)
    assert opening.done()
    far.resume()
    await opened(uplink)
    await uplink.deliver(message())
    await uplink.close()


async def test_cancelled_call_gives_its_place_to_another(far: Far) -> None:
    uplink = far.uplink(timeout_s=10.0)
    await uplink.open()
    far.pause()
    calls = [asyncio.create_task(uplink.deliver(message(number))) for number in range(120)]
    await asyncio.sleep(0)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls, timeout=5)
    far.resume()
    await asyncio.gather(*(uplink.deliver(message(number)) for number in range(300, 420)))
    await uplink.close()


@pytest.mark.slow
async def test_uplink_opens_again_after_the_far_side_was_restarted(far: Far) -> None:
    uplink = far.uplink(timeout_s=5.0)
    await uplink.open()
    await uplink.deliver(message(1))
    if isinstance(far, FarAmqp):
        await asyncio.to_thread(far.server.settle)
    far.kill9()
    with pytest.raises(Unreachable):
        await uplink.open()
    await asyncio.to_thread(far.start)
    if isinstance(far, FarMqtt):
        await far.received(1)
        await far.listen()
    async with asyncio.timeout(60):
        while True:
            await opened(uplink)
            try:
                await uplink.deliver(message(2))
                break
            except Unreachable:
                continue
    if isinstance(far, FarAmqp):  # what was confirmed is still there after kill -9
        assert [body for _, body in await far.received(9)][:2] == [b"body 1", b"body 2"]
    elif isinstance(far, FarMqtt):
        assert await far.received(1) == [("n.i.1.2", b"body 2")]
    await uplink.close()


async def test_wrong_password_is_unreachable_and_says_what_to_check(far: Far) -> None:
    uplink = far.uplink(password=WRONG)
    with pytest.raises(Unreachable, match="login refused") as fault:
        await uplink.open()
    assert WRONG not in str(fault.value)
    assert not fault.value.nobody
    assert WRONG not in repr(uplink.status())
    assert uplink.status().state == "down"
    if not isinstance(far, FarMemory):
        assert WRONG not in repr(getattr(uplink, "settings"))  # noqa: B009
        assert "check the user and the password" in str(fault.value)


async def test_closed_port_is_unreachable() -> None:
    port = free_port()
    for uplink in (
        AmqpUplink(AmqpSettings(f"amqp://127.0.0.1:{port}", timeout_s=2)),
        MqttUplink(MqttSettings(f"mqtt://127.0.0.1:{port}", timeout_s=2)),
    ):
        with pytest.raises(Unreachable, match=rf"127.0.0.1:{port}: .*refused") as fault:
            await uplink.open()
        assert fault.value.nobody  # so it may be asked again soon


async def test_encrypted_way_is_taken_only_to_a_server_that_the_ca_knows(tmp_path: Path, rabbitmq: RabbitMQ) -> None:
    tls = make_certificates(tmp_path / "tls")
    side = FarAmqp(rabbitmq)
    with Mosquitto(tmp_path / "far", tls=tls) as mosquitto:
        mqtt = mosquitto.url()
        amqp = f"amqps://{rabbitmq.user}@127.0.0.1:{rabbitmq.tls_port}/%2F"
        login = {"password": rabbitmq.password, "queue": side.queue, "timeout_s": 5}
        for uplink in (
            MqttUplink(MqttSettings(f"{mqtt}?cacertfile={tls.ca}", timeout_s=5)),
            AmqpUplink(AmqpSettings(f"{amqp}?cacertfile={rabbitmq.tls and rabbitmq.tls.ca}", **login)),
            MqttUplink(MqttSettings(f"{mqtt}?verify=verify_none", timeout_s=5)),
        ):
            await uplink.open()
            await asyncio.gather(*(uplink.deliver(message(number)) for number in range(150)))
            await uplink.close()
        with warnings.catch_warnings():
            # The libraries leave the socket of a failed handshake to the collector, out of our reach.
            warnings.simplefilter("ignore", ResourceWarning)
            for uplink in (
                MqttUplink(MqttSettings(mqtt, timeout_s=5)),
                AmqpUplink(AmqpSettings(f"{amqp}?cacertfile={tls.ca}", **login)),
            ):
                with pytest.raises(Unreachable, match=r"(?i)certificate.verify.failed"):
                    await uplink.open()
            gc.collect()
    with pytest.raises(ConfigError, match="cacertfile"):
        await MqttUplink(MqttSettings(f"{mqtt}?cacertfile=/not/there")).open()
    await side.close()


# memory


async def test_memory_rejects_and_holds_as_its_switches_say() -> None:
    uplink = MemoryUplink()
    await uplink.open()
    uplink.reject = lambda each: "not this one" if each.id.endswith(".3") else None
    with pytest.raises(Rejected, match="not this one"):
        await uplink.deliver(message(3))
    uplink.silent = True
    held = asyncio.create_task(uplink.deliver(message(4)))
    await asyncio.sleep(0)
    assert not held.done()
    uplink.release()
    await held
    assert uplink.delivered == [message(4)]


# amqp


@pytest.fixture
async def amqp(rabbitmq: RabbitMQ) -> AsyncIterator[FarAmqp]:
    side = FarAmqp(rabbitmq)
    yield side
    await side.close()


async def test_amqp_names_the_queue_that_is_missing_at_opening(amqp: FarAmqp) -> None:
    with pytest.raises(Unreachable, match=f"{amqp.queue}.*declare"):
        await amqp.uplink(declare=False).open()


async def test_amqp_names_the_queue_that_went_missing(amqp: FarAmqp) -> None:
    uplink = amqp.uplink()
    await uplink.open()
    await asyncio.to_thread(amqp.server.delete, amqp.queue)
    with pytest.raises(Unreachable, match=f"no queue '{amqp.queue}'"):
        await uplink.deliver(message())
    await uplink.close()


async def test_amqp_names_the_exchange_and_key_without_queue(amqp: FarAmqp) -> None:
    uplink = amqp.uplink(exchange="amq.topic", routing_key="nobody.here", declare=False)
    await uplink.open()
    with pytest.raises(Unreachable, match=r"'amq.topic' has no queue for routing key 'nobody.here'"):
        await uplink.deliver(message())
    await uplink.close()
    with pytest.raises(Unreachable, match="no exchange 'not-there'"):
        await amqp.uplink(exchange="not-there").open()


async def test_amqp_writes_a_message_in_one_piece(amqp: FarAmqp) -> None:
    uplink = amqp.uplink()
    await uplink.open()
    connection = uplink._link.connection._connection  # type: ignore[attr-defined]
    sent = connection.frames_sent
    await uplink.deliver(message())
    assert connection.frames_sent == sent + 1  # pika counts what it writes: method, header and body apart
    await uplink.close()
    assert await amqp.received(1) == [(message().id, message().body)]


async def test_amqp_delivers_through_an_exchange(amqp: FarAmqp) -> None:
    uplink = amqp.uplink(exchange="amq.topic", routing_key=f"plant.{amqp.queue}")
    await uplink.open()
    await uplink.deliver(message(1))
    assert await amqp.received(1) == [("n.i.1.1", b"body 1")]
    await uplink.close()


async def test_amqp_rejects_only_the_message_that_is_too_large(amqp: FarAmqp) -> None:
    uplink = amqp.uplink(timeout_s=10.0)
    await uplink.open()
    large = message(1, bytes(amqp.server.max_message_bytes + 1))
    calls = [asyncio.create_task(uplink.deliver(each)) for each in (large, message(2), message(3))]
    assert await outcomes(calls, 5) == ["Rejected", "Unreachable", "Unreachable"]
    assert "larger than" in str(calls[0].exception())
    await uplink.open()
    await uplink.deliver(message(2))
    await uplink.close()


async def test_amqp_stops_publishing_while_blocked(amqp: FarAmqp) -> None:
    uplink = amqp.uplink()
    await uplink.open()
    await uplink.deliver(message(1))
    with amqp.server.alarmed():
        first = asyncio.create_task(uplink.deliver(message(2)))
        async with asyncio.timeout(1):
            while uplink.status().state != "blocked":
                await asyncio.sleep(0.01)
        assert "memory" in uplink.status().detail
        second = asyncio.create_task(uplink.deliver(message(3)))
        assert await outcomes([first, second], 2 * TIMEOUT_S) == ["Unreachable", "Unreachable"]
        assert "blocked" in str(first.exception())
    await opened(uplink)
    await uplink.deliver(message(4))
    await uplink.close()


async def test_amqp_goes_on_when_it_is_no_longer_blocked(amqp: FarAmqp) -> None:
    uplink = amqp.uplink(timeout_s=20.0)
    await uplink.open()
    with amqp.server.alarmed():
        calls = [asyncio.create_task(uplink.deliver(message(number))) for number in range(3)]
        while uplink.status().state != "blocked":
            await asyncio.sleep(0.01)
        calls += [asyncio.create_task(uplink.deliver(message(number))) for number in range(3, 30)]
        await asyncio.sleep(0)
    await asyncio.gather(*calls)
    assert uplink.status().state == "up"
    assert [int(body.split()[1]) for _, body in await amqp.received(30)] == list(range(30))
    await uplink.close()


async def test_amqp_full_queue_is_unreachable(amqp: FarAmqp) -> None:
    limits = {"x-max-length": 2, "x-overflow": "reject-publish", "x-queue-type": "classic"}
    await asyncio.to_thread(amqp.server.declare, amqp.queue, limits)
    uplink = amqp.uplink(declare=False)
    await uplink.open()
    with pytest.raises(Unreachable, match="full"):
        for number in range(10):
            await uplink.deliver(message(number))
    await uplink.close()


async def test_amqp_says_when_the_queue_exists_with_other_properties(amqp: FarAmqp) -> None:
    await asyncio.to_thread(amqp.server.declare, amqp.queue, {"x-queue-type": "classic"})
    with pytest.raises(Unreachable, match=r"x-queue-type.*declare = false"):
        await amqp.uplink().open()


async def test_amqp_says_which_permission_is_missing(amqp: FarAmqp) -> None:
    user = f"user-{uuid.uuid4().hex[:6]}"
    await asyncio.to_thread(amqp.server.add_user, user, "pw-of-user", write=".*")
    with pytest.raises(Unreachable, match=f"{user}' lacks a permission.*{amqp.queue}") as fault:
        await amqp.uplink(username=user, password="pw-of-user").open()
    assert "pw-of-user" not in str(fault.value)
    await asyncio.to_thread(amqp.server.declare, amqp.queue)
    uplink = amqp.uplink(username=user, password="pw-of-user", declare=False)
    await uplink.open()
    await uplink.deliver(message())
    await uplink.close()
    url = amqp.server.url(password="").removesuffix("%2F") + "elsewhere"
    with pytest.raises(Unreachable, match="virtual host 'elsewhere'"):
        await AmqpUplink(AmqpSettings(url, password=amqp.server.password)).open()


async def test_amqp_finds_the_refused_message_when_the_broker_does_not_name_it(
    amqp: FarAmqp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fieldpost.uplinks.amqp.TOO_LARGE", re.compile("never said"))
    uplink = amqp.uplink(timeout_s=10.0)
    waiting = [message(0), message(1, bytes(amqp.server.max_message_bytes + 1)), message(2)]
    ended = []
    for _ in range(2):
        await uplink.open()
        calls = [asyncio.create_task(uplink.deliver(each)) for each in waiting]
        ended.append(await outcomes(calls, 8))
    assert "Rejected" not in ended[0]
    assert ended[1] == ["NoneType", "Rejected", "Unreachable"]
    await uplink.close()


# mqtt


async def test_mqtt_5_respects_what_the_broker_can_take(tmp_path: Path) -> None:
    with Mosquitto(tmp_path / "far", extra="max_packet_size 2000\nmax_inflight_messages 5") as server:
        uplink = MqttUplink(MqttSettings(server.url(), timeout_s=5))
        await uplink.open()
        with pytest.raises(Rejected, match="2000 at most"):
            await uplink.deliver(message(1, bytes(2000)))
        await asyncio.gather(*(uplink.deliver(message(number, bytes(1500))) for number in range(60)))
        await uplink.close()


async def test_mqtt_5_finds_the_message_that_the_broker_hangs_up_for(tmp_path: Path) -> None:
    with Mosquitto(tmp_path / "far", extra="message_size_limit 2000") as server:
        uplink = MqttUplink(MqttSettings(server.url(), timeout_s=5))
        waiting = [message(0), message(1, bytes(2001)), message(2)]
        ended = []
        for _ in range(2):
            await uplink.open()
            ended.append(await outcomes([asyncio.create_task(uplink.deliver(each)) for each in waiting], 8))
        assert "Rejected" not in ended[0]
        assert ended[1] == ["NoneType", "Rejected", "Unreachable"]
        await uplink.open()
        await asyncio.gather(*(uplink.deliver(message(number)) for number in range(200)))
        await uplink.close()


async def test_mqtt_5_without_permission_is_unreachable(tmp_path: Path) -> None:
    rules = tmp_path / "acl"
    rules.write_text("topic read #\n")
    with Mosquitto(tmp_path / "far", extra=f"acl_file {rules}") as server:
        uplink = MqttUplink(MqttSettings(server.url(), timeout_s=5))
        await uplink.open()
        with pytest.raises(Unreachable, match=r"[Nn]ot authorized"):
            await uplink.deliver(message())
        await uplink.close()


async def test_mqtt_5_says_when_nobody_listens(tmp_path: Path) -> None:
    with Mosquitto(tmp_path / "far") as server:
        uplink = MqttUplink(MqttSettings(server.url(), topic="plant/up", timeout_s=5))
        await uplink.open()
        await uplink.deliver(message())
        assert "nobody subscribes to 'plant/up'" in uplink.status().detail
        await uplink.close()


# address


def test_address_keeps_the_password_out_of_texts_and_names_its_faults() -> None:
    address = Address.parse("amqps://plant:s%40cret@[::1]/a%2Fb?verify=verify_none")
    assert (address.user, address.password, address.port, address.path) == ("plant", "s@cret", 5671, "a/b")
    assert str(address) == "amqps://[::1]:5671"
    assert "s@cret" not in repr(address)
    for url in ("http://host", "amqp://", "host:1883", "mqtt://host:port"):
        with pytest.raises(ConfigError, match=r"^url: "):
            Address.parse(url, "amqp", "mqtt")
    with pytest.raises(ConfigError, match="no option 'heartbet'"):
        AmqpUplink(AmqpSettings("amqp://host?heartbet=1"))
