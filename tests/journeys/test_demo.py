"""The demo's count, and that nothing of it stays behind however it ends."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fieldpost.cli.demo import told
from fieldpost.demo import Verdict
from parts import until

pytest.importorskip("iotcore", reason="the demo's broker is not there for this processor")

COUNT = re.compile(
    r"(\d+) readings acknowledged to the nodes \(of (\d+) measured\), (\d+) arrived upstream, (\d+) lost; "
    r"(\d+) repeats recognised by their ids, (\d+) reported as gaps"
)
Started = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def place() -> Iterator[Path]:
    """A TMPDIR of the demo's own: what it starts has this in its command line. Short, as a unix socket's path is."""
    folder = Path(tempfile.mkdtemp(prefix="fpd-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def demo(place: Path) -> Iterator[Started]:
    """Starts `fieldpost demo ...`; ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-u", "-m", "fieldpost", "demo", *words]
        env = {**os.environ, "TMPDIR": str(place)}
        out, err = subprocess.PIPE, subprocess.STDOUT
        started.append(subprocess.Popen(command, stdout=out, stderr=err, text=True, env=env, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def environed(place: Path) -> list[str]:
    """Whatever runs with this TMPDIR: each process of the demo, also one whose command line does not tell."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"TMPDIR={place}\0".encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_text().replace("\0", " ")[:100])
            except OSError:
                continue
    return found


def test_a_count_is_good_only_where_something_was_promised_and_nothing_lost() -> None:
    assert Verdict(10, 10, 10, 0, 0, 0).good
    assert not Verdict(10, 10, 9, 1, 0, 0).good
    nothing = Verdict(10, 0, 10, 0, 0, 0)
    assert not nothing.good and "nothing is proved" in told(nothing)


@pytest.mark.slow
def test_the_count_holds_after_an_outage_and_nothing_is_left(demo: Started, place: Path) -> None:
    process = demo("--seconds", "14", "--cut-after", "6", "--cut-for", "3")
    out, _ = process.communicate(timeout=90)
    count = COUNT.search(out)
    assert process.returncode == 0 and count, out
    acknowledged, measured, arrived, lost, _, gaps = map(int, count.groups())
    assert lost == 0 and gaps == 0
    assert 0 < acknowledged <= arrived <= measured
    assert "CUT for 3 s" in out and "the backlog has arrived" in out
    assert environed(place) == [] and list(place.iterdir()) == []


@pytest.mark.slow
def test_a_message_that_upstream_confirms_and_swallows_is_found_out(demo: Started) -> None:
    process = demo("--seconds", "5", "--cut-after", "60", "--lose", "2")
    out, _ = process.communicate(timeout=90)
    count = COUNT.search(out)
    assert process.returncode == 1 and count and int(count[4]) > 0, out


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_an_outage_ends_with_a_count(demo: Started, place: Path) -> None:
    process = demo("--cut-after", "6", "--cut-for", "60")
    assert process.stdout
    for line in process.stdout:
        if "CUT" in line:
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "the line is back" in out and COUNT.search(out), out
    assert environed(place) == [] and list(place.iterdir()) == []


@pytest.mark.slow
def test_sigterm_while_it_starts_leaves_nothing(demo: Started, place: Path) -> None:
    process = demo()
    until(lambda: any("fieldpost run" in line for line in environed(place)), "the gateway is starting")
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in out, out
    assert environed(place) == [] and list(place.iterdir()) == []


@pytest.mark.slow
def test_kill_9_leaves_no_process(demo: Started, place: Path) -> None:
    process = demo()
    assert process.stdout
    for line in process.stdout:
        if "the first reading arrived" in line:
            break
    assert len(environed(place)) >= 7  # demo, upstream, gateway, its broker, three nodes
    process.send_signal(signal.SIGKILL)
    until(lambda: environed(place) == [], "every process of the demo has ended")
