"""The real node against the real gateway, with the umqtt.simple of PyPI and with the calls of today's."""

from __future__ import annotations

from pathlib import Path

import pytest
from fieldpost.firmware import umqtt_folder
from fieldpost.simulate import SimulatedNode, write_settings
from fieldpost.spool.log import Log
from parts import Gateway, until

TODAY = [
    (
        "import usocket as socket\nimport ustruct as struct\nfrom ubinascii",
        "import socket\nimport struct\nfrom binascii",
    ),
    ("ssl=False, ssl_params={}", "ssl=None, ssl_params=None"),
    (
        "def connect(self, clean_session=True):\n        self.sock = socket.socket()",
        "def connect(self, clean_session=True, timeout=None):\n        if self.sock:\n            self.sock.close()\n"
        "        self.sock = socket.socket()\n        self.sock.settimeout(timeout)",
    ),
    ("            assert 0\n\n    # Checks", "            assert 0\n        return op\n\n    # Checks"),
]
"""What micropython-lib changed from 1.3.4 to 1.8.0 in the calls that a node makes: module names, connect's `timeout`,
the old socket closed, wait_msg returning the opcode. 1.8.0 itself is in no package registry."""


@pytest.fixture(params=["1.3.4", "as 1.8.0"])
def umqtt(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The version of umqtt.simple that nodes of this test are started with."""
    source = (umqtt_folder() / "umqtt" / "simple.py").read_text()
    if request.param != "1.3.4":
        for old, new in TODAY:
            assert source.count(old) == 1, old
            source = source.replace(old, new)
    (tmp_path / "upy" / "umqtt").mkdir(parents=True)
    (tmp_path / "upy" / "umqtt" / "simple.py").write_text(source)
    monkeypatch.setenv("FIELDPOST_UMQTT", str(tmp_path / "upy"))
    return str(request.param)


def test_a_nodes_rows_are_stored_once_each_over_a_reboot(umqtt: str, gateway: Gateway, tmp_path: Path) -> None:
    folder = tmp_path / "n1"
    write_settings(folder, gateway.ask("add", node="n1"), 20.0, {"verbose": True, "first_wait_ms": 50})
    node = SimulatedNode(folder).start()
    try:
        until(lambda: node.log.read_text().count("ack 1 ") > 5, "the first boot is acknowledged")
        node.kill()
        node.start()
        until(lambda: node.log.read_text().count("ack 2 ") > 5, "the second boot is acknowledged")
        node.stop()
        until(lambda: gateway.status()["nodes"][0]["state"] == "bye", "it said goodbye")
    finally:
        node.kill()
    assert "connection 1:" not in node.log.read_text()
    assert gateway.stop() == 0
    acked = [int(line.split()[2]) for line in node.log.read_text().splitlines() if line.startswith("ack 2 ")]
    log = Log(gateway.data)
    stored = {boot: (upto, beyond) for (node_name, _, boot), upto, beyond in log.open().marks if node_name == "n1"}
    log.close()
    assert set(stored) == {1, 2}
    assert stored[2][0] >= max(acked) and stored[2][1] == []


@pytest.mark.slow
def test_a_node_that_is_told_how_long_an_ack_may_take_sends_nothing_again_meanwhile(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path / "gateway", spool="linger_s = 26")
    try:
        gateway.start()
        folder = tmp_path / "n1"
        settings = {"verbose": True, "first_wait_ms": 50, "ack_wait_s": 3}
        write_settings(folder, gateway.ask("add", node="n1"), 1.0, settings)
        node = SimulatedNode(folder).start()
        try:
            # The first ack may come with what was written of the node's coming; the next waits for its linger.
            until(lambda: node.log.read_text().count("ack 1 ") >= 2, "rows are acknowledged", 90)
            assert "sending again" not in node.log.read_text()
        finally:
            node.kill()
        assert gateway.status()["spool"]["repeats"] == 0
    finally:
        gateway.end()
