"""`fieldpost spool` and `fieldpost replay` as a user has them: with a running gateway, with a stopped one, damaged."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import pty
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fieldpost.spool.database import PAGE_BYTES
from fieldpost.wire import manifest_hash
from parts import Arrivals, Gateway, ScriptedNode, until_async
from servers import Mosquitto

UPLINK = """
[[uplinks]]
name = "plant"
kind = "mqtt"
url = "{url}"
topic = "t"
timeout_s = 5
[[routes]]
id = "all"
uplink = "plant"
batch_readings = 50
"""


def fieldpost(gateway: Gateway, *words: str, code: int = 0) -> str:
    """What a command prints, of which it must end with `code`; a failure never shows a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "fieldpost", *words, "--config", str(gateway.config)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stdout + done.stderr


def as_seen(gateway: Gateway, *words: str) -> str:
    """The same on a terminal of 80 columns."""
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    with subprocess.Popen(
        [sys.executable, "-m", "fieldpost", *words, "--config", str(gateway.config)],
        stdout=slave,
        stderr=slave,
        env=environment,
    ) as process:
        os.close(slave)
        seen = b""
        while True:
            try:
                seen += (more := os.read(master, 4096))
            except OSError:  # how a terminal ends
                break
            if not more:
                break
        assert process.wait(60) == 0
    os.close(master)
    return seen.decode()


def state_of(folder: Path) -> dict[str, str]:
    """Every file of a spool, by what is in it."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("spool*")}


async def filled(gateway: Gateway, past: int, first: int = 0, name: str = "n1") -> None:
    async with ScriptedNode(gateway, name) as node:
        for start in range(first, past, 20):
            await node.send(start, 20)
        await node.wait_acked(1, past - 1)


@pytest.fixture
async def stopped(make_gateway: Callable[..., Gateway]) -> Gateway:
    """A gateway that holds 100 readings, stopped."""
    gateway = make_gateway().start()
    await filled(gateway, 100)
    gateway.stop()
    return gateway


@pytest.mark.parametrize("how", ["stopped", "killed"])
async def test_looking_at_a_stopped_spool_changes_nothing(how: str, make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway().start()
    await filled(gateway, 100)
    if how == "killed":  # a log lies beside the file
        os.kill(gateway.broker_pid, 15)
        gateway.kill9()
        assert (gateway.data / "spool.db-wal").stat().st_size > 0
    gateway.stop()
    before = state_of(gateway.data)
    assert re.search(r"stored +10\d readings", fieldpost(gateway, "spool", "status"))  # and what the gateway noted
    assert json.loads(fieldpost(gateway, "spool", "status", "--json"))["stored"] >= 100
    assert "all is whole" in fieldpost(gateway, "spool", "verify")
    assert json.loads(fieldpost(gateway, "spool", "verify", "--json"))["is_whole"] is True
    rows = [json.loads(line) for line in fieldpost(gateway, "spool", "export").splitlines()]
    assert [row["seq"] for row in rows if row["node"] == "n1"] == list(range(100))
    assert state_of(gateway.data) == before


async def test_looking_asks_for_the_rights_that_it_lacks(stopped: Gateway) -> None:
    assert os.geteuid() == 0, "only root can become another user: run this as root, as CI does"
    seen = await asyncio.to_thread(as_nobody, stopped, "spool", "status")
    assert seen.returncode == 1 and "Traceback" not in seen.stderr
    assert "not permitted" in seen.stderr and "sudo" in seen.stderr, seen.stderr


def as_nobody(gateway: Gateway, *words: str) -> subprocess.CompletedProcess[str]:
    """A command by a user who may read the configuration, and not the gateway's folder."""
    code = (
        "import os, sys\n"
        "import fieldpost.cli.run, fieldpost.cli.spool\n"
        "os.setgid(65534); os.setuid(65534)\n"
        f"sys.argv = ['fieldpost', *{[*words, '--config']!r}, sys.argv[1]]\n"
        "fieldpost.cli.main()\n"
    )
    for folder in (gateway.folder, *gateway.folder.parents):
        if folder != Path("/tmp") and Path("/tmp") in folder.parents:
            folder.chmod(0o755)
    gateway.data.chmod(0o700)
    return subprocess.run([sys.executable, "-c", code, str(gateway.config)], capture_output=True, text=True)


async def test_damage_is_found_repaired_told_and_what_is_whole_goes_on(stopped: Gateway) -> None:
    path = stopped.data / "spool.db"
    content = bytearray(path.read_bytes())
    content[2 * PAGE_BYTES + PAGE_BYTES - 40] ^= 4  # in a batch: its page grows from the end
    path.write_bytes(content)
    before = state_of(stopped.data)
    told = fieldpost(stopped, "spool", "verify", code=1)
    assert "damaged: batch at" in told and "fieldpost spool repair" in told
    assert state_of(stopped.data) == before, [*stopped.data.iterdir()]
    told = fieldpost(stopped, "spool", "repair")
    assert "set aside:" in told and "were taken over" in told
    (aside,) = stopped.data.glob("spool.damaged-*.db")
    assert "all is whole" in fieldpost(stopped, "spool", "verify")
    assert "nothing was changed" in fieldpost(stopped, "spool", "repair")
    rows = [json.loads(line) for line in fieldpost(stopped, "spool", "export").splitlines()]
    lost = next(row["event"] for row in rows if row.get("event"))
    kept = {row["seq"] for row in rows if row["node"] == "n1"}
    assert kept and aside.stat().st_size >= len(content)
    named = [row["event"] for row in rows if row.get("event") and row["event"][1] == "n1"]
    assert lost and kept | {seq for e in named for seq in range(e[4], e[5] + 1)} == set(range(100))
    stopped.start()
    assert stopped.status()["spool"]["ledger"]["damaged on the card"] >= 1


async def test_repair_refuses_while_the_gateway_runs(gateway: Gateway) -> None:
    await filled(gateway, 20)
    told = fieldpost(gateway, "spool", "repair", code=1)
    assert "another gateway has this spool open; end that one first" in told
    assert gateway.status()["state"] == "up"


async def test_the_verbs_of_a_running_gateway(gateway: Gateway, tmp_path: Path) -> None:
    await filled(gateway, 100)
    assert re.search(r"stored +10\d readings", fieldpost(gateway, "spool", "status"))  # and what the gateway noted
    seen = (await asyncio.to_thread(as_seen, gateway, "spool", "status")).splitlines()
    assert max(map(len, seen)) <= 80, seen
    assert "all is whole" in fieldpost(gateway, "spool", "verify")
    assert fieldpost(gateway, "spool", "export", "--output", str(tmp_path / "out")).endswith(f"in {tmp_path / 'out'}\n")
    assert len((tmp_path / "out").read_text().splitlines()) >= 100
    assert "nothing is set aside" in fieldpost(gateway, "spool", "set-aside", "list")
    assert "name ids" in fieldpost(gateway, "spool", "set-aside", "drop", code=2)
    assert 'no route "x"; there are: none' in fieldpost(gateway, "replay", "--route", "x", "--since", "6h", code=1)
    assert "neither like 6h nor like 2026" in fieldpost(gateway, "replay", "--route", "x", "--since", "x", code=2)


async def test_an_export_neither_loses_nor_doubles_while_the_gateway_writes(gateway: Gateway) -> None:
    await filled(gateway, 2000)
    async with ScriptedNode(gateway, "n2") as node:
        export = asyncio.ensure_future(asyncio.to_thread(fieldpost, gateway, "spool", "export"))
        sent = 0
        while not export.done():
            await node.send(sent, 20)
            sent += 20
            await asyncio.sleep(0)
        rows = [json.loads(line) for line in (await export).splitlines()]
    n1, n2 = ([row["seq"] for row in rows if row["node"] == name] for name in ("n1", "n2"))
    assert n1 == list(range(2000))
    assert n2 == list(range(len(n2)))


async def test_what_is_seen_fits_a_terminal_and_long_work_tells_how_far_it_is(stopped: Gateway, tmp_path: Path) -> None:
    seen = as_seen(stopped, "spool", "verify")
    assert "batches" in seen and "all is whole" in seen
    assert re.search(r"\r10\d readings", as_seen(stopped, "spool", "export", "--output", str(tmp_path / "out")))
    for verb in ("status", "verify"):
        lines = as_seen(stopped, "spool", verb).replace("\r", "\n").splitlines()
        assert max(map(len, lines)) <= 80, max(lines, key=len)


@pytest.mark.parametrize(
    "words", ["status", "verify", "export", "repair", "set-aside list", "set-aside retry", "set-aside drop"]
)
def test_every_spool_verb_has_help_with_examples(words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fieldpost", "spool", *words.split(), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "Examples:" in done.stdout and f"fieldpost spool {words}" in done.stdout


def test_a_verb_without_a_spool_says_what_makes_one(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway()
    for verb in ("status", "verify", "export", "repair"):
        assert "a gateway makes it when it first runs" in fieldpost(gateway, "spool", verb, code=1)
    for words in (("spool", "set-aside", "list"), ("replay", "--route", "a", "--since", "6h")):
        assert "no gateway answers" in fieldpost(gateway, *words, code=1)


# Set aside.


WIDE = json.dumps(
    {"ch": [[f"c{n}", "1", 1, "sim", "gauge"] for n in range(60)], "p": 1000, "sl": False, "cap": []}
).encode()


async def told(gateway: Gateway, *words: str, code: int = 0) -> str:
    """`fieldpost`, while the test's loop goes on."""
    return await asyncio.to_thread(fieldpost, gateway, *words, code=code)


@pytest.mark.slow
async def test_a_refused_reading_alone_is_set_aside_tried_again_and_dropped(
    make_gateway: Callable[..., Gateway], tmp_path: Path
) -> None:
    with Mosquitto(tmp_path / "far", extra="message_size_limit 700") as strict:
        gateway = make_gateway(UPLINK.format(url=strict.url())).start()
        async with Arrivals().reading(f"{strict.url()}/t") as upstream, ScriptedNode(gateway) as node:
            await node.publish("manifest", WIDE)
            rows = [[0, 2000 + seq, *[None] * 59] for seq in range(40)]
            for seq in (7, 31):  # they alone are too large
                rows[seq][1:] = [random.Random(seq * 100 + n).getrandbits(52) for n in range(60)]
            await node.publish("data", [1, node.install, 1, 0, 100_000, None, 0, [], manifest_hash(WIDE), rows])
            await node.wait_acked(1, 39)
            await until_async(lambda: gateway.status()["spool"]["set_aside"] == 2, "both bad ones are set aside", 90)
            await until_async(lambda: len(upstream.seqs()) == 38, "the others arrive", 60)
            assert sorted(upstream.seqs()) == sorted(set(range(40)) - {7, 31})
            await until_async(lambda: len(upstream.gaps) == 2, "and the far side is told of both")
        listed = json.loads(await told(gateway, "spool", "set-aside", "list", "--json"))
        assert [one["reading"]["seq"] for one in listed] == [7, 31]
        seen = await told(gateway, "spool", "set-aside", "list")
        assert listed[0]["reading"]["id"] in seen and listed[0]["reason"] and listed[0]["reason"] in seen
        first, second = (str(one["id"]) for one in listed)
        assert "still here" in await told(gateway, "spool", "set-aside", "retry", first)
        strict.extra = ""
        strict.restart()
        async with Arrivals().reading(f"{strict.url()}/t") as upstream:
            await until_async(lambda: gateway.status()["routes"][0]["state"] == "up", "the uplink is back", 60)
            assert "delivered" in await told(gateway, "spool", "set-aside", "retry", first)
            await until_async(lambda: upstream.seqs() == [7], "it arrives")
            assert upstream.rows[0].id == listed[0]["reading"]["id"]
        assert "dropped" in await told(gateway, "spool", "set-aside", "drop", second)
        assert "nothing is set aside" in await told(gateway, "spool", "set-aside", "list")
        assert f"not set aside: {second}" in await told(gateway, "spool", "set-aside", "drop", second, code=1)
        assert gateway.status()["spool"]["ledger"]["dropped by hand"] == 1
        gateway.end()


# Replay.


async def test_replay_sends_a_nodes_time_again_and_nothing_else(
    make_gateway: Callable[..., Gateway], broker: Mosquitto
) -> None:
    gateway = make_gateway(UPLINK.format(url=broker.url())).start()
    await until_async(lambda: gateway.status()["routes"][0]["state"] == "up", "the uplink is up")
    async with Arrivals().reading(f"{broker.url()}/t") as upstream:
        await filled(gateway, 40)
        await filled(gateway, 40, name="n2")
        await until_async(lambda: len(upstream.rows) == 80, "all has arrived")
        await until_async(lambda: gateway.status()["routes"][0]["backlog"] == 0, "and is confirmed")
        assert "will be sent again" in await told(gateway, "replay", "--route", "all", "--since", "1h", "--node", "n2")
        await until_async(lambda: len(upstream.rows) == 120, "n2's rows come again")
        assert {(row.node, row.lane) for row in upstream.rows[80:]} == {("n2", "backfill")}
        assert [row.seq for row in upstream.rows[80:]] == list(range(40))
        old = ("replay", "--route", "all", "--since", "2020-01-01", "--until", "2020-01-02")
        assert (await told(gateway, *old)).startswith("nothing to send again: nothing is kept of that time, ")
        assert 'there are: "all"' in await told(gateway, "replay", "--route", "al", "--since", "1h", code=1)
        assert len(upstream.rows) == 120
