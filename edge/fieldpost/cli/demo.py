"""`fieldpost demo`: the whole way on this machine, an outage included."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..demo import NODES, RATE, Demo, Plan, Verdict
from ..errors import ConfigError
from ..firmware import micropython
from .watch import plain, table

DRAIN_WITHIN_S = 20.0
LINES_EVERY_S = 5.0


@click.command("demo")
@click.option("--seconds", type=click.FloatRange(min=5), help="End after so long.  [default: on Ctrl-C]")
@click.option("--cut-after", type=float, default=15.0, show_default=True, help="Seconds until the line is cut.")
@click.option("--cut-for", type=float, default=10.0, show_default=True, help="Seconds that it stays cut.")
@click.option("--lose", type=int, default=0, hidden=True, help="For the tests: messages that upstream swallows.")
def command(seconds: float | None, cut_after: float, cut_for: float, lose: int) -> None:
    """Show the whole way on this machine: three nodes, a gateway, an upstream, and a line that is cut for a while.

    No hardware, no root; everything listens on loopback and is gone afterwards. Ends with 1 if an acknowledged
    reading was lost, or none was acknowledged.

    \b
    Examples:
      fieldpost demo
      fieldpost demo --seconds 40
    """
    if importlib.util.find_spec("iotcore") is None:
        raise ConfigError(["the demo's broker is not installed: pip install 'fieldpost[demo]'"])
    try:
        verdict = asyncio.run(_show(seconds, Plan(cut_after, cut_for, lose)))
    except asyncio.CancelledError:
        click.echo("ended before there was anything to judge", err=True)
        sys.exit(1)
    click.echo(told(verdict))
    sys.exit(0 if verdict.good else 1)


async def _show(seconds: float | None, plan: Plan) -> Verdict:
    ended = asyncio.Event()
    this = asyncio.current_task()
    assert this is not None
    _on_signal(this.cancel)  # nothing to judge yet, only to clean up
    board = "MicroPython" if micropython() else "CPython (no MicroPython for this processor)"
    click.echo(f"{len(NODES)} nodes under {board}, {RATE:g} rows/s each -> gateway -> line -> upstream")
    with tempfile.TemporaryDirectory(prefix="fieldpost-demo-") as folder:
        demo = Demo(Path(folder), plan)
        began = time.monotonic()
        async with demo.running():
            _on_signal(ended.set)
            click.echo(f"the first reading arrived upstream after {time.monotonic() - began:.1f} s")
            with _screen(demo) as say:
                outage = asyncio.create_task(_outage(demo, plan, say))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await ended.wait()
                outage.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await outage
                if demo.line == "cut":
                    await demo.mend()
                    say("the line is back")
                _on_signal(this.cancel)  # once more, and we don't wait for the count
                say("the nodes stop; waiting for the last readings")
                return await demo.finish(DRAIN_WITHIN_S)


def _on_signal(what: Callable[[], object]) -> None:
    """From now on Ctrl-C and SIGTERM do this."""
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, what)


async def _outage(demo: Demo, plan: Plan, say: Any) -> None:
    await asyncio.sleep(plan.cut_after_s)
    await demo.cut()
    say(f"the line to upstream is CUT for {plan.cut_for_s:g} s; the nodes go on, the gateway keeps their readings")
    await asyncio.sleep(plan.cut_for_s)
    waiting, before = demo.backlog(), time.monotonic()
    await demo.mend()
    say(f"the line is back; {waiting} readings wait at the gateway")
    while demo.backlog() > len(NODES):
        await asyncio.sleep(0.05)
    say(f"the backlog has arrived, {time.monotonic() - before:.1f} s after the line was back")


@contextlib.contextmanager
def _screen(demo: Demo) -> Any:
    """A live table in a terminal, a few lines now and then in a pipe; yields how to say something."""
    live: Any = None
    if sys.stdout.isatty():
        from rich.live import Live

        live = Live(refresh_per_second=4)
    began = time.monotonic()

    def say(text: str) -> None:
        line = f"{time.monotonic() - began:5.1f} s  {text}"
        live.console.print(line, highlight=False) if live else click.echo(line)

    async def draw() -> None:
        while True:
            await asyncio.sleep(0.25 if live else LINES_EVERY_S)
            link = f"line {demo.line}, {demo.backlog()} readings wait at the gateway"
            if live:
                live.update(table(demo.tally, link))
            else:
                click.echo("\n".join([f"        {link}", *(f"        {one}" for one in plain(demo.tally))]))

    drawer = asyncio.get_running_loop().create_task(draw())
    try:
        with live or contextlib.nullcontext():
            yield say
    finally:
        drawer.cancel()


def told(verdict: Verdict) -> str:
    """The count, in words."""
    return (
        f"{verdict.acknowledged} readings acknowledged to the nodes (of {verdict.measured} measured), "
        f"{verdict.arrived} arrived upstream, {verdict.lost} lost; "
        f"{verdict.repeats} repeats recognised by their ids, {verdict.gaps} reported as gaps"
        + ("" if verdict.acknowledged else "; nothing was acknowledged, so nothing is proved")
    )
