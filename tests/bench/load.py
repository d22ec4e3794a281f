"""Load from many nodes in one process: MQTT 3.1.1 packets written in bulk, so that the load costs little itself.

One `Publisher` is one connection. Towards the gateway it is a node that keeps its window open until `ack`; towards a
plain broker it is any client that counts PUBACKs.
"""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import Callable


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

    async def connect(self, port: int, client_id: str, user: str = "", password: str = "") -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", port)
        flags = 0x02 | (0xC0 if user else 0)
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


MANIFEST = json.dumps(
    {
        "ch": [
            ["sent-us", "", 1, "clock", "gauge"],
            ["temperature", "Cel", 100, "sim", "gauge"],
            ["n", "", 1, "n", "gauge"],
        ]
    }
    | {"p": 1000, "sl": False, "cap": []}
).encode()


def now_us() -> int:
    """The clock that both ends of a latency are read from."""
    return time.monotonic_ns() // 1000


class Node:
    """One node under load: `rows` rows a message, at most `window` rows ahead of `ack`."""

    def __init__(self, name: str, install: str, hash_: str, rows: int, window: int) -> None:
        self.name, self.install = name, install
        self.acked = -1
        self._hash = hash_
        self._rows = rows
        self._window = window
        self._next = 0
        self._more = asyncio.Event()
        self.connection = Publisher(self._take)

    def _take(self, topic: bytes, payload: bytes) -> None:
        if topic.endswith(b"/ack"):
            self.acked = max(self.acked, json.loads(payload)[2])
            self._more.set()

    async def connect(self, port: int, key: str) -> None:
        await self.connection.connect(port, self.name, self.name, key)
        await self.connection.subscribe(f"fp1/{self.name}/ack")
        state = json.dumps({"st": "up", "i": self.install, "b": 1, "c": 1}).encode()
        self.connection.publish(f"fp1/{self.name}/state".encode(), state, retain=True)
        self.connection.publish(f"fp1/{self.name}/manifest".encode(), MANIFEST, retain=True)

    def send_one(self) -> None:
        """The next message, whatever is outstanding."""
        first = self._next
        self._next += self._rows
        sent = now_us()
        rows = ",".join(f"[0,{sent},{2000 + (first + n) % 500},{first + n}]" for n in range(self._rows))
        head = f'[1,"{self.install}",1,{first},{sent // 1000},null,{min(self.acked + 1, first)},[],"{self._hash}",'
        self.connection.publish(f"fp1/{self.name}/data".encode(), f"{head}[{rows}]]".encode())

    async def flood(self, total: int) -> None:
        """Send `total` rows as fast as the window lets them; returns when all are acknowledged."""
        while self._next < total:
            while self._next - 1 - self.acked >= self._window:
                self._more.clear()
                await self._more.wait()
            self.send_one()
            if self._next % (self._rows * 50) == 0:
                await self.connection.drain()
        while self.acked < total - 1:
            self._more.clear()
            await self._more.wait()
