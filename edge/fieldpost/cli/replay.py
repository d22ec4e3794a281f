"""`fieldpost replay`: send again what is kept."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path

import click

from ..config import parse_duration
from ..control import ask
from . import options


@click.command("replay")
@options.config
@options.as_json
@click.option("--route", required=True, help="The id of the route whose uplink gets them again.")
@click.option("--since", required=True, help='From when on: "6h" (ago), or a date such as 2026-11-24T06:00.')
@click.option("--until", default="", help="Until when, in the same form.  [default: now]")
@click.option("--node", default="", help="Only the readings of this node.")
def command(config_path: Path | None, as_json: bool, route: str, since: str, until: str, node: str) -> None:
    """Send stored readings to an uplink again, with the same ids, marked as backfill.

    What was delivered is kept for the time that `keep` in the configuration says. Fresh readings go first.

    \b
    Examples:
      fieldpost replay --route all --since 6h
      fieldpost replay --route all --since 2026-11-24T06:00 --until 2026-11-24T09:00 --node greenhouse-1
    """
    answer = ask(
        options.control_socket(config_path),
        "replay",
        route=route,
        since_ms=moment_ms(since, "--since"),
        until_ms=moment_ms(until, "--until") if until else 0,
        node=node,
    )
    if as_json:
        click.echo(json.dumps(answer))
    elif answer["readings"]:
        click.echo(f"up to {answer['readings']} readings will be sent again; `fieldpost status` shows how far it is")
    else:
        click.echo("nothing to send again: nothing is kept of that time, or all of it waits to be sent already")


def moment_ms(text: str, option: str) -> int:
    """Unix milliseconds of "6h" (so long ago) or of an ISO date, local time where it names no zone."""
    ago = parse_duration(text)
    if ago is not None:
        return round((time.time() - ago) * 1000)
    try:
        return round(datetime.fromisoformat(text).timestamp() * 1000)
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither like 6h nor like 2026-11-24T06:00", param_hint=option) from None
