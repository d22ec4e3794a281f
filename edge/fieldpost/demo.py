"""The whole way on one machine: nodes, gateway, a line that is cut, an upstream, and an honest count at the end.

The judge is an oracle of its own: it listens to what the gateway acknowledged to the nodes, and asks of each
acknowledged row whether it arrived upstream or was reported as a gap.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .control import ask
from .errors import Unreachable
from .mqtt import Address, Incoming, connect
from .simulate import SimulatedNode, end_with_parent, write_settings
from .upstream import consume
from .watch import Tally

NODES = ("greenhouse-1", "greenhouse-2", "well")
RATE = 2.0
TOPIC = "fieldpost/demo"
ACKS_WITHIN_S = 3.0


@dataclass(frozen=True, slots=True)
class Plan:
    """When the line is cut, and for how long, in seconds from the first reading; `lose` is a fault for the tests: the
    line swallows and confirms that many messages."""

    cut_after_s: float = 15.0
    cut_for_s: float = 10.0
    lose: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of the rows. `lost`: acknowledged, not arrived, and in no gap record.

    `measured` is what the nodes said last; what of it is not acknowledged is still in their outboxes.
    """

    measured: int
    acknowledged: int
    arrived: int
    lost: int
    repeats: int
    gaps: int

    @property
    def good(self) -> bool:
        """Nothing was lost; where nothing was acknowledged, nothing was promised and nothing is proved."""
        return self.lost == 0 and self.acknowledged > 0


class Line:
    """The way between gateway and upstream, as a proxy that can be cut: connections die, new ones are refused."""

    def __init__(self, upstream_port: int, lose: int) -> None:
        self.port = free_port()
        self._upstream_port = upstream_port
        self._lose = lose
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", self.port)

    async def cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        except OSError:
            writer.close()
            return
        both = {writer, far_writer}
        self._writers |= both
        up = asyncio.create_task(self._pump(reader, far_writer, writer if self._lose else None))
        down = asyncio.create_task(self._pump(far_reader, writer, None))
        await asyncio.wait([up, down], return_when=asyncio.FIRST_COMPLETED)
        for task in (up, down):
            task.cancel()
        for one in both:
            one.transport.abort()
        self._writers -= both

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, back: asyncio.StreamWriter | None
    ) -> None:
        passed = 0
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                # A QoS 1 PUBLISH in one piece: confirm it and let it vanish, as a bad upstream would.
                # The first ones go through: they tell of nodes that came up, and the judge asks for rows.
                if back is not None and self._lose and data[0] & 0xF6 == 0x32 and (passed := passed + 1) > 10:
                    self._lose -= 1
                    at = 2 if data[1] < 0x80 else 3
                    length = data[at] << 8 | data[at + 1]
                    back.write(b"\x40\x02" + data[at + 2 + length : at + 4 + length])
                    continue
                writer.write(data)
                await writer.drain()


class Demo:
    """Everything that runs; an async context manager that leaves nothing behind."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.tally = Tally()
        self.line = "up"
        self._folder = folder
        self._plan = plan
        self._control = folder / "control.sock"
        self._port = free_port()
        self._gateway: asyncio.subprocess.Process | None = None
        self._nodes: list[SimulatedNode] = []
        self._acked: dict[tuple[str, str, int], int] = {}
        self._measured: dict[tuple[str, str, int], int] = {}
        self._arrived_up = asyncio.Event()
        self.first = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start upstream, watcher, line, gateway and nodes, in this order. Raises Unreachable."""
        with embedded_broker(self._folder / "upstream") as upstream_port:
            self._line = Line(upstream_port, self._plan.lose)
            async with _task(self._watch(upstream_port)):
                await self._wait(self._arrived_up, "the watcher is connected upstream")
                await self._line.mend()
                try:
                    await self._start_gateway()
                    async with _task(self._listen_to_acks()):
                        self._start_nodes()
                        await self._wait(self.first, f"the first reading arrives; see {self._folder}/gateway.log")
                        yield
                finally:
                    for node in self._nodes:
                        node.stop()
                    await self._stop_gateway()
                    await self._line.cut()

    async def cut(self) -> None:
        self.line = "cut"
        await self._line.cut()

    async def mend(self) -> None:
        await self._line.mend()
        self.line = "up"

    async def finish(self, within_s: float) -> Verdict:
        """Stop the nodes, wait until everything acknowledged has arrived or `within_s` is over, and judge.

        Raises Unreachable where the gateway did not live to the end.
        """
        for node in self._nodes:
            await asyncio.to_thread(node.stop)
        # The newest acks follow the commit. One that was held up by a reconnect comes when its node is back, which
        # here it never is; so that wait is a short one.
        await self._until(lambda: not self._unacknowledged(), ACKS_WITHIN_S)
        await self._until(lambda: not self._missing() and not self.backlog(), within_s)
        if self._gateway is not None and self._gateway.returncode is not None:
            raise Unreachable(f"the gateway has ended: {self._last_words()}")
        return Verdict(
            measured=sum(last + 1 for last in self._measured.values()),
            acknowledged=sum(upto + 1 for upto in self._acked.values()),
            arrived=self.tally.readings,
            lost=self._missing(),
            repeats=self.tally.repeats,
            gaps=sum(node.missing for node in self.tally.nodes.values()),
        )

    def backlog(self) -> int:
        """Readings that wait at the gateway."""
        try:
            status = ask(self._control, "status")
        except Unreachable:
            return 0
        return max([0, *(int(route["backlog"]) for route in status["routes"])])

    def _missing(self) -> int:
        """Acknowledged rows that have neither arrived nor are named by a gap record."""
        missing = 0
        for (node, install, boot), upto in self._acked.items():
            marks = self.tally.nodes[node].boots.get((install, boot)) if node in self.tally.nodes else None
            missing += sum(1 for seq in range(upto + 1) if marks is None or not marks.has(seq))
        return missing

    def _unacknowledged(self) -> bool:
        """Whether something arrived that the nodes have no ack for yet: its ack is still on its way to us."""
        return any(
            marks.upto > self._acked.get((name, install, boot), -1)
            for name, node in self.tally.nodes.items()
            for (install, boot), marks in node.boots.items()
        )

    async def _watch(self, port: int) -> None:
        def changed(up: bool, text: str) -> None:
            if up:
                self._arrived_up.set()

        url = f"mqtt://127.0.0.1:{port}/{TOPIC}?version=3.1.1"
        async with contextlib.aclosing(consume(url, changed=changed)) as arriving:
            async for arrival in arriving:
                self.tally.take(arrival.body)
                if self.tally.readings:
                    self.first.set()

    async def _start_gateway(self) -> None:
        config = self._folder / "gateway.toml"
        config.write_text(
            f"""
[gateway]
name = "demo"
data = "{self._folder / "data"}"
control = "{self._control}"
[broker]
kind = "embedded"
listen = "127.0.0.1:{self._port}"
[spool]
min_free_disk = "1MB"
trust_card = true
linger_s = 1
[[uplinks]]
name = "upstream"
kind = "mqtt"
url = "mqtt://127.0.0.1:{self._line.port}"
version = "3.1.1"
topic = "{TOPIC}"
timeout_s = 3
[[routes]]
id = "all"
uplink = "upstream"
"""
        )
        with (self._folder / "gateway.log").open("wb") as log:
            self._gateway = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "fieldpost",
                "run",
                "--config",
                str(config),
                stdout=log,
                stderr=log,
                preexec_fn=end_with_parent(signal.SIGKILL),  # its data is of no use without us
                start_new_session=True,  # Ctrl-C in a terminal is for us: the gateway is needed for the count
            )
        for _ in range(300):
            with contextlib.suppress(Unreachable):
                if ask(self._control, "status")["state"] == "up":
                    return
            if self._gateway.returncode is not None:
                break
            await asyncio.sleep(0.05)
        raise Unreachable(f"the gateway did not start: {self._last_words()}")

    def _last_words(self) -> str:
        return (self._folder / "gateway.log").read_text()[-2000:].strip()

    async def _stop_gateway(self) -> None:
        if self._gateway is not None and self._gateway.returncode is None:
            self._gateway.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(10):
                    await self._gateway.wait()
            except TimeoutError:
                self._gateway.kill()
                await self._gateway.wait()

    def _start_nodes(self) -> None:
        enrolled = [ask(self._control, "add", node=name) for name in NODES]
        for one in enrolled:
            folder = self._folder / one["node"]
            write_settings(folder, one, RATE, {"first_wait_ms": 100})
            self._nodes.append(SimulatedNode(folder).start())

    async def _listen_to_acks(self) -> None:
        """What the gateway promises to its nodes, and what they say that they measured, heard on its own broker."""
        key = (self._folder / "data" / "broker" / "gateway.intake.key").read_text().strip()

        def take(message: Incoming) -> None:
            _, node, leaf = message.topic.split("/")
            content = json.loads(message.payload)
            if leaf == "ack":
                install, boot, seq = content
                self._acked[node, install, boot] = max(seq, self._acked.get((node, install, boot), -1))
            elif "s" in content:
                self._measured[node, content["i"], content["b"]] = content["s"]

        while True:
            with contextlib.suppress(Unreachable):
                address = Address("gateway.intake", key, port=self._port)
                async with connect(address, "demo-judge", take) as connection:
                    await connection.subscribe([("fp1/+/ack", 0), ("fp1/+/state", 0)])
                    await connection.lost()
            await asyncio.sleep(0.2)

    async def _until(self, true: Callable[[], bool], within_s: float) -> None:
        """Wait until `true()` or `within_s` is over."""
        deadline = asyncio.get_running_loop().time() + within_s
        while not true() and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.1)

    async def _wait(self, event: asyncio.Event, what: str) -> None:
        try:
            async with asyncio.timeout(30):
                await event.wait()
        except TimeoutError:
            raise Unreachable(f"not within 30 s: {what}") from None


@contextmanager
def embedded_broker(folder: Path) -> Iterator[int]:
    """A broker on a free loopback port, ended with the block; without passwords, it stands for somebody's cloud."""
    folder.mkdir()
    port = free_port()
    options = json.dumps({"listen": "127.0.0.1", "port": port})
    code = "from iotcore._serve import main; main()"
    with (folder / "broker.log").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-c", code, options],
            stdin=subprocess.PIPE,  # it ends when this closes, however we end
            stdout=log,
            stderr=log,
            env={**os.environ, "IOTCORE_LOG_LEVEL": "ERROR"},
            start_new_session=True,
        )
    try:
        yield port
    finally:
        child.terminate()
        child.wait()
        if child.stdin:
            child.stdin.close()


@asynccontextmanager
async def _task(work: Any) -> AsyncIterator[None]:
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def free_port() -> int:
    """A port on loopback that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
