"""Fieldpost beside a plain mosquitto with its bridge: the same rows, the same machine, one run.

    python -m tests.bench [--seconds 20] [--rows 100000]

writes RESULTS.md beside this file. What the two promise differs, and the table says so: the bridge confirms a row when
it is in memory, Fieldpost when it is on the disk.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

from fieldpost.forms import senml  # noqa: E402
from fieldpost.upstream import consume  # noqa: E402
from fieldpost.wire import manifest_hash  # noqa: E402
from parts import Gateway  # noqa: E402  # tests/ is no package that is installed
from servers import Mosquitto, shared_rabbitmq  # noqa: E402

from .load import MANIFEST, Node, Publisher, now_us  # noqa: E402

NODES = 20
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Figures:
    """What one system did. Rates in rows/s, latencies in ms, CPU in seconds per 100,000 rows."""

    name: str
    accepted: dict[int, float] = field(default_factory=dict)
    forwarded: dict[int, float] = field(default_factory=dict)
    cpu: dict[int, float] = field(default_factory=dict)
    rss_mb: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    cpu_slow: float = 0.0
    line_slow: float = 0.0
    line_batch: dict[int, float] = field(default_factory=dict)


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
        ages = sorted(self.ages_us)
        return ages[min(len(ages) - 1, int(len(ages) * share))] / 1000


@contextlib.asynccontextmanager
async def background(work: Awaitable[None]) -> AsyncIterator[None]:
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def cpu_seconds(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(stat[11]) + int(stat[12])
    return total / TICKS


def rss_mb(pids: list[int]) -> float:
    lines = [re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()) for pid in pids]
    return sum(int(line[1]) for line in lines if line) / 1024


def line_bytes(port: int, pids: list[int]) -> int:
    """Payload bytes of TCP both ways on the connections of `pids` to `port`, by the kernel's count."""
    out = subprocess.run(["ss", "-tinpH", f"dport = :{port}"], capture_output=True, text=True, check=True).stdout
    total = 0
    for connection in re.split(r"\n(?=\S)", out):
        if any(f"pid={pid}," in connection for pid in pids):
            total += sum(int(n) for n in re.findall(r"bytes_(?:sent|received):(\d+)", connection))
    return total


class Fieldpost:
    """Nodes -> mosquitto -> gateway -> upstream, acknowledged when on the disk."""

    def __init__(self, name: str, folder: Path, uplink: str, upstream_port: int, watch_url: str) -> None:
        self.name = name
        self.upstream_port = upstream_port
        self._watch_url = watch_url
        routes = '[[routes]]\nid = "all"\nuplink = "up"\nwindow = 8'
        self._gateway = Gateway(folder, f"{uplink}\n{routes}")
        self._made = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        try:
            self._gateway.start()
            yield
        finally:
            self._gateway.end()

    @property
    def pids(self) -> list[int]:
        assert self._gateway.process
        return [self._gateway.process.pid, self._gateway.broker_pid]

    async def nodes(self, rows: int) -> list[Node]:
        """New nodes, connected; a message of theirs carries `rows` rows."""
        self._made += 1
        made = []
        for n in range(NODES):
            name = f"b{self._made}-{n}"
            enrolled = self._gateway.ask("add", node=name)
            node = Node(name, f"{self._made:06x}{n:06x}", manifest_hash(MANIFEST), rows, window=200 * rows)
            await node.connect(enrolled["port"], enrolled["key"])
            made.append(node)
        await asyncio.sleep(0.5)
        return made

    async def watch(self, arrivals: Arrivals) -> None:
        async for item in consume(self._watch_url):
            for row in senml.decode(item.body) if hasattr(item, "body") else ():
                if "sent-us" in row.values:
                    sent, seq = row.values["sent-us"][0], row.values["n"][0]
                    assert isinstance(sent, float) and isinstance(seq, float)
                    arrivals.take(row.node, int(seq), int(sent))


class _BridgeNode:
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
        self.upstream_port = upstream.port
        self._upstream = upstream
        extra = (
            "allow_anonymous true\nmax_inflight_messages 1000\nmax_queued_messages 0\n"
            f"connection up\naddress 127.0.0.1:{upstream.port}\ntopic fp1/# out 1\n"
            "cleansession false\nnotifications false\n"
        )
        self._broker = Mosquitto(folder / "bridge", extra=extra)
        self._made = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with self._broker:
            yield

    @property
    def pids(self) -> list[int]:
        return [self._broker.pid]

    async def nodes(self, rows: int) -> list[_BridgeNode]:
        self._made += 1
        made = [_BridgeNode(f"b{self._made}-{n}", rows) for n in range(NODES)]
        for node in made:
            await node.connection.connect(self._broker.port, node.name)
        await asyncio.sleep(0.5)
        return made

    async def watch(self, arrivals: Arrivals) -> None:
        def take(topic: bytes, payload: bytes) -> None:
            node = topic.split(b"/")[1].decode()
            for _, sent, _, seq in json.loads(payload)[9]:
                arrivals.take(node, seq, sent)

        watcher = Publisher(take)
        await watcher.connect(self._upstream.port, "watcher")
        await watcher.subscribe("fp1/+/data")
        try:
            await asyncio.Event().wait()
        finally:
            await watcher.close()


System = Fieldpost | Bridge


async def slow(system: System, figures: Figures, seconds: int) -> None:
    """50 rows/s, one a message: how old a row is when it arrives, and what it costs."""
    arrivals = Arrivals()
    async with background(system.watch(arrivals)):
        nodes = await system.nodes(1)
        await asyncio.sleep(1)
        cpu, line = cpu_seconds(system.pids), line_bytes(system.upstream_port, system.pids)
        began, total = time.monotonic(), 50 * seconds
        for n in range(total):
            await asyncio.sleep(max(0.0, began + n / 50 - time.monotonic()))
            nodes[n % NODES].send_one()
        await arrivals.all(total)
        figures.p50_ms, figures.p99_ms = arrivals.percentile(0.5), arrivals.percentile(0.99)
        figures.cpu_slow = (cpu_seconds(system.pids) - cpu) / total * 100_000
        figures.line_slow = (line_bytes(system.upstream_port, system.pids) - line) / total
        for node in nodes:
            await node.connection.close()


async def fast(system: System, figures: Figures, rows: int, total: int) -> None:
    """As fast as it goes, `rows` a message: until accepted, and until all have arrived."""
    arrivals = Arrivals()
    async with background(system.watch(arrivals)):
        nodes = await system.nodes(rows)
        await asyncio.sleep(1)
        cpu, line = cpu_seconds(system.pids), line_bytes(system.upstream_port, system.pids)
        began = time.monotonic()
        await asyncio.gather(*(node.flood(total // NODES) for node in nodes))
        figures.accepted[rows] = total / (time.monotonic() - began)
        await arrivals.all(total)
        figures.forwarded[rows] = total / (time.monotonic() - began)
        figures.cpu[rows] = (cpu_seconds(system.pids) - cpu) / total * 100_000
        figures.line_batch[rows] = (line_bytes(system.upstream_port, system.pids) - line) / total
        figures.rss_mb = max(figures.rss_mb, rss_mb(system.pids))
        for node in nodes:
            await node.connection.close()


async def measure(system: System, seconds: int, total: int) -> Figures:
    figures = Figures(system.name)
    with system.running():
        await slow(system, figures, seconds)
        print(f"  {system.name}: 50/s done", file=sys.stderr)
        for rows, count in ((1, total), (10, total * 3)):
            await fast(system, figures, rows, count)
            print(f"  {system.name}: {rows} a message done", file=sys.stderr)
    return figures


ROWS: list[tuple[str, Callable[[Figures], str]]] = [
    ("a row counts as accepted when", lambda f: "in memory" if "bridge" in f.name else "on the disk"),
    ("accepted, rows/s, 1 a message", lambda f: f"{f.accepted[1]:,.0f}"),
    ("accepted, rows/s, 10 a message", lambda f: f"{f.accepted[10]:,.0f}"),
    ("arrived upstream, rows/s, 1 a message", lambda f: f"{f.forwarded[1]:,.0f}"),
    ("arrived upstream, rows/s, 10 a message", lambda f: f"{f.forwarded[10]:,.0f}"),
    ("CPU s per 100,000 rows, 1 a message", lambda f: f"{f.cpu[1]:.1f}"),
    ("CPU s per 100,000 rows, 10 a message", lambda f: f"{f.cpu[10]:.1f}"),
    ("CPU s per 100,000 rows at 50/s", lambda f: f"{f.cpu_slow:.1f}"),
    ("RSS of gateway and broker after it, MB", lambda f: f"{f.rss_mb:.0f}"),
    ("bytes on the line per row at 50/s", lambda f: f"{f.line_slow:.0f}"),
    ("bytes on the line per row, 1 a message, flooded", lambda f: f"{f.line_batch[1]:.1f}"),
    ("bytes on the line per row, 10 a message, flooded", lambda f: f"{f.line_batch[10]:.1f}"),
    ("sensor to upstream at 50/s, p50 ms", lambda f: f"{f.p50_ms:.1f}"),
    ("sensor to upstream at 50/s, p99 ms", lambda f: f"{f.p99_ms:.1f}"),
]


def report(all_figures: list[Figures], seconds: int, total: int) -> str:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    mosquitto = subprocess.run(["/usr/sbin/mosquitto", "-h"], capture_output=True, text=True).stdout.split("\n")[0]
    lines = [
        "# What it costs, beside a plain mosquitto with its bridge",
        "",
        f"{time.strftime('%Y-%m-%d %H:%M')}, {os.cpu_count()} cores of {model[1] if model else platform.machine()}, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, {mosquitto}.",
        "",
        f"Written by `make prove` (`python -m tests.bench`): {NODES} nodes, three channels a row; {seconds} s at",
        f"50 rows/s, then {total:,} rows one a message and {total * 3:,} ten a message, as fast as they are",
        "accepted. Load generator, all",
        "brokers, upstream and watcher share the machine, so read the ratios. Bytes on the line: TCP payload both ways",
        "between gateway (or bridge) and upstream. CPU and RSS: gateway and its broker.",
        "",
        "| | " + " | ".join(f.name for f in all_figures) + " |",
        "|---|" + "---|" * len(all_figures),
    ]
    lines += [f"| {label} | " + " | ".join(value(f) for f in all_figures) + " |" for label, value in ROWS]
    return "\n".join(lines) + "\n"


def upstream_broker(folder: Path) -> Mosquitto:
    """A far side that keeps everything for its watcher: by default mosquitto drops what is beyond 1,000 messages."""
    return Mosquitto(folder / "upstream", extra="max_queued_messages 0\nmax_inflight_messages 1000")


async def main(seconds: int, total: int) -> None:
    with tempfile.TemporaryDirectory(prefix="fieldpost-bench-") as name, upstream_broker(Path(name)) as upstream:
        folder = Path(name)
        rabbit = shared_rabbitmq()
        password = folder / "password"
        password.touch(0o600)
        password.write_text(rabbit.password)
        bare = rabbit.url(rabbit.user, password="")
        mqtt = f'[[uplinks]]\nname = "up"\nkind = "mqtt"\nurl = "{upstream.url()}"\ntopic = "bench/up"'
        amqp = (
            f'[[uplinks]]\nname = "up"\nkind = "amqp"\nurl = "{bare}"\npassword_file = "{password}"\n'
            'queue = "bench"\nrouting_key = "bench"'
        )
        rabbit_url = rabbit.url(rabbit.user, password=rabbit.password, query="?queue=bench")
        rabbit.declare("bench", {"x-queue-type": "quorum"})
        systems: list[System] = [
            Bridge(folder, upstream),
            Fieldpost("fieldpost to MQTT", folder / "mqtt", mqtt, upstream.port, f"{upstream.url()}/bench/up"),
            Fieldpost("fieldpost to RabbitMQ", folder / "amqp", amqp, rabbit.port, rabbit_url),
        ]
        figures = [await measure(system, seconds, total) for system in systems]
    text = report(figures, seconds, total)
    (HERE / "RESULTS.md").write_text(text)
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=20, help="of the run at 50 rows/s")
    parser.add_argument("--rows", type=int, default=100_000, help="of the run with one row a message")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.seconds, arguments.rows))
