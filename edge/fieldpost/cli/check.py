"""`fieldpost check`: is a configuration right?"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from ..config import load
from ..errors import ConfigError
from . import options


@click.command("check")
@options.config
@options.as_json
def command(config_path: Path | None, as_json: bool) -> None:
    """Check a configuration; tell all its faults at once, each by its path and with what is allowed.

    Ends with 0 where it can be used, with 2 where it can't. Changes nothing, connects to nothing.

    \b
    Examples:
      fieldpost check --config gateway.toml
      fieldpost check --config gateway.toml --json
    """
    path = options.config_file(config_path)
    try:
        config = load(path)
    except ConfigError as error:
        if not as_json:
            raise
        click.echo(json.dumps({"ok": False, "config": str(path), "faults": error.faults}))
        sys.exit(2)
    if as_json:
        click.echo(json.dumps({"ok": True, "config": str(path), "faults": []}))
        return
    click.echo(f"{path} is right:")
    click.echo(f"  gateway  {config.name}, data in {config.data}")
    click.echo(f"  broker   {config.broker.kind} on {config.broker.host}:{config.broker.port}")
    for uplink in config.uplinks:
        click.echo(f"  uplink   {uplink.name}: {uplink.kind}, {uplink.url}")
    for route in config.routes:
        click.echo(f"  route    {route.id} -> {route.uplink}")
    if not config.routes:
        click.echo("  no route yet: readings are stored and go nowhere; add [[uplinks]] and [[routes]]")
