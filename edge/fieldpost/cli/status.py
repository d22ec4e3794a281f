"""`fieldpost status`: one screen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .. import metrics
from ..control import ask
from . import options


@click.command("status")
@options.config
@options.as_json
@click.option("--metrics", "as_metrics", is_flag=True, help="Print every figure in the form that Prometheus reads.")
def command(config_path: Path | None, as_json: bool, as_metrics: bool) -> None:
    """Show how a running gateway is: nodes, spool, uplinks.

    \b
    Examples:
      fieldpost status
      fieldpost status --config gateway.toml --json
      fieldpost status --metrics > /var/lib/prometheus/node-exporter/fieldpost.prom
    """
    answer = ask(options.control_socket(config_path), "status")
    if as_json:
        click.echo(json.dumps(answer))
        return
    if as_metrics:
        click.echo(metrics.text(metrics.metrics(answer)), nl=False)
        return
    from rich.console import Console

    console = Console(highlight=False)
    for part in screen(answer):
        console.print(part)


def screen(status: dict[str, Any]) -> list[Any]:
    """The parts of the screen, to be printed by rich."""
    from rich.table import Table
    from rich.text import Text

    spool, intake = status["spool"], status["intake"]
    head = Text.assemble(
        (f"{status['gateway']} ", "bold"),
        f"fieldpost {status['version']}, up {age(status['up_s'])}, broker {status['broker']['kind']} on "
        f"{status['broker']['listens']}, nodes are told ",
        (status["state"], "green" if status["state"] == "up" else "bold red"),
    )
    columns = ("uplink", "state", "keeps", "waiting", "backfill", "oldest", "rate", "drained in", "confirmed")
    uplinks = Table(*columns, box=None, pad_edge=False)
    for route in status["routes"]:
        uplinks.add_row(
            route["uplink"],
            Text(route["state"], "green" if route["state"] == "up" else "bold red"),
            "yes" if route["durable"] else "no" if route["state"] == "up" else "-",
            f"{route['backlog']}",
            f"{route['backfill']}",
            age(route["lag_s"]) if route["backlog"] else "-",
            f"{route['rate']:.1f}/s",
            "-" if not route["backlog"] else age(route["drain_min"] * 60) if route["drain_min"] else "?",
            f"{route['confirmed']}",
        )
    nodes = Table("node", "state", "seen", "readings", "missing", "held", "boot", "firmware", box=None, pad_edge=False)
    for node in status["nodes"]:
        nodes.add_row(
            node["node"],
            Text(node["state"], "green" if node["state"] in ("up", "sleep") else "bold red"),
            "never" if node["last_seen_s"] is None else f"{age(node['last_seen_s'])} ago",
            f"{node['readings']}",
            Text(f"{node['missing']}", "bold red" if node["missing"] else ""),
            f"{node['queued']}",
            f"{node['boot']}",
            node["firmware"] or "-",
        )
    backlog = max([0, *(route["backlog"] for route in status["routes"])])
    lines = [
        f"spool    {spool['state']}{': ' + spool['detail'] if spool['detail'] else ''}; {backlog} readings waiting, "
        f"{spool['stored']} on the card, {spool['bytes'] / 1e6:.1f} MB used, {spool['free_bytes'] / 1e9:.1f} GB free, "
        f"{spool['repeats']} repeats recognised, {spool['set_aside']} set aside"
    ]
    outlook = []
    if spool["hours_until_full"] is not None:
        outlook.append(f"full in {age(spool['hours_until_full'] * 3600)} without any uplink")
    if spool["card_bytes_per_reading"] is not None:
        outlook.append(f"{spool['card_bytes_per_reading']:.0f} bytes written per reading")
    if spool["card_life_years"] is not None:
        outlook.append(f"at this rate a plain card lasts {min(999, spool['card_life_years']):.0f} years (estimate)")
    if outlook:
        lines.append("outlook  " + ", ".join(outlook))
    lines += [
        f"removed  route {route} is not configured any more; {count} readings are kept for it"
        for route, count in sorted(spool["removed"].items())
    ]
    if spool["ledger"]:
        lines.append("given up " + ", ".join(f"{count} x {why}" for why, count in sorted(spool["ledger"].items())))
    if intake["rejected"]:
        lines.append("rejected " + ", ".join(f"{count} x {why}" for why, count in sorted(intake["rejected"].items())))
    trouble = [f"uplink {r['uplink']}: {r['detail']}" for r in status["routes"] if r["detail"]]
    trouble += [node["conflict"] for node in status["nodes"] if node["conflict"]]
    parts: list[Any] = [head, *lines, ""]
    parts += [uplinks] if status["routes"] else ["no route: readings are stored and go nowhere"]
    parts += ["", nodes] if status["nodes"] else ["", "no node has been heard yet"]
    parts += ["", *(Text(f"! {one}", "bold red") for one in trouble)] if trouble else []
    return parts


def age(seconds: float) -> str:
    """A span that a person can read: `3.2 s`, `5 min`, `7.5 h`, `3.0 d`."""
    for limit, unit, divisor in ((90, "s", 1.0), (5400, "min", 60.0), (172_800, "h", 3600.0)):
        if seconds < limit:
            value = seconds / divisor
            return f"{value:.0f} {unit}" if value >= 10 or unit == "min" else f"{value:.1f} {unit}"
    return f"{seconds / 86_400:.1f} d"
