"""Faults in the middle of traffic and of an outage: nothing acknowledged is lost, and the way opens again.

The judge is the oracle of rig.py; nodes are MicroPython processes, everything else is real as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from parts import Gateway, ScriptedNode, until_async
from servers import RabbitMQ

from faults.rig import KILLS, Count, Rig

pytestmark = pytest.mark.slow


@contextlib.asynccontextmanager
async def rig(tmp_path: Path, rabbitmq: RabbitMQ, **settings: Any) -> AsyncIterator[Rig]:
    async with Rig(tmp_path, rabbitmq, **{"nodes": 3, "rate": 5.0, **settings}).running() as running:
        yield running


def judge(found: dict[str, Count]) -> None:
    for sink, count in found.items():
        assert count.lost == 0, (sink, count)
        assert count.disordered == 0, (sink, count)
        assert count.malformed == 0, (sink, count)
        assert count.acknowledged > 20, (sink, count)


@pytest.mark.parametrize("victim", KILLS)
async def test_killed_in_the_middle_of_traffic(tmp_path: Path, rabbitmq: RabbitMQ, victim: str) -> None:
    async with rig(tmp_path, rabbitmq) as running:
        await asyncio.to_thread(KILLS[victim], running)
        await running.fresh(f"kill -9 of {victim}")
        judge(await running.settle())


@pytest.mark.parametrize("victim", ["gateway", "mosquitto", "node"])
async def test_killed_in_the_middle_of_an_outage(tmp_path: Path, rabbitmq: RabbitMQ, victim: str) -> None:
    async with rig(tmp_path, rabbitmq) as running:
        with running.silent_rabbitmq():
            await running.fresh("rabbitmq fell silent", "mqtt")
            await asyncio.to_thread(KILLS[victim], running)
            await running.fresh(f"kill -9 of {victim}", "mqtt")
        await running.fresh("the outage")
        judge(await running.settle())


async def test_rabbitmq_killed_while_mqtt_is_down_holds_nobody_up(tmp_path: Path, rabbitmq: RabbitMQ) -> None:
    async with rig(tmp_path, rabbitmq) as running:
        running.upstream.pause()
        try:
            await running.fresh("the MQTT upstream fell silent", "rabbitmq")
            await asyncio.to_thread(running.kill_rabbitmq)
            await running.fresh("kill -9 of rabbitmq", "rabbitmq")
        finally:
            running.upstream.resume()
        await running.fresh("the outage")
        judge(await running.settle())


async def test_a_broker_that_falls_silent_without_closing_is_noticed_by_all(tmp_path: Path, rabbitmq: RabbitMQ) -> None:
    async with rig(tmp_path, rabbitmq) as running:
        with running.silent_broker():
            logs = [node.log for node in running.nodes.values()]
            await until_async(
                lambda: all("Late" in log.read_text() or "nothing heard" in log.read_text() for log in logs),
                "every node gives up its half-open connection",
            )
            await until_async(lambda: "nodes' broker lost" in running.gateway.log(), "the gateway notices as well", 40)
        await running.fresh("the broker's silence")
        judge(await running.settle())


async def test_an_upstream_that_is_down_for_longer_than_the_stage_holds(tmp_path: Path, rabbitmq: RabbitMQ) -> None:
    async with rig(tmp_path, rabbitmq, rate=20.0, spool="stage_readings = 100") as running:
        with running.silent_rabbitmq():
            await until_async(lambda: running.backlog("to-rabbit") > 500, "five stages behind", 90)
            waiting = running.gateway.status()
            assert waiting["spool"]["state"] == "ok"
        await running.fresh("the outage")
        judge(await running.settle())


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
async def test_a_line_that_drops_every_packet(tmp_path: Path, rabbitmq: RabbitMQ) -> None:
    # A namespace with a cable to us; the node in it goes on believing in its connection when the cable is dead.
    name = f"fp{os.getpid()}"
    ip("netns", "add", name)
    try:
        ip("link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b")
        ip("link", "set", f"{name}b", "netns", name)
        ip("addr", "add", "10.199.77.1/30", "dev", f"{name}a")
        ip("link", "set", f"{name}a", "up")
        ip("netns", "exec", name, "ip", "addr", "add", "10.199.77.2/30", "dev", f"{name}b")
        ip("netns", "exec", name, "ip", "link", "set", f"{name}b", "up")
        async with rig(tmp_path, rabbitmq, nodes=1) as running:
            line = await asyncio.start_server(
                lambda r, w: pipe(r, w, running.gateway.port), "10.199.77.1", 0
            )  # the broker listens on loopback only
            port = line.sockets[0].getsockname()[1]
            far = running.add_node("far", gateways=[["10.199.77.1", port]])
            far._prefix = ("ip", "netns", "exec", name)
            far.start()
            await until_async(lambda: "ack" in far.log.read_text(), "the far node is acknowledged")
            ip("link", "set", f"{name}a", "down")
            await until_async(lambda: "connection 1:" in far.log.read_text(), "it gives the dead connection up", 40)
            ip("link", "set", f"{name}a", "up")
            acked = far.log.read_text().count("ack ")
            await until_async(lambda: far.log.read_text().count("ack ") > acked + 3, "acknowledged again", 40)
            judge(await running.settle())
            line.close()
    finally:
        ip("netns", "del", name)


async def test_a_nodes_will_arrives_upstream_within_one_and_a_half_keepalives(
    tmp_path: Path, rabbitmq: RabbitMQ
) -> None:
    async with rig(tmp_path, rabbitmq, keepalive_s=20) as running:
        await until_async(lambda: running.sinks["rabbitmq"].nodes["n0"].state == "up", "n0 is up, upstream")
        running.nodes["n0"].pause()
        began = time.monotonic()
        await until_async(lambda: running.sinks["rabbitmq"].nodes["n0"].state == "lost", "the will", 60)
        took_s = time.monotonic() - began
        running.nodes["n0"].resume()
        await until_async(lambda: running.sinks["rabbitmq"].nodes["n0"].state == "up", "it is back")
        # The one deadline that the protocol itself sets; the clock that it is read from is the broker's.
        assert took_s <= 1.5 * 20


async def test_a_message_that_the_broker_confirmed_and_lost_is_not_freed_by_a_later_one(gateway: Gateway) -> None:
    async with ScriptedNode(gateway) as node:
        await node.send(0, 5)
        await node.wait_acked(1, 4)
        gateway.kill9()
        # The gateway is away, its clean session gone: the broker confirms what it then throws away.
        await node.send(5, 5)
        os.kill(gateway.broker_pid, 9)
        gateway.start()
    async with node:
        await node.send(10, 5, held=5)
        await until_async(lambda: gateway.status()["intake"]["refused_ahead"] == 1, "the later rows are not taken")
        await until_async(lambda: node.acks, "an ack")
        assert node.acked == (1, 4)
        await node.send(5, 10, held=5)
        await node.wait_acked(1, 14)
    assert gateway.ask("ledger") == []


def test_a_gateway_ends_when_told_in_the_moment_in_which_its_broker_dies(gateway: Gateway) -> None:
    for _ in range(5):
        os.kill(gateway.broker_pid, 9)
        assert gateway.stop() == 0
        gateway.start()


async def test_a_stale_will_is_ignored(gateway: Gateway) -> None:
    async with ScriptedNode(gateway) as node:
        node.connection = 2
        await node.publish("state", {"st": "up", "i": node.install, "b": 1, "c": 2})
        await node.publish("state", {"st": "lost", "i": node.install, "b": 1, "c": 1})
        await until_async(lambda: gateway.status()["intake"]["stale_wills"] == 1, "it is counted")
        assert [one["state"] for one in gateway.status()["nodes"]] == ["up"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65_536):
                sink.write(data)
                await sink.drain()
        sink.close()

    await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))
