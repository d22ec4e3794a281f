"""`fieldpost simulate`: nodes without hardware, against a gateway."""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import click

from ..control import ask
from ..errors import Unreachable
from ..firmware import micropython
from ..simulate import LightNodes, SimulatedNode, write_settings
from . import options

TELL_EVERY_S = 5.0


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
    with tempfile.TemporaryDirectory(prefix="fieldpost-nodes-") as temporary:
        folders = []
        for number in range(1, count + 1):
            enrolled = ask(door, "add", node=f"sim-{number}")
            folders.append((folder or Path(temporary)) / f"sim-{number}")
            write_settings(folders[-1], enrolled, rate, {})
        kind = "in one process" if light else "as MicroPython processes"
        if not light and micropython() is None:
            kind = "as CPython processes: there is no MicroPython on this machine"
        click.echo(f"{count} nodes, {rate:g} rows/s each, {kind}; files in {folder or temporary}")
        nodes: list[SimulatedNode] | LightNodes
        nodes = LightNodes(folders) if light else [SimulatedNode(one) for one in folders]
        ended = _until_signal()
        try:
            if isinstance(nodes, LightNodes):
                nodes.start()
            else:
                for node in nodes:
                    node.start()
            _tell(door, ended, seconds)
        finally:
            click.echo("stopping the nodes")
            if isinstance(nodes, LightNodes):
                nodes.stop()
            else:
                for node in nodes:
                    node.stop()


def _until_signal() -> threading.Event:
    """Set by Ctrl-C and SIGTERM."""
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    return ended


def _tell(door: Path, ended: threading.Event, seconds: float | None) -> None:
    """Say now and then how the nodes are, as the gateway sees them."""
    deadline = time.monotonic() + seconds if seconds else None
    while not ended.is_set():
        left = deadline - time.monotonic() if deadline else TELL_EVERY_S
        if left <= 0:
            return
        ended.wait(min(left, TELL_EVERY_S))
        try:
            status: dict[str, Any] = ask(door, "status")
        except Unreachable as error:
            click.echo(f"the gateway does not answer: {error}")
            continue
        ours = [node for node in status["nodes"] if node["node"].startswith("sim-")]
        up = sum(node["state"] == "up" for node in ours)
        rows = sum(node["readings"] for node in ours)
        click.echo(f"{up} of {len(ours)} nodes up, {rows} readings taken, {status['spool']['head']} records in all")
