"""Load from many nodes in one process: MQTT 3.1.1 packets written in bulk, so that the load costs little itself.

One `Publisher` is one connection. Towards the gateway it is a node that keeps its window open until `ack`; towards a
plain broker it is any client that counts PUBACKs.
"""

from __future__ import annotations

import asyncio
import json
import random
import struct
import time
from collections.abc import Callable

from fieldpost.wire import manifest_hash


def packet(kind: int, body: bytes) -> bytes:
    """An MQTT control packet (MQTT 3.1.1, section 2.2)."""
    length, size = b"", len(body)
    while True:
        size, low = divmod(size, 128)
        length += bytes([low | (0x80 if size else 0)])
        if not size:
            return bytes([kind]) + length + body


def text(value: bytes) -> bytes:
    return struct.pack("!H", len(value)) + value


class Publisher:
    """A connection that publishes at QoS 1 and hands what it is sent to `on_publish(topic, payload)`."""

    def __init__(self, on_publish: Callable[[bytes, bytes], None] = lambda topic, payload: None) -> None:
        self.pubacks = 0
        self._on_publish = on_publish
        self._mid = 0
        self._acked = asyncio.Event()
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def connect(
        self, port: int, client_id: str, user: str = "", password: str = "", *, clean: bool = True
    ) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", port)
        flags = (0x02 if clean else 0) | (0xC0 if user else 0)
        login = text(user.encode()) + text(password.encode()) if user else b""
        self._writer.write(packet(0x10, text(b"MQTT") + bytes([4, flags, 0, 60]) + text(client_id.encode()) + login))
        connack = await self._reader.readexactly(4)
        assert connack[3] == 0, f"refused with code {connack[3]}"
        self._receiver = asyncio.create_task(self._receive())

    async def subscribe(self, topic: str) -> None:
        self._writer.write(packet(0x82, struct.pack("!H", 65_535) + text(topic.encode()) + b"\x01"))
        await self._writer.drain()

    def publish(self, topic: bytes, payload: bytes, *, retain: bool = False) -> None:
        self._mid = self._mid % 65_000 + 1
        body = text(topic) + struct.pack("!H", self._mid) + payload
        self._writer.write(packet(0x33 if retain else 0x32, body))

    async def drain(self) -> None:
        await self._writer.drain()

    async def acked(self) -> None:
        """Wait for the next PUBACK."""
        self._acked.clear()
        await self._acked.wait()

    async def close(self) -> None:
        self._receiver.cancel()
        await asyncio.gather(self._receiver, return_exceptions=True)
        self._writer.write(b"\xe0\x00")
        self._writer.close()

    async def _receive(self) -> None:
        buffer = b""
        while data := await self._reader.read(262_144):
            buffer += data
            at = 0
            while (end := self._packet_end(buffer, at)) is not None:
                start, stop = end
                kind = buffer[at] & 0xF0
                if kind == 0x40:
                    self.pubacks += 1
                elif kind == 0x30:
                    self._take(buffer[at], buffer[start:stop])
                at = stop
            buffer = buffer[at:]
            self._acked.set()

    @staticmethod
    def _packet_end(buffer: bytes, at: int) -> tuple[int, int] | None:
        """Where the body of the packet at `at` begins and ends, if it is all there."""
        size, shift, here = 0, 0, at + 1
        while here < len(buffer):
            byte = buffer[here]
            size |= (byte & 0x7F) << shift
            shift += 7
            here += 1
            if not byte & 0x80:
                return (here, here + size) if here + size <= len(buffer) else None
        return None

    def _take(self, first: int, body: bytes) -> None:
        (length,) = struct.unpack_from("!H", body)
        topic, rest = body[2 : 2 + length], body[2 + length :]
        if first & 0x06:
            self._writer.write(b"\x40\x02" + rest[:2])
            rest = rest[2:]
        self._on_publish(topic, rest)


def manifest(*channels: tuple[str, str, int], period_ms: int = 1000) -> bytes:
    """What a node says of its columns: (name, unit, scale) each."""
    columns = [[name, unit, scale, "sim", "gauge"] for name, unit, scale in channels]
    return json.dumps({"ch": columns, "p": period_ms, "sl": False, "cap": []}).encode()


STAMPED = manifest(("sent-us", "", 1), ("temperature", "Cel", 100), ("n", "", 1))
"""Columns by which the age of a row is known when it arrives."""

CLIMATE = (("temperature", "Cel", 100), ("humidity", "%RH", 10), ("pressure", "Pa", 1))

STATION = (
    *CLIMATE,
    ("light", "lx", 1),
    ("soil", "%", 10),
    ("soil-temperature", "Cel", 100),
    ("wind", "m/s", 10),
    ("co2", "ppm", 1),
    ("battery", "V", 1000),
    ("panel", "V", 1000),
)
"""A weather station: a message with one row of it has about 120 bytes."""

STARTS = (2150, 480, 101_325, 12_400, 312, 1420, 34, 612, 3912, 5230)
STEPS = (3, 2, 4, 90, 1, 1, 6, 5, 3, 12)


class Walk:
    """Values as sensors give them: each channel wanders by a few of its last digits. The same for the same `seed`."""

    def __init__(self, seed: int, channels: int = len(CLIMATE)) -> None:
        self._random = random.Random(seed)
        self._now = list(STARTS[:channels])

    def next(self) -> tuple[int, ...]:
        """The next row's values."""
        self._now = [
            max(0, now + self._random.randint(-step, step)) for now, step in zip(self._now, STEPS, strict=False)
        ]
        return tuple(self._now)


def now_us() -> int:
    """The clock that both ends of a latency are read from."""
    return time.monotonic_ns() // 1000


class Node:
    """One node under load: `rows` rows a message, at most `window` rows ahead of `ack`.

    Its rows tell when they were sent, or are those of a `walk` of the columns of `says`. `pace`: how much faster than
    ours its clock runs.
    """

    def __init__(
        self,
        name: str,
        install: str,
        rows: int = 1,
        window: int = 1_000_000,
        *,
        says: bytes = STAMPED,
        walk: Walk | None = None,
        pace: float = 1.0,
    ) -> None:
        self.name, self.install = name, install
        self.acked = -1
        self.sent_bytes = 0
        self._says, self._hash = says, manifest_hash(says)
        self._rows = rows
        self._window = window
        self._walk = walk
        self._pace = pace
        self._next = 0
        self._held: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._went_back = -1.0
        self._more = asyncio.Event()
        self.connection = Publisher(self._take)

    @property
    def sent(self) -> int:
        """How many rows it has taken so far."""
        return self._next

    @property
    def uptime_ms(self) -> int:
        """Its own clock."""
        return int(now_us() * self._pace) // 1000

    def _take(self, topic: bytes, payload: bytes) -> None:
        if not topic.endswith(b"/ack"):
            return
        acked = json.loads(payload)[2]
        if acked == self.acked:
            self._go_back()
        self.acked = max(self.acked, acked)
        for seq in [seq for seq in self._held if seq <= acked]:
            del self._held[seq]
        self._more.set()

    async def connect(self, port: int, key: str) -> None:
        await self.connection.connect(port, self.name, self.name, key)
        await self.connection.subscribe(f"fp1/{self.name}/ack")
        state = json.dumps({"st": "up", "i": self.install, "b": 1, "c": 1}).encode()
        self.connection.publish(f"fp1/{self.name}/state".encode(), state, retain=True)
        self.connection.publish(f"fp1/{self.name}/manifest".encode(), self._says, retain=True)

    def send_one(self) -> None:
        """The next message, whatever is outstanding."""
        first = self._next
        self._next += self._rows
        sent = now_us()
        if self._walk is None:
            rows = ",".join(f"[0,{sent},{2000 + (first + n) % 500},{first + n}]" for n in range(self._rows))
        else:
            taken = [(self.uptime_ms, self._walk.next()) for _ in range(self._rows)]
            self._held.update(enumerate(taken, first))
            rows = ",".join(f"[0,{','.join(map(str, values))}]" for _, values in taken)
        self._publish(first, self.uptime_ms, rows)

    def _go_back(self) -> None:
        """The same ack was said twice: what came after it did not come, or was refused. Once a second at the most."""
        if time.monotonic() - self._went_back < 1 or self.acked >= self._next - 1:
            return
        self._went_back = time.monotonic()
        if self._held:
            self._again()
        else:
            self._next = self.acked + 1

    def _again(self) -> None:
        """All that is held, from the oldest on."""
        now, first = self.uptime_ms, min(self._held)
        rows = [f"[{now - at},{','.join(map(str, values))}]" for _, (at, values) in sorted(self._held.items())[:200]]
        self._publish(first, now, ",".join(rows))

    def _publish(self, first: int, uptime_ms: int, rows: str) -> None:
        held = min(self.acked + 1, first)
        payload = f'[1,"{self.install}",1,{first},{uptime_ms},null,{held},[],"{self._hash}",[{rows}]]'.encode()
        self.sent_bytes += len(payload)
        self.connection.publish(f"fp1/{self.name}/data".encode(), payload)

    async def flood(self, total: int) -> None:
        """Send `total` rows as fast as the window lets them; returns when all are acknowledged."""
        while self.acked < total - 1:
            while self._next >= total or self._next - 1 - self.acked >= self._window:
                self._more.clear()
                await self._more.wait()
                if self.acked >= total - 1:
                    return
            self.send_one()
            if self._next % (self._rows * 50) == 0:
                await self.connection.drain()

    async def all_acked(self) -> None:
        """Wait until every row that was sent is acknowledged."""
        while self.acked < self._next - 1:
            self._more.clear()
            await self._more.wait()
