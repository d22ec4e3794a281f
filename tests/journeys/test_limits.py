"""Where there is no room, or no time: a full card, a bound on bytes, readings that are too old, a clock that is wrong.

The card is a real file system of a few megabytes on a loop device, which takes root: without, those tests are
skipped, and pytest's summary says so.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fieldpost.forms.senml import Arrived
from fieldpost.wire import manifest_hash
from parts import HASH, INSTALL, Arrivals, Gateway, Line, OutboxNode, ScriptedNode, table, until_async
from servers import Mosquitto

MakeGateway = Callable[..., Gateway]

pytestmark = pytest.mark.slow

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="NOT PROVED HERE: a small card to fill needs root to mount it"
)


@pytest.fixture
def card(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 12 MB. Name it before `make_gateway`: it can go only when nobody has anything open on it."""
    image, folder = tmp_path / "card.img", tmp_path / "card"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(12_000_000)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def uplink(port: int, name: str = "up") -> str:
    return table("uplinks", name=name, kind="mqtt", url=f"mqtt://127.0.0.1:{port}", topic=name, timeout_s=2.0)


def route(id: str = "all", uplink: str = "up", **more: str | float) -> str:
    return table("routes", id=id, uplink=uplink, **more)


def waiting(gateway: Gateway, id: str = "all") -> int:
    return next((one["backlog"] for one in gateway.status().get("routes", ()) if one["id"] == id), -1)


def move(gateway: Gateway, card: Path, min_free: str) -> None:
    """Have a gateway keep its readings on a card."""
    text = gateway.config.read_text()
    text = text.replace(str(gateway.data), str(card / "data")).replace('"1MB"', f'"{min_free}"')
    gateway.config.write_text(text)
    gateway.data = card / "data"


def fill(card: Path, but_for: int) -> Path:
    """Leave so many bytes."""
    disk = os.statvfs(card)
    ballast = card / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(4096, disk.f_bavail * disk.f_frsize - but_for))
    return ballast


WIDE = json.dumps(
    {
        "ch": [["temperature", "Cel", 100, "sim", "gauge"], *([f"c{n}", "", 1, "sim", "gauge"] for n in range(40))],
        "p": 1000,
        "sl": False,
        "cap": [],
    },
    separators=(",", ":"),
).encode()


class WideNode(OutboxNode):
    """Its rows have many channels, and nothing in them can be packed away: a hundred bytes each and more."""

    MESSAGE_ROWS = 25

    async def send(self, first: int, count: int, *, held: int | None = None, **more: Any) -> None:
        await self.publish("manifest", WIDE)
        uptime = int((time.monotonic() - self.started) * 1000) + 100_000
        rows = [[count - 1 - n, *(noise(first + n, channel) for channel in range(41))] for n in range(count)]
        drops = more.get("drops", [])
        hash_ = manifest_hash(WIDE)
        await self.publish("data", [1, self.install, self.boot, first, uptime, None, held, drops, hash_, rows])


def noise(seq: int, channel: int = 0) -> int:
    """Scaled by 100, as a temperature: 0.00 to 40.95; above 40 °C one in 43 times."""
    return zlib.crc32(f"{seq} {channel}".encode()) % 4096


@needs_root
@pytest.mark.parametrize("min_free", ["2MB", "0"], ids=["floor", "not a byte"])
async def test_a_card_that_fills_holds_the_nodes_up_and_loses_nothing(
    card: Path, make_gateway: MakeGateway, broker: Mosquitto, min_free: str
) -> None:
    arrivals = Arrivals()
    async with Line(broker.port) as line, arrivals.reading(f"{broker.url()}/up"):
        gateway = make_gateway(uplink(line.port) + route(), spool="stage_readings = 1000\nlinger_s = 0.2")
        move(gateway, card, min_free)
        await asyncio.to_thread(gateway.start)
        line.cut()
        async with OutboxNode(gateway) as node:
            await node.tell(2000)
            await node.all_acked()
            ballast = fill(card, 1_000_000 if min_free == "2MB" else 16_384)
            while "full" not in node.gateway_states:
                held = node.held
                await node.tell(50)
                more = "an ack, or that the gateway is full"
                await until_async(lambda: node.held > held or "full" in node.gateway_states, more)  # noqa: B023
            status = gateway.status()
            assert status["state"] == "full"
            assert status["spool"]["state"] in ("full", "failing"), status["spool"]
            refused = node.told
            await node.send(refused, 50, held=node.held)  # a node that does not listen
            node.told += 50
            await until_async(lambda: gateway.status()["intake"]["refused_full"] >= 1, "it is refused")
            assert node.held <= refused
            # In the meantime it goes on being what it was, over a kill too.
            await asyncio.to_thread(gateway.kill9)
            gateway.spawn()
            await until_async(lambda: gateway.status().get("state") in ("up", "full"), "it starts on a full card")
            node.gateway_states.clear()
            ballast.unlink()
            await until_async(lambda: gateway.status().get("state") == "up", "there is room, it goes on")
        async with node:
            await node.tell_again()
            await node.tell(100)
            await node.all_acked()
            line.mend()
            await until_async(
                lambda: waiting(gateway) == 0 and len(arrivals.seqs()) == node.told, "all is upstream", 60
            )
    assert sorted(arrivals.seqs()) == list(range(node.told))
    assert arrivals.gaps == [] and gateway.ask("ledger") == []


async def test_at_max_bytes_rows_become_their_figures_and_no_alarm_or_gap_is_given_up(
    make_gateway: MakeGateway, broker: Mosquitto
) -> None:
    arrivals = Arrivals()
    rule = table("urgent", channel="temperature", above=40.0)
    async with Line(broker.port) as line, arrivals.reading(f"{broker.url()}/up"):
        spool = 'max_bytes = "300kB"\nlinger_s = 0.2'
        gateway = make_gateway(uplink(line.port) + route() + rule, spool=spool)
        await asyncio.to_thread(gateway.start)
        line.cut()
        async with WideNode(gateway) as node:
            await node.send(25, 25, held=25, drops=[[0, 24]])  # a gap, before anything else
            node.told = 50
            while not gateway.status()["spool"]["ledger"].get("given up") and node.told < 20_000:
                await node.tell(200)
                await node.all_acked()
            status = gateway.status()["spool"]
            assert status["bytes"] <= status["max_bytes"]
            assert status["ledger"]["thinned"] > 0 and status["ledger"]["given up"] > 0
            stored = status["stored"]
            line.mend()
            told = node.told
            await until_async(
                lambda: waiting(gateway) == 0 and accounted(arrivals) >= set(range(25, told)), "all is upstream", 60
            )
    whole, covered, given_up = set(arrivals.seqs()), rows_in(arrivals, "thinned"), rows_in(arrivals, "gap", "given up")
    assert covered and given_up and whole.isdisjoint(covered) and stored < told
    for record in {one.id: one for one in arrivals.records}.values():
        if record.event is not None and record.event.kind == "thinned":
            judge_figures(record)
    alarms = {seq for seq in range(25, told) if noise(seq) > 4000}
    assert alarms <= whole and alarms == set(arrivals.seqs(lane="urgent"))
    assert ("n1", 1, 0, 24, "dropped by the node") in arrivals.gaps
    print(f"{told} rows: {len(whole)} whole, {len(covered)} as figures, {len(given_up)} given up")


def rows_in(arrivals: Arrivals, kind: str, why: str = "") -> set[int]:
    """The rows that records of a kind name; no two may name the same."""
    events = {record.id: record.event for record in arrivals.records}
    ranges = [range(e.first, (e.last or e.first) + 1) for e in events.values() if e and e.kind == kind and why in e.why]
    rows = {seq for one in ranges for seq in one}
    assert len(rows) == sum(map(len, ranges))
    return rows


def accounted(arrivals: Arrivals) -> set[int]:
    """Rows that have come, or are named by a record."""
    return set(arrivals.seqs()) | rows_in(arrivals, "thinned") | rows_in(arrivals, "gap")


def judge_figures(record: Arrived) -> None:
    """A thinned record says of its rows what is true."""
    assert record.event is not None and record.event.last is not None
    temperatures = [noise(seq) / 100 for seq in range(record.event.first, record.event.last + 1)]
    figures = {name.rsplit("/", 1)[1]: value for name, (value, _) in record.values.items() if "/temperature/" in name}
    assert figures["count"] == len(temperatures)
    assert (figures["min"], figures["max"]) == (min(temperatures), max(temperatures))
    assert figures["mean"] == pytest.approx(sum(temperatures) / len(temperatures), abs=0.01)


async def test_a_routes_ttl_gives_up_for_that_route_only_and_says_so(
    make_gateway: MakeGateway, broker: Mosquitto
) -> None:
    short, long = Arrivals(), Arrivals()
    async with (
        Line(broker.port) as line,
        short.reading(f"{broker.url()}/short"),
        long.reading(f"{broker.url()}/long"),
    ):
        gateway = make_gateway(
            uplink(line.port, "short") + uplink(line.port, "long")
            + route("short", "short", ttl="5s") + route("long", "long"),
            spool="linger_s = 0.1",
        )  # fmt: skip
        await asyncio.to_thread(gateway.start)
        line.cut()
        async with OutboxNode(gateway) as node:
            await node.tell(500)
            await node.all_acked()
            # Each row is at most half a second older than its coming, and the linger is over: it is acknowledged.
            stored = time.monotonic()
            await until_async(lambda: time.monotonic() - stored > 5.5, "all of them are too old")
            line.mend()
            await until_async(lambda: {one["state"] for one in gateway.status()["routes"]} == {"up"}, "both are up")
            await node.tell(100)
            await until_async(lambda: waiting(gateway, "short") == waiting(gateway, "long") == 0, "nothing waits")
            await until_async(lambda: short.gaps and len(long.seqs()) == 600, "what each is to get has arrived")
    assert sorted(long.seqs()) == list(range(600))
    lost = {seq for _, _, first, last, _ in short.gaps for seq in range(first, (last or first) + 1)}
    assert set(short.seqs()) >= set(range(500, 600))
    assert set(short.seqs()) | lost == set(range(600)) and set(short.seqs()).isdisjoint(lost)
    assert len(lost) >= 500
    assert {why for *_, why in short.gaps} == {"expired: route short"}


# A clock that is wrong.


@pytest.fixture(scope="module")
def clock_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clock.c, made into something to preload."""
    library = tmp_path_factory.mktemp("clock") / "clock.so"
    source = Path(__file__).with_name("clock.c")
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "a C compiler is needed: apt-get install gcc libc6-dev"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
    return library


class Hand:
    """The clock of the gateways that are started while it is there."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "clock"

    def set(self, wrong_ms: int, *, synced: bool) -> None:
        new = self.file.with_suffix(".new")
        new.write_text(f"{wrong_ms} {int(synced)}\n")
        new.rename(self.file)


@pytest.fixture
def hand(clock_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hand:
    hand = Hand(tmp_path)
    monkeypatch.setenv("LD_PRELOAD", str(clock_library))
    monkeypatch.setenv("FIELDPOST_CLOCK", str(hand.file))
    return hand


YEARS_MS = 5 * 365 * 86_400_000
"""How wrong the clock of a Pi may be that has no battery."""


def is_dated(row: Arrived, sent: dict[int, tuple[float, float]]) -> bool:
    """Whether a row's time lies in the span in which the test sent it, by the error that it claims itself."""
    since, until = sent[row.seq]
    return since - row.error_s <= row.time_s <= until + row.error_s


async def test_readings_from_before_the_clock_was_set_are_corrected_when_it_is(
    make_gateway: MakeGateway, broker: Mosquitto, hand: Hand
) -> None:
    hand.set(-YEARS_MS, synced=False)
    now, later = Arrivals(), Arrivals()
    sent: dict[int, tuple[float, float]] = {}

    async def tell(node: OutboxNode) -> None:
        first, since = node.told, time.time()
        await node.tell(20, rows=1)
        await node.all_acked()
        sent.update(dict.fromkeys(range(first, node.told), (since, time.time())))

    async with (
        Line(broker.port) as line,
        now.reading(f"{broker.url()}/now"),
        later.reading(f"{broker.url()}/later"),
    ):
        gateway = make_gateway(
            uplink(broker.port, "now") + uplink(line.port, "later") + route("now", "now") + route("later", "later"),
            spool="linger_s = 0.1",
        )
        await asyncio.to_thread(gateway.start)
        line.cut()
        async with OutboxNode(gateway) as node:
            await tell(node)  # 0-19
            await until_async(lambda: len(now.seqs()) == 20, "they arrive as they are")
            assert {row.quality for row in now.rows} == {"unsynced"}
            assert all(abs(row.time_s + YEARS_MS / 1000 - sent[row.seq][0]) < 60 for row in now.rows)
            before = node.times[-1]
            assert before[2] is False
            # The gateway is killed and starts again, with the clock still wrong; then somebody sets it.
            await asyncio.to_thread(gateway.kill9)
            await asyncio.to_thread(gateway.start)
        async with node:
            await tell(node)  # 20-39
            hand.set(0, synced=True)
            await until_async(lambda: node.times[-1][2] is True, "the nodes are told")
            assert abs(node.times[-1][0] - time.time() * 1000) < 60_000
            await tell(node)  # 40-59
            line.mend()
            await until_async(lambda: len(later.seqs()) == len(now.seqs()) == 60, "all has arrived at both", 60)
    quality = {row.seq: row.quality for row in later.rows}
    assert quality == dict.fromkeys(range(40), "corrected") | dict.fromkeys(range(40, 60), "synced")
    assert all(is_dated(row, sent) for row in later.rows)
    assert {row.quality for row in now.rows if row.seq >= 40} == {"synced"}
    assert all(is_dated(row, sent) for row in now.rows if row.seq >= 40)


async def test_a_boot_that_never_heard_the_time_is_dated_by_an_interval_and_one_that_did_by_its_anchor(
    make_gateway: MakeGateway, broker: Mosquitto, hand: Hand
) -> None:
    hand.set(0, synced=True)
    arrivals = Arrivals()
    async with arrivals.reading(f"{broker.url()}/up"):
        gateway = make_gateway(uplink(broker.port) + route(), spool="linger_s = 0.1")
        await asyncio.to_thread(gateway.start)
        began = time.time()
        async with OutboxNode(gateway, boot=1) as node:
            await node.tell(5)
            await node.all_acked()
        async with boot(gateway, 2) as node:
            pass  # it fills its outbox and dies, without having heard the time
        async with boot(gateway, 4) as node:
            at = time.time()
            await node.publish("state", {"st": "up", "i": INSTALL, "b": 4, "c": 1, "s": None, "u": 10})
            await node.send(0, 5, boot=2, anchor=0)
            await node.wait_acked(2, 4)
            await node.send(0, 5, boot=3, anchor=[99_000, round(at * 1000) - 30_000, 20])
            await node.wait_acked(3, 4)
            ended = time.time()
            await node.publish(
                "data", [1, INSTALL, 4, 0, 20, None, 0, [], HASH, [[1, 2000 + n, 450] for n in range(5)]]
            )
            await node.wait_acked(4, 4)
            await until_async(lambda: len(arrivals.rows) >= 20, "all is upstream")
    rows = {boot: [row for row in arrivals.rows if row.boot == boot] for boot in (1, 2, 3, 4)}
    assert {boot: {row.quality for row in of} for boot, of in rows.items()} == {
        1: {"synced"},
        2: {"bounded"},
        3: {"anchored"},
        4: {"synced"},
    }
    for row in rows[2]:  # between the last row of the boot before and the start of the one after it
        assert 0 < row.error_s < ended - began + 1
        assert began - 1 <= row.time_s - row.error_s and row.time_s + row.error_s <= ended + 1
    for row in rows[3]:
        assert row.error_s < 5 and at - 60 < row.time_s < at


def boot(gateway: Gateway, number: int) -> ScriptedNode:
    return ScriptedNode(gateway, boot=number)


def test_the_clock_in_the_hand_is_the_one_that_a_process_sees(hand: Hand) -> None:
    hand.set(-YEARS_MS, synced=False)
    told = subprocess.run(["date", "+%s"], capture_output=True, text=True, check=True).stdout
    assert abs(int(told) - (time.time() - YEARS_MS / 1000)) < 60
