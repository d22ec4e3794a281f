"""The figures: in `status`, as text and as metrics they are the same, and what they say of a backlog is so."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fieldpost.metrics import ROUTE, SPOOL, Metric, metrics, text
from parts import Gateway, Line, OutboxNode, table, until_async
from servers import Mosquitto


def figures(exposition: str) -> dict[str, float]:
    """The values of an exposition by `name{labels}`."""
    lines = [line for line in exposition.splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_a_name_is_explained_once_and_has_its_kind() -> None:
    told = text(iter([Metric("a_total", 1, "of a", {"x": "1"}), Metric("b", 2, "of b"), Metric("a_total", 3, "of a")]))
    assert told == (
        '# HELP a_total of a\n# TYPE a_total counter\na_total{x="1"} 1\na_total 3\n# HELP b of b\n# TYPE b gauge\nb 2\n'
    )


@pytest.mark.parametrize("value", [0, 7, 0.1, 1_234_567, 98_765_432_101, 1.5e-9, 123_456_789.25])
def test_a_value_is_told_to_its_last_digit(value: float) -> None:
    assert figures(text(iter([Metric("a", float(value), "of a")]))) == {"a": value}


def test_a_label_can_hold_anything() -> None:
    told = text(iter([Metric("a", 1, "of a", {"why": 'said "no"\\\nand went'})]))
    assert told.splitlines()[-1] == 'a{why="said \\"no\\"\\\\\\nand went"} 1'


def uplink(port: int, name: str) -> str:
    return table("uplinks", name=name, kind="mqtt", url=f"mqtt://127.0.0.1:{port}", topic=name, timeout_s=2.0)


def fieldpost(gateway: Gateway, *words: str) -> str:
    command = [sys.executable, "-m", "fieldpost", *words, "--config", str(gateway.config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def of(status: dict[str, Any], id: str) -> dict[str, Any]:
    """A route's figures."""
    route: dict[str, Any] = next(one for one in status["routes"] if one["id"] == id)
    return route


def dates(gateway: Gateway) -> list[int]:
    """The dates of all that is stored."""
    found: list[int] = []
    for lane in (0, 1):
        position = 0
        while position is not None:
            page = gateway.ask("page", lane=lane, position=position)
            found += [reading["time_ms"] for reading in page["readings"]]
            position = page["next"]
    return found


def judge_spool(gateway: Gateway, status: dict[str, Any], rows: int) -> None:
    """What is told of the card, against the disk itself and what the test knows."""
    spool = status["spool"]
    records = status["spool"]["routes"]["cut"]["urgent"]
    assert spool["taken"] == rows and spool["stored"] == rows + records and spool["in_memory"] == 0
    files = sum(path.stat().st_size for path in gateway.data.glob("spool.db*"))
    assert 0 < spool["bytes_per_reading"] * spool["stored"] < spool["bytes"] <= files
    disk = os.statvfs(gateway.data)
    room = min(spool["max_bytes"] - spool["bytes"], spool["free_bytes"] - 1_000_000)
    assert spool["hours_until_full"] * spool["readings_per_hour"] * spool["bytes_per_reading"] == pytest.approx(room)
    assert rows / 2 < spool["readings_per_hour"] * max(status["up_s"], 1.0) / 3600 < rows * 2
    assert gateway.process
    io = Path(f"/proc/{gateway.process.pid}/io").read_text()
    written = int(re.search(r"^write_bytes: (\d+)", io, re.MULTILINE)[1])  # type: ignore[index]
    assert 0 < spool["card_bytes"] <= written
    assert spool["card_bytes_per_reading"] * rows <= spool["card_bytes"] * 1.001
    bears = disk.f_blocks * disk.f_frsize * 500 / 4
    assert spool["card_life_years"] * spool["card_bytes_per_day"] * 365 == pytest.approx(bears)


def judge_backlog(gateway: Gateway, status: dict[str, Any], rows: int) -> None:
    """What is told of the route that is cut off and of the one that is not."""
    cut, there = of(status, "cut"), of(status, "there")
    assert cut["backlog"] - cut["urgent"] == rows and 1 <= cut["urgent"] <= 3  # its records: a node came
    spool = status["spool"]
    assert cut["backlog_bytes"] == pytest.approx(spool["bytes_per_reading"] * spool["stored"], abs=1)
    oldest_ms = spool["routes"]["cut"]["oldest_ms"]
    assert oldest_ms == min(dates(gateway))
    assert cut["lag_s"] == pytest.approx(time.time() - oldest_ms / 1000, abs=30)
    assert (there["backlog"], there["backlog_bytes"], there["lag_s"], there["drain_min"]) == (0, 0, 0, None)


def judge_metrics(gateway: Gateway, status: dict[str, Any]) -> None:
    """The metrics are the figures of `status`; asked when nothing moves."""
    told, expected = figures(fieldpost(gateway, "status", "--metrics")), figures(text(metrics(status)))
    assert told.keys() == expected.keys()
    for name, key, _ in SPOOL:
        assert (status["spool"][key] is not None) == (f"fieldpost_{name}" in told)
    for name, key, _ in ROUTE:
        for route in status["routes"]:
            labels = f'route="{route["id"]}",uplink="{route["uplink"]}"'
            assert (route[key] is not None) == (f"fieldpost_{name}{{{labels}}}" in told)
    still = re.compile(r"backlog|backfill|stored|taken|repeat|confirmed|max_bytes|spool_bytes|ok|uplink_up|node_up")
    assert {k: v for k, v in told.items() if still.search(k)} == {k: v for k, v in expected.items() if still.search(k)}


@pytest.mark.slow
async def test_a_backlog_is_told_as_it_is_grows_and_drains(
    make_gateway: Callable[..., Gateway], broker: Mosquitto
) -> None:
    async with Line(broker.port) as line:
        gateway = make_gateway(
            uplink(line.port, "cut") + uplink(broker.port, "there")
            + table("routes", id="cut", uplink="cut", batch_readings=50, backfill_readings_per_s=800.0)
            + table("routes", id="there", uplink="there"),
            spool='max_bytes = "50MB"\nlinger_s = 0.2',
        )  # fmt: skip
        line.cut()
        await asyncio.to_thread(gateway.start)
        hours = []
        async with OutboxNode(gateway) as node:
            for rows in (1000, 2000):
                await node.tell(1000)
                await node.all_acked()
                await until_async(
                    lambda: of(gateway.status(), "there")["backlog"] == 0 == gateway.status()["spool"]["in_memory"],
                    "the other one has it all, and so has the card",
                )
                status = gateway.status()
                judge_spool(gateway, status, rows)
                judge_backlog(gateway, status, rows)
                judge_metrics(gateway, status)
                hours.append(status["spool"]["hours_until_full"])
            waiting = of(status, "cut")["backlog"]
            told = fieldpost(gateway, "status")
            assert f"{waiting} readings waiting, {status['spool']['stored']} on the card" in told
            assert re.search(rf"^cut +\S+ +- +{waiting} +0 ", told, re.MULTILINE), told
            assert re.search(r"^there +up +no +0 +0 +- ", told, re.MULTILINE), told
            assert re.search(r"full in .* without any uplink, \d+ bytes written per reading", told)
            line.mend()
            seen = [waiting]
            while seen[-1]:
                status = gateway.status()
                now = of(status, "cut")
                drains = now["rate"] - status["spool"]["readings_per_hour"] / 3600  # beyond what comes in
                if now["backlog"] and drains > 0:
                    assert now["drain_min"] == pytest.approx(now["backlog"] / drains / 60)
                    assert now["backlog_bytes"] > 0 and now["lag_s"] > 0
                seen.append(now["backlog"])
                await asyncio.sleep(0)
    assert seen == sorted(seen, reverse=True) and len(set(seen)) > 10  # it falls and falls
    done = gateway.status()
    cut = of(done, "cut")
    assert (cut["backlog"], cut["backfill"], cut["backlog_bytes"], cut["lag_s"], cut["drain_min"]) == (0, 0, 0, 0, None)
    assert cut["confirmed"] >= 2000 and done["spool"]["routes"]["cut"]["oldest_ms"] is None
    assert done["spool"]["stored"] >= 2000  # kept, for a replay
