"""Simulated nodes: their files, their end, and what is said of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fieldpost import firmware
from fieldpost.cli.simulate import progress
from fieldpost.simulate import ProcessNodes, SimulatedNode, write_settings
from parts import until
from servers import free_port


def settings_in(folder: Path) -> Path:
    """A node that knows a gateway which is not there: it samples and tries."""
    enrolled = {"node": folder.name, "key": "k" * 64, "host": "127.0.0.1", "port": free_port()}
    write_settings(folder, enrolled, 10, {"first_wait_ms": 50})
    return folder


def test_settings_can_be_read_by_their_owner_only(tmp_path: Path) -> None:
    folder = settings_in(tmp_path / "sim-1")
    assert (folder / "settings.json").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700


def test_progress_names_our_nodes_that_are_not_up_and_leaves_out_others() -> None:
    nodes = [
        {"node": "sim-1", "state": "up", "readings": 5},
        {"node": "sim-2", "state": "lost", "readings": 2},
        {"node": "sim-99", "state": "up", "readings": 1000},
    ]
    told = progress([f"sim-{n}" for n in range(1, 10)], {"nodes": nodes})
    unseen = "not seen yet: sim-3, sim-4, sim-5, sim-6, sim-7 and 2 more"
    assert told == f"1 of 9 nodes up, 7 readings taken; lost: sim-2; {unseen}"


def test_a_node_that_ended_by_itself_is_named(tmp_path: Path) -> None:
    well, broken = settings_in(tmp_path / "well"), settings_in(tmp_path / "broken")
    (broken / "settings.json").write_text("{}")
    nodes = ProcessNodes([well, broken])
    nodes.start()
    try:
        until(lambda: nodes.ended() == ["broken"], "the node without settings has ended")
    finally:
        nodes.stop()
    assert nodes.ended() == ["well", "broken"]


def test_a_killed_node_begins_its_next_boot(tmp_path: Path) -> None:
    node = SimulatedNode(settings_in(tmp_path / "n1"))
    try:
        for boot in (1, 2):
            node.start()
            until(lambda: f"boot {boot}\n" in node.log.read_text(), f"boot {boot}")  # noqa: B023
            assert node.alive
            node.kill()
            assert not node.alive
    finally:
        node.stop()


def test_a_child_gets_its_signal_when_the_parent_is_killed(tmp_path: Path) -> None:
    told = tmp_path / "told"
    child = f"import signal, pathlib, time; pathlib.Path({str(told)!r}).write_text('ready')\n"
    child += f"signal.sigtimedwait([15], 60); pathlib.Path({str(told)!r}).write_text('told')"
    parent = (
        "import signal, subprocess, sys\nfrom fieldpost.simulate import end_with_parent\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [15])\n"  # inherited, so that the child can wait for it
        f"subprocess.Popen([sys.executable, '-c', {child!r}], preexec_fn=end_with_parent(signal.SIGTERM)).wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    until(lambda: told.exists() and told.read_text() == "ready", "the child waits")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until(lambda: told.read_text() == "told", "the child has its signal")


def test_umqtt_is_found_in_the_environment_of_an_installed_fieldpost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simple = tmp_path / "share/fieldpost/upy/umqtt/simple.py"
    simple.parent.mkdir(parents=True)
    simple.touch()
    monkeypatch.delenv("FIELDPOST_UMQTT", raising=False)
    monkeypatch.setattr(firmware, "_CHECKOUT", tmp_path / "none")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert firmware.umqtt_folder() == tmp_path / "share/fieldpost/upy"
