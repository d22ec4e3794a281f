"""How fast a backlog goes to RabbitMQ, with confirms, in each form."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from servers import RabbitMQ, shared_rabbitmq

from .gateway import Bench, route, to_rabbitmq
from .hoard import in_process
from .meters import cpu_seconds, rss_mb, scratch
from .report import QUICK, Figure, figures, number, prose, section, table

TITLE = "a backlog of a million on its way to RabbitMQ"
FORMS = {"senml": 50_000, "columns": 100_000}
"""Readings a second to reach, by form."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Rates in readings/s; `bytes` of message bodies a reading; CPU in seconds per 100,000 readings."""

    form: str
    readings: int
    rate: float
    bytes: float
    cpu: float
    far_cpu: float
    peak_mb: float

    def row(self) -> list[str]:
        values = (self.rate, self.bytes, self.cpu, self.far_cpu, self.peak_mb)
        return [self.form, f"{self.readings:,}", *map(number, values)]


COLUMNS = (
    "form",
    "readings",
    "readings/s",
    "bytes a reading",
    "CPU s per 100,000",
    "the same, RabbitMQ",
    "RSS at the most, MB",
)


async def drain(rabbit: RabbitMQ, filled: Path, folder: Path, form: str, profile: Path | None = None) -> Seen:
    """Everything in a copy of a filled spool, in one form."""
    queue = f"drain-{form}"
    rabbit.declare(queue, {"x-queue-type": "quorum"})
    gateway = Bench(folder, route(to_rabbitmq(rabbit, folder.parent, queue), f'form = "{form}"'), profile=profile)
    shutil.copytree(filled, gateway.data)
    try:
        gateway.spawn()
        while not gateway.route().get("confirmed"):
            await asyncio.sleep(0.005)
        began, before = time.monotonic(), gateway.route()["confirmed"]
        assert gateway.process
        cpu, far = cpu_seconds(gateway.process.pid), cpu_seconds(rabbit.pid)
        await gateway.drained()
        took, end = time.monotonic() - began, gateway.route()
        done = end["confirmed"] - before
        assert waiting(rabbit, queue) == end["messages"], "what was confirmed is in the queue"
        return Seen(
            form,
            end["confirmed"],
            done / took,
            end["bytes"] / end["confirmed"],
            (cpu_seconds(gateway.process.pid) - cpu) / done * 100_000,
            (cpu_seconds(rabbit.pid) - far) / done * 100_000,
            rss_mb(gateway.process.pid, peak=True),
        )
    finally:
        gateway.end()
        rabbit.delete(queue)


def waiting(rabbit: RabbitMQ, queue: str) -> int:
    """Messages in a queue."""
    with rabbit.connected() as connection:
        return int(connection.channel().queue_declare(queue, passive=True).method.message_count)


async def run(quick: bool) -> str:
    """The topic's section."""
    count = 300_000 if quick else 1_000_000
    rabbit = shared_rabbitmq()
    seen, profiles = [], []
    with scratch() as folder:
        await in_process("fill", folder / "filled", count)
        for form, least in FORMS.items():
            seen.append(await drain(rabbit, folder / "filled", folder / form, form))
            print(f"  {seen[-1]}", file=sys.stderr)
            if seen[-1].rate < least:
                out = folder / f"{form}.txt"
                await drain(rabbit, folder / "filled", folder / f"{form}-profiled", form, out)
                profiles += ["", f"Where the time goes, {form}:", "", "```", *out.read_text().splitlines(), "```"]
    wanted = [
        Figure(
            f"{one.form}, zlib, confirmed by a quorum queue",
            one.rate,
            "readings/s",
            least=FORMS[one.form],
            beside="mosquitto's bridge 33,000 from RAM, RabbitMQ's shovel 11,000, measured earlier",
        )
        for one in seen
    ]
    body = [
        *figures(wanted),
        "",
        *table(COLUMNS, [one.row() for one in seen]),
        "",
        *prose(
            f"""{count:,} readings of ten nodes, three channels each, on the card when the gateway starts; from the
            first confirmation to the last, RabbitMQ on the same machine."""
        ),
        *profiles,
    ]
    return section("drain", TITLE, body, QUICK if quick else "")
