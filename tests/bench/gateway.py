"""The gateway under load: a real process, its nodes, and the far sides that it may have."""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parts import Gateway
from servers import Mosquitto, RabbitMQ, free_port

from .load import Node

HERE = Path(__file__).parent


class Bench(Gateway):
    """`fieldpost run` in a folder of its own.

    Its clocks run `factor` times as fast; with `profile` it writes there at its end where its time went.
    """

    def __init__(
        self, folder: Path, uplinks: str = "", *, spool: str = "", factor: float = 1.0, profile: Path | None = None
    ) -> None:
        super().__init__(folder, uplinks, spool=spool)
        self._runner = ["-m", "fieldpost"]
        if factor != 1.0:
            self._runner = [str(HERE / "fast.py"), str(factor)]
        if profile is not None:
            self._runner = [str(HERE / "sampled.py"), str(profile)]
        self._made = 0

    def spawn(self) -> None:
        with (self.folder / "gateway.log").open("ab") as out:
            command = [sys.executable, *self._runner, "run", "--config", str(self.config)]
            self.process = subprocess.Popen(command, stdout=out, stderr=out)

    @property
    def pids(self) -> list[int]:
        """The gateway's process and its broker's."""
        assert self.process
        return [self.process.pid, self.broker_pid]

    async def nodes(self, count: int, make: Callable[[str, str, int], Node]) -> list[Node]:
        """New nodes, connected, of `make(name, install, number)`."""
        self._made += 1
        made = []
        for n in range(count):
            name = f"b{self._made}-{n}"
            enrolled = self.ask("add", node=name)
            # Random, as a board's is: what it costs on the line is in the figures.
            node = make(name, random.Random(name).randbytes(6).hex(), n)
            await node.connect(enrolled["port"], enrolled["key"])
            made.append(node)
        await asyncio.sleep(0.5)
        return made

    def route(self) -> dict[str, Any]:
        """How the first route is."""
        routes = self.status().get("routes") or [{}]
        first: dict[str, Any] = routes[0]
        return first

    async def drained(self, within_s: float = 600.0) -> None:
        """Wait until the far side has confirmed everything."""
        deadline = time.monotonic() + within_s
        while self.route().get("backlog", 1) > 0:
            assert time.monotonic() < deadline, f"still waiting: {self.route()}"
            await asyncio.sleep(0.05)

    async def linked(self, within_s: float = 60.0) -> None:
        """Wait until the uplink is up."""
        deadline = time.monotonic() + within_s
        while self.route().get("state") != "up":
            assert time.monotonic() < deadline, f"no link: {self.route()}"
            await asyncio.sleep(0.02)


def route(uplink: str, settings: str = "") -> str:
    """An uplink and the one route to it."""
    return f'{uplink}\n[[routes]]\nid = "all"\nuplink = "up"\n{settings}\n'


def to_rabbitmq(rabbit: RabbitMQ, folder: Path, queue: str, *, tls: bool = False, port: int = 0, more: str = "") -> str:
    """An uplink to a quorum queue; on another `port` where something lies between."""
    password = folder / "password"
    password.touch(0o600)
    password.write_text(rabbit.password)
    url = f"amqp://{rabbit.user}@127.0.0.1:{port or rabbit.port}/%2F"
    if tls:
        assert rabbit.tls
        url = f"amqps://{rabbit.user}@127.0.0.1:{port or rabbit.tls_port}/%2F?cacertfile={rabbit.tls.ca}"
    return (
        f'[[uplinks]]\nname = "up"\nkind = "amqp"\nurl = "{url}"\npassword_file = "{password}"\n'
        f'queue = "{queue}"\nrouting_key = "{queue}"\n{more}'
    )


def to_nobody() -> str:
    """An uplink to where nobody listens: the line is down."""
    return f'[[uplinks]]\nname = "up"\nkind = "amqp"\nurl = "amqp://nobody@127.0.0.1:{free_port()}/%2F"\n'


def to_mqtt(upstream: Mosquitto) -> str:
    """An uplink to a plain broker."""
    return f'[[uplinks]]\nname = "up"\nkind = "mqtt"\nurl = "{upstream.url()}"\ntopic = "bench/up"\n'


class Gate:
    """A line to a port of this machine that can be cut, and be there again."""

    def __init__(self, to: int) -> None:
        self._to = to
        self.port = free_port()
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._carried: set[asyncio.Task[None]] = set()

    async def up(self) -> None:
        """Connections are taken, and carried."""
        self._server = await asyncio.start_server(self._take, "127.0.0.1", self.port)

    async def down(self) -> None:
        """Nobody listens, and what was open is gone."""
        if self._server is not None:
            self._server.close()
            for writer in list(self._open):
                writer.transport.abort()
            await asyncio.gather(*self._carried, return_exceptions=True)
            self._server = None

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._carry(reader, writer))
        self._carried.add(task)
        task.add_done_callback(self._carried.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to)
        for one in (writer, far_writer):
            self._open.add(one)
            one.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
        finally:
            for one in (writer, far_writer):
                self._open.discard(one)
                one.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.transport.abort()
