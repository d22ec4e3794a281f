"""`fieldpost watch`: the readings that arrive upstream, live."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import click

from ..forms import Arrived
from ..upstream import check, consume
from ..watch import HISTORY, Channel, Tally, sparkline

REFRESH_S = 0.25
LINES_EVERY_S = 5.0
COUNTS = ("readings", "repeats", "late", "gaps")
BESIDE = 90
"""What the other columns of the table take, about; the picture of the last values has the rest."""


@click.command("watch")
@click.argument("url")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON for each reading.")
@click.option("--count", type=click.IntRange(min=1), help="End after so many different readings.")
@click.option(
    "--password-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Where the password is."
)
def command(url: str, as_json: bool, count: int | None, password_file: Path | None) -> None:
    """Show the readings that arrive upstream at URL, live: values, gaps and repeats by node.

    \b
    URL is one of
      mqtt://user@host:port/topic                       (?version=3.1.1 for an old broker)
      amqp://user@host:port/vhost?queue=NAME            takes the messages out of that queue
      amqp://user@host:port/vhost?exchange=NAME         gets copies
    and mqtts:// or amqps:// for TLS.

    \b
    Examples:
      fieldpost watch mqtt://localhost:1883/fieldpost/farm-1
      fieldpost watch 'amqp://me@broker:5672/%2F?queue=fieldpost' --password-file pw --json --count 100
    """
    check(url)
    password = password_file.read_text().strip() if password_file else ""
    watch = _Watch(url, password, count)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(watch.json_lines() if as_json else watch.table() if sys.stdout.isatty() else watch.lines())
    click.echo(summary(watch.tally), err=True)


class _Watch:
    def __init__(self, url: str, password: str, count: int | None) -> None:
        self.tally = Tally()
        self._url = url
        self._password = password
        self._count = count
        self._link = "connecting"

    async def json_lines(self) -> None:
        async with contextlib.aclosing(self._arriving()) as arriving:
            async for rows in arriving:
                for row, repeat in rows:
                    click.echo(json.dumps(as_dict(row, repeat)))

    async def lines(self) -> None:
        """For a pipe: a line a node, every few seconds."""
        printer = asyncio.create_task(self._print_lines())
        try:
            await self._take_all()
        finally:
            printer.cancel()
        click.echo("\n".join(plain(self.tally)))

    async def table(self) -> None:
        from rich.live import Live

        with Live(refresh_per_second=4, screen=False) as live:
            drawer = asyncio.create_task(self._draw(live))
            try:
                await self._take_all()
            finally:
                drawer.cancel()
                live.update(table(self.tally, self._link))

    async def _take_all(self) -> None:
        async with contextlib.aclosing(self._arriving()) as arriving:
            async for _ in arriving:
                pass

    async def _arriving(self) -> Any:
        async with contextlib.aclosing(consume(self._url, password=self._password, changed=self._changed)) as arriving:
            async for arrival in arriving:
                yield self.tally.take(arrival.body)
                if self._count is not None and self.tally.readings >= self._count:
                    return

    def _changed(self, up: bool, text: str) -> None:
        self._link = f"{'connected to' if up else 'lost, coming back:'} {text}"
        if not sys.stdout.isatty():
            click.echo(self._link, err=True)

    async def _print_lines(self) -> None:
        while True:
            await asyncio.sleep(LINES_EVERY_S)
            click.echo("\n".join(plain(self.tally)))

    async def _draw(self, live: Any) -> None:
        while True:
            live.update(table(self.tally, self._link))
            await asyncio.sleep(REFRESH_S)


def as_dict(row: Arrived, repeat: bool) -> dict[str, Any]:
    """A reading as one JSON object."""
    event = row.event
    return {
        "id": row.id,
        "node": row.node,
        "install": row.install,
        "boot": row.boot,
        "seq": row.seq,
        "time": row.time_s,
        "error_s": row.error_s,
        "values": {name: value for name, (value, _) in row.values.items()},
        "repeat": repeat,
        "event": None
        if event is None
        else {
            "kind": event.kind,
            "node": event.node,
            "install": event.install,
            "boot": event.boot,
            "first": event.first,
            "last": event.last,
            "why": event.why,
        },
    }


def table(tally: Tally, link: str) -> Any:
    """The screen, to be printed by rich."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows = Table(box=None, pad_edge=False)
    for column in ("node", "channel", "value", "newest last", "measured", *COUNTS):
        rows.add_column(column, justify="right" if column in ("value", *COUNTS) else "left")
    notes = []
    shown = max(8, min(HISTORY, shutil.get_terminal_size().columns - BESIDE))
    for name, node in sorted(tally.nodes.items()):
        first = True
        # Text, never str: rich would take a name like "[/x]" for its own markup.
        head = [Text(printable(f"{name} {'' if node.state == 'up' else node.state}"), "bold")]
        counts = [str(node.readings), str(node.repeats), str(node.disordered)]
        tail = [Text(one) for one in counts] + [Text(str(node.gaps), "bold red" if node.gaps else "")]
        for channel_name, channel in node.channels.items():
            rows.add_row(
                *(head if first else [""]),
                Text(printable(channel_name)),
                Text(_value(channel), "" if isinstance(channel.value, float) else "bold red"),
                sparkline(list(channel.history)[-shown:]),
                _clock(node.time_s) + _error(node.error_s) if first else "",
                *(tail if first else []),
            )
            first = False
        if first:
            rows.add_row(*head, "", "", "", "", *tail)
        if node.newest_gap:
            notes.append(Text(printable(f"gap of {name}: {node.newest_gap}")))
    return Group(Text(printable(link), "dim"), rows, *notes, Text(summary(tally), "dim"))


def plain(tally: Tally) -> list[str]:
    """The same for a pipe: a line a node."""
    lines = []
    for name, node in sorted(tally.nodes.items()):
        state = f" ({node.state})" if node.state not in ("", "up") else ""
        values = ", ".join(f"{channel} {_value(c)}" for channel, c in node.channels.items())
        late = f", {node.disordered} out of order" if node.disordered else ""
        gap = f"; gap {node.newest_gap}" if node.newest_gap else ""
        counts = f"{node.readings} readings, {node.repeats} repeats{late}, {node.gaps} gaps"
        lines.append(printable(f"{name}{state}: {counts}; {values}{gap}"))
    return lines or ["nothing has arrived yet"]


def summary(tally: Tally) -> str:
    """What came, in one line."""
    malformed = f", {tally.malformed} messages not understood" if tally.malformed else ""
    missing = sum(node.missing for node in tally.nodes.values())
    return (
        f"{tally.readings} readings of {len(tally.nodes)} nodes, {tally.repeats} repeats recognised, "
        f"{missing} reported missing, {tally.bytes} bytes{malformed}"
    )


def printable(text: str) -> str:
    """`text` without what would steer a terminal: it comes from the network."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def _value(channel: Channel) -> str:
    value = channel.value
    return printable(f"{value:g} {channel.unit}".rstrip() if isinstance(value, float) else value)


def _clock(time_s: float) -> str:
    try:
        return time.strftime("%H:%M:%S", time.localtime(time_s))
    except (OverflowError, OSError, ValueError):
        return "no date"


def _error(error_s: float) -> str:
    return " or earlier" if error_s < 0 else f" ±{error_s:.1f} s"
