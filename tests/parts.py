"""Our own parts as real processes, and a scripted node that speaks the protocol word for word."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiomqtt
from fieldpost.control import ask
from fieldpost.errors import Unreachable
from fieldpost.forms import senml
from fieldpost.forms.senml import Arrived
from fieldpost.upstream import consume
from fieldpost.wire import manifest_hash
from servers import free_port

REPO = Path(__file__).parent.parent
MANIFEST = json.dumps(
    {
        "ch": [["temperature", "Cel", 100, "sim", "gauge"], ["humidity", "%RH", 10, "sim", "gauge"]],
        "p": 1000,
        "sl": False,
        "cap": [],
    },
    separators=(",", ":"),
).encode()
HASH = manifest_hash(MANIFEST)
INSTALL = "a1b2c3d4e5f6"


def until(condition: Callable[[], Any], what: str, within_s: float = 30.0) -> Any:
    """Wait until `condition` is true, and return its value; fails with `what` was waited for."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {within_s:.0f} s: {what}"
        time.sleep(0.02)
    return value


async def until_async(condition: Callable[[], Any], what: str, within_s: float = 30.0) -> Any:
    """The same in an event loop."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {within_s:.0f} s: {what}"
        await asyncio.sleep(0.02)
    return value


class Gateway:
    """`fieldpost run` in a folder of its own; it can be killed, paused and started again."""

    def __init__(self, folder: Path, uplinks: str = "", *, kind: str = "mosquitto", spool: str = "") -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.data = folder / "data"
        # A unix socket's path is short, and pytest's folders are not.
        self.run_folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"fp-{os.getpid()}-{self.port}"
        self.control = self.run_folder / "control.sock"
        self.config = folder / "gateway.toml"
        self.config.write_text(
            f"""
[gateway]
name = "test"
data = "{self.data}"
control = "{self.control}"
[broker]
kind = "{kind}"
listen = "127.0.0.1:{self.port}"
[spool]
min_free_disk = "1MB"
{"" if "linger_s" in spool else "linger_s = 0.5"}
{spool}
{uplinks}
"""
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Gateway:
        """Start, and wait until nodes are told to send."""
        self.spawn()
        until(lambda: self.status().get("state") == "up", f"the gateway is up; its log: {self.log()[-2000:]}")
        return self

    def spawn(self) -> None:
        with (self.folder / "gateway.log").open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fieldpost", "run", "--config", str(self.config)], stdout=out, stderr=out
            )

    def status(self) -> dict[str, Any]:
        """What `fieldpost status --json` says; empty while nobody answers."""
        assert self.process is None or self.process.poll() is None, self.log()[-3000:]
        try:
            answer = ask(self.control, "status")
        except Unreachable:
            return {}
        assert isinstance(answer, dict)
        return answer

    def ask(self, verb: str, **request: Any) -> Any:
        return ask(self.control, verb, **request)

    def log(self) -> str:
        path = self.folder / "gateway.log"
        return path.read_text() if path.exists() else ""

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill9(self) -> None:
        """End it as a power cut would, but for what the kernel holds."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def stop(self) -> int:
        """End it as systemd would; returns its exit code."""
        if self.process is None:
            return 0
        self.process.terminate()
        code = self.process.wait(20)
        self.process = None
        return code

    @property
    def broker_pid(self) -> int:
        return int((self.data / "broker" / "mosquitto.pid").read_text())

    def end(self) -> None:
        """Stop it, and the broker of a killed one."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(15)
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
        with contextlib.suppress(OSError, ValueError):
            pid = self.broker_pid
            if str(self.data) in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGTERM)
        for left in ("control.sock", "broker.sock"):
            (self.run_folder / left).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.run_folder.rmdir()


class ScriptedNode:
    """A node that does just what a test says; keeps every ack that it is given."""

    def __init__(self, gateway: Gateway, name: str = "n1", install: str = INSTALL, boot: int = 1) -> None:
        self.name, self.install, self.boot = name, install, boot
        self.connection = 1
        self.started = time.monotonic()
        enrolled = gateway.ask("add", node=name)
        self.key, self.port = enrolled["key"], enrolled["port"]
        self.acks: list[list[Any]] = []
        self.gateway_states: list[str] = []
        self.times: list[list[Any]] = []
        self.client: aiomqtt.Client | None = None
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> ScriptedNode:
        will = json.dumps({"st": "lost", "i": self.install, "b": self.boot, "c": self.connection}).encode()
        self.client = aiomqtt.Client(
            "127.0.0.1",
            self.port,
            username=self.name,
            password=self.key,
            identifier=self.name,
            will=aiomqtt.Will(f"fp1/{self.name}/state", will, 1, True),
            keepalive=5,
        )
        await self.client.__aenter__()
        self._reader = asyncio.create_task(self._read())
        await self.client.subscribe([(f"fp1/{self.name}/ack", 1), ("fp1/gateway/state", 1), ("fp1/gateway/time", 1)])
        await self.publish("state", {"st": "up", "i": self.install, "b": self.boot, "c": self.connection, "s": None})
        await self.publish("manifest", MANIFEST)
        return self

    async def __aexit__(self, *why: object) -> None:
        assert self.client and self._reader
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError, aiomqtt.MqttError):
            await self._reader
        with contextlib.suppress(aiomqtt.MqttError):
            await self.client.__aexit__(None, None, None)
        self.connection += 1

    async def publish(self, leaf: str, payload: Any, *, retain: bool | None = None) -> None:
        assert self.client
        if not isinstance(payload, bytes):
            payload = json.dumps(payload).encode()
        retain = leaf in ("state", "manifest") if retain is None else retain
        await self.client.publish(f"fp1/{self.name}/{leaf}", payload, qos=1, retain=retain)

    async def send(
        self,
        first: int,
        count: int,
        *,
        held: int | None = None,
        drops: list[list[int]] | None = None,
        boot: int | None = None,
        anchor: Any = None,
    ) -> None:
        """Rows first..first+count-1, and wait for the broker's PUBACK (which promises nothing)."""
        rows = [[(count - 1 - n) * 10, 2000 + (first + n) % 500, 450 + (first + n) % 100] for n in range(count)]
        uptime = int((time.monotonic() - self.started) * 1000) + 100_000
        held = first if held is None else held
        boot = self.boot if boot is None else boot
        await self.publish("data", [1, self.install, boot, first, uptime, anchor, held, drops or [], HASH, rows])

    @property
    def acked(self) -> tuple[int, int]:
        """The newest ack of this install: (boot, seq)."""
        mine = [(boot, seq) for install, boot, seq in self.acks if install == self.install]
        return mine[-1] if mine else (-1, -1)

    async def wait_acked(self, boot: int, seq: int, within_s: float = 30.0) -> None:
        await until_async(lambda: self.acked >= (boot, seq), f"{self.name} acked to {boot, seq}", within_s)

    async def _read(self) -> None:
        assert self.client
        async for message in self.client.messages:
            content = json.loads(bytes(message.payload))
            match str(message.topic).rpartition("/")[2]:
                case "ack":
                    self.acks.append(content)
                case "state":
                    self.gateway_states.append(content["st"])
                case "time":
                    self.times.append(content)


@contextlib.contextmanager
def running(gateway: Gateway) -> Iterator[Gateway]:
    """A started gateway that ends with the block."""
    try:
        yield gateway.start()
    finally:
        gateway.end()


class OutboxNode(ScriptedNode):
    """A scripted node that keeps what is not acknowledged and stays a few messages ahead, as a real one does."""

    MESSAGE_ROWS = 50
    AHEAD = 8

    def __init__(self, gateway: Gateway, name: str = "n1", install: str = INSTALL, boot: int = 1) -> None:
        super().__init__(gateway, name, install, boot)
        self.told = 0
        self._fulls = 0

    @property
    def held(self) -> int:
        """The oldest seq of this boot that is not acknowledged."""
        boot, seq = self.acked
        return seq + 1 if boot == self.boot else 0

    async def tell(self, count: int, rows: int = MESSAGE_ROWS) -> None:
        """`count` new rows, `rows` in a message; waits for acks only where it would get too far ahead."""
        await self._tell(self.told, self.told + count, rows)

    async def tell_again(self, rows: int = MESSAGE_ROWS) -> None:
        """Everything that is not acknowledged, as after each connect."""
        await self._tell(self.held, self.told, rows)

    async def all_acked(self, within_s: float = 30.0) -> None:
        """Wait until nothing is held."""
        while self.held < self.told:
            what = f"{self.name} acked to {self.boot, self.told - 1}"
            await until_async(lambda: self.held >= self.told or self._there_is_room_again, what, within_s)
            if self.held < self.told:
                await self.tell_again()

    async def _tell(self, first: int, past: int, rows: int) -> None:
        start = first
        while start < past:
            ahead = start - self.AHEAD * rows
            await until_async(
                lambda: self.held > ahead or self._there_is_room_again,  # noqa: B023
                f"{self.name}: acks up to {ahead}",
            )
            if self._there_is_room_again:
                start = self.held
            self._fulls = self.gateway_states.count("full")
            count = min(rows, past - start)
            self.told = max(self.told, start + count)
            await self.send(start, count, held=min(self.held, start))
            start += count

    @property
    def _there_is_room_again(self) -> bool:
        """The gateway was full and is not: what it refused meanwhile must be sent again."""
        return self.gateway_states[-1:] == ["up"] and self.gateway_states.count("full") > self._fulls


def temperature_of(seq: int) -> float:
    """What a scripted node measures in a row."""
    return (2000 + seq % 500) / 100


class Arrivals:
    """What arrives at a far side, in order: `rows` of nodes, `records` of the gateway. A repeat must say the same."""

    def __init__(self) -> None:
        self.rows: list[Arrived] = []
        self.records: list[Arrived] = []
        self._said: dict[str, object] = {}

    def take(self, body: bytes) -> None:
        """One message's body."""
        for row in senml.decode(body):
            said = (row.values, row.event)
            assert self._said.setdefault(row.id, said) == said, f"{row.id} came with two contents"
            (self.rows if row.event is None else self.records).append(row)

    def seqs(self, node: str = "n1", install: str = INSTALL, boot: int = 1, *, lane: str | None = None) -> list[int]:
        """A boot's rows in the order in which they first arrived."""
        mine = [row for row in self.rows if (row.node, row.install, row.boot) == (node, install, boot)]
        return list(dict.fromkeys(row.seq for row in mine if lane is None or row.lane == lane))

    @property
    def repeats(self) -> int:
        return len(self.rows) - len({row.id for row in self.rows})

    @property
    def gaps(self) -> list[tuple[str, int, int, int | None, str]]:
        """Gap records: (node, boot, first, last, why), each once."""
        events = {record.id: record.event for record in self.records}
        return [(e.node, e.boot, e.first, e.last, e.why) for e in events.values() if e is not None and e.kind == "gap"]

    @contextlib.asynccontextmanager
    async def reading(self, url: str, password: str = "") -> AsyncIterator[Arrivals]:
        """Take what arrives at `url` while the block runs, from the moment in which it begins."""
        listens = asyncio.Event()

        async def read() -> None:
            told = functools.partial(_set_when_up, listens)
            async with contextlib.aclosing(consume(url, password=password, changed=told, timeout_s=5)) as arriving:
                async for arrival in arriving:
                    self.take(arrival.body)

        reader = asyncio.create_task(read())
        try:
            await until_async(lambda: listens.is_set() or reader.done(), f"{url} can be read")
            if reader.done():
                reader.result()
            yield self
        finally:
            if not reader.done():
                reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader


def _set_when_up(listens: asyncio.Event, up: bool, _: str) -> None:
    if up:
        listens.set()


class Line:
    """The line to a far side: a port of its own on loopback that can be cut and mended."""

    def __init__(self, far_port: int) -> None:
        self._far_port = far_port
        self._is_cut = False
        self._ends: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    async def __aenter__(self) -> Line:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *why: object) -> None:
        assert self._server
        self._server.close()
        self.cut()
        await asyncio.gather(*self._pumps)

    def cut(self) -> None:
        """Every connection is lost, and no new one comes through."""
        self._is_cut = True
        for end in self._ends:
            end.transport.abort()

    def mend(self) -> None:
        self._is_cut = False

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            writer.transport.abort()
            return
        with contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._far_port)
            mine = {writer, far_writer}
            pumps = {
                asyncio.create_task(_pump(reader, far_writer)),
                asyncio.create_task(_pump(far_reader, writer)),
            }
            self._ends |= mine
            self._pumps |= pumps
            await asyncio.wait(pumps)
            self._ends -= mine
            self._pumps -= pumps


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(65_536):
            sink.write(data)
            await sink.drain()
    sink.close()


def table(table_: str, /, **settings: str | float | bool) -> str:
    """One `[[table]]` of a gateway's configuration."""
    # What JSON writes for a text, a number or a flag, TOML reads as the same.
    return f"[[{table_}]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())


def configure(gateway: Gateway, tables: str) -> None:
    """Put other uplinks and routes into the configuration of a gateway that does not run."""
    head = gateway.config.read_text().partition("[[")[0]
    gateway.config.write_text(head + tables)
