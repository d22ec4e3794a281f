"""What somebody upstream sees: counted right, also when it comes twice, late or broken."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from pathlib import Path
from typing import Any

import aiomqtt
import pytest
from fieldpost.cli.watch import plain, table
from fieldpost.demo import embedded_broker
from fieldpost.forms import senml
from fieldpost.reading import Channel, Event, Manifest, Reading
from fieldpost.watch import MAX_CHANNELS, Tally, sparkline
from rich.console import Console

MANIFEST = Manifest("00112233", (Channel("temperature", "Cel", 100, "sim", "gauge"),), 1000)


def pack(*seqs: int, boot: int = 1) -> bytes:
    rows = [Reading("n1", "a1b2c3d4e5f6", boot, s, s, 1_763_900_000_000 + s, 50, "00112233", (2000 + s,)) for s in seqs]
    return senml.encode(rows, {"00112233": MANIFEST})


def test_repeats_are_known_by_their_ids_and_disorder_is_counted() -> None:
    tally = Tally()
    assert [repeat for _, repeat in tally.take(pack(0, 1, 2))] == [False, False, False]
    assert [repeat for _, repeat in tally.take(pack(1, 2, 3))] == [True, True, False]
    tally.take(pack(6))
    tally.take(pack(5))
    tally.take(pack(0, boot=2))
    node = tally.nodes["n1"]
    assert (node.readings, node.repeats, node.disordered) == (7, 2, 1)
    assert node.channels["temperature"].value == 20.0


def test_gaps_and_presence_belong_to_the_node_that_they_are_about() -> None:
    tally = Tally()
    events = [
        Event("gap", "n1", "a1b2c3d4e5f6", 1, 3, 9, "dropped by the node"),
        Event("gap", "n1", "a1b2c3d4e5f6", 1, 20, None, "perhaps lost with the node's memory"),
        Event("presence", "n1", "a1b2c3d4e5f6", 1, 1, None, "lost"),
    ]
    rows = [Reading("gateway", "f" * 12, 1, n, 0, 1, 0, "", (), event) for n, event in enumerate(events)]
    for _ in range(2):
        tally.take(senml.encode(rows, {}))
    node = tally.nodes["n1"]
    assert (node.gaps, node.missing, node.state, tally.repeats) == (2, 7, "lost", 3)
    assert node.newest_gap == "20-? of boot 1: perhaps lost with the node's memory"
    assert list(tally.nodes) == ["n1"]


def test_what_is_not_understood_is_counted() -> None:
    tally = Tally()
    assert tally.take(b"\x00rubbish") == []
    assert (tally.malformed, tally.readings) == (1, 0)


def test_a_sparkline_goes_from_the_smallest_to_the_largest() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0, 5.0]) == "▁▁"
    assert sparkline([]) == ""


def test_a_late_row_is_counted_and_does_not_stand_as_the_newest() -> None:
    tally = Tally()
    for seq in (0, 2, 1):
        tally.take(pack(seq))
    node = tally.nodes["n1"]
    assert (node.readings, node.disordered, node.channels["temperature"].value) == (3, 1, 20.02)
    assert "1 out of order" in plain(tally)[0]


HOSTILE: list[dict[str, Any]] = [
    {"bn": "[/node]/"},
    {"n": "[/channel]"},
    {"n": "\x1b]0;owned\x07"},
    {"v": None, "vs": "\x1b[2J"},
    {"bt": 1e300},
    {"bt": -1e18},
    {"n": "gap", "v": None, "vs": "[/why]\x1b[2J", "about": ["n1", "a" * 12, 1, 5, 3]},
]


@pytest.mark.parametrize("more", HOSTILE)
def test_what_comes_from_the_network_neither_breaks_the_screen_nor_steers_the_terminal(more: dict[str, Any]) -> None:
    record = {"bn": "n1/", "i": "a" * 12, "b": 1, "q": 0, "bt": 1.7e9, "n": "t", "u": "Cel", "v": 1.0}
    tally = Tally()
    tally.take(json.dumps([record | more]).encode())
    screen = io.StringIO()
    Console(file=screen, width=120).print(table(tally, "lost: [/why]"))
    assert tally.malformed == 0 and tally.nodes
    assert "\x1b" not in screen.getvalue() + "".join(plain(tally))


def test_a_node_with_ever_new_channels_does_not_fill_the_memory() -> None:
    tally = Tally()
    for seq in range(2 * MAX_CHANNELS):
        tally.take(json.dumps([{"bn": "n1/", "i": "a" * 12, "b": 1, "q": seq, "n": f"c{seq}", "v": 1}]).encode())
    assert len(tally.nodes["n1"].channels) == MAX_CHANNELS and tally.readings == 2 * MAX_CHANNELS


async def test_json_from_the_embedded_broker_has_each_reading_on_a_line(tmp_path: Path) -> None:
    pytest.importorskip("iotcore")
    with embedded_broker(tmp_path / "upstream") as port:
        url = f"mqtt://127.0.0.1:{port}/t?version=3.1.1"
        words = ["-m", "fieldpost", "watch", url, "--json", "--count", "5"]
        pipe = asyncio.subprocess.PIPE
        watch = await asyncio.create_subprocess_exec(sys.executable, *words, stdout=pipe, stderr=pipe)
        assert watch.stderr
        try:
            async with asyncio.timeout(30):
                assert b"connected to" in await watch.stderr.readline()
                async with aiomqtt.Client("127.0.0.1", port) as client:
                    for body in (pack(0, 1, 2), b"rubbish", pack(2, 3, 4)):
                        await client.publish("t", body, qos=1)
                out, err = await watch.communicate()
        finally:
            if watch.returncode is None:
                watch.kill()
                await watch.wait()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["seq"], row["repeat"]) for row in rows] == [
        (0, False),
        (1, False),
        (2, False),
        (2, True),
        (3, False),
        (4, False),
    ]
    assert rows[0] == {
        "id": "n1.a1b2c3d4e5f6.1.0",
        "node": "n1",
        "install": "a1b2c3d4e5f6",
        "boot": 1,
        "seq": 0,
        "time": 1_763_900_000.0,
        "error_s": 0.05,
        "values": {"temperature": 20.0},
        "repeat": False,
        "event": None,
    }
    assert watch.returncode == 0
    assert b"5 readings of 1 nodes, 1 repeats recognised" in err and b"1 messages not understood" in err
