"""Message -> reading -> spool -> ack, on the real gateway and a real mosquitto, with a node that follows a script."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable

import aiomqtt
import pytest
from fieldpost.wire import encode_ack
from parts import HASH, INSTALL, Gateway, ScriptedNode, until_async


def ledger(gateway: Gateway) -> list[tuple[str, int, int, int | None, str]]:
    return [(e["node"], e["boot"], e["first"], e["last"], e["why"]) for e in reversed(gateway.ask("ledger"))]


async def test_rows_are_acknowledged_when_they_are_durable(gateway: Gateway) -> None:
    async with ScriptedNode(gateway) as node:
        await node.send(0, 5)
        await node.wait_acked(1, 4)
        status = gateway.status()
        assert status["spool"]["committed"] == status["spool"]["head"]
    assert node.acks[-1] == json.loads(encode_ack(INSTALL, 1, 4))


async def test_ack_stops_at_a_hole_until_it_is_filled(gateway: Gateway) -> None:
    # Messages 5-9 were confirmed by the broker, then lost; 10-14 came.
    async with ScriptedNode(gateway) as node:
        await node.send(0, 5)
        await node.wait_acked(1, 4)
        await node.send(10, 5, held=5)
        await until_async(lambda: node.acks.count([INSTALL, 1, 4]) >= 2, "an ack that stops at the hole")
        assert gateway.status()["intake"]["refused_ahead"] == 1
        assert gateway.status()["intake"]["rows"] == 5  # they would overtake the missing ones
        await node.send(5, 5, held=5)
        await node.wait_acked(1, 9)
        await node.send(10, 5, held=10)
        await node.wait_acked(1, 14)
    assert ledger(gateway) == []


async def test_a_new_gateway_does_not_free_what_it_has_not_seen(gateway: Gateway) -> None:
    async with ScriptedNode(gateway) as node:
        await node.send(25, 5, held=20)  # 20-24 are on their way or lost
        await node.send(30, 1, held=20)
        await until_async(lambda: node.acks, "an ack")
        assert node.acked == (1, 19)
        await node.send(20, 11, held=20)
        await node.wait_acked(1, 30)
    assert ledger(gateway) == []  # what lay below `held` was acknowledged by another gateway: no gap


async def test_declared_drops_are_gaps_once_and_let_the_ack_pass(gateway: Gateway) -> None:
    async with ScriptedNode(gateway) as node:
        await node.send(0, 5)
        await node.wait_acked(1, 4)
        for _ in range(2):  # declared again until it is acknowledged
            await node.send(20, 5, held=20, drops=[[5, 19]])
        await node.wait_acked(1, 24)
    assert ledger(gateway) == [("n1", 1, 5, 19, "dropped by the node")]


async def test_the_tail_of_a_boot_is_a_gap_with_its_number_where_the_node_told_it(gateway: Gateway) -> None:
    async with ScriptedNode(gateway) as node:
        await node.send(0, 5)
        await node.wait_acked(1, 4)
        await node.publish("state", {"st": "up", "i": INSTALL, "b": 1, "c": 1, "s": 7})
    async with ScriptedNode(gateway, boot=2) as node:
        await node.send(0, 3)
        await node.wait_acked(2, 2)
    async with ScriptedNode(gateway, boot=3) as node:
        await node.send(0, 1)
        await node.wait_acked(3, 0)
    assert ledger(gateway) == [
        ("n1", 1, 5, 7, "lost with the node's memory"),
        ("n1", 2, 3, None, "perhaps lost with the node's memory"),
    ]


async def test_a_clean_goodbye_leaves_no_gap(gateway: Gateway) -> None:
    async with ScriptedNode(gateway) as node:
        await node.send(0, 5)
        await node.wait_acked(1, 4)
        await node.publish("state", {"st": "bye", "i": INSTALL, "b": 1, "c": 1, "s": 4})
    async with ScriptedNode(gateway, boot=2) as node:
        await node.send(0, 1)
        await node.wait_acked(2, 0)
    assert ledger(gateway) == []


async def test_a_repeat_is_acknowledged_and_stored_once(gateway: Gateway) -> None:
    async with ScriptedNode(gateway) as node:
        for _ in range(3):
            await node.send(0, 5)
        await node.wait_acked(1, 4)
        await until_async(lambda: gateway.status()["spool"]["repeats"] == 10, "the repeats are recognised")


async def test_rows_with_an_unknown_manifest_are_not_acknowledged(gateway: Gateway) -> None:
    async with ScriptedNode(gateway) as node:
        await node.publish("data", [1, INSTALL, 1, 0, 1000, None, 0, [], "deadbeef", [[0, 1, 2]]])
        await until_async(lambda: gateway.status()["intake"]["rejected"].get("manifest") == 1, "it is rejected")
        await node.send(0, 1)
        await node.wait_acked(1, 0)
    assert HASH != "deadbeef"


async def test_after_a_restart_the_ack_is_there_again_for_a_broker_that_forgot_it(gateway: Gateway) -> None:
    async with ScriptedNode(gateway) as node:
        await node.send(0, 5)
        await node.wait_acked(1, 4)
    assert gateway.stop() == 0
    gateway.start()
    node.acks.clear()
    async with node:
        await node.wait_acked(1, 4)
        assert "up" in node.gateway_states


async def test_nodes_are_told_the_time_and_when_the_gateway_goes(gateway: Gateway) -> None:
    async with ScriptedNode(gateway) as node:
        await until_async(lambda: node.times and node.gateway_states[-1:] == ["up"], "time and state")
        pid = gateway.broker_pid
        gateway.kill9()
        await until_async(lambda: node.gateway_states[-1] == "lost", "the gateway's last will")
        gateway.start()
        assert gateway.broker_pid == pid  # the broker, and with it the nodes' connections, outlived the gateway
        await until_async(lambda: node.gateway_states[-1] == "up", "the gateway is back")
        unix_ms, precision_ms, _ = node.times[-1]
        assert unix_ms > 1_700_000_000_000 and precision_ms > 0


async def test_a_gateway_whose_stage_is_full_says_so_and_acknowledges_nothing_it_does_not_keep(
    make_gateway: Callable[..., Gateway],
) -> None:
    gateway = make_gateway(spool='stage_readings = 100\nlinger_s = 0.1\nmax_bytes = "16kB"\nfull = "hold"').start()
    async with ScriptedNode(gateway) as node:
        sent = 0
        while "full" not in node.gateway_states:
            await node.send(sent, 40, held=sent)
            sent += 40
            acked = f"rows before {sent} acknowledged, or the gateway full"
            await until_async(lambda: node.acked >= (1, sent - 1) or "full" in node.gateway_states, acked)  # noqa: B023
        held = node.acked[1] + 1
        await node.send(held, 40, held=held)
        await until_async(lambda: gateway.status()["intake"]["refused_full"] >= 1, "the message is refused")
        assert gateway.status()["spool"]["state"] == "full"
        assert gateway.status()["spool"]["detail"].startswith("full: ")
        assert gateway.status()["spool"]["head"] >= node.acked[1]


async def test_a_late_will_of_the_gateway_does_not_stop_the_nodes_and_a_clean_end_does(gateway: Gateway) -> None:
    key = (gateway.data / "broker" / "gateway.control.key").read_text().strip()
    async with ScriptedNode(gateway) as node:
        await until_async(lambda: node.gateway_states[-1:] == ["up"], "up")
        # With its user name it takes the place of the gateway's own connection, which then comes back.
        async with aiomqtt.Client("127.0.0.1", gateway.port, username="gateway.control", password=key) as other:
            await other.publish("fp1/gateway/state", b'{"st":"lost"}', qos=1, retain=True)
            await until_async(lambda: "lost" in node.gateway_states, "lost")
        await until_async(lambda: node.gateway_states[-1] == "up", "up again")
        assert gateway.stop() == 0
        await until_async(lambda: node.gateway_states[-1] == "lost", "told to hold on")


HOSTILE = [
    (b"", "json"),
    (b"\xff\xfe\x00", "json"),
    (b'[1,"\xff\xff"]', "type"),
    (b"{}", "type"),
    (b"[" * 5000, "type"),
    (b"[2" + b',"a1b2c3d4e5f6",1,0,0,null,0,[],"00112233",[]]', "version"),
    (b'[1,"A1B2C3D4E5F6",1,0,0,null,0,[],"00112233",[]]', "type"),
    (b'[1,"a1b2c3d4e5f6",-1,0,0,null,0,[],"00112233",[]]', "type"),
    (b'[1,"a1b2c3d4e5f6",1,0,0,null,0,[[5,2]],"00112233",[]]', "range"),
    (b'[1,"a1b2c3d4e5f6",1,0,5,null,0,[],"00112233",[[9,1]]]', "range"),
    (b'[1,"a1b2c3d4e5f6",1,0,5,null,0,[],"00112233",[[0,1e999]]]', "json"),
    (b'[1,"a1b2c3d4e5f6",1,0,5,null,0,[],"00112233",[[0,"<script>"]]]', "type"),
]


async def test_hostile_payloads_are_rejected_counted_logged_once_and_harm_nothing_else(gateway: Gateway) -> None:
    async with ScriptedNode(gateway) as node:
        for _ in range(3):
            for payload, _ in HOSTILE:
                await node.publish("data", payload)
                await node.publish("manifest", payload, retain=False)
                await node.publish("state", payload, retain=False)
        await node.publish("data", b'[1,"a1b2c3d4e5f6",1,0,5,null,0,[],"00112233",[[0,1]]]', retain=True)
        await node.send(0, 5)
        await node.wait_acked(1, 4)
        rejected = gateway.status()["intake"]["rejected"]
    for _, reason in HOSTILE:
        assert rejected[reason] >= 3, (reason, rejected)
    for reason in rejected:
        assert gateway.log().count(f": {reason}") <= 1, reason
    assert ledger(gateway) == []


async def test_a_node_can_write_only_its_own_leaves_and_strangers_nothing(gateway: Gateway) -> None:
    async with ScriptedNode(gateway, "n1") as node, ScriptedNode(gateway, "n2", "bbbbbbbbbbbb") as other:
        assert node.client and other.client
        await node.client.publish("fp1/n2/data", b"[]", qos=1)
        await node.client.publish("fp1/n2/ack", encode_ack("bbbbbbbbbbbb", 1, 999), qos=1)
        await node.client.publish("fp1/gateway/state", b'{"st":"full"}', qos=1, retain=True)
        await other.send(0, 3)
        await other.wait_acked(1, 2)
        assert ["bbbbbbbbbbbb", 1, 999] not in other.acks
        assert "full" not in other.gateway_states
        assert gateway.status()["intake"]["rejected"] == {}
    for user, password in ((None, None), ("n1", "wrong"), ("gateway.intake", "")):
        with pytest.raises(aiomqtt.MqttError):
            async with aiomqtt.Client("127.0.0.1", gateway.port, username=user, password=password, timeout=5):
                pass


async def test_oversized_and_broken_packets_end_their_own_connection_only(gateway: Gateway) -> None:
    async with ScriptedNode(gateway) as node:
        for raw in (b"\x10\xff\xff\xff\x7f" + b"x" * 1000, b"\x00" * 64, b"\x30\x05\x00\x09ab", bytes(range(256)) * 8):
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            with contextlib.suppress(OSError):  # the broker may have hung up already
                writer.write(raw)
                writer.get_extra_info("socket").shutdown(socket.SHUT_WR)
                async with asyncio.timeout(10):
                    await reader.read(100)
            writer.close()
        with pytest.raises(aiomqtt.MqttError):
            async with ScriptedNode(gateway, "n9", "999999999999") as big:
                assert big.client
                await big.client.publish("fp1/n9/data", b"[" + b"1," * 40_000, qos=1, timeout=5)
        await node.send(0, 5)
        await node.wait_acked(1, 4)


async def test_two_boards_with_one_id_are_named_in_status(gateway: Gateway) -> None:
    first = ScriptedNode(gateway, "n1", "aaaaaaaaaaaa")
    second = ScriptedNode(gateway, "n1", "bbbbbbbbbbbb")
    first.key = second.key  # one key: somebody copied a board
    for _ in range(2):
        for board in (first, second):
            async with board:
                await board.send(0, 1)
    (node,) = gateway.status()["nodes"]
    assert node["conflict"].startswith("two boards use the id n1: installs ")
