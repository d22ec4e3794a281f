"""The farm: ten nodes, three channels, a reading a minute each. What a day of it writes, what a month of it sends."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from servers import RabbitMQ, shared_rabbitmq

from .gateway import Bench, Gate, route, to_nobody, to_rabbitmq
from .load import CLIMATE, Node, Walk, manifest
from .meters import Disk, Line, Traffic, cpu_seconds, folder_bytes, scratch
from .report import QUICK, Figure, figures, prose, section, table

TITLE = "ten nodes, three channels, a reading a minute each"
NODES = 10
MINUTE_S = 60.0
DAY_S = 86_400.0
MONTH_DAYS = 30
JOURNAL_S = 5.0
"""ext4 commits its journal so often when something has changed (mount option `commit`)."""

MB = 1e6
ROUTE = 'form = "columns"\ngather = "60s"'
FAST_ROUTE = 'form = "columns"\ngather = "30s"'
"""Of a fast day: RabbitMQ's confirmations are as slow as ever, and must come well within the linger all the same."""

UPLINK = "heartbeat_s = 1800"
SPOOL = "linger_s = 60"


@dataclass(frozen=True, slots=True)
class Day:
    """What was seen of some time at the farm, by its own clock: `seconds` of it.

    `card`: bytes that reached the card in that time; `end`: those of a clean end after it, which a day has once.
    """

    seconds: float
    readings: int
    acknowledged: int
    card: int
    end: int
    commits: int
    cpu_s: float
    stored: int

    @property
    def share(self) -> float:
        return self.seconds / DAY_S

    @property
    def card_mb(self) -> float:
        """Bytes that a whole day brings to the card, in MB."""
        return (self.card / self.share + self.end) / MB

    def row(self, name: str) -> list[str]:
        per = self.card_mb * MB * self.share / self.readings
        return [
            name,
            f"{self.seconds / 3600:.2f}",
            f"{self.readings:,}",
            f"{self.acknowledged:,}",
            f"{self.card_mb:.2f}",
            f"{per:.0f}",
            f"{self.commits / self.share:,.0f}",
            f"{self.cpu_s / self.share:.0f}",
        ]


COLUMNS = ("", "hours", "readings", "acknowledged", "card, MB a day", "bytes a reading", "commits a day", "CPU s a day")


async def enrolled(gateway: Bench, factor: float) -> list[Node]:
    """Ten nodes, connected."""
    says = manifest(*CLIMATE, period_ms=60_000)
    return await gateway.nodes(
        NODES, lambda name, install, n: Node(name, install, says=says, walk=Walk(n), pace=factor)
    )


async def live(nodes: list[Node], factor: float, seconds: float) -> None:
    """They live for so many seconds of their time."""
    began, phases = time.monotonic(), random.Random(1)
    await asyncio.gather(*(_sample(node, phases.uniform(0, MINUTE_S), factor, seconds, began) for node in nodes))
    for node in nodes:
        await node.connection.close()


async def _sample(node: Node, phase_s: float, factor: float, seconds: float, began: float) -> None:
    """A reading a minute, each node at a second of its own."""
    at = phase_s
    while at < seconds:
        await asyncio.sleep(max(0.0, began + at / factor - time.monotonic()))
        node.send_one()
        at += MINUTE_S
    await asyncio.sleep(max(0.0, began + seconds / factor - time.monotonic()))


async def day(uplink: str, factor: float, seconds: float, *, line_up: bool) -> Day:
    """So many seconds of the farm's time on a card of its own: all files of gateway and broker, and the journal."""
    with Disk() as disk:
        settings = (FAST_ROUTE if factor > 1 else ROUTE) if line_up else ""
        gateway = Bench(disk.mount / "gateway", route(uplink, settings), spool=SPOOL, factor=factor)
        try:
            gateway.start()
            if line_up:
                await gateway.linked()
            nodes = await enrolled(gateway, factor)
            if factor > 1:
                disk.beat(JOURNAL_S / factor)
            await asyncio.sleep(2)
            before, cpu, commits = disk.written(), cpu_seconds(*gateway.pids), gateway.status()["spool"]["commits"]
            await live(nodes, factor, seconds)
            spent, made = cpu_seconds(*gateway.pids) - cpu, gateway.status()["spool"]["commits"] - commits
            disk.still()
            after = disk.written()
            gateway.stop()
            return Day(
                seconds,
                sum(node.sent for node in nodes),
                sum(node.acked + 1 for node in nodes),
                after - before,
                disk.written() - after,
                made,
                spent,
                folder_bytes(gateway.data),
            )
        finally:
            gateway.end()


@dataclass(frozen=True, slots=True)
class Month:
    """What goes over the line: `traffic` of `minutes`, and that of one lost and reopened link."""

    minutes: float
    traffic: Traffic
    reopened: Traffic
    readings: int

    @property
    def mb(self) -> float:
        """A month at the IP layer, with a link that is lost once a day, in MB."""
        return MONTH_DAYS * (self.traffic.ip / self.minutes * 1440 + self.reopened.ip) / MB


async def month(rabbit: RabbitMQ, folder: Path, minutes: float) -> Month:
    """The farm in real time, its line to RabbitMQ encrypted."""
    rabbit.declare("farm-line", {"x-queue-type": "quorum"})
    gate = Gate(rabbit.tls_port)
    await gate.up()
    uplink = to_rabbitmq(rabbit, folder, "farm-line", tls=True, port=gate.port, more=UPLINK)
    gateway = Bench(folder / "line", route(uplink, ROUTE), spool=SPOOL)
    try:
        with Line(gate.port) as line:
            gateway.start()
            await gateway.linked()
            nodes = await enrolled(gateway, 1.0)
            await asyncio.sleep(2)
            before = line.seen()
            await live(nodes, 1.0, minutes * 60)
            steady = line.seen() - before
            reopened = await _reopen(gateway, gate, line)
    finally:
        gateway.end()
        await gate.down()
        rabbit.delete("farm-line")
    return Month(minutes, steady, reopened, sum(node.sent for node in nodes))


async def _reopen(gateway: Bench, gate: Gate, line: Line) -> Traffic:
    """What it takes until the link is back: failed attempts, handshakes, questions."""
    before = line.seen()
    await gate.down()
    while gateway.route().get("state") == "up":
        await asyncio.sleep(0.05)
    await asyncio.sleep(3)
    await gate.up()
    await gateway.linked()
    await asyncio.sleep(2)
    return line.seen() - before


async def days(jobs: Iterable[tuple[str, str, float, float, bool]]) -> dict[str, Day]:
    """Days at the same time, each on a card of its own: (name, uplink, factor, seconds, line up)."""

    async def one(name: str, uplink: str, factor: float, seconds: float, line_up: bool) -> tuple[str, Day]:
        seen = await day(uplink, factor, seconds, line_up=line_up)
        print(f"  {name}: {seen}", file=sys.stderr)
        return name, seen

    return dict(await asyncio.gather(*(one(*job) for job in jobs)))


async def run(quick: bool) -> str:
    """The topic's section."""
    if os.geteuid() != 0:
        raise SystemExit("farm: makes loop devices and listens to packets: run it as root")
    factor, seconds, minutes = (120.0, 7_200.0, 3.0) if quick else (120.0, DAY_S, 10.0)
    rabbit = shared_rabbitmq()
    with scratch() as folder:
        for queue in ("farm", "farm-check"):
            rabbit.declare(queue, {"x-queue-type": "quorum"})
        patient = UPLINK + "\ntimeout_s = 300"  # of a clock that runs fast
        seen = await days(
            [
                ("line up", to_rabbitmq(rabbit, folder, "farm", more=patient), factor, seconds, True),
                ("line down", to_nobody(), factor, seconds, False),
            ]
        )
        real = minutes * 60
        checked = asyncio.ensure_future(
            days(
                [
                    ("line up, real time", to_rabbitmq(rabbit, folder, "farm-check", more=UPLINK), 1.0, real, True),
                    ("line down, real time", to_nobody(), 1.0, real, False),
                ]
            )
        )
        sent = await month(rabbit, folder, minutes)
        seen |= await checked
        for queue in ("farm", "farm-check"):
            rabbit.delete(queue)
    return section("farm", TITLE, _body(seen, sent, factor), QUICK if quick else "")


def _said(*settings: str) -> str:
    return ", ".join(f"`{line}`" for some in settings for line in some.splitlines())


def _body(seen: dict[str, Day], sent: Month, factor: float) -> list[str]:
    """The section's lines."""
    per_minute = sent.traffic.ip / sent.minutes
    wanted = [
        Figure(
            "card, line up",
            seen["line up"].card_mb,
            "MB a day",
            most=5,
            beside="other gateways 208-354, measured earlier",
        ),
        Figure(
            "card, line down",
            seen["line down"].card_mb,
            "MB a day",
            most=150,
            beside="other gateways 230-1,007, measured earlier",
        ),
        Figure("line", sent.mb, "MB a month", most=25, beside="other gateways 65-116 without TLS, measured earlier"),
    ]
    return [
        *figures(wanted),
        "",
        *table(COLUMNS, [one.row(name) for name, one in seen.items()]),
        "",
        *prose(
            f"""**Card.** Gateway and mosquitto have an ext4 of their own on a loop device; all sectors written to it
            count, its journal included. A day lasts {DAY_S / factor / 60:.0f} minutes: the gateway's clocks run
            {factor:.0f} times as fast. ext4's do not, and what its journal commits every 5 s is a good part of what is
            written; so the benchmark calls syncfs(2) every {1000 * JOURNAL_S / factor:.0f} ms, which commits the
            journal (and writes what is dirty, sooner than the kernel would) as often a day as ext4 does at the most.
            The same in real time, scaled to a day, is the check; there files still grow, and ten minutes hold none of
            the commits that are made every fifteen. A clean end's writes count once a day. RabbitMQ's clock is not a
            fast one either: the fast day has no heartbeats, and since a confirmation of 50 ms takes
            {factor * 0.05:.0f} s of it, {_said(FAST_ROUTE.splitlines()[1])}. Settings otherwise:
            {_said(ROUTE, SPOOL)}."""
        ),
        "",
        *prose(
            f"""**Line.** {sent.minutes:.0f} minutes in real time to RabbitMQ with TLS, counted at the IP layer on
            loopback, both ways: {per_minute:,.0f} bytes and {sent.traffic.packets / sent.minutes:.1f} packets a minute
            ({sent.traffic.payload / sent.minutes:,.0f} of the bytes are TCP's payload), confirms and heartbeats
            included; a link that is lost and opened again costs {sent.reopened.ip:,} bytes, once a day. Settings:
            {_said(ROUTE, SPOOL, UPLINK)}."""
        ),
    ]
