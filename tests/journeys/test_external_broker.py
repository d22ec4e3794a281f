"""Somebody else's broker: the gateway comes as its user, and nodes are let in by its owner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from parts import Gateway, ScriptedNode, until_async
from servers import Mosquitto


async def test_readings_come_over_somebody_elses_broker(make_gateway: Callable[..., Gateway], tmp_path: Path) -> None:
    password = tmp_path / "broker.password"
    password.touch(0o600)
    password.write_text("open sesame\n")
    users = {"fieldpost": "open sesame", "n1": "a key"}
    with Mosquitto(tmp_path / "theirs", users=users) as theirs:
        gateway = make_gateway()
        text = gateway.config.read_text()
        url = f'url = "mqtt://127.0.0.1:{theirs.port}"\nusername = "fieldpost"\npassword_file = "{password}"'
        text = text.replace('kind = "mosquitto"', 'kind = "external"')
        gateway.config.write_text(text.replace(f'listen = "127.0.0.1:{gateway.port}"', url))
        gateway.start()
        node = ScriptedNode(gateway)
        node.key = "a key"  # what the gateway made for it is not known to this broker
        async with node:
            await node.send(0, 5)
            await node.wait_acked(1, 4)
        assert gateway.status()["broker"] == {"kind": "external", "listens": f"127.0.0.1:{theirs.port}"}
        assert "add the node to it by hand" in gateway.log()
        assert "open sesame" not in gateway.log()
        theirs.kill9()
        theirs.start()
        await until_async(lambda: gateway.log().count("taking readings") == 2, "the gateway is back")
        async with node:
            await node.send(5, 5)
            await node.wait_acked(1, 9)
