"""What a reading of 120 bytes costs the card, at 50 a second: with the uplink up, and with the line down."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from dataclasses import dataclass

from servers import Mosquitto, shared_rabbitmq

from .farm import JOURNAL_S
from .gateway import Bench, route, to_nobody, to_rabbitmq
from .load import STATION, Node, Publisher, Walk, manifest
from .meters import Disk, folder_bytes, scratch
from .report import QUICK, Figure, figures, prose, section, table

TITLE = "bytes that reach the disk for a reading of 120 bytes, at 50 a second"
NODES = 20
PER_S = 50
LINGER_S = 10
FACTOR = 10.0
"""With the uplink up a commit comes every few minutes: an hour or two of them take a tenth of the time."""

PATIENT = "heartbeat_s = 600\ntimeout_s = 150"
SPOOL = f"linger_s = {LINGER_S}"


@dataclass(frozen=True, slots=True)
class Seen:
    """What was written for so many readings, in bytes a reading.

    `payload`: of the message; `start`: in the first third, while files still grow; `after`: in the rest; `whole`: all
    of it, with what a clean end writes; `files`: what the files occupy then.
    """

    readings: int
    payload: float
    start: float
    after: float
    whole: float
    files: float

    def row(self, name: str) -> list[str]:
        values = (self.readings, self.payload, self.start, self.after, self.whole, self.files)
        return [name, *(f"{value:,.0f}" for value in values)]


COLUMNS = ("", "readings", "bytes of a message", "first third", "the rest", "all, with a clean end", "files")


async def steady(nodes: list[Node], per_s: int, total: int) -> None:
    """One row a message, so many a second in all."""
    began = time.monotonic()
    for n in range(total):
        await asyncio.sleep(max(0.0, began + n / per_s - time.monotonic()))
        nodes[n % len(nodes)].send_one()


async def fieldpost(uplink: str, seconds: int, *, line_up: bool, factor: float = 1.0) -> Seen:
    """Gateway and broker on a disk of their own, for so many seconds of ours; the clocks run `factor` times as fast."""
    with Disk() as disk:
        gateway = Bench(disk.mount / "gateway", route(uplink), spool=SPOOL, factor=factor)
        try:
            gateway.start()
            if line_up:
                await gateway.linked()
            nodes = await gateway.nodes(
                NODES,
                lambda name, install, n: Node(
                    name, install, says=manifest(*STATION), walk=Walk(n, len(STATION)), pace=factor
                ),
            )
            await asyncio.sleep(2)
            written, per_s = [disk.written()], round(PER_S * factor)
            if factor > 1:
                disk.beat(JOURNAL_S / factor)
            for share in (1, 2):
                await steady(nodes, per_s, per_s * seconds * share // 3)
                await asyncio.sleep((LINGER_S + 2) / factor)
                written.append(disk.written())
            readings = sum(node.sent for node in nodes)
            async with asyncio.timeout(30):
                for node in nodes:
                    await node.all_acked()
            payload = sum(node.sent_bytes for node in nodes) / readings
            for node in nodes:
                await node.connection.close()
            disk.still()
            gateway.stop()
            whole = (disk.written() - written[0]) / readings
            return Seen(readings, payload, *_each(written, readings), whole, folder_bytes(gateway.data) / readings)
        finally:
            gateway.end()


def _each(written: list[int], readings: int) -> tuple[float, float]:
    """Bytes a reading in the first third and in the rest."""
    first, rest = (later - earlier for earlier, later in itertools.pairwise(written))
    return first / (readings / 3), rest / (readings * 2 / 3)


async def mosquitto(seconds: int) -> Seen:
    """A mosquitto that saves at each change, for a subscriber that is away: set by people who want to lose nothing."""
    with Disk() as disk:
        folder = disk.mount / "broker"
        folder.mkdir()
        extra = (
            f"persistence true\npersistence_location {folder}/\nautosave_on_changes true\nautosave_interval 1\n"
            "max_queued_messages 0\n"
        )
        with Mosquitto(folder, extra=extra) as broker:
            away = Publisher()
            await away.connect(broker.port, "away", clean=False)
            await away.subscribe("fp1/+/data")
            await asyncio.sleep(0.5)
            await away.close()
            client = Publisher()
            await client.connect(broker.port, "client")
            body, written, total = bytes(106), [disk.written()], PER_S * seconds
            for share in (1, 2):
                began = time.monotonic()
                for n in range(total * share // 3):
                    await asyncio.sleep(max(0.0, began + n / PER_S - time.monotonic()))
                    client.publish(b"fp1/node-01/data", body)
                await asyncio.sleep(1)
                written.append(disk.written())
            await client.close()
            each = _each(written, total)
            return Seen(total, len(body), *each, (written[-1] - written[0]) / total, folder_bytes(folder) / total)


async def run(quick: bool) -> str:
    """The topic's section."""
    seconds = 60 if quick else 600
    rabbit = shared_rabbitmq()
    with scratch() as folder:
        rabbit.declare("card", {"x-queue-type": "quorum"})
        up, down, saving = await asyncio.gather(
            fieldpost(to_rabbitmq(rabbit, folder, "card", more=PATIENT), seconds, line_up=True, factor=FACTOR),
            fieldpost(to_nobody(), seconds, line_up=False),
            mosquitto(seconds // 5),
        )
        rabbit.delete("card")
    print(f"  {up}\n  {down}\n  {saving}", file=sys.stderr)
    wanted = [
        Figure("uplink up, durable, kept for replay", up.after, "bytes a reading", most=20),
        Figure(
            "line down, nothing acknowledged that is not on the card",
            down.after,
            "bytes a reading",
            most=120,
            beside=f"mosquitto saving on change {saving.after:,.0f}; RabbitMQ's shovel 5,104, measured earlier",
        ),
    ]
    rows = [
        up.row("fieldpost, uplink up"),
        down.row("fieldpost, line down"),
        saving.row("mosquitto, saving on change"),
    ]
    body = [
        *figures(wanted),
        "",
        *table(COLUMNS, rows),
        "",
        *prose(
            f"""{NODES} nodes, ten channels a reading, {seconds} s (mosquitto: {seconds // 5} s, for what it writes
            grows with what it holds). Each system has an ext4 of its own on a loop device; all sectors written to it
            count, its journal included; the figures are those of the rest, when files grow no more than they must. With
            the uplink up the clocks run {FACTOR:.0f} times as fast (see the farm), so that it is
            {seconds * FACTOR / 60:.0f} minutes. Settings: `{SPOOL}`: a node holds on to what is not acknowledged, so a
            longer linger loses nothing."""
        ),
    ]
    return section("card", TITLE, body, QUICK if quick else "")
