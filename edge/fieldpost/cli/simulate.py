"""`fieldpost simulate`: nodes without hardware, against a gateway."""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import click

from ..control import ask
from ..errors import Unreachable
from ..firmware import micropython
from ..simulate import LightNodes, ProcessNodes, write_settings
from . import options

TELL_EVERY_S = 5.0
SHOWN = 5


@click.command("simulate")
@options.config
@click.option("--nodes", "count", type=click.IntRange(1, 2000), default=3, show_default=True, help="How many.")
@click.option(
    "--rate", type=click.FloatRange(0.001, 50), default=1.0, show_default=True, help="Rows a second of each node."
)
@click.option("--light", is_flag=True, help="All in one process (the same node code under CPython), for many nodes.")
@click.option("--seconds", type=click.FloatRange(min=1), help="End after so long.  [default: on Ctrl-C]")
@click.option(
    "--folder", type=click.Path(file_okay=False, path_type=Path), help="Where the nodes' files are; kept when named."
)
def command(
    config_path: Path | None, count: int, rate: float, light: bool, seconds: float | None, folder: Path | None
) -> None:
    """Run simulated nodes sim-1, sim-2, ... against a running gateway.

    They are the real node code with simulated sensors, each in a MicroPython process. The gateway lets them in; a
    node of the same name that it knew before is shut out by that.

    \b
    Examples:
      fieldpost simulate --nodes 10 --rate 2
      fieldpost simulate --nodes 200 --rate 0.2 --light --seconds 60
    """
    door = options.control_socket(config_path)
    names = [f"sim-{number}" for number in range(1, count + 1)]
    ended = _until_signal()
    with tempfile.TemporaryDirectory(prefix="fieldpost-nodes-") as temporary:
        folders = [(folder or Path(temporary)) / name for name in names]
        for name, one in zip(names, folders, strict=True):
            if ended.is_set():
                return
            write_settings(one, ask(door, "add", node=name), rate, {})
        click.echo(f"{count} nodes, {rate:g} rows/s each, {_kind(light)}; files in {folder or temporary}")
        nodes = LightNodes(folders) if light else ProcessNodes(folders)
        try:
            nodes.start()
            _tell(door, names, nodes, ended, seconds)
        finally:
            click.echo("stopping the nodes")
            nodes.stop()


def _kind(light: bool) -> str:
    if light:
        return "in one process"
    if micropython() is None:
        return "as CPython processes: there is no MicroPython on this machine"
    return "as MicroPython processes"


def _until_signal() -> threading.Event:
    """Set by Ctrl-C and SIGTERM."""
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    return ended


def _tell(
    door: Path, names: list[str], nodes: LightNodes | ProcessNodes, ended: threading.Event, seconds: float | None
) -> None:
    """Say now and then how the nodes are, as the gateway sees them, until `ended` or `seconds` are over."""
    deadline = time.monotonic() + seconds if seconds else None
    gone: set[str] = set()
    while not ended.is_set():
        left = deadline - time.monotonic() if deadline else TELL_EVERY_S
        if left <= 0:
            return
        if ended.wait(min(left, TELL_EVERY_S)):
            return
        for name in set(nodes.ended()) - gone:
            gone.add(name)
            click.echo(f"{name} has ended by itself; its log is node.log in its folder")
        try:
            click.echo(progress(names, ask(door, "status")))
        except Unreachable as error:
            click.echo(f"the gateway does not answer: {error}")


def progress(names: Sequence[str], status: dict[str, Any]) -> str:
    """How our nodes are, in one line: those that are not up by their names, the first few of each state."""
    known = {node["node"]: node for node in status["nodes"]}
    by_state: dict[str, list[str]] = {}
    for name in names:
        by_state.setdefault(known[name]["state"] if name in known else "not seen yet", []).append(name)
    up = len(by_state.pop("up", ()))
    rows = sum(known[name]["readings"] for name in names if name in known)
    others = "".join(f"; {state}: {_few(those)}" for state, those in sorted(by_state.items()))
    return f"{up} of {len(names)} nodes up, {rows} readings taken{others}"


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
