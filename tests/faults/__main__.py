"""Ten nodes, two rows a second each, three minutes, every fault once; the oracle's count goes to REPORT.md.

python -m tests.faults [--seconds 180]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

from fieldpost.simulate import SimulatedNode, write_settings  # noqa: E402
from parts import ScriptedNode, until_async  # noqa: E402  # tests/ is no package that is installed
from servers import shared_rabbitmq  # noqa: E402

from faults.rig import KILLS, Rig  # noqa: E402

NODES, RATE = 10, 2.0


async def kill(rig: Rig, victim: str) -> None:
    await asyncio.to_thread(KILLS[victim], rig)


async def silent_broker(rig: Rig) -> None:
    with rig.silent_broker():
        await asyncio.sleep(12)


async def outage_with_kills(rig: Rig) -> None:
    """RabbitMQ says nothing for 30 s, five times what the stage holds; gateway, broker and a node are killed in it."""
    with rig.silent_rabbitmq():
        for victim in ("gateway", "mosquitto", "node"):
            await asyncio.sleep(8)
            await kill(rig, victim)
        await asyncio.sleep(6)


async def outage_and_kill_of_rabbitmq(rig: Rig) -> None:
    rig.upstream.pause()
    await asyncio.sleep(3)
    await kill(rig, "rabbitmq")
    rig.upstream.resume()


async def hostile_payloads(rig: Rig) -> None:
    async with ScriptedNode(rig.gateway, "hostile") as node:
        for payload in (
            b"",
            b"\xff\xfe",
            b"[" * 5000,
            b'{"a":1}',
            b'[1,"x",1,0,0,null,0,[],"00112233",[]]',
            b"x" * 16_000,
        ):
            for leaf in ("data", "manifest", "state"):
                await node.publish(leaf, payload, retain=False)


async def two_boards_with_one_id(rig: Rig) -> None:
    original = rig.nodes["n1"]
    twin_folder = rig.folder / "n1-twin"
    key = json.loads((original.folder / "settings.json").read_text())["key"]
    enrolled = {"node": "n1", "key": key, "host": "127.0.0.1", "port": rig.gateway.port}
    write_settings(twin_folder, enrolled, RATE, rig._more)
    twin = SimulatedNode(twin_folder).start()
    await until_async(
        lambda: any(node["conflict"] for node in rig.gateway.status().get("nodes", ())), "the conflict is named", 30
    )
    twin.kill()


async def silent_node(rig: Rig) -> None:
    rig.nodes["n2"].pause()
    await until_async(lambda: rig.sinks["mqtt"].nodes["n2"].state == "lost", "the will of n2 upstream", 30)
    rig.nodes["n2"].resume()


FAULTS: list[tuple[str, Callable[[Rig], Awaitable[None]]]] = [
    ("kill -9 of the gateway", lambda rig: kill(rig, "gateway")),
    ("kill -9 of mosquitto", lambda rig: kill(rig, "mosquitto")),
    ("kill -9 of RabbitMQ", lambda rig: kill(rig, "rabbitmq")),
    ("kill -9 of a node", lambda rig: kill(rig, "node")),
    ("mosquitto silent for 12 s (SIGSTOP)", silent_broker),
    ("RabbitMQ silent for 30 s; gateway, mosquitto and a node killed meanwhile", outage_with_kills),
    ("MQTT upstream silent; RabbitMQ killed meanwhile", outage_and_kill_of_rabbitmq),
    ("malformed, oversized, wrongly typed, non-UTF-8 payloads", hostile_payloads),
    ("two boards with one id", two_boards_with_one_id),
    ("a node that falls silent (SIGSTOP): its will arrives upstream", silent_node),
]


async def main(seconds: float) -> int:
    log: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fieldpost-faults-") as name:
        rig = Rig(Path(name), shared_rabbitmq(), nodes=NODES, rate=RATE, spool="stage_readings = 100")
        async with rig.running():
            began = time.monotonic()
            for number, (fault, inject) in enumerate(FAULTS):
                await asyncio.sleep(max(0.0, began + seconds * number / (len(FAULTS) + 1) - time.monotonic()))
                at = time.monotonic() - began
                await inject(rig)
                await rig.fresh(fault, within_s=120)
                log.append(f"| {at:.0f} s | {fault} | {time.monotonic() - began - at:.1f} s |")
                print(log[-1], flush=True)
            await asyncio.sleep(max(0.0, began + seconds - time.monotonic()))
            found = await rig.settle(120)
            took_s = time.monotonic() - began
            ledger = rig.gateway.ask("ledger")
            rejected = rig.gateway.status()["intake"]["rejected"]
    rows = [
        f"| {sink} | {c.acknowledged} | {c.arrived} | **{c.lost}** | {c.repeats} | {c.disordered} |"
        for sink, c in found.items()
    ]
    gaps = [f"- {e['node']} boot {e['boot']}, rows {e['first']} to {e['last']}: {e['why']}" for e in ledger]
    lost = sum(count.lost for count in found.values())
    text = "\n".join(
        [
            "# Every fault once",
            "",
            f"{time.strftime('%Y-%m-%d %H:%M')}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, "
            f"Python {platform.python_version()}. Written by `make prove` (`python -m tests.faults`): {NODES}",
            f"MicroPython nodes, {RATE:g} rows/s each, {took_s:.0f} s, a stage of 100 readings.",
            "",
            "| at | fault | until every node was acknowledged again and both uplinks had fresh rows |",
            "|---|---|---|",
            *log,
            "",
            "What the nodes freed, by their own word, and what became of it:",
            "",
            "| uplink | acknowledged | arrived | lost | repeats (same id) | out of order |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"Rejected by the restarted gateway: {rejected}. Gaps in the ledger:",
            "",
            *(gaps or ["- none"]),
            "",
        ]
    )
    (HERE / "REPORT.md").write_text(text)
    print(text)
    return 1 if lost or any(count.disordered for count in found.values()) else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180.0)
    sys.exit(asyncio.run(main(parser.parse_args().seconds)))
