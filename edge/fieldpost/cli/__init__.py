"""The command line: one verb a file. A verb is imported when it is used, so that `--help` is quick."""

from __future__ import annotations

import importlib
import sys

import click

from .. import __version__
from ..errors import ConfigError, FieldpostError

VERBS = {
    "run": "Run the gateway: carry readings from the nodes to the uplinks.",
    "check": "Check a configuration; tell all its faults at once.",
    "status": "Show how a running gateway is: nodes, spool, uplinks.",
    "spool": "Look at the stored readings, check them, take them out, repair the file.",
    "replay": "Send stored readings to an uplink again.",
    "watch": "Show the readings that arrive upstream, live.",
    "simulate": "Run simulated nodes against a gateway.",
    "demo": "Show the whole way on this machine, an outage included.",
}


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(f".{cmd_name}", __package__).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fieldpost")
def cli() -> None:
    """Fieldpost: the way a reading takes from a sensor to the cloud without getting lost.

    \b
    Examples:
      fieldpost demo                               the whole way, no hardware
      fieldpost check --config gateway.toml        is the configuration right?
      fieldpost run --config gateway.toml          the gateway
      fieldpost status                             how is it?
    """


def main() -> None:
    """The entry point: an error that is ours is told in its own words, and ends with 1."""
    try:
        cli()
    except ConfigError as error:
        click.echo(f"the configuration has {_count(len(error.faults), 'fault')}:", err=True)
        for fault in error.faults:
            click.echo(f"  {fault}", err=True)
        sys.exit(2)
    except FieldpostError as error:
        click.echo(f"fieldpost: {error}", err=True)
        sys.exit(1)


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
