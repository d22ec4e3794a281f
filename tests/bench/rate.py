"""How many readings a second are taken, durably, through a real mosquitto; what one costs; how old it is upstream."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fieldpost.forms import senml
from fieldpost.upstream import consume
from servers import Mosquitto, shared_rabbitmq

from .gateway import Bench, route, to_mqtt, to_nobody, to_rabbitmq
from .load import Node, Publisher, now_us
from .meters import cpu_seconds, rss_mb, scratch
from .report import QUICK, Figure, figures, number, prose, section, table

TITLE = "readings a second, and what one costs"
NODES = 20
ROUTE = "window = 8"
WINDOW = 200
"""Rows that a node sends ahead of its ack, twice as many of ten a message: all together less than half the stage."""


@dataclass
class Seen:
    """What one system did. Rates in readings/s, ages in ms, CPU in seconds per 100,000 readings.

    `load`: how much of a core the load generator took meanwhile; where it is far below 1, it was not what was slow.
    """

    name: str
    accepted: dict[int, float] = field(default_factory=dict)
    arrived: dict[int, float] = field(default_factory=dict)
    cpu: dict[int, float] = field(default_factory=dict)
    load: dict[int, float] = field(default_factory=dict)
    cpu_at: dict[int, float] = field(default_factory=dict)
    rss_mb: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0


@dataclass
class Arrivals:
    """Rows as they arrive upstream: how many different ones, and how old each was (us)."""

    seen: set[tuple[str, int]] = field(default_factory=set)
    ages_us: list[int] = field(default_factory=list)

    def take(self, node: str, seq: int, sent_us: int) -> None:
        if (node, seq) not in self.seen:
            self.seen.add((node, seq))
            self.ages_us.append(now_us() - sent_us)

    async def all(self, count: int) -> None:
        while len(self.seen) < count:
            await asyncio.sleep(0.005)

    def percentile(self, share: float) -> float:
        """In ms."""
        return percentile(self.ages_us, share) / 1000


def percentile(values: list[int], share: float) -> float:
    """The value below which this share of them lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


class Client(Protocol):
    """What sends rows: a node, or a client of a plain broker."""

    connection: Publisher

    def send_one(self) -> None: ...

    async def flood(self, total: int) -> None: ...


class System(Protocol):
    """What takes rows and carries them on."""

    name: str

    @property
    def pids(self) -> list[int]: ...

    def running(self) -> contextlib.AbstractContextManager[None]: ...

    async def clients(self, rows: int) -> list[Client]: ...

    async def watch(self, arrivals: Arrivals) -> None: ...

    async def arrived(self, rows: int) -> None: ...


class Fieldpost:
    """Nodes -> mosquitto -> gateway -> upstream, acknowledged when safe."""

    def __init__(self, name: str, folder: Path, uplink: str, watch: str = "", profile: Path | None = None) -> None:
        self.name = name
        self.line_up = bool(watch)
        self._watch = watch
        self._gateway = Bench(folder, route(uplink, ROUTE), profile=profile)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        try:
            self._gateway.start()
            yield
        finally:
            self._gateway.end()

    @property
    def pids(self) -> list[int]:
        return self._gateway.pids

    async def clients(self, rows: int) -> list[Client]:
        if self.line_up:
            await self._gateway.linked()
        made = await self._gateway.nodes(
            NODES, lambda name, install, _: Node(name, install, rows=rows, window=WINDOW * min(rows, 2))
        )
        return list(made)

    async def watch(self, arrivals: Arrivals) -> None:
        async for item in consume(self._watch):
            for row in senml.decode(item.body) if hasattr(item, "body") else ():
                if "sent-us" in row.values:
                    sent, seq = row.values["sent-us"][0], row.values["n"][0]
                    assert isinstance(sent, float) and isinstance(seq, float)
                    arrivals.take(row.node, int(seq), int(sent))

    async def arrived(self, rows: int) -> None:
        """By the far side's confirmations: a watcher would take time from what is measured."""
        if self.line_up:
            await self._gateway.drained()


class _BridgeClient:
    """A client of the plain broker: a row counts as accepted with its PUBACK."""

    def __init__(self, name: str, rows: int) -> None:
        self.name = name
        self._rows = rows
        self._sent = 0
        self.connection = Publisher()

    def send_one(self) -> None:
        first = self._sent
        self._sent += self._rows
        sent = now_us()
        rows = ",".join(f"[0,{sent},{2000 + (first + n) % 500},{first + n}]" for n in range(self._rows))
        head = f'[1,"a1b2c3d4e5f6",1,{first},{sent // 1000},null,{first},[],"00112233",'
        self.connection.publish(f"fp1/{self.name}/data".encode(), f"{head}[{rows}]]".encode())

    async def flood(self, total: int) -> None:
        while self._sent < total:
            while self._sent // self._rows - self.connection.pubacks >= 200:
                await self.connection.acked()
            self.send_one()
            if self._sent % (self._rows * 50) == 0:
                await self.connection.drain()
        while self.connection.pubacks < total // self._rows:
            await self.connection.acked()


class Bridge:
    """Clients -> mosquitto -> its bridge -> upstream mosquitto; confirmed when in memory."""

    name = "mosquitto bridge"

    def __init__(self, folder: Path, upstream: Mosquitto) -> None:
        self._upstream = upstream
        extra = (
            "allow_anonymous true\nmax_inflight_messages 1000\nmax_queued_messages 0\n"
            f"connection up\naddress 127.0.0.1:{upstream.port}\ntopic fp1/# out 1\n"
            "cleansession false\nnotifications false\n"
        )
        self._broker = Mosquitto(folder / "bridge", extra=extra)
        self._made = 0
        self._counted = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with self._broker:
            yield

    @property
    def pids(self) -> list[int]:
        return [self._broker.pid]

    async def clients(self, rows: int) -> list[Client]:
        self._made += 1
        made = [_BridgeClient(f"b{self._made}-{n}", rows) for n in range(NODES)]
        for client in made:
            await client.connection.connect(self._broker.port, client.name)
        await asyncio.sleep(0.5)
        self._counted = 0
        return list(made)

    async def watch(self, arrivals: Arrivals) -> None:
        def take(topic: bytes, payload: bytes) -> None:
            node = topic.split(b"/")[1].decode()
            for _, sent, _, seq in json.loads(payload)[9]:
                arrivals.take(node, seq, sent)

        await self._listen(Publisher(take))

    async def count(self) -> None:
        """Count messages upstream without looking into them."""

        def take(topic: bytes, payload: bytes) -> None:
            self._counted += 1

        await self._listen(Publisher(take))

    async def _listen(self, watcher: Publisher) -> None:
        await watcher.connect(self._upstream.port, "watcher")
        await watcher.subscribe("fp1/+/data")
        try:
            await asyncio.Event().wait()
        finally:
            await watcher.close()

    async def arrived(self, rows: int) -> None:
        while self._counted < rows:
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def background(work: Awaitable[None]) -> AsyncIterator[None]:
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def steady(clients: list[Client], per_s: int, total: int) -> None:
    """One row a message, so many a second in all."""
    began = time.monotonic()
    for n in range(total):
        await asyncio.sleep(max(0.0, began + n / per_s - time.monotonic()))
        clients[n % len(clients)].send_one()


async def latency(system: System, seen: Seen, seconds: int) -> None:
    """50 rows/s, one a message: how old a row is when it arrives, and what it costs."""
    arrivals = Arrivals()
    async with background(system.watch(arrivals)):
        clients = await system.clients(1)
        await asyncio.sleep(1)
        cpu, total = cpu_seconds(*system.pids), 50 * seconds
        await steady(clients, 50, total)
        await arrivals.all(total)
        seen.p50_ms, seen.p99_ms = arrivals.percentile(0.5), arrivals.percentile(0.99)
        seen.cpu_at[50] = (cpu_seconds(*system.pids) - cpu) / total * 100_000
        await _leave(clients)


async def processor(system: System, seen: Seen, seconds: int) -> None:
    """500 rows/s, one a message, nobody watching: what it costs."""
    counting = system.count() if isinstance(system, Bridge) else asyncio.Event().wait()
    async with background(counting):  # type: ignore[arg-type]
        clients = await system.clients(1)
        await asyncio.sleep(1)
        cpu, total = cpu_seconds(*system.pids), 500 * seconds
        await steady(clients, 500, total)
        await system.arrived(total)
        seen.cpu_at[500] = (cpu_seconds(*system.pids) - cpu) / total * 100_000
        await _leave(clients)


async def fast(system: System, seen: Seen, rows: int, total: int) -> None:
    """As fast as it goes, `rows` a message: until accepted, and until all have arrived."""
    counting = system.count() if isinstance(system, Bridge) else asyncio.Event().wait()
    async with background(counting):  # type: ignore[arg-type]
        clients = await system.clients(rows)
        await asyncio.sleep(1)
        cpu, own, began = cpu_seconds(*system.pids), _own_cpu(), time.monotonic()
        await asyncio.gather(*(client.flood(total // NODES) for client in clients))
        took = time.monotonic() - began
        seen.accepted[rows] = total / took
        seen.load[rows] = (_own_cpu() - own) / took
        await system.arrived(total // rows if isinstance(system, Bridge) else total)
        seen.arrived[rows] = total / (time.monotonic() - began)
        seen.cpu[rows] = (cpu_seconds(*system.pids) - cpu) / total * 100_000
        seen.rss_mb = max(seen.rss_mb, rss_mb(*system.pids))
        await _leave(clients)


async def _leave(clients: list[Client]) -> None:
    for client in clients:
        await client.connection.close()


def _own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def measure(system: System, seconds: int, total: int) -> Seen:
    """All of it. What takes ten times as long as it ought to hangs, and ends the run."""
    seen = Seen(system.name)
    with system.running():
        if not isinstance(system, Fieldpost) or system.line_up:
            async with asyncio.timeout(60 + 10 * seconds):
                await latency(system, seen, seconds)
                await processor(system, seen, seconds)
        for rows, count in ((1, total), (10, total * 5)):
            async with asyncio.timeout(30 + count / 1000):
                await fast(system, seen, rows, count)
    said = ", ".join(f"{number(rate)}/s by {rows}" for rows, rate in seen.accepted.items())
    print(f"  {system.name}: {said}", file=sys.stderr)
    return seen


def _wanted(all_seen: list[Seen]) -> list[Figure]:
    """The figures to reach, with the bridge of the same run beside them."""
    bridge, amqp, down = all_seen[0], all_seen[1], all_seen[3]
    peer = "RabbitMQ's shovel 11,600, measured earlier"
    return [
        *(
            Figure(f"durable rate, one a message, {where}", seen.accepted[1], "readings/s", least=12_000, beside=peer)
            for seen, where in ((amqp, "RabbitMQ upstream"), (down, "line down"))
        ),
        *(
            Figure(f"durable rate, ten a message, {where}", seen.accepted[10], "readings/s", least=100_000)
            for seen, where in ((amqp, "RabbitMQ upstream"), (down, "line down"))
        ),
        Figure(
            "CPU of gateway and broker per 100,000 readings at 500/s",
            amqp.cpu_at[500],
            "s",
            most=15,
            beside=f"bridge {number(bridge.cpu_at[500])} (in memory)",
        ),
        Figure(
            "sensor to upstream at 50/s, p50",
            amqp.p50_ms,
            "ms",
            most=3,
            beside=f"bridge {number(bridge.p50_ms)} (in memory)",
        ),
        Figure(
            "sensor to upstream at 50/s, p99",
            amqp.p99_ms,
            "ms",
            most=20,
            beside=f"bridge {number(bridge.p99_ms)} (in memory)",
        ),
    ]


def _compared(all_seen: list[Seen]) -> list[str]:
    def row(what: str, values: list[float]) -> list[str]:
        return [what, *(number(value) if value else "" for value in values)]

    rows = [
        ["a reading counts as accepted when", "in memory", *["safe"] * (len(all_seen) - 1)],
        *(row(f"accepted/s, {n} a message", [s.accepted[n] for s in all_seen]) for n in (1, 10)),
        *(
            row(f"arrived upstream/s, {n} a message", [s.arrived[n] if s.p50_ms else 0 for s in all_seen])
            for n in (1, 10)
        ),
        *(row(f"CPU s per 100,000, flooded, {n} a message", [s.cpu[n] for s in all_seen]) for n in (1, 10)),
        *(row(f"CPU s per 100,000 at {n}/s", [s.cpu_at.get(n, 0) for s in all_seen]) for n in (50, 500)),
        row("sensor to upstream at 50/s, p50 ms", [s.p50_ms for s in all_seen]),
        row("sensor to upstream at 50/s, p99 ms", [s.p99_ms for s in all_seen]),
        row("RSS with broker after it, MB", [s.rss_mb for s in all_seen]),
        *(row(f"cores taken by the load generator, {n} a message", [s.load[n] for s in all_seen]) for n in (1, 10)),
    ]
    return table(["", *(seen.name for seen in all_seen)], rows)


async def _profile(folder: Path, uplink: str, what: str, load: Callable[[System, Seen], Awaitable[None]]) -> list[str]:
    """Where the gateway's time goes under a load."""
    out = folder / f"{what}.txt".replace(" ", "-").replace("/", "-")
    system = Fieldpost("profiled", folder / out.stem, uplink, watch="none", profile=out)
    with system.running():
        await load(system, Seen("profiled"))
    return ["", f"Where the gateway's time goes, {what}:", "", "```", *out.read_text().splitlines(), "```"]


async def _profiles(folder: Path, uplink: str, missed: str, seconds: int, total: int) -> list[str]:
    """A profile for each kind of load whose figure was missed."""
    lines: list[str] = []
    if "one a message" in missed:
        lines += await _profile(folder, uplink, "one a message", lambda s, seen: fast(s, seen, 1, total))
    if "ten a message" in missed:
        lines += await _profile(folder, uplink, "ten a message", lambda s, seen: fast(s, seen, 10, 5 * total))
    if "at 500/s" in missed:
        lines += await _profile(folder, uplink, "at 500/s", lambda s, seen: processor(s, seen, seconds))
    return lines


def upstream_broker(folder: Path) -> Mosquitto:
    """A far side that keeps everything for its watcher: by default mosquitto drops what is beyond 1,000 messages."""
    return Mosquitto(folder / "upstream", extra="max_queued_messages 0\nmax_inflight_messages 1000")


async def run(quick: bool) -> str:
    """The topic's section."""
    seconds, total = (10, 40_000) if quick else (30, 200_000)
    with scratch() as folder, upstream_broker(folder) as upstream:
        rabbit = shared_rabbitmq()
        rabbit.declare("rate", {"x-queue-type": "quorum"})
        amqp = to_rabbitmq(rabbit, folder, "rate")
        rabbit_url = rabbit.url(rabbit.user, password=rabbit.password, query="?queue=rate")
        systems: list[System] = [
            Bridge(folder, upstream),
            Fieldpost("fieldpost to RabbitMQ", folder / "amqp", amqp, rabbit_url),
            Fieldpost("fieldpost to MQTT", folder / "mqtt", to_mqtt(upstream), f"{upstream.url()}/bench/up"),
            Fieldpost("fieldpost, line down", folder / "down", to_nobody()),
        ]
        all_seen = [await measure(system, seconds, total) for system in systems]
        wanted = _wanted(all_seen)
        missed = "; ".join(one.what for one in wanted if not one.reached)
        profiles = await _profiles(folder, amqp, missed, seconds, total)
        rabbit.delete("rate")
    body = [
        *prose(
            f"""{NODES} nodes, three channels a reading, as fast as they are acknowledged: {total:,} readings one a
            message, {5 * total:,} ten a message; {seconds} s each at 50/s and at 500/s, one a message."""
        ),
        "",
        *figures(wanted),
        "",
        *_compared(all_seen),
        *profiles,
    ]
    return section("rate", TITLE, body, QUICK if quick else "")
