"""Our own parts as real processes, and a scripted node that speaks the protocol word for word."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiomqtt
from fieldpost.control import ask
from fieldpost.errors import Unreachable
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
