"""Options that several verbs share, and where a running gateway is found."""

from __future__ import annotations

from pathlib import Path

import click

from ..config import folders, load

config = click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The configuration file.  [default: gateway.toml in /etc/fieldpost, without root ~/.config/fieldpost]",
)

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")


def config_file(given: Path | None) -> Path:
    """The configuration file that is meant."""
    return given if given is not None else folders().config / "gateway.toml"


def control_socket(given: Path | None) -> Path:
    """The control socket of the gateway that is meant: by its configuration file, else in the default place."""
    path = config_file(given)
    if given is None and not path.exists():
        return folders().run / "control.sock"
    return load(path).control
