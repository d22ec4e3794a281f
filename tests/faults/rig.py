"""Everything real at once, and an oracle of obligations: what a node was told is durable must arrive at every uplink,
or be named by a gap record."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fieldpost.simulate import SimulatedNode, write_settings
from fieldpost.upstream import consume
from fieldpost.watch import Tally
from parts import Gateway, until_async
from servers import Mosquitto, RabbitMQ

QUIET = {
    "verbose": True,
    "keepalive_s": 6,
    "timeout_s": 3,
    "ack_wait_s": 5,
    "first_wait_ms": 100,
    "longest_wait_ms": 2000,
}


@dataclass(frozen=True)
class Count:
    """What the oracle found at one uplink."""

    acknowledged: int
    arrived: int
    lost: int
    repeats: int
    disordered: int
    malformed: int


class Rig:
    """Nodes -> gateway -> RabbitMQ and an MQTT upstream. `obligations` are what the nodes themselves have freed."""

    def __init__(
        self, folder: Path, rabbitmq: RabbitMQ, *, nodes: int, rate: float = 2.0, spool: str = "", **more: Any
    ):
        self.folder = folder
        self.rabbitmq = rabbitmq
        # A watcher that is behind must find everything: by default mosquitto drops what is beyond 1,000 messages.
        self.upstream = Mosquitto(folder / "upstream", extra="max_queued_messages 0\nmax_inflight_messages 1000")
        self.queue = f"rig-{folder.name}-{time.monotonic_ns()}"
        self.rate = rate
        self.nodes: dict[str, SimulatedNode] = {}
        self.sinks = {"rabbitmq": Tally(), "mqtt": Tally()}
        self._count = nodes
        self._more = {**QUIET, **more}
        self._spool = spool

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Rig]:
        password = self.folder / "rabbit.password"
        password.touch(0o600)
        password.write_text(self.rabbitmq.password)
        with self.upstream:
            self.rabbitmq.declare(self.queue, {"x-queue-type": "quorum"})
            self.rabbitmq.settle()
            self.gateway = Gateway(self.folder / "gateway", self._uplinks(password), spool=self._spool)
            mqtt_url = f"{self.upstream.url()}/rig"
            rabbit_url = self.rabbitmq.url(self.rabbitmq.user, password="", query=f"?queue={self.queue}")
            watchers = [
                asyncio.create_task(self._watch("mqtt", mqtt_url, "")),
                asyncio.create_task(self._watch("rabbitmq", rabbit_url, self.rabbitmq.password)),
            ]
            try:
                await asyncio.to_thread(self.gateway.start)
                for number in range(self._count):
                    self.add_node(f"n{number}").start()
                await until_async(lambda: self.arrived("mqtt") and self.arrived("rabbitmq"), "the first readings", 60)
                yield self
            finally:
                for node in self.nodes.values():
                    node.resume()
                    node.kill()
                await asyncio.to_thread(self.gateway.end)
                for watcher in watchers:
                    watcher.cancel()
                await asyncio.gather(*watchers, return_exceptions=True)

    def add_node(self, name: str, **more: Any) -> SimulatedNode:
        folder = self.folder / name
        write_settings(folder, self.gateway.ask("add", node=name), self.rate, {**self._more, **more})
        self.nodes[name] = SimulatedNode(folder)
        return self.nodes[name]

    def _uplinks(self, password: Path) -> str:
        bare = self.rabbitmq.url(self.rabbitmq.user, password="")
        return f"""
[[uplinks]]
name = "rabbit"
kind = "amqp"
url = "{bare}"
password_file = "{password}"
queue = "{self.queue}"
routing_key = "{self.queue}"
timeout_s = 3
[[uplinks]]
name = "mqtt"
kind = "mqtt"
url = "{self.upstream.url()}"
topic = "rig"
timeout_s = 3
[[routes]]
id = "to-rabbit"
uplink = "rabbit"
[[routes]]
id = "to-mqtt"
uplink = "mqtt"
"""

    async def _watch(self, sink: str, url: str, password: str) -> None:
        async with contextlib.aclosing(consume(url, password=password, timeout_s=3)) as arriving:
            async for arrival in arriving:
                self.sinks[sink].take(arrival.body)

    # The oracle.

    def arrived(self, sink: str) -> int:
        return self.sinks[sink].readings

    def obligations(self) -> dict[tuple[str, str, int], int]:
        """(node, install, boot) -> the highest seq that the node freed, by what it said itself."""
        told: dict[tuple[str, str, int], int] = {}
        for name, node in self.nodes.items():
            install = ""
            for line in node.log.read_text(errors="replace").splitlines() if node.log.exists() else ():
                if match := re.match(r"node \S+ install (\w+) boot", line):
                    install = match[1]
                elif match := re.match(r"ack (\d+) (\d+)$", line):
                    key = (name, install, int(match[1]))
                    told[key] = max(told.get(key, -1), int(match[2]))
        return told

    def missing(self, sink: str) -> list[tuple[str, str, int, int]]:
        """Freed rows that neither arrived at `sink` nor are named by a gap record there."""
        tally = self.sinks[sink]
        missing = []
        for (node, install, boot), upto in self.obligations().items():
            marks = tally.nodes[node].boots.get((install, boot)) if node in tally.nodes else None
            missing += [(node, install, boot, s) for s in range(upto + 1) if marks is None or not marks.has(s)]
        return missing

    def count(self, sink: str) -> Count:
        tally = self.sinks[sink]
        return Count(
            acknowledged=sum(upto + 1 for upto in self.obligations().values()),
            arrived=tally.readings,
            lost=len(self.missing(sink)),
            repeats=tally.repeats,
            disordered=sum(node.disordered for node in tally.nodes.values()),
            malformed=tally.malformed,
        )

    async def settle(self, within_s: float = 90.0) -> dict[str, Count]:
        """Let everything flow until all that is acknowledged has arrived; returns what was found in any case."""
        deadline = time.monotonic() + within_s
        while True:
            await asyncio.sleep(0.2)
            waits = self._waiting()
            # Nodes go on, and an ack may be a moment ahead of what has arrived here: look at both at one moment.
            found = {sink: self.count(sink) for sink in self.sinks}
            if time.monotonic() >= deadline or not (waits or any(count.lost for count in found.values())):
                return found

    def backlog(self, route: str) -> int:
        """How many readings a route has yet to confirm."""
        waiting: int = next(one["backlog"] for one in self.gateway.status()["routes"] if one["id"] == route)
        return waiting

    def _waiting(self) -> bool:
        status = self.gateway.status()
        return not status or max(route["backlog"] for route in status["routes"]) > 20

    async def fresh(self, what: str, *sinks: str, within_s: float = 60.0) -> None:
        """Wait until the way is open again: ten new rows of each node acknowledged, and as many arrived."""
        before = {sink: self.arrived(sink) for sink in sinks or self.sinks}
        acked = sum(self.obligations().values())
        await until_async(
            lambda: (
                sum(self.obligations().values()) > acked + 10 * len(self.nodes)
                and all(self.arrived(sink) > before[sink] + 10 * len(self.nodes) for sink in before)
            ),
            f"fresh readings after {what}",
            within_s,
        )

    # Faults.

    def kill_gateway(self) -> None:
        self.gateway.kill9()
        self.gateway.spawn()

    def kill_broker(self) -> None:
        os.kill(self.gateway.broker_pid, signal.SIGKILL)

    def kill_rabbitmq(self) -> None:
        self.rabbitmq.kill9()
        self.rabbitmq.start()

    def kill_node(self) -> None:
        node = next(iter(self.nodes.values()))
        node.kill()
        node.start()

    @contextlib.contextmanager
    def silent_broker(self) -> Any:
        pid = self.gateway.broker_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    @contextlib.contextmanager
    def silent_rabbitmq(self) -> Any:
        self.rabbitmq.pause()
        try:
            yield
        finally:
            self.rabbitmq.resume()


KILLS: dict[str, Callable[[Rig], None]] = {
    "gateway": Rig.kill_gateway,
    "mosquitto": Rig.kill_broker,
    "rabbitmq": Rig.kill_rabbitmq,
    "node": Rig.kill_node,
}
