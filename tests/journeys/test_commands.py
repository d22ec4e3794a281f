"""The command line as a user has it: real processes, real output, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from fieldpost.cli import VERBS
from parts import Gateway, until
from servers import Mosquitto


def fieldpost(*words: str, within_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fieldpost", *words], capture_output=True, text=True, timeout=within_s)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples(verb: str) -> None:
    done = fieldpost(verb, "--help")
    assert done.returncode == 0 and "Examples:" in done.stdout and f"fieldpost {verb}" in done.stdout


def test_check_tells_faults_by_path_and_ends_with_2(tmp_path: Path) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text('[broker]\nkind = "mosquito"\n[[routes]]\nid = "a"\nuplink = "b"\n')
    done = fieldpost("check", "--config", str(config))
    assert done.returncode == 2
    assert "2 faults" in done.stderr and "broker.kind: 'mosquito' is not one of" in done.stderr
    told = json.loads(fieldpost("check", "--config", str(config), "--json").stdout)
    assert told["ok"] is False and len(told["faults"]) == 2
    config.write_text("")
    assert fieldpost("check", "--config", str(config)).returncode == 0


def test_status_without_a_gateway_says_what_to_do(tmp_path: Path) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text(f'[gateway]\ncontrol = "{tmp_path}/none.sock"\n')
    done = fieldpost("status", "--config", str(config))
    assert done.returncode == 1
    assert "no gateway answers" in done.stderr and "fieldpost run" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_gateway_is_refused_with_the_reason(gateway: Gateway) -> None:
    done = fieldpost("run", "--config", str(gateway.config))
    assert done.returncode == 1
    assert "another gateway has this spool open" in done.stderr and "Traceback" not in done.stderr
    assert gateway.status()["state"] == "up"


def test_a_port_that_is_taken_is_told(make_gateway: Callable[..., Gateway], broker: Mosquitto) -> None:
    gateway = make_gateway()
    gateway.config.write_text(gateway.config.read_text().replace(str(gateway.port), str(broker.port)))
    done = fieldpost("run", "--config", str(gateway.config))
    assert done.returncode == 1
    assert f"did not start on 127.0.0.1:{broker.port}" in done.stderr and "in use" in done.stderr


def test_secrets_are_in_files_of_their_owner_only(gateway: Gateway) -> None:
    key = gateway.ask("add", node="n1")["key"]
    holders = [path for path in gateway.data.rglob("*") if path.is_file() and key in path.read_text(errors="replace")]
    assert holders == [gateway.data / "nodes.json"]
    for path in [*gateway.data.rglob("*")]:
        if path.is_file() and path.name not in ("broker.log", "mosquitto.pid", "spool.db-wal", "spool.db-shm"):
            assert path.stat().st_mode & 0o077 == 0, path
    assert gateway.control.stat().st_mode & 0o777 == 0o660
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert key not in lines + gateway.log()


def test_the_broker_listens_where_it_was_told_and_nowhere_else(gateway: Gateway) -> None:
    lines = subprocess.run(["ss", "-tlnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    ours = [line.split()[3] for line in lines if f"pid={gateway.broker_pid}," in line]
    assert ours == [f"127.0.0.1:{gateway.port}"]


@pytest.mark.slow
@pytest.mark.parametrize("light", [False, True], ids=["processes", "light"])
def test_simulated_nodes_reach_an_upstream_where_watch_sees_them(
    make_gateway: Callable[..., Gateway], broker: Mosquitto, light: bool
) -> None:
    uplink = f'[[uplinks]]\nname = "up"\nkind = "mqtt"\nurl = "{broker.url()}"\ntopic = "t"\n'
    gateway = make_gateway(uplink + '[[routes]]\nid = "all"\nuplink = "up"\n').start()
    words = ["simulate", "--config", str(gateway.config), "--nodes", "4", "--rate", "5"] + ["--light"] * light
    nodes = subprocess.Popen([sys.executable, "-m", "fieldpost", *words], stdout=subprocess.PIPE, text=True)
    try:
        watch = fieldpost("watch", f"{broker.url()}/t", "--json", "--count", "40")
        seen = [json.loads(line) for line in watch.stdout.splitlines()]
        assert {row["node"] for row in seen if row["event"] is None} == {f"sim-{n}" for n in range(1, 5)}
        assert all(set(row["values"]) <= {"temperature", "humidity", "pressure"} for row in seen)
        assert "0 repeats" in watch.stderr
        told = fieldpost("status", "--config", str(gateway.config)).stdout
        assert "sim-1" in told and re.search(r"up +up", told)
    finally:
        nodes.send_signal(signal.SIGTERM)
        out, _ = nodes.communicate(timeout=30)
    assert nodes.returncode == 0 and "4 nodes, 5 rows/s each" in out
    until(lambda: {n["state"] for n in gateway.status()["nodes"]} == {"bye"}, "every node said goodbye")


@pytest.mark.slow
def test_simulated_nodes_die_with_a_killed_parent(gateway: Gateway, tmp_path: Path) -> None:
    words = ["simulate", "--config", str(gateway.config), "--nodes", "2", "--folder", str(tmp_path / "nodes")]
    parent = subprocess.Popen([sys.executable, "-m", "fieldpost", *words], stdout=subprocess.DEVNULL)
    until(lambda: sum(n["state"] == "up" for n in gateway.status()["nodes"]) == 2, "two nodes are up")
    parent.kill()
    parent.wait()
    until(lambda: not processes(str(tmp_path / "nodes")), "no node is left")


@pytest.mark.slow
def test_the_demo_shows_an_outage_loses_nothing_and_leaves_nothing_running(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="fp-") as folder:  # short: a unix socket's path must be
        monkeypatch.setenv("TMPDIR", folder)
        done = fieldpost("demo", "--seconds", "14", "--cut-after", "3", "--cut-for", "4")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "CUT for 4 s" in done.stdout and "the backlog has arrived" in done.stdout
        assert re.search(r"\d+ readings acknowledged .* arrived upstream, 0 lost", done.stdout)
        assert not processes(folder)
        assert not list(Path(folder).iterdir())


@pytest.mark.slow
def test_the_demo_ends_with_1_when_something_was_lost() -> None:
    done = fieldpost("demo", "--seconds", "12", "--cut-after", "60", "--lose", "2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert not re.search(r" 0 lost", done.stdout)


def processes(word: str) -> list[str]:
    """Command lines of running processes that have `word` in them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_text()
            except OSError:
                continue
            if word in line:
                found.append(line)
    return found
