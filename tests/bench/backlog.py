"""What a backlog costs: taking and sending while it grows to ten million, opening it, starting again on top of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from fieldpost.wire import manifest_hash
from servers import shared_rabbitmq

from .gateway import Bench, Gate, route, to_rabbitmq
from .hoard import Seen, in_process
from .load import Publisher
from .meters import folder_bytes, rss_mb, scratch
from .plot import plot
from .report import QUICK, Figure, figures, number, prose, section, table

TITLE = "what a backlog costs as it grows"
HERE = Path(__file__).parent
OUTAGES_S = (5.0, 45.0)


@dataclass(frozen=True, slots=True)
class Point:
    """The spool with so many readings behind."""

    readings: int
    filled: Seen
    taken: Seen
    bytes: int

    def row(self) -> list[str]:
        return [
            f"{self.readings:,}",
            number(self.filled.rate),
            number(self.taken.rate),
            number(self.filled.open_s * 1000),
            number(max(self.filled.rss_mb, self.taken.rss_mb)),
            number(self.bytes / self.readings),
        ]


POINT = ("readings behind", "taken in/s", "taken out/s", "open, ms", "RSS, MB", "bytes a reading")


@dataclass(frozen=True, slots=True)
class Lived:
    """What the gateway did on top of a backlog: times in s, memory in MB."""

    started_s: float
    ready_s: float
    acked_s: float
    resumed_s: tuple[float, ...]
    peak_mb: float
    drained: int
    rate: float


async def grow(folder: Path, most: int) -> list[Point]:
    """Fill a spool from a thousand readings to `most`, and take some out at each power of ten."""
    points, count = [], 1000
    while count <= most:
        filled = await in_process("fill", folder, count)
        occupied = folder_bytes(folder)
        taken = await in_process("take", folder, min(count // 2, 50_000))
        points.append(Point(count, filled, taken, occupied))
        print(f"  {count:,}: {filled}, {taken}", file=sys.stderr)
        count *= 10
    return points


class Listener:
    """A node's ears: when the gateway said `up`, and up to where it acknowledged."""

    def __init__(self) -> None:
        self.up_at = 0.0
        self.acked_at = 0.0
        self.connection = Publisher(self._take)

    def _take(self, topic: bytes, payload: bytes) -> None:
        if topic == b"fp1/gateway/state" and json.loads(payload)["st"] == "up":
            self.up_at = time.monotonic()
        elif topic.endswith(b"/ack"):
            self.acked_at = time.monotonic()

    async def heard(self, what: str, since: float, within_s: float = 60.0) -> float:
        """Seconds from `since` until it heard `up_at` or `acked_at`."""
        deadline = time.monotonic() + within_s
        while (at := getattr(self, what)) <= since:
            assert time.monotonic() < deadline, f"nothing heard: {what}"
            await asyncio.sleep(0.002)
        return float(at - since)


@contextlib.asynccontextmanager
async def listening(gateway: Bench) -> AsyncIterator[Listener]:
    """A node that hears what the gateway says; it stays connected to mosquitto over the gateway's death."""
    enrolled = gateway.ask("add", node="ears")
    ears = Listener()
    await ears.connection.connect(enrolled["port"], "ears", "ears", enrolled["key"])
    await ears.connection.subscribe("fp1/gateway/state")
    await ears.connection.subscribe("fp1/ears/ack")
    try:
        yield ears
    finally:
        await ears.connection.close()


async def live(gateway: Bench, gate: Gate) -> Lived:
    """Start on top of a backlog, die, start again, lose the line and get it back, and send all of it."""
    began = time.monotonic()
    gateway.start()
    started = time.monotonic() - began
    async with listening(gateway) as ears:
        await ears.heard("up_at", began)
        gateway.kill9()
        await asyncio.sleep(1)
        began = time.monotonic()
        gateway.spawn()
        ready = await ears.heard("up_at", began)
        acked = await _first_ack(ears, began)
        resumed = [await _resume(gateway, gate, outage_s) for outage_s in OUTAGES_S]
    behind, began = gateway.route()["backlog"], time.monotonic()
    await gateway.drained(within_s=1800)
    rate = behind / (time.monotonic() - began)
    assert gateway.process
    return Lived(started, ready, acked, tuple(resumed), rss_mb(gateway.process.pid, peak=True), behind, rate)


async def _first_ack(ears: Listener, began: float) -> float:
    """Send a row, and wait for its ack."""
    says = {"ch": [["t", "Cel", 100, "sim", "gauge"]], "p": 1000, "sl": False, "cap": []}
    manifest = json.dumps(says).encode()
    ears.connection.publish(b"fp1/ears/manifest", manifest)
    row = [1, "a1b2c3d4e5f6", 1, 0, 1000, None, 0, [], manifest_hash(manifest), [[0, 2100]]]
    ears.connection.publish(b"fp1/ears/data", json.dumps(row).encode())
    return await ears.heard("acked_at", began)


async def _resume(gateway: Bench, gate: Gate, outage_s: float) -> float:
    """Seconds from when the line is back after an outage until the far side has confirmed something again."""
    await gate.down()
    await asyncio.sleep(outage_s)
    before = gateway.route()["confirmed"]
    began = time.monotonic()
    await gate.up()
    while gateway.route().get("confirmed", 0) <= before:
        assert time.monotonic() - began < 120, gateway.route()
        await asyncio.sleep(0.02)
    return time.monotonic() - began


async def run(quick: bool) -> str:
    """The topic's section, and the plot beside it."""
    most = 1_000_000 if quick else 10_000_000
    rabbit = shared_rabbitmq()
    with scratch() as folder:
        rabbit.declare("backlog", {"x-queue-type": "quorum"})
        gate = Gate(rabbit.port)
        uplink = to_rabbitmq(rabbit, folder, "backlog", port=gate.port)
        gateway = Bench(folder / "gateway", route(uplink))
        try:
            points = await grow(gateway.data, most)
            lived = await live(gateway, gate)
        finally:
            gateway.end()
            await gate.down()
            rabbit.delete("backlog")
    print(f"  {lived}", file=sys.stderr)
    (HERE / "backlog.svg").write_text(drawn(points))
    return section("backlog", TITLE, _body(points, lived), QUICK if quick else "")


def drawn(points: list[Point]) -> str:
    """Cost per reading against backlog."""
    return plot(
        "What a reading costs as the backlog grows",
        "readings behind",
        "microseconds a reading",
        {
            "taken in": [(p.readings, 1e6 / p.filled.rate) for p in points],
            "taken out": [(p.readings, 1e6 / p.taken.rate) for p in points],
        },
    )


def _body(points: list[Point], lived: Lived) -> list[str]:
    last = points[-1]
    behind = f"{last.readings:,} behind"
    million = next((point for point in points if point.readings == 1_000_000), last)
    wanted = [
        Figure(
            "on the card, for each 1,000,000 readings",
            million.bytes / million.readings,
            "MB",
            most=30,
            beside="RabbitMQ 548, measured earlier",
        ),
        Figure(f"open with {behind}", last.filled.open_s, "s", most=1),
        Figure("RSS of the gateway at the most, from its start to the end of the drain", lived.peak_mb, "MB", most=80),
        Figure(
            f"ready again after kill -9, {behind}",
            lived.ready_s,
            "s",
            most=1,
            beside="RabbitMQ's shovel 6-9, measured earlier",
        ),
        *(
            Figure(
                f"sending again after the line is back, {away:.0f} s away",
                took,
                "s",
                most=1,
                beside="mosquitto's bridge 4-22, measured earlier",
            )
            for away, took in zip(OUTAGES_S, lived.resumed_s, strict=True)
        ),
    ]
    return [
        *figures(wanted),
        "",
        *table(POINT, [point.row() for point in points]),
        "",
        "![Cost per reading against backlog](backlog.svg)",
        "",
        *prose(
            f"""The spool in a process of its own, without gateway and brokers: filled ten thousand at a time, each
            waited for until it is on the card; the rates are medians of the last twenty. Then the gateway on top of
            it: first start {lived.started_s:.2f} s (with its mosquitto); killed, and started again: it says `up` after
            {lived.ready_s:.2f} s (of which Python's own start is the most), and the first row that a node sends then is
            acknowledged {lived.acked_s:.2f} s after the start. The rest, {lived.drained:,}, went to RabbitMQ at
            {lived.rate:,.0f} a second."""
        ),
    ]
